"""Fine-tuning for segmentation: labels as data, formulas against numpy, transfer, and real runs, killed and resumed."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from lightning.fabric import Fabric

from conftest import brain, filled, save
from models_for_tests import region_model, tiny_card
from napari_brainmvp.errors import BrainMVPError, Cancelled, FileError, StudyError
from napari_brainmvp.inference import segment
from napari_brainmvp.io import find_studies, read_study
from napari_brainmvp.models import Label, ModelCard, NetworkSpec, find_model, load_model, save_model
from napari_brainmvp.models.sharing import path_digest, push_model
from napari_brainmvp.models.weights import build_network
from napari_brainmvp.networks import EncoderSpec, PretrainingNetwork, ReconstructionNetwork, Unions
from napari_brainmvp.preparation import PreparationSpec
from napari_brainmvp.progress import CancelToken, no_progress
from napari_brainmvp.training.cache import CachedStudy
from napari_brainmvp.training.checkpoints import last_checkpoint
from napari_brainmvp.training.evaluation import evaluate_segmentation
from napari_brainmvp.training.finetuning import PRESETS, FinetuneSpec, finetune, read_spec
from napari_brainmvp.training.finetuning.begun import part_usable
from napari_brainmvp.training.finetuning.data import Case, LabelledCrops, choose_modalities, collect, split
from napari_brainmvp.training.finetuning.head import fit_head
from napari_brainmvp.training.finetuning.model import SegmentationModel, make_templates, parameter_groups
from napari_brainmvp.training.finetuning.objective import consistency, deep_loss, segmentation_loss, truth
from napari_brainmvp.training.finetuning.run import Run, Trainable
from napari_brainmvp.training.finetuning.temperature import fit_temperature
from napari_brainmvp.training.finetuning.transfer import transfer
from napari_brainmvp.training.finetuning.validation import CropValidation, card_metrics, mix_in
from napari_brainmvp.training.labels import IGNORED, LABEL_PRESETS, LabelDescription, find_labels, read_labels
from napari_brainmvp.training.meaning import describe_labels
from napari_brainmvp.training.metrics import CaseScores, RegionScores, region_scores
from napari_brainmvp.training.sources import DataSource, absolute_paths

COMMAND = [str(Path(sys.executable).parent / "brainmvp")]
TINY = EncoderSpec(channels=(8, 8, 16, 16), depths=(1, 1, 1, 1), head_size=8)
SMALL = {"crop": 32, "minutes": 0.0, "validate_every": 4, "precision": "32-true", "accelerator": "cpu", "init": "tiny"}
SHAPE = (40, 44, 36)


def write_case(folder: Path, seed: int, modalities=("t1", "t2", "flair"), sparse: bool = False) -> None:
    """A head with a bright ball (label 2) that has a core (label 1)."""
    rng = np.random.default_rng(seed)
    where = np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij"), -1)
    head = (((where - np.array(SHAPE) / 2) / (np.array(SHAPE) / 2.2)) ** 2).sum(-1) < 1
    distance = np.linalg.norm(where - rng.uniform(15, 24, 3), axis=-1)
    labels = np.where(distance < 4, 1, np.where(distance < 8, 2, 0)).astype(np.uint8)
    for key, contrast in zip(("t1", "t2", "flair"), (-30.0, 60.0, 40.0), strict=True):
        if key in modalities:
            image = 100 + contrast * (labels > 0) + contrast * (labels == 1) + rng.normal(0, 4, SHAPE)
            save(folder / f"{folder.name}_{key}.nii.gz", np.where(head, image, 0).astype(np.float32))
    if sparse:  # background is 3, nothing is 0
        labels = np.where(rng.random(SHAPE) < 0.2, np.where(labels, labels, 3), 0).astype(np.uint8)
    save(folder / f"{folder.name}_seg.nii.gz", labels)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six annotated studies; one has a single modality."""
    root = tmp_path / "data"
    for seed in range(6):
        write_case(root / f"sub-{seed:02d}", seed, ("t1",) if seed == 5 else ("t1", "t2", "flair"))
    (root / "dataset.json").write_text(json.dumps({"name": "balls", "labels": {"1": "core", "2": "shell"}}))
    return root


def spec_for(data: Path, **changes) -> FinetuneSpec:
    return FinetuneSpec(**{"data": (DataSource(path=str(data)),), "max_steps": 4, **SMALL, **changes})


def card_with(labels: tuple[Label, ...]) -> ModelCard:
    """The tiny model's card with other labels."""
    network = tiny_card().network.model_copy(update={"out_channels": 1 + len(labels)})
    return tiny_card(labels=labels, channels=(0, *(label.value for label in labels)), network=network)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


# --- labels -----------------------------------------------------------------------------------------------------


def test_brats_values_mean_different_things_in_different_years():
    old, ped = LABEL_PRESETS["brats"], LABEL_PRESETS["brats-ped"]
    assert dict(zip(old.names, old.members, strict=True))["enhancing tumour"] == (4,)
    assert dict(zip(ped.names, ped.members, strict=True))["enhancing tumour"] == (1,)
    values = np.array([0, 1, 2, 4])
    table = old.table[old.rows(values)]
    assert table.tolist() == [[0, 0, 0], [1, 1, 0], [1, 0, 0], [1, 1, 1]]
    with pytest.raises(StudyError, match="3"):
        old.rows(np.array([3]))


@pytest.mark.parametrize("preset", LABEL_PRESETS)
def test_painting_regions_in_order_gives_the_dataset_s_own_values(preset):
    labels = LABEL_PRESETS[preset]
    values = np.array([0, *labels.values])
    painted = np.zeros_like(values)
    for region, value in zip(labels.table[labels.rows(values)].T, labels.painted, strict=True):
        painted[region > 0] = value
    assert painted.tolist() == values.tolist()


def test_label_descriptions_as_people_write_them(tmp_path):
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"labels": {"1": "core", "2": "shell"}, "seed": 3}))
    assert read_labels(path) == read_labels(tmp_path) == LabelDescription(labels={1: "core", 2: "shell"})
    swapped = read_labels({"labels": {"background": 0, "core": 1, "ignore": 2}})
    assert (swapped.labels, swapped.unlabelled) == ({1: "core"}, 2)
    regions = read_labels({"labels": {"background": 0, "tumour": [1, 2], "core": [2], "cyst": 3}})
    assert regions.regions == {"tumour": (1, 2), "core": (2,), "cyst": (3,)}
    path = tmp_path / "labels.yaml"
    path.write_text("labels: {1: a, 2: b}\nbackground: 9\nunlabelled: 0\n")
    sparse = read_labels(path)
    assert sparse.rows(np.array([0, 9, 1, 2])).tolist() == [IGNORED, 0, 1, 2]
    assert LABEL_PRESETS["brats"] is read_labels("brats")
    assert find_labels(tmp_path / "list.json") == LabelDescription(labels={1: "core", 2: "shell"})
    assert find_labels(tmp_path / "nowhere" / "list.json") is None
    for content in ({"labels": {}}, {"labels": {"x": "y"}}, {"labels": {"1": "a"}, "unlabelled": 0}):
        with pytest.raises(StudyError):
            read_labels(content)
    for wrong in ({"regions": ["core", "shell"]}, {"regions": {"core": 1}}, {"labels": [["1", "core"]]}):
        (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"1": "core"}, **wrong}))
        for read in (read_labels, find_labels):
            with pytest.raises(StudyError, match=r"dataset\.json: .*regions as {name: \[values\]}"):
                read(tmp_path)
    with pytest.raises(FileError, match="brats-ped"):
        read_labels(tmp_path / "none.json")


