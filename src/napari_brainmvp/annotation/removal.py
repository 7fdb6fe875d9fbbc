"""Which classes may leave a project: none whose number would stay behind without a meaning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from napari_brainmvp.annotation.content import LabelClass, ProjectContent
from napari_brainmvp.annotation.history import LabelHistory
from napari_brainmvp.errors import StudyError

__all__ = ["leaving_class"]

_MOST = 5
"""Studies that are named."""


def leaving_class(
    value: int, content: ProjectContent, folder: Path, histories: Mapping[str, LabelHistory]
) -> LabelClass:
    """Return the class of a number, if it may leave.

    Parameters
    ----------
    value : int
    content : ProjectContent
    folder : Path
        The project's.
    histories : mapping of str to LabelHistory
        Those that are open, by the name of their study.

    Raises
    ------
    StudyError
        There is none, it is the background, a region is made of it, or it is painted on a study. A study that has left
        the project brings its classes back with it.
    FileError
        A study's labels are damaged.
    """
    gone = next((c for c in content.classes if c.value == value), None)
    if gone is None:
        raise StudyError(f"The project has no class of the number {value}.")
    if gone.background:
        raise StudyError(f"{gone.name} is the background class, which a project needs: it cannot be removed.")
    within = [name for name, values in content.regions.items() if value in values]
    if within:
        raise StudyError(f"{gone.name} is part of the region {within[0]}: take it out of the region first.")
    painted = []
    for study in content.studies:
        # not kept in memory where nobody has opened them: a volume each
        history = histories.get(study.name) or LabelHistory(folder / "labels" / study.name, study.shape)
        if history.stroke and bool((history.labels == value).any()):
            painted.append(study.name)
    if painted:
        raise StudyError(_refusal(gone.name, painted))
    return gone


def _refusal(name: str, painted: Sequence[str]) -> str:
    """Say where a class is painted, and what to do."""
    more = f" and {len(painted) - _MOST} more" if len(painted) > _MOST else ""
    return (
        f"{name} is painted on {', '.join(painted[:_MOST])}{more}: erase it there, or paint another class over it, "
        "before you remove it."
    )
