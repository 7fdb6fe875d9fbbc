"""Fine-tuning: from a few annotated studies, or studies with a class each, to a model of one's own.

:class:`FinetuneSpec` needs no torch; :func:`finetune` is imported with its first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from napari_brainmvp.training.finetuning.spec import PRESETS, FinetuneSpec, read_spec

if TYPE_CHECKING:
    from napari_brainmvp.training.finetuning.engine import finetune

__all__ = ["PRESETS", "FinetuneSpec", "finetune", "read_spec"]


def __getattr__(name: str) -> Any:
    if name == "finetune":
        from napari_brainmvp.training.finetuning.engine import finetune

        return finetune
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
