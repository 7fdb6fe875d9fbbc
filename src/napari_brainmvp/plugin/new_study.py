"""How a study enters a project: its name, and the labels it begins with."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np
from napari.layers import Labels
from qtpy.QtWidgets import QComboBox, QMessageBox, QWidget

from napari_brainmvp.annotation.content import LabelClass, StudyReference
from napari_brainmvp.annotation.project import AnnotationProject
from napari_brainmvp.errors import Cancelled, StudyError
from napari_brainmvp.io.studies import folder_name, study_folder
from napari_brainmvp.plugin.layers import KEY, LayerOrigin, layer_grid, layer_values
from napari_brainmvp.study import LabelMap, Study

__all__ = ["LabelSource", "enter"]

_MOST = 8
"""Values that a question lists."""


class LabelSource(QComboBox):
    """A choice among a viewer's Labels layers; at first none of them, whatever is selected in the viewer.

    Parameters
    ----------
    viewer : napari.Viewer
    """

    def __init__(self, viewer: Any) -> None:
        super().__init__()
        self._viewer = viewer
        self._own: Collection[Any] = ()
        self.setToolTip(
            "Labels that are there already can be the first stroke of a study that is new in the project, for example "
            "a segmentation to be corrected."
        )
        self.setSizeAdjustPolicy(QComboBox.SizeAdjustPolicy.AdjustToMinimumContentsLengthWithIcon)
        events = viewer.layers.events
        for event in (events.inserted, events.removed, events.renamed):
            event.connect(self._fill)
        self._fill()

    def leave_out(self, layers: Collection[Any]) -> None:
        """Leave out layers that are no source: those of the study that is being annotated."""
        self._own = layers
        self._fill()

    def _fill(self, event: object = None) -> None:
        chosen = self.currentData()
        self.clear()
        self.addItem("Begin without labels", None)
        for layer in self._viewer.layers:
            if isinstance(layer, Labels) and layer.data.ndim == 3 and layer not in self._own:
                self.addItem(f"Begin with {layer.name}", layer)
        self.setCurrentIndex(next((k for k in range(self.count()) if self.itemData(k) is chosen), 0))
        self.setVisible(self.count() > 1)


def enter(project: AnnotationProject, study: Study, layer: Any, parent: QWidget) -> StudyReference:
    """Add a study to a project, with a Labels layer's labels as its first stroke; one that comes back has its own.

    Parameters
    ----------
    project : AnnotationProject
    study : Study
    layer : napari.layers.Labels or None
        None to begin without labels.
    parent : QWidget
        Over which one is asked what the values of the layer mean, where that is not clear.

    Raises
    ------
    StudyError
        The layer lies on another grid.
    FileError
        The project is open elsewhere, or cannot be written.
    Cancelled
        That is what was answered.
    """
    named = replace(study, name=_name_of(study))
    back = project.find(named, removed=True)
    if layer is None or (back is not None and project.labels(back.name).stroke):
        return project.add_study(named)
    known = (*project.removed_classes, *project.classes)  # whose strokes can come back with an undo
    labelled, names = _with_meaning(_with_labels(named, layer), layer, known, parent)
    reference = project.add_study(labelled)
    classes = (c.model_copy(update={"name": names.get(c.value, c.name)}) for c in project.classes)
    project.set_classes(tuple(classes))
    return reference


def _value_names(layer: Any) -> dict[int, str]:
    """Return what a Labels layer says its values are, as results of a segmentation do."""
    features = layer.features
    if not {"index", "structure"} <= set(features.columns):
        return {}
    said = zip(features["index"], features["structure"], strict=True)
    return {int(k): str(name).strip() for k, name in said if k and str(name).strip()}


def _with_labels(study: Study, layer: Any) -> Study:
    """Give a study a layer's labels, where they lie on its grid."""
    origin = layer.metadata.get(KEY)
    values = np.asarray(layer_values(layer)).T
    grid = layer_grid(layer)
    if isinstance(origin, LayerOrigin) and grid is origin.shown and origin.scan is None:
        values, grid = origin.unpermute(values), origin.grid
    if not grid.same_as(study.grid):
        raise StudyError(
            f"The layer {layer.name!r} has another shape or position than the study, and labels are never resampled "
            "unasked: choose another layer, or begin without labels."
        )
    return replace(study, labels=LabelMap(values.copy(), study.grid))


