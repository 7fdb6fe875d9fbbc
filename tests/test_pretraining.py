"""Pre-training: the formulas against small numpy versions, and real runs, killed and resumed."""

import csv
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import nrrd
import numpy as np
import psutil
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conftest import ordinary_user, save
from napari_brainmvp.cli.pretraining import chosen_spec, sources
from napari_brainmvp.errors import BrainMVPError, Cancelled, FileError, ModelError, StudyError
from napari_brainmvp.io import find_studies, read_datalist
from napari_brainmvp.jobs import left_out
from napari_brainmvp.models import find_model, load_model
from napari_brainmvp.networks import EncoderSpec, ModalityTemplates, ReconstructionNetwork, SegmentationNetwork
from napari_brainmvp.preparation import PreparationSpec
from napari_brainmvp.progress import CancelToken
from napari_brainmvp.training.cache import CachedStudy, cache_studies
from napari_brainmvp.training.cache_space import shrink_cache
from napari_brainmvp.training.checkpoints import has_checkpoint, last_checkpoint, save_checkpoint
from napari_brainmvp.training.loop import drop_rows, hold_run, log_row
from napari_brainmvp.training.pretraining.data import CropStream, Dataset, collect
from napari_brainmvp.training.pretraining.engine import pretrain
from napari_brainmvp.training.pretraining.model import PretrainingModel, Views, unseen
from napari_brainmvp.training.pretraining.spec import RECIPES, DataSource, PretrainingSpec, read_spec
from napari_brainmvp.training.pretraining.survey import estimate, measure_pace
from napari_brainmvp.training.pretraining.tasks import (
    block_mask,
    error_likelihood,
    info_nce,
    psnr,
    reconstruction_loss,
)

SMALL = {
    "crop": 32,
    "batch": 2,
    "held_out": 1,
    "minutes": 0.0,
    "validate_every": 4,
    "precision": "32-true",
    "accelerator": "cpu",
}
COMMAND = [str(Path(sys.executable).parent / "brainmvp")]


def ellipsoid(seed: int, contrast: float) -> np.ndarray:
    """A head of two tissues with its own shape; each modality gives the tissues other intensities."""
    rng = np.random.default_rng(seed)
    where = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in (44, 48, 40)), indexing="ij"))
    radius = np.sqrt((where**2 / rng.uniform(0.6, 0.9, (3, 1, 1, 1))).sum(0))
    inner = radius < rng.uniform(0.4, 0.6)
    noise = np.random.default_rng(seed + 100).normal(0, 0.03, radius.shape)
    return (np.where(radius < 1, 100 + contrast * 60 * inner + 100 * noise, 0)).clip(0).astype(np.float32)


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    """Six studies of one to three modalities, as NIfTI."""
    root = tmp_path / "studies"
    for seed in range(6):
        name = f"sub-{seed:02d}"
        for key, contrast in {"t1": 1.0, "t2": -1.0, "flair": -0.5}.items():
            if seed == 5 and key != "t1":
                continue  # a study of a single modality
            save(root / name / f"{name}_{key}.nii.gz", ellipsoid(seed, contrast))
    return root


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def spec_for(studies: Path, **changes) -> PretrainingSpec:
    return PretrainingSpec(**{"data": (DataSource(path=str(studies)),), "max_steps": 4, **SMALL, **changes})


# --- formulas ---------------------------------------------------------------------------------------------------


def test_block_mask_hides_exactly_the_rate_in_whole_blocks():
    rates = torch.tensor([0.0, 0.3, 0.875, 1.0])
    mask = block_mask(rates, 32, torch.Generator().manual_seed(1))
    assert mask.shape == (4, 1, 32, 32, 32)
    assert mask.dtype == torch.bool
    blocks = mask.numpy().reshape(4, 4, 8, 4, 8, 4, 8).transpose(0, 1, 3, 5, 2, 4, 6).reshape(4, 64, 512)
    assert ((blocks.sum(2) == 0) | (blocks.sum(2) == 512)).all()
    assert (blocks.any(2).sum(1) == np.round(rates.numpy() * 64)).all()
    again = block_mask(rates, 32, torch.Generator().manual_seed(1))
    assert torch.equal(mask, again)
    other = block_mask(rates, 32, torch.Generator().manual_seed(2))
    assert not torch.equal(mask, other)


def test_reconstruction_loss_is_the_mean_over_hidden_voxels_however_they_are_spread():
    rng = np.random.default_rng(0)
    made, truth = rng.normal(size=(2, 4, 1, 4, 4, 4)).astype(np.float32)
    mask = rng.random((4, 1, 4, 4, 4)) < np.array([0.2, 0.8, 0.0, 0.5]).reshape(4, 1, 1, 1, 1)
    expected = ((made - truth) ** 2)[mask].mean()
    parts = [torch.from_numpy(part) for part in (made, truth, mask)]
    assert float(reconstruction_loss(*parts)) == pytest.approx(expected, rel=1e-5)
    counts = parts[2].flatten(1).sum(1).float()
    two = [reconstruction_loss(*(part[k::2] for part in parts), lambda _: counts) for k in (0, 1)]  # two processes
    assert np.mean([float(loss) for loss in two]) == pytest.approx(expected, rel=1e-5)
    everywhere = reconstruction_loss(parts[0], parts[1], None)
    assert float(everywhere) == pytest.approx(((made - truth) ** 2).mean(), rel=1e-5)
    assert float(reconstruction_loss(parts[0], parts[1], torch.zeros(4, 1, 4, 4, 4) > 0)) == 0


def test_info_nce_is_the_symmetric_cross_entropy_of_cosines():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 5, 7))
    unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (a, b)]
    scores = unit[0] @ unit[1].T / 0.3

    def entropy(s):
        return -np.mean(np.diag(s) - np.log(np.exp(s).sum(1)))

    expected = (entropy(scores) + entropy(scores.T)) / 2
    assert float(info_nce(torch.from_numpy(a), torch.from_numpy(b), 0.3)) == pytest.approx(expected, rel=1e-5)
    assert float(info_nce(torch.ones(1, 4), torch.ones(1, 4), 0.3)) == 0


