"""The Train panel and the jobs strip: a real window, real clicks, real jobs."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from qtpy.QtCore import QMimeData, QPoint, QPointF, Qt, QUrl
from qtpy.QtGui import QDropEvent
from qtpy.QtWidgets import QFileDialog, QInputDialog, QWidget

from conftest import brain, save
from models_for_tests import tiny_encoder, tiny_model
from napari_brainmvp.jobs import JobState, MetricsTable, find_job, jobs_folder, list_jobs
from napari_brainmvp.plugin.curves import CurvePlot, Series
from napari_brainmvp.plugin.templates import read_templates, template_layers
from napari_brainmvp.plugin.widget import BrainMVPWidget

PATIENCE = 180_000


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    root = tmp_path / "studies"
    for seed in range(5):
        for key in ("t1", "flair") if seed else ("t1",):
            save(root / f"sub-{seed}" / f"sub-{seed}_{key}.nii.gz", brain(seed=seed))
    return root


@pytest.fixture
def open_widget(make_napari_viewer, home, qtbot):
    """Open windows; jobs that still run at the end are killed."""
    opened = []

    def start() -> BrainMVPWidget:
        widget = BrainMVPWidget(make_napari_viewer())
        qtbot.addWidget(widget)
        widget.resize(400, 800)
        widget.show()
        widget.tabs.setCurrentWidget(widget.train_tab)
        opened.append(widget)
        return widget

    yield start
    for widget in opened:
        for panel in widget._panels:
            panel.abandon()
    for job in list_jobs():
        if job.state.active and job.beat is not None:
            os.kill(job.beat.pid, signal.SIGKILL)


def click(qtbot, button) -> None:
    assert button.isVisible()
    assert button.isEnabled()
    qtbot.mouseClick(button, Qt.MouseButton.LeftButton)


def choose(widget, qtbot, *paths) -> None:
    form = widget.train.form
    with qtbot.waitSignal(form.surveyed, timeout=20_000):
        form.sources.add_sources([str(path) for path in paths])


def start_run(widget, qtbot, studies, name: str, steps: int) -> None:
    form = widget.train.form
    choose(widget, qtbot, studies)
    form.size.setCurrentIndex(form.size.findData(0))
    for box, value in {form.steps: steps, form.crop: 16, form.batch: 2}.items():
        box.setValue(value)
    form.device.setCurrentText("cpu")
    form.name.setText(name)
    click(qtbot, form.button)


def test_what_was_found_is_said_before_anything_starts(open_widget, studies, qtbot, tmp_path):
    widget = open_widget()
    form = widget.train.form
    assert not form.button.isEnabled()
    assert "Add folders" in form.summary.text()
    assert not widget.study.isVisible()  # training needs no open study
    (studies / "sub-9").mkdir()
    (studies / "sub-9" / "sub-9_t1.nii.gz").touch()
    save(studies / "sub-8" / "scan.nii.gz", brain())
    choose(widget, qtbot, studies, "synthetic:3", tmp_path / "nowhere")
    assert form.summary.text() == "5 studies and 3 synthetic studies of two to eight modalities."
    assert form.matrix.keys == ("t1", "flair")
    assert (form.matrix.count("t1"), form.matrix.count("flair")) == (5, 4)
    assert form.problems.isVisible()
    for said in ("sub-9: sub-9_t1.nii.gz is missing or empty", "sub-8: no modality", "nowhere"):
        assert said in form.problem_list.text()
    qtbot.waitUntil(lambda: "an estimate" in form.cost.text(), timeout=60_000)
    before = form.cost.text()
    form.recipe.setCurrentIndex(form.recipe.findData("default"))
    assert form.crop.value() == 96
    assert form.cost.text() != before
    assert form.button.isEnabled()
    form.grab()


def test_five_tabs_fit(open_widget, qtbot):
    widget = open_widget()
    for number, title in enumerate(("Segment", "Annotate", "Reconstruct", "Classify", "Train")):
        if title not in [widget.tabs.tabText(k) for k in range(widget.tabs.count())]:
            widget.tabs.insertTab(number, QWidget(), title)
    widget.resize(380, 800)
    qtbot.wait(50)
    bar = widget.tabs.tabBar()
    assert widget.width() <= 380
    assert bar.tabRect(bar.count() - 1).right() <= bar.width()
    for number in range(bar.count()):
        assert bar.tabRect(number).width() >= bar.fontMetrics().horizontalAdvance(bar.tabText(number))


def test_folders_can_be_dropped(open_widget, studies, qtbot):
    sources = open_widget().train.form.sources
    data = QMimeData()
    data.setUrls([QUrl.fromLocalFile(str(studies))])
    action, button, key = Qt.DropAction.CopyAction, Qt.MouseButton.LeftButton, Qt.KeyboardModifier.NoModifier
    sources.dropEvent(QDropEvent(QPointF(5, 5), action, data, button, key))
    assert [source.path for source in sources.sources()] == [str(studies)]
    qtbot.keyClick(sources, Qt.Key.Key_Delete)
    assert sources.sources() == ()


def test_datasets_have_weights_and_lists_a_base_folder(open_widget, studies, qtbot, tmp_path, monkeypatch):
    form = open_widget().train.form
    listed = tmp_path / "lists" / "one.json"
    listed.parent.mkdir()
    listed.write_text(json.dumps({"training": [{"image": ["sub-0/sub-0_t1.nii.gz"]}]}))
    choose(form.window(), qtbot, studies, listed)
    assert form.summary.text() == "5 studies."
    assert "sub-0" in form.problem_list.text()
    monkeypatch.setattr(QFileDialog, "getExistingDirectory", lambda *_: str(studies))
    monkeypatch.setattr(QInputDialog, "getDouble", lambda *_: (2.5, True))
    form.sources.menu.aboutToShow.emit()  # nothing is chosen: the last line is meant
    assert form.sources.base.isEnabled()
    with qtbot.waitSignal(form.surveyed, timeout=20_000):
        form.sources.base.trigger()
    assert form.summary.text() == "6 studies."
    form.sources.setCurrentRow(0)
    form.sources.menu.aboutToShow.emit()
    assert not form.sources.base.isEnabled()
    with qtbot.waitSignal(form.surveyed, timeout=20_000):
        form.sources.weight.trigger()
    assert form.sources.item(0).text() == f"2.5 × {studies}"
    assert [(s.path, s.weight, s.base) for s in form.spec().data] == [
        (str(studies), 2.5, None),
        (str(listed), 1.0, str(studies)),
    ]


def test_a_run_goes_on_without_its_window_and_another_finds_it(open_widget, studies, qtbot, home):
    first = open_widget()
    start_run(first, qtbot, studies, "mine", 4000)
    qtbot.waitUntil(lambda: bool(first.train.view.losses.series), timeout=PATIENCE)
    line = first.jobs.lines["mine"]
    assert line.stop.isVisible()
    assert not line.resume.isVisible()
    first.close()
    for panel in first._panels:
        panel.abandon()
    assert find_job("mine").state is JobState.running

    second = open_widget()
    view = second.train.view
    qtbot.waitUntil(lambda: view.isVisible() and bool(view.losses.series), timeout=20_000)
    assert [s.title for s in view.losses.series][:2] == ["from template", "from other modality"]
    assert not second.train.form.isVisible()
    seen = len(view.losses.series[0].steps)
    qtbot.waitUntil(lambda: len(view.losses.series[0].steps) > seen, timeout=20_000)
    click(qtbot, view.stop)
    qtbot.waitUntil(lambda: "stopped" in view.state.text(), timeout=PATIENCE)
    assert "Resume" in view.text.text()
    click(qtbot, view.templates)
    qtbot.waitUntil(lambda: view.templates.isEnabled(), timeout=60_000)
    layers = second.train._viewer.layers
    assert [layer.name for layer in layers] == ["Template T1", "Template FLAIR"]
    assert np.ptp(layers[0].data) > 0
    second.train.templates.menu().aboutToShow.emit()
    action = next(a for a in second.train.templates.menu().actions() if a.text() == "Tiny random model")
    action.trigger()
    qtbot.waitUntil(lambda: len(layers) == 6, timeout=60_000)

    click(qtbot, second.jobs.lines["mine"].resume)
    qtbot.waitUntil(lambda: find_job("mine").state is JobState.running, timeout=PATIENCE)
    os.kill(find_job("mine").beat.pid, signal.SIGKILL)
    qtbot.waitUntil(lambda: "failed" in view.state.text(), timeout=20_000)
    assert "ended without a word" in view.text.text()
    assert view.resume.isEnabled()
    click(qtbot, second.jobs.lines["mine"].dismiss)
    assert "mine" not in second.jobs.lines
    assert jobs_folder().joinpath("mine").exists()
    click(qtbot, second.train.back)
    assert second.train.form.isVisible()
    second.train.earlier.menu().actions()[0].trigger()
    assert view.isVisible()


def test_a_finished_job_renews_the_models_and_keeps_its_curves(open_widget, studies, qtbot, home):
    widget = open_widget()
    save(studies / "sub-7" / "sub-7_t1.nii.gz", brain(seed=7))
    broken = studies / "sub-7" / "sub-7_t1.nii.gz"
    broken.write_bytes(broken.read_bytes()[:900])
    start_run(widget, qtbot, studies, "quick", 20)
    tiny_model(home / "models", "fresh", title="Fresh")
    assert widget.segment.model.findText("Fresh") < 0
    with qtbot.waitSignal(widget.jobs.finished, timeout=PATIENCE) as told:
        pass
    assert told.args[0].model == "quick"
    assert widget.segment.model.findText("Fresh") >= 0
    view = widget.train.view
    assert "done" in view.state.text()
    assert "quick is in the list of models.\n1 study was left out: sub-7." in view.text.text()
    assert len(view.losses.series[0].steps) == 20
    assert view.pictures.isVisible()
    assert view.pictures.sheet.labels == ("T1", "FLAIR")
    widget.tabs.setCurrentIndex(0)
    click(qtbot, widget.train.back) if widget.train.back.isVisible() else widget.train.show_form()
    form = widget.train.form
    assert form.init.findData("brain-encoder") > 0
    form.init.setCurrentIndex(form.init.findData("quick"))
    assert form.spec().init == "quick"
    form.recipe.setCurrentIndex(form.recipe.findData("paper"))  # another network: only random weights are left
    assert (form.init.count(), form.spec().init) == (1, "")
    qtbot.mouseClick(widget.jobs.lines["quick"], Qt.MouseButton.LeftButton, pos=QPoint(60, 10))
    assert widget.tabs.currentWidget() is widget.train_tab
    assert view.isVisible()


@pytest.mark.parametrize(("frame", "width"), [("box", 152.0), ("centred", 240.0)])
def test_templates_are_shown_in_the_size_they_have(home, frame, width):
    tiny = tiny_encoder(home / "models", template_frame=frame)
    templates = read_templates(tiny)
    assert templates.frame == frame
    assert templates.volumes.shape == (5, 6, 7, 6)
    wide = templates._replace(volumes=np.random.default_rng(0).random((5, 240, 24, 15)).astype(np.float32))
    _, options, _ = template_layers(wide)[0]
    lengths = np.linalg.norm(np.asarray(options["affine"])[:3, :3], axis=0)
    np.testing.assert_allclose(lengths, width / 240)


def test_a_damaged_job_can_be_removed_in_the_strip(open_widget, qtbot, home):
    folder = jobs_folder() / "broken"
    folder.mkdir(parents=True)
    (folder / "spec.json").write_text("{")
    widget = open_widget()
    widget.jobs.poll()
    line = widget.jobs.lines["broken"]
    assert not line.resume.isVisible()
    qtbot.mouseClick(line, Qt.MouseButton.LeftButton, pos=QPoint(60, 10))
    assert "damaged" in widget.train.view.text.text()
    qtbot.waitUntil(line.remove.isVisible)
    click(qtbot, line.remove)
    assert not folder.exists()
    assert widget.jobs.lines == {}
    assert widget.train.form.isVisible()


def test_looking_at_many_jobs_is_quick(open_widget, home):
    broken = jobs_folder() / "job-0"
    broken.mkdir(parents=True)
    (broken / "spec.json").write_text("{}")
    for number in range(1, 50):
        shutil.copytree(broken, jobs_folder() / f"job-{number}")
    widget = open_widget()
    widget.jobs.poll()
    began = time.perf_counter()
    widget.jobs.poll()
    assert time.perf_counter() - began < 0.2


def test_a_growing_table_is_read_a_little_at_a_time(tmp_path):
    path = tmp_path / "metrics.csv"
    table = MetricsTable(path)
    assert not table.update()
    path.write_text("step,loss\n1,0.5\n2,0.")
    assert table.update()
    assert (table.steps, table.columns) == ([1], {"loss": [0.5]})
    with path.open("a") as file:
        file.write("25\n3,nonsense\n4,1,2\n")
    assert table.update()
    assert table.steps == [1, 2, 3]
    assert table.columns["loss"][1] == 0.25
    assert np.isnan(table.columns["loss"][2])
    assert not table.update()
    (tmp_path / "anew.csv").write_text("step,loss\n1,0.5\n")
    (tmp_path / "anew.csv").replace(path)
    assert table.update()
    assert table.steps == [1]


@pytest.mark.parametrize(
    "values", [[], [1.0], [np.nan], [0.0, 0.0], [-1.0, 2.0], [1e-8, 1e8], [np.inf, 1.0], list(np.linspace(1, 2, 9999))]
)
def test_curves_of_all_sorts_can_be_drawn(qtbot, values):
    plot = CurvePlot("nothing")
    qtbot.addWidget(plot)
    plot.resize(360, 170)
    plot.show()
    plot.show_series((Series("a", np.arange(len(values), dtype=float) + 1, np.array(values, float)),))
    empty = not np.isfinite(values).any()
    assert (plot.series == ()) is empty
    qtbot.mouseMove(plot, QPoint(200, 80))
    before = plot.grab().toImage()
    plot.show_series(())
    assert empty or plot.grab().toImage() != before