def _with_meaning(
    study: Study, layer: Any, classes: Collection[LabelClass], parent: QWidget
) -> tuple[Study, dict[int, str]]:
    """Say what a layer's values are in the project: classes of the same names, or else new ones.

    Where a number is taken, by a class of another name or, as the layer names none, of another meaning maybe, that is
    asked: a mask of zeros and ones would become strokes of background all over the lesion.

    Returns
    -------
    study : Study
        With the project's values.
    names : dict of int to str
        Of values that are new in the project.
    """
    assert study.labels is not None
    values, said = study.labels.data, _value_names(layer)
    painted = [int(value) for value in np.unique(values) if value]
    known, numbers = {c.value: c.name for c in classes}, {c.name.casefold(): c.value for c in classes}
    meant = {v: numbers[said[v].casefold()] for v in painted if v in said and said[v].casefold() in numbers}
    new = [v for v in painted if v not in meant]
    taken = [v for v in new if v in known]
    shift = 0
    if taken and _are_new(layer.name, {v: said.get(v, "") for v in taken}, known, parent):
        shift = max(0, *known) - min(0, new[0] - 1)  # above all that are there, in the same order
    number = meant | {v: v + shift for v in new}
    names = {number[v]: said.get(v, f"{layer.name} {v}") for v in new if shift or v in said}
    taken_names = [*numbers, *(name.casefold() for name in names.values())]
    names = {v: f"{name} {v}" if taken_names.count(name.casefold()) > 1 else name for v, name in names.items()}
    if any(number[v] != v for v in painted):
        found = np.unique(values)
        values = np.array([number.get(int(v), 0) for v in found])[np.searchsorted(found, values)]
    return replace(study, labels=LabelMap(values, study.labels.grid)), names


def _are_new(layer: str, taken: dict[int, str], known: dict[int, str], parent: QWidget) -> bool:
    """Ask whether values are new classes, as their numbers are taken; no, where they are the project's classes.

    Parameters
    ----------
    layer : str
    taken : dict of int to str
        What the layer calls those values; empty where it does not say.
    known : dict of int to str
        What the project calls its own.
    parent : QWidget
    """
    box = QMessageBox(parent)
    box.setIcon(QMessageBox.Icon.Question)
    box.setText(f"What are the values of {layer}?")
    lines = [f"{v}:  {f'{name} in the layer, ' * bool(name)}{known[v]} in this project" for v, name in taken.items()]
    if len(lines) > _MOST:
        lines[_MOST:] = [f"and {len(lines) - _MOST} more"]
    note, same = "As new classes they get numbers that are free.", None
    if any(taken.values()):
        note += " What has the same name in both stays one class."
    else:
        note = f"The layer does not say what they mean there. {note}"
        same = box.addButton("The project's classes", QMessageBox.ButtonRole.AcceptRole)
    box.setInformativeText("\n".join([*lines, "", note]))
    other = box.addButton("New classes", QMessageBox.ButtonRole.NoRole if same else QMessageBox.ButtonRole.AcceptRole)
    box.setDefaultButton(other)  # which mixes up nothing
    box.addButton(QMessageBox.StandardButton.Cancel)
    box.exec()
    if box.clickedButton() is other:
        return True
    if same is None or box.clickedButton() is not same:
        raise Cancelled(f"Nothing was added: what the values of {layer} mean was left open.")
    return False


def _name_of(study: Study) -> str:
    """Name a study as a dataset's reader does, by the folder its scans lie in; "study" where it is in no file."""
    paths = [scan.path for scan in study.scans.values() if scan.path is not None]
    if not paths:  # then its name is a layer's, a modality mostly
        return "study"
    return folder_name(study_folder(paths[0]))
