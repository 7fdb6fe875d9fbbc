"""Classification and evaluation: tables of classes, probe and fine-tuning, saliency, and real processes."""

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
from qtpy.QtCore import Qt
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, roc_auc_score
from sklearn.preprocessing import StandardScaler

from conftest import save
from models_for_tests import tiny_encoder, tiny_model
from napari_brainmvp.errors import BrainMVPError, FileError, StudyError
from napari_brainmvp.inference import classify
from napari_brainmvp.inference.classify import resize_box
from napari_brainmvp.inference.segment import fill_missing
from napari_brainmvp.io import class_of, read_participants, read_study
from napari_brainmvp.models import (
    Label,
    ModelCard,
    NetworkSpec,
    find_model,
    import_model,
    load_model,
    remove_model,
    save_model,
)
from napari_brainmvp.models.weights import build_network
from napari_brainmvp.networks import ClassificationNetwork, EncoderSpec, ReconstructionNetwork
from napari_brainmvp.networks.classification import describe_content
from napari_brainmvp.plugin.layers import layer_grid
from napari_brainmvp.preparation import PreparationSpec, prepare
from napari_brainmvp.progress import no_progress
from napari_brainmvp.training.checkpoints import last_checkpoint
from napari_brainmvp.training.evaluation import (
    ClassifiedCase,
    compare_segmentations,
    evaluate_segmentation,
    mcnemar,
)
from napari_brainmvp.training.finetuning import FinetuneSpec, finetune
from napari_brainmvp.training.finetuning.classification import _Classification
from napari_brainmvp.training.finetuning.linear_probe import fit_probe
from napari_brainmvp.training.finetuning.studies import ClassifiedStudies, _move, collect_classes, stratified_folds
from napari_brainmvp.training.labels import LabelDescription
from napari_brainmvp.training.metrics import CaseScores, RegionScores, class_scores
from napari_brainmvp.training.sources import DataSource, find_files

COMMAND = [str(Path(sys.executable).parent / "brainmvp")]
TINY = EncoderSpec(channels=(8, 8, 16, 16), depths=(1, 1, 1, 1), head_size=8)
SMALL = {
    "task": "classification", "init": "tiny", "size": (32, 32, 32), "hidden": 8, "validate_every": 4,
    "minutes": 0.0, "precision": "32-true", "accelerator": "cpu",
}  # fmt: skip


def write_subject(folder: Path, seed: int, bright: bool) -> None:
    """A head, with a bright ball in FLAIR or without."""
    rng = np.random.default_rng(seed)
    shape = (40, 44, 36)
    where = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1)
    head = (((where - np.array(shape) / 2) / (np.array(shape) / 2.2)) ** 2).sum(-1) < 1
    ball = np.linalg.norm(where - rng.uniform(16, 22, 3), axis=-1) < 9
    for key in ("T1w", "FLAIR"):
        image = 100 + rng.normal(0, 4, shape) + 80 * (ball & bright & (key == "FLAIR"))
        save(folder / "anat" / f"{folder.name}_{key}.nii.gz", np.where(head, image, 0).astype(np.float32))


def write_dataset(root: Path) -> Path:
    """Nine BIDS subjects, three of whom are patients; two more have no class."""
    lines = ["participant_id\tage\tdiagnosis"]
    for seed in range(9):
        write_subject(root / f"sub-{seed:02d}", seed, bright=seed % 3 == 0)
        lines.append(f"sub-{seed:02d}\t{40 + seed}\t{'patient' if seed % 3 == 0 else 'control'}")
    write_subject(root / "sub-90", 90, bright=True)
    write_subject(root / "sub-91", 91, bright=True)
    lines.append("sub-91\t50\tn/a")
    (root / "participants.tsv").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "bids")


