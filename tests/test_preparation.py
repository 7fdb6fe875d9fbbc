"""Preparation: geometry, exact inverse, intensities."""

import numpy as np
import pytest
import torch
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform

from napari_brainmvp.errors import StudyError
from napari_brainmvp.preparation import PreparationSpec, prepare
from napari_brainmvp.preparation.intensity import foreground_mask, normalise
from napari_brainmvp.preparation.resampling import network_grid, resample
from napari_brainmvp.study import Grid, LabelMap, Scan, Study, modality


def rotation(degrees: float) -> np.ndarray:
    a = np.deg2rad(degrees)
    matrix = np.eye(4)
    matrix[:3, :3] = [[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]]
    return matrix


def grid_with(codes: str, shape=(20, 24, 18), spacing=(1.0, 1.0, 1.0), origin=(-7.3, 11.1, 4.0)) -> Grid:
    """A grid of the given axis codes; ``shape`` and ``spacing`` are along its own axes."""
    affine = inv_ornt_aff(ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes)), shape)
    affine[:3, :3] = affine[:3, :3] * np.array(spacing)
    affine[:3, 3] = origin
    return Grid(shape, affine)


def study_on(grid: Grid, seed: int = 0) -> Study:
    rng = np.random.default_rng(seed)
    data = rng.uniform(10, 200, grid.shape).astype(np.float32)
    data[:3] = data[-2:] = 0
    data[:, :4] = 0
    data[..., -5:] = 0
    labels = np.where(data > 0, rng.integers(0, 7, grid.shape), 0).astype(np.uint8)
    return Study("s", {"t1": Scan(modality("t1"), data, grid)}, labels=LabelMap(labels, grid))


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "PIR", "SRA", "ASL"])
@pytest.mark.parametrize("oblique", [False, True])
def test_labels_of_a_1mm_study_come_back_voxel_for_voxel(codes, oblique):
    grid = grid_with(codes)
    if oblique:
        grid = Grid(grid.shape, rotation(12) @ grid.affine)
    study = study_on(grid)
    prepared = prepare(study, ["t1"], PreparationSpec(), with_labels=True)
    assert prepared.grid.axcodes == ("R", "A", "S")
    assert prepared.labels is not None
    np.testing.assert_array_equal(prepared.restore_labels(prepared.labels), study.labels.data)
    onehot = torch.nn.functional.one_hot(prepared.labels.long(), 7).movedim(-1, 0).float()
    np.testing.assert_array_equal(prepared.restore_classes(onehot), study.labels.data)
    inside = prepared.restore_image(prepared.images[0]) > 0
    np.testing.assert_array_equal(inside, study.scans["t1"].data > 0)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.7, 1.2, 5.0), (2.0, 0.5, 0.9)])
@pytest.mark.parametrize("codes", ["RAS", "LIP", "SRA"])
@pytest.mark.parametrize("degrees", [0, 25])
def test_a_ball_stays_where_it_is_in_the_world(codes, spacing, degrees):
    shape = tuple(int(60 / s) for s in spacing)
    grid = grid_with(codes, shape, spacing)
    grid = Grid(grid.shape, rotation(degrees) @ grid.affine)
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    world = grid.to_world(index)
    centre = grid.to_world(np.array(shape) * [0.4, 0.55, 0.5])
    distance = np.linalg.norm(world - centre, axis=-1)
    data = np.where(distance < 14, 100 - distance, 0).astype(np.float32)
    study = Study("ball", {"t2": Scan(modality("t2"), data, grid)})
    prepared = prepare(study, ["t2"], PreparationSpec())
    assert prepared.grid.spacing == pytest.approx((1, 1, 1), abs=1e-6)
    mask = prepared.images[0].numpy() > 0
    found = prepared.grid.to_world(np.argwhere(mask)).mean(0)
    np.testing.assert_allclose(found, centre, atol=0.35 * max(spacing))
    back = prepared.restore_labels(torch.from_numpy(mask.astype(np.int16)))
    truth = data > 0
    dice = 2 * (truth & (back > 0)).sum() / (truth.sum() + (back > 0).sum())
    assert dice > 0.93


