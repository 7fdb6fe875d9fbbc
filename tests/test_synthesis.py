"""Synthetic studies: physics, anatomy, lesions, reproducibility."""

import numpy as np
import pytest
import torch

from napari_brainmvp.study import MODALITIES
from napari_brainmvp.synthesis import SynthesisSpec, make_study
from napari_brainmvp.synthesis.draws import Draws, box_mean
from napari_brainmvp.synthesis.physics import TISSUES, draw_sequence


def mean_signal(modality: str, tissue: str) -> float:
    return float(np.mean([draw_sequence(modality, Draws(seed))(TISSUES[tissue]) for seed in range(30)]))


@pytest.mark.parametrize(
    ("modality", "order"),
    [
        ("t1", ["csf", "grey", "white"]),
        ("t1c", ["white", "enhancing"]),
        ("t2", ["white", "grey", "oedema", "csf"]),
        ("flair", ["csf", "white", "grey", "oedema"]),
        ("flair", ["grey", "demyelination"]),
        ("pd", ["white", "grey"]),
        ("dwi", ["csf", "grey", "infarct"]),
        ("adc", ["infarct", "white", "oedema", "csf"]),
        ("mra", ["white", "blood"]),
    ],
)
def test_tissues_are_ordered_as_on_real_scans(modality, order):
    values = [mean_signal(modality, tissue) for tissue in order]
    assert values == sorted(values)


def test_spin_echo_formula():
    signal = draw_sequence("t2", Draws(3))
    draws = Draws(3)
    tr, te = draws.uniform(2800, 6500), draws.uniform(80, 125)
    grey = TISSUES["grey"]
    expected = grey.pd * (1 - np.exp(-tr / grey.t1)) * np.exp(-te / grey.t2)
    assert signal(grey) == pytest.approx(expected)


def test_every_modality_has_a_signal_and_others_are_refused():
    for key in MODALITIES:
        assert draw_sequence(key, Draws(0))(TISSUES["white"]) > 0
    with pytest.raises(ValueError, match="no signal equation"):
        draw_sequence("swi", Draws(0))
    with pytest.raises(ValueError, match="choose one of"):
        SynthesisSpec(**{"lesion": "cold"})


@pytest.fixture(scope="module")
def glioma():
    return make_study(11, SynthesisSpec(lesion="glioma"))


def test_the_same_seed_gives_the_same_study(glioma):
    again = make_study(11, SynthesisSpec(lesion="glioma"))
    np.testing.assert_array_equal(again.labels.data, glioma.labels.data)
    for key, scan in glioma.scans.items():
        np.testing.assert_array_equal(again.scans[key].data, scan.data)
    other = make_study(12, SynthesisSpec(lesion="glioma"))
    assert other.grid.shape != glioma.grid.shape or (other.labels.data != glioma.labels.data).any()


def test_a_glioma_study_is_a_head_with_a_tumour(glioma):
    labels = glioma.labels.data
    litres = [(labels == value).sum() / 1e6 for value in range(7)]
    assert 0.05 < litres[1] < 0.5
    assert 0.4 < litres[2] < 1.4
    assert 0.25 < litres[3] < 0.9
    assert 0.001 < sum(litres[4:]) < 0.35
    flair, t1 = glioma.scans["flair"].data, glioma.scans["t1"].data
    assert np.median(flair[labels == 4]) > 1.1 * np.median(flair[labels == 3])
    assert np.median(t1[labels == 3]) > np.median(t1[labels == 2]) > np.median(t1[labels == 1])
    assert (flair[labels == 0] == 0).mean() > 0.98


@pytest.mark.parametrize("lesion", ["none", "ms", "stroke"])
def test_the_other_kinds(lesion):
    study = make_study(7, SynthesisSpec(("flair", "dwi", "adc"), lesion))
    abnormal = study.labels.data >= 4
    if lesion == "none":
        assert abnormal.mean() < 0.001
    else:
        assert abnormal.any()
        inside, tissue = study.scans["flair"].data[abnormal], study.scans["flair"].data[study.labels.data == 3]
        assert inside.mean() > tissue.mean()
    if lesion == "stroke":
        adc = study.scans["adc"].data
        assert np.median(adc[abnormal]) < np.median(adc[study.labels.data == 2])


def test_a_head_has_more_than_a_brain():
    study = make_study(3, SynthesisSpec(("t1",), "none", head=1.0))
    assert (study.scans["t1"].data[study.labels.data == 0] > 100).sum() > 100_000


def test_box_mean_is_an_average():
    x = torch.rand(9, 10, 11)
    expected = torch.nn.functional.avg_pool3d(x[None, None], 3, stride=1, padding=1)[0, 0]
    torch.testing.assert_close(box_mean(x, 3), expected, rtol=1e-4, atol=1e-5)