def spec_for(data: Path, **changes) -> FinetuneSpec:
    return FinetuneSpec(**{"data": (DataSource(path=str(data)),), "max_steps": 4, **SMALL, **changes})


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a linear probe, fitted once."""
    root = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BRAINMVP_HOME", str(root / "home"))
        tiny_encoder(root / "home" / "models")
        spec = spec_for(write_dataset(root / "bids"), init="tiny-encoder", modalities=("t1", "flair"))
        return finetune(spec, root / "run", cache=root / "cache")


@pytest.fixture
def classifier(home, trained) -> str:
    return str(trained)


# --- the table --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "column", "word"),
    [
        ("name\tgroup\nsub-01\ta\n", "", "participant_id"),
        ("participant_id\tage\tsex\nsub-01\t3\tf\n", "", "which column"),
        ("participant_id\tgroup\tdiagnosis\nsub-01\ta\tb\n", "", "which column"),
        ("participant_id\tgroup\nsub-01\ta\n", "dx", "'dx'"),
        ("participant_id\tgroup\nsub-01\ta\nsub-01\tb\n", "", "two classes"),
        ("participant_id\tgroup\nsub-01\tn/a\n", "", "empty"),
        ("", "", "participant_id"),
    ],
)
def test_tables_that_do_not_say_it(tmp_path, text, column, word):
    path = tmp_path / "participants.tsv"
    path.write_text(text)
    with pytest.raises(StudyError, match=word):
        read_participants(path, column)


def test_tables_that_do(tmp_path):
    path = tmp_path / "participants.tsv"
    path.write_bytes("﻿participant_id\tage\tgroup\nsub-01\t3\tcontrol\nsub-02\t4\t\nx\t5\tpatient\n".encode())
    classes = read_participants(path)
    assert classes == {"sub-01": "control", "x": "patient"}
    assert read_participants(path, "age")["sub-02"] == "4"
    assert [class_of(n, classes) for n in ("sub-01_ses-1", "01", "sub-x", "sub-02")] == ["control"] * 2 + [
        "patient",
        None,
    ]
    assert class_of("x_2", classes) is None
    path.write_text("participant_id\tlesion\n1\tnone\n2\tNA\n3\tnan\n4\tN/A\n5\t \n")
    assert read_participants(path) == {"1": "none", "2": "NA", "3": "nan"}
    with pytest.raises(FileError):
        read_participants(tmp_path / "nothing.tsv")
    path.write_bytes(b"\xff\xfe\x00participant_id")
    with pytest.raises(FileError):
        read_participants(path)


def test_studies_without_a_class_are_named(data, tmp_path):
    broken = data / "sub-04" / "anat" / "sub-04_FLAIR.nii.gz"
    broken.write_bytes(broken.read_bytes()[:300])
    subjects, problems = collect_classes(spec_for(data), PreparationSpec(), tmp_path / "cache")
    assert sorted(p.name for p in problems) == ["sub-04", "sub-90", "sub-91"]
    assert [s.label for s in subjects].count("patient") == 3
    (data / "participants.tsv").write_text("participant_id\tgroup\nsub-01\ta\nsub-02\ta\n")
    with pytest.raises(StudyError, match="Two classes"):
        collect_classes(spec_for(data), PreparationSpec(), tmp_path / "cache")
    (data / "participants.tsv").unlink()
    with pytest.raises(FileError, match=r"participants\.tsv"):
        collect_classes(spec_for(data), PreparationSpec(), tmp_path / "cache")


# --- formulas ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3])
def test_the_probe_is_the_logistic_regression(classes):
    rng = np.random.default_rng(0)
    targets = np.arange(24) % classes
    features = rng.normal(3, 2, (24, 10)) + targets[:, None]
    weight, bias = fit_probe(features, targets)
    scaler = StandardScaler().fit(features)
    theirs = LogisticRegression(C=0.01, class_weight="balanced", max_iter=2000).fit(scaler.transform(features), targets)
    found = torch.softmax(torch.from_numpy(features).float() @ weight.T + bias, 1)
    np.testing.assert_allclose(found, theirs.predict_proba(scaler.transform(features)), atol=1e-4)


def test_folds_keep_the_classes_together():
    labels = ["a"] * 10 + ["b"] * 5
    folds = stratified_folds(labels, [[k] for k in range(15)], 5, 0)
    assert sorted(k for fold in folds for k in fold) == list(range(15))
    assert {(sum(labels[k] == "a" for k in f), sum(labels[k] == "b" for k in f)) for f in folds} == {(2, 1)}


def test_sessions_of_one_subject_stay_together_in_every_split(home, data, tmp_path):
    people = [[0, 1], [2], [3, 4, 5], [6], [7], [8]]
    folds = stratified_folds(["a", "a", "b", "a", "a", "a", "b", "a", "b"], people, 3, 0)
    assert sorted(k for fold in folds for k in fold) == list(range(9))
    assert all(set(studies) <= set(fold) or not set(studies) & set(fold) for fold in folds for studies in people)
    for folder in sorted(data.glob("sub-*")):
        (folder / "ses-1").mkdir()
        (folder / "anat").rename(folder / "ses-1" / "anat")
        shutil.copytree(folder / "ses-1", folder / "ses-2")
    spec = spec_for(data, max_steps=1)
    run = tmp_path / "run"
    subjects, _ = collect_classes(spec, PreparationSpec(), tmp_path / "cache")

    def of(subject):
        return subject.study.name.split("_")[0]

    assert len(subjects) == 2 * len(set(map(of, subjects)))
    trainer = _Classification(spec, run, None, subjects, ("t1", "flair"), no_progress, None)
    held = trainer._held_out()
    assert held
    rest = set(range(len(subjects))) - set(held)
    assert not {of(subjects[k]) for k in held} & {of(subjects[k]) for k in rest}


def test_sure_classes_are_ranked_beyond_single_precision():
    logits = torch.tensor([[0.0, -18], [0, -19], [0, -20], [0, 22], [0, 24], [0, 26]])
    truth = np.array([0, 0, 0, 1, 1, 1])
    assert class_scores((logits + torch.tensor([0.0, 40])).double().softmax(1).numpy(), truth).auc == 1.0


def test_what_is_moved_does_not_come_back_on_the_other_side(data):
    image = torch.zeros(1, 8, 8, 8)
    image[..., 0] = 1
    image[..., 5] = 2
    moved = _move(image, (0, 1, -2))
    assert moved.shape == image.shape
    assert (moved[0, :, 0] == 0).all()
    assert (moved[0, :, 1:, 3] == 2).all()
    assert moved[..., 4:].sum() == moved[..., :3].sum() == 0


def test_class_scores_and_their_intervals():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, 60)
    probabilities = np.exp(rng.normal(size=(60, 3)) + 2 * np.eye(3)[truth])
    probabilities /= probabilities.sum(1, keepdims=True)
    scores = class_scores(probabilities, truth)
    assert scores.accuracy == pytest.approx((probabilities.argmax(1) == truth).mean())
    assert scores.auc == pytest.approx(roc_auc_score(truth, probabilities, multi_class="ovr"))
    assert scores.f1 == pytest.approx(f1_score(truth, probabilities.argmax(1), average="macro"))
    assert scores.accuracy_ci[0] < scores.accuracy < scores.accuracy_ci[1]
    error = np.sqrt(scores.accuracy * (1 - scores.accuracy) / 60)
    assert scores.accuracy_ci[1] - scores.accuracy_ci[0] == pytest.approx(2 * 1.96 * error, rel=0.3)
    alone = class_scores(probabilities[truth == 1], truth[truth == 1])
    assert np.isnan(alone.auc)


def test_paired_tests():
    first = [ClassifiedCase(str(k), "a", {"a": 0.9, "b": 0.1} if k < 10 else {"a": 0.1, "b": 0.9}) for k in range(12)]
    second = [ClassifiedCase(str(k), "a", {"a": 0.1, "b": 0.9}) for k in range(12)]
    assert mcnemar(first, first) == 1
    assert mcnemar(first, second) == pytest.approx(2 * 0.5**10)
    scores = {
        model: [CaseScores(str(k), {"x": RegionScores(0.5 + more + k / 100, 1, 2, 3)}) for k in range(8)]
        for model, more in {"m": 0, "n": 0.2}.items()
    }
    rows = compare_segmentations(scores)
    assert rows[1].difference == pytest.approx(0.2)
    assert rows[1].p == pytest.approx(2 * 0.5**8)
    assert rows[0].volume_error == 1


def test_grad_cam_is_the_weighted_sum_of_the_maps():
    torch.manual_seed(0)
    network = ClassificationNetwork(2, 3, TINY, 1, 0).eval().requires_grad_(False)
    x = torch.rand(1, 2, 32, 48, 16)
    found = network.saliency(x, 1)
    assert found.shape == (32, 48, 16)
    assert 0 <= found.min() <= found.max() <= 1
    stages = network.stages(x)
    maps = stages[2].clone().requires_grad_(True)
    deeper = network.encoder.patch_embed4(maps)
    for block in network.encoder.blocks4:
        deeper = block(deeper)
    logits = network.head(network.pool([stages[0], stages[1], maps, network.encoder.norm(deeper)], 1))[0]
    (gradient,) = torch.autograd.grad(logits[1] - (logits[0] + logits[2]) / 2, maps)
    weights = gradient.numpy().mean((2, 3, 4))
    cam = np.maximum(np.einsum("bc,bcdhw->bdhw", weights, stages[2].numpy()), 0).sum(0).transpose(1, 2, 0)
    full = torch.nn.functional.interpolate(torch.from_numpy(cam)[None, None], (32, 48, 16), mode="trilinear")[0, 0]
    torch.testing.assert_close(found, full / full.max(), rtol=1e-3, atol=1e-4)


def test_classes_come_equally_often_whatever_their_number():
    volumes = [(torch.ones(1, 16, 16, 16), torch.tensor([True]))] * 10
    stream = ClassifiedStudies(volumes, [0] * 9 + [1], torch.zeros(1, 16, 16, 16), FinetuneSpec(task="classification"))
    assert 70 < sum(int(stream.sample(k)["target"]) for k in range(200)) < 130


# --- runs -------------------------------------------------------------------------------------------------------


def test_few_studies_get_a_linear_probe_that_tells_them_apart(classifier, data, tmp_path):
    card = find_model(classifier).card
    assert (card.task, card.classes, card.network.hidden) == ("classification", ("control", "patient"), 0)
    assert card.training["cases"] == {"control": 6, "patient": 3}
    scores = {m.name: m.value for m in card.metrics}
    assert scores["accuracy"] >= 8 / 9
    assert {m.n for m in card.metrics} == {9}
    assert set(card.training["95 % intervals"]) == {"accuracy", "auc", "f1"}
    for name, expected in {"sub-90": "patient", "sub-01": "control"}.items():
        result = classify(read_study(data / name), classifier)
        assert sum(result.probabilities.values()) == pytest.approx(1, abs=1e-3)
        assert result.best == expected
        assert result.saliency is None
    source = load_model(find_model(str(tiny_encoder(tmp_path))), "pretraining")
    made = load_model(find_model(classifier), "classification")
    kept = source.network.encoder.state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in made.network.encoder.state_dict().items())


def test_a_segmentation_model_describes_studies_by_what_it_sees(home, data, tmp_path):
    made = finetune(spec_for(data), tmp_path / "run", cache=tmp_path / "cache")
    model, source = load_model(find_model(made), "classification"), load_model(find_model("tiny"))
    assert model.card.network.tissues == 4
    state = model.network.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in source.network.state_dict().items())
    study = read_study(data / "sub-90")
    found = [classify(study, made, saliency=True, target=name) for name in ("control", "patient")]
    assert all(result.saliency.shape == study.grid.shape for result in found)
    assert max(result.saliency.max() for result in found) == pytest.approx(1, abs=0.1)
    assert min(result.saliency.min() for result in found) == 0
    result = found[0]
    result, described = found[0], []
    for k in range(9):
        prepared = prepare(read_study(data / f"sub-{k:02d}"), model.card.modalities, model.card.preparation)
        box = resize_box(fill_missing(prepared, model)[0], model.card.patch_size)
        described += [model.network.describe(view[None]).detach() for view in (box, box.flip(1))]
    np.testing.assert_allclose(model.network.typical, torch.cat(described).mean(0), atol=6e-2)

    # the same model with regions of its classes as output describes studies in the same way; one of regions alone not
    unions = source.card.network.model_copy(update={"parts": ((), (0,), (0, 1), (1,)), "out_channels": 2})
    names = {"labels": source.card.labels[:2], "channels": (1, 2), "activation": "sigmoid"}
    card = source.card.model_copy(update={"network": unions, **names, "name": "regions"})
    network = build_network(card)
    network.load_state_dict(source.network.state_dict())
    regions = save_model(tmp_path / "regions", card, network, source.templates)
    again = finetune(spec_for(data, init=str(regions)), tmp_path / "again", cache=tmp_path / "cache")
    assert classify(study, again).probabilities == pytest.approx(result.probabilities, abs=1e-3)
    plain = card.model_copy(update={"network": unions.model_copy(update={"parts": ()})})
    alone = save_model(tmp_path / "alone", plain, build_network(plain), source.templates)
    last = find_model(finetune(spec_for(data, init=str(alone)), tmp_path / "last", cache=tmp_path / "cache"))
    assert last.card.network.tissues == 0


def test_a_tissue_is_bright_where_more_of_it_than_usual_speaks_for_the_class():
    torch.manual_seed(0)
    network = ClassificationNetwork(1, 2, TINY, 1, 0, tissues=3).eval().requires_grad_(False)
    x = torch.rand(1, 1, 32, 32, 32)
    seen = network._tissues(x)[0].numpy()
    described = describe_content(torch.from_numpy(seen[None]))[0]
    network.typical.copy_(described + torch.randn(12))
    for index, sign in ((0, 1), (1, -1)):
        shown = network.saliency(x, index).numpy()
        weights = sign * (network.head.weight[0] - network.head.weight[1]).numpy()
        expected = np.zeros_like(shown)
        for k, tissue in enumerate(seen[1:]):
            more = [max(0, float(described[f] - network.typical[f])) for f in range(k, 12, 2)]
            expected += np.dot(weights[k::2], more) * tissue
        expected = np.maximum(expected, 0)
        np.testing.assert_allclose(shown, expected / max(expected.max(), 1e-12), atol=1e-3)
    assert shown.max() == 1 or network.saliency(x, 0).max() == 1
    network.typical.copy_(described + 1)  # there is nothing more of than usual
    assert network.saliency(x, 0).max() == 0


def test_content_is_what_there_is_and_how_much_of_it_in_one_place():
    rng = np.random.default_rng(0)
    seen = rng.dirichlet((1, 1, 1), (1, 32, 48, 16)).transpose(0, 4, 1, 2, 3)
    found = describe_content(torch.from_numpy(seen)).numpy()[0]
    expected = [np.log(seen[0, k].mean() + 1e-5) for k in (1, 2)]
    for edge in (1, 2, 4, 8, 16):
        starts = [range(0, size - edge + 1, max(1, edge // 2)) for size in (32, 48, 16)]
        for k in (1, 2):
            cubes = [
                seen[0, k, a : a + edge, b : b + edge, c : c + edge].mean()
                for a in starts[0] for b in starts[1] for c in starts[2]
            ]  # fmt: skip
            expected.append(np.log(max(cubes) + 1e-3))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_saliency_lies_on_the_scan_s_own_grid(classifier, data):
    folder = data / "sub-90" / "anat"
    affine = np.array([[-1.1, 0, 0, 20], [0, 0, 1.3, -10], [0, -1.2, 0, 30], [0, 0, 0, 1]])
    for path in folder.iterdir():
        save(path, np.asarray(nib.load(path).dataobj).transpose(0, 2, 1), affine)
    study = read_study(data / "sub-90")
    result = classify(study, classifier, saliency=True, target="control")
    assert result.saliency.shape == study.grid.shape
    assert result.saliency_class == "control"
    assert result.grid is study.grid
    with pytest.raises(StudyError, match="control, patient"):
        classify(study, classifier, target="nothing")


def test_an_encoder_of_one_channel_sees_every_modality_by_itself(home, data, tmp_path):
    torch.manual_seed(0)
    sizes = {"full_resolution_channels": 8, "deep_supervision": False, **TINY.model_dump()}
    card = ModelCard(
        name="encoder", task="pretraining", modalities=("t1", "flair"),
        network=NetworkSpec(in_channels=1, out_channels=2, decoder="skips", **sizes),
    )  # fmt: skip
    encoder = save_model(tmp_path / "encoder", card, ReconstructionNetwork(("t1", "flair"), TINY, 8))
    made = finetune(spec_for(data, init=str(encoder)), tmp_path / "run", cache=tmp_path / "cache")
    model = load_model(find_model(made), "classification")
    assert (model.card.modalities, model.card.network.in_channels) == (("t1", "flair"), 1)
    assert model.network.head.weight.shape == (2, 2 * 2 * 48)
    only = read_study(data / "sub-90" / "anat" / "sub-90_FLAIR.nii.gz")
    result = classify(only, made)
    assert any("T1" in warning for warning in result.warnings)


def test_more_studies_are_fine_tuned_and_measured_on_held_out_ones(home, data, tmp_path):
    run = tmp_path / "run"
    made = finetune(
        spec_for(data, probe_up_to=0, encoder_rate=1.0, max_steps=12, mixing=0.5), run, cache=tmp_path / "cache"
    )
    card = find_model(made).card
    assert (card.network.hidden, card.training["method"]) == (8, "fine-tuning")
    with (run / "validation.csv").open() as file:
        assert [r["step"] for r in csv.DictReader(file)] == ["4", "8", "12"]
    assert 0 < card.metrics[0].n < 5
    folds = finetune(
        spec_for(data, probe_up_to=0, encoder_rate=1.0, max_steps=1, folds=3), tmp_path / "f", cache=tmp_path / "cache"
    )
    assert find_model(folds).card.metrics[0].n == 9
    for name in ("sub-03", "sub-06"):  # one patient is left: a network that has not seen it cannot know patients
        shutil.rmtree(data / name)
    options = {"size": (16, 16, 16), "max_steps": 1, "encoder_rate": 1.0}
    for more in ({"probe_up_to": 0}, {}):  # trained, and a linear probe
        one = finetune(
            spec_for(data, folds=3, **options, **more), tmp_path / f"one{len(more)}", cache=tmp_path / "cache"
        )
        metric = find_model(one).card.metrics[0]
        assert (metric.data, metric.n in (4, 5)) == ("3-fold cross-validation", True)
    with pytest.raises(BrainMVPError, match="resume"):
        finetune(spec_for(data), run, cache=tmp_path / "cache")


def test_a_killed_run_resumes_to_the_same_curve(home, data, tmp_path):
    options = [f"--set={k}={list(v) if isinstance(v, tuple) else v}" for k, v in SMALL.items() if k != "task"]
    options += ["--task=classification", "--max-steps=8", f"--data={data}", "--set=probe_up_to=0"]
    options += ["--set=encoder_rate=0.5", "--cache", str(tmp_path / "c")]

    def start(name, *more):
        command = [*COMMAND, "finetune", "--out", name, "--run", str(tmp_path / name), *more]
        return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)

    whole = start("whole", *options)
    assert whole.wait(240) == 0, whole.stderr.read().decode()
    killed = start("killed", *options)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list((tmp_path / "killed").glob("checkpoint-*3.pt")):
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert last_checkpoint(tmp_path / "killed")["step"] < 8
    resumed = start("killed", "--resume", "--cache", str(tmp_path / "c"))
    assert resumed.wait(240) == 0, resumed.stderr.read().decode()
    curves = []
    for name in ("whole", "killed"):
        with (tmp_path / name / "metrics.csv").open() as file:
            curves.append([float(r["loss"]) for r in csv.DictReader(file)])
    assert len(curves[0]) == 8
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


# --- evaluation and the command line ----------------------------------------------------------------------------


def test_segmentations_are_measured_on_the_scan_s_grid_in_the_data_s_values(home, tmp_path):
    rng = np.random.default_rng(0)
    ball = np.linalg.norm(np.stack(np.meshgrid(*[np.arange(40)] * 3, indexing="ij"), -1) - 20, axis=-1) < 15
    image = np.where(ball, rng.uniform(50, 150, ball.shape), 0).astype(np.float32)
    folder = tmp_path / "data" / "case"
    affine = np.diag([1.0, 1, 2, 1])
    save(folder / "case_t1.nii.gz", image, affine)
    save(folder / "case_seg.nii.gz", np.zeros(ball.shape, np.uint8), affine)
    files, _ = find_files(DataSource(path=str(tmp_path / "data")))
    model = load_model(find_model("tiny"))
    labels = LabelDescription(labels={7: "a", 9: "b"}, regions={"both": (7, 9), "b": (9,)})
    found, _ = evaluate_segmentation(model, files, labels, values={1: 7, 2: 9, 3: 9})
    assert found[0].scores["both"].truth_ml == 0
    assert found[0].scores["both"].volume_ml >= found[0].scores["b"].volume_ml
    save(folder / "case_seg.nii.gz", np.full(ball.shape, 5, np.uint8), affine)
    with pytest.raises(StudyError, match="5"):
        evaluate_segmentation(model, files, labels)


def test_every_model_s_values_are_translated_by_themselves(home, tmp_path, capsys):
    """A model fine-tuned on the data paints its values already: they stay when those of the other are translated."""
    from napari_brainmvp.cli.evaluating import evaluate, read_mappings

    names = ("oedema", "core", "enhancing")
    labels = tuple(Label(value=v, name=n, color="#112233") for v, n in zip((2, 1, 4), names, strict=True))
    tiny_model(home / "models", "tuned", labels=labels, channels=(0, 2, 1, 4))  # the tiny model in the data's values
    cards = {name: find_model(name).card for name in ("tuned", "tiny")}
    assert read_mappings(["tiny:1=2,2=1", "tuned:4=4"], cards) == {"tiny": {1: 2, 2: 1}, "tuned": {4: 4}}
    assert read_mappings(["1=2"], {"tiny": cards["tiny"], "twin": cards["tiny"]}) == {"tiny": {1: 2}, "twin": {1: 2}}
    for texts, word in (
        (["1=2,2=1,3=4"], "--map tuned:1=2"),
        (["other:1=2"], "none of the models tuned, tiny"),
        (["tiny:7=2"], "does not paint 7: it paints 1, 2, 3"),
        (["tiny:1=2", "tiny:2=1"], "already"),
        (["tiny:1=2,1=4"], "twice"),
        (["tiny:1"], "pairs"),
    ):
        with pytest.raises(BrainMVPError, match=word):
            read_mappings(texts, cards)

    ball = np.linalg.norm(np.stack(np.meshgrid(*[np.arange(40)] * 3, indexing="ij"), -1) - 20, axis=-1) < 15
    image = np.where(ball, np.random.default_rng(0).uniform(50, 150, ball.shape), 0).astype(np.float32)
    root = tmp_path / "data"
    save(root / "case" / "case_t1.nii.gz", image)
    save(root / "case" / "case_seg.nii.gz", (2 * ball).astype(np.uint8))
    save(root / "vague" / "scan.nii.gz", image)
    out = tmp_path / "scores.csv"
    mapping = ["tiny:1=2,2=1,3=4"]
    evaluate(model=["tuned", "tiny"], data=[root], out=out, labels="brats", values=mapping, device="cpu")
    with out.open() as file:
        lines = list(csv.DictReader(file))
    scores = {name: [line["volume_ml"] for line in lines if line["model"] == name] for name in cards}
    assert scores["tuned"] == scores["tiny"]
    assert any(float(volume) for volume in scores["tiny"])
    assert "left out vague: vague: no modality recognised" in " ".join(capsys.readouterr().out.split())
    shutil.rmtree(root / "case")
    with pytest.raises(StudyError, match="vague"):
        evaluate(model=["tiny"], data=[root], out=out, overwrite=True)


def test_classify_and_evaluate_from_the_command_line(classifier, data, tmp_path):
    done = subprocess.run(
        [*COMMAND, "classify", str(data / "sub-90"), "-m", classifier, "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["class"] == "patient"
    assert sum(report["probabilities"].values()) == pytest.approx(1, abs=1e-3)
    out = tmp_path / "saliency.nii.gz"
    odd = data / "sub-90" / "anat" / "sub-90_desc-new_FLAIR.nii.gz"
    odd.write_bytes(odd.with_name("sub-90_FLAIR.nii.gz").read_bytes())
    command = [*COMMAND, "classify", str(data / "sub-90"), "-m", classifier, "--saliency", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, "--scan flair=" in done.stderr) == (2, True)
    command += ["--scan", f"flair={odd}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "patient" in done.stdout
    odd.unlink()
    assert nib.load(out).shape == (40, 44, 36)
    table = tmp_path / "scores.csv"
    command = [*COMMAND, "evaluate", "-m", classifier, "--data", str(data), "--out", str(table)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "sub-90" in done.stdout
    with table.open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 18
    assert {line["case"] for line in lines} == {f"sub-{k:02d}" for k in range(9)}


def test_the_same_participants_of_two_datasets_are_different_cases(classifier, tmp_path, capsys):
    from napari_brainmvp.cli.evaluating import evaluate

    sources = [tmp_path / "one", tmp_path / "two"]
    for source, truth in zip(sources, (("patient", "control"), ("control", "patient")), strict=True):
        for seed, name in enumerate(truth):
            write_subject(source / f"sub-{seed}", seed, bright=name == "patient")
        rows = [f"sub-{seed}\t{name}" for seed, name in enumerate(truth)]
        (source / "participants.tsv").write_text("\n".join(("participant_id\tgroup", *rows)))
    write_subject(sources[1] / "sub-2", 2, bright=True)  # of whom only this source says nothing
    table = tmp_path / "scores.csv"
    evaluate(model=[classifier], data=[*sources, sources[0]], out=table, device="cpu")
    assert "sub-2 has no class" in " ".join(capsys.readouterr().out.split())
    with table.open() as file:
        truths = {line["case"]: line["truth"] for line in csv.DictReader(file)}
    assert truths == {
        "one/sub-0": "patient", "one/sub-1": "control", "two/sub-0": "control", "two/sub-1": "patient",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("command", "word"),
    [
        (["classify", "DATA/sub-01", "-m", "tiny"], "classification model"),
        (["classify", "DATA/nothing", "-m", "tiny"], "does not exist"),
        (["evaluate", "-m", "tiny", "--data", "DATA", "--out", "OUT"], "no labels"),
        (["evaluate", "-m", "nothing", "--data", "DATA", "--out", "OUT"], "no model"),
        (["evaluate", "-m", "tiny", "--data", "DATA", "--out", "OUT", "--map", "4"], "--map"),
        (["finetune", "--task", "classification", "--out", "x", "--data", "DATA", "--column", "eyes"], "eyes"),
    ],
)
def test_mistakes_are_one_line_and_status_2(home, data, tmp_path, command, word):
    words = [w.replace("DATA", str(data)).replace("OUT", str(tmp_path / "out.csv")) for w in command]
    done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert word in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out.csv").exists()


# --- the panel --------------------------------------------------------------------------------------------------


@pytest.fixture
def panel(make_napari_viewer, classifier, qtbot):
    """The Classify panel in a real viewer, with the probe installed as ``mine``."""
    import_model(classifier, "mine")
    viewer = make_napari_viewer()
    _, widget = viewer.window.add_plugin_dock_widget("napari-brainmvp")
    widget.tabs.setCurrentIndex([widget.tabs.tabText(k) for k in range(widget.tabs.count())].index("Classify"))
    yield widget.classify, viewer
    widget.classify.abandon()


def test_one_click_classifies_and_shows_why(panel, data, qtbot):
    classify_panel, viewer = panel
    assert not classify_panel.button.isEnabled()
    assert "Choose at least one layer" in classify_panel.status.text()
    viewer.open(str(data / "sub-90"), plugin="napari-brainmvp")
    assert "of 9 studies" in classify_panel.measured.text()
    with qtbot.waitSignal(classify_panel.finished, timeout=60_000):
        qtbot.mouseClick(classify_panel.button, Qt.MouseButton.LeftButton)
    (first, high), (second, low) = classify_panel.bars.rows
    assert (first, second) == ("patient", "control")
    assert high + low == pytest.approx(1, abs=1e-3)
    assert not classify_panel.bars.isHidden()
    layer = viewer.layers["Speaks for patient"]
    assert layer_grid(layer).same_as(layer_grid(viewer.layers["FLAIR"]))
    assert "Done in" in classify_panel.status.text()
    classify_panel.saliency.setChecked(False)
    count = len(viewer.layers)
    with qtbot.waitSignal(classify_panel.finished, timeout=60_000):
        qtbot.mouseClick(classify_panel.button, Qt.MouseButton.LeftButton)
    assert len(viewer.layers) == count
    remove_model("mine")
    classify_panel.refresh_models()
    assert not classify_panel.button.isEnabled()
    assert "finetune" in classify_panel.status.text()


def test_cancel_and_a_model_whose_weights_went_bad(panel, data, qtbot):
    classify_panel, viewer = panel
    viewer.open(str(data / "sub-90"), plugin="napari-brainmvp")
    classify_panel.button.click()
    with qtbot.waitSignal(classify_panel.finished, timeout=60_000):
        classify_panel.run.stop()
    assert classify_panel.status.text().startswith("Cancelled")
    weights = find_model("mine").weights
    weights.write_bytes(weights.read_bytes()[:-1])
    with qtbot.waitSignal(classify_panel.finished, timeout=60_000):
        qtbot.mouseClick(classify_panel.button, Qt.MouseButton.LeftButton)
    assert "SHA-256" in classify_panel.status.text()
    assert classify_panel.button.isEnabled()