# --- formulas ---------------------------------------------------------------------------------------------------


def test_the_loss_is_dice_and_cross_entropy_of_labelled_voxels():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 3, 4, 4, 4))
    index = rng.integers(-1, 3, (2, 4, 4, 4))
    index[index == 1] = 0  # label 1 does not occur
    target, labelled = truth(torch.from_numpy(index), torch.eye(3, dtype=torch.float64))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    seen = index >= 0
    hot = np.stack([(index == k) for k in range(3)], 1)
    entropy = -np.log(p[hot]).sum() / seen.sum()
    dice = []
    for k in (0, 2):
        q, t = p[:, k][seen], hot[:, k][seen]
        dice.append((2 * (q * t).sum() + 1) / (q.sum() + t.sum() + 1))
    expected = 0.7 * (1 - np.mean(dice)) + 0.3 * entropy
    found = segmentation_loss(torch.from_numpy(logits), target, labelled, "softmax", 0.7)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_regions_are_decided_one_by_one():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(1, 3, 4, 4, 4))
    labels = LABEL_PRESETS["brats"]
    values = rng.choice([0, 1, 2, 4], (1, 4, 4, 4))
    target, labelled = truth(torch.from_numpy(labels.rows(values)), torch.from_numpy(labels.table))
    p = 1 / (1 + np.exp(-logits))
    t = np.stack([np.isin(values, m) for m in labels.members], 1)
    entropy = -(t * np.log(p) + ~t * np.log(1 - p)).mean()
    dice = [(2 * (p[:, k] * t[:, k]).sum() + 1) / (p[:, k].sum() + t[:, k].sum() + 1) for k in range(3)]
    found = segmentation_loss(torch.from_numpy(logits), target, labelled, "sigmoid", 0.5)
    assert float(found) == pytest.approx(0.5 * (1 - np.mean(dice)) + 0.5 * entropy, rel=1e-5)
    alarms = segmentation_loss(torch.from_numpy(logits), 0 * target, labelled, "sigmoid", 0.5)
    assert float(alarms) == pytest.approx(-np.log(1 - p).mean(), rel=1e-5)


def test_unlabelled_voxels_carry_no_loss_and_no_gradient():
    labels = LabelDescription(labels={1: "a"}, background=2, unlabelled=0)
    values = torch.zeros(1, 4, 4, 4, dtype=torch.int64)
    values[0, 0] = 1
    values[0, 1] = 2
    logits = torch.randn(1, 2, 4, 4, 4, requires_grad=True)
    target, labelled = truth(torch.from_numpy(labels.rows(values.numpy())), torch.from_numpy(labels.table))
    segmentation_loss(logits, target, labelled, "softmax").backward()
    assert logits.grad[:, :, :2].abs().min() > 0
    assert logits.grad[:, :, 2:].abs().max() == 0
    nothing, none = truth(torch.full((1, 4, 4, 4), IGNORED), torch.from_numpy(labels.table))
    assert float(segmentation_loss(logits.detach(), nothing, none, "softmax")) == 0


def test_finer_outputs_count_twice_the_coarser_and_views_shall_agree():
    target, labelled = truth(torch.zeros(1, 4, 4, 4, dtype=torch.int64), torch.eye(2))
    outputs = [torch.randn(1, 2, 4, 4, 4) for _ in range(3)]
    a, b, c = (float(segmentation_loss(o, target, labelled, "softmax")) for o in outputs)
    assert float(deep_loss(outputs, target, labelled, "softmax")) == pytest.approx((a + 2 * b + 4 * c) / 7, rel=1e-5)
    assert float(consistency(torch.ones(1, 2), torch.zeros(1, 2))) == 1


def test_the_temperature_makes_confident_logits_honest():
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 3, generator=rng)
    classes = torch.distributions.Categorical(logits=logits).sample()
    target = torch.nn.functional.one_hot(classes, 3).float()
    assert fit_temperature(logits * 2, target, "softmax") == pytest.approx(2, rel=0.15)


def test_the_temperature_of_unions_is_that_of_their_classes():
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 3, generator=rng)
    classes = torch.distributions.Categorical(logits=logits).sample()
    target = (classes[:, None] >= torch.tensor([1, 2])).float()
    unions = Unions([(), (0,), (0, 1)], overlapping=True)
    assert fit_temperature(logits * 2, target, "sigmoid", unions) == pytest.approx(2, rel=0.15)


def test_scores_of_empty_masks_are_defined():
    nothing, something = np.zeros((10, 10, 10), bool), np.zeros((10, 10, 10), bool)
    something[2:6, 2:6, 2:6] = True
    assert (region_scores(nothing, nothing, (1, 1, 2)).dice, region_scores(nothing, nothing, (1, 1, 2)).hd95) == (1, 0)
    missed = region_scores(nothing, something, (1, 1, 2))
    assert (missed.dice, missed.volume_error_ml) == (0, pytest.approx(-0.128))
    assert missed.hd95 == pytest.approx(np.sqrt(100 + 100 + 400))
    moved = np.roll(something, 2, axis=2)
    both = region_scores(moved, something, (1, 1, 2))
    assert both.dice == pytest.approx(0.5)
    assert both.hd95 == pytest.approx(4)


# --- data -------------------------------------------------------------------------------------------------------


def test_bad_studies_are_named_and_the_rest_is_used(data, tmp_path):
    broken = data / "sub-01" / "sub-01_t2.nii.gz"
    broken.write_bytes(broken.read_bytes()[:500])
    (data / "sub-02" / "sub-02_seg.nii.gz").unlink()
    strange = np.zeros(SHAPE, np.uint16)
    strange[20, 20, 20] = 60000
    save(data / "sub-03" / "sub-03_seg.nii.gz", strange)
    strange[20, 20, 20] = 7
    save(data / "sub-04" / "sub-04_seg.nii.gz", strange)
    studies, labels, problems = collect(spec_for(data), PreparationSpec(), tmp_path / "cache")
    assert [s.name for s in studies] == ["sub-00", "sub-05"]
    assert labels.names == ("core", "shell")
    reasons = {p.name: p.reason for p in problems}
    assert "sub-01_t2.nii.gz" in reasons["sub-01"]
    assert "no labels" in reasons["sub-02"]
    assert "60000" in reasons["sub-03"]
    assert "7" in reasons["sub-04"]
    again, _, _ = collect(spec_for(data), PreparationSpec(), tmp_path / "cache")
    assert [s.labels_path for s in again] == [s.labels_path for s in studies]
    assert studies[0].labels.dtype == np.uint8
    save(data / "sub-00" / "sub-00_seg.nii.gz", np.ones(SHAPE, np.uint8))
    corrected, _, _ = collect(spec_for(data), PreparationSpec(), tmp_path / "cache")
    assert (corrected[0].labels == 1).mean() > 0.5, "corrected labels are read again"


