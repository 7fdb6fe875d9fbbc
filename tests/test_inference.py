"""Segmentation from study to result, with the tiny model: numbers are random, everything around them is not."""

import threading
import time
import timeit
from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import brain, filled
from models_for_tests import region_model, tiny_card, tiny_model
from napari_brainmvp.errors import BrainMVPError, Cancelled, StudyError
from napari_brainmvp.inference import SegmentOptions, choose_device, segment
from napari_brainmvp.inference.device import choose_precision
from napari_brainmvp.inference.result import measure, volumes_csv
from napari_brainmvp.inference.windows import (
    SlidingWindow,
    gaussian_importance,
    report_layers,
    window_starts,
)
from napari_brainmvp.models import Label, find_model, load_model
from napari_brainmvp.models.weights import LoadedModel
from napari_brainmvp.progress import CancelToken
from napari_brainmvp.study import Grid, Scan, Study, modality
from napari_brainmvp.training.labels import LABEL_PRESETS

FLOAT = SegmentOptions(device="cpu", precision="float32")
KEYS = ("t1", "t1c", "t2", "flair")


def study(keys=KEYS, shape=(40, 44, 36), affine=None) -> Study:
    grid = Grid(shape, np.diag([1.0, 1, 1, 1]) if affine is None else affine)
    return Study("s", {k: Scan(modality(k), brain(shape, seed), grid) for seed, k in enumerate(keys)})


@pytest.fixture
def model(home) -> LoadedModel:
    return load_model(find_model("tiny"))


@pytest.mark.parametrize("size", [16, 33, 96, 145, 240])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.8])
def test_windows_cover_everything_and_overlap_enough(size, overlap):
    window = min(96, size)
    starts = window_starts(size, window, overlap)
    covered = np.zeros(size, int)
    for start in starts:
        covered[start : start + window] += 1
        assert start + window <= size
    assert covered.min() >= 1
    steps = np.diff(starts)
    assert (steps <= np.ceil(window * (1 - overlap))).all()
    assert len(steps) == 0 or steps.max() - steps.min() <= 1


def test_the_importance_is_a_gaussian():
    weights = gaussian_importance((32, 48, 16))
    assert weights.shape == (32, 48, 16)
    assert float(weights.max()) == 1
    assert float(weights.min()) == pytest.approx(1e-3)
    ratio = float(weights[19, 24, 8] / weights[15, 24, 8])  # 3.5 and 0.5 voxels off, sigma 4
    assert ratio == pytest.approx(np.exp(-(3.5**2 - 0.5**2) / 32), rel=1e-4)


def test_a_result_lies_on_the_scans_own_grid(model):
    affine = np.array([[0, 0, -2.5, 30], [-1.2, 0, 0, 10], [0, 0.9, 0, 0], [0, 0, 0, 1.0]])
    made = study(shape=(40, 44, 14), affine=affine)
    result = segment(made, model, replace(FLOAT, probabilities=True, uncertainty=True))
    assert result.labels.shape == (40, 44, 14)
    assert result.grid.same_as(made.grid)
    assert set(np.unique(result.labels)) <= {0, 1, 2, 3}
    assert result.probabilities.shape == (4, 40, 44, 14)
    assert result.channel_names == ("Background", "CSF", "Grey matter", "White matter")
    inside = result.labels > 0
    assert inside.any()
    total = result.probabilities.astype(np.float32).sum(0)
    np.testing.assert_allclose(total[inside], 1, atol=0.02)
    agree = result.probabilities.argmax(0)[inside] == result.labels[inside]
    assert agree.mean() > 0.99
    assert result.uncertainty.min() >= 0
    assert result.uncertainty.max() <= 1
    assert result.uncertainty[inside].mean() > 0.05


def test_volumes_and_centres(model):
    result = segment(study(), model, FLOAT)
    for s in result.structures:
        voxels = int((result.labels == s.value).sum())
        assert s.voxels == voxels
        assert s.volume_ml == pytest.approx(voxels / 1000)
        if voxels:
            index = np.rint(result.grid.to_index(s.centre_mm)).astype(int)
            assert result.labels[tuple(index)] == s.value
        else:
            assert s.centre_mm is None


def test_a_region_is_measured_whole_with_the_regions_within_it():
    labels, truth = LABEL_PRESETS["brats"], np.zeros((32, 32, 32), int)
    truth[8:24, 8:24, 8:24], truth[12:20, 12:20, 12:20], truth[14:18, 14:18, 14:18] = 2, 1, 4
    masks = [np.isin(truth, members) for members in labels.members]
    model = region_model(labels, np.stack(masks).astype(float))
    scan = Scan(modality("t1"), filled(), Grid((32, 32, 32), np.eye(4)))
    result = segment(Study("s", {"t1": scan}), model, FLOAT)
    np.testing.assert_array_equal(result.labels, truth)
    np.testing.assert_array_equal(result.regions, masks)
    assert [s.voxels for s in result.structures] == [m.sum() for m in masks]
    for structure, mask in zip(result.structures, masks, strict=True):
        assert mask[tuple(np.rint(result.grid.to_index(structure.centre_mm)).astype(int))]


