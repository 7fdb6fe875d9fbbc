"""The Fine-tune row of the Annotate panel: real clicks, real datasets, real jobs."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from qtpy.QtCore import Qt

from annotation_for_tests import lesion_study, strokes
from napari_brainmvp.annotation.project import AnnotationProject
from napari_brainmvp.inference import classify
from napari_brainmvp.io import read_study
from napari_brainmvp.jobs import jobs_folder, list_jobs
from napari_brainmvp.models import find_model
from napari_brainmvp.plugin.finetune_row import FinetuneRow
from napari_brainmvp.plugin.machine_timer import MachineTimer
from napari_brainmvp.training.finetuning import FinetuneSpec, finetune, spec
from napari_brainmvp.training.finetuning.cost import estimate_seconds

QUICK = {"max_steps": 2, "crop": 32, "size": (32, 32, 32), "init": "tiny", "accelerator": "cpu", "precision": "32-true"}


@pytest.fixture
def project(tmp_path):
    """Four studies, two of each class; the first is painted on."""
    made = AnnotationProject.create(tmp_path / "project")
    for seed in range(4):
        made.add_study(lesion_study(tmp_path, f"case-{seed}", seed))
    made.labels("case-0").record(strokes())
    made.set_groups({f"case-{seed}": ("glioma", "control")[seed % 2] for seed in range(4)})
    yield made
    made.close()


@pytest.fixture
def row(project, home, qtbot, monkeypatch):
    monkeypatch.setitem(spec.PRESETS, "minutes", QUICK)
    made = FinetuneRow()
    qtbot.addWidget(made)
    made.show()
    made.set_project(project, None)
    yield made
    made.abandon()
    for job in list_jobs():
        if job.state.active and job.beat is not None:
            os.kill(job.beat.pid, signal.SIGKILL)


def submit(row: FinetuneRow, qtbot, task: str = "segmentation") -> FinetuneSpec:
    """Click the button; return what the job was asked for."""
    row.task.setCurrentIndex(row.task.findData(task))
    before = {job.name for job in list_jobs()}
    with qtbot.waitSignal(row.submitted, timeout=60_000):
        qtbot.mouseClick(row.button, Qt.MouseButton.LeftButton)
    (job,) = (job for job in list_jobs() if job.name not in before)
    content = json.loads((jobs_folder() / job.name / "spec.json").read_text())
    return FinetuneSpec(**content["settings"])


def test_a_classification_model_grows_from_the_classes_of_the_studies(row, project, qtbot, tmp_path):
    asked = submit(row, qtbot, "classification")
    assert (asked.task, asked.folds) == ("classification", 0)
    data = Path(asked.data[0].path)
    assert (data.parent, data.name) == (project.folder / "datasets", "project-classes-1")
    made = finetune(asked, tmp_path / "run", cache=tmp_path / "cache")
    card = find_model(made).card
    assert (card.task, card.classes) == ("classification", ("control", "glioma"))
    assert card.training["cases"] == {"control": 2, "glioma": 2}
    assert sum(classify(read_study(tmp_path / "case-3"), made).probabilities.values()) == pytest.approx(1, abs=1e-3)
    qtbot.waitUntil(lambda: [job.state for job in list_jobs()] == ["done"], timeout=180_000)
    assert find_model("project-classes-1").card.classes == card.classes
    shutil.rmtree(jobs_folder() / "project-classes-1")
    shutil.rmtree(find_model("project-classes-1").folder)
    again = submit(row, qtbot, "classification")  # the name is free again, and its dataset still there
    assert Path(again.data[0].path).name == "project-classes-1-2"


def test_an_export_that_fails_can_be_tried_again(row, project, qtbot, monkeypatch):
    monkeypatch.setattr("napari.utils.notifications.notification_manager.dispatch", lambda _: None)
    project.labels("case-0").record(np.where(strokes() == 1, 1, 0))
    for _ in range(2):
        qtbot.mouseClick(row.button, Qt.MouseButton.LeftButton)
        qtbot.waitUntil(lambda: "Only background" in row.status.text(), timeout=30_000)
        assert row.button.isEnabled()
        row.status.clear()
    assert list_jobs() == []
    project.labels("case-0").record(strokes())
    assert [Path(source.path).name for source in submit(row, qtbot).data] == ["project-1"]


def test_studies_that_cannot_be_read_are_named_and_the_rest_is_trained_on(row, project, qtbot, tmp_path):
    project.labels("case-1").record(strokes())
    shutil.rmtree(tmp_path / "case-1")
    asked = submit(row, qtbot)
    assert (asked.task, asked.folds) == ("segmentation", 0)
    assert [p.name for p in Path(asked.data[0].path).iterdir() if p.is_dir()] == ["case-0"]
    assert "case-1" in row.status.text()
    scan = Path("case-0") / "case-0_t1.nii.gz"
    assert (Path(asked.data[0].path) / scan).samefile(tmp_path / scan)


def test_few_studies_are_measured_by_cross_validation_where_one_asks_for_it(row, project, qtbot, tmp_path, monkeypatch):
    monkeypatch.setattr(MachineTimer, "pace", 1e-5)
    assert not row.cross.isVisible()  # one study with strokes
    for name in ("case-1", "case-2"):
        project.labels(name).record(strokes())
    row.set_project(project, None)
    assert row.cross.isVisible()
    assert not row.cross.isChecked()
    assert "about 4 times as long" in row.cross.toolTip()
    row.preset.setCurrentIndex(1)
    once = row.preset.currentText()
    row.cross.setFocus()
    qtbot.keyClick(row.cross, Qt.Key.Key_Space)
    assert row.cross.isChecked()
    assert row.preset.currentText() != once
    row.preset.setCurrentIndex(0)
    asked = submit(row, qtbot)
    assert asked.folds == 3
    small = asked.model_copy(update={"crop": 16})
    card = find_model(finetune(small, tmp_path / "run", cache=tmp_path / "cache")).card
    assert {(m.data, m.n) for m in card.metrics} == {("3-fold cross-validation", 3)}
    shutil.rmtree(tmp_path / "case-2")
    assert submit(row, qtbot).folds == 2  # one of three cannot be read
    project.set_groups({"case-3": ""})
    row.task.setCurrentIndex(1)
    assert not row.cross.isVisible()  # a linear probe is measured so anyway
    row.preset.setCurrentIndex(row.preset.findData("paper"))
    assert row.cross.isVisible()
    assert "of the 3 studies" in row.cross.toolTip()


def test_the_time_is_of_this_machine(row, qtbot):
    def said() -> list[str]:
        return [row.preset.itemText(k) for k in range(row.preset.count())]

    row.task.setCurrentIndex(1)
    qtbot.waitUntil(lambda: all("about" in text for text in said()), timeout=120_000)
    assert said()[1] == "hour  –  about 20 s"  # a linear probe, for so few studies
    row.task.setCurrentIndex(0)
    assert said()[1].startswith("hour  –  about ")
    assert said()[1] != "hour  –  about 20 s"


def test_the_estimate_is_what_was_measured():
    """On two cores with AVX2, whose pace is 1.06e-5 seconds a voxel, ``minutes`` took 8 minutes."""
    asked = spec.read_spec("minutes", {})
    assert estimate_seconds(asked, 3, 1.06e-5) / 60 == pytest.approx(8, rel=0.1)
    assert estimate_seconds(spec.read_spec("paper", {}), 12, 1e-5) > 2 * estimate_seconds(asked, 12, 1e-5)


@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_the_estimate_counts_the_folds(task):
    def trained(preset: str, studies: int, **changes) -> float:
        asked = spec.read_spec(preset, {"task": task, **changes})
        return estimate_seconds(asked, studies, 1e-5) - estimate_seconds(asked, studies, 0)

    hour = {"probe_up_to": 0}  # steps as they are, however many studies there are
    assert trained("hour", 4, folds=3, **hour) == pytest.approx(4 * trained("hour", 4, **hour))
    assert trained("hour", 2, folds=3, **hour) == pytest.approx(3 * trained("hour", 2, **hour))
    # steps by the number of studies: each of three folds has two thirds of them
    assert trained("paper", 12, folds=3) == pytest.approx(3 * trained("paper", 12))