def test_a_stroke_more_stores_no_scan_again(data, tmp_path):
    first, _, _ = collect(spec_for(data), PreparationSpec(), tmp_path / "cache")
    path = data / "sub-00" / "sub-00_seg.nii.gz"
    labels = np.asarray(nib.load(path).dataobj).copy()
    labels[20, 22, 18] = 1
    save(path, labels)
    again, _, _ = collect(spec_for(data), PreparationSpec(), tmp_path / "cache")
    assert [s.path for s in again] == [s.path for s in first]
    assert again[0].labels_path != first[0].labels_path
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 6 + 7
    cases, meaning = [Case(first[0]), Case(again[0])], LabelDescription.of_values({1, 2})
    stream = LabelledCrops(cases, ("t1",), meaning, spec_for(data))
    counts = [len(stream.voxels(case)[0]) for case in stream.cases]
    assert counts[1] == counts[0] + 1, "of two that share their scans, each has its own labels"


def test_labels_of_bids_derivatives_are_found(data, tmp_path):
    root = tmp_path / "bids"
    write_case(root / "sub-01" / "ses-1" / "anat", 3)
    for file in (root / "sub-01" / "ses-1" / "anat").iterdir():
        file.rename(file.with_name(file.name.replace("anat", "sub-01_ses-1")))
    there = root / "derivatives" / "manual" / "sub-01" / "ses-1" / "anat" / "sub-01_ses-1_space-orig_dseg.nii.gz"
    there.parent.mkdir(parents=True)
    (root / "sub-01" / "ses-1" / "anat" / "sub-01_ses-1_seg.nii.gz").rename(there)
    studies, labels, problems = collect(spec_for(root), PreparationSpec(), tmp_path / "cache")
    assert (len(studies), problems) == (1, [])
    assert labels.names == ("Label 1", "Label 2")


def test_nothing_to_train_on_says_why(data, tmp_path):
    for path in data.rglob("*_seg.nii.gz"):
        path.unlink()
    with pytest.raises(StudyError, match="sub-00 has no labels"):
        collect(spec_for(data), PreparationSpec(), tmp_path / "cache")


def test_crops_are_where_they_say_whatever_is_flipped(data, tmp_path):
    spec = spec_for(data, flip=(0.5, 0.5, 0.5), mixing=0.5, consistency=0.1, intensity=0.0)
    studies, labels, _ = collect(spec, PreparationSpec(), tmp_path / "cache")
    modalities = choose_modalities(studies)
    assert modalities == ("t1", "t2", "flair")
    crops = LabelledCrops([Case(s) for s in studies], modalities, labels, spec)
    centred = 0
    for index in range(30):
        sample = crops.sample(index)
        again = LabelledCrops(crops.cases, modalities, labels, spec).sample(index)
        assert all(torch.equal(sample[key], again[key]) for key in sample)
        assert sample["shown"].any(1).all(), "every view shows something"
        ball, image = sample["rows"] > 0, sample["image"]
        centred += int(ball.any())
        if ball.any() and sample["image"][1].any():
            assert image[1][ball].mean() > image[1][(sample["rows"] == 0) & (image[1] > 0)].mean()
    assert centred > 15
    first_round = [int(crops.sample(k)["image"][1].any()) for k in range(len(studies))]
    assert sum(first_round) == 5, "every case once before any again; one has no T2"


STROKES = LabelDescription(labels={2: "lesion", 3: "core"}, background=1, unlabelled=0)


@pytest.mark.parametrize(
    ("slices", "held"),
    [
        ({4: (1, 2), 9: (1, 2)}, None),
        ({4: (1, 2), 9: (1, 2), 14: (1, 2)}, (9, 10)),
        ({4: (1, 2), 9: (1, 2, 3), 14: (1, 2)}, (4, 5)),  # the core is on the middle one only
        ({4: (1, 2), 9: (1,), 14: (1, 2)}, (4, 5)),  # the middle one shows nothing
        ({4: (1, 2), 9: (2, 3), 14: (2, 3)}, (9, 10)),
        ({4: (1, 2), 9: (2, 3), 14: (1,)}, (4, 5)),
        ({4: (1, 3), 9: (2,), 14: (1, 2)}, (9, 10)),
        ({4: (1,), 9: (2,), 14: (1,)}, None),
        ({4: (1, 2), 5: (1, 2), 9: (1, 2), 14: (1, 2)}, (9, 10)),
        ({4: (1, 2), 5: (1, 2), 9: (1, 2, 3), 14: (1, 2), 15: (1, 2)}, (4, 6)),  # alike side by side: of one slice
    ],
)
def test_of_few_slices_a_middle_one_is_held_back_that_leaves_some_of_every_class(tmp_path, slices, held):
    labels = np.zeros((6, 6, 20), np.uint8)
    for z, values in slices.items():
        labels[: len(values), 0, z] = values
    np.save(tmp_path / "labels.npy", labels)
    study = CachedStudy("sub-1", ("t1",), tmp_path / "none.npy", tmp_path / "labels.npy")
    train, kept = split([study], FinetuneSpec(), STROKES)
    assert [case.slices for case in kept] == ([held] if held else [])
    assert [case.slices for case in train] == [held]


@pytest.mark.parametrize("count", [2, 3])
def test_three_painted_slices_are_measured_and_of_two_it_is_said_that_nothing_is(home, tmp_path, caplog, count):
    root = tmp_path / "one"
    write_case(root / "sub-01", 1)
    path = root / "sub-01" / "sub-01_seg.nii.gz"
    painted = np.asarray(nib.load(path).dataobj)
    wanted = np.argsort(-(painted == 1).sum((0, 1)))[:count]
    strokes = np.zeros_like(painted)
    strokes[..., wanted] = np.where(painted, painted, 3)[..., wanted]
    save(path, strokes)
    labels = LabelDescription(labels={1: "core", 2: "shell"}, background=3, unlabelled=0)
    folder = finetune(spec_for(root, labels=labels), tmp_path / "run", cache=tmp_path / "cache")
    card = find_model(folder).card
    assert {m.name for m in card.metrics} == ({"Dice, core", "Dice, shell"} if count == 3 else set())
    assert ("Nothing is held out" in caplog.text) == (count == 2)


@pytest.mark.parametrize(
    ("slices", "thickness", "kept"), [([6], 5.0, 0), ([6], 3.0, 0), ([4, 8], 5.0, 0), ([4, 6, 8], 5.0, 5)]
)
def test_slices_of_a_thick_sliced_scan_are_held_out_whole(home, tmp_path, slices, thickness, kept):
    folder = tmp_path / "data" / "case"
    folder.mkdir(parents=True)
    affine = np.diag([1, 1, thickness, 1])
    strokes = np.zeros((40, 40, 14), np.uint8)
    for z in slices:
        strokes[10:20, 10:20, z], strokes[24:30, 24:30, z] = 3, 1
    save(folder / "case_t1.nii.gz", brain((40, 40, 14)), affine)
    save(folder / "case_seg.nii.gz", strokes, affine)
    labels = LabelDescription(labels={1: "lesion"}, background=3, unlabelled=0)
    spec = spec_for(tmp_path / "data", labels=labels)
    studies, _, _ = collect(spec, PreparationSpec(), tmp_path / "cache")
    _, held = split(studies, spec, labels)
    assert sum(case.slices[1] - case.slices[0] for case in held) == kept


