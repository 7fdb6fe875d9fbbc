"""From a study to a network's input and back.

:class:`PreparationSpec` needs no torch; everything else is imported with its first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from napari_brainmvp.preparation.spec import PreparationSpec

if TYPE_CHECKING:
    from napari_brainmvp.preparation.prepared import PreparedStudy, prepare

__all__ = ["PreparationSpec", "PreparedStudy", "prepare"]


def __getattr__(name: str) -> Any:
    if name in ("PreparedStudy", "prepare"):
        from napari_brainmvp.preparation import prepared

        return getattr(prepared, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
