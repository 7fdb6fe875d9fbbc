"""Annotation without a window: the probe, the project folder, and what survives a killed process."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import nrrd
import numpy as np
import pytest
import torch

from annotation_for_tests import SHAPE, lesion_study, strokes, truth
from conftest import brain, full_disk, ordinary_user, save
from models_for_tests import tiny_card, tiny_model
from napari_brainmvp.annotation import lock, prediction
from napari_brainmvp.annotation.brushes import grow, interpolate_slices, take_over
from napari_brainmvp.annotation.comparison import check_unseen, compare, newest_model
from napari_brainmvp.annotation.content import LabelClass, classes_of, default_classes
from napari_brainmvp.annotation.export import export_dataset
from napari_brainmvp.annotation.features import CLASS, _Columns, compute_features
from napari_brainmvp.annotation.history import LabelHistory
from napari_brainmvp.annotation.labelled import Lesson
from napari_brainmvp.annotation.model_classes import as_classes, known_classes
from napari_brainmvp.annotation.participants import export_participants, import_participants, mixed_subjects
from napari_brainmvp.annotation.placement import Placement
from napari_brainmvp.annotation.prediction import LabelledVoxels, StudyPredictor, labelled_voxels, uncertain_slice
from napari_brainmvp.annotation.probe import Probe, ProbeSpec
from napari_brainmvp.annotation.project import AnnotationProject
from napari_brainmvp.annotation.ranking import (
    StudySummary,
    fit_probe,
    rank_project,
    rank_studies,
    sample_voxels,
    summarise,
)
from napari_brainmvp.annotation.store import FeatureStore
from napari_brainmvp.annotation.surroundings import measure_with_scipy, measure_with_torch
from napari_brainmvp.errors import BrainMVPError, Cancelled, FileError, LockedError, StudyError
from napari_brainmvp.io import class_of, find_studies, read_label_map, read_participants, read_study, write_image
from napari_brainmvp.models import Label, find_model, load_model, name_digest
from napari_brainmvp.preparation import prepare
from napari_brainmvp.preparation.resampling import network_grid
from napari_brainmvp.progress import CancelToken
from napari_brainmvp.study import Grid, LabelMap
from napari_brainmvp.threads import use_threads
from napari_brainmvp.training.finetuning import FinetuneSpec
from napari_brainmvp.training.labels import assign_classes, read_labels
from napari_brainmvp.training.sources import DataSource

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def model():
    return load_model(find_model())


@pytest.fixture(scope="module")
def features(model):
    return compute_features(lesion_study(), model)


def overlap(found: np.ndarray, true: np.ndarray) -> float:
    return 2 * (found & true).sum() / (found.sum() + true.sum())


def test_two_strokes_find_the_lesion_in_the_volume(features):
    predictor = StudyPredictor(features, background=1)
    predictor.fit(strokes())
    volume = predictor.predict_volume()
    assert volume.labels.shape == SHAPE
    assert set(np.unique(volume.labels)) == {1, 2}
    assert overlap(volume.labels == 2, truth() == 2) > 0.55  # 13 mm across: smoothing takes some of its rim
    assert (volume.labels == 2)[strokes() == 2].all()
    assert volume.uncertainty.max() <= 1
    for axis in range(3):
        labels, doubt = predictor.predict_slice(axis, 17)
        assert (labels == volume.labels.take(17, axis)).mean() > 0.995  # of layers further off, it asks fewer voxels
        assert np.abs(doubt - volume.uncertainty.take(17, axis)).mean() < 0.02


@pytest.mark.parametrize(
    ("affine", "shape"),
    [
        (np.diag([1.0, 1.0, 1.0, 1.0]), (9, 12, 15)),
        (
            np.array([[0, 0, -1.0, 30], [-1, 0, 0, 9], [0, 1, 0, -4], [0, 0, 0, 1]]),
            (15, 13, 8),
        ),  # axes in another order
        (np.diag([-0.5, 0.5, 4.0, 1.0]), (20, 24, 4)),
    ],
)
def test_what_some_voxels_say_reaches_all_where_it_belongs(affine, shape):
    source = Grid(shape, affine)
    grid = network_grid(source, 1.0)
    rows = np.arange(np.prod(grid.shape), dtype=np.int32).reshape(grid.shape)
    rows[:2, 0] = -1
    placement = Placement(rows, grid, source)
    assert len(placement.rows) < 0.4 * rows.size
    where = np.argwhere(rows >= 0) @ grid.affine[:3, :3].T + grid.affine[:3, 3]
    share = torch.zeros(rows.size)
    share[rows[rows >= 0]] = torch.from_numpy(np.clip(where[:, 2] / 40 + 0.5, 0, 1)).float()
    asked = torch.stack([1 - share, share], 1)[placement.rows.long()]
    part = placement.part(2.0)
    two = np.array([0, 1], np.int32)
    best, uncertainty = placement.spread(asked, two, part)
    centres = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1) @ affine[:3, :3].T + affine[:3, 3]
    height = centres[..., 2][part.voxels]
    clear = np.abs(height) > 2
    np.testing.assert_array_equal(best.numpy()[clear], (height > 0)[clear])
    for axis in range(3):
        plane = placement.part(2.0, (axis, shape[axis] // 2))
        some = asked if plane.asked is None else asked[plane.asked]
        layer, doubt = placement.spread(some, two, plane)
        at = [slice(None)] * 3
        at[axis] = slice(shape[axis] // 2 - part.voxels[axis].start, shape[axis] // 2 - part.voxels[axis].start + 1)
        assert np.abs(doubt.float() - uncertainty[tuple(at)].float()).max() < 0.1
        assert (layer == best[tuple(at)]).float().mean() > 0.9


def test_a_speckle_is_outvoted_but_not_what_is_painted():
    shape = (12, 12, 12)
    rows = np.arange(12**3, dtype=np.int32).reshape(shape)
    grid = Grid(shape, np.eye(4))
    placement = Placement(rows, grid, grid)
    part, two = placement.part(2.0), np.array([0, 1], np.int32)

    def ball(low: int, high: int) -> tuple[np.ndarray, torch.Tensor]:
        lesion = np.zeros(shape)
        lesion[low:high, low:high, low:high] = 1
        share = torch.from_numpy(lesion.ravel()).float()[placement.rows.long()]
        return lesion > 0, torch.stack([1 - share, share], 1)

    lesion, asked = ball(5, 7)
    assert not placement.spread(asked, two, part)[0].any()
    painted = placement.votes(rows[lesion], np.ones(8, np.int64), 10.0)
    assert placement.spread(asked, two, part, painted)[0].numpy()[lesion].all()
    assert placement.spread(asked, two, placement.part(1.0))[1].max() > 0.4  # with less of it there is doubt
    _, asked = ball(4, 8)  # whole cells, which only the Gaussian takes
    assert not placement.spread(asked, two, part)[0].any()
    assert placement.spread(asked, two, placement.part(1.0))[0].numpy()[5:7, 5:7, 5:7].all()


def test_every_voxel_of_the_head_is_heard_however_thin_it_is():
    rows = np.full((6, 6, 6), -1, np.int32)
    rows[1, 2:5, 2] = np.arange(3)  # not one of them is on the lattice
    grid = Grid(rows.shape, np.eye(4))
    placement = Placement(rows, grid, grid)
    asked = torch.tensor([[0.1, 0.9]]).expand(len(placement.rows), 2)
    best, _ = placement.spread(asked, np.array([0, 1], np.int32), placement.part(1.0))
    assert best.numpy()[1, 2:5, 2].all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_gpu_predicts_what_the_processor_does(features):
    found = []
    for device in ("cpu", "cuda"):
        predictor = StudyPredictor(features, background=1, device=device)
        predictor.fit(strokes())
        volume = predictor.predict_volume()
        labels, _ = predictor.predict_slice(2, 17)
        assert (labels == volume.labels[..., 17]).mean() > 0.995
        found.append(volume)
    assert (found[0].labels == found[1].labels).mean() > 0.999
    np.testing.assert_allclose(found[0].uncertainty, found[1].uncertainty, atol=0.02)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_gpu_computes_the_features_that_the_processor_does(model):
    here, there = (compute_features(lesion_study(), model, device=device) for device in ("cpu", "cuda"))
    assert (here.names, there.values.device.type) == (there.names, "cpu")
    np.testing.assert_array_equal(here.rows, there.rows)
    a, b = here.values.float(), there.values.float()
    scans = [k for k, name in enumerate(here.names) if not name.startswith(("network", CLASS))]
    torch.testing.assert_close(a[:, scans], b[:, scans], rtol=0.01, atol=0.01)
    assert (a - b).abs().mean(0).max() < 0.1  # the network's maps, in half precision
    assert next(model.network.parameters()).device.type == "cpu"


@pytest.mark.parametrize(("shape", "spacing"), [((23, 40, 31), 1.0), ((3, 20, 17), 1.2), ((20, 17, 1), 1.0)])
def test_torch_describes_a_scan_as_scipy_does(shape, spacing):
    """Also where a Gaussian is longer than the volume, and is mirrored at both of its ends."""
    image = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 3
    torch.testing.assert_close(
        measure_with_torch(image, spacing), measure_with_scipy(image, spacing), atol=1e-5, rtol=0
    )


def test_the_columns_that_a_gpu_would_compute_are_those_of_the_processor(model, features):
    """By the same functions, on the processor."""
    prepared = prepare(lesion_study(), ("t1", "flair"), model.card.preparation)
    columns = _Columns(prepared.foreground)
    for image in prepared.images:
        means, spread, steep = measure_with_torch(image, prepared.grid.spacing[0])
        for volume in (image, *means, spread, *steep):
            columns.add("", volume)
    here = [k for k, name in enumerate(features.names) if name.startswith(("t1 ", "flair "))]
    torch.testing.assert_close(columns.stacked(), features.values[:, here], rtol=0.01, atol=1e-3)


def test_without_the_memory_of_a_gpu_the_processor_goes_on(model, features):
    class FullOnce(CancelToken):
        full = False

        def raise_if_cancelled(self) -> None:
            if not self.full:
                self.full = True
                raise torch.OutOfMemoryError

    token = FullOnce()
    found = compute_features(lesion_study(), model, cancel=token)
    assert token.full
    assert torch.equal(found.values, features.values)
    predictor = StudyPredictor(found, background=1)
    predictor.fit(strokes())
    volume = predictor.predict_volume(FullOnce())
    np.testing.assert_array_equal(volume.labels, predictor.predict_volume().labels)


def test_a_predictor_that_was_woken_up_knows_nothing(features):
    predictors = [StudyPredictor(features, background=1) for _ in range(2)]
    predictors[0]._wake()
    assert not predictors[0].ready
    for predictor in predictors:
        predictor.fit(strokes(), steps=5)
    np.testing.assert_array_equal(*(predictor.predict_volume().uncertainty for predictor in predictors))


def test_the_network_is_believed_where_nothing_is_labelled_and_the_hand_where_it_differs():
    """Voxels of one class to the network and of two to the eye: one stroke on each, then one that corrects."""
    rng = np.random.default_rng(0)
    count, lesion = 4000, 400
    says = np.full((count, 3), 0.01, np.float32)
    says[:lesion, 2] = says[lesion:, 0] = 0.98
    features = rng.standard_normal((count, 12)).astype(np.float32)  # tell nothing, but for the last
    features[: lesion // 2, -1] += 6
    values = torch.from_numpy(np.concatenate([features, np.log(says)], 1)).bfloat16()
    names = [*map(str, range(12)), *(f"{CLASS}{k}" for k in range(3))]
    first = np.r_[lesion // 2 : lesion // 2 + 30, lesion : lesion + 30]
    labels = np.where(first < lesion, 7, 1)

    def errors(probe: Probe) -> float:
        found = np.array(probe.classes)[probe.predict(values).argmax(1).numpy()]
        return float((found != np.where(np.arange(count) < lesion, 7, 1)).mean())

    trusting, alone = (Probe(names, 1, ProbeSpec(trust=t)) for t in (1.5, 0.0))
    for probe in (trusting, alone):
        probe.fit(Lesson(values[first], labels, 4), unlabelled=values[::2])
    assert errors(trusting) < 0.01 < 0.1 < errors(alone)  # 60 voxels of noise teach nothing, the network knows
    says = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0]])  # background (1), background, lesion (7)
    assert trusting._agreement(says, torch.tensor([0, 0, 1])) == 1
    assert trusting._agreement(says, torch.tensor([0, 1, 1])) == 0.5
    assert trusting._agreement(says, torch.tensor([1, 1, 0])) == 0  # wrong throughout: it is not believed at all
    second = np.r_[first, : lesion // 4]
    labels = np.r_[labels, np.full(lesion // 4, 1)]  # but this part of what it sees is background
    trusting.fit(Lesson(values[second], labels, 20), unlabelled=values[::2])
    found = np.array(trusting.classes)[trusting.predict(values).argmax(1).numpy()]
    assert (found[: lesion // 2] == 1).mean() > 0.9
    assert (found[lesion // 2 : lesion] == 7).mean() > 0.8


def test_where_the_networks_classes_are_known_it_needs_no_stroke_and_one_corrects_it():
    rng = np.random.default_rng(0)
    says = np.full((3000, 3), 0.05, np.float32)
    says[:300, 2] = says[300:, 0] = 0.9
    features = rng.standard_normal((3000, 12)).astype(np.float32)
    features[150:300, -1] += 6
    values = torch.from_numpy(np.concatenate([features, np.log(says)], 1)).bfloat16()
    names = [*map(str, range(12)), *(f"{CLASS}{k}" for k in range(3))]
    probe = Probe(names, 1, known=(1, 1, 7))

    def found() -> np.ndarray:
        return np.array(probe.classes)[probe.predict(values).argmax(1).numpy()]

    probe.fit(Lesson(values[:0], np.zeros(0, np.int64)), unlabelled=values[::2])
    assert probe.classes == (1, 7)
    np.testing.assert_array_equal(found(), np.where(np.arange(3000) < 300, 7, 1))
    probe.fit(Lesson(values[150:225], np.full(75, 1), 10), unlabelled=values[::2])  # background, and nothing else
    assert (found()[150:300] == 1).mean() > 0.9
    assert (found()[:150] == 7).mean() > 0.9
    probe.fit(Lesson(values[[*range(150, 225), *range(900, 950)]], np.repeat([1, 4], [75, 50]), 12))  # it knows no 4
    assert probe.classes == (1, 4, 7)


def test_the_values_of_a_networks_classes_go_by_names_and_regions():
    classes = tuple(
        LabelClass(value=v, name=n, color="#112233", background=v == 5)
        for v, n in ((5, "Rest"), (6, "grey matter"), (9, "CSF"), (7, "Mine"))
    )
    assert known_classes(tiny_card(), classes) == (5, 9, 6, 5)  # white matter is no class of the project
    spec = tiny_card().network
    merged = tiny_card(network=spec.model_copy(update={"parts": ((0,), (1,), (1,), (2,), (3,))}))
    assert known_classes(merged, classes) == (5, 9, 9, 6, 5)
    two = {"activation": "sigmoid", "channels": (1, 2), "labels": tiny_card().labels[:2]}
    inside = spec.model_copy(update={"parts": ((), (0,), (1, 0)), "out_channels": 2})
    regions = {"labels": {1: "CSF", 2: "Grey matter"}, "regions": {"all": (1, 2), "part": (2,)}}
    nested = tiny_card(network=inside, training={"labels": regions}, **two)
    assert known_classes(nested, classes) == (5, 9, 6)
    alone = nested.model_copy(update={"network": spec.model_copy(update={"out_channels": 2})})
    assert known_classes(alone, classes) == ()
    apart = nested.model_copy(update={"network": inside.model_copy(update={"parts": ((), (0,), (1,))})})
    assert known_classes(apart, classes) == (5, 9, 5)
    assert known_classes(apart, classes[:2]) == ()  # nothing of the project's is left to tell apart
    with pytest.raises(StudyError, match="none of the classes"):
        known_classes(tiny_card(), classes[:1])


def test_classes_are_found_whatever_columns_the_first_study_has(model):
    studies = {keys: compute_features(lesion_study(keys=keys), model) for keys in (("t1",), ("t1", "flair", "adc"))}
    labelled = [labelled_voxels(f, strokes()) for f in studies.values()]
    probe, names = fit_probe(labelled, [sample_voxels(f) for f in studies.values()], background=1)
    assert [name.startswith(CLASS) for name in names] == sorted(name.startswith(CLASS) for name in names)
    assert len(set(names)) == len(names)
    made = labelled[1].columns(names)[:, [k for k, name in enumerate(names) if name.startswith(CLASS)]]
    torch.testing.assert_close(made.float().exp().sum(1), torch.ones(len(made)), rtol=0, atol=0.05)
    lesion = probe.predict(labelled[1].columns(names))[:, probe.classes.index(2)]
    assert lesion[labelled[1].labels == 2].mean() > 0.9
    with pytest.raises(ValueError, match="must come last"):
        Probe([f"{CLASS}0", "flair"], 1)
    bare = LabelledVoxels(labelled[0].values[:, :1], labelled[0].labels, names[:1])
    assert bare.columns(names)[:, -1].max() == -8


def test_threads_are_given_back_whoever_leaves_first():
    """Torch gives a new thread as many as any thread set last."""
    before = torch.get_num_threads()
    inside, leave = threading.Event(), threading.Event()

    def stay() -> None:
        torch.set_num_threads(before)
        with use_threads(before + 1):
            inside.set()
            leave.wait(10)

    def new_thread() -> int:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.get_num_threads).result()

    other = threading.Thread(target=stay)
    other.start()
    assert inside.wait(10)
    with pytest.raises(ZeroDivisionError), use_threads(before + 2):
        _ = 1 // (torch.get_num_threads() - before - 2)
    leave.set()
    other.join()
    with use_threads(before + 3):
        with use_threads(before + 2):
            assert torch.get_num_threads() == before + 2
        assert torch.get_num_threads() == before + 3
    assert (torch.get_num_threads(), new_thread()) == (before, before)


def test_cores_are_those_that_the_process_may_use():
    code = (
        "import os; from napari_brainmvp.threads import usable_cores\n"
        "if hasattr(os, 'sched_setaffinity'):\n"
        "    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
        "print(usable_cores())\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(found) == (1 if hasattr(os, "sched_setaffinity") else os.cpu_count())


def test_what_is_painted_here_outweighs_what_was_painted_elsewhere():
    """However much that is: on another scanner the same numbers mean something else."""
    rng = np.random.default_rng(0)
    values = torch.from_numpy(rng.standard_normal((400, 6)).astype(np.float32)).bfloat16()
    here = np.where(values[:, 0].float().numpy() > 0, 7, 1)
    elsewhere = Lesson(values.repeat(20, 1), np.tile(8 - here, 20), places=5000)  # the other way round
    probe = Probe([str(k) for k in range(6)], 1)

    def right() -> float:
        return float((np.array(probe.classes)[probe.predict(values).argmax(1).numpy()] == here).mean())

    probe.fit(Lesson(values[:0], here[:0]), elsewhere=elsewhere)
    assert right() < 0.05  # nobody knows better
    probe.fit(Lesson(values[:100], here[:100], places=40), elsewhere=elsewhere)
    assert right() > 0.8


def test_of_a_study_that_is_painted_all_over_some_voxels_of_each_class_are_learned_from(features, monkeypatch):
    monkeypatch.setattr(prediction, "_LABELLED", 50)
    predictor = StudyPredictor(features, background=1)
    predictor.fit(truth())
    counts = np.bincount(predictor._lesson[0].labels)[1:]
    assert (counts <= 50).all()
    assert (counts > 25).all()
    assert overlap(predictor.predict_volume().labels == 2, truth() == 2) > 0.5


def test_the_fit_goes_on_and_the_volume_can_be_given_up(features):
    whole, two = StudyPredictor(features, background=1), StudyPredictor(features, background=1)
    with pytest.raises(ValueError, match="call fit first"):
        two.refine()
    whole.fit(strokes(), steps=12)
    whole.fit(strokes(), steps=20)
    two.fit(strokes(), steps=12)
    two.refine(20)
    np.testing.assert_array_equal(two.predict_volume().uncertainty, whole.predict_volume().uncertainty)
    cancel = CancelToken()
    cancel.cancel()
    with pytest.raises(Cancelled):
        two.predict_volume(cancel)


def test_a_study_that_is_painted_all_over_is_fitted_to_the_labels_alone(features):
    predictor = StudyPredictor(features, background=1)
    predictor.fit(truth())
    assert overlap(predictor.predict_volume().labels == 2, truth() == 2) > 0.8


def test_classes_are_assigned_to_labels():
    means = np.array([[0.9, 0.05, 0.01, 0.001, 0.039], [0.2, 0.1, 0.5, 0.1, 0.1], [0.1, 0.1, 0.2, 0.5, 0.1]])
    assert assign_classes(means) == [0, 0, 1, 2, 0]
    assert assign_classes(means[:2]) == [0, 0, 1, 1, 0]
    assert assign_classes(means[[0, 0]]) is None  # nothing is commoner there than elsewhere
    assert assign_classes(means[:, :1]) is None  # fewer classes than labels
    assert assign_classes(np.array([[0.0, 0.0], [0.5, 0.5]])) is None  # none would be left for the background


def test_labelled_places_are_counted_by_where_they_lie(features):
    labels = np.zeros(SHAPE, int)
    labels[2:10, 17, 17] = 1  # 8 voxels of 1 mm side by side, across one border of the cubes of 8 mm
    assert labelled_voxels(features, labels).places == 2
    labels[30, 17, 17] = 1
    assert labelled_voxels(features, labels).places == 3


def test_the_same_strokes_give_the_same_prediction(features):
    found = []
    for _ in range(2):
        predictor = StudyPredictor(features, background=1)
        predictor.fit(strokes())
        predictor.fit(strokes(), steps=5)
        found.append(predictor.predict_volume().labels)
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize(
    "affine", [np.array([[0, 0, 1.5, -30], [-0.8, 0, 0, 20], [0, -1, 0, 30], [0, 0, 0, 1.0]]), np.diag([1, 1, 3, 1.0])]
)
def test_other_voxels_and_orders_of_axes(model, affine):
    """The probe works at 1 mm in RAS; labels and predictions stay on the study's own voxels."""
    study = lesion_study(affine=affine)
    predictor = StudyPredictor(compute_features(study, model), background=1)
    predictor.fit(strokes())
    volume = predictor.predict_volume()
    assert volume.labels.shape == SHAPE
    assert overlap(volume.labels == 2, truth() == 2) > 0.6