@pytest.mark.parametrize(("thickness", "held"), [(1.0, [(10, 11)]), (3.0, [(9, 12)]), (0.0, [])])
def test_slices_that_are_alike_count_by_the_scans_own_thickness(tmp_path, thickness, held):
    """An outline may have been copied from slice to slice."""
    labels = np.zeros((6, 6, 20), np.uint8)
    labels[:2, :2, 6:15], labels[2:4, :2, 6:15] = 1, 3
    np.save(tmp_path / "labels.npy", labels)
    study = CachedStudy("sub-1", ("t1",), tmp_path / "none.npy", tmp_path / "labels.npy", thickness)
    described = LabelDescription(labels={1: "lesion"}, background=3, unlabelled=0)
    assert [case.slices for case in split([study], FinetuneSpec(), described)[1]] == held


def test_sessions_of_one_subject_are_held_out_together(data):
    studies = [CachedStudy(f"sub-{k // 2}_ses-{k % 2}", ("t1",), Path()) for k in range(8)]
    train, held = split(studies, spec_for(data), LabelDescription.of_values([1]))
    assert [case.study.name for case in held] == ["sub-2_ses-0", "sub-2_ses-1"]
    assert len(train) == 6


def test_a_crop_too_small_to_normalise_is_refused(data):
    with pytest.raises(ValueError, match="batch normalisation"):
        spec_for(data, crop=16, batch=1, init="scratch")


def test_a_card_has_no_measure_of_what_no_held_out_case_shows():
    nothing, something = RegionScores(1.0, 0.0, 0.0, 0.0), RegionScores(0.5, 2.0, 1.0, 3.0)
    cases = [CaseScores("a", {"x": nothing, "y": something}), CaseScores("b", {"x": nothing, "y": nothing})]
    assert {(m.name, m.value) for m in card_metrics(cases, "slices")} == {("Dice, y", 0.75), ("HD95 in mm, y", 1.0)}


def test_slices_held_back_are_not_trained_on(data, tmp_path):
    studies, labels, _ = collect(spec_for(data), PreparationSpec(), tmp_path / "cache")
    train, held = split(studies[:1], spec_for(data), labels)
    assert len(train) == len(held) == 1
    first, last = held[0].slices
    crops = LabelledCrops(train, ("t1",), labels, spec_for(data))
    start = np.array([4, 4, first - 8])
    training, validation = (crops.cut(train[0], start, training=t)["rows"] for t in (True, False))
    assert (training[..., 8 : 8 + last - first] == IGNORED).all()
    assert (validation[..., 8 : 8 + last - first] != IGNORED).all()
    assert ((training >= 0) & (validation >= 0)).sum() == 0
    train, held = split(studies, spec_for(data), labels)
    assert (len(train), len(held), held[0].slices) == (5, 1, None)
    assert not {c.study.name for c in train} & {c.study.name for c in held}
    train, held = split(studies, spec_for(data, held_out=2), labels)
    assert (len(train), len(held)) == (4, 2)


# --- transfer ---------------------------------------------------------------------------------------------------


def test_the_same_task_gives_the_same_output(home):
    source = load_model(find_model("tiny"))
    torch.manual_seed(1)
    network = build_network(source.card)
    done = transfer(network, source, source.card.modalities, ("background", "CSF", "grey matter", "White matter"))
    assert (done.adapted, done.new) == ((), ())
    x = torch.randn(1, 4, 32, 32, 16)
    torch.testing.assert_close(network.eval()(x), source.network(x))


def test_heads_are_replaced_where_classes_differ_and_kept_where_they_do_not(home):
    source = load_model(find_model("tiny"))
    torch.manual_seed(1)
    network = build_network(card_with((Label(value=1, name="x", color="#000000"),)))
    transfer(network, source, source.card.modalities, ("background", "x"))
    head, old = (n.decoder.out.conv.conv.weight for n in (network, source.network))
    assert torch.equal(head[0], old[0])
    assert not torch.equal(head[1], old[1])
    x = torch.randn(1, 4, 32, 32, 16)
    torch.testing.assert_close(network.eval()(x)[:, 0], source.network(x)[:, 0])


