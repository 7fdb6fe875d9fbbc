"""Regions of a project, classes that overlap: on the disk, in datasets, models, comparisons and a window."""

import json
import shutil

import numpy as np
import pytest
from qtpy.QtCore import Qt
from qtpy.QtWidgets import QDialogButtonBox, QLineEdit

from annotation_for_tests import SHAPE, lesion_study, strokes, truth
from models_for_tests import tiny_card
from napari_brainmvp.annotation.comparison import check_unseen, compare, newest_model, predict_classes
from napari_brainmvp.annotation.content import LabelClass
from napari_brainmvp.annotation.export import export_dataset
from napari_brainmvp.annotation.features import compute_features
from napari_brainmvp.annotation.model_classes import known_classes, region_classes
from napari_brainmvp.annotation.project import AnnotationProject
from napari_brainmvp.annotation.regions import brats_regions
from napari_brainmvp.errors import FileError, StudyError
from napari_brainmvp.models import find_model, import_model, load_model
from napari_brainmvp.plugin.class_table import ClassTable
from napari_brainmvp.plugin.region_dialog import RegionDialog
from napari_brainmvp.training.finetuning import FinetuneSpec, finetune
from napari_brainmvp.training.labels import LabelDescription, read_labels
from napari_brainmvp.training.sources import DataSource

TUMOUR = (
    LabelClass(value=1, name="Background", color="#4a90d9", background=True),
    LabelClass(value=2, name="Oedema", color="#d1495b"),
    LabelClass(value=3, name="Non-enhancing core", color="#f2c14e"),
    LabelClass(value=5, name="Enhancing tumour", color="#2fbf9b"),
    LabelClass(value=9, name="Cyst", color="#9b6dd6"),
)
BRATS = {"whole tumour": (2, 3, 5), "tumour core": (3, 5), "enhancing tumour": (5,)}


@pytest.fixture
def project(tmp_path):
    made = AnnotationProject.create(tmp_path / "project", TUMOUR)
    yield made
    made.close()


def nested() -> np.ndarray:
    """The lesion of the study as a shell of oedema, a core in it and an enhancing middle; background around."""
    values = np.where(truth() == 2, 2, truth())
    index = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij"), -1)
    distance = np.linalg.norm(index - [0.2, 0.1, 0.0], axis=-1)
    values[distance < 0.25] = 3
    values[distance < 0.15] = 5
    return values.astype(np.int64)


# --- on the disk ------------------------------------------------------------------------------------------------


def test_regions_are_kept_the_larger_ones_first_and_older_projects_have_none(project, tmp_path):
    assert project.regions == {}
    project.set_regions({"core": (5, 3, 3), " whole ": [2, 5, 3]})
    project.close()
    again = AnnotationProject.open(tmp_path / "project")
    assert list(again.regions.items()) == [("whole", (2, 3, 5)), ("core", (3, 5))]
    again.set_regions({})
    again.close()
    assert "regions" not in json.loads((tmp_path / "project" / "project.json").read_text())  # older versions refuse it
    old = AnnotationProject.open(tmp_path / "project")
    assert (old.regions, old.classes) == ({}, TUMOUR)
    old.close()


@pytest.mark.parametrize(
    ("regions", "said"),
    [
        ({"whole": (2, 7)}, "number 7"),
        ({"whole": (1, 2)}, "number 1"),
        ({"whole": ()}, "'whole' has no class"),
        ({" ": (2,)}, "no name"),
        ({"Core": (2,), "core ": (3,)}, "Two regions"),
    ],
)
def test_regions_that_make_no_sense_are_refused_and_in_a_file_they_are_damage(project, tmp_path, regions, said):
    project.set_regions(BRATS)
    with pytest.raises(StudyError, match=said):
        project.set_regions(regions)
    assert project.regions == BRATS
    project.close()
    path = tmp_path / "project" / "project.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "regions": regions}))
    with pytest.raises(FileError, match=rf"project.json is damaged .*{said}"):
        AnnotationProject.open(tmp_path / "project")


