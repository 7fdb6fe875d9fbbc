"""What the labels of several datasets mean, taken together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from napari_brainmvp.errors import StudyError
from napari_brainmvp.synthesis import LABEL_NAMES
from napari_brainmvp.training.labels import LabelDescription, find_labels
from napari_brainmvp.training.sources import DataSource

__all__ = ["describe_labels"]


def describe_labels(sources: Sequence[DataSource]) -> LabelDescription | None:
    """Read what labels mean from the ``dataset.json`` of each dataset; None where none says it.

    Raises
    ------
    StudyError
        Two say different things: one number would mean both.
    """
    known: LabelDescription | None = None
    where = ""
    for source in sources:
        if source.seeds is not None:
            found: LabelDescription | None = LabelDescription(labels=LABEL_NAMES)
        else:
            found = find_labels(Path(source.path).expanduser())
        if found is None:
            continue
        if known is not None and known.model_dump(exclude={"colors"}) != found.model_dump(exclude={"colors"}):
            raise StudyError(
                f"Labels mean one thing in {where} and another in {source.path}: say what they mean with --labels, "
                "or use one dataset."
            )
        known, where = known or found, where or source.path
    return known
