"""The model that ships: it is what its card says, and it works."""

from dataclasses import replace

import numpy as np
import pytest

from napari_brainmvp.inference import SegmentOptions, segment
from napari_brainmvp.models import DEFAULT_MODEL, find_model, load_model
from napari_brainmvp.study import Grid, Study
from napari_brainmvp.synthesis import SynthesisSpec, make_study

HELD_OUT = 9_400_000
"""A seed no training and no benchmark uses."""

QUICK = SegmentOptions(device="cpu", overlap=0.1)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * (a & b).sum() / (a.sum() + b.sum())


@pytest.fixture(scope="module")
def study():
    return make_study(HELD_OUT, SynthesisSpec(lesion="glioma"))


@pytest.fixture(scope="module")
def model():
    entry = find_model(DEFAULT_MODEL)
    assert entry.shipped
    return load_model(entry)


def test_the_card_says_what_was_measured(model):
    card = model.card
    assert {label.value for label in card.labels} == {1, 2, 3, 4, 5, 6}
    assert "not a medical device" in card.notice.lower()
    assert any("glioma" in metric.data for metric in card.metrics)
    assert all(metric.script for metric in card.metrics)
    assert card.training["script"]


def test_a_slab_of_a_glioma_study_it_never_saw(model, study):
    lesion = np.flatnonzero((study.labels.data >= 4).any((0, 1)))
    low = max(0, int(lesion.mean()) - 40)
    affine = study.grid.affine.copy()
    affine[:3, 3] += low * affine[:3, 2]
    grid = Grid((*study.grid.shape[:2], 80), affine)
    cut = {k: replace(scan, data=scan.data[..., low : low + 80], grid=grid) for k, scan in study.scans.items()}
    truth = study.labels.data[..., low : low + 80]
    found = segment(Study("slab", cut), model, QUICK).labels
    assert dice(found == 2, truth == 2) > 0.8
    assert dice(found == 3, truth == 3) > 0.8
    assert dice(found >= 4, truth >= 4) > 0.75


def test_flair_alone_still_shows_the_lesion(model, study):
    result = segment(study.with_modalities(("flair",)), model, QUICK)
    assert "T1, T1c, T2 missing" in result.warnings[0]
    assert dice(result.labels >= 4, study.labels.data >= 4) > 0.5
