"""The model that ships: it is what its card says, and it works."""

import numpy as np
import pytest

from napari_brainmvp.inference import SegmentOptions, segment
from napari_brainmvp.models import DEFAULT_MODEL, find_model, load_model
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


def test_a_glioma_study_it_never_saw(model, study):
    truth = study.labels.data
    found = segment(study, model, QUICK).labels
    assert dice(found == 2, truth == 2) > 0.8
    assert dice(found == 3, truth == 3) > 0.8
    assert dice(found >= 4, truth >= 4) > 0.75


def test_flair_alone_still_shows_the_lesion(model, study):
    result = segment(study.with_modalities(("flair",)), model, QUICK)
    assert "T1, T1c, T2 missing" in result.warnings[0]
    assert dice(result.labels >= 4, study.labels.data >= 4) > 0.5
