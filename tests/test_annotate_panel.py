"""The Annotate panel in a real viewer: strokes, corrections, a killed viewer, two windows on one project."""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from napari.utils._proxies import PublicOnlyProxy
from qtpy.QtCore import QEvent, QObject, Qt, QTimer
from qtpy.QtGui import QAction
from qtpy.QtWidgets import QAbstractButton, QApplication, QInputDialog
from vispy.app.canvas import MouseEvent

from annotation_for_tests import SHAPE, lesion_study, strokes, truth
from conftest import full_disk
from models_for_tests import COLORS, NAMES, tiny_card, tiny_model
from napari_brainmvp.annotation.content import LabelClass, default_classes
from napari_brainmvp.annotation.history import LabelHistory
from napari_brainmvp.annotation.project import AnnotationProject
from napari_brainmvp.jobs import list_jobs
from napari_brainmvp.plugin import live_probe
from napari_brainmvp.plugin.layers import layer_path, scan_layer, study_layers
from napari_brainmvp.plugin.painted import native
from napari_brainmvp.plugin.visible_slice import Plane, go_to, visible_plane
from napari_brainmvp.plugin.widget import BrainMVPWidget
from napari_brainmvp.study import Grid, Study

TESTS = Path(__file__).parent
MIDDLE = SHAPE[2] // 2


@pytest.fixture
def viewer(make_napari_viewer, home):
    return make_napari_viewer(show=True)


def open_study(viewer, made: Study, labels=False) -> None:
    for data, options, kind in study_layers(made):
        if kind == "image" or labels:
            getattr(viewer, f"add_{kind}")(data, **options)


@pytest.fixture
def panel(viewer, qtbot, tmp_path):
    widget = BrainMVPWidget(viewer)
    qtbot.addWidget(widget)
    widget.show()
    widget.tabs.setCurrentIndex(1)
    open_study(viewer, lesion_study(tmp_path))
    panel = widget.annotate
    panel.keep = widget
    panel.create_project(tmp_path / "project")
    yield panel
    panel.abandon()


@pytest.fixture
def view(panel, qtbot):
    """The panel's view of the study, features computed, one slice of strokes painted."""
    begin(panel, qtbot)
    return panel.view


def begin(panel, qtbot) -> None:
    qtbot.mouseClick(panel.start, Qt.MouseButton.LeftButton)
    assert panel.view is not None, panel.status.text()
    qtbot.waitUntil(lambda: panel.view.probe.predictor is not None, timeout=90_000)
    panel._viewer.dims.set_point(0, panel.view.layer.data_to_world((MIDDLE, 0, 0))[0])


def stroke(panel, qtbot, value: int) -> None:
    """Choose the class by its row and paint with the layer's brush, as a drag of the mouse does."""
    panel.classes.choose(value - 1)
    layer = panel.view.layer
    layer.brush_size = 3
    points = np.argwhere(strokes() == value)[::3]
    with layer.block_history():
        for i, j, k in points:
            layer.paint((k, j, i), layer.selected_label)
    layer.events.paint(value=[])


def both(panel, qtbot) -> None:
    with qtbot.waitSignal(panel.view.probe.updated, timeout=60_000, check_params_cb=lambda whole: whole):
        stroke(panel, qtbot, 2)
        stroke(panel, qtbot, 1)


def test_the_docks_own_cross_saves_and_lets_go(make_napari_viewer, home, qtbot, tmp_path):
    viewer = make_napari_viewer(show=True)
    dock, widget = viewer.window.add_plugin_dock_widget("napari-brainmvp")
    for data, options, kind in study_layers(lesion_study(tmp_path)):
        (viewer.add_image if kind == "image" else viewer.add_labels)(data, **options)
    panel = widget.annotate
    panel.create_project(tmp_path / "project")
    begin(panel, qtbot)
    stroke(panel, qtbot, 2)
    layer = panel.view.layer
    layer.paint((MIDDLE, 30, 30), 2)  # and the brush is not lifted
    qtbot.mouseClick(dock.title.close_button, Qt.MouseButton.LeftButton)
    assert widget.parent() is None
    assert not layer.editable
    assert not (tmp_path / "project" / "lock.json").exists()
    again = AnnotationProject.open(tmp_path / "project")
    np.testing.assert_array_equal(again.labels("case").labels, native(layer))
    again.close()


def test_one_undo_for_brush_and_tools(panel, view, viewer, qtbot, monkeypatch):
    both(panel, qtbot)
    layer, canvas = view.layer, viewer.window._qt_viewer.canvas.native
    before = native(layer).copy()
    qtbot.waitUntil(lambda: panel.tools["take_over_slice"].isEnabled(), timeout=30_000)
    qtbot.mouseClick(panel.tools["take_over_slice"], Qt.MouseButton.LeftButton)
    taken = native(layer).copy()
    assert (taken != before).any()
    viewer.layers.selection = {layer}
    canvas.setFocus()
    qtbot.keyClick(canvas, Qt.Key.Key_Z, Qt.KeyboardModifier.ControlModifier)
    np.testing.assert_array_equal(native(layer), before)
    qtbot.keyClick(canvas, Qt.Key.Key_Z, Qt.KeyboardModifier.ControlModifier | Qt.KeyboardModifier.ShiftModifier)
    np.testing.assert_array_equal(native(layer), taken)

    # a long stroke is saved while it is drawn, and undone whole
    monkeypatch.setattr(QApplication, "mouseButtons", staticmethod(lambda: Qt.MouseButton.LeftButton))
    count = panel.project.labels("case").stroke
    with layer.block_history():  # as while the mouse is pressed
        for i in (4, 6, 8):
            layer.paint((MIDDLE, 30, i), 2)
            view._painted.save()  # as every second
        monkeypatch.undo()
        layer.paint((MIDDLE, 30, 10), 2)
    layer.events.paint(value=[])
    assert panel.project.labels("case").stroke == count + 4
    view.undo()
    np.testing.assert_array_equal(native(layer), taken)
    view.redo()
    assert panel.project.labels("case").stroke == count + 4
    layer.paint((MIDDLE, 32, 4), 1)
    layer.events.paint(value=[])
    view.undo()
    assert panel.project.labels("case").stroke == count + 4
    monkeypatch.setattr(QApplication, "mouseButtons", staticmethod(lambda: Qt.MouseButton.LeftButton))
    with layer.block_history():
        layer.paint((MIDDLE, 34, 4), 2)
        view.undo()  # while the brush is down
        monkeypatch.undo()
        layer.paint((MIDDLE, 34, 8), 2)
    layer.events.paint(value=[])
    view.undo()
    assert panel.project.labels("case").stroke == count + 4  # and not the stroke before that


def test_the_slice_that_is_looked_at_beside_a_layer_with_time(panel, view, viewer, qtbot):
    both(panel, qtbot)
    viewer.add_image(np.zeros((5, *reversed(SHAPE)), np.float32), name="series", visible=False)
    plane = visible_plane(viewer, view.layer)
    assert (plane.axis, plane.index) == (2, MIDDLE)
    go_to(viewer, view.layer, Plane(2, MIDDLE + 3))
    assert visible_plane(viewer, view.layer).index == MIDDLE + 3
    viewer.dims.order = (0, 2, 1, 3)
    assert visible_plane(viewer, view.layer).axis == 1
    viewer.dims.order = (1, 2, 0, 3)
    assert visible_plane(viewer, view.layer) is None


def overlap(found: np.ndarray, true: np.ndarray) -> float:
    return 2 * (found & true).sum() / (found.sum() + true.sum())