def test_scans_on_other_grids_meet_on_the_reference():
    reference = grid_with("RAS", (40, 40, 30))
    other = Grid((30, 34, 8), rotation(17) @ grid_with("LPS", (30, 34, 8), (1.5, 1.4, 4.0), (28, 35, 3)).affine)
    images = {}
    for key, grid in (("t1", reference), ("flair", other)):
        index = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), -1)
        near = np.linalg.norm(grid.to_world(index) - reference.to_world([20, 20, 12]), axis=-1)
        images[key] = Scan(modality(key), np.exp(-((near / 9) ** 2)).astype(np.float32), grid)
    volume = torch.from_numpy(images["flair"].data.copy())
    moved = resample(volume, other, reference)
    peak = np.array(np.unravel_index(int(moved.argmax()), reference.shape))
    assert np.linalg.norm(peak - [20, 20, 12]) < 3


def test_network_grid_covers_the_same_volume():
    grid = grid_with("LPS", (64, 64, 10), (0.9, 0.9, 6.0))
    new = network_grid(grid, 1.0)
    assert new.shape == (58, 58, 60)
    edges_old = sorted(grid.to_world([[-0.5] * 3, np.array(grid.shape) - 0.5])[:, 2])
    edges_new = sorted(new.to_world([[-0.5] * 3, np.array(new.shape) - 0.5])[:, 2])
    np.testing.assert_allclose(edges_new, edges_old, atol=1e-9)


@pytest.mark.parametrize(("slices", "thickness", "count"), [(241, 0.5, 121), (256, 0.4, 103), (240, 0.9375, 225)])
def test_the_last_slice_lies_within_the_network_grid(slices, thickness, count):
    grid = grid_with("RAS", (8, 8, slices), (1.0, 1.0, thickness))
    new = network_grid(grid, 1.0)
    assert new.shape == (8, 8, count)
    back = resample(torch.ones(new.shape), new, grid, "nearest")
    assert back[..., -1].min() == 1


def test_missing_modalities_are_zero_and_none_at_all_is_an_error():
    study = study_on(grid_with("RAS"))
    prepared = prepare(study, ["flair", "t1"], PreparationSpec())
    assert prepared.present == (False, True)
    assert not prepared.images[0].any()
    assert prepared.images[1].any()
    with pytest.raises(StudyError, match="works on flair"):
        prepare(study, ["flair"], PreparationSpec())


def test_an_empty_scan_is_an_error():
    grid = grid_with("RAS")
    study = Study("s", {"t1": Scan(modality("t1"), np.zeros(grid.shape, np.float32), grid)})
    with pytest.raises(StudyError, match="nothing but background"):
        prepare(study, ["t1"], PreparationSpec())


def test_robust_intensities_do_not_depend_on_the_scanner_and_keep_lesions_apart():
    rng = np.random.default_rng(1)
    brain = torch.from_numpy(rng.normal(100, 10, (30, 30, 30)).astype(np.float32))
    brain[:8] = 0
    brain[20:24, 10:14, 10:14] = 220
    brain[24:26, 10:14, 10:14] = 330
    mask = foreground_mask(brain)
    assert int((~mask).sum()) == 8 * 900
    spec = PreparationSpec()
    y = normalise(brain, mask, spec)
    torch.testing.assert_close(normalise(37 * brain, mask, spec), y, rtol=1e-4, atol=1e-4)
    assert abs(float(y[mask].median()) - 1) < 0.02
    assert y[25, 12, 12] > y[22, 12, 12] + 0.1 > 1.5
    assert y[~mask].abs().max() == 0


def test_percentile_intensities_follow_the_paper():
    volume = torch.linspace(0, 1000, 8000).reshape(20, 20, 20)
    mask = torch.ones_like(volume, dtype=torch.bool)
    y = normalise(volume, mask, PreparationSpec(intensity="percentile"))
    p5, p95 = np.percentile(volume.numpy(), [5, 95])
    np.testing.assert_allclose(y.numpy(), (volume.numpy() - p5) / (p95 - p5), atol=1e-4)
    clipped = normalise(volume, mask, PreparationSpec(intensity="percentile", clip=True))
    assert clipped.min() == 0
    assert clipped.max() == 1


def test_noise_in_the_air_is_not_foreground():
    rng = np.random.default_rng(2)
    volume = np.abs(rng.normal(0, 4, (40, 40, 40))).astype(np.float32)
    volume[10:30, 10:30, 10:30] += 150
    mask = foreground_mask(torch.from_numpy(volume))
    assert int(mask.sum()) == 20**3