def test_a_shell_has_its_centre_on_the_shell():
    index = np.stack(np.meshgrid(*[np.arange(21)] * 3, indexing="ij"), -1)
    radius = np.linalg.norm(index - 10, axis=-1)
    labels = ((radius > 6) & (radius < 8)).astype(np.uint8) * 3
    grid = Grid((21, 21, 21), np.diag([2.0, 2, 2, 1]))
    shell, absent = measure(
        labels, grid, [Label(value=3, name="shell", color="#000000"), Label(value=5, name="absent", color="#000000")]
    )
    assert labels[tuple(np.rint(grid.to_index(shell.centre_mm)).astype(int))] == 3
    assert shell.volume_ml == pytest.approx(0.008 * (labels == 3).sum())
    assert absent.centre_mm is None
    assert volumes_csv([shell, absent]).splitlines()[2] == "5,absent,0,0.0000"


def test_the_centre_is_in_the_largest_part():
    labels = np.zeros((30, 10, 10), np.uint8)
    labels[2:5, 5, 5] = 1
    labels[20:28, 2:8, 2:8] = 1
    (found,) = measure(labels, Grid(labels.shape, np.eye(4)), [Label(value=1, name="a", color="#000000")])
    assert 22 <= found.centre_mm[0] <= 25


def test_the_result_does_not_depend_on_the_window_batch(model):
    one = segment(study(), model, replace(FLOAT, window_batch=1, probabilities=True))
    many = segment(study(), model, replace(FLOAT, window_batch=5, probabilities=True))
    np.testing.assert_allclose(one.probabilities, many.probabilities, atol=2e-3)
    assert (one.labels == many.labels).mean() > 0.999


def test_the_same_study_twice_gives_the_same_labels(model):
    a, b = (segment(study(), model, FLOAT).labels for _ in range(2))
    np.testing.assert_array_equal(a, b)


def test_mirroring_a_symmetric_study_gives_a_symmetric_result(model):
    data = brain()
    data = data + data[::-1]
    grid = Grid(data.shape, np.eye(4))
    made = Study("m", {k: Scan(modality(k), data, grid) for k in KEYS})
    result = segment(made, replace(model, templates=None), replace(FLOAT, mirror=True, probabilities=True))
    np.testing.assert_allclose(result.probabilities, result.probabilities[:, ::-1], atol=5e-3)


def test_missing_modalities_are_filled_and_said(model):
    result = segment(study(("t2",)), model, FLOAT)
    assert any("T1, T1c, FLAIR missing" in w and "template" in w for w in result.warnings)
    with pytest.raises(StudyError, match="works on t1, t1c, t2, flair"):
        segment(study(("adc",)), model, FLOAT)


def test_the_target_grid_can_be_chosen(model):
    fine = study(("t1",))
    coarse = Grid((20, 22, 9), np.diag([2.0, 2, 4, 1]))
    made = Study("two", {**fine.scans, "flair": Scan(modality("flair"), brain((20, 22, 9), 3), coarse)})
    assert segment(made, model, FLOAT).labels.shape == (40, 44, 36)
    assert segment(made, model, replace(FLOAT, target="FLAIR")).labels.shape == (20, 22, 9)
    with pytest.raises(StudyError, match="no 't2' scan"):
        segment(made, model, replace(FLOAT, target="t2"))


def test_regions_are_painted_in_order(tmp_path):
    folder = tiny_model(tmp_path, "regions", activation="sigmoid", channels=(2, 1, 3, 3))
    result = segment(study(), folder, replace(FLOAT, probabilities=True))
    p = result.probabilities.astype(np.float32)
    expected = np.zeros(result.labels.shape, int)
    for value, region in zip((2, 1, 3, 3), p, strict=True):
        expected[region > 0.5] = value
    assert (expected == result.labels).mean() > 0.995


def test_regions_made_of_classes_are_painted_where_the_likeliest_class_is(tmp_path):
    spec = tiny_card().network.model_copy(update={"parts": ((), (0,), (1, 0), (0, 1, 2)), "out_channels": 3})
    folder = tiny_model(tmp_path, "nested", network=spec, activation="sigmoid", channels=(2, 1, 3))
    whole, core, inner = segment(study(), folder, replace(FLOAT, probabilities=True)).probabilities.astype(np.float32)
    likeliest = np.stack([1 - whole, whole - core, core - inner, inner]).argmax(0)
    found = segment(study(), folder, FLOAT).labels
    assert (np.array([0, 2, 1, 3])[likeliest] == found).mean() > 0.995
    assert len(np.unique(found)) > 2


def test_progress_is_reported_and_cancel_works_within_a_window(model):
    seen, token = [], CancelToken()

    def progress(report):
        seen.append(report)
        if report.step == "Segmenting" and report.done >= 30:
            token.cancel()

    with pytest.raises(Cancelled):
        segment(study(), model, FLOAT, progress, token)
    done = [report.done for report in seen if report.step == "Segmenting"]
    assert done == sorted(set(done))
    assert len(done) > 5  # in the first window, which is a hundred
    assert 30 <= done[-1] < 100
    assert seen[-1].total > 100
    assert not any(layer._forward_hooks for layer in model.network.modules())


