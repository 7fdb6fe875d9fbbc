"""Reconstruction from study to result: small and made-up networks whose answers are known."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from conftest import brain, save
from models_for_tests import tiny_encoder, tiny_model
from napari_brainmvp.errors import BrainMVPError, Cancelled, ModelError, StudyError
from napari_brainmvp.inference import (
    ReconstructionOptions,
    SegmentOptions,
    impute,
    impute_missing,
    reconstruct,
    segment,
)
from napari_brainmvp.inference.masking import BLOCK, block_masks
from napari_brainmvp.inference.similarity import measure_similarity, structural_similarity
from napari_brainmvp.io import read_study, write_image
from napari_brainmvp.models import find_model, import_model, load_model
from napari_brainmvp.models.weights import LoadedModel
from napari_brainmvp.networks import (
    EncoderSpec,
    ModalityTemplates,
    PretrainingNetwork,
    ReconstructionNetwork,
    UNet3DPretrainingNetwork,
)
from napari_brainmvp.preparation import PreparationSpec, prepare
from napari_brainmvp.preparation.intensity import IntensityScale, foreground_mask, measure_scale, normalise
from napari_brainmvp.progress import CancelToken
from napari_brainmvp.study import Grid, Scan, Study, modality

SMALL = EncoderSpec(channels=(8, 8, 16, 16), depths=(1, 1, 1, 1), head_size=8)
RELEASE = EncoderSpec(channels=(8, 8, 32, 32), depths=(1, 1, 1, 1), head_size=32)
FLOAT = ReconstructionOptions(device="cpu", precision="float32")
KEYS = ("t1", "t2", "flair")


def smooth_brain(shape, seed) -> np.ndarray:
    """Smooth tissue in a ball of zeros, so that interpolation changes little."""
    index = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"), -1)
    wave = np.sin(3 * index[..., 0] + seed) + np.cos(2 * index[..., 1] - seed) * np.sin(2 * index[..., 2])
    return np.where(np.linalg.norm(index, axis=-1) < 0.8, 300 + 60 * wave, 0).astype(np.float32)


def study(keys=KEYS, shape=(40, 44, 36), affine=None) -> Study:
    grid = Grid(shape, np.eye(4) if affine is None else affine)
    return Study("s", {k: Scan(modality(k), smooth_brain(shape, seed), grid) for seed, k in enumerate(keys)}, keys[-1])


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> LoadedModel:
    return load_model(find_model(tiny_encoder(tmp_path_factory.mktemp("models"))), "pretraining")


class Echo(torch.nn.Module):
    """Says what it is shown."""

    def reconstruct(self, x):
        return x


class Doubtful(ReconstructionNetwork):
    """Says what it is shown, and is surer of bright voxels: variance 1 / (0.1 + x)."""

    def encode(self, x):
        return [x]

    def decode(self, features, source):
        every = features[0].repeat(1, len(self.modalities), 1, 1, 1)
        return every, -torch.log(0.1 + every.clamp(min=0))


# Formulas


@pytest.mark.parametrize("rate", [0.25, 0.5, 0.6, 0.875, 1.0])
@pytest.mark.parametrize("shape", [(40, 44, 36), (16, 9, 33)])
def test_complementary_masks_hide_everything_and_each_the_rate(rate, shape):
    masks = block_masks(shape, rate, 3, complementary=True)
    assert torch.stack(masks).any(0).all()
    count = int(np.prod([-(-n // BLOCK) for n in shape]))
    for mask in masks:
        assert mask.shape == shape
        blocks = mask[::BLOCK, ::BLOCK, ::BLOCK]
        assert int(blocks.sum()) == round(rate * count)
        spread = blocks.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)
        assert torch.equal(spread[: shape[0], : shape[1], : shape[2]], mask)
    assert torch.equal(masks[0], block_masks(shape, rate, 3, complementary=False)[0])
    if rate < 1:
        assert not torch.equal(masks[0], block_masks(shape, rate, 4, complementary=True)[0])


def test_no_mask_and_impossible_ones():
    (nothing,) = block_masks((16, 16, 16), 0.0, 0, complementary=True)
    assert not nothing.any()
    with pytest.raises(BrainMVPError, match="between 0 and 1"):
        block_masks((16, 16, 16), 1.5, 0, complementary=True)


@pytest.mark.parametrize("spec", [PreparationSpec(), PreparationSpec(intensity="percentile")])
def test_the_way_back_from_prepared_intensities_is_exact(spec):
    volume = torch.from_numpy(brain()) * 7 + torch.from_numpy(brain() > 0).float() * 40
    mask = foreground_mask(volume)
    scale = measure_scale(volume, mask, spec)
    prepared = normalise(volume, mask, spec)
    inside = mask & (prepared != 0)
    assert float(inside.sum() / mask.sum()) > 0.99
    torch.testing.assert_close(scale.invert(prepared)[inside], volume[inside], rtol=1e-4, atol=1e-2)
    assert scale.background == 0
    assert float(scale.invert(torch.tensor(-5.0))) >= float(volume.min())


def test_nominal_units_keep_the_background_at_zero_and_the_median_at_500():
    spec = PreparationSpec()
    values = IntensityScale.nominal(spec).invert(torch.linspace(0, 2, 9))
    assert values[[0, 4, 8]].tolist() == pytest.approx([0, 500, 1000], abs=0.1)
    volume = torch.from_numpy(smooth_brain((40, 44, 36), 0))
    y = normalise(volume, volume > 0, spec)
    again = IntensityScale.nominal(spec).invert(y)
    torch.testing.assert_close(normalise(again, volume > 0, spec), y, atol=2e-3, rtol=0)


def test_similarities_are_those_of_the_formulas():
    rng = np.random.default_rng(0)
    truth = torch.from_numpy(rng.uniform(0, 2, (20, 24, 22)).astype(np.float32))
    image = truth + 0.1
    mask = torch.zeros(truth.shape, dtype=torch.bool)
    mask[4:12] = True
    found = measure_similarity("x", image, truth, mask)
    assert found.mae == pytest.approx(0.1, rel=1e-4)
    assert found.psnr == pytest.approx(20 * np.log10(float(truth[mask].max()) / 0.1), rel=1e-4)
    assert found.voxels == int(mask.sum())
    assert measure_similarity("x", truth, truth, mask).ssim == pytest.approx(1, abs=1e-5)
    assert np.isnan(measure_similarity("x", truth, truth, mask & ~mask).psnr)


def test_structural_similarity_agrees_with_scikit_image():
    from skimage.metrics import structural_similarity as theirs

    rng = np.random.default_rng(1)
    a = rng.uniform(0, 1, (24, 26, 28)).astype(np.float32)
    b = (a + rng.normal(0, 0.2, a.shape)).astype(np.float32)
    options = {"data_range": 1.0, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    _, expected = theirs(a, b, full=True, **options)
    inner = (slice(6, -6),) * 3
    ours = structural_similarity(torch.from_numpy(a), torch.from_numpy(b), 1.0).numpy()
    np.testing.assert_allclose(ours[inner], expected[inner], atol=1e-4)


# What the network sees, and what becomes of it


def test_mask_rate_0_is_the_plain_autoencoder(model):
    made = study()
    whole = replace(model, card=model.card.model_copy(update={"patch_size": (64, 64, 64)}))
    result = reconstruct(made, whole, "flair", ("t1",), replace(FLOAT, mask_rate=0.0))
    prepared = prepare(made, ("flair", "t1"), model.card.preparation)
    image = prepared.images[:1]
    rest = [-n % 16 for n in image.shape[1:]]
    padded = torch.nn.functional.pad(image, (0, rest[2], 0, rest[1], 0, rest[0]))[None]
    out = model.network.reconstruct(padded, torch.tensor([3]), torch.tensor([0]))[
        0, 0, : image.shape[1], : image.shape[2], : image.shape[3]
    ]
    expected = prepared.scales[0].invert(out)[prepared.foreground]
    start = np.rint(made.grid.to_index(prepared.grid.to_world((0, 0, 0)))).astype(int)
    box = tuple(slice(s, s + n) for s, n in zip(start, image.shape[1:], strict=True))
    np.testing.assert_allclose(result.scan.data[box][prepared.foreground.numpy()], expected, rtol=1e-3, atol=0.1)
    np.testing.assert_allclose(
        result.masked[box][prepared.foreground.numpy()],
        made.scans["flair"].data[box][prepared.foreground.numpy()],
        rtol=1e-3,
    )


def test_every_voxel_is_predicted_while_it_is_hidden():
    """A network that says what it is shown gives back the source everywhere, whatever the rate, in whole mode."""
    made = study()
    echo = LoadedModel(plain_card(), Echo(), None)
    for rate in (0.5, 0.8, 1.0):
        result = reconstruct(made, echo, "flair", ("t1",), replace(FLOAT, mask_rate=rate))
        prepared = prepare(made, ("flair", "t1"), echo.card.preparation)
        inside = prepared.restore_labels(prepared.foreground)
        expected = prepared.scales[0].invert(torch.from_numpy(prepared.restore_image(prepared.images[1]))).numpy()
        np.testing.assert_allclose(result.scan.data[inside], expected[inside], rtol=1e-4)
    seen = reconstruct(made, echo, "flair", ("t1",), replace(FLOAT, mode="trained", mask_rate=0.5))
    np.testing.assert_allclose(seen.scan.data[inside], seen.masked[inside], rtol=1e-4)
    assert 0.3 < np.isclose(seen.scan.data, made.scans["flair"].data, rtol=1e-3)[inside].mean() < 0.7


def plain_card(**changes):
    from napari_brainmvp.models import ModelCard, NetworkSpec

    network = NetworkSpec(in_channels=1, out_channels=1, channels=(8, 8, 16, 16), depths=(1, 1, 1, 1), head_size=8)
    fields = {"name": "plain", "task": "pretraining", "network": network, "modalities": KEYS, "patch_size": (32,) * 3}
    return ModelCard(**{**fields, **changes})


def test_the_masks_do_not_know_the_windows():
    """Windows of any size and overlap give the same result where the network looks at one voxel at a time."""
    made, options = study(shape=(70, 50, 60)), replace(FLOAT, mask_rate=0.6, seed=5)
    results = []
    for patch, overlap in ((32, 0.5), (48, 0.25), (16, 0.0), (96, 0.5)):
        echo = LoadedModel(plain_card(patch_size=(patch,) * 3), Echo(), None)
        results.append(reconstruct(made, echo, "flair", ("t2",), replace(options, overlap=overlap)).scan.data)
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], rtol=1e-4, atol=1e-2)


def test_no_seam_shows_where_windows_meet(model):
    """Steps between neighbouring voxels are no larger at the faces of windows than at like places inside them."""
    made = study(shape=(100, 60, 60))
    result = reconstruct(made, model, "flair", ("t1",), FLOAT)
    start = int(np.rint(made.grid.to_index(prepare(made, KEYS, model.card.preparation).grid.to_world((0, 0, 0)))[0]))
    values = result.scan.data
    inside = (values[1:] != 0) & (values[:-1] != 0)
    steps = np.abs(np.diff(values, axis=0))
    at = {x: steps[x][inside[x]].mean() for x in range(steps.shape[0]) if inside[x].sum() > 500}
    faces = [x for x in at if (x + 1 - start) % 16 == 0]  # all window faces are among these
    like = [x for x in at if (x + 1 - start) % 16 == 8]
    assert len(faces) >= 4
    assert max(at[x] for x in faces) < 1.5 * max(at[x] for x in like)


def test_several_sources_are_weighted_by_variance_and_by_how_well_they_predict_each_other(model):
    made = study()
    network = Doubtful(model.card.modalities, SMALL, 8)
    result = reconstruct(made, replace(model, network=network, templates=None), "flair", ("t1", "t2"), FLOAT)
    prepared = prepare(made, ("flair", "t1", "t2"), model.card.preparation)
    _, t1, t2 = prepared.images
    trust1, trust2 = (1 / (1 + (t1 - t2) ** 2 * (0.1 + t)) for t in (t1, t2))
    w1, w2 = (0.1 + t1) * trust1, (0.1 + t2) * trust2
    expected = prepared.scales[0].invert((w1 * t1 + w2 * t2) / (w1 + w2))
    inside = prepared.foreground
    restored = prepared.restore_labels(inside)
    np.testing.assert_allclose(np.sort(result.scan.data[restored]), np.sort(expected[inside].numpy()), rtol=1e-3)
    deviation = torch.sqrt((trust1 + trust2) / (w1 + w2))[inside]
    np.testing.assert_allclose(np.sort(result.deviation[restored]), np.sort(deviation.numpy()), rtol=1e-3)
    assert [s.name for s in result.similarity] == ["combined", "t1", "t2"]
    error = (result.scan.data - made.scans["flair"].data)[restored]
    np.testing.assert_allclose(result.error[restored], error, atol=1e-3)
    assert not result.error[~restored].any()


def test_the_disagreement_is_the_error_in_expected_errors(model):
    made = study()
    result = reconstruct(
        made, replace(model, network=Doubtful(model.card.modalities, SMALL, 8)), "flair", ("t1",), FLOAT
    )
    prepared = prepare(made, ("flair", "t1"), model.card.preparation)
    flair, t1 = prepared.images
    expected = ((t1 - flair).abs() * torch.sqrt(0.1 + t1))[prepared.foreground]
    inside = prepared.restore_labels(prepared.foreground)
    np.testing.assert_allclose(np.sort(result.disagreement[inside]), np.sort(expected.numpy()), rtol=1e-2, atol=1e-3)


def test_the_target_is_a_condition(model):
    made = study()
    one = reconstruct(made.with_modalities(("t1",)), model, "flair", (), FLOAT).scan.data
    other = reconstruct(made.with_modalities(("t1",)), model, "t2", (), FLOAT).scan.data
    assert np.abs(one - other).max() > 1


def test_the_same_seed_gives_the_same_result_and_another_another(model):
    options = replace(FLOAT, mask_rate=0.5, seed=1)
    a, b, c = (
        reconstruct(study(), model, "flair", ("t1",), replace(options, seed=seed)).scan.data for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 1


# Geometry


def turned(degrees: float) -> np.ndarray:
    a, matrix = np.deg2rad(degrees), np.eye(4)
    matrix[:2, :2] = [[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]
    return matrix


GRIDS = {
    "lps": (np.diag([-1.0, -1, 1, 1]), (40, 44, 36), 1e-3),
    "oblique": (turned(12) @ np.diag([-1.0, 1, 1, 1]), (40, 44, 36), 1e-3),
    "sagittal": (np.array([[0, 0, 1.0, -20], [-1, 0, 0, 20], [0, -1, 0, 20], [0, 0, 0, 1]]), (40, 44, 36), 1e-3),
    "thick": (turned(8) @ np.diag([-0.9, 1.1, 4, 1]), (50, 44, 12), 0.06),
}


@pytest.mark.parametrize("name", GRIDS)
def test_a_reconstruction_lies_on_the_targets_grid_in_its_units(name):
    affine, shape, tolerance = GRIDS[name]
    made = study(affine=affine, shape=shape)
    other = Grid((20, 22, 18), affine @ np.diag([shape[0] / 20, shape[1] / 22, shape[2] / 18, 1]))
    odd = Scan(modality("t1"), smooth_brain(other.shape, 1), other)
    truth = made.scans["flair"].data
    index = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"), -1)
    inner = np.linalg.norm(index, axis=-1) < 0.6
    for reference, allowed in (("flair", tolerance), ("t1", 0.08)):
        both = Study("two", {"flair": made.scans["flair"], "t1": odd}, reference)
        echo = LoadedModel(plain_card(), Echo(), None)
        result = reconstruct(both, echo, "flair", ("t1",), replace(FLOAT, mask_rate=0.0))
        assert result.scan.grid is made.scans["flair"].grid
        np.testing.assert_allclose(result.scan.data[inner], truth[inner], rtol=allowed)
        for image in (result.masked, result.error, result.disagreement):
            assert image.shape == shape


def test_a_missing_target_is_made_on_the_reference_grid_and_marked(model, tmp_path):
    made = study(("t1", "t2"), affine=np.diag([-1.0, 1, 3, 1]), shape=(40, 44, 14))
    result = impute(made, model, "FLAIR", (), FLOAT)
    assert result.scan.imputed
    assert result.scan.title == "FLAIR (imputed)"
    assert result.scan.grid is made.grid
    assert (result.error, result.disagreement, result.similarity) == (None, None, ())
    assert result.sources == ("t1", "t2")
    assert (result.scan.data >= 0).all()
    path = write_image(tmp_path / "s" / "x_flair.nii.gz", result.scan.data, made.grid, description=result.description)
    assert bytes(nib.load(path).header["descrip"]).startswith(b"FLAIR (imputed) by tiny-encoder from t1,t2")
    for key, scan in made.scans.items():
        write_image(tmp_path / "s" / f"x_{key}.nii.gz", scan.data, scan.grid)
    again = read_study(tmp_path / "s")
    assert {key: scan.imputed for key, scan in again.scans.items()} == {"t1": False, "t2": False, "flair": True}
    tiny = tiny_model(tmp_path / "models")
    warnings = segment(again, tiny, SegmentOptions(device="cpu", precision="float32")).warnings
    assert any("FLAIR imputed from the other scans" in w for w in warnings)
    assert any(
        "FLAIR (imputed) is itself no real scan" in w for w in reconstruct(again, model, "t1", (), FLOAT).warnings
    )


def test_a_segmentation_imputes_what_is_missing_if_asked(model, tmp_path):
    encoder, tiny = tiny_encoder(tmp_path), tiny_model(tmp_path)
    made = study(("t1", "t2"))
    options = SegmentOptions(device="cpu", precision="float32", probabilities=True)
    asked = segment(made, tiny, replace(options, impute=str(encoder)))
    assert any(w.startswith("T1c, FLAIR imputed") or w.startswith("T1C, FLAIR imputed") for w in asked.warnings)
    filled = impute_missing(made, ("t1", "t1c", "t2", "flair"), model, FLOAT)
    assert list(filled.scans) == ["t1", "t2", "t1c", "flair"]
    assert filled.reference == made.reference
    by_hand = segment(filled, tiny, options)
    np.testing.assert_array_equal(by_hand.labels, asked.labels)
    left = segment(made, tiny, options)
    assert np.abs(left.probabilities.astype(float) - asked.probabilities).max() > 0.01
    assert impute_missing(made, ("t1",), model, FLOAT) is made


# Other networks


def test_the_published_networks_work_too(tmp_path, monkeypatch):
    monkeypatch.setenv("BRAINMVP_HOME", str(tmp_path))
    torch.manual_seed(0)
    names = ("flair", "t1", "t1c", "t2", "mra", "pd", "dwi", "adc")
    templates = ModalityTemplates(names, (30, 60, 25))
    torch.nn.init.uniform_(templates.volumes, -2, 6)
    for number, network in enumerate(
        (PretrainingNetwork(RELEASE, templates=templates), UNet3DPretrainingNetwork(width=8, templates=templates))
    ):
        state = {k.replace("templates.volumes", "rep_template"): v for k, v in network.state_dict().items()}
        torch.save({"state_dict": state}, tmp_path / f"release{number}.pt")
        entry = import_model(tmp_path / f"release{number}.pt", f"release{number}")
        assert (entry.card.template_frame, entry.card.template_minmax, entry.card.preparation.clip) == (
            "centred",
            True,
            True,
        )
        result = reconstruct(study(), entry.folder, "flair", ("template", "t1"), replace(FLOAT, mask_rate=0.8))
        assert [s.name for s in result.similarity] == ["combined", "template", "t1", "template alone"]
        assert result.deviation is None
        assert np.isfinite(result.disagreement).all()
        assert result.disagreement.max() > 1
        whole = reconstruct(study(), entry.folder, "flair", ("t1",), FLOAT)
        assert any("is not told which modality" in w for w in whole.warnings)


def test_a_centred_template_lies_about_the_middle_of_the_box():
    templates = ModalityTemplates(("t1",), (5, 7, 4))
    torch.nn.init.uniform_(templates.volumes, 1, 3)
    volume = templates.volumes[0].detach()
    torch.testing.assert_close(templates.placed("t1", (5, 7, 4), "centred"), volume)
    torch.testing.assert_close(templates.placed("t1", (3, 9, 4), "centred")[:, 1:-1], volume[1:-1])
    half = templates.placed("t1", (4, 7, 4), "centred")
    torch.testing.assert_close(half, (volume[:-1] + volume[1:]) / 2)
    scaled = templates.placed("t1", (5, 7, 4), "centred", minmax=True)
    assert (float(scaled.min()), float(scaled.max())) == (0, 1)
    torch.testing.assert_close(templates.placed("t1", (9, 9, 9)), templates.fill((9, 9, 9))[0].detach())


# What users do


def test_bad_wishes_are_refused_with_a_sentence(model, home, tmp_path):
    made = study()
    with pytest.raises(StudyError, match=r"does not know 'swi': choose one of t1, t1c, t2, flair, adc"):
        reconstruct(made, model, "swi", (), FLOAT)
    with pytest.raises(StudyError, match=r"'adc' cannot be a source for flair here: choose among t1, t2, template"):
        reconstruct(made, model, "flair", ("adc",), FLOAT)
    with pytest.raises(StudyError, match=r"'flair' cannot be a source"):
        reconstruct(made, model, "flair", ("flair",), FLOAT)
    with pytest.raises(StudyError, match=r"has no ADC scan, only mask rate 1"):
        reconstruct(made, model, "adc", (), replace(FLOAT, mask_rate=0.5))
    with pytest.raises(StudyError, match=r"has a FLAIR scan: nothing to impute"):
        impute(made, model, "flair", (), FLOAT)
    with pytest.raises(BrainMVPError, match="between 0 and 1"):
        reconstruct(made, model, "flair", (), replace(FLOAT, mask_rate=-1))
    with pytest.raises(ModelError, match="no templates"):
        reconstruct(made, replace(model, templates=None), "flair", ("template",), FLOAT)
    with pytest.raises(ModelError, match="is a segmentation model"):
        reconstruct(made, "tiny", "flair", (), FLOAT)
    swi = Study("odd", {"swi": Scan(modality("swi"), brain(), Grid((40, 44, 36), np.eye(4)))})
    with pytest.raises(StudyError, match="nor any other scan the model knows"):
        reconstruct(swi, model, "flair", (), FLOAT)


def test_progress_runs_once_from_0_to_all_and_cancel_stops(model):
    seen = []
    reconstruct(study(), model, "flair", ("t1", "t2"), replace(FLOAT, mask_rate=0.5), seen.append)
    windows = [p for p in seen if p.step == "Reconstructing"]
    assert len({p.total for p in windows}) == 1
    done = [p.done for p in windows]
    assert done == sorted(done)
    assert done[-1] == windows[-1].total
    token = CancelToken()

    def progress(report):
        if report.step == "Reconstructing" and report.done == 2:
            token.cancel()

    with pytest.raises(Cancelled):
        reconstruct(study(), model, "flair", ("t1",), FLOAT, progress, token)


def brainmvp(*arguments) -> subprocess.CompletedProcess:
    command = [str(Path(sys.executable).with_name("brainmvp")), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_line(home, tmp_path):
    encoder = tiny_encoder(tmp_path)
    folder = tmp_path / "s"
    for seed, key in enumerate(("t1", "t2", "flair")):
        save(folder / f"s_{key}.nii.gz", smooth_brain((40, 44, 36), seed), np.diag([-1.0, -1, 1, 1]))
    out, error = tmp_path / "r.nii.gz", tmp_path / "e.nii.gz"
    arguments = ("reconstruct", folder, "--target", "flair", "--from", "t1,t2", "-m", encoder, "--out", out)
    done = brainmvp(*arguments, "--error", error, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["sources"] == ["t1", "t2"]
    assert [s["name"] for s in report["similarity"]] == ["combined", "t1", "t2", "template alone"]
    made, truth = nib.load(out), nib.load(folder / "s_flair.nii.gz")
    np.testing.assert_allclose(made.affine, truth.affine)
    difference = np.asarray(made.dataobj) - np.asarray(truth.dataobj)
    inside = np.asarray(truth.dataobj) > 0
    np.testing.assert_allclose(np.asarray(nib.load(error).dataobj)[inside], difference[inside], atol=1e-2)
    again = brainmvp(*arguments)
    assert again.returncode == 2
    assert "add --overwrite" in again.stderr
    over = brainmvp(*arguments[:-1], folder / "s_t1.nii.gz", "--overwrite")
    assert over.returncode == 2
    assert "is one of the scans" in over.stderr

    (folder / "s_flair.nii.gz").unlink()
    done = brainmvp("impute", folder, "-t", "flair", "-m", encoder, "-o", folder / "s_flair.nii.gz")
    assert done.returncode == 0, done.stderr
    assert "FLAIR (imputed)" in done.stdout.replace("\n", " ")
    assert read_study(folder).scans["flair"].imputed
    refused = brainmvp("impute", folder, "-t", "flair", "-m", encoder, "-o", tmp_path / "x.nii.gz")
    assert refused.returncode == 2
    assert "nothing to impute" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1


# The panel, with a real viewer and real clicks


@pytest.fixture
def widget(make_napari_viewer, home, qtbot):
    from napari_brainmvp.plugin.widget import BrainMVPWidget

    tiny_encoder(home / "models")
    viewer = make_napari_viewer()
    made = BrainMVPWidget(viewer)
    qtbot.addWidget(made)
    made.segment.model.setCurrentIndex(made.segment.model.findText("Tiny random model"))
    made.reconstruct.model.setCurrentIndex(made.reconstruct.model.findText("Tiny random encoder"))
    titles = [made.tabs.tabText(k) for k in range(made.tabs.count())]
    made.tabs.setCurrentIndex(titles.index("Reconstruct"))
    made.show()
    yield made
    made.reconstruct.abandon()


def open_study(widget, made: Study):
    from napari_brainmvp.plugin.layers import study_layers

    viewer = widget.reconstruct._viewer
    for layer in study_layers(made):
        viewer._add_layer_from_data(*layer)
    return viewer


def click(qtbot, button):
    from qtpy.QtCore import Qt

    assert button.isEnabled()
    qtbot.mouseClick(button, Qt.MouseButton.LeftButton)


def click_and_wait(widget, qtbot, button):
    with qtbot.waitSignal(widget.reconstruct.finished, timeout=60_000):
        click(qtbot, button)


def test_one_click_shows_truth_reconstruction_and_error_side_by_side(widget, qtbot):
    from napari_brainmvp.plugin.layers import layer_grid

    panel = widget.reconstruct
    assert not panel.run.button.isEnabled()
    assert "Study panel" in panel.run.status.text()
    made = study(("t1", "t2", "flair", "adc"), affine=np.diag([-1.0, -1, 3, 1]), shape=(40, 44, 14))
    viewer = open_study(widget, made)
    assert panel.target.chosen() == ("flair",)
    assert panel.sources.chosen() == ("t1", "t2", "adc")  # also what the segmentation model has no row for
    assert panel.run.button.text() == "Reconstruct FLAIR"
    click(qtbot, panel.sources.buttons["adc"])
    click_and_wait(widget, qtbot, panel.run.button)
    names = [f"FLAIR {what}" for what in ("masked", "reconstruction", "disagreement", "error")]
    assert [layer.name for layer in viewer.layers][-4:] == names
    truth, reconstruction = viewer.layers["FLAIR"], viewer.layers["FLAIR reconstruction"]
    assert reconstruction.contrast_limits == truth.contrast_limits
    low, high = viewer.layers["FLAIR error"].contrast_limits
    assert low == -high
    assert layer_grid(viewer.layers["FLAIR error"]).same_as(made.grid, 1e-6)
    assert widget.study.assigned()["flair"] is truth  # a reconstruction is never taken for the scan
    assert [panel.table.item(row, 0).text() for row in range(panel.table.rowCount())] == [
        "Combined",
        "T1",
        "T2",
        "Template alone",
    ]
    assert viewer.canvas.grid.enabled
    visible = [layer.name for layer in viewer.layers if layer.visible]
    assert visible == ["FLAIR", "FLAIR reconstruction", "FLAIR disagreement", "FLAIR error"]
    click(qtbot, panel.side_by_side)
    assert not viewer.canvas.grid.enabled
    assert [layer.name for layer in viewer.layers if layer.visible] == ["FLAIR reconstruction", "FLAIR error"]

    panel.rate.setValue(10)
    assert panel.rate_text.text() == "50 %"
    panel.trained.setChecked(True)
    click(qtbot, panel.target.buttons["t1"])
    assert "t1" not in panel.sources.buttons
    assert "adc" not in panel.sources.chosen()  # stays as the user left it
    click_and_wait(widget, qtbot, panel.run.button)
    assert [layer.name for layer in viewer.layers if layer.visible] == [
        "T1",
        "T1 masked",
        "T1 reconstruction",
        "T1 error",
    ]
    assert "Done in" in panel.run.status.text()


def test_a_missing_modality_is_filled_in_with_one_click_and_segmented(widget, qtbot):
    panel, viewer = widget.reconstruct, open_study(widget, study(("t1", "t2", "t1c")))
    assert panel.missing() == ("flair",)
    assert panel.fill.isVisible()
    assert panel.fill.text() == "Fill in missing FLAIR"
    assert panel.run.button.text() == "Fill in FLAIR"
    assert not panel.rate.isEnabled()
    click_and_wait(widget, qtbot, panel.fill)
    assert viewer.layers[-1].name == "FLAIR (imputed)"
    assert widget.study.table.item(3, 2).text() == "● imputed"
    assert panel.missing() == ()
    assert not panel.fill.isVisible()
    assert widget.study.study()().scans["flair"].imputed
    assert panel.run.button.text() == "Fill in FLAIR"  # no truth to compare with: it would be made again
    with qtbot.waitSignal(widget.segment.finished, timeout=60_000):
        widget.segment.button.click()
    assert "FLAIR imputed from the other scans" in widget.segment.status.text()
    box = widget.study.table.cellWidget(3, 1)
    box.setCurrentIndex(0)  # the user would rather not
    assert "flair" not in widget.study.study()().scans


def test_an_imputed_layer_is_saved_as_such(widget, qtbot, tmp_path):
    viewer = open_study(widget, study(("t1", "t2")))
    click_and_wait(widget, qtbot, widget.reconstruct.run.button)
    viewer.layers["FLAIR (imputed)"].save(str(tmp_path / "x_flair.nii.gz"), plugin="napari-brainmvp")
    assert bytes(nib.load(tmp_path / "x_flair.nii.gz").header["descrip"]).startswith(b"FLAIR (imputed)")
    opened = viewer.open(str(tmp_path / "x_flair.nii.gz"), plugin="napari-brainmvp")
    assert opened[0].name.startswith("FLAIR (imputed)")


def test_templates_can_be_looked_at(widget, qtbot):
    made = study(("t1", "flair"), affine=np.diag([-1.0, -1, 2, 1]), shape=(40, 44, 20))
    viewer = open_study(widget, made)
    click_and_wait(widget, qtbot, widget.reconstruct.template)
    layer = viewer.layers["FLAIR template"]
    assert layer.visible
    assert layer.data.T.shape == made.grid.shape
    assert layer.contrast_limits == viewer.layers["FLAIR"].contrast_limits


def test_cancel_leaves_no_layer(widget, qtbot):
    panel = widget.reconstruct
    viewer = open_study(widget, study(("t1", "t2", "flair"), shape=(130, 130, 120)))
    before = len(viewer.layers)
    click(qtbot, panel.run.button)
    qtbot.waitUntil(lambda: panel.run.bar.maximum() > 0, timeout=60_000)
    click_and_wait(widget, qtbot, panel.run.cancel)
    assert panel.run.status.text() == "Cancelled."
    assert len(viewer.layers) == before
    assert panel.run.button.isEnabled()


def test_nothing_to_make_it_from_is_said(widget, qtbot):
    panel = widget.reconstruct
    open_study(widget, study(("t1", "flair")))
    click(qtbot, panel.sources.buttons["t1"])
    assert not panel.run.button.isEnabled()
    assert "Choose what to make it from" in panel.run.status.text()
    click(qtbot, panel.sources.buttons["template"])
    assert panel.run.button.isEnabled()