def test_another_crop_of_the_same_study_is_no_negative(studies):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 5, 7))
    unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (a, b)]
    study = np.array([3, 8, 3, 5, 8])
    kept = np.exp(unit[0] @ unit[1].T / 0.3) * ((study[:, None] != study) | np.eye(5, dtype=bool))
    shares = [np.log(np.diag(kept) / kept.sum(axis)) for axis in (0, 1)]
    found = info_nce(torch.from_numpy(a), torch.from_numpy(b), 0.3, torch.from_numpy(study))
    assert float(found) == pytest.approx(-np.mean(shares), rel=1e-5)
    assert float(info_nce(torch.ones(2, 4), torch.ones(2, 4), 0.3, torch.tensor([5.0, 5]))) == 0
    spec = spec_for(studies, batch=8)
    datasets, _, _ = collect(spec, studies.parent / "cache")
    stream = CropStream([*datasets, *datasets], spec)
    count = len(datasets[0].studies)
    batch = stream.batch(0)
    for row, number in zip(batch["scans"], batch["study"].tolist(), strict=True):
        of = datasets[0].studies[number % count]
        known = np.unique(np.asarray(of.volumes))
        assert np.isin(np.unique(row.numpy()), [0, *known]).all()
    assert batch["study"].max() >= count > batch["study"].min()


def test_error_likelihood_is_least_where_the_variance_is_the_squared_error():
    truth, made = torch.zeros(1, 1, 4, 4, 4), torch.full((1, 1, 4, 4, 4), 0.5, requires_grad=True)
    values = {
        s: float(error_likelihood(torch.full_like(truth, s), made, truth, None)) for s in np.log([0.1, 0.25, 0.6])
    }
    assert min(values, key=values.get) == np.log(0.25)
    assert values[np.log(0.25)] == pytest.approx(0.5 * (1 + np.log(0.25)))
    assert not error_likelihood(torch.zeros_like(truth), made, truth, None).requires_grad


def batch_of_two(spec: PretrainingSpec) -> dict[str, torch.Tensor]:
    """Two studies of T1 and T2 whose head is the lower half of the crop."""
    scans = torch.rand(2, 3, 16, 16, 16) + 0.5
    scans[..., 8:] = 0
    scans[:, 2] = 0
    place = torch.tensor([[-0.5] * 3] * 2)
    present = torch.tensor([[True, True, False]] * 2)
    index = {"target": torch.tensor([0, 0]), "other": torch.tensor([1, 1])}
    index["study"] = torch.arange(len(scans))
    return {"scans": scans, "present": present, "start": place, "stop": -place, "number": torch.tensor(0), **index}


def test_templates_are_distilled_inside_the_head_and_only_those_that_are_there():
    spec = PretrainingSpec(modalities=("t1", "t2", "flair"), crop=16, batch=2)
    model = PretrainingModel(spec)
    batch = batch_of_two(spec)
    with torch.no_grad():
        model.templates.volumes.fill_(1.0)
    found = model(batch, 0.0)["distillation"]
    inside = (1 - batch["scans"][:, :2, ..., :8]).square().mean()
    assert float(found.detach()) == pytest.approx(float(inside), rel=1e-5)


def test_a_template_is_normalised_by_its_own_extremes():
    spec = PretrainingSpec(modalities=("t1", "t2", "flair"), crop=16, batch=2, distillation=0, template_minmax=True)
    model = PretrainingModel(spec)
    batch = batch_of_two(spec) | {"target": torch.tensor([1, 0])}
    with torch.no_grad():
        model.templates.volumes.copy_(torch.randn(3, 36, 44, 38) * torch.tensor([1.0, 5.0, 0.1])[:, None, None, None])
        shown = model.views(batch, 0.0).template
        plain = model.templates.crop(batch["target"][:, None], batch["start"], batch["stop"], 16)
    for row, target in enumerate((1, 0)):
        volume = model.templates.volumes[target].detach()
        expected = (plain[row] - volume.min()) / (volume.max() - volume.min())
        torch.testing.assert_close(shown[row], expected)


def test_the_head_is_where_any_modality_is_not_0_be_it_negative():
    spec = PretrainingSpec(modalities=("t1", "t2", "flair"), crop=16, batch=2)
    batch = batch_of_two(spec)
    batch["scans"] = batch["scans"] * torch.tensor([0.0, -1.0, 0.0])[:, None, None, None]
    head = PretrainingModel(spec).views(batch, 0.0).head
    assert head[..., :8].all()
    assert not head[..., 8:].any()


@pytest.mark.parametrize("all_targets", [True, False])
def test_one_target_or_all_of_a_study_train_their_outputs(all_targets):
    spec = PretrainingSpec(modalities=("t1", "t2", "flair"), crop=16, batch=2, all_targets=all_targets)
    model = PretrainingModel(spec)
    model(batch_of_two(spec), 0.0)["loss"].backward()
    rows = model.network.decoder.out.conv.conv.weight.grad.flatten(1).abs().sum(1) > 0
    assert rows.tolist() == [True, all_targets, False] * 2  # means, then log variances; there is no FLAIR


def test_features_are_held_by_their_mean_square():
    spec = PretrainingSpec(modalities=("t1", "t2", "flair"), crop=16, batch=2, activation=0.5)
    torch.manual_seed(0)
    model = PretrainingModel(spec)
    batch = batch_of_two(spec)
    with torch.no_grad():
        held = model(batch, 0.0)
        model.spec = spec.model_copy(update={"activation": 0.0})
        free = model(batch, 0.0)
        stages = model.network.encode(model.views(batch, 0.0).shown)[1:4]
    expected = np.mean([np.mean(maps.numpy().astype(float) ** 2) for maps in stages])
    assert float(held["activation"]) == pytest.approx(expected, rel=1e-4)
    assert float(held["loss"] - free["loss"]) == pytest.approx(0.5 * expected, rel=1e-3)
    assert "activation" not in free


