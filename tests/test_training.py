"""Training: data, objective, schedule, resuming."""

import csv
import subprocess
import sys

import numpy as np
import pytest
import torch

from napari_brainmvp.models import find_model, load_model
from napari_brainmvp.networks import EncoderSpec, ModalityTemplates, SegmentationNetwork
from napari_brainmvp.training.augmentation import Augmentation, box_coordinates, fill_missing, template_volumes
from napari_brainmvp.training.pool import Crop, Pool
from napari_brainmvp.training.segmentation import SegmentationRecipe, dice_cross_entropy, train

TINY = EncoderSpec(channels=(8, 8, 16, 16), depths=(1, 1, 1, 1), head_size=8)


@pytest.fixture
def pool(tmp_path) -> Pool:
    """Two studies in the format of :func:`fill_pool`: a bright ball is class 4."""
    index = np.stack(np.meshgrid(*[np.arange(40)] * 3, indexing="ij"), -1)
    for seed in range(2):
        ball = np.linalg.norm(index - [20, 20, 15 + 8 * seed], axis=-1) < 9
        image = np.where(ball, 180, 90) + np.random.default_rng(seed).integers(-9, 9, ball.shape)
        study = np.stack([image, 255 - image, ball * 4]).astype(np.uint8)
        study[:, :3] = 0
        np.save(tmp_path / f"{seed:08d}.npy", study)
    return Pool(tmp_path, range(5))


def templates() -> ModalityTemplates:
    made = ModalityTemplates(("t1", "flair"), (4, 4, 4)).requires_grad_(False)
    made.volumes.fill_(1.0)
    return made


def test_crops_come_from_where_they_say(pool):
    rng = np.random.default_rng(0)
    for _ in range(20):
        crop = pool.crop(32, rng, foreground=0.5)
        assert crop.images.shape == (2, 32, 32, 32)
        start = np.rint(np.array(crop.corner) * 39).astype(int)
        a, b, c = (slice(s, s + 32) for s in start)
        assert any(np.array_equal(study[:-1, a, b, c], crop.images) for study in pool)


def test_a_crop_larger_than_the_study_is_padded(pool):
    crop = pool.crop(48, np.random.default_rng(0))
    assert crop.labels.shape == (48, 48, 48)
    assert (crop.images == 0).mean() > 0.3


def test_coordinates_span_the_box():
    crop = Crop(np.zeros((1, 8, 8, 8), np.uint8), np.zeros((8, 8, 8), np.uint8), (0.0, 0.25, 0.5), (1.0, 0.5, 0.5))
    where = box_coordinates(crop)
    torch.testing.assert_close(where[0, 0, 0], torch.tensor([-1.0, -0.5, 0.0]))
    torch.testing.assert_close(where[-1, -1, -1], torch.tensor([1.0, 0.5, 1.0]))


def test_augmentation_keeps_images_labels_and_places_together(pool):
    """Whatever is flipped, the ball stays brighter than its surroundings and its coordinates stay its own."""
    rng = np.random.default_rng(1)
    for _ in range(20):
        crop = pool.crop(40, rng, foreground=0.0)
        images, labels, present, where = Augmentation(noise=0.0)(crop, rng)
        assert images[0][labels == 4].mean() > images[0][labels == 0].mean()
        assert present.any()
        centre = where[labels == 4].mean(0)
        truth = box_coordinates(crop)[torch.from_numpy(crop.labels == 4)].mean(0)
        torch.testing.assert_close(centre, truth, atol=0.02, rtol=0)


def test_missing_channels_become_template_inside_the_foreground():
    images = torch.zeros(1, 2, 4, 4, 4)
    images[0, :, 1:3] = 0.7
    where = torch.zeros(1, 4, 4, 4, 3)
    filled = fill_missing(images, torch.tensor([[True, False]]), where, templates())
    assert (filled[0, 1, 1:3] == 1).all()
    assert (filled[0, 1, 0] == 0).all()
    assert torch.equal(filled[0, 0], images[0, 0])