def test_progress_ends_at_all_and_another_threads_pass_is_not_counted(model):
    seen: list[float] = []
    images, everywhere = torch.rand(2, 48, 32, 32)[[0, 1, 0, 1]], torch.ones(48, 32, 32, dtype=torch.bool)
    window = SlidingWindow((32, 32, 32), 0.5, 1, torch.device("cpu"), torch.float32, mirror=True)
    with report_layers(model.network, seen.append):
        other = threading.Thread(target=window, args=(model.network, images, everywhere, torch.sigmoid))
        other.start()
        other.join()
    assert not seen
    window(model.network, images, everywhere, torch.sigmoid, lambda report: seen.append(report.fraction))
    assert seen[0] == 0
    assert seen[-1] == 1
    assert {0.25, 0.5, 0.75} <= set(seen)  # two windows of two views each


class Hungry(torch.nn.Module):
    """A network that needs more memory than a device of four windows has."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.calls = limit, []

    def forward(self, x):
        self.calls.append(len(x))
        if len(x) > self.limit:
            raise torch.OutOfMemoryError("out of memory")
        return torch.cat([x, -x], 1)


def test_out_of_memory_means_smaller_batches():
    network = Hungry(1)
    window = SlidingWindow((32, 32, 32), 0.5, 4, torch.device("meta"), torch.float32)
    window.device = torch.device("cpu")
    images = torch.rand(1, 48, 48, 48)
    retreats = []
    original = SlidingWindow._retreat

    class Watched(SlidingWindow):
        def _retreat(self):
            self.device = torch.device("cuda")  # as if the memory that ran out had been a GPU's
            original(self)
            retreats.append(self.batch)
            self.device = torch.device("cpu")

    watched = Watched((32, 32, 32), 0.5, 4, torch.device("cpu"), torch.float32)
    out = watched(network, images, torch.ones(48, 48, 48, dtype=torch.bool), torch.sigmoid)
    assert retreats == [2, 1]
    torch.testing.assert_close(out[0], torch.sigmoid(images[0]), rtol=1e-4, atol=1e-5)


def test_out_of_memory_for_one_window_falls_back_to_the_cpu():
    window = SlidingWindow((32, 32, 32), 0.5, 1, torch.device("cuda"), torch.bfloat16)
    window._retreat()
    assert window.device.type == "cpu"
    assert "ran out of memory" in window.warnings[0]


def test_out_of_memory_for_one_large_window_means_smaller_ones():
    window = SlidingWindow((160, 192, 80), 0.5, 1, torch.device("cuda"), torch.bfloat16)
    window._retreat()
    assert window.device.type == "cuda"
    assert window.patch_size == (96, 96, 80)
    assert not window.warnings


def test_empty_windows_are_skipped():
    network = Hungry(8)
    foreground = torch.zeros(96, 96, 96, dtype=torch.bool)
    foreground[:20, :20, :20] = True
    window = SlidingWindow((32, 32, 32), 0.0, 1, torch.device("cpu"), torch.float32)
    window(network, torch.rand(1, 96, 96, 96), foreground, torch.sigmoid)
    assert len(network.calls) == 1


def test_devices_are_checked():
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(BrainMVPError, match="choose one of auto"):
        choose_device("tpu")


def test_bfloat16_agrees_with_float32(model):
    full = segment(study(), model, FLOAT)
    half = segment(study(), model, replace(FLOAT, precision="bfloat16"))
    assert (full.labels == half.labels).mean() > 0.97


def test_a_card_without_templates_leaves_missing_modalities_empty(tmp_path):
    folder = tiny_model(tmp_path, "zero", fill_missing="zero")
    assert tiny_card(fill_missing="zero").fill_missing == "zero"
    result = segment(study(("t1",)), folder, FLOAT)
    assert "left empty" in result.warnings[0]


def test_time_is_measured(model):
    started = time.perf_counter()
    result = segment(study(), model, FLOAT)
    assert 0 < result.seconds <= time.perf_counter() - started


def test_training_takes_half_precision_only_where_it_is_not_emulated():
    def seconds(dtype):
        left = torch.ones(384, 384, dtype=dtype)
        return min(timeit.repeat(lambda: left @ left, number=1, repeat=5))

    half = choose_precision("auto", "cpu") == "bf16-mixed"
    took = {dtype: seconds(dtype) for dtype in (torch.bfloat16, torch.float32)}
    assert took[torch.bfloat16 if half else torch.float32] < 3 * min(took.values())
    assert choose_precision("16-mixed", "cpu") == "16-mixed"  # a choice is a choice
    assert choose_precision("auto", "tpu") == "32-true"
    if not torch.cuda.is_available():
        with pytest.raises(BrainMVPError, match="no device 'cuda'"):
            choose_precision("auto", "cuda")