@pytest.mark.parametrize("distillation", [0.0, 1.0])
@pytest.mark.parametrize("progress", [0.1, 0.6])
def test_a_view_shows_the_template_or_another_modality_exactly_where_it_hides_the_image(distillation, progress):
    keys = ("t1", "t2", "flair")
    spec = PretrainingSpec(modalities=keys, crop=16, batch=2, other_from=0.5, distillation=distillation, seed=3)
    model = PretrainingModel(spec)
    batch = batch_of_two(spec) | {"target": torch.tensor([0, 1]), "other": torch.tensor([1, 1])}  # the second has one
    with torch.no_grad():
        model.templates.volumes.normal_()
        found = model.views(batch, progress)
        places = [[batch[name][k : k + 1] for name in ("start", "stop")] for k in (0, 1)]
        volumes = [model.templates.crop(batch["target"][k : k + 1, None], *places[k], 16) for k in (0, 1)]
    scans, masks = batch["scans"].numpy(), found.masks.numpy()
    assert 0.4 < masks[:2].mean() < 1
    for row in range(4):
        study, view_b = row % 2, row >= 2
        target = (0, 1)[study]
        replaced = view_b and study == 0 and progress >= 0.5
        instead = scans[study, 1] if replaced else volumes[study][0, 0].numpy()
        expected = np.where(masks[row, 0], instead, scans[study, target])
        np.testing.assert_allclose(found.shown[row, 0].numpy(), expected, rtol=1e-6)
        assert int(found.source[row]) == (1 if replaced else len(keys))
    np.testing.assert_array_equal(found.image[:, 0].numpy(), scans[[0, 1], [0, 1]])


def test_psnr_in_decibels():
    target = torch.full((2, 2, 2), 2.0)
    assert psnr(target - 0.02, target, target > 0) == pytest.approx(40.0, abs=1e-3)
    assert np.isnan(psnr(target, target, target > 5))


def test_template_crops_are_samples_at_the_same_places_and_carry_gradients():
    templates = ModalityTemplates(("t1", "t2"), (5, 6, 7))
    with torch.no_grad():
        templates.volumes.copy_(torch.randn(2, 5, 6, 7))
    start, stop = torch.tensor([[-0.9, -1.2, 0.5]]), torch.tensor([[0.1, 0.7, -0.5]])  # beyond the box, and mirrored
    axes = [torch.linspace(float(a), float(b), 8) for a, b in zip(start[0], stop[0], strict=True)]
    where = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)[None]
    crop = templates.crop(torch.tensor([[1]]), start, stop, 8)
    torch.testing.assert_close(crop, templates.sample(torch.tensor([1]), where))
    every = templates.crop(None, start, stop, 8)
    torch.testing.assert_close(every[:, 1:], crop)
    crop.sum().backward()
    assert templates.volumes.grad[1].sum() == pytest.approx(512, rel=1e-4)
    assert templates.volumes.grad[0].abs().sum() == 0


def test_conditions_change_nothing_at_first_and_everything_but_the_output_transfers():
    spec = EncoderSpec(channels=(8, 16, 32, 32), head_size=16, depths=(1, 1, 1, 1))
    network = ReconstructionNetwork(("t1", "t2"), spec, 8).eval()
    x, flair = torch.randn(1, 1, 16, 32, 48), torch.tensor([1])
    sources = [torch.tensor([k]) for k in (0, 1, network.template_source)]
    first, second, third = (network.reconstruct(x, flair, k) for k in sources)
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(first, third)
    with torch.no_grad():
        network.conditions[3].norm1.embedding.weight[1] = 1.0
    assert not torch.allclose(first, network.reconstruct(x, flair, sources[1]))
    torch.testing.assert_close(first, network.reconstruct(x, flair, sources[0]))
    state = network.state_dict()
    for key, value in SegmentationNetwork(1, 4, spec, 8, deep_supervision=False).state_dict().items():
        assert state[key].shape == value.shape


def test_a_modality_is_learned_wherever_it_is_not_shown_inside_the_head():
    present = torch.tensor([[True, True, False], [True, True, True]])
    head = torch.zeros(2, 1, 16, 16, 16, dtype=torch.bool)
    head[..., :12] = True
    masks = torch.zeros(4, 1, 16, 16, 16, dtype=torch.bool)
    masks[:, :, :8] = True
    # study 0 has t1 and t2, study 1 all; t1 is wanted; views A show the template, views B t2 and FLAIR
    views = Views(
        head.float(), head.float(), head, head.float(), head.float(), masks.float(), masks, torch.tensor([3, 3, 1, 2])
    )
    batch = {"present": present, "target": torch.tensor([0, 0])}
    found = unseen(views, batch).float().mean((2, 3, 4))
    half, all_ = 0.5 * 0.75, 0.75
    expected = [[half, all_, 0], [half, all_, all_], [half, half, 0], [half, all_, half]]
    torch.testing.assert_close(found, torch.tensor(expected))


@pytest.mark.parametrize("frame", ["box", "centred"])
def test_a_crop_reads_the_template_at_its_own_place_mirrored_or_not(tmp_path, frame):
    """A volume that holds its own coordinates, under a template that does: both must say the same."""
    shape, size = (40, 48, 36), (41, 49, 61) if frame == "centred" else (40, 48, 36)
    span = np.array(size if frame == "centred" else shape)
    index = np.stack(np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in shape), indexing="ij"))
    np.save(tmp_path / "x.npy", (index + 100).astype(np.float16))  # voxels from the middle; + 100, as 0 is outside
    keys = ("t1", "t2", "flair")  # along right, anterior, superior
    study = CachedStudy("x", keys, tmp_path / "x.npy")
    spec = PretrainingSpec(modalities=keys, crop=16, batch=2, template_frame=frame, template_shape=size, seed=2)
    templates = ModalityTemplates(keys, size)
    grid = np.stack(np.meshgrid(*(np.linspace(-(n - 1) / 2, (n - 1) / 2, n) for n in span), indexing="ij"))
    with torch.no_grad():
        templates.volumes.copy_(torch.from_numpy(grid + 100))
    stream = CropStream([Dataset((study,), 1.0)], spec)
    mirrored = set()
    for number in range(12):
        sample = stream.sample(number)
        scans = sample["scans"].float()
        place = templates.crop(None, sample["start"][None], sample["stop"][None], 16)[0].detach()
        inside = (scans != 0).all(0)
        assert inside.any()
        torch.testing.assert_close(place[:, inside], scans[:, inside], atol=0.1, rtol=0)
        along = scans[0][inside.any(2).any(1)].amax((1, 2))
        mirrored.add(bool(along[0] > along[-1]))
    assert mirrored == {True, False}


# --- data -------------------------------------------------------------------------------------------------------