def test_a_class_that_a_region_is_made_of_can_neither_go_nor_get_another_number(project):
    project.set_regions(BRATS)
    changed = [
        tuple(c for c in TUMOUR if c.value != 5),
        tuple(c.model_copy(update={"value": 6}) if c.value == 5 else c for c in TUMOUR),
        tuple(c.model_copy(update={"background": c.value == 5}) for c in TUMOUR),
    ]
    for classes in changed:
        with pytest.raises(StudyError, match=r"'whole tumour' has the number 5.*take it out"):
            project.set_classes(classes)
        assert (project.classes, project.regions) == (TUMOUR, BRATS)
    renamed = tuple(c.model_copy(update={"name": c.name.upper()}) for c in TUMOUR if c.value != 9)
    project.set_classes(renamed)  # a name is nobody's member, and the cyst in no region
    assert (project.classes, project.regions) == (renamed, BRATS)


def test_brats_regions_are_found_by_the_names_of_the_parts():
    assert brats_regions(TUMOUR) == BRATS
    american = tuple(c.model_copy(update={"name": c.name.replace("Oe", "e").replace("our", "or")}) for c in TUMOUR)
    assert american[1].name == "edema"
    assert brats_regions(american) == BRATS
    with pytest.raises(StudyError, match="no non-enhancing core"):
        brats_regions(tuple(c for c in TUMOUR if c.value != 3))


# --- in a dataset and a model -----------------------------------------------------------------------------------