def test_templates_are_medians(pool):
    volumes = template_volumes(pool.studies, (10, 10, 10))
    assert volumes.shape == (2, 10, 10, 10)
    assert float(volumes[0, 5, 0, 5]) == pytest.approx(0.9, abs=0.1)


def test_the_loss_is_dice_plus_cross_entropy():
    labels = torch.randint(0, 3, (1, 4, 4, 4))
    perfect = 50 * torch.nn.functional.one_hot(labels, 4).movedim(-1, 1).float()
    assert float(dice_cross_entropy(perfect, labels)) < 1e-4
    nothing = torch.zeros(1, 4, 4, 4, 4)
    p, volume = 0.25, torch.bincount(labels.flatten(), minlength=3).float()
    dice = (2 * p * volume + 1) / (p * 64 + volume + 1)
    assert float(dice_cross_entropy(nothing, labels)) == pytest.approx(float(1 - dice.mean()) + np.log(4), rel=1e-5)


def losses(run) -> list[float]:
    return [float(row[1]) for row in csv.reader((run / "losses.csv").open())]


def test_a_resumed_run_equals_the_uninterrupted_one(pool, tmp_path):
    """Stop after 3 of 6 steps (the checkpoint of every step is kept), go on, and compare losses and weights."""
    results = {}
    recipe = SegmentationRecipe(steps=6, batch=1, crop=32, warm_up=2, minutes=0.0)
    for name, stops in {"whole": [6], "parts": [3, 6]}.items():
        for stop in stops:
            torch.manual_seed(0)
            network = SegmentationNetwork(2, 5, TINY, 8, deep_supervision=False)

            class StopError(Exception):
                pass

            def halt(progress, stop=stop, error=StopError):
                if progress.done > stop:
                    raise error

            try:
                results[name] = train(network, templates(), pool, recipe, tmp_path / name, progress=halt)
            except StopError:
                # the step after the last checkpoint is done again
                lines = (tmp_path / name / "losses.csv").read_text().splitlines()[:stop]
                (tmp_path / name / "losses.csv").write_text("\n".join(lines) + "\n")
    np.testing.assert_allclose(losses(tmp_path / "parts"), losses(tmp_path / "whole"), rtol=1e-4)
    for a, b in zip(results["whole"].parameters(), results["parts"].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_training_learns_the_ball(pool, tmp_path):
    torch.manual_seed(0)
    recipe = SegmentationRecipe(steps=60, batch=1, crop=32, warm_up=5, learning_rate=3e-3, average=0.9)
    train(SegmentationNetwork(2, 5, TINY, 8, deep_supervision=False), templates(), pool, recipe, tmp_path / "run")
    curve = losses(tmp_path / "run")
    assert np.mean(curve[-10:]) < 0.5 * np.mean(curve[:5])


def test_the_schedule_warms_up_and_ends_at_zero():
    recipe = SegmentationRecipe(steps=100, warm_up=10, learning_rate=1.0)
    assert recipe.rate(0) == pytest.approx(0.1)
    assert recipe.rate(10) == pytest.approx(1.0)
    assert recipe.rate(99) < 0.01


def test_the_script_that_trains_the_default_model_runs_and_goes_on(tmp_path):
    """One study and two steps: enough to go through every stage, twice."""
    command = [sys.executable, "-m", "napari_brainmvp.training.default_model"]
    command += ["--pool", tmp_path / "pool", "--run", tmp_path / "run", "--out", tmp_path / "out", "--device", "cpu"]
    command += ["--studies", "1", "--crop", "32", "--batch", "1"]
    subprocess.run([*map(str, command), "--steps", "2"], check=True, capture_output=True)
    model = load_model(find_model(tmp_path / "out" / "brain-tissue-lesion"))
    assert model.card.training["recipe"]["steps"] == 2
    assert model.templates.volumes.max() > 0.5
    again = subprocess.run([*map(str, command), "--steps", "3"], capture_output=True, text=True)
    assert "Resuming" in again.stderr
    assert "already exists" in again.stderr  # the finished model is not overwritten
    assert len(losses(tmp_path / "run")) == 3