def test_a_bad_study_is_named_and_skipped_and_a_changed_one_prepared_again(studies, tmp_path):
    broken = studies / "sub-02" / "sub-02_t2.nii.gz"
    broken.write_bytes(broken.read_bytes()[:900])
    cache = tmp_path / "cache"
    good, bad = cache_studies(find_studies(studies), cache, PreparationSpec())
    assert [p.name for p in bad] == ["sub-02"]
    assert "sub-02_t2.nii.gz" in bad[0].reason
    assert len(good) == 5
    assert good[0].volumes.dtype == np.float16
    assert good[-1].modalities == ("t1",)
    written = {p: p.stat().st_mtime_ns for p in cache.glob("*.npy")}
    save(studies / "sub-00" / "sub-00_t1.nii.gz", ellipsoid(77, 1.0))
    anew, _ = cache_studies(find_studies(studies), cache, PreparationSpec())
    assert anew[0].path != good[0].path
    assert {p: p.stat().st_mtime_ns for p in written} == written, "unchanged studies are not prepared again"
    half = good[1].path
    half.write_bytes(half.read_bytes()[:100])
    healed, _ = cache_studies(find_studies(studies), cache, PreparationSpec())
    assert healed[1].volumes.shape == anew[1].volumes.shape


def test_changed_voxels_beside_a_header_are_prepared_again(tmp_path):
    path, header = tmp_path / "sub-1" / "sub-1_t1.nhdr", {"space": "RAS", "space origin": [0, 0, 0]}
    path.parent.mkdir()
    made = []
    for seed in (0, 1):
        nrrd.write(str(path), ellipsoid(seed, 1.0), header | {"space directions": np.eye(3)}, detached_header=True)
        ((study,), _) = cache_studies(find_studies(tmp_path / "sub-1"), tmp_path / "cache", PreparationSpec())
        made.append((path.read_bytes(), study.path))
    assert made[0][0] == made[1][0]
    assert made[0][1] != made[1][1]


def age(path: Path, days: float, size: int = 0) -> Path:
    """Let a file have been used so long ago, and be so large, without taking the space."""
    path.touch()
    os.truncate(path, max(size, path.stat().st_size))
    os.utime(path, (0, time.time() - days * 86400))
    return path


def test_the_usual_cache_forgets_what_no_run_uses(studies, tmp_path, home):
    cache, files = home / "prepared", find_studies(studies)
    kept, _ = cache_studies(files, cache, PreparationSpec())
    large = shutil.disk_usage(cache).free // 2
    for number, days in enumerate((6, 8, 30)):
        age(cache / f"{number}.npy", days, large)
    for path in [study.path for study in kept] + [*cache.glob("*.json")]:
        age(path, 90)
    (tmp_path / "named").mkdir()
    named = age(tmp_path / "named" / "old.npy", 90, large)
    pretrain(spec_for(studies, max_steps=1), tmp_path / "one", cache=named.parent)
    assert named.exists()
    assert len(list(cache.glob("?.npy"))) == 3
    pretrain(spec_for(studies, max_steps=1), tmp_path / "two")
    assert [path.name for path in cache.glob("?.npy")] == ["0.npy"]  # used within a week, however large
    again, _ = cache_studies(files, cache, PreparationSpec())
    assert all(study.path.stat().st_mtime > time.time() - 3600 for study in again)
    (cache / "0.npy").unlink()
    small = age(cache / "1.npy", 90, 1000)
    shrink_cache(cache)
    assert small.exists()  # there is room


def test_what_a_long_run_reads_stays(studies, home):
    (study, *_), _ = cache_studies(find_studies(studies), home / "prepared", PreparationSpec())
    age(study.path, 20)
    age(home / "prepared" / "0.npy", 10, shutil.disk_usage(home).free)
    assert study.volumes.any()
    shrink_cache(home / "prepared")
    assert study.path.exists()
    assert not (home / "prepared" / "0.npy").exists()


def test_several_processes_prepare_the_same_and_end_when_asked_or_killed(studies, tmp_path):
    broken = studies / "sub-02" / "sub-02_t2.nii.gz"
    broken.write_bytes(broken.read_bytes()[:900])
    found, seen = find_studies(studies), []
    good, bad = cache_studies(found, tmp_path / "one", PreparationSpec())
    same, also = cache_studies(found, tmp_path / "two", PreparationSpec(), lambda p: seen.append(p.done), workers=2)
    assert seen == [1, 2, 3, 4, 5, 6]
    assert [p.name for p in also] == [p.name for p in bad] == ["sub-02"]
    assert [(s.name, s.path.read_bytes()) for s in same] == [(s.name, s.path.read_bytes()) for s in good]
    token = CancelToken()
    with pytest.raises(Cancelled):
        cache_studies(found * 20, tmp_path / "three", PreparationSpec(), lambda p: token.cancel(), token, workers=2)

    def kill(progress):
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # one that has ended by itself, a zombie among them
                if "spawn_main" in " ".join(child.cmdline()):
                    child.kill()

    with pytest.raises(FileError, match="fewer workers"):
        cache_studies(found * 20, tmp_path / "four", PreparationSpec(), kill, workers=2)


def test_renamed_studies_are_found_again_under_their_new_names(studies, tmp_path):
    first, _ = cache_studies(find_studies(studies)[:1], tmp_path / "cache", PreparationSpec())
    (studies / "sub-00").rename(studies / "patient-7")
    again, _ = cache_studies(find_studies(studies)[:1], tmp_path / "cache", PreparationSpec())
    assert again[0].path == first[0].path
    assert (first[0].name, again[0].name) == ("sub-00", "patient-7")