def test_a_dataset_has_the_regions_of_which_something_is_painted(project, tmp_path):
    project.add_study(lesion_study(tmp_path, "case"))
    project.set_regions({**BRATS, "cysts": (9,)})
    project.labels("case").record(np.where(strokes() == 2, 3, strokes()))
    said = read_labels(export_dataset(project, tmp_path / "core"))
    assert said.regions == {"whole tumour": (3,), "tumour core": (3,)}
    values = strokes()
    values[20:22, 25, 10] = 5
    values[20:22, 25, 12] = 9
    project.labels("case").record(values)
    said = read_labels(export_dataset(project, tmp_path / "all"))
    assert said.regions == {"whole tumour": (2, 5), "tumour core": (5,), "enhancing tumour": (5,), "cysts": (9,)}
    assert (said.background, said.unlabelled, said.labels[9]) == (1, 0, "Cyst")
    project.set_regions({"whole tumour": (3,)})
    with pytest.raises(StudyError, match="'whole tumour'"):
        export_dataset(project, tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_a_model_learns_the_regions_and_its_answer_has_the_project_s_values(project, home, tmp_path):
    study = lesion_study(tmp_path, "case")
    project.add_study(study)
    project.labels("case").record(nested())
    project.set_regions(BRATS)
    data = export_dataset(project, project.folder / "datasets" / "one")
    quick = {"max_steps": 2, "crop": 32, "accelerator": "cpu", "precision": "32-true", "init": "tiny"}
    spec = FinetuneSpec(data=(DataSource(path=str(data)),), **quick)
    import_model(finetune(spec, tmp_path / "run", cache=tmp_path / "cache"), "mine")
    entry = newest_model(project)
    assert (entry.card.activation, [label.name for label in entry.card.labels]) == ("sigmoid", list(BRATS))
    assert {m.name.split(", ")[1] for m in entry.card.metrics} <= set(BRATS)
    found = predict_classes(study, entry, project.classes)
    assert found.model == "mine"
    assert found.labels.shape == found.uncertainty.shape == study.grid.shape
    assert set(np.unique(found.labels)) <= {1, 2, 3, 5}
    project.close()
    with pytest.raises(StudyError, match="was trained on case"):
        check_unseen(entry.card, project, "case")
    moved = project.folder.rename(tmp_path / "renamed")
    shutil.rmtree(moved / "datasets")
    again = AnnotationProject.open(moved)
    assert newest_model(again).card.name == "mine"
    other = AnnotationProject.create(project.folder)  # where the model's dataset was
    (other.folder / "datasets" / "one").mkdir(parents=True)
    assert newest_model(other) is None
    assert (entry.card.training["projects"], other.identity) == ([again.identity], "")
    for opened in (again, other):
        opened.close()


def regions_card(regions: dict[str, tuple[int, ...]]):
    labels = LabelDescription(labels={c.value: c.name for c in TUMOUR[1:]}, regions=regions, background=1, unlabelled=0)
    return tiny_card(
        labels=labels.card_labels(),
        channels=labels.painted,
        activation="sigmoid",
        network=tiny_card().network.model_copy(update={"out_channels": len(regions)}),
        training={"labels": labels.model_dump(mode="json")},
    )


def of_classes(values: np.ndarray, regions: dict[str, tuple[int, ...]]) -> np.ndarray:
    """What a model that knows it all says of the regions."""
    return np.where([np.isin(values, members) for members in regions.values()], 0.9, 0.2).astype(np.float16)


def painted(probabilities: np.ndarray, card) -> np.ndarray:
    values = np.zeros(probabilities.shape[1:], np.int64)
    for value, region in zip(card.channels, probabilities, strict=True):
        values[region > 0.5] = value
    return values


def test_where_regions_lie_within_each_other_classes_are_what_the_model_paints():
    card, values = regions_card(BRATS), nested()
    probabilities = of_classes(values, BRATS)
    found = region_classes(probabilities, card, TUMOUR)
    np.testing.assert_array_equal(found, np.where(values == 0, 1, values))
    np.testing.assert_array_equal(found, np.where(painted(probabilities, card) == 0, 1, painted(probabilities, card)))
    renumbered = tuple(c.model_copy(update={"value": c.value + 20}) for c in TUMOUR)
    np.testing.assert_array_equal(region_classes(probabilities, card, renumbered), found + 20)
    with pytest.raises(StudyError, match="none of the classes"):
        region_classes(probabilities, card, (TUMOUR[0], TUMOUR[4]))  # the cyst is in no region: it cannot be found


@pytest.mark.parametrize(
    "regions",
    [
        {"left": (2, 3), "right": (3, 5)},  # neither holds the other
        {"whole": (2, 3, 5), "oedema": (2,), "core": (3,), "active": (5,)},  # the parts make up the whole
    ],
)
def test_classes_are_told_where_what_the_model_paints_cannot_tell_them(regions):
    card, values = regions_card(regions), nested()
    probabilities = of_classes(values, regions)
    np.testing.assert_array_equal(region_classes(probabilities, card, TUMOUR), np.where(values == 0, 1, values))
    # a whole of which no part is found: painted with a value that no class has, and yet it is some class of the whole
    if "whole" in regions:
        unsure = np.array([0.9, 0.3, 0.45, 0.2], np.float16).reshape(4, 1, 1, 1)
        assert painted(unsure, card)[0, 0, 0] > max(c.value for c in TUMOUR[:4])
        assert region_classes(unsure, card, TUMOUR)[0, 0, 0] == 3
    else:
        only_painted = painted(probabilities, card)
        assert set(np.unique(only_painted[values == 5])) == set(np.unique(only_painted[values == 3]))


def test_a_model_that_tells_classes_apart_is_taken_at_its_word():
    card = regions_card(BRATS)
    inside = card.network.model_copy(update={"parts": ((), (0,), (0, 1), (0, 1, 2))})
    unsure = np.array([0.8, 0.7, 0.45], np.float16).reshape(3, 1, 1, 1)  # nothing 0.2, oedema 0.1, core 0.25, else 0.45
    assert region_classes(unsure, card.model_copy(update={"network": inside}), TUMOUR)[0, 0, 0] == 5
    oedema = np.array([0.9, 0.3, 0.02], np.float16).reshape(3, 1, 1, 1)  # nothing 0.1, oedema 0.6, core 0.28
    told = card.model_copy(update={"network": inside})
    assert region_classes(oedema, told, TUMOUR)[0, 0, 0] == 2
    assert region_classes(oedema, told, (TUMOUR[0], *TUMOUR[2:]))[0, 0, 0] == 1  # the project has no oedema
    assert known_classes(told, (TUMOUR[0], *TUMOUR[2:])) == (1, 1, 3, 5)
    assert region_classes(unsure, card, TUMOUR)[0, 0, 0] == 3  # of three regions that are decided one by one


def test_probabilities_that_are_rounded_to_certainty_still_say_something():
    torn = np.array([1, 0, 1], np.float16).reshape(3, 1, 1, 1)  # enhancing, but not core: no class is like that
    assert region_classes(torn, regions_card(BRATS), TUMOUR)[0, 0, 0] in (2, 5)


def test_regions_are_compared_one_by_one_for_probe_and_model_alike(home):
    features = compute_features(lesion_study(), load_model(find_model()))
    values, labels = nested(), np.zeros(SHAPE, np.int64)
    for k in (SHAPE[2] // 2 - 3, SHAPE[2] // 2, SHAPE[2] // 2 + 3):
        labels[..., k] = values[..., k]
    swapped = np.where(values == 5, 3, np.where(values == 3, 2, np.where(values == 0, 1, values)))
    done = compare(features, labels, swapped, TUMOUR, (), {**BRATS, "cysts": (9,)})
    assert list(done.model) == list(done.probe) == list(BRATS)  # no cyst is painted
    assert done.model["whole tumour"] == 1.0  # the parts of it are mistaken for one another, it is not
    seen = labels != 0
    core, true = np.isin(swapped, (3, 5)) & seen, np.isin(labels, (3, 5))
    assert done.model["tumour core"] == pytest.approx(2 * (core & true).sum() / (core.sum() + true.sum()), abs=1e-4)
    assert done.model["enhancing tumour"] == 0.0
    assert done.probe["whole tumour"] > 0.7
    classes = compare(features, labels, swapped, TUMOUR)
    assert list(classes.model) == ["Oedema", "Non-enhancing core", "Enhancing tumour"]
    assert classes.model["Enhancing tumour"] == 0.0
    with pytest.raises(StudyError, match="Nothing of cysts is painted"):
        compare(features, labels, swapped, TUMOUR, (), {"cysts": (9,)})


# --- in a window ------------------------------------------------------------------------------------------------


def ok(dialog: RegionDialog):
    return dialog.buttons.button(QDialogButtonBox.StandardButton.Ok)


def test_regions_are_said_by_the_keyboard_alone(qtbot):
    table = ClassTable()
    qtbot.addWidget(table)
    table.show_classes(TUMOUR, {}, True)
    table.show()
    assert not table.learned.isVisible()
    table.table.setFocus()
    for part in (table.add, table.recolor, table.regions):  # the tabulator leads out of the table
        qtbot.keyClick(table.focusWidget(), Qt.Key.Key_Tab)
        assert table.focusWidget() is part
    qtbot.keyClick(table.regions, Qt.Key.Key_Space)
    dialog = table.dialog
    dialog.activateWindow()
    qtbot.waitUntil(dialog.isActiveWindow, timeout=10_000)
    assert ok(dialog).isEnabled()
    qtbot.keyClick(dialog, Qt.Key.Key_A, Qt.KeyboardModifier.AltModifier)
    qtbot.waitUntil(lambda: "no class" in dialog.message.text(), timeout=5_000)
    assert not ok(dialog).isEnabled()
    editor = dialog.table.findChild(QLineEdit)
    qtbot.waitUntil(editor.hasFocus, timeout=5_000)
    qtbot.keyClicks(editor, "lesion")
    qtbot.keyClick(editor, Qt.Key.Key_Return)
    for _ in range(2):
        qtbot.keyClick(dialog.table, Qt.Key.Key_Right)
        qtbot.keyClick(dialog.table, Qt.Key.Key_Space)
    assert dialog.regions() == {"lesion": (2, 3)}
    assert dialog.message.text() == ""
    with qtbot.waitSignal(table.united, timeout=5_000) as united:
        qtbot.keyClick(ok(dialog), Qt.Key.Key_Return)
    assert united.args == [{"lesion": (2, 3)}]
    assert table.dialog is None
    table.show_classes(TUMOUR, united.args[0], True)
    assert table.learned.isVisible()
    assert "lesion" in table.learned.text()
    assert "Enhancing tumour, Cyst" in table.learned.text()  # which are learned as background, and that is said


def test_brats_is_one_press_where_the_classes_have_its_names(qtbot):
    dialog = RegionDialog(TUMOUR, {"Tumour core": (3,), "cysts": (9,)})
    qtbot.addWidget(dialog)
    dialog.show()
    qtbot.mouseClick(dialog.brats, Qt.MouseButton.LeftButton)
    assert dialog.regions() == {**BRATS, "cysts": (9,)}
    dialog.table.item(0, 0).setText(" CYSTS ")
    assert ok(dialog).isEnabled()
    dialog.table.item(0, 0).setText("tumour core")
    assert "Two regions" in dialog.message.text()
    dialog.table.setCurrentCell(0, 1)
    qtbot.mouseClick(dialog.remove, Qt.MouseButton.LeftButton)
    assert dialog.regions() == BRATS
    other = RegionDialog(TUMOUR[:3], {})
    qtbot.addWidget(other)
    assert not other.brats.isEnabled()
    assert "no enhancing tumour" in other.brats.toolTip()