@pytest.mark.parametrize(("few", "many"), [(-7, 2**40), (3, 5)])
def test_any_integers_can_be_classes(features, few, many):
    labels = np.where(strokes() == 1, few, np.where(strokes() == 2, many, 0))
    predictor = StudyPredictor(features, background=few)
    predictor.fit(labels)
    assert set(np.unique(predictor.predict_volume().labels)) == {few, many}


@pytest.mark.parametrize("labels", [np.zeros(SHAPE, int), np.where(strokes() == 2, 2, 0)])
def test_one_class_or_none_is_said(features, labels):
    with pytest.raises(BrainMVPError, match="at least two classes"):
        StudyPredictor(features).fit(labels)


def test_what_is_painted_is_predicted_though_all_around_says_otherwise(features):
    labels = strokes()
    labels[20, 13, 18] = 2  # in the midst of a stroke of the other class
    predictor = StudyPredictor(features, background=1)
    predictor.fit(labels)
    painted = (labels != 0) & (predictor._rows >= 0)
    np.testing.assert_array_equal(predictor.predict_volume().labels[painted], labels[painted])
    for axis in range(3):
        index = (20, 13, 18)[axis]
        layer, there = labels.take(index, axis), painted.take(index, axis)
        np.testing.assert_array_equal(predictor.predict_slice(axis, index)[0][there], layer[there])


