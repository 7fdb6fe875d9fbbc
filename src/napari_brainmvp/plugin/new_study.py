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
from napari_brainmvp.io.studies import folder_name
from napari_brainmvp.plugin.layers import KEY, LayerOrigin, layer_grid
from napari_brainmvp.study import LabelMap, Study

__all__ = ["LabelSource", "enter"]


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
            if isinstance(layer, Labels) and layer.data.ndim == 3 and not any(layer is own for own in self._own):
                self.addItem(f"Begin with {layer.name}", layer)
        self.setCurrentIndex(next((k for k in range(self.count()) if self.itemData(k) is chosen), 0))
        self.setVisible(self.count() > 1)


def enter(project: AnnotationProject, study: Study, layer: Any, parent: QWidget) -> StudyReference:
    """Add a study to a project, with a Labels layer's labels as its first stroke.

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
        The layer lies on another grid, or one of its values means something else in the project.
    FileError
        The project is open elsewhere, or cannot be written.
    Cancelled
        That is what was answered.
    """
    named = replace(study, name=_name_of(study))
    if layer is None:
        return project.add_study(named)
    names = _value_names(layer)
    labelled = _with_labels(named, layer, names, project.classes)
    assert labelled.labels is not None
    if not names:
        labelled, names = _with_meaning(labelled, labelled.labels, layer.name, project.classes, parent)
    reference = project.add_study(labelled)
    classes = (c.model_copy(update={"name": names.get(c.value, c.name)}) for c in project.classes)
    project.set_classes(tuple(classes))
    return reference


def _value_names(layer: Any) -> dict[int, str]:
    """Return what a Labels layer says its values are, as results of a segmentation do."""
    features = layer.features
    if not {"index", "structure"} <= set(features.columns):
        return {}
    return {int(k): str(name) for k, name in zip(features["index"], features["structure"], strict=True) if k}


def _with_labels(study: Study, layer: Any, names: dict[int, str], classes: Collection[LabelClass]) -> Study:
    """Give a study a layer's labels, where they lie on its grid and mean what the project's classes mean."""
    origin = layer.metadata.get(KEY)
    values = np.asarray(layer.data).T
    grid = layer_grid(layer)
    if isinstance(origin, LayerOrigin) and grid is origin.shown and origin.scan is None:
        values, grid = origin.unpermute(values), origin.grid
    if not grid.same_as(study.grid):
        raise StudyError(
            f"The layer {layer.name!r} has another shape or position than the study, and labels are never resampled "
            "unasked: choose another layer, or begin without labels."
        )
    known, painted = {c.value: c.name for c in classes}, set(np.unique(values).tolist())
    for value, name in names.items():
        if value in painted and known.get(value, name) != name:
            raise StudyError(
                f"{layer.name} calls the value {value} {name!r}, the project {known[value]!r}: name the project's "
                "class so if it means the same, or begin without labels."
            )
    return replace(study, labels=LabelMap(values.copy(), study.grid))


def _with_meaning(
    study: Study, labels: LabelMap, name: str, classes: Collection[LabelClass], parent: QWidget
) -> tuple[Study, dict[int, str]]:
    """Ask what the values of a layer without names are, where classes of the project have the same numbers.

    Unasked, a mask of zeros and ones would become strokes of background all over the lesion.
    """
    painted = [int(value) for value in np.unique(labels.data) if value]
    meant = [f"{c.value} = {c.name}" for c in classes if c.value in painted]
    if not meant:
        return study, {}
    box = QMessageBox(parent)
    box.setIcon(QMessageBox.Icon.Question)
    box.setText(f"What are the values of {name}?")
    box.setInformativeText(f"The layer does not say. In this project: {', '.join(meant)}.")
    same = box.addButton("The project's classes", QMessageBox.ButtonRole.AcceptRole)
    other = box.addButton("New classes", QMessageBox.ButtonRole.NoRole)
    box.addButton(QMessageBox.StandardButton.Cancel)
    box.exec()
    if box.clickedButton() is same:
        return study, {}
    if box.clickedButton() is not other:
        raise Cancelled(f"Nothing was added: what the values of {name} mean was left open.")
    shift = max(c.value for c in classes) - min(0, painted[0] - 1)  # above all that are there, in the same order
    moved = np.where(labels.data == 0, 0, labels.data.astype(np.int64) + shift)
    return replace(study, labels=LabelMap(moved, labels.grid)), {v + shift: f"{name} {v}" for v in painted}


def _name_of(study: Study) -> str:
    """Name a study as a dataset's reader does, by the folder its scans lie in; "study" where it is in no file."""
    paths = [scan.path for scan in study.scans.values() if scan.path is not None]
    if not paths:  # then its name is a layer's, a modality mostly
        return "study"
    folder = paths[0].absolute().parent  # a link is not followed: data managers link to files named by their content
    return folder_name(folder.parent if folder.name in ("anat", "dwi", "swi", "angio") else folder)