def test_any_number_of_studies_is_read_with_few_file_descriptors(tmp_path):
    np.save(tmp_path / "0.npy", np.ones((2, 80, 96, 80), np.float16))
    for number in range(1, 200):
        (tmp_path / f"{number}.npy").hardlink_to(tmp_path / "0.npy")
    code = (
        "import resource, statistics, sys, time; from pathlib import Path; import numpy as np\n"
        "from napari_brainmvp.training.cache import CachedStudy\n"
        "from napari_brainmvp.training.pretraining.data import read_sample\n"
        "from napari_brainmvp.training.pretraining.spec import PretrainingSpec\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))\n"
        "spec, start, took = PretrainingSpec(), np.array([20, 20, 20]), []\n"
        "studies = [CachedStudy(str(k), ('t1', 't2'), Path(sys.argv[1]) / f'{k}.npy') for k in range(200)]\n"
        "for study in studies:\n"
        "    began = time.process_time()\n"
        "    sample = read_sample(study, spec, start, 't1', 't2')\n"
        "    took.append(time.process_time() - began)\n"
        "    assert sample['scans'].sum() == 2 * 32**3\n"
        "print(statistics.median(took))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.005  # seconds of the processor, as other tests run meanwhile


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_processes_that_prepare_end_with_the_one_that_started_them(tmp_path):
    script = tmp_path / "prepare.py"
    script.write_text(
        "import os, sys, time; from pathlib import Path; from napari_brainmvp.training.workers import each\n"
        "def work(folder):\n"
        "    (Path(folder) / f'pid-{os.getpid()}').touch(); time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    list(each(work, sys.argv[1:] * 4, 2, None))\n"
    )
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(found := list(tmp_path.glob("pid-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(found) == 2
    parent.kill()
    parent.wait()
    left = {int(path.name[4:]) for path in found}
    while left and time.monotonic() < deadline:
        time.sleep(0.1)
        left = {pid for pid in left if _runs(pid)}
    assert not left


def _runs(pid: int) -> bool:
    """Tell whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_dicom_folder_that_cannot_be_read_is_a_problem_of_its_study(studies, tmp_path):
    files = find_studies(studies)[0]
    gone = replace(files, scans=files.scans | {"adc": tmp_path / "gone"})
    closed = tmp_path / "dicom"
    closed.mkdir()
    closed.joinpath("1.dcm").touch()
    with ordinary_user(closed):
        shut = replace(files, name="shut", scans={"adc": closed})
        good, bad = cache_studies([gone, shut], tmp_path / "cache", PreparationSpec())
    assert good == []
    assert [p.name for p in bad] == ["sub-00", "shut"]
    assert "cannot be read" in bad[1].reason


def test_datalists_as_the_authors_write_them(studies, tmp_path):
    listed = [
        {"image": [f"studies/sub-0{k}/sub-0{k}_{m}.nii.gz" for m in ("flair", "t1", "t1", "t2")], "label": "x.nii.gz"}
        for k in range(3)
    ]
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"training": listed, "validation": [{"image": ["../../etc/t1.nii.gz"]}]}))
    found, problems = read_datalist(path)
    assert [sorted(s.scans) for s in found] == [["flair", "t1", "t2"]] * 3
    assert len(problems) == 1
    assert "outside" in problems[0][1]
    spec = spec_for(studies, data=(DataSource(path=str(path)),))
    datasets, held_out, left_out = collect(spec, tmp_path / "cache")
    assert (len(datasets[0].studies), len(held_out), len(left_out)) == (2, 1, 1)


def test_batches_do_not_depend_on_who_reads_them(studies, tmp_path):
    spec = spec_for(studies, batch=4, contrast=0.1)
    datasets, _, _ = collect(spec, tmp_path / "cache")
    assert isinstance(datasets[0], Dataset)
    whole = CropStream(datasets, spec).batch(7)
    halves = [CropStream(datasets, spec.model_copy(update={"batch": 2}), 0, rank, 2).batch(7) for rank in (0, 1)]
    for key in ("scans", "present", "other", "target", "start"):
        joined = torch.stack([halves[0][key], halves[1][key]], 1).flatten(0, 1)
        assert torch.equal(joined, whole[key])
    loader = torch.utils.data.DataLoader(CropStream(datasets, spec, 5), batch_size=None, num_workers=2)
    assert [int(b["number"]) for b, _ in zip(loader, range(5), strict=False)] == [5, 6, 7, 8, 9]


def test_no_study_at_all_says_why(tmp_path, studies):
    for path in studies.rglob("*.nii.gz"):
        path.write_bytes(b"not an image")
    with pytest.raises(StudyError, match="sub-00"):
        collect(spec_for(studies), tmp_path / "cache")


# --- specification ----------------------------------------------------------------------------------------------


def test_recipes_and_files_and_flags(tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text("recipe: release\ncrop: 64\n")
    spec = read_spec(path, None, {"max_steps": 5})
    assert (spec.crop, spec.max_steps, spec.mask_rate, spec.from_template) == (64, 5, (0.8, 0.8), 10.0)
    assert all(PretrainingSpec(**changes) for changes in RECIPES.values())
    for content, word in (("crop: 33\n", "crop"), ("- 1\n", "name: value"), ("nonsense: 1\n", "nonsense")):
        path.write_text(content)
        with pytest.raises(BrainMVPError, match=word):
            read_spec(path, None, {})
    with pytest.raises(BrainMVPError, match="release"):
        read_spec(None, "best", {})


def test_a_dataset_is_written_in_a_file_as_on_the_command_line(tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text("data: [studies@3, 'synthetic:5', {path: list.json, base: /data}]\n")
    named = [DataSource(path="studies", weight=3), DataSource(path="synthetic:5")]
    assert read_spec(path, None, {}).data == (*named, DataSource(path="list.json", base="/data"))
    assert sources(["studies@3", "synthetic:5"], "") == tuple(named)
    path.write_text("data: [studies@0]\n")
    with pytest.raises(BrainMVPError, match="weight"):
        read_spec(path, None, {})


def test_the_same_settings_may_be_said_again_to_a_resumed_run_but_not_others(studies, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    started = chosen_spec(None, None, "default", {"data": sources(["studies"], ""), "crop": 64}, resume=False)
    assert started.data[0].path == str(studies)
    run = tmp_path / "run"
    run.mkdir()
    (run / "spec.json").write_text(started.model_dump_json())
    file = tmp_path / "spec.yaml"
    file.write_text("recipe: default\ncrop: 64\ndata: [studies]\n")

    def resume(path: Path | None = None, recipe: str = "", **changes) -> PretrainingSpec:
        return chosen_spec(run, path, recipe, changes, resume=True)

    rates, keys = list(started.mask_rate), list(started.modalities)
    assert resume(modalities=keys, mask_rate=rates, held_out="4", data=("studies",)) == started
    assert resume(file) == started
    assert resume(None, "default", crop=64, workers=2).workers == 2
    for path, recipe, changes, word in (
        (None, "", {"modalities": ["t1", "t2"]}, "modalities"),
        (None, "compact", {"crop": 64}, "encoder"),
        (None, "default", {}, "crop"),  # whose crop is 96
        (None, "", {"data": ("synthetic:3",)}, "data"),
        (None, "", {"crop": 33}, "crop"),
        (None, "", {"nonsense": 1}, "nonsense"),
    ):
        with pytest.raises(BrainMVPError, match=word):
            resume(path, recipe, **changes)
    file.write_text("crop: 32\n")
    with pytest.raises(BrainMVPError, match="keeps its crop of 64:"):
        resume(file)
    with pytest.raises(BrainMVPError, match="holds no run to resume"):
        chosen_spec(tmp_path / "nothing", None, "", {}, resume=True)


@pytest.mark.parametrize("recipe", ["paper", "release"])
def test_the_published_recipes_train_the_published_network(studies, tmp_path, recipe):
    changes = {**RECIPES[recipe], **SMALL, "batch": 2, "encoder": "compact", "template_shape": (60, 60, 40)}
    spec = PretrainingSpec(data=(DataSource(path=str(studies)),), max_steps=2, **changes)
    model = PretrainingModel(spec)
    datasets, _, _ = collect(spec, tmp_path / "cache")
    losses = model(CropStream(datasets, spec).batch(0), 1.0)
    weights = {"template": spec.from_template, "other": 1.0, "contrast": 1.0}
    assert set(losses) == {*weights, "loss"}
    values = {k: float(v.detach()) for k, v in losses.items()}
    assert values["loss"] == pytest.approx(sum(w * values[k] for k, w in weights.items()), rel=1e-5)
    losses["loss"].backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert unused == []


# --- runs -------------------------------------------------------------------------------------------------------


def test_overfitting_a_few_studies_reconstructs_them_and_distils_the_mean(studies, tmp_path):
    shutil.rmtree(studies / "sub-05")
    shutil.rmtree(studies / "sub-04")
    spec = spec_for(
        studies, max_steps=90, validate_every=1000, minutes=60.0, held_out=0, modalities=("t1", "t2"), crop=16, batch=8,
        average=0.9, whole=0.0, learning_rate=2e-3, template_rate=0.1, template_shape=(12, 12, 12), warm_up=10,
    )  # fmt: skip
    run, cache = tmp_path / "run", tmp_path / "cache"
    folder = pretrain(spec, run, cache=cache)
    losses = rows(run / "metrics.csv")
    early, late = (np.mean([float(r["template"]) for r in part]) for part in (losses[:5], losses[-20:]))
    assert 10 * np.log10(early / late) > 6
    loaded = load_model(find_model(folder), "pretraining")
    datasets, _, _ = collect(spec, cache)
    middles = [s.volumes[s.modalities.index("t1")].astype(np.float32) for s in datasets[0].studies]
    mean = np.mean([m[tuple(n // 2 for n in m.shape)] for m in middles])
    assert loaded.templates.volumes[0][6, 6, 6] == pytest.approx(mean, rel=0.25)  # from 0


def test_a_killed_run_resumes_to_the_same_curve(studies, tmp_path, home):
    options = [f"--set={k}={v}" for k, v in {**SMALL, "crop": 16}.items()] + ["--max-steps=8", "--data", studies.name]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # several may add up in another order once in a while

    def start(run, *more, folder=tmp_path):
        command = [*COMMAND, "pretrain", "--out", str(run), *more]
        return subprocess.Popen(command, stderr=subprocess.PIPE, env=one_thread, cwd=folder)

    options += ["--cache", "cache"]
    whole = start(tmp_path / "whole", *options)
    assert whole.wait(240) == 0, whole.stderr.read().decode()
    killed = tmp_path / "killed"
    process = start(killed, "--resume", *options)  # the same command starts and resumes, as clusters need it
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(killed.glob("checkpoint-*3.pt")):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert last_checkpoint(killed)["step"] < 8
    refused = start(killed, *options)
    assert refused.wait(120) == 2
    assert b"resume" in refused.stderr.read()
    resumed = start(killed, "--resume", folder=elsewhere)  # data and cache were named from another folder
    assert resumed.wait(240) == 0, resumed.stderr.read().decode()
    assert not (home / "prepared").exists()
    one, two = rows(tmp_path / "whole" / "metrics.csv"), rows(killed / "metrics.csv")
    assert [r["step"] for r in two] == [str(k) for k in range(1, 9)]
    for a, b in zip(one, two, strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-4)
    assert find_model("killed").card.task == "pretraining"


def test_two_processes_compute_what_one_does(studies, tmp_path, home):
    options = [f"--set={k}={v}" for k, v in {**SMALL, "held_out": 0}.items()] + [
        "--max-steps=3",
        "--data",
        str(studies),
    ]
    curves = []
    for name, more in {
        "one": ["--set", "batch=4"],
        "two": ["--set", "batch=2", "--devices", "2", "--strategy", "ddp"],
    }.items():
        out = ["--out", str(tmp_path / name), "--cache", str(tmp_path / "cache")]
        done = subprocess.run(
            [*COMMAND, "pretrain", *out, *options, *more], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("Pre-training: 3 of 3") == 1  # one process speaks
        curves.append([float(r["loss"]) for r in rows(tmp_path / name / "metrics.csv")])
    assert curves[0] == pytest.approx(curves[1], rel=2e-3)


def test_asking_one_of_two_processes_to_stop_stops_both_after_a_checkpoint(studies, tmp_path, home):
    run = tmp_path / "run"
    options = [f"--set={k}={v}" for k, v in {**SMALL, "held_out": 0, "minutes": 60}.items()] + ["--max-steps=100000"]
    two = ["--devices", "2", "--strategy", "ddp", "--data", str(studies), "--cache", str(tmp_path / "cache")]
    process = subprocess.Popen([*COMMAND, "pretrain", "--out", str(run), *options, *two], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (run / "metrics.csv").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)  # to the first alone
    assert process.wait(60) == 130, process.stderr.read().decode()
    assert last_checkpoint(run)["step"] == len(rows(run / "metrics.csv"))


def test_no_process_ends_before_the_checkpoint_is_written(tmp_path):
    script = tmp_path / "slow.py"
    script.write_text(
        "import sys, time; from pathlib import Path; from lightning.fabric import Fabric\n"
        "from napari_brainmvp.errors import Cancelled; from napari_brainmvp.progress import CancelToken, no_progress\n"
        "from napari_brainmvp.training.pretraining.run import Run\n"
        "from napari_brainmvp.training.pretraining.spec import PretrainingSpec\n"
        "class OnASlowDisk(Run):\n"
        "    def save(self, step):\n"
        "        time.sleep(2); super().save(step)\n"
        "fabric = Fabric(accelerator='cpu', devices=2, strategy='ddp'); fabric.launch()\n"
        "folder, token = Path(sys.argv[1]), CancelToken(); token.cancel()\n"
        "try:\n"
        "    OnASlowDisk(fabric, PretrainingSpec(crop=16, batch=2), folder, []).train([], 0, no_progress, token)\n"
        "except Cancelled:\n"
        "    (folder / f'rank-{fabric.global_rank}').write_text(str(len(list(folder.glob('checkpoint-*.pt')))))\n"
    )
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in (0, 1)] == ["1", "1"]


def test_an_update_that_is_not_finite_is_skipped_and_ten_end_the_run(studies, tmp_path, caplog):
    spec = spec_for(studies, batch=1, contrast=0, held_out=0, max_steps=12, minutes=60.0, validate_every=1000)
    cache, run = tmp_path / "cache", tmp_path / "run"
    datasets, _, _ = collect(spec, cache)
    paths = [study.path for study in datasets[0].studies]
    for path in paths[1:3]:
        np.save(path, np.full_like(np.load(path), np.nan))  # what an overflow looks like
    made = load_model(find_model(pretrain(spec, run, cache=cache)), "pretraining")
    lost = [np.isnan(float(row["loss"])) for row in rows(run / "metrics.csv")]
    assert 0 < sum(lost) < 10
    assert caplog.text.count("was skipped") == sum(lost)
    assert all(values.isfinite().all() for values in made.network.state_dict().values())
    assert made.templates.volumes.abs().max() > 0
    for path in paths:
        np.save(path, np.full_like(np.load(path), np.nan))
    with pytest.raises(BrainMVPError, match="10 steps in a row, up to step 10: resume"):
        pretrain(spec, tmp_path / "lost", cache=cache)
    assert not has_checkpoint(tmp_path / "lost")


def test_a_run_that_died_before_its_first_checkpoint_starts_over(studies, tmp_path, caplog):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.csv").write_text("step,loss\n1,0.5\n2,0.4\n3,0.")
    (run / "validation.csv").touch()
    caplog.set_level("INFO")
    pretrain(spec_for(studies, max_steps=2, batch=2, validate_every=1), run, cache=tmp_path / "cache")
    for name in ("metrics.csv", "validation.csv"):
        assert [row["step"] for row in rows(run / name)] == ["1", "2"]
    said = [record.message for record in caplog.records if record.message.startswith("Step ")]
    assert len(said) == 2
    view = r"PSNR -?[\d.]+ dB from "
    assert re.fullmatch(rf"Step 2 of 2: loss [\d.]+, {view}the template, {view}another modality\.", said[1])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", ""),
        ("step,lo", ""),
        ("step,loss\r\n1,0.5\r\n2,0.4\r\n3,0.3\r\n", "step,loss\n1,0.5\n2,0.4\n"),
        ("step,loss\n1,0.5\n,\n\nnan,1\n2,0.4,7\n2,0.4", "step,loss\n1,0.5\n"),
    ],
)
def test_rows_that_are_damaged_or_of_later_steps_are_dropped(tmp_path, before, after):
    path = tmp_path / "metrics.csv"
    path.write_text(before)
    drop_rows(path, 2)
    assert path.read_text() == after
    log_row(path, 3, {"loss": 0.25})
    assert rows(path)[-1] == {"step": "3", "loss": "0.25"}


def test_a_row_is_written_as_a_whole_or_not_at_all(tmp_path):
    code = (
        "import resource, sys; from pathlib import Path; from napari_brainmvp.training.loop import log_row\n"
        "path = Path(sys.argv[1]); log_row(path, 1, {'loss': 0.5}); end = path.stat().st_size\n"
        "for size in (end, end + 3, resource.RLIM_INFINITY):\n"  # a write beyond fails, and before is cut off
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))\n"
        "    log_row(path, 2, {'loss': 0.25})\n"
    )
    path = tmp_path / "metrics.csv"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Training goes on") == 2
    assert rows(path) == [{"step": "1", "loss": "0.5"}, {"step": "2", "loss": "0.25"}]


def test_tensorboard_goes_on_once_there_is_room_again(tmp_path):
    code = (
        "import resource, sys, time; from pathlib import Path; from torch.utils.tensorboard import SummaryWriter\n"
        "from napari_brainmvp.training.loop import log_row\n"
        "run = Path(sys.argv[1]); board = SummaryWriter(str(run), flush_secs=0)\n"
        "for step in range(1, 10):\n"
        "    limit = 0 if 3 <= step <= 6 else resource.RLIM_INFINITY\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))\n"
        "    log_row(run / 'metrics.csv', step, {'loss': 0.5}, board)\n"
        "    time.sleep(0.1)\n"  # it is written by a thread
        "board.close()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "TensorBoard's log was not written" in done.stderr
    found = set()
    for path in tmp_path.glob("events*"):
        events = EventAccumulator(str(path)).Reload()
        found |= {event.step for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}
    assert found == {1, 2, 7, 8, 9}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 240 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=240m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_run_goes_on_while_its_disk_is_full(studies, tmp_path, small_disk, caplog):
    run, filler = small_disk / "run", small_disk / "filler"

    def fill(progress):
        if progress.step != "Pre-training":
            return
        if progress.done == 2:
            with filler.open("wb", buffering=0) as file, suppress(OSError):
                while file.write(bytes(1 << 16)):
                    pass
        if progress.done == 5:
            filler.unlink()

    pretrain(spec_for(studies, max_steps=6, batch=2), run, cache=tmp_path / "cache", progress=fill)
    assert [row["step"] for row in rows(run / "validation.csv")] == ["6"]
    assert rows(run / "metrics.csv")[-1]["step"] == "6"
    assert "pictures/00000004.png cannot be written" in caplog.text
    assert last_checkpoint(run)["step"] == 6
    assert (run / "model" / "card.json").is_file()


def test_a_run_validates_what_it_was_stopped_before(studies, tmp_path):
    spec, run = spec_for(studies, max_steps=4, batch=2), tmp_path / "run"
    pretrain(spec, run, cache=tmp_path / "cache")
    first = rows(run / "validation.csv")
    assert [row["step"] for row in first] == ["4"]
    shutil.rmtree(run / "model")
    (run / "validation.csv").unlink()  # as if it was killed after its last checkpoint
    made = pretrain(spec, run, cache=tmp_path / "cache", resume=True)
    assert rows(run / "validation.csv") == first
    assert find_model(made).card.training["validation"]


def test_the_end_of_a_run_names_the_studies_it_left_out(studies, tmp_path, home):
    broken = studies / "sub-02" / "sub-02_t2.nii.gz"
    broken.write_bytes(broken.read_bytes()[:900])
    options = [f"--set={k}={v}" for k, v in SMALL.items()] + ["--max-steps=1", "--data", str(studies)]
    place = ["--out", str(tmp_path / "run"), "--cache", str(tmp_path / "cache")]
    done = subprocess.run([*COMMAND, "pretrain", *place, *options], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "Note: 1 study was left out: sub-02. run/problems.txt says why." in " ".join(done.stdout.split())


def test_many_studies_that_were_left_out_are_counted(tmp_path):
    assert left_out(tmp_path) == ""
    (tmp_path / "problems.txt").touch()
    assert left_out(tmp_path) == ""
    (tmp_path / "problems.txt").write_text("".join(f"sub-{k}: bad: very\n" for k in (1, 1, 2, 3, 4, 5, 6)))
    assert left_out(tmp_path).startswith("6 studies were left out: sub-1, sub-2, sub-3, sub-4, sub-5 and more. ")


def test_a_stopped_run_writes_a_checkpoint_first_and_nobody_else_works_on_it(studies, tmp_path):
    token, left = CancelToken(), tmp_path / "run" / ".4711.part.checkpoint-00000009.pt"
    (left.parent / ".model.4711.part").mkdir(parents=True)
    left.write_bytes(b"what a killed process was writing")

    def stop_after_two(progress):
        if progress.step == "Pre-training" and progress.done == 2:
            with pytest.raises(BrainMVPError, match="Another process works on"):
                pretrain(spec_for(studies), tmp_path / "run", cache=tmp_path / "c", resume=True)
            token.cancel()

    with pytest.raises(Cancelled, match="step 2 of 4"):
        pretrain(
            spec_for(studies, minutes=60.0),
            tmp_path / "run",
            cache=tmp_path / "c",
            progress=stop_after_two,
            cancel=token,
        )
    assert last_checkpoint(tmp_path / "run")["step"] == 2
    assert not [path for path in left.parent.iterdir() if "part" in path.name]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_run_works_where_files_cannot_be_locked(tmp_path, monkeypatch, caplog, number):
    fcntl = pytest.importorskip("fcntl")

    def no_locks(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    left = tmp_path / ".4711.part.checkpoint-00000009.pt"
    left.touch()
    with hold_run(tmp_path):
        assert left.exists()  # somebody may be writing it
    assert "files cannot be locked" in caplog.text


def test_checkpoints_keep_two_and_pass_over_a_damaged_one(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, {"x": torch.full((3,), float(step))})
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["checkpoint-00000002.pt", "checkpoint-00000003.pt"]
    newest = tmp_path / "checkpoint-00000003.pt"
    newest.write_bytes(newest.read_bytes()[:200])
    assert last_checkpoint(tmp_path)["step"] == 2
    older = tmp_path / "checkpoint-00000002.pt"
    older.write_bytes(b"")
    with pytest.raises(FileError, match="00000002"):
        last_checkpoint(tmp_path)
    save_checkpoint(tmp_path, 1, {"x": torch.zeros(3)})  # it has started over: those of later steps are no part of it
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-00000001.pt"]


def test_a_run_whose_checkpoints_are_all_damaged_says_so_and_loses_nothing(studies, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoint-00000008.pt").write_bytes(b"damaged")
    (run / "metrics.csv").write_text("step,loss\n8,0.5\n")
    with pytest.raises(FileError, match=r"No checkpoint in .* can be read"):
        pretrain(spec_for(studies), run, cache=tmp_path / "cache", resume=True)
    assert (run / "checkpoint-00000008.pt").exists()
    assert len(rows(run / "metrics.csv")) == 1
    with pytest.raises(BrainMVPError, match="already holds a run"):
        pretrain(spec_for(studies), run, cache=tmp_path / "cache")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_reported_and_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, {"x": torch.zeros(3)})
    code = (
        "import resource, sys; from pathlib import Path; import torch\n"
        "from napari_brainmvp.training.checkpoints import save_checkpoint\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "save_checkpoint(Path(sys.argv[1]), 2, {'x': torch.zeros(1_000_000)})\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert "FileError" in done.stderr
    assert "cannot be written" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-00000001.pt"]


def test_a_run_goes_on_from_a_pretrained_model(studies, tmp_path):
    spec = spec_for(studies, max_steps=2, batch=2, modalities=("t1", "t2"), average=0.0)
    first = pretrain(spec, tmp_path / "first", cache=tmp_path / "cache")
    before = load_model(find_model(first), "pretraining")
    still = spec.model_copy(update={"init": str(first), "learning_rate": 1e-9, "template_rate": 1e-9, "seed": 5})
    after = load_model(find_model(pretrain(still, tmp_path / "second", cache=tmp_path / "cache")), "pretraining")
    assert before.templates.volumes.abs().max() > 0.05
    torch.testing.assert_close(after.templates.volumes, before.templates.volumes)
    for (name, a), b in zip(before.network.named_parameters(), after.network.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    with pytest.raises(ModelError, match="t1, t2"):
        pretrain(still.model_copy(update={"modalities": ("t1",)}), tmp_path / "third", cache=tmp_path / "cache")
    with pytest.raises(ModelError, match="another encoder"):
        pretrain(still.model_copy(update={"decoder": "plain"}), tmp_path / "fourth", cache=tmp_path / "cache")


def test_an_estimate_counts_what_is_trained_and_prepared():
    spec = PretrainingSpec(max_steps=100)
    once = estimate(spec, 10, 1e-5)
    assert estimate(spec.model_copy(update={"max_steps": 200}), 10, 1e-5).seconds - once.seconds == pytest.approx(
        100 * 8 * 32**3 * 1e-5
    )
    more = estimate(spec, 20, 1e-5).seconds - once.seconds
    assert more == pytest.approx(estimate(spec, 20, 1e-6).seconds - estimate(spec, 10, 1e-6).seconds)
    assert more > 10
    small = estimate(spec.model_copy(update={"encoder": "small"}), 10, 1e-5)
    assert small.gigabytes > once.gigabytes
    assert 1e-8 < measure_pace("paper") < 1e-3  # seconds a voxel
    token, began = CancelToken(), time.monotonic()
    token.cancel()
    with pytest.raises(Cancelled):
        measure_pace("compact", token)
    assert time.monotonic() - began < 2