def test_labels_that_cannot_be_fitted_leave_the_prediction_as_it_was(features):
    predictor = StudyPredictor(features, background=1)
    predictor.fit(strokes())
    before = predictor.predict_volume().labels
    with pytest.raises(BrainMVPError):
        predictor.fit(np.where(strokes() == 2, 7, 0))
    np.testing.assert_array_equal(predictor.predict_volume().labels[strokes() == 0], before[strokes() == 0])


def test_labels_of_another_shape_are_refused(features):
    with pytest.raises(StudyError, match="paint on a layer of the study"):
        StudyPredictor(features).fit(np.zeros((3, 4, 5), int))


def test_strokes_of_another_study_with_other_scans_help(model, features):
    other = compute_features(lesion_study(seed=5, keys=("flair", "t1", "adc")), model)
    assert other.names != features.names
    elsewhere = labelled_voxels(other, strokes())
    assert elsewhere.columns(features.names).shape[1] == len(features.names)
    predictor = StudyPredictor(features, background=1)
    predictor.fit(np.zeros(SHAPE, int), (labelled_voxels(features, strokes()), elsewhere))
    assert overlap(predictor.predict_volume().labels == 2, truth() == 2) > 0.5


def test_features_are_computed_once_a_study_and_model(model, tmp_path):
    store, study, seen = FeatureStore(tmp_path), lesion_study(), []
    first = store.get(study, model, seen.append)
    steps = len(seen)
    second = store.get(study, model, seen.append)
    assert steps > 0
    assert len(seen) == steps
    assert torch.equal(first.values, second.values)
    assert first.names == second.names
    assert second.source == study.grid
    kept = next(tmp_path.glob("*.npz"))
    for damaged in (b"damaged", kept.read_bytes()[:-1000]):
        kept.write_bytes(damaged)
        assert torch.equal(store.get(study, model).values, first.values)
    store.get(lesion_study(seed=1), model)
    assert len(list(tmp_path.glob("*.npz"))) == 2