def test_strokes_become_a_prediction_and_are_corrected(panel, view, viewer, qtbot):
    shown = []
    view.probe.updated.connect(shown.append)
    with qtbot.waitSignal(view.probe.updated, timeout=60_000, check_params_cb=lambda whole: whole):
        stroke(panel, qtbot, 2)
        qtbot.waitUntil(lambda: "two classes" in panel.status.text(), timeout=60_000)
        stroke(panel, qtbot, 1)
    assert False in shown  # the visible slice came first
    prediction = native(viewer.layers["Prediction"])
    assert prediction.shape == SHAPE
    assert overlap(prediction == 2, truth() == 2) > 0.5
    layer = viewer.layers["Annotation case"]
    spot = np.argwhere((prediction == 2) & (native(layer) == 0))
    i, j, k = spot[len(spot) // 2]
    panel.classes.choose(0)
    with qtbot.waitSignal(view.probe.updated, timeout=60_000, check_params_cb=lambda whole: whole):
        layer.paint((k, j, i), 1)
        layer.events.paint(value=[])
    assert prediction[i, j, k] == 1
    np.testing.assert_array_equal(panel.project.labels("case").labels, native(layer))


def test_a_stroke_does_not_wait_for_the_volume_of_the_one_before(panel, view, viewer, qtbot):
    both(panel, qtbot)
    qtbot.waitUntil(lambda: not view.probe.busy, timeout=60_000)
    prediction, layer = native(viewer.layers["Prediction"]), view.layer
    spots = [tuple(spot) for spot in np.argwhere((prediction == 1) & (truth() == 1))[::2000][:2]]
    panel.classes.choose(1)
    for i, j, k in spots:  # without a turn of the event loop between them
        layer.paint((k, j, i), 2)
        layer.events.paint(value=[])
    assert view.probe.busy
    assert view.probe._work._token.cancelled  # the volume of the first one
    qtbot.waitUntil(lambda: not view.probe.busy, timeout=60_000)
    assert [prediction[spot] for spot in spots] == [2, 2]


def test_the_window_waits_for_the_visible_slice(panel, view, viewer, qtbot, monkeypatch):
    """What it would draw meanwhile takes the cores from it."""
    both(panel, qtbot)
    qtbot.waitUntil(lambda: not view.probe.busy, timeout=60_000)
    monkeypatch.setattr(live_probe, "_GLANCE", 30.0)
    prediction = native(viewer.layers["Prediction"])
    spot = next(tuple(s) for s in np.argwhere((prediction == 1) & (truth() == 1)) if s[2] == MIDDLE)
    panel.classes.choose(1)
    view.layer.paint((spot[2], spot[1], spot[0]), 2)
    view.layer.events.paint(value=[])
    assert prediction[spot] == 2  # without a turn of the event loop


def middle(viewer) -> np.ndarray:
    return np.array(viewer.window._qt_viewer.canvas._scene_canvas.size) // 2


def drag(viewer, start: np.ndarray, way: int = 0) -> None:
    """Press the mouse on the canvas, move it and let it go."""
    canvas = viewer.window._qt_viewer.canvas
    for kind, steps in (("mouse_press", [0]), ("mouse_move", range(4, way + 1, 4)), ("mouse_release", [way])):
        for step in steps:
            event = MouseEvent(type=kind, pos=tuple(np.round(start + step).astype(int)), button=1, buttons=[1])
            getattr(canvas, f"_on_{kind}")(event) if hasattr(canvas, f"_on_{kind}") else None
            getattr(canvas._scene_canvas.events, kind)(event)


def test_the_mouse_paints_on_the_canvas(panel, view, viewer, qtbot):
    panel.classes.choose(1)
    drag(viewer, middle(viewer), 28)
    qtbot.waitUntil(lambda: (panel.project.labels("case").labels == 2).any(), timeout=5_000)


def test_keys_are_heard_in_the_window(panel, view, viewer, qtbot, tmp_path):
    viewer.window.add_dock_widget(panel.keep, name="BrainMVP")
    window = viewer.window._qt_window
    window.activateWindow()
    qtbot.waitUntil(window.isActiveWindow, timeout=10_000)
    qtbot.keyClick(window, Qt.Key.Key_2, Qt.KeyboardModifier.AltModifier)
    qtbot.waitUntil(lambda: view.layer.selected_label == 2, timeout=5_000)
    for key, box in ((Qt.Key.Key_B, panel.live), (Qt.Key.Key_U, panel.uncertainty), (Qt.Key.Key_A, panel.everything)):
        before = box.isChecked()
        qtbot.keyClick(window, key, Qt.KeyboardModifier.AltModifier)
        qtbot.waitUntil(lambda box=box, before=before: box.isChecked() != before, timeout=5_000)
    both_painted = strokes()
    native(view.layer)[...] = both_painted
    view.layer.events.paint(value=[])
    with qtbot.waitSignal(view.probe.updated, timeout=60_000, check_params_cb=lambda whole: whole):
        qtbot.keyClick(window, Qt.Key.Key_R, Qt.KeyboardModifier.AltModifier)
    shift = Qt.KeyboardModifier.AltModifier | Qt.KeyboardModifier.ShiftModifier
    qtbot.keyClick(window, Qt.Key.Key_T, shift)
    qtbot.waitUntil(lambda: (native(view.layer)[..., MIDDLE] != 0).all(), timeout=5_000)
    qtbot.keyClick(window, Qt.Key.Key_Z, Qt.KeyboardModifier.AltModifier)
    qtbot.waitUntil(lambda: np.array_equal(native(view.layer), both_painted), timeout=5_000)
    qtbot.keyClick(window, Qt.Key.Key_K, Qt.KeyboardModifier.AltModifier)
    qtbot.waitUntil(lambda: len(panel.project.classes) == 3, timeout=5_000)
    qtbot.keyClick(window, Qt.Key.Key_O, Qt.KeyboardModifier.AltModifier)
    qtbot.waitUntil(lambda: panel.classes.dialog is not None, timeout=5_000)
    panel.classes.dialog.reject()
    window.activateWindow()
    qtbot.waitUntil(window.isActiveWindow, timeout=10_000)
    panel.project.add_study(replace(lesion_study(tmp_path, "next", 5), labels=None))
    panel.studies.show_project(panel.project, "case")
    part, alt = panel.finetune, Qt.KeyboardModifier.AltModifier
    part.use.show()  # as where a model is better
    buttons = {
        part.button: (Qt.Key.Key_M, alt),
        part.compare: (Qt.Key.Key_Q, alt),
        part.use: (Qt.Key.Key_Q, shift),
        panel.studies.rank: (Qt.Key.Key_X, alt),
        panel.start: (Qt.Key.Key_E, alt),
    }
    taken = [a.shortcut().toString() for a in (*window.findChildren(QAction), *window.findChildren(QAbstractButton))]
    for button, (key, modifiers) in buttons.items():
        button.clicked.disconnect()  # a training of minutes would outlive the test
        with qtbot.waitSignal(button.clicked, timeout=5_000):
            qtbot.keyClick(window, key, modifiers)
        assert taken.count(button.shortcut().toString()) == 1


def test_tools_do_what_they_say(panel, view, qtbot):
    both(panel, qtbot)
    listed = {button.shortcut().toString() for button in panel.tools.values()}
    assert {"Alt+N", "Alt+G", "Alt+I", "Alt+Z"} <= listed
    layer = view.layer
    before = int((layer.data == 2).sum())
    panel.classes.choose(1)
    panel.tools["grow"].click()
    grown = int((layer.data == 2).sum())
    assert grown > before
    panel.tools["undo"].click()
    assert int((layer.data == 2).sum()) == before
    panel.tools["redo"].click()
    assert int((layer.data == 2).sum()) == grown
    panel.tools["take_over_slice"].click()
    assert (native(layer)[..., MIDDLE] != 0).all()
    panel.tools["next_slice"].click()
    assert "least certain" in panel.status.text()
    index = round(float(layer.world_to_data(panel._viewer.dims.point)[0]))
    assert index != MIDDLE
    panel.uncertainty.setChecked(True)
    assert panel._viewer.layers["Uncertainty"].visible
    panel.tools["take_over_slice"].click()
    panel.tools["interpolate"].click()
    assert "voxels labelled" in panel.status.text()
    np.testing.assert_array_equal(panel.project.labels("case").labels, native(layer))


def test_the_button_takes_over_the_part_that_is_clicked_on(panel, view, viewer, qtbot):
    both(panel, qtbot)
    viewer.window.add_dock_widget(panel.keep, name="BrainMVP")
    window, layer, button = viewer.window._qt_window, view.layer, panel.tools["point"]
    window.activateWindow()
    qtbot.waitUntil(window.isActiveWindow, timeout=10_000)
    layer.mode = "fill"
    before = native(layer).copy()
    predicted = native(viewer.layers["Prediction"])[..., MIDDLE].copy()
    i, j = next((i, j) for i, j in np.argwhere((before[..., MIDDLE] == 0) & (predicted == 2)) if (j > 26))
    viewer.cursor.position = (-1e3, -1e3, -1e3)  # where the mouse left the canvas
    for end in (lambda: qtbot.keyClick(window, Qt.Key.Key_Escape), lambda: press(qtbot, button)):
        press(qtbot, button)
        assert "Click on the predicted part" in panel.status.text()
        assert button.isChecked()
        end()
        assert not button.isChecked()
        assert layer.mode == "fill"
    press(qtbot, button)
    drag(viewer, middle(viewer), 40)  # moves the image
    np.testing.assert_array_equal(native(layer), before)
    world = layer.data_to_world((MIDDLE, j, i))
    drag(viewer, middle(viewer) + (np.array(world) - viewer.camera.center)[:0:-1] * viewer.camera.zoom)
    new = native(layer) != before
    assert new[i, j, MIDDLE]
    assert "voxels labelled" in panel.status.text()
    assert (native(layer)[..., MIDDLE] == predicted)[new[..., MIDDLE]].all()
    assert (layer.mode, button.isChecked()) == ("fill", False)
    np.testing.assert_array_equal(panel.project.labels("case").labels, native(layer))


def press(qtbot, button) -> None:
    qtbot.mouseClick(button, Qt.MouseButton.LeftButton)


def test_the_table_and_the_layer_agree_on_what_is_painted(panel, view, viewer, qtbot, tmp_path):
    layer = view.layer
    panel.classes.choose(1)
    layer.mode = "erase"
    viewer.add_points(np.zeros((1, 3)))
    viewer.layers[0].name = "renamed"
    panel.classes.add.click()
    assert (layer.mode, layer.selected_label, panel.classes.value()) == ("erase", 2, 2)
    for value, shown in ((1, 1), (9, 0), (3, 3)):  # as napari's picker does; 9 is no class
        layer.selected_label = value
        viewer.layers[0].name = f"renamed {value}"
        assert (panel.classes.value(), layer.selected_label) == (shown, value)
        assert len({item.row() for item in panel.classes.table.selectedItems()}) == bool(shown)
        assert panel.classes.recolor.isEnabled() == bool(shown)
    panel.close_project()
    layer.selected_label = 2
    assert panel.classes.value() == 3
    panel.open_project(tmp_path / "project")
    choose_study(panel, "case")
    assert panel.view.layer.selected_label == panel.classes.value() == 3


@pytest.mark.parametrize("change", ["translate", "scale", "shape"])
def test_a_layer_that_was_moved_is_refused_and_nothing_is_lost(panel, view, qtbot, change):
    both(panel, qtbot)
    saved = panel.project.labels("case").labels.copy()
    layer = view.layer
    before, painted = (layer.translate.copy(), layer.scale.copy()), layer.data
    if change == "translate":
        layer.translate = (0, 0, 5)
    elif change == "scale":
        layer.scale = (1, 2, 1)
    else:
        layer.data = np.ones((3, 4, 5), np.int32)
    layer.events.paint(value=[])
    assert "Nothing was saved or resampled" in panel.status.text()
    assert not layer.editable  # what is painted now would be lost
    qtbot.mouseClick(panel.tools["undo"], Qt.MouseButton.LeftButton)
    np.testing.assert_array_equal(panel.project.labels("case").labels, saved)
    layer.translate, layer.scale = before
    layer.data = painted
    qtbot.waitUntil(lambda: layer.editable, timeout=5_000)
    layer.paint((MIDDLE + 3, 20, 20), 2)
    layer.events.paint(value=[])
    assert panel.project.labels("case").labels[20, 20, MIDDLE + 3] == 2


def test_labels_on_another_grid_are_refused(panel, viewer, qtbot):
    assert not panel.begin.isVisible()
    viewer.add_labels(np.ones((5, 6, 7), int), name="strange")
    panel.begin.setCurrentIndex(panel.begin.findText("Begin with strange"))
    viewer.layers["strange"].name = "stranger"
    assert panel.begin.currentText() == "Begin with stranger"
    qtbot.mouseClick(panel.start, Qt.MouseButton.LeftButton)
    assert "never resampled" in panel.status.text()
    assert panel.view is None
    assert panel.project.studies == ()


def shown_labels(viewer, values, **options):
    """Show labels on the study's grid as a segmentation is shown: on top, and selected."""
    made = lesion_study()
    data, more, _ = study_layers(Study("x", made.scans, labels=type(made.labels)(values, made.grid)))[-1]
    layer = viewer.add_labels(data.copy(), **more, **options)
    assert viewer.layers.selection.active is layer
    return layer


def test_a_chosen_labels_layer_is_where_one_begins(panel, viewer, qtbot):
    odd = truth().astype(np.int64) * -3
    layer = shown_labels(viewer, odd, features={"index": [0, -3, -6], "structure": ["background", "Tissue", "Lump"]})
    panel.begin.setCurrentIndex(panel.begin.findText(f"Begin with {layer.name}"))
    begin(panel, qtbot)
    np.testing.assert_array_equal(panel.project.labels("case").labels, odd)
    assert {c.value: c.name for c in panel.project.classes}[-3] == "Tissue"
    assert {c.value for c in panel.project.classes} == {1, 2, -3, -6}
    np.testing.assert_array_equal(native(panel.view.layer), odd)
    assert panel.begin.findText("Begin with Prediction") < 0


def answer_with(qtbot, answer: str) -> list[str]:
    """Click a button of the question that comes; return what was asked, once it was."""
    asked = []

    def click() -> None:
        box = QApplication.activeModalWidget()
        asked.append(box.informativeText())
        button = next(b for b in box.buttons() if b.text().replace("&", "") == answer)
        qtbot.mouseClick(button, Qt.MouseButton.LeftButton)

    QTimer.singleShot(200, click)
    return asked


def test_a_truth_or_segmentation_that_happens_to_be_selected_is_not_taken_for_strokes(panel, viewer, qtbot):
    shown_labels(viewer, truth(), features={"index": [0, 1, 2], "structure": ["background", "CSF", "Lesion"]})
    begin(panel, qtbot)
    assert not panel.project.labels("case").labels.any()


def test_a_segmentation_whose_numbers_are_taken_becomes_new_classes(panel, viewer, qtbot, tmp_path):
    """As one of the default model in a new project, and in the second study of it."""
    values = truth().astype(np.int64)
    values[values.shape[0] // 2 :][values[values.shape[0] // 2 :] == 1] = 7
    names = ["background", "CSF", "Grey matter", "Left", "lesion"]
    layer = shown_labels(viewer, values, features={"index": [0, 1, 2, 4, 7], "structure": names})
    begin_with = f"Begin with {layer.name}"
    panel.begin.setCurrentIndex(panel.begin.findText(begin_with))
    asked = answer_with(qtbot, "Cancel")
    qtbot.mouseClick(panel.start, Qt.MouseButton.LeftButton)
    assert "1:  CSF in the layer, Background in this project\n2:  Grey matter in the layer, Lesion in" in asked[0]
    assert panel.project.studies == ()
    assert "Nothing was added" in panel.status.text()
    answer_with(qtbot, "New classes")
    begin(panel, qtbot)
    expected = np.select([values == 1, values == 2, values == 7], [3, 4, 2], 0)
    np.testing.assert_array_equal(panel.project.labels("case").labels, expected)
    known = {1: "Background", 2: "Lesion", 3: "CSF", 4: "Grey matter"}
    assert {c.value: c.name for c in panel.project.classes} == known
    assert panel.project.background.value == 1
    for other in [other for other in viewer.layers if other is not layer]:
        viewer.layers.remove(other)
    open_study(viewer, lesion_study(tmp_path, "second", 4))
    panel.begin.setCurrentIndex(panel.begin.findText(begin_with))
    begin(panel, qtbot)  # all names are known: there is nothing to ask
    np.testing.assert_array_equal(panel.project.labels("second").labels, expected)
    assert {c.value: c.name for c in panel.project.classes} == known


def test_what_is_closed_cannot_be_painted_on(panel, view, viewer, qtbot, tmp_path):
    both(panel, qtbot)
    saved = native(view.layer).copy()
    begin(panel, qtbot)  # the same study anew
    names = [layer.name for layer in viewer.layers]
    assert [names.count(n) for n in ("Annotation case", "Prediction", "Uncertainty")] == [1, 1, 1]
    assert names[-3:] == ["Uncertainty", "Prediction", "Annotation case"]
    np.testing.assert_array_equal(native(panel.view.layer), saved)
    layer = panel.view.layer
    assert layer.editable
    panel.open_project(tmp_path / "project")  # the one that is open
    assert not panel.project.read_only
    assert not layer.editable
    assert layer in viewer.layers


def test_values_no_class_has_become_classes_whatever_their_size(panel, view, viewer, qtbot, tmp_path):
    values = 7, 70000, -70000, -(2**31) + 1
    for column, value in zip(COLUMNS, values, strict=True):
        layer = view.layer
        layer.selected_label = value  # as napari's own key M would
        layer.paint((MIDDLE, 20, column), value)
        layer.events.paint(value=[])
        assert panel.project.classes[-1].value == value
        assert panel.classes.value() == layer.selected_label == value
        assert seen(layer, column) == listed(panel)[value]  # without being asked
    panel.classes.edited.emit((*panel.project.classes[:-1], panel.project.classes[-1].model_copy(update=GREEN)))
    colors = {value: listed(panel)[value] for value in values}
    assert colors[values[-1]] == GREEN["color"]
    assert len(set(colors.values())) == 4
    assert [seen(view.layer, column) for column in COLUMNS] == list(colors.values())
    panel.close_project()
    viewer.layers.clear()
    panel.open_project(tmp_path / "project")
    choose_study(panel, "case")
    assert panel.view is not None, panel.status.text()
    assert {value: listed(panel)[value] for value in values} == colors
    assert [seen(panel.view.layer, column) for column in COLUMNS] == list(colors.values())
    assert panel.view.labels[COLUMNS, 20, MIDDLE].tolist() == list(values)
    prediction = viewer.layers["Prediction"].colormap.map(np.array([0, 1, *values]))
    assert prediction[:, 3].tolist() == [0, 0, 1, 1, 1, 1]  # one sees through the background


COLUMNS = [10, 15, 20, 25]
GREEN = {"color": "#11aa33"}


def listed(panel) -> dict[int, str]:
    """The colours in the table, by the values in it."""
    table = panel.classes.table
    cells = ((table.item(row, 1).text(), table.item(row, 0).icon()) for row in range(table.rowCount()))
    return {int(text): icon.pixmap(12).toImage().pixelColor(6, 6).name() for text, icon in cells}


def seen(layer, column: int) -> str:
    """The colour of a voxel of the layer."""
    rgb = layer.colormap.map(np.asarray(layer.data[MIDDLE]))[20, column, :3]
    return "#" + "".join(f"{round(255 * float(v)):02x}" for v in rgb)


def test_regions_said_in_the_panel_are_the_project_s(panel, qtbot, tmp_path):
    qtbot.mouseClick(panel.classes.add, Qt.MouseButton.LeftButton)
    assert not panel.classes.learned.isVisible()
    qtbot.mouseClick(panel.classes.regions, Qt.MouseButton.LeftButton)
    dialog = panel.classes.dialog
    qtbot.mouseClick(dialog.add, Qt.MouseButton.LeftButton)
    for column in (1, 2):
        dialog.table.item(0, column).setCheckState(Qt.CheckState.Checked)
    dialog.accept()
    assert panel.project.regions == {"Region 1": (2, 3)}
    assert "learns regions: Region 1" in panel.classes.learned.text()
    panel.open_project(tmp_path / "project")
    assert panel.project.regions == {"Region 1": (2, 3)}
    assert panel.classes.learned.isVisible()


def test_a_class_leaves_the_project_unless_it_is_painted(panel, view, viewer, qtbot, monkeypatch):
    seen = []
    monkeypatch.setattr("napari.utils.notifications.notification_manager.dispatch", seen.append)
    table, remove = panel.classes, panel.classes.remove
    qtbot.mouseClick(table.add, Qt.MouseButton.LeftButton)
    table.choose(0)
    assert not remove.isEnabled()  # the background
    stroke(panel, qtbot, 2)
    stroke(panel, qtbot, 1)
    panel.classes.choose(2)
    view.layer.paint((MIDDLE, 20, 20), 3)
    view.layer.events.paint(value=[])
    qtbot.mouseClick(remove, Qt.MouseButton.LeftButton)
    assert "Class 3 is painted on case: erase it there" in panel.status.text()
    assert len(panel.project.classes) == 3
    qtbot.mouseClick(panel.tools["undo"], Qt.MouseButton.LeftButton)
    panel.keep.activateWindow()
    qtbot.waitUntil(panel.keep.isActiveWindow, timeout=10_000)
    table.table.setFocus()
    qtbot.keyClick(table.table, Qt.Key.Key_Delete)
    qtbot.waitUntil(lambda: [c.value for c in panel.project.classes] == [1, 2], timeout=5_000)
    assert view.layer.selected_label == table.value() == 2
    qtbot.mouseClick(table.add, Qt.MouseButton.LeftButton)
    assert [c.value for c in panel.project.classes] == [1, 2, 4]  # 3 is not another class's
    qtbot.mouseClick(panel.tools["redo"], Qt.MouseButton.LeftButton)
    assert [c.name for c in panel.project.classes] == ["Background", "Lesion", "Class 4", "Class 3"]
    assert view.layer.selected_label == 2
    assert set(listed(panel)) == {1, 2, 3, 4}
    assert seen[0].message == seen[-1].message  # the refusal, and no other


def test_opening_the_project_again_restores_the_strokes(panel, view, viewer, qtbot, tmp_path):
    both(panel, qtbot)
    saved = native(view.layer).copy()
    panel.close_project()
    viewer.layers.clear()
    panel.open_project(tmp_path / "project")
    choose_study(panel, "case")
    assert panel.view is not None, panel.status.text()
    np.testing.assert_array_equal(native(panel.view.layer), saved)
    qtbot.waitUntil(lambda: panel.view.probe.ready and not panel.view.probe.busy, timeout=60_000)
    assert (native(viewer.layers["Prediction"]) == 2).any()


def test_opening_another_study_loses_nothing_that_is_shown(panel, view, viewer, qtbot, tmp_path):
    notes = viewer.add_points(np.zeros((1, 3)), name="my notes")
    panel._study.reference.setCurrentIndex(2)  # another grid than when the study was added
    panel.project.add_study(replace(lesion_study(tmp_path, "next", 5), labels=None))
    panel.studies.show_project(panel.project, "case")
    choose_study(panel, "next")
    assert panel.view.name == "next"
    assert [s.name for s in panel.project.studies] == ["case", "next"]
    assert notes in viewer.layers
    assert not notes.visible
    choose_study(panel, "case")
    assert panel.view.name == "case"
    assert [s.name for s in panel.project.studies] == ["case", "next"]
    assert [layer.name for layer in viewer.layers if layer.name.startswith("Annotation")] == ["Annotation case"]
    qtbot.waitUntil(lambda: not panel.view.probe.busy, timeout=60_000)


def choose_study(panel, name: str) -> None:
    studies = panel.studies.studies
    studies.setCurrentIndex(studies.findData(name))
    studies.activated.emit(studies.currentIndex())


def test_a_study_leaves_the_project_and_comes_back_with_its_strokes(panel, view, viewer, qtbot, tmp_path):
    stroke(panel, qtbot, 2)
    saved = native(view.layer).copy()
    panel.project.add_study(replace(lesion_study(tmp_path, "next", 5), labels=None))
    panel.studies.show_project(panel.project, "case")
    listed_studies = panel.studies.studies
    for answer, left in (("Cancel", ["case", "next"]), ("Remove", ["next"])):
        panel.keep.activateWindow()
        qtbot.waitUntil(panel.keep.isActiveWindow, timeout=10_000)
        listed_studies.setFocus()
        asked = answer_with(qtbot, answer)
        with qtbot.waitSignal(panel.studies.remove.triggered, timeout=5_000):  # once it is answered
            qtbot.keyClick(listed_studies, Qt.Key.Key_Delete)
        assert "strokes stay on the disk" in asked[0]
        assert [s.name for s in panel.project.studies] == left
    assert panel.view is None
    assert not panel.tools["undo"].isEnabled()
    assert [layer.name for layer in viewer.layers] == ["T1", "FLAIR"]
    assert listed_studies.findData("case") == -1
    assert not panel.studies.remove.isEnabled()  # none is chosen
    shown_labels(viewer, truth().astype(np.int32))
    panel.begin.setCurrentIndex(1)  # not asked what they mean: there are strokes
    begin(panel, qtbot)
    assert [s.name for s in panel.project.studies] == ["next", "case"]
    np.testing.assert_array_equal(native(panel.view.layer), saved)
    shutil.rmtree(tmp_path / "next")
    choose_study(panel, "next")  # which cannot be opened
    answer_with(qtbot, "Remove")
    panel.studies.remove.trigger()
    assert panel.view.name == "case"
    assert [s.name for s in panel.project.studies] == ["case"]
    panel.view.layer.scale = (2, 1, 1)  # what cannot be saved is not let go
    answer_with(qtbot, "Remove")
    panel.studies.remove.trigger()
    assert "was moved" in panel.status.text()
    assert [s.name for s in panel.project.studies] == ["case"]


def test_choosing_a_study_removes_the_scans_of_the_last_one_and_no_others(panel, viewer, qtbot, tmp_path):
    scan = lesion_study(keys=("t2",)).scans["t2"]
    data, options, _ = scan_layer(replace(scan, imputed=True), np.eye(4))
    made = viewer.add_image(data, **options)
    own = [layer for layer in viewer.layers if layer is not made]
    begin(panel, qtbot)
    assert panel.project.read("case").scans["t2"].imputed  # what was copied into the project says so
    before = len(viewer.layers)
    open_study(viewer, lesion_study(tmp_path, "beside", 6))
    beside = list(viewer.layers)[before:]
    panel.project.add_study(replace(lesion_study(tmp_path, "third", 5), labels=None))
    panel.studies.show_project(panel.project, "case")
    choose_study(panel, "third")
    assert not any(layer in viewer.layers for layer in own)
    assert all(layer in viewer.layers and not layer.visible for layer in (*beside, made))
    assert made.name == "T2 (imputed) of case"
    choose_study(panel, "case")
    homes = [path.parent.name for layer in viewer.layers if (path := layer_path(layer)) is not None]
    assert sorted(homes) == ["beside", "beside", "case", "case", "case"]
    qtbot.waitUntil(lambda: not panel.view.probe.busy, timeout=60_000)


@pytest.mark.parametrize("keys", [("flair", "dwi", "adc"), ("dwi", "adc")])
def test_all_scans_of_a_study_are_annotated_whatever_model_is_chosen(panel, viewer, qtbot, tmp_path, keys):
    viewer.layers.clear()
    assert not panel.start.isEnabled()
    stray = lesion_study(tmp_path, "stray", 7, keys=("flair", "dwi", "mra"))
    stroke_study = lesion_study(tmp_path, "stroke", 3, keys=keys)
    open_study(viewer, stray)  # of somebody else: its MRA is no scan of the study
    open_study(viewer, stroke_study)
    assert panel.start.isEnabled()
    if "flair" not in keys:
        for layer in [layer for layer in viewer.layers if layer_path(layer).parent.name == "stray"]:
            viewer.layers.remove(layer)  # now no row of the Study panel has a layer
    begin(panel, qtbot)
    reference = panel.project.study("stroke")
    assert set(reference.scans) == set(keys)
    assert reference.grid.same_as(stroke_study.grid)
    assert {name.split()[0] for name in panel.view.probe.predictor.features.names} - {"network", "class"} == set(keys)
    both(panel, qtbot)
    assert (native(viewer.layers["Prediction"]) == 2).any()
    painted = native(panel.view.layer).copy()
    panel.close_project()
    viewer.layers.clear()
    panel.open_project(tmp_path / "project")
    choose_study(panel, "stroke")
    np.testing.assert_array_equal(native(panel.view.layer), painted)
    assert set(panel.view.study.scans) == set(keys)
    begin(panel, qtbot)  # the button finds it again, too
    assert [s.name for s in panel.project.studies] == ["stroke"]
    qtbot.waitUntil(lambda: panel.view.probe.ready and not panel.view.probe.busy, timeout=60_000)


def test_which_study_next_and_what_class_each_is_of(panel, view, qtbot, tmp_path, monkeypatch):
    both(panel, qtbot)
    for name, seed, keys in (("alike", 3, ("t1", "flair")), ("less", 4, ("t1",))):
        panel.project.add_study(replace(lesion_study(tmp_path, name, seed, keys=keys), labels=None))
    part = panel.studies
    part.show_project(panel.project, "case")
    with qtbot.waitSignal(part.said, timeout=120_000):
        qtbot.mouseClick(part.rank, Qt.MouseButton.LeftButton)
        assert not part.rank.isEnabled()
    assert "less" in panel.status.text()  # without FLAIR the prediction is undecided
    assert [part.studies.itemText(k) for k in range(1, 4)] == ["1.  less", "2.  alike", "case"]
    assert part.studies.currentData() == "case"
    part.group.setFocus()
    part.group.lineEdit().selectAll()
    qtbot.keyClicks(part.group.lineEdit(), "HGG")
    qtbot.keyClick(part.group.lineEdit(), Qt.Key.Key_Return)
    assert panel.project.study("case").group == "HGG"
    assert "HGG" in part.studies.currentText()
    part.export_classes(tmp_path / "participants.tsv")
    table = (tmp_path / "participants.tsv").read_text()
    assert "sub-case\tHGG" in table
    (tmp_path / "participants.tsv").write_text(table.replace("sub-less\tn/a", "sub-less\tLGG"))
    part.import_classes(tmp_path / "participants.tsv")
    assert panel.project.study("less").group == "LGG"
    assert "2 of 3" in panel.status.text()
    (tmp_path / "grades.tsv").write_text("participant_id\tage\tgrade\nsub-less\t40\tII\n")
    offered = ["age  –  40", "grade  –  II"]
    for answer, group in (((offered[0], False), "LGG"), ((offered[1], True), "II")):
        monkeypatch.setattr(QInputDialog, "getItem", lambda *said, answer=answer: said[3] == offered and answer)
        part.import_classes(tmp_path / "grades.tsv")
        assert panel.project.study("less").group == group
    assert "grade of grades.tsv" in panel.status.text()
    with qtbot.waitSignal(part.said, timeout=30_000):
        part.export_dataset(tmp_path / "dataset", "bids")
    assert list((tmp_path / "dataset" / "sub-case" / "anat").glob("*_dseg.nii.gz"))
    choose_study(panel, "less")
    assert part.group.currentText() == "II"
    qtbot.waitUntil(lambda: "Alt+A begins with what was painted" in panel.status.text(), timeout=60_000)
    qtbot.mouseClick(panel.everything, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: len(panel.view.probe.others) == 1 and panel.view.probe.ready, timeout=60_000)
    qtbot.waitUntil(lambda: not panel.view.probe.busy, timeout=60_000)
    part.removed.emit("case")  # once it has left, nothing is learned from it
    qtbot.waitUntil(lambda: panel.view.probe.others == () and not panel.view.probe.busy, timeout=60_000)


def on_two_slices(panel, qtbot) -> None:
    """Paint both classes on two slices."""
    layer = panel.view.layer
    with qtbot.waitSignal(panel.view.probe.updated, timeout=60_000, check_params_cb=lambda whole: whole):
        for shift in (0, 4):
            for value in (2, 1):
                panel.classes.choose(value - 1)
                layer.brush_size = 3
                with layer.block_history():
                    for i, j, k in np.argwhere(strokes() == value)[::3]:
                        layer.paint((k + shift, j, i), layer.selected_label)
                layer.events.paint(value=[])
    qtbot.waitUntil(lambda: not panel.view.probe.busy, timeout=60_000)


def test_a_model_grows_from_the_strokes_and_is_compared_on_the_next_study(
    panel, view, viewer, qtbot, tmp_path, monkeypatch
):
    from napari_brainmvp.training.finetuning import spec

    seen = []
    monkeypatch.setattr("napari.utils.notifications.notification_manager.dispatch", seen.append)
    part = panel.finetune
    panel.keep.jobs.abandon()  # it looks when the test says so
    quick = {"max_steps": 3, "crop": 32, "validate_every": 3, "accelerator": "cpu", "precision": "32-true"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(spec.PRESETS, "minutes", quick)
        on_two_slices(panel, qtbot)
        with qtbot.waitSignal(part.submitted, timeout=60_000):
            qtbot.mouseClick(part.button, Qt.MouseButton.LeftButton)
    panel.project.add_study(replace(lesion_study(tmp_path, "next", 5), labels=None))
    panel.studies.show_project(panel.project, "case")
    choose_study(panel, "next")
    qtbot.waitUntil(lambda: panel.view.probe.predictor is not None, timeout=90_000)
    on_two_slices(panel, qtbot)
    qtbot.waitUntil(lambda: [j.state for j in list_jobs()] == ["done"], timeout=180_000)
    (job,) = list_jobs()
    panel.keep.jobs.poll()
    qtbot.waitUntil(lambda: "Mean Dice on 2 painted slices" in part.status.text(), timeout=90_000)  # unasked
    assert job.name in part.status.text()
    assert part.use.text() == "Use the model"
    qtbot.waitUntil(lambda: panel.keep.segment.model.findText("Fine-tuned model") >= 0, timeout=30_000)

    choose_study(panel, "case")
    qtbot.waitUntil(lambda: panel.view.probe.predictor is not None, timeout=90_000)
    part._started[job.name] = panel.project.folder
    seen.clear()
    part.job_done(job)
    qtbot.waitUntil(lambda: "was trained on case" in part.status.text(), timeout=60_000)
    assert not seen  # nobody asked
    part.status.clear()
    qtbot.mouseClick(part.compare, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: "was trained on case" in part.status.text(), timeout=60_000)
    assert seen
    qtbot.waitUntil(lambda: not panel.view.probe.busy, timeout=60_000)


def own_model(panel, tmp_path, home, **changes):
    """A model of the project, and what it finds in the study."""
    from napari_brainmvp.annotation.comparison import newest_model, predict_classes
    from napari_brainmvp.training.finetuning import FinetuneSpec

    data = tmp_path / "project" / "datasets" / "one"
    data.mkdir(parents=True)
    recipe = FinetuneSpec(data=({"path": str(data)},)).recipe()
    tiny_model(home / "models", "mine", training={"recipe": recipe}, **changes)
    named = (LabelClass(value=k + 2, name=name, color=COLORS[k]) for k, name in enumerate(NAMES))
    panel.project.set_classes((default_classes()[0], *named))
    return predict_classes(lesion_study(), newest_model(panel.project), panel.project.classes)


@pytest.fixture
def known(panel, qtbot, tmp_path, home):
    """A model of classes, and a study painted on two slices exactly as that model finds it: no probe knows that."""
    found = own_model(panel, tmp_path, home)
    begin(panel, qtbot)
    paint(panel, qtbot, on_slices(found.labels))
    return found


@pytest.fixture
def regional(panel, qtbot, tmp_path, home):
    """The same with a model of regions that are decided one by one: there is nothing in it to start from."""
    network = tiny_card().network.model_copy(update={"out_channels": 3})
    found = own_model(panel, tmp_path, home, activation="sigmoid", channels=(1, 2, 3), network=network)
    assert found.known == ()
    begin(panel, qtbot)
    paint(panel, qtbot, on_slices(found.labels))
    return found


def on_slices(values: np.ndarray, every: int = 2) -> np.ndarray:
    """Every other voxel of two slices."""
    labels = np.zeros_like(values)
    for k in (MIDDLE, MIDDLE + 4):
        labels[::every, ::every, k] = values[::every, ::every, k]
    return labels


def paint(panel, qtbot, labels: np.ndarray) -> None:
    with qtbot.waitSignal(panel.view.probe.updated, timeout=60_000, check_params_cb=lambda whole: whole):
        native(panel.view.layer)[...] = labels
        panel.view.layer.events.paint(value=[])
    qtbot.waitUntil(lambda: not panel.view.probe.busy, timeout=60_000)


def better(panel, qtbot) -> str:
    part = panel.finetune
    part.status.clear()
    qtbot.mouseClick(part.compare, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: "Mean Dice" in part.status.text(), timeout=90_000)
    return part.status.text().split(". ", 1)[1]


def follows(panel, qtbot) -> None:
    """Wait for strokes to correct the model."""
    qtbot.waitUntil(lambda: panel.view.probe._led is not None and not panel.view.probe.busy, timeout=90_000)


def test_strokes_correct_the_better_model(panel, known, viewer, qtbot, home):
    part, view = panel.finetune, panel.view
    assert "model is better" in better(panel, qtbot)
    qtbot.mouseClick(part.use, Qt.MouseButton.LeftButton)
    shown = viewer.layers["Prediction of mine"]
    np.testing.assert_array_equal(native(shown), known.labels)  # at once
    assert not shown.editable
    assert part.use.text() == "Use the probe"
    follows(panel, qtbot)
    qtbot.waitUntil(lambda: "follows your strokes" in panel.status.text(), timeout=60_000)
    assert np.shares_memory(native(shown), view.probe.prediction)
    inside = truth() > 0
    assert (view.probe.prediction == known.labels)[inside].mean() > 0.9
    here = np.zeros(SHAPE, bool)
    here[14:26, 14:26, MIDDLE - 8] = inside[14:26, 14:26, MIDDLE - 8]
    near = slice(14, 26), slice(14, 26), MIDDLE - 7
    wrong = int(np.argmin(np.bincount(view.probe.prediction[near].ravel(), minlength=5)[2:])) + 2
    assert (view.probe.prediction[near] == wrong).mean() < 0.4
    native(view.layer)[here] = wrong
    with qtbot.waitSignal(view.probe.updated, timeout=60_000, check_params_cb=lambda whole: whole):
        view.layer.events.paint(value=[])
    assert view.model == "mine"
    assert (view.probe.prediction[near] == wrong).mean() > 0.5
    part.status.clear()
    part.job_done(SimpleNamespace(name="another"))
    part.find_better()  # a job that is done asks the same
    assert "cannot judge it" in part.status.text()
    assert (view.model, view.probe._led is None) == ("mine", False)

    panel.everything.setChecked(True)
    assert "once you use the probe" in panel.status.text()
    (white,) = (c for c in panel.project.classes if c.name == "White matter")
    others = tuple(c for c in panel.project.classes if c is not white)
    panel.classes.edited.emit((*others, white.model_copy(update={"name": "Something else"})))
    follows(panel, qtbot)
    assert view.probe._led.probe.known == (1, 2, 3, 1)
    panel.classes.edited.emit((*others, white))
    follows(panel, qtbot)

    qtbot.mouseClick(part.use, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: not view.probe.busy, timeout=60_000)
    assert (view.model, part.use.text(), native(viewer.layers["Prediction"]).any()) == ("", "Use the model", True)
    shutil.rmtree(home / "models" / "mine")
    qtbot.mouseClick(part.use, Qt.MouseButton.LeftButton)  # what it found is there, but not the model
    qtbot.waitUntil(lambda: view.model == "" and "mine" in panel.status.text(), timeout=60_000)
    qtbot.waitUntil(lambda: not view.probe.busy, timeout=60_000)


def test_a_study_that_nothing_is_painted_on_begins_with_the_model(panel, viewer, qtbot, tmp_path, home):
    found = own_model(panel, tmp_path, home)
    begin(panel, qtbot)
    part, view = panel.finetune, panel.view
    assert (part.use.text(), part.use.isVisible()) == ("Begin with the model", True)
    assert "Alt+Shift+Q begins with mine" in panel.status.text()
    qtbot.mouseClick(part.use, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: view.model == "mine", timeout=60_000)
    reading = view.probe._leading
    reading.wait(60)
    qtbot.mouseClick(part.use, Qt.MouseButton.LeftButton)  # back, while what was read is on its way
    qtbot.wait(50)
    assert (view.model, view.probe._led, native(viewer.layers["Prediction"]).any()) == ("", None, False)
    qtbot.mouseClick(part.use, Qt.MouseButton.LeftButton)
    np.testing.assert_array_equal(native(viewer.layers["Prediction of mine"]), found.labels)
    assert panel.tools["next_slice"].isEnabled()
    follows(panel, qtbot)
    assert "your strokes correct" in panel.status.text()
    np.testing.assert_array_equal(native(viewer.layers["Prediction of mine"]), found.labels)  # until there is a stroke
    with qtbot.waitSignal(view.probe.updated, timeout=60_000, check_params_cb=lambda whole: whole):
        stroke(panel, qtbot, 2)  # a single class is enough
    assert (view.probe.prediction == found.labels)[truth() > 0].mean() > 0.5
    native(view.layer)[...] = 0
    view.layer.events.paint(value=[])
    panel.tools["undo"].click()
    panel.tools["undo"].click()
    qtbot.waitUntil(lambda: not view.probe.busy, timeout=60_000)
    qtbot.mouseClick(part.use, Qt.MouseButton.LeftButton)
    assert (view.model, native(viewer.layers["Prediction"]).any()) == ("", False)
    assert part.use.text() == "Begin with the model"
    assert not panel.project.labels("case").labels.any()


def test_a_study_that_is_left_while_the_model_is_read_starts_anew(panel, viewer, qtbot, tmp_path, home):
    own_model(panel, tmp_path, home)
    begin(panel, qtbot)
    left = panel.view
    qtbot.mouseClick(panel.finetune.use, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: left.model == "mine", timeout=60_000)
    reading = left.probe._leading
    assert reading is not None
    reading.wait(60)  # done, and not yet heard of
    choose_study(panel, "case")
    qtbot.waitUntil(lambda: panel.view.probe.predictor is not None, timeout=90_000)
    assert panel.view is not left
    assert (left.probe._led, panel.view.model, panel.finetune.use.text()) == (None, "", "Begin with the model")
    assert "correct the prediction" not in panel.status.text()


def test_the_better_model_of_regions_is_shown_until_the_next_stroke(panel, regional, viewer, qtbot, home):
    part, view, layer = panel.finetune, panel.view, panel.view.layer
    probe = native(viewer.layers["Prediction"]).copy()
    assert "model is better" in better(panel, qtbot)
    assert part.use.isVisible()
    np.testing.assert_array_equal(native(viewer.layers["Prediction"]), probe)  # nothing changes unasked
    shutil.rmtree(home / "models" / "mine")  # what it found is kept: the model is not run again
    qtbot.mouseClick(part.use, Qt.MouseButton.LeftButton)
    np.testing.assert_array_equal(native(viewer.layers["Prediction of mine"]), regional.labels)
    assert not viewer.layers["Prediction of mine"].editable  # nobody would save what is painted there
    np.testing.assert_array_equal(native(viewer.layers["Uncertainty"]), regional.uncertainty)
    assert "prediction of mine, until" in panel.status.text()
    assert part.use.text() == "Use the probe"
    assert part.use.shortcut().toString() == "Alt+Shift+Q"

    viewer.dims.set_point(0, layer.data_to_world((MIDDLE, 0, 0))[0])
    before = native(layer)[..., MIDDLE].copy()
    here = regional.labels[..., MIDDLE]
    i, j = next((i, j) for i, j in np.argwhere((before == 0) & (here > 1)))
    viewer.cursor.position = layer.data_to_world((MIDDLE, j, i))
    panel.toolbox.here.activated.emit()
    taken = native(layer)[..., MIDDLE]
    assert taken[i, j] == here[i, j]
    new = (taken != before) & (before == 0)
    np.testing.assert_array_equal(taken[new], here[new])
    np.testing.assert_array_equal(taken[before != 0], before[before != 0])
    assert "Shown is the prediction of mine" in panel.status.text()  # it goes on being shown, to take over more of it
    np.testing.assert_array_equal(native(viewer.layers["Prediction of mine"]), regional.labels)

    qtbot.mouseClick(part.use, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: not view.probe.busy, timeout=60_000)
    assert part.use.text() == "Use the model"
    assert not viewer.layers["Prediction"].editable
    assert np.shares_memory(native(viewer.layers["Prediction"]), view.probe.prediction)
    qtbot.mouseClick(part.use, Qt.MouseButton.LeftButton)
    np.testing.assert_array_equal(native(viewer.layers["Prediction of mine"]), regional.labels)
    with qtbot.waitSignal(view.probe.updated, timeout=60_000, check_params_cb=lambda whole: whole):
        stroke(panel, qtbot, 2)
    assert (view.model, part.use.text()) == ("", "Use the model")
    np.testing.assert_array_equal(native(viewer.layers["Prediction"]), view.probe.prediction)
    assert (view.probe.prediction != regional.labels).any()
    assert "follows your strokes" in panel.status.text()


def test_taking_over_from_a_model_of_regions_never_paints_over_a_stroke(panel, regional, viewer, qtbot):
    view, layer = panel.view, panel.view.layer
    wrong = np.where(regional.labels > 1, 1, 2)
    better(panel, qtbot)
    panel.live.setChecked(False)
    native(layer)[10:20, 10:20, MIDDLE + 1] = wrong[10:20, 10:20, MIDDLE + 1]
    layer.events.paint(value=[])
    painted = native(layer).copy()
    qtbot.mouseClick(panel.finetune.use, Qt.MouseButton.LeftButton)
    for k in (MIDDLE, MIDDLE + 1):
        viewer.dims.set_point(0, layer.data_to_world((k, 0, 0))[0])
        panel.tools["take_over_slice"].click()
    both_slices = native(layer)[..., MIDDLE : MIDDLE + 2]
    before, found = painted[..., MIDDLE : MIDDLE + 2], regional.labels[..., MIDDLE : MIDDLE + 2]
    np.testing.assert_array_equal(both_slices, np.where(before != 0, before, found))
    np.testing.assert_array_equal(panel.project.labels("case").labels, native(layer))
    panel.tools["undo"].click()
    assert view.model == "mine"  # what was taken over by mistake can be taken back
    panel.tools["update_now"].click()
    assert view.model == ""
    qtbot.waitUntil(lambda: not view.probe.busy, timeout=60_000)


def test_where_the_probe_is_better_a_model_of_regions_that_is_shown_gives_way(panel, regional, viewer, qtbot):
    better(panel, qtbot)
    qtbot.mouseClick(panel.finetune.use, Qt.MouseButton.LeftButton)
    panel.live.setChecked(False)
    native(panel.view.layer)[...] = on_slices(np.where(truth() == 2, 3, truth()).astype(np.int64))
    panel.view.layer.events.paint(value=[])
    assert panel.view.model == "mine"
    assert "probe is better" in better(panel, qtbot)
    assert panel.finetune.use.text() == "Use the model"  # one may, all the same
    assert panel.view.model == ""
    np.testing.assert_array_equal(native(viewer.layers["Prediction"]), panel.view.probe.prediction)


def test_a_second_window_is_told_and_cannot_paint(panel, view, make_napari_viewer, qtbot, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("napari.utils.notifications.notification_manager.dispatch", seen.append)
    other = make_napari_viewer()
    second = BrainMVPWidget(other)
    qtbot.addWidget(second)
    open_study(other, lesion_study(tmp_path))
    second.annotate.open_project(tmp_path / "project")
    assert any("already open for writing" in n.message for n in seen)
    assert "read-only" in second.annotate.title.text()
    begin(second.annotate, qtbot)
    assert not second.annotate.view.layer.editable
    assert not second.annotate.tools["undo"].isEnabled()
    assert not second.annotate.studies.remove.isEnabled()
    second.annotate.classes.choose(1)
    assert not second.annotate.classes.remove.isEnabled()
    panel.studies.removed.emit("case")  # nobody's strokes are lost by that, wherever they are looked at
    assert second.annotate.view.name == "case"
    second.annotate.abandon()


def test_whose_lock_was_taken_over_cannot_go_on_painting(panel, view, tmp_path, monkeypatch):
    """Because this machine slept, and somebody else opened the project."""
    seen = []
    monkeypatch.setattr("napari.utils.notifications.notification_manager.dispatch", seen.append)
    lock = tmp_path / "project" / "lock.json"
    lock.write_text(json.dumps(json.loads(lock.read_text()) | {"token": "another", "host": "elsewhere"}))
    view.layer.paint((MIDDLE, 20, 20), 2)
    view.layer.events.paint(value=[])
    assert "nothing that is painted here is saved" in panel.status.text()
    assert not view.layer.editable
    assert "read-only" in panel.title.text()
    count = len(seen)
    panel.close_project()  # what is not saved is said once more
    assert [n.message for n in seen[count:]] == [seen[count - 1].message]


@pytest.mark.parametrize("answer", ["The project's classes", "New classes", "Cancel"])
def test_labels_without_names_are_asked_about(panel, viewer, qtbot, monkeypatch, answer):
    """A mask of zeros and ones is hardly ever one of background."""
    seen = []
    monkeypatch.setattr("napari.utils.notifications.notification_manager.dispatch", seen.append)
    layer = shown_labels(viewer, (truth() == 2).astype(np.int32))
    panel.begin.setCurrentIndex(panel.begin.findText(f"Begin with {layer.name}"))
    asked = answer_with(qtbot, answer)
    qtbot.mouseClick(panel.start, Qt.MouseButton.LeftButton)
    assert asked[0].startswith("1:  Background in this project")
    if answer == "Cancel":
        assert panel.project.studies == ()
        assert "Nothing was added" in panel.status.text()
        assert not seen  # who cancels has made no error
        return
    value = 3 if answer == "New classes" else 1
    np.testing.assert_array_equal(panel.project.labels("case").labels, np.where(truth() == 2, value, 0))
    names = {c.value: c.name for c in panel.project.classes}
    assert names == {1: "Background", 2: "Lesion"} | ({3: f"{layer.name} 1"} if value == 3 else {})


def test_whatever_takes_long_can_be_cancelled(panel, viewer, qtbot, tmp_path):
    row, part = panel.progress, panel.finetune
    assert not row.cancel.isVisible()

    def cancel(start) -> None:
        start()
        assert row.cancel.isVisible()
        qtbot.mouseClick(row.cancel, Qt.MouseButton.LeftButton)
        qtbot.waitUntil(lambda: not row.cancel.isVisible() and not row.bar.isVisible(), timeout=60_000)

    cancel(lambda: qtbot.mouseClick(panel.start, Qt.MouseButton.LeftButton))
    assert "the study was not read" in panel.status.text()
    assert panel.view.probe.predictor is None
    begin(panel, qtbot)  # as it says
    on_two_slices(panel, qtbot)
    painted = panel.project.labels("case").labels
    for name in ("next", "other"):
        panel.project.add_study(replace(lesion_study(tmp_path, name, 5), labels=None))
    panel.project.labels("next").record(painted)
    panel.studies.show_project(panel.project, "case")
    cancel(lambda: qtbot.mouseClick(panel.studies.rank, Qt.MouseButton.LeftButton))
    assert "Cancelled" in panel.status.text()
    assert panel.studies.rank.isEnabled()
    cancel(lambda: panel.studies.export_dataset(tmp_path / "dataset", "brats"))
    assert not (tmp_path / "dataset").exists()
    cancel(lambda: qtbot.mouseClick(panel.everything, Qt.MouseButton.LeftButton))
    assert (panel.everything.isChecked(), panel.view.probe.others) == (False, ())
    cancel(lambda: qtbot.mouseClick(part.button, Qt.MouseButton.LeftButton))
    assert part.status.text() == "Cancelled."
    assert part.button.isEnabled()
    assert list_jobs() == []
    qtbot.waitUntil(lambda: not panel.view.probe.busy, timeout=60_000)


def test_nothing_painted_is_nothing_to_compare(panel, view, qtbot):
    qtbot.mouseClick(panel.finetune.compare, Qt.MouseButton.LeftButton)
    assert "Nothing is painted on case yet" in panel.finetune.status.text()
    assert panel.finetune.compare.isEnabled()


def test_removing_the_layer_keeps_the_strokes(panel, view, viewer, qtbot):
    both(panel, qtbot)
    saved = native(view.layer).copy()
    viewer.layers.remove(view.layer)
    assert panel.view is None
    np.testing.assert_array_equal(panel.project.labels("case").labels, saved)


class Cancel(QObject):
    """What napari does with the close event of a window whose user says no."""

    def eventFilter(self, watched: QObject, event: QEvent) -> bool:
        if event.type() == QEvent.Type.Close:
            event.ignore()
        return event.type() == QEvent.Type.Close


def test_only_a_window_that_really_closes_lets_go(panel, viewer, qtbot, tmp_path):
    window, cancel, lock = viewer.window._qt_window, Cancel(), tmp_path / "project" / "lock.json"
    window.installEventFilter(cancel)
    dock = viewer.window.add_dock_widget(panel.keep, name="BrainMVP")
    begin(panel, qtbot)
    assert not window.close()
    dock.setFloating(True)
    dock.close()  # napari's menu shows it again
    window.removeEventFilter(cancel)
    assert panel.keep.jobs._timer.isActive()
    assert lock.exists()
    stroke(panel, qtbot, 2)
    assert panel.project.labels("case").stroke == 1
    qtbot.waitUntil(lambda: "two classes" in panel.status.text(), timeout=60_000)  # the probe is listening
    native(panel.view.layer)[20, 20, MIDDLE + 3] = 1  # a stroke that is still being drawn
    project = panel.project
    assert window.close()
    assert panel.project is panel.view is None
    assert not panel.keep.jobs._timer.isActive()
    assert not lock.exists()
    assert project.labels("case").labels[20, 20, MIDDLE + 3] == 1
    viewer.window.remove_dock_widget(panel.keep)  # which outlives the window here
    viewer.close()


def test_a_view_knows_its_layers_in_the_viewer_that_napari_gives_to_plugins(viewer, qtbot, tmp_path):
    widget = BrainMVPWidget(PublicOnlyProxy(viewer))
    qtbot.addWidget(widget)
    open_study(viewer, lesion_study(tmp_path))
    panel = widget.annotate
    panel.create_project(tmp_path / "project")
    panel.annotate()
    assert panel.begin.count() == 1  # its own labels are nothing to begin with
    viewer.layers.remove("Annotation case")
    assert panel.view is None
    panel.abandon()


def test_a_project_on_a_full_disk_is_let_go(panel, qtbot, tmp_path):
    begin(panel, qtbot)
    stroke(panel, qtbot, 2)
    first = panel.project
    assert first.labels("case").stroke
    with full_disk():
        panel.close_project()
    assert panel.project is panel.view is None
    panel.create_project(tmp_path / "second")
    panel.open_project(first.folder)
    assert not panel.project.read_only
    np.testing.assert_array_equal(panel.project.labels("case").labels, first.labels("case").labels)


CRASH = """
import sys, time
sys.path.insert(0, sys.argv[2])
import napari
from pathlib import Path
from annotation_for_tests import lesion_study
from qtpy.QtWidgets import QApplication
from napari_brainmvp.plugin.layers import layer_path, scan_layer, study_layers
folder = Path(sys.argv[1])
viewer = napari.Viewer(show=False)
_, widget = viewer.window.add_plugin_dock_widget("napari-brainmvp")
for data, options, kind in study_layers(lesion_study(folder)):
    viewer.add_image(data, **options)
widget.annotate.create_project(folder / "project")
widget.annotate.annotate()
layer = widget.annotate.view.layer
with layer.block_history():  # the button is held down and never let go
    for step in range(10**6):
        layer.paint((step // 30 % 36, 10 + step % 30, 20), 2)
        print(step, time.time(), flush=True)
        until = time.monotonic() + 0.05
        while time.monotonic() < until:
            QApplication.processEvents()
"""


def test_a_viewer_killed_within_a_stroke_loses_two_seconds_at_most(home, tmp_path):
    command = [sys.executable, "-c", CRASH, str(tmp_path), str(TESTS)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    lines = [process.stdout.readline()]
    started = time.monotonic()
    while time.monotonic() - started < 6:
        lines.append(process.stdout.readline())
    assert process.poll() is None  # it is in the middle of a stroke
    killed = time.time()
    process.kill()
    lines += process.stdout.read().splitlines()
    process.wait()
    labels = LabelHistory(tmp_path / "project" / "labels" / "case", SHAPE).labels
    project = AnnotationProject.open(tmp_path / "project")
    assert not project.read_only  # a dead window's lock is stale
    project.close()
    checked = 0
    for line in (said.split() for said in lines if len(said.split()) == 2):
        step, painted = int(line[0]), float(line[1])
        if painted < killed - 2:
            checked += 1
            assert labels[20, 10 + step % 30, step // 30 % 36] == 2
    assert checked > 10


def test_an_anisotropic_study_with_other_axes(panel, viewer, qtbot, tmp_path):
    viewer.layers.clear()
    affine = np.array([[0, 0, 1.5, -30], [-0.8, 0, 0, 20], [0, -1, 0, 30], [0, 0, 0, 1.0]])
    made = lesion_study(tmp_path, "turned", affine=affine)
    open_study(viewer, made)
    begin(panel, qtbot)
    view = panel.view
    assert made.grid.same_as(Grid(SHAPE, affine))
    native(view.layer)[...] = strokes()
    with qtbot.waitSignal(view.probe.updated, timeout=60_000, check_params_cb=lambda whole: whole):
        view.layer.events.paint(value=[])
    assert overlap(native(viewer.layers["Prediction"]) == 2, truth() == 2) > 0.6
    np.testing.assert_array_equal(panel.project.labels("turned").labels, strokes())