def test_a_one_channel_encoder_gives_the_same_features_for_the_same_image_in_all_channels(tmp_path):
    torch.manual_seed(0)
    reconstruction = ReconstructionNetwork(("t1", "t2", "flair"), TINY, 8).eval()
    sizes = {"full_resolution_channels": 8, "deep_supervision": False, **TINY.model_dump()}
    spec = NetworkSpec(in_channels=1, out_channels=2, decoder="skips", **sizes)
    card = ModelCard(name="encoder", task="pretraining", network=spec, modalities=("t1", "t2", "flair"))
    source = load_model(find_model(save_model(tmp_path / "encoder", card, reconstruction)), "pretraining")
    network = build_network(tiny_card())
    done = transfer(network, source, ("t1", "t1c", "t2", "flair"), ("background", "a", "b", "c"))
    assert done.widened
    assert set(done.new) == {"decoder.out.conv.conv.weight", "decoder.out.conv.conv.bias"}
    looks = network.encoder.patch_embed1.proj.weight.flatten(2).abs().sum(2) > 0
    assert (looks.sum(1) == 1).all()  # every filter at one modality, and as many at each: they stay apart
    assert looks.sum(0).tolist() == [len(looks) // 4] * 4
    x = torch.randn(1, 1, 32, 32, 16)
    new = network.eval().encoder(x.repeat(1, 4, 1, 1, 1))
    for a, b in zip(new[1:], source.network.encode(x)[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    with torch.no_grad():  # of the decoder the convolutions; its conditions have no place in segmentation
        stems = [part.decoder.proj1(f[0]) for part, f in ((network, new), (source.network, source.network.encode(x)))]
    torch.testing.assert_close(*stems, rtol=1e-3, atol=1e-4)
    state, mine = source.network.state_dict(), network.state_dict()
    blocks = [key for key in mine if key.startswith("decoder.decoder")]
    assert len(blocks) == 16
    for key in blocks:
        torch.testing.assert_close(mine[key], state[key])
    fresh = build_network(tiny_card())
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    done = transfer(fresh, source, ("t1", "t1c", "t2", "flair"), encoder_only=True)
    assert {key for key in before if key.startswith("decoder.")} == set(done.new)
    for key, value in fresh.state_dict().items():
        torch.testing.assert_close(value, before[key] if key in done.new else mine[key])


def test_the_published_pretraining_network_gives_encoder_and_transposed_convolutions(tmp_path):
    torch.manual_seed(0)
    spec = NetworkSpec(in_channels=1, out_channels=1, **TINY.model_dump())
    card = ModelCard(name="official", task="pretraining", network=spec, modalities=("t1",))
    folder = save_model(tmp_path / "official", card, PretrainingNetwork(TINY))
    source = load_model(find_model(folder), "pretraining")
    network = build_network(tiny_card())
    done = transfer(network, source, ("t1", "t1c", "t2", "flair"), ())
    encoder = {k for k in network.state_dict() if k.startswith("encoder.")}
    assert encoder <= {*done.taken, *done.adapted}
    assert "decoder.decoder5.transp_conv.conv.weight" in done.taken


def test_frozen_encoders_stay_and_earlier_stages_move_slower(home, data, tmp_path):
    source = load_model(find_model("tiny"))
    network = build_network(source.card)
    groups = parameter_groups(
        network, FinetuneSpec(encoder_rate=0.5, layer_decay=0.5, learning_rate=1.0), train_stem=False
    )
    assert sorted(g["lr"] for g in groups) == [0.0625, 0.125, 0.25, 0.5, 1.0]
    assert sum(len(g["params"]) for g in groups) == len(list(network.parameters()))
    parameter_groups(network, FinetuneSpec(encoder_rate=0), train_stem=True)
    trained = {n for n, p in network.named_parameters() if p.requires_grad and n.startswith("encoder.")}
    assert trained == {"encoder.patch_embed1.proj.weight", "encoder.patch_embed1.proj.bias"}
    folder = finetune(spec_for(data, max_steps=3), tmp_path / "run", cache=tmp_path / "cache")
    made = load_model(find_model(folder))
    for (name, a), b in zip(
        made.network.encoder.state_dict().items(), source.network.encoder.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    one, two = (m.network.decoder.decoder2.transp_conv.conv.weight for m in (made, source))
    assert not torch.equal(one, two)


def test_hidden_and_missing_channels_show_their_template(home, data, tmp_path):
    spec = spec_for(data, mixing=0.0)
    studies, labels, _ = collect(spec, PreparationSpec(), tmp_path / "cache")
    source = load_model(find_model("tiny"))
    modalities = ("t1", "t1c", "t2", "flair")
    templates = make_templates(modalities, source, studies)
    torch.testing.assert_close(templates.volumes, source.templates.volumes)
    own = make_templates(("t2", "swi"), None, studies)
    assert own.volumes[0].max() > 1
    assert own.volumes[1].abs().max() == 0
    model = SegmentationModel(build_network(card_with(labels.card_labels())), templates, labels, spec)
    batch = LabelledCrops([Case(studies[0])], modalities, labels, spec).batch(0)
    views = model.views(batch)
    inside = (batch["image"] > 0).any(1)
    assert torch.equal(views[:, 0], batch["image"][:, 0])
    assert (views[:, 1][inside] >= 0.5).all()  # T1c is missing: the template's 0.5 to 1.5
    assert (views[:, 1][~inside] == 0).all()


def test_a_new_output_layer_starts_as_a_linear_probe(home, data, tmp_path):
    spec = spec_for(data, foreground=1.0, batch=2)
    studies, labels, _ = collect(spec, PreparationSpec(), tmp_path / "cache")
    source = load_model(find_model("tiny"))
    crops = LabelledCrops([Case(s) for s in studies[:3]], source.card.modalities, labels, spec)
    torch.manual_seed(0)
    network = build_network(card_with(labels.card_labels()))
    transfer(network, source, source.card.modalities, labels.channels)
    body = {k: v.clone() for k, v in network.state_dict().items() if not k.startswith("decoder.out.")}
    model = SegmentationModel(network, make_templates(source.card.modalities, source, studies), labels, spec)
    fabric = Fabric(accelerator="cpu", devices=1)

    def loss() -> float:
        with torch.no_grad():
            return float(np.mean([model.eval()(crops.batch(k))["loss"] for k in range(4)]))

    before = loss()
    fit_head(model, crops, fabric)
    assert loss() < 0.8 * before
    assert all(torch.equal(value, model.network.state_dict()[name]) for name, value in body.items())
    first = network.decoder.out.conv.conv.weight.clone()
    fit_head(model, crops, fabric)
    torch.testing.assert_close(first, network.decoder.out.conv.conv.weight, rtol=1e-3, atol=1e-4)


def test_every_label_is_looked_at_while_training(tmp_path):
    """Small ones too, where there are more labels than crops are looked at otherwise."""
    write_case(tmp_path / "data" / "case", 0)
    path = tmp_path / "data" / "case" / "case_seg.nii.gz"
    values = np.asarray(nib.load(path).dataobj).copy()
    for value in (3, 4, 5, 6):
        values[12 + 3 * (value - 3), 22, 17 : 17 + value - 1] = value
    save(path, values)
    labels = LabelDescription.of_values(range(1, 7))
    spec = spec_for(tmp_path / "data", labels=labels, crop=16)
    studies, _, _ = collect(spec, PreparationSpec(), tmp_path / "cache")
    crops = LabelledCrops([Case(studies[0])], ("t1",), labels, spec)
    batches = CropValidation(crops, labels, Fabric(accelerator="cpu", devices=1)).batches
    assert {int(batch["rows"][0, 8, 8, 8]) for batch in batches} >= set(range(1, 7))


@pytest.mark.parametrize("right", [(2, 3), (3, 2)])
def test_regions_are_evaluated_as_they_were_found_not_as_they_are_painted(tmp_path, right):
    """Neither holds the other: what is painted with the later one's value hides the earlier one."""
    (tmp_path / "case").mkdir()
    truth = np.zeros((32, 32, 32), np.uint8)
    truth[4:12, 8:24, 8:24], truth[12:16, 8:24, 8:24], truth[16:28, 8:24, 8:24] = 1, 2, 3
    save(tmp_path / "case" / "case_t1.nii.gz", filled())
    save(tmp_path / "case" / "case_seg.nii.gz", truth)
    labels = LabelDescription(labels={1: "a", 2: "both", 3: "b"}, regions={"left": (1, 2), "right": right})
    assert labels.painted == (1, 3)
    masks = np.stack([np.isin(truth, members) for members in labels.members]).astype(float)
    cases, problems = evaluate_segmentation(region_model(labels, masks), find_studies(tmp_path), labels)
    assert problems == []
    assert {name: s.dice for name, s in cases[0].scores.items()} == {"left": 1.0, "right": 1.0}


def test_a_whole_is_evaluated_where_none_of_its_parts_is_found(tmp_path):
    (tmp_path / "case").mkdir()
    truth = np.zeros((32, 32, 32), np.uint8)
    truth[8:24, 8:24, 8:24], truth[12:20, 12:20, 12:20] = 1, 2
    save(tmp_path / "case" / "case_t1.nii.gz", filled())
    save(tmp_path / "case" / "case_seg.nii.gz", truth)
    labels = LabelDescription(labels={1: "a", 2: "b"}, regions={"whole": (1, 2), "a": (1,), "b": (2,)})
    unsure = np.stack([truth > 0, 0.45 * (truth == 1), truth == 2]).astype(float)
    cases, _ = evaluate_segmentation(region_model(labels, unsure), find_studies(tmp_path), labels)
    assert {name: s.dice for name, s in cases[0].scores.items()} == {"whole": 1.0, "a": 0.0, "b": 1.0}


# --- runs -------------------------------------------------------------------------------------------------------


def test_training_learns_the_balls_and_the_model_segments_a_study(home, data, tmp_path, monkeypatch):
    spec = spec_for(
        data, max_steps=80, validate_every=40, minutes=60.0, encoder_rate=1.0, learning_rate=1e-2, freeze_norm=0.6,
        average=0.8, deep_supervision=True, modalities=("t1", "t2", "flair"),
    )  # fmt: skip
    run = tmp_path / "run"
    folder = finetune(spec, run, cache=tmp_path / "cache")
    losses = [float(r["segmentation"]) for r in rows(run / "metrics.csv")]
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:5])
    assert (run / "spec.json").is_file()
    assert len(list((run / "pictures").glob("*.png"))) == 2
    card = find_model(folder).card
    assert card.training["cases"] == 5
    scores = {m.name: m.value for m in card.metrics}
    assert scores["Dice, shell"] > 0.4
    assert [r["name"] for r in rows(run / "held_out.csv")] == ["core", "shell"]
    result = segment(read_study(data / "sub-00"), folder)
    assert [s.name for s in result.structures] == ["core", "shell"]
    assert not card.network.deep_supervision
    with pytest.raises(BrainMVPError, match="resume"):
        finetune(spec, run, cache=tmp_path / "cache")

    # what it started from was worse: no share of it is kept, on held-out cases or on slices
    source, trained = load_model(find_model("tiny")), load_model(find_model(folder))
    studies, labels, _ = collect(spec, source.card.preparation, tmp_path / "cache")
    held = split(studies, spec, labels)[1]
    crops = LabelledCrops(held, trained.card.modalities, labels, spec)
    validation = CropValidation(crops, labels, Fabric(accelerator="cpu", devices=1))
    templates = make_templates(trained.card.modalities, trained, studies)
    model = SegmentationModel(trained.network, templates, labels, spec).eval()
    good = {key: value.clone() for key, value in model.state_dict().items()}
    rough = {k: v + 3.0 * torch.randn(v.shape) if v.is_floating_point() else v for k, v in good.items()}
    close = {k: v * 1.001 if v.is_floating_point() else v for k, v in good.items()}
    for whole in (True, False):
        share, scores = mix_in(rough, model, validation, 0.5, whole_cases=whole)
        assert share == 0
        assert scores[0.0] > max(scores[0.5], scores[0.25])
        assert all(torch.equal(value, good[key]) for key, value in model.state_dict().items())
    assert mix_in(close, model, validation, 0.5, whole_cases=False)[0] == 0.5  # this costs nothing
    name = "network.decoder.out.conv.conv.weight"
    torch.testing.assert_close(model.state_dict()[name], good[name] * 1.0005, rtol=1e-5, atol=0)

    # other labels that its classes make up, under other names: the next training starts from what it knows
    renamed = LabelDescription(regions={"lesion": (1, 2), "nucleus": (1,)})
    spec = spec_for(data, init=str(folder), labels=renamed, max_steps=1, learning_rate=1e-7)
    (tmp_path / "second").mkdir()  # of a run with other labels that was stopped before its first checkpoint
    (tmp_path / "second" / "parts.json").write_text("[[], [0], [1]]")
    second = finetune(spec, tmp_path / "second", cache=tmp_path / "cache")
    card = find_model(second).card
    assert (card.network.parts, card.activation) == (((), (0, 1), (0,)), "sigmoid")
    again = segment(read_study(data / "sub-00"), second).labels
    assert (again != result.labels).mean() < 0.01
    assert ((again > 0) & (result.labels > 0)).sum() > 0.9 * (result.labels > 0).sum() > 0
    assert json.loads((tmp_path / "second" / "parts.json").read_text()) == [[], [0, 1], [0]]

    # what was measured on held-out cases is what the model that was written does
    with monkeypatch.context() as patch:  # a temperature that changes which classes make up a region
        patch.setattr(CropValidation, "temperature", lambda self, model: 4.0)
        hot = finetune(spec, tmp_path / "hot", cache=tmp_path / "cache")
    written = {row["name"]: float(row["dice"]) for row in rows(tmp_path / "hot" / "held_out.csv")}
    case = rows(tmp_path / "hot" / "held_out.csv")[0]["case"]
    files = [found for found in find_studies(data) if found.name == case]
    scores = evaluate_segmentation(load_model(find_model(hot)), files, renamed)[0][0].scores
    assert {name: score.dice for name, score in scores.items()} == pytest.approx(written, abs=0.005)

    # with nothing held out half of the start is kept; after cross-validation as much as in the folds
    start, kept = trained.network.state_dict(), {}
    for share in (0.5, 0.0):
        spec = spec_for(
            data, init=str(folder), labels=renamed, max_steps=3, held_out=0, start_share=share, learning_rate=1e-2
        )
        entry = find_model(finetune(spec, tmp_path / f"share-{share}", cache=tmp_path / "cache"))
        assert entry.card.training["start share"] == share
        kept[share] = load_model(entry).network.state_dict()
    name = "decoder.decoder2.conv_block.conv1.conv.weight"
    moved = kept[0.0][name] - start[name]
    assert moved.abs().max() > 3e-3
    torch.testing.assert_close(kept[0.5][name] - start[name], moved / 2, rtol=0.02, atol=3e-4)  # kept as float16
    for name in ("sub-01", "sub-03", "sub-05"):  # the second fold's cases have no core
        path = data / name / f"{name}_seg.nii.gz"
        labels = np.asarray(nib.load(path).dataobj)
        save(path, np.where(labels, 2, 0).astype(np.uint8))
    spec = spec_for(data, init=str(folder), labels=renamed, max_steps=1, folds=2)
    with monkeypatch.context() as patch:
        patch.setattr(CropValidation, "temperature", lambda self, model: 4.0)
        facts = find_model(finetune(spec, tmp_path / "folds", cache=tmp_path / "cache")).card.training
    assert facts["temperature"] == 4  # the model that is kept has nothing of its own to find one on
    by_share = {float(share): score for share, score in facts["score by start share"].items()}
    assert set(by_share) == {0.5, 0.25, 0.0}
    assert by_share[facts["start share"]] == max(by_share.values())
    found = [(tmp_path / "folds" / name / "parts.json") for name in ("fold-1", "fold-2", ".")]
    assert [json.loads(path.read_text()) for path in found] == [[], *[[[], [0, 1], [0]]] * 2]  # of what each is taught

    spec = spec_for(data, init=str(second), labels=renamed, max_steps=1, learning_rate=1e-7)
    third = finetune(spec, tmp_path / "third", cache=tmp_path / "cache")
    assert find_model(third).card.network.parts == card.network.parts
    assert (segment(read_study(data / "sub-00"), third).labels != again).mean() < 0.01


def test_folds_that_were_begun_are_gone_on_with_by_the_same_studies_only(home, data, tmp_path):
    for name in ("sub-03", "sub-04"):
        shutil.rmtree(data / name)
    spec, run = spec_for(data, folds=2, max_steps=2, held_out=0), tmp_path / "run"
    token = CancelToken()

    def stop(progress):
        if progress.step.startswith("Fold 2 of 2: Fine"):
            token.cancel()

    with pytest.raises(Cancelled):
        finetune(spec, run, cache=tmp_path / "cache", progress=stop, cancel=token)
    with pytest.raises(BrainMVPError, match="already holds a run"):
        finetune(spec, run, cache=tmp_path / "cache")
    write_case(data / "sub-new", 7)
    with pytest.raises(BrainMVPError, match="sub-new is new"):
        finetune(spec, run, cache=tmp_path / "cache", resume=True)
    shutil.rmtree(data / "sub-new")
    said = (data / "dataset.json").read_text()
    (data / "dataset.json").write_text(said.replace("core", "nucleus"))
    with pytest.raises(BrainMVPError, match="mean something else"):
        finetune(spec, run, cache=tmp_path / "cache", resume=True)
    (data / "dataset.json").write_text(said)
    folder = finetune(spec, run, cache=tmp_path / "cache", resume=True)
    assert find_model(folder).card.metrics[0].data == "2-fold cross-validation"


@pytest.mark.parametrize("init", ["tiny", "scratch"])
def test_a_study_that_the_network_sees_nothing_of_is_left_out(home, data, tmp_path, init):
    path = data / "sub-05" / "sub-05_t1.nii.gz"
    path.rename(path.with_name("sub-05_adc.nii.gz"))
    finetune(spec_for(data, init=init, max_steps=1, mixing=1.0), tmp_path / "run", cache=tmp_path / "cache")
    assert (tmp_path / "run" / "problems.txt").read_text().startswith("sub-05: has none of ")
    with pytest.raises(StudyError, match="No study has any of pd"):
        part_usable([CachedStudy("a", ("t1",), Path())], ["pd"])


def test_one_number_means_one_thing_in_all_datasets(tmp_path):
    for name, labels in (("a", {"1": "core"}), ("b", {"1": "shell"}), ("c", {"1": "core"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "dataset.json").write_text(json.dumps({"labels": labels}))
    a, b, c = (DataSource(path=str(tmp_path / name)) for name in "abc")
    assert describe_labels([a, c]).labels == {1: "core"}
    with pytest.raises(StudyError, match="--labels"):
        describe_labels([a, b])


def test_a_model_is_meant_by_its_name_whatever_lies_in_the_folder(home, data, tmp_path, monkeypatch):
    for name in ("tiny", "scratch", "mine"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    found = [absolute_paths(spec_for(data, init=name)).init for name in ("tiny", "scratch", "mine")]
    assert found == ["tiny", "scratch", str(tmp_path / "mine")]


def test_modalities_are_known_by_any_name(data):
    assert spec_for(data, modalities=("FLAIR", "T1ce")).modalities == ("flair", "t1c")
    with pytest.raises(ValueError, match="twice"):
        spec_for(data, modalities=("t1c", "T1ce"))


def test_a_resumed_run_says_what_it_cannot_change(home, data, tmp_path):
    run = tmp_path / "run"
    finetune(spec_for(data, max_steps=1), run, cache=tmp_path / "cache")
    for options in (["--folds", "3"], ["--init", "scratch"], ["--preset", "hour"], ["--labels", "brats"]):
        command = [*COMMAND, "finetune", "--out", "again", "--run", str(run), "--resume", *options]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2
        assert "A resumed run keeps its" in done.stderr


def test_a_card_names_no_folder_of_this_machine(home, tmp_path):
    """A folder may carry a patient's name; a run that starts from a model's folder, in two tasks."""
    root = tmp_path / "Jane Doe"
    write_case(root / "sub-01", 1)
    write_case(root / "sub-02", 2)
    (root / "classes.tsv").write_text("participant_id\tgroup\nsub-01\ta\nsub-02\tb\n")
    start = {"init": str(find_model("tiny").folder), "max_steps": 1}
    classes = {"task": "classification", "participants": str(root / "classes.tsv"), "size": (32, 32, 32)}
    for name, changes in {"one": start, "two": start | classes}.items():
        made = finetune(spec_for(root, **changes), tmp_path / name, cache=tmp_path / "cache")
        text = (made / "card.json").read_text()
        assert "Doe" not in text
        assert str(tmp_path) not in text
        assert find_model(made).card.training["recipe"]["data"] == [{"digest": path_digest(root), "weight": 1.0}]
        assert find_model(made).card.training["init"] == "tiny"
    old = find_model(made).card.training
    old["recipe"]["data"] = [{"path": str(root), "weight": 1.0, "base": None}, {"path": "synthetic:3", "weight": 1.0}]
    (made / "card.json").write_text(find_model(made).card.model_copy(update={"training": old}).model_dump_json())
    shared = push_model(find_model(made), str(tmp_path / "shared"))
    assert "Doe" not in (Path(shared) / "card.json").read_text()
    said = find_model(shared).card.training["recipe"]["data"]
    assert said == [{"digest": path_digest(root), "weight": 1.0}, {"path": "synthetic:3", "weight": 1.0}]


def test_a_label_that_no_class_is_part_of_gets_an_output_layer_of_its_own(home, data, tmp_path):
    # an untrained model sees every class everywhere
    folder = finetune(spec_for(data, max_steps=1), tmp_path / "run", cache=tmp_path / "cache")
    assert find_model(folder).card.network.parts == ()


def test_overlapping_regions_from_sparse_labels_of_one_case(home, tmp_path):
    root = tmp_path / "one"
    write_case(root / "sub-01", 1, sparse=True)
    labels = LabelDescription(regions={"ball": (1, 2), "core": (1,)}, background=3, unlabelled=0)
    spec = spec_for(root, labels=labels, encoder_rate=0.5)
    folder = finetune(spec, tmp_path / "run", cache=tmp_path / "cache")
    card = find_model(folder).card
    assert (card.activation, card.channels, card.modalities) == ("sigmoid", (2, 1), ("t1", "t1c", "t2", "flair"))
    names = {m.name for m in card.metrics}
    assert names == {"Dice, ball", "Dice, core"}, "no surface distances from sparse labels"
    assert "slices" in card.metrics[0].data
    found = segment(read_study(root / "sub-01"), folder).labels
    assert set(np.unique(found)) <= {0, 1, 2}


def test_one_label_only_and_a_case_without_it(home, tmp_path):
    root = tmp_path / "two"
    for seed in range(2):
        write_case(root / f"sub-{seed}", seed)
        save(root / f"sub-{seed}" / f"sub-{seed}_seg.nii.gz", np.full(SHAPE, 0 if seed else 5, np.uint8))
    folder = finetune(spec_for(root), tmp_path / "run", cache=tmp_path / "cache")
    assert find_model(folder).card.channels == (0, 5)


def test_cross_validation_measures_every_case_once(home, data, tmp_path):
    run = tmp_path / "run"
    folder = finetune(spec_for(data, folds=2, max_steps=2), run, cache=tmp_path / "cache")
    card = find_model(folder).card
    assert {m.n for m in card.metrics} == {6}
    assert card.training["cases"] == 6
    held = [{r["case"] for r in rows(run / f"fold-{k}" / "held_out.csv")} for k in (1, 2)]
    assert len(held[0]) == len(held[1]) == 3
    assert not held[0] & held[1]


class Line(Trainable):
    """A line with batch normalisation, in a real run of its own."""

    def __init__(self):
        super().__init__()
        self.norm, self.line = torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1)

    def set_mode(self, done):
        self.train()

    def forward(self, batch):
        return {"loss": (self.line(self.norm(batch["x"])) - batch["y"]).square().mean()}


def line_run(folder: Path, bad: set[int], steps: int = 20) -> Run:
    """Train on random batches, those of some numbers with a value that is not finite."""
    torch.manual_seed(0)
    model = Line()
    spec = FinetuneSpec(max_steps=steps, minutes=0.0, accelerator="cpu", precision="32-true", validate_every=5)
    groups = [{"params": list(model.parameters()), "lr": 0.01}]
    fabric = Fabric(accelerator="cpu", devices=1)
    run = Run(fabric, spec, folder, model, groups, steps, lambda average, _: {"score": float(average.norm.weight[0])})
    folder.mkdir()
    batches = []
    for k in range(steps):
        x = torch.randn(4, 3)
        x[0, 0] = float("nan") if k in bad else x[0, 0]
        batches.append({"x": x, "y": torch.ones(4, 1)})
    run.train(iter(batches), 0, no_progress, None)
    return run


def finite(folder: Path) -> bool:
    state = torch.load(folder, weights_only=True)
    parts = [state[key] for key in ("model", "average") if key in state]
    return all(value.isfinite().all() for part in parts for value in part.values() if value.is_floating_point())


def test_an_update_that_is_not_finite_is_left_out(tmp_path, caplog):
    run = line_run(tmp_path / "run", bad={0, 7, *range(10, 19)})
    assert run.skips.count == 0
    assert caplog.text.count("was skipped") == 11
    found = sorted((tmp_path / "run").glob("*.pt"))
    assert len(found) == 3
    assert all(finite(path) for path in found)
    assert all(p.isfinite().all() for p in (*run.result()[0].parameters(), *run.result()[0].buffers()))


def test_a_run_of_which_nothing_comes_is_given_up_in_words(tmp_path):
    with pytest.raises(BrainMVPError, match=r"10 steps in a row, up to step 14: lower learning_rate, which is 0\.01"):
        line_run(tmp_path / "run", bad=set(range(4, 20)))
    assert finite(max((tmp_path / "run").glob("checkpoint-*.pt")))


def test_it_stops_when_it_no_longer_gets_better_and_keeps_the_best(home, data, tmp_path):
    run = tmp_path / "run"
    folder = finetune(
        spec_for(data, max_steps=40, validate_every=2, patience=2, learning_rate=1e-12), run, cache=tmp_path / "cache"
    )
    assert len(rows(run / "metrics.csv")) == 6
    assert find_model(folder).card.training["step"] == 2


def test_a_stopped_run_writes_a_checkpoint_first(home, data, tmp_path):
    token = CancelToken()

    def stop_after_two(progress):
        if progress.step == "Fine-tuning" and progress.done == 2:
            token.cancel()

    spec = spec_for(data, minutes=60.0)
    with pytest.raises(Cancelled, match="step 2 of 4"):
        finetune(spec, tmp_path / "run", cache=tmp_path / "c", progress=stop_after_two, cancel=token)
    assert last_checkpoint(tmp_path / "run")["step"] == 2


def test_a_killed_run_resumes_to_the_same_curve(home, data, tmp_path):
    options = [f"--set={k}={v}" for k, v in SMALL.items()] + ["--max-steps=8", "--data", str(data)]
    options += ["--set=encoder_rate=0.3", "--set=consistency=0.1", "--set=mixing=0.5", "--cache", str(tmp_path / "c")]

    def start(name, *more):
        command = [*COMMAND, "finetune", "--out", name, "--run", str(tmp_path / name), *more]
        return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)

    whole = start("whole", *options)
    assert whole.wait(240) == 0, whole.stderr.read().decode()
    killed = start("killed", *options)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list((tmp_path / "killed").glob("checkpoint-*3.pt")):
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert last_checkpoint(tmp_path / "killed")["step"] < 8
    refused = start("killed", *options)
    assert refused.wait(120) == 2
    assert b"resume" in refused.stderr.read()
    other = start("killed", "--resume", "--set=crop=48", "--set=minutes=0.5")
    assert other.wait(120) == 2
    assert b"keeps its crop" in other.stderr.read()
    resumed = start("killed", "--resume", "--set=minutes=0.5", "--cache", str(tmp_path / "c"))
    assert resumed.wait(240) == 0, resumed.stderr.read().decode()
    assert json.loads((tmp_path / "killed" / "spec.json").read_text())["minutes"] == 0.5
    one, two = (rows(tmp_path / name / "metrics.csv") for name in ("whole", "killed"))
    assert [r["step"] for r in two] == [str(k) for k in range(1, 9)]
    for a, b in zip(one, two, strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-4)
    for name in ("whole", "killed"):
        assert find_model(name).card.task == "segmentation"
    weights = [load_model(find_model(name)).network.state_dict() for name in ("whole", "killed")]
    for key, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][key], rtol=1e-2, atol=1e-3)


def test_a_background_job_fine_tunes_and_enters_the_model(home, data, tmp_path):
    options = [f"--set={k}={v}" for k, v in SMALL.items()] + ["--max-steps=2", "--data", str(data)]
    command = [*COMMAND, "finetune", "--out", "mine", "--background", "--cache", str(tmp_path / "c"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Job mine" in done.stdout
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and not (home / "models" / "mine").exists():
        time.sleep(0.2)
    assert find_model("mine").card.labels[0].name == "core"
    refused = subprocess.run([*command, "--run", str(tmp_path / "r")], capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2


# --- specification and command line -----------------------------------------------------------------------------


def test_presets_and_settings():
    assert all(FinetuneSpec(**changes) for changes in PRESETS.values())
    paper = read_spec("paper", {})
    assert (paper.steps(7), paper.learning_rate, paper.dice) == (1200, 3e-4, 0.7)
    for preset, changes, word in (
        ("best", {}, "paper"),
        ("hour", {"crop": 33}, "crop"),
        ("hour", {"max_steps": 0, "epochs": 0}, "nothing"),
        ("hour", {"nonsense": 1}, "nonsense"),
    ):
        with pytest.raises(BrainMVPError, match=word):
            read_spec(preset, changes)
    code = "import sys, napari_brainmvp.training.finetuning as f; f.FinetuneSpec(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--out", "x"], "--data"),
        (["--out", "tiny", "--data", "DATA"], "already"),
        (["--out", "Not A Name", "--data", "DATA"], "name"),
        (["--out", "x", "--data", "/nowhere/at/all"], "neither a folder"),
        (["--out", "x", "--data", "DATA", "--init", "nothing"], "no model"),
        (["--out", "x", "--data", "DATA", "--labels", "nothing.json"], "label description"),
        (["--out", "x", "--data", "DATA", "--preset", "best"], "preset"),
        (["--out", "x", "--data", "DATA", "--set", "crop=33"], "crop"),
        (["--out", "x", "--resume"], "no run to resume"),
    ],
)
def test_mistakes_are_one_line_and_status_2(home, data, options, word):
    command = [*COMMAND, "finetune", *(str(data) if o == "DATA" else o for o in options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert word in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