def test_the_store_forgets_what_was_used_longest_ago(model, tmp_path):
    studies = [lesion_study(seed=k) for k in range(3)]
    FeatureStore(tmp_path).get(studies[0], model)
    first = next(tmp_path.glob("*.npz"))
    store = FeatureStore(tmp_path, limit_gb=2.5 * first.stat().st_size / 1e9)
    for study in studies[1:]:
        time.sleep(0.02)
        store.get(study, model)
    assert not first.exists()
    assert len(list(tmp_path.glob("*.npz"))) == 2
    seen = []
    store.get(studies[-1], model, seen.append)
    assert seen == []


def test_computing_features_can_be_cancelled(model, tmp_path):
    token = CancelToken()
    token.cancel()
    with pytest.raises(Cancelled):
        FeatureStore(tmp_path).get(lesion_study(), model, cancel=token)
    assert list(tmp_path.iterdir()) == []


def test_the_uncertain_slice_is_not_one_that_is_painted_all_over(features):
    predictor = StudyPredictor(features, background=1)
    predictor.fit(strokes())
    uncertainty = predictor.predict_volume().uncertainty
    first = uncertain_slice(uncertainty, np.zeros(SHAPE, int), 2)
    sums = uncertainty.astype(float).sum((0, 1))
    assert first == sums.argmax()
    labels = np.zeros(SHAPE, int)
    labels[..., first] = 1
    sums[first] /= 4
    assert uncertain_slice(uncertainty, labels, 2) == sums.argmax()


def test_background_in_the_black_outside_the_head_is_said_to_teach_nothing(features):
    predictor = StudyPredictor(features, background=1)
    labels = np.where(strokes() == 2, 2, 0)
    labels[0, :, 0] = 1
    with pytest.raises(BrainMVPError, match="outside the head"):
        predictor.fit(labels)


def test_a_study_that_undecided_ones_are_like_comes_first():
    def summary(name: str, place: float, undecided: float = 0.1) -> StudySummary:
        return StudySummary(name, undecided, np.array([[place, 0.0]], np.float32))

    done = [summary("done", 0)]
    crowd = [summary("b", 10.2), summary("a", 10), summary("c", 10.4)]
    ranked = [s.name for s in rank_studies([*crowd, summary("like done", 0.1), summary("odd", 25)], done)]
    assert set(ranked[:3]) == {"a", "b", "c"}  # many, and unlike what is done
    assert ranked[-1] == "like done"
    more = [summary("a", 10), summary("b", 40), summary("c", 70, undecided=0.2)]
    assert [s.name for s in rank_studies(more, [*done, summary("near b", 41)])] == ["c", "a", "b"]
    assert [s.name for s in rank_studies(crowd[:1], crowd[:1])] == ["b"]  # nothing is apart from anything
    assert rank_studies(crowd, [])[0].name == "b"
    assert rank_studies([], done) == []


def test_a_summary_tells_how_undecided_a_study_is(features):
    predictor = StudyPredictor(features, background=1)
    predictor.fit(strokes())
    lesion = predictor.probe.predict(features.values)[:, predictor.probe.classes.index(2)].numpy()
    summary = summarise("here", sample_voxels(features).values, predictor.probe)
    assert summary.undecided == pytest.approx(np.mean(lesion - lesion**2), rel=0.1)
    assert 0 < summary.undecided < 0.25


def test_a_projects_unpainted_studies_in_order(model, features, tmp_path):
    project = AnnotationProject.create(tmp_path / "project")
    found = {}
    for name, seed, keys in (("done", 0, ("t1", "flair")), ("alike", 3, ("t1", "flair")), ("less", 4, ("t1",))):
        study = replace(lesion_study(tmp_path, name, seed, keys=keys), labels=None)
        project.add_study(study)
        found[name] = compute_features(study, model)
    with pytest.raises(StudyError, match="No study"):
        rank_project(project, found.__getitem__)
    project.labels("done").record(strokes().astype(np.uint8))
    steps = []
    assert rank_project(project, found.__getitem__, steps.append) == ["less", "alike"]  # without FLAIR it is undecided
    assert len(steps) == 3

    def read(name: str):
        if name == "less":
            raise FileError("moved")
        return found[name]

    assert rank_project(project, read) == ["alike"]
    token = CancelToken()
    token.cancel()
    with pytest.raises(Cancelled):
        rank_project(project, found.__getitem__, cancel=token)
    for name in ("alike", "less"):
        project.labels(name).record(strokes().astype(np.uint8))
    with pytest.raises(StudyError, match="Every study"):
        rank_project(project, found.__getitem__)
    project.close()


def test_probe_and_model_are_judged_on_what_they_did_not_learn(features):
    classes = (
        LabelClass(value=1, name="Background", color="#868d96", background=True),
        LabelClass(value=2, name="Lesion", color="#d1495b"),
    )
    labels = np.zeros(SHAPE, np.int32)
    for k in (SHAPE[2] // 2 - 4, SHAPE[2] // 2, SHAPE[2] // 2 + 4):
        labels[..., k] = truth()[..., k]
    found = np.where(truth() == 2, 7, 0)
    card = tiny_card(labels=(Label(value=7, name="lesion", color="#d1495b"),), channels=(0, 7, 7, 7))
    perfect = as_classes(found, card, classes)
    assert set(np.unique(perfect)) == {1, 2}
    done = compare(features, labels, perfect, classes)
    assert done.slices == 3
    assert done.model == {"Lesion": 1.0}
    assert done.probe["Lesion"] > 0.8
    wrong = labels.copy()
    last = wrong[..., SHAPE[2] // 2 + 4]
    last[last > 0] = 3 - last[last > 0]  # nobody who has not seen this slice can know
    upside_down = np.where(wrong > 0, wrong, 1)
    done = compare(features, wrong, upside_down, classes)
    assert done.model == {"Lesion": 1.0}
    assert done.probe["Lesion"] < 0.5
    assert done.model_is_better
    worse = compare(features, labels, np.ones_like(perfect), classes)
    assert worse.model == {"Lesion": 0.0}
    assert not worse.model_is_better
    labels[..., SHAPE[2] // 2 + 1 :] = 0
    labels[..., : SHAPE[2] // 2] = 0
    for painted in (labels, np.zeros_like(labels), np.where(labels == 1, 1, 0)):
        with pytest.raises(StudyError, match="two slices"):
            compare(features, painted, perfect, classes)
    with pytest.raises(StudyError, match="none of the classes"):
        as_classes(found, card, (classes[0], LabelClass(value=2, name="Cyst", color="#d1495b")))


def test_brushes_never_paint_over_strokes():
    labels = np.zeros((10, 12, 9), np.int32)
    labels[3:7, 3:9, 1] = 2
    labels[4:6, 4:8, 7] = 2
    labels[5, 5, 4] = 3
    assert interpolate_slices(labels, 2, 2) > 0
    assert labels[5, 5, 4] == 3
    assert (labels[..., 4] == 2).sum() > 4
    with pytest.raises(StudyError, match="two slices"):
        interpolate_slices(labels, 7, 2)
    plane, predicted = np.zeros((8, 8), int), np.ones((8, 8), int)
    predicted[2:6, 2:6] = 2
    plane[3, 3], plane[4, 4] = 2, 1
    doubt = np.zeros((8, 8))
    doubt[5] = 0.9
    assert grow(plane, predicted, doubt, 2) == 10
    assert plane[4, 4] == 1
    assert take_over(plane, predicted, (0, 0)) == 48
    assert take_over(plane, predicted) > 0
    with pytest.raises(StudyError, match="stroke of the class"):
        grow(plane, predicted, doubt, 9)


def test_history_undoes_across_sessions(tmp_path):
    history = LabelHistory(tmp_path, SHAPE)
    states = [history.labels.copy()]
    for stroke in range(60):
        labels = history.labels.copy()
        labels[stroke % 40, :5, stroke // 2] = stroke - 30
        history.record(labels)
        states.append(labels)
    assert history.record(history.labels.copy()) == 0
    again = LabelHistory(tmp_path, SHAPE)
    np.testing.assert_array_equal(again.labels, states[-1])
    before = again.stroke
    for _ in range(40):
        assert again.undo()
    third = LabelHistory(tmp_path, SHAPE)
    np.testing.assert_array_equal(third.labels, again.labels)
    for _ in range(40):
        assert third.redo()
    np.testing.assert_array_equal(third.labels, states[-1])
    assert third.stroke == before
    assert not third.redo()
    third.undo()
    third.record(states[3])
    assert not third.can_redo
    np.testing.assert_array_equal(LabelHistory(tmp_path, SHAPE).labels, states[3])


def test_history_is_bounded(tmp_path):
    history = LabelHistory(tmp_path, (4, 4, 4))
    for stroke in range(300):
        labels = history.labels.copy()
        labels.flat[stroke % 64] = stroke + 1
        history.record(labels)
    assert len(list(tmp_path.glob("stroke-*.npz"))) <= 275
    assert len(list(tmp_path.glob("snapshot-*.npz"))) == 1
    np.testing.assert_array_equal(LabelHistory(tmp_path, (4, 4, 4)).labels, history.labels)


def test_a_history_with_a_file_missing_is_damaged_and_nothing_is_written_over_it(tmp_path):
    history = LabelHistory(tmp_path, SHAPE)
    for stroke in range(30):
        labels = history.labels.copy()
        labels[stroke, 0, 0] = 1
        history.record(labels)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for name in ("state.json", "snapshot-000025.npz", "stroke-000028.npz"):
        (tmp_path / name).unlink()
        with pytest.raises(FileError, match="damaged"):
            LabelHistory(tmp_path, SHAPE)
        (tmp_path / name).write_bytes(files[name])
    np.testing.assert_array_equal(LabelHistory(tmp_path, SHAPE).labels, history.labels)


def test_a_window_killed_within_the_very_first_stroke_keeps_it(tmp_path):
    LabelHistory(tmp_path, SHAPE).record(strokes())
    (tmp_path / "state.json").unlink()
    again = LabelHistory(tmp_path, SHAPE)
    np.testing.assert_array_equal(again.labels, strokes())
    assert again.undo()
    assert not LabelHistory(tmp_path, SHAPE).labels.any()


def test_a_window_killed_while_it_wrote_the_very_first_stroke_has_painted_nothing(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; import numpy as np\n"
        "from napari_brainmvp.annotation.history import LabelHistory\n"
        "def kill(file, **arrays):\n"
        "    file.write(b'PK'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "np.savez_compressed = kill\n"
        f"LabelHistory(Path(sys.argv[1]), {SHAPE}).record(np.ones({SHAPE}, int))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)])
    assert done.returncode == -signal.SIGKILL
    assert [path.name.split(".part.")[1] for path in tmp_path.iterdir()] == ["stroke-000001.npz"]
    history = LabelHistory(tmp_path, SHAPE)
    assert not history.labels.any()
    history.record(strokes())
    np.testing.assert_array_equal(LabelHistory(tmp_path, SHAPE).labels, strokes())


@pytest.mark.parametrize(
    ("labels", "word"),
    [
        (np.zeros((3, 4, 5), int), "shape"),
        (np.zeros(SHAPE, np.float32), "integers"),
        (np.full(SHAPE, 2**64 - 1, np.uint64), "smaller number"),
    ],
)
def test_history_refuses_what_are_no_labels_of_the_study(tmp_path, labels, word):
    history = LabelHistory(tmp_path, SHAPE)
    history.record(strokes())
    with pytest.raises(StudyError, match=word):
        history.record(labels)
    np.testing.assert_array_equal(LabelHistory(tmp_path, SHAPE).labels, strokes())


def test_negative_and_huge_integers_are_kept(tmp_path):
    labels = strokes()
    labels[0, 0, :3] = (-5, 2**40, 70000)
    LabelHistory(tmp_path, SHAPE).record(labels)
    np.testing.assert_array_equal(LabelHistory(tmp_path, SHAPE).labels, labels)


def test_a_killed_process_loses_no_saved_stroke(tmp_path):
    """Strokes come as fast as they can be saved, and the process is killed somewhere between or within."""
    code = (
        "import sys, numpy as np\n"
        "from pathlib import Path\n"
        "from napari_brainmvp.annotation.history import LabelHistory\n"
        f"history = LabelHistory(Path(sys.argv[1]), {SHAPE})\n"
        "labels = history.labels.copy()\n"
        "for stroke in range(1, 10**6):\n"
        "    labels.flat[stroke - 1] = stroke\n"
        "    history.record(labels)\n"
        "    print(stroke, flush=True)\n"
    )
    for delay in (0.05, 0.11, 0.4):
        folder = tmp_path / str(delay)
        process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        said = process.stdout.read().split()
        process.wait()
        last = int(said[-1]) if said else 1
        flat = LabelHistory(folder, SHAPE).labels.ravel()
        count = int((flat != 0).sum())
        assert last <= count <= last + 1
        np.testing.assert_array_equal(flat[:count], np.arange(1, count + 1))


@pytest.fixture
def project(tmp_path):
    made = AnnotationProject.create(tmp_path / "project")
    yield made
    made.close()


def test_a_project_restores_everything(project, tmp_path):
    study = lesion_study(tmp_path, "case-1")
    reference = project.add_study(study)
    project.set_classes((*default_classes(), LabelClass(value=7, name="Core", color="#112233")))
    project.set_groups({"case-1": "glioma"})
    project.labels("case-1").record(strokes())
    project.close()
    again = AnnotationProject.open(tmp_path / "project")
    assert not again.read_only
    assert again.classes == project.classes
    assert again.study("case-1").group == "glioma"
    np.testing.assert_array_equal(again.labels("case-1").labels, strokes())
    assert again.read("case-1").grid == study.grid
    assert again.find(study) == again.study(reference.name)
    assert again.find(lesion_study(tmp_path, "case-2")) is None
    again.close()


@pytest.mark.parametrize("in_files", [True, False])
def test_a_study_that_was_removed_comes_back_with_its_strokes(project, tmp_path, in_files):
    study = replace(lesion_study(tmp_path if in_files else None, "case"), labels=None)
    twin = replace(lesion_study(None if in_files else tmp_path, "case", 3), labels=None)
    project.add_study(study)
    project.set_groups({"case": "glioma"})
    project.labels("case").record(strokes())
    project.remove_study("case")
    assert (project.studies, project.painted_on(), project.find(study)) == ((), [], None)
    with pytest.raises(StudyError, match="no study 'case'"):
        project.remove_study("case")
    project.close()
    again = AnnotationProject.open(tmp_path / "project")
    second = AnnotationProject.open(tmp_path / "project")  # which may only look
    assert again.add_study(twin).name == "case-2"  # another study of this name has no part in the strokes
    assert not again.labels("case-2").labels.any()
    with pytest.raises(LockedError):
        second.add_study(study)
    if in_files:  # it had a wrong FLAIR, say
        right = tmp_path / "right.nii.gz"
        write_image(right, study.scans["flair"].data, study.grid)
        study = read_study((study.scans["t1"].path, right), modalities={"t1": study.scans["t1"].path, "flair": right})
    back = again.add_study(replace(study, labels=lesion_study().labels))
    assert not in_files or back.scans["flair"] == str(right)
    assert (back.name, back.group, again.removed) == ("case", "glioma", ())
    np.testing.assert_array_equal(again.labels("case").labels, strokes())
    assert again.labels("case").undo()
    assert again.painted_on() == []
    again.close()


@pytest.mark.parametrize("value", [3, 2**40])
def test_a_class_leaves_where_nothing_is_painted_with_it(project, tmp_path, value):
    core = LabelClass(value=value, name="Core", color="#112233")
    project.set_classes((*default_classes(), core))
    for name in ("one", "two"):
        project.add_study(replace(lesion_study(tmp_path, name), labels=None))
    labels = project.labels("two")
    labels.record(strokes())
    labels.record(np.where(strokes() == 2, value, strokes()))
    project.remove_study("two")
    project.close()
    again = AnnotationProject.open(tmp_path / "project")
    for other, words in ((1, "background"), (9, "no class")):
        with pytest.raises(StudyError, match=words):
            again.remove_class(other)
    again.remove_class(value)  # the one study it is painted on is not there
    again.add_study(lesion_study(tmp_path, "two"))
    assert (again.classes, again.removed_classes) == ((*default_classes(), core), ())  # and brings it back
    with pytest.raises(StudyError, match="Core is painted on two: erase it there"):
        again.remove_class(value)
    labels = again.labels("two")
    assert labels.undo()
    again.set_regions({"whole": (2, value)})
    with pytest.raises(StudyError, match="part of the region whole"):
        again.remove_class(value)
    again.set_regions({})
    again.remove_class(value)
    assert (again.classes, again.removed_classes) == (default_classes(), (core,))
    again.close()
    last = AnnotationProject.open(tmp_path / "project")
    assert last.labels("two").redo()  # what was undone is painted with it
    assert last.labels("two").written == {value}
    last.know_values(last.labels("two").written)
    assert (last.classes, last.removed_classes) == ((*default_classes(), core), ())
    last.close()


def test_names_of_new_classes_differ_from_all_others():
    removed = [LabelClass(value=v, name="Core", color="#112233") for v in (7, 8)]
    known = (*default_classes(), LabelClass(value=4, name="Label 9", color="#112233"))
    made = classes_of([7, 8, 9], known, removed)
    assert [c.name for c in made] == ["Core", "Label 8", "Label 9 (2)"]


def test_labels_that_come_with_a_study_are_kept_as_they_are(project):
    study = lesion_study()
    labels = study.labels.data.astype(np.int32)
    labels[0, 0, 0] = -3
    named = type(study)("odd study", study.scans, labels=LabelMap(labels, study.grid))
    reference = project.add_study(named)
    assert reference.name == "odd-study"
    np.testing.assert_array_equal(project.labels(reference.name).labels, labels)
    assert {c.value for c in project.classes} == {1, 2, -3}
    assert read_study(project.folder / "scans" / reference.name).grid.same_as(study.grid)


def test_the_second_window_is_read_only(project, tmp_path):
    reference = project.add_study(lesion_study())
    second = AnnotationProject.open(project.folder)
    assert second.read_only
    assert str(os.getpid()) in second.owner
    with pytest.raises(FileError, match="open for writing elsewhere"):
        second.set_groups({reference.name: "x"})
    second.close()
    assert not project.read_only
    project.close()
    third = AnnotationProject.open(project.folder)
    assert not third.read_only
    third.close()


def test_a_project_that_is_moved_while_it_is_open_takes_nothing_down_where_it_was(project, tmp_path):
    reference = project.add_study(lesion_study())
    history, was = project.labels(reference.name), project.folder
    labels = np.zeros(reference.shape, np.int32)
    labels[3:6] = 2
    history.record(labels)
    was.rename(tmp_path / "moved")
    labels[8:9] = 2
    for write in (lambda: history.record(labels), lambda: project.set_groups({reference.name: "x"})):
        with pytest.raises(FileError, match="put its folder back"):
            write()
    assert not was.exists()
    (tmp_path / "moved").rename(was)
    history.record(labels)
    assert not project.read_only
    was.rename(tmp_path / "moved")
    project.close()
    assert not was.exists()
    again = AnnotationProject.open(tmp_path / "moved")
    np.testing.assert_array_equal(again.labels(reference.name).labels, labels)
    again.close()


def test_a_project_in_a_place_that_is_closed_says_so(project):
    reference = project.add_study(lesion_study())
    history = project.labels(reference.name)
    with ordinary_user(project.folder), pytest.raises(FileError, match=r"cannot be read|no longer in"):
        history.record(np.ones(reference.shape, np.int32))
    history.record(np.ones(reference.shape, np.int32))
    with ordinary_user(project.folder):
        project.close()


def test_scans_that_are_links_into_a_store_are_found_again(project, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "case").mkdir()
    save(tmp_path / "scan.nii.gz", brain())
    (tmp_path / "scan.nii.gz").rename(tmp_path / "store" / "ab12cd")
    (tmp_path / "case" / "case_t1.nii.gz").symlink_to(tmp_path / "store" / "ab12cd")
    study = read_study(tmp_path / "case")
    name = project.add_study(study).name
    assert list(project.read(name).scans) == ["t1"]
    assert project.find(study).name == name


def test_scans_inside_a_project_that_was_reached_by_a_link_move_with_it(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    project = AnnotationProject.create(tmp_path / "link" / "project")
    (project.folder / "data").mkdir()
    save(project.folder / "data" / "case_t1.nii.gz", brain())
    reference = project.add_study(read_study(tmp_path / "link" / "project" / "data"))
    assert reference.scans == {"t1": "data/case_t1.nii.gz"}
    project.close()


def test_the_lock_of_a_killed_process_is_stale(project, tmp_path):
    project.close()
    code = (
        "import sys, time\n"
        "from napari_brainmvp.annotation.project import AnnotationProject\n"
        "p = AnnotationProject.open(sys.argv[1]); print(p.read_only, flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(project.folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "False"
    other = AnnotationProject.open(project.folder)
    assert other.read_only
    process.kill()
    process.wait()
    third = AnnotationProject.open(project.folder)
    assert not third.read_only
    third.close()


def test_a_silent_lock_of_another_machine_is_stale(project):
    project.close()
    lock = {"pid": 1, "host": "elsewhere", "token": "x", "at": time.time() - 5}
    (project.folder / "lock.json").write_text(json.dumps(lock))
    assert AnnotationProject.open(project.folder).read_only
    (project.folder / "lock.json").write_text(json.dumps({**lock, "at": time.time() - 60}))
    opened = AnnotationProject.open(project.folder)
    assert not opened.read_only
    opened.close()


def test_a_silent_lock_with_the_number_of_a_process_that_lives_is_stale(project):
    project.close()
    lock = {"pid": os.getpid(), "host": socket.gethostname(), "token": "x", "at": time.time() - 60}
    (project.folder / "lock.json").write_text(json.dumps(lock))
    assert AnnotationProject.open(project.folder).read_only  # it may only be busy
    (project.folder / "lock.json").write_text(json.dumps({**lock, "at": time.time() - 300}))
    opened = AnnotationProject.open(project.folder)
    assert not opened.read_only
    opened.close()


def test_strokes_are_refused_once_another_window_has_taken_over(project, tmp_path):
    project.add_study(replace(lesion_study(tmp_path, "case-1"), labels=None))
    history = project.labels("case-1")
    history.record(strokes())
    lock = json.loads((project.folder / "lock.json").read_text())
    (project.folder / "lock.json").write_text(json.dumps({**lock, "token": "another"}))
    files = {p: p.read_bytes() for p in (project.folder / "labels" / "case-1").iterdir()}
    with pytest.raises(FileError, match="open for writing elsewhere"):
        history.record(np.zeros(SHAPE, int))
    with pytest.raises(FileError, match="open for writing elsewhere"):
        history.undo()
    project.close()
    assert {p: p.read_bytes() for p in (project.folder / "labels" / "case-1").iterdir()} == files


def wait_until(true) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_lock_that_cannot_be_read_or_was_deleted_is_held_still(project, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_BEAT", 0.05)
    project.close()
    ours = AnnotationProject.open(project.folder)
    path = project.folder / "lock.json"
    token = json.loads(path.read_text())["token"]
    path.unlink()
    ours.set_groups({})
    wait_until(path.exists)
    assert json.loads(path.read_text())["token"] == token
    path.unlink()
    path.mkdir()  # reading fails
    for _ in range(10):
        ours.set_groups({})
        time.sleep(0.02)
    path.rmdir()
    wait_until(path.exists)
    assert AnnotationProject.open(project.folder).read_only
    ours.close()
    assert not path.exists()


def test_a_lock_that_is_gone_after_a_long_sleep_may_have_been_another_windows(project, monkeypatch):
    (project.folder / "lock.json").unlink()
    project.set_groups({})
    monkeypatch.setattr(lock, "_SILENCE", 0.0)
    with pytest.raises(FileError, match="open for writing elsewhere"):
        project.set_groups({})


def test_a_lock_does_not_come_back(project, monkeypatch):
    monkeypatch.setattr(lock, "_BEAT", 0.0)
    project.close()
    for step in range(40):
        ours = AnnotationProject.open(project.folder)
        time.sleep(0.001 * (step % 7))
        ours.close()
        for thread in threading.enumerate():
            if thread.name == "brainmvp-lock":
                thread.join(20)
        assert not (project.folder / "lock.json").exists()
    ours = AnnotationProject.open(project.folder)
    shutil.rmtree(project.folder, ignore_errors=True)
    shutil.rmtree(project.folder, ignore_errors=True)  # a beat may have written in between
    time.sleep(0.1)
    assert not project.folder.exists()
    ours.close()


def test_a_project_on_a_full_disk_is_closed_for_others_to_open(project, tmp_path, caplog):
    for name in ("case-1", "case-2"):
        project.add_study(replace(lesion_study(tmp_path, name), labels=None))
        project.labels(name).record(strokes())
    with full_disk():
        project.close()
        assert not (project.folder / "lock.json").exists()
        assert AnnotationProject.open(project.folder).read_only
    assert "closed without a snapshot" in caplog.text
    again = AnnotationProject.open(project.folder)
    assert not again.read_only
    for name in ("case-1", "case-2"):
        np.testing.assert_array_equal(again.labels(name).labels, strokes())
    again.close()


def test_names_that_differ_in_capitals_only_are_told_apart(project):
    names = [project.add_study(lesion_study(name=name)).name for name in ("Case", "case", "CASE", "case-2")]
    assert names == ["Case", "case-2", "CASE-3", "case-2-2"]


def test_all_threads_get_one_history(project, tmp_path):
    project.add_study(replace(lesion_study(tmp_path, "case-1"), labels=None))
    for _ in range(20):
        project._histories.clear()
        barrier = threading.Barrier(8)

        def ask(barrier: threading.Barrier = barrier) -> LabelHistory:
            barrier.wait()
            return project.labels("case-1")

        with ThreadPoolExecutor(8) as pool:
            found = [future.result() for future in [pool.submit(ask) for _ in range(8)]]
        assert all(history is found[0] for history in found)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"classes": []}', '{"classes": [{"value": 0, "name": "x"}]}'])
def test_a_damaged_project_is_said(tmp_path, text):
    (tmp_path / "project.json").write_text(text)
    with pytest.raises(BrainMVPError, match=r"damaged|background"):
        AnnotationProject.open(tmp_path)


def test_what_is_no_project_is_said(tmp_path):
    with pytest.raises(FileError, match="holds no annotation project"):
        AnnotationProject.open(tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileError, match="not empty"):
        AnnotationProject.create(tmp_path)


def test_replaced_scans_are_noticed(project, tmp_path):
    project.add_study(lesion_study(tmp_path, "case"))
    lesion_study(tmp_path, "case", shape=(30, 30, 30))
    with pytest.raises(StudyError, match="another grid"):
        project.read("case")


def test_participants_go_out_and_come_back(project, tmp_path):
    for name in ("sub-01", "case-2", "case-3"):
        project.add_study(lesion_study(name=name))
    project.set_groups({"sub-01": "HGG", "case-2": "LGG", "case-3": "n/a"})
    assert project.study("case-3").group == ""
    path = export_participants(project, tmp_path / "participants.tsv")
    assert path.read_text().splitlines() == ["participant_id\tgroup", "sub-01\tHGG", "sub-case2\tLGG", "sub-case3\tn/a"]
    project.set_groups({"sub-01": "", "case-2": ""})
    assert import_participants(project, path) == 2
    assert [s.group for s in project.studies] == ["HGG", "LGG", ""]
    path.write_text("name\tage\n")
    for action in (import_participants, export_participants):
        with pytest.raises(StudyError, match="participant_id"):
            action(project, path)


def test_classes_are_put_into_a_table_that_is_there_already(project, tmp_path):
    for name in ("sub-01", "case-2", "case2", "case-3"):
        project.add_study(lesion_study(name=name))
    project.set_groups({"sub-01": "HGG", "case-2": "LGG", "case2": "HGG"})
    path = tmp_path / "participants.tsv"
    path.write_text("\ufeffparticipant_id\tage\tsex\nsub-01\t40\tf\nsub-90\t50\tm\ncase-2\t60\tf\n", encoding="utf-8")
    export_participants(project, path)
    expected = [
        "participant_id\tage\tsex\tgroup",
        "sub-01\t40\tf\tHGG",
        "sub-90\t50\tm\tn/a",
        "case-2\t60\tf\tLGG",
        "sub-case2x2\tn/a\tn/a\tHGG",  # not case-2, whose label is the same
        "sub-case3\tn/a\tn/a\tn/a",
    ]
    assert path.read_text().splitlines() == expected
    project.set_groups({s.name: "" for s in project.studies})
    export_participants(project, path)  # the project knows none: what is there stays
    assert path.read_text().splitlines() == expected
    assert import_participants(project, path) == 3
    assert [s.group for s in project.studies] == ["HGG", "LGG", "HGG", ""]
    project.add_study(lesion_study(name="case3"))  # of case-3, whose row this looks like, it is not
    project.set_groups({"case3": "new"})
    assert export_participants(project, path).read_text().splitlines() == [*expected, "sub-case3x2\tn/a\tn/a\tnew"]
    project.set_groups({"case3": ""})
    path.write_text("\n".join([*expected[:-1], "sub-case3\tn/a\tn/a\told"]) + "\n")
    assert import_participants(project, path) == 4
    assert [s.group for s in project.studies][3:] == ["old", ""]
    path.write_text(path.read_text() + "sub-91\t1\tm\tx\textra\n")
    with pytest.raises(FileError, match="line 7"):
        export_participants(project, path)


def test_classes_come_from_any_column_of_a_table_with_a_byte_order_mark(project, tmp_path):
    for name in ("sub-01_ses-1", "sub-02"):
        project.add_study(lesion_study(name=name))
    path = tmp_path / "participants.tsv"
    path.write_text("\ufeffparticipant_id\tage\tdiagnosis\nsub-01\t40\tHGG\nsub-02\t50\tn/a\n", encoding="utf-8")
    assert import_participants(project, path) == 1
    assert [s.group for s in project.studies] == ["HGG", ""]
    assert import_participants(project, path, "age") == 2
    assert [s.group for s in project.studies] == ["40", "50"]
    with pytest.raises(StudyError, match="'eyes'"):
        import_participants(project, path, "eyes")


def test_a_bids_table_comes_in_and_goes_out_as_it_was(project, tmp_path):
    for name in ("sub-01_ses-1", "sub-01_ses-2", "case_ses-1", "sub-02"):
        project.add_study(lesion_study(tmp_path, name))
    path = tmp_path / "participants.tsv"
    text = "participant_id\tage\tdiagnosis\nsub-01\t40\tHGG\nsub-02\t50\tLGG\ncase\t60\tHGG\n"
    path.write_text(text)
    assert import_participants(project, path) == 4
    assert export_participants(project, path).read_text() == text
    project.close()
    again = AnnotationProject.open(project.folder)  # remembers what the column is called
    new = export_participants(again, tmp_path / "new.tsv").read_text()
    assert new == "participant_id\tdiagnosis\nsub-01\tHGG\nsub-case\tHGG\nsub-02\tLGG\n"
    again.set_groups({s.name: "" for s in again.studies})
    assert import_participants(again, tmp_path / "new.tsv") == 4
    again.set_groups({"sub-01_ses-2": "LGG"})  # which one row cannot say
    assert export_participants(again, path).read_text() == text + "sub-01ses1\tn/a\tHGG\nsub-01ses2\tn/a\tLGG\n"
    assert mixed_subjects(again) == ["sub-01"]
    assert import_participants(again, path) == 4
    assert [s.group for s in again.studies] == ["HGG", "LGG", "HGG", "LGG"]
    out = export_dataset(again, tmp_path / "dataset", task="classification")
    assert read_participants(out / "participants.tsv", "diagnosis")["sub-01_ses-2"] == "LGG"
    again.set_groups({}, "group")
    assert "class_column" not in (again.folder / "project.json").read_text()  # older versions know nothing of it
    again.close()


@pytest.mark.parametrize("layout", ["brats", "bids"])
def test_an_exported_project_is_a_dataset(project, tmp_path, layout):
    with pytest.raises(StudyError, match="paint some strokes"):
        export_dataset(project, tmp_path / "empty", layout)
    for name in ("case-1", "case-2"):
        project.add_study(lesion_study(tmp_path, name, keys=("t1", "flair", "t1c")))
    project.labels("case-1").record(strokes())
    out = export_dataset(project, tmp_path / "dataset", layout)
    found = find_studies(out)
    assert len(found) == 1
    assert set(found[0].scans) == {"t1", "flair", "t1c"}
    labels = read_label_map(found[0].labels)
    np.testing.assert_array_equal(labels.data, strokes())
    said = json.loads((out / "dataset.json").read_text())
    assert said["labels"] == {"2": "Lesion"}
    assert (said["background"], said["unlabelled"]) == (1, 0)
    description = out / "dataset_description.json"
    assert description.exists() == (layout == "bids")
    if layout == "bids":
        content = json.loads(description.read_text())
        assert (content["DatasetType"], content["GeneratedBy"][0]["Name"]) == ("derivative", "napari-brainmvp")
    with pytest.raises(FileError, match="not empty"):
        export_dataset(project, out, layout)


def test_a_scan_in_two_files_is_exported_whole(project, tmp_path):
    study = lesion_study(tmp_path, "case")
    folder = tmp_path / "case"
    for key, scan in study.scans.items():
        header = {"space": "RAS", "space directions": scan.grid.affine[:3, :3].T, "space origin": [0, 0, 0]}
        name = str(folder / f"case_{key}.nhdr")
        nrrd.write(name, scan.data, header, detached_header=True)
        scan.path.unlink()
    project.add_study(read_study(folder))
    project.labels("case").record(strokes())
    out = export_dataset(project, tmp_path / "dataset")
    shutil.rmtree(folder)
    found = read_study(out / "case")
    assert found.grid.same_as(study.grid)
    for key, scan in study.scans.items():
        np.testing.assert_array_equal(found.scans[key].data, scan.data)


def test_scans_are_linked_where_one_asks_for_it(project, tmp_path):
    study = lesion_study(tmp_path, "case")
    scan = study.scans["t1"].path
    scan.rename(tmp_path / "elsewhere.nii.gz")
    scan.symlink_to(tmp_path / "elsewhere.nii.gz")
    project.add_study(study)
    project.labels("case").record(strokes())
    copied, linked = (export_dataset(project, tmp_path / str(link), link=link) for link in (False, True))
    for key, kept in study.scans.items():
        assert not (copied / "case" / f"case_{key}.nii.gz").samefile(kept.path)
        assert (linked / "case" / f"case_{key}.nii.gz").samefile(kept.path)
    shutil.rmtree(tmp_path / "case")
    (tmp_path / "elsewhere.nii.gz").unlink()
    assert set(read_study(linked / "case").scans) == {"t1", "flair"}


def test_studies_with_one_bids_label_do_not_overwrite_each_other(project, tmp_path):
    for name in ("p1-2", "P12"):  # nor where a file system does not tell capitals apart
        project.add_study(lesion_study(tmp_path, name))
        project.labels(name).record(strokes())
    project.set_groups({"p1-2": "a", "P12": "b"})
    out = export_dataset(project, tmp_path / "dataset", "bids")
    assert [s.name for s in find_studies(out)] == ["sub-P12x2", "sub-p12"]
    assert read_participants(out / "participants.tsv") == {"sub-p12": "a", "sub-P12x2": "b"}


def test_a_session_without_a_subject_is_called_alike_everywhere(project, tmp_path):
    from napari_brainmvp.plugin.new_study import enter

    enter(project, lesion_study(tmp_path / "patient7", "ses-2"), None, None)
    project.add_study(lesion_study(tmp_path, "other"))
    older = [s.model_copy(update={"name": "ses-2"}) for s in project.studies[:1]]  # as older projects have them
    project._update(studies=(*project.studies, *older))
    names = ["patient7_ses-2", "other", "ses-2"]
    assert [s.name for s in project.studies] == names
    for name in names:
        project.labels(name).record(strokes())
    project.set_groups(dict(zip(names, "aba", strict=True)))
    for layout in ("brats", "bids"):
        out = export_dataset(project, tmp_path / layout, layout)
        classes, found = read_participants(out / "participants.tsv"), find_studies(out)
        assert sorted(class_of(s.name, classes) for s in found) == ["a", "a", "b"]
        card = tiny_card("trained", training={"study digests": [name_digest(s.name) for s in found]})
        for name in names:
            with pytest.raises(StudyError, match=f"was trained on {name}"):
                check_unseen(card, project, name)
    assert project.add_study(lesion_study(name="ses-3")).name == "study-ses-3"
    check_unseen(card, project, "study-ses-3")


def test_an_export_that_fails_leaves_nothing_behind(project, tmp_path):
    project.add_study(lesion_study(tmp_path, "case"))
    project.labels("case").record(np.where(strokes() == 1, 1, 0))
    out = tmp_path / "datasets" / "mine"
    with pytest.raises(StudyError, match="Only background"):
        export_dataset(project, out)
    project.labels("case").record(strokes())
    scan = next((tmp_path / "case").glob("*t1*"))
    scan.rename(tmp_path / "moved.nii.gz")
    with pytest.raises(StudyError, match="case_t1"):
        export_dataset(project, out)
    (tmp_path / "moved.nii.gz").rename(scan)
    token = CancelToken()
    token.cancel()
    with pytest.raises(Cancelled):
        export_dataset(project, out, cancel=token)
    assert not out.exists()
    assert not [*tmp_path.glob("datasets/.*")]
    out.mkdir(parents=True)  # as a dialog makes it
    assert export_dataset(project, out) == out
    assert [s.name for s in find_studies(out)] == ["case"]


def test_the_newest_model_of_a_project_is_found_by_what_it_was_trained_on(project, home):
    dataset = project.folder / "datasets" / "mine-1"
    dataset.mkdir(parents=True)
    assert newest_model(project) is None
    recipe = FinetuneSpec(data=(DataSource(path=str(dataset)),))
    for name, told in (("mine", recipe.recipe()), ("older", recipe.model_dump(mode="json")), ("other", {"data": []})):
        tiny_model(home / "models", name, training={"recipe": told})
        assert newest_model(project).card.name == ("mine" if name == "mine" else "older")


def test_a_study_that_cannot_be_read_is_left_out_and_named(project, tmp_path):
    for name in ("good", "gone"):
        project.add_study(lesion_study(tmp_path, name))
        project.labels(name).record(strokes())
    shutil.rmtree(tmp_path / "gone")
    out = export_dataset(project, tmp_path / "dataset")
    assert [s.name for s in find_studies(out)] == ["good"]
    assert (out / "left_out.txt").read_text().startswith("gone: ")


@pytest.mark.parametrize("layout", ["brats", "bids"])
def test_a_dataset_of_classes_needs_no_strokes(project, tmp_path, layout):
    for name in ("case-1", "case-2", "case_3", "nobody-said"):
        project.add_study(lesion_study(tmp_path, name))
    project.labels("nobody-said").record(strokes())
    project.set_groups({"case-1": "HGG", "case-2": "HGG"})
    with pytest.raises(StudyError, match="HGG"):
        export_dataset(project, tmp_path / "one", layout, task="classification")
    project.set_groups({"case_3": "LGG"})
    out = export_dataset(project, tmp_path / "dataset", layout, task="classification")
    classes = read_participants(out / "participants.tsv")
    found = {s.name: class_of(s.name, classes) for s in find_studies(out)}
    assert sorted(found.values()) == ["HGG", "HGG", "LGG"]
    assert len(found) == 3


def test_labels_that_no_dataset_can_hold_get_other_numbers(project, tmp_path):
    project.add_study(lesion_study(tmp_path, "case"))
    labels = strokes()
    labels[0, 0, 0], labels[0, 0, 1] = -4, 70000
    project.labels("case").record(labels)
    project.know_values([-4, 70000])
    project.set_regions({"odd": (-4, 70000)})
    out = export_dataset(project, tmp_path / "dataset")
    said = read_labels(out)
    assert (said.labels, said.regions) == ({2: "Lesion", 3: "Label -4", 4: "Label 70000"}, {"odd": (3, 4)})
    painted = read_label_map(find_studies(out)[0].labels).data
    assert [painted[0, 0, k] for k in range(2)] == [3, 4]
    assert (painted == 2).sum() == (labels == 2).sum()
    assert project.labels("case").labels[0, 0, 0] == -4
