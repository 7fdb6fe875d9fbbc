"""Models that leave: MONAI bundles that run by MONAI's own means, folders, and the way back."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from conftest import brain, save
from models_for_tests import tiny_card, tiny_encoder, tiny_model
from napari_brainmvp.errors import BrainMVPError, FileError, ModelError
from napari_brainmvp.inference import segment
from napari_brainmvp.inference.bundle import find_cases
from napari_brainmvp.io import read_study
from napari_brainmvp.models import find_model, list_models, load_model
from napari_brainmvp.models.bundle import export_bundle
from napari_brainmvp.models.sharing import export_folder, pull_model, push_model


def monai_bundle(command: str, folder: Path, **options: str) -> subprocess.CompletedProcess:
    """Run MONAI's bundle command as a user would; without the package fire, by the function behind it."""
    if find_spec("fire") is not None:
        flags = [part for key, value in options.items() for part in (f"--{key}", value)]
        line = [sys.executable, "-m", "monai.bundle", command, *flags]
    else:
        line = [sys.executable, "-c", f"from monai.bundle import {command}; {command}(**{options!r})"]
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)


def brainmvp(*arguments) -> subprocess.CompletedProcess:
    command = [str(Path(sys.executable).with_name("brainmvp")), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def studies(tmp_path, study_folder) -> Path:
    """Two studies, one of them thick, oblique and without T1c."""
    second = study_folder.parent / "studies" / "second"
    first = second.with_name(study_folder.name)
    second.parent.mkdir()
    study_folder.rename(first)
    turn = np.array([[0.97, -0.24, 0, 3], [0.24, 0.97, 0, -8], [0, 0, 3, 2], [0, 0, 0, 1]])
    for seed, key in enumerate(("t1", "t2", "flair")):
        save(second / f"second_{key}.nii.gz", brain((40, 44, 14), seed + 5), turn)
    return second.parent


def test_a_bundle_runs_in_monai_and_gives_the_same_labels(home, studies, tmp_path):
    done = brainmvp("models", "export", "tiny", "--format", "monai-bundle", "--out", tmp_path / "bundle")
    assert done.returncode == 0, done.stderr
    ran = monai_bundle(
        "run",
        tmp_path / "bundle",
        config_file="configs/inference.json",
        meta_file="configs/metadata.json",
        dataset_dir=str(studies),
        output_dir=str(tmp_path / "labels"),
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    for folder in studies.iterdir():
        written = nib.load(tmp_path / "labels" / f"{folder.name}_seg.nii.gz")
        expected = segment(read_study(folder), "tiny")
        np.testing.assert_array_equal(np.asarray(written.dataobj), expected.labels)
        np.testing.assert_allclose(written.affine, expected.grid.affine, atol=1e-5)
        assert len(np.unique(expected.labels)) > 1


def test_the_metadata_is_verified_by_monai_without_a_network(home, tmp_path):
    bundle = export_bundle(find_model("tiny"), tmp_path / "bundle")
    options = {"meta_file": "configs/metadata.json", "filepath": "configs/schema.json"}
    done = monai_bundle("verify_metadata", bundle, **options)
    assert done.returncode == 0, done.stderr
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    assert metadata["network_data_format"]["inputs"]["image"]["channel_def"]["3"] == "flair"
    assert metadata["network_data_format"]["outputs"]["pred"]["channel_def"]["0"] == "background"
    del metadata["network_data_format"]["inputs"]["image"]["num_channels"]
    (bundle / "configs" / "metadata.json").write_text(json.dumps(metadata))
    done = monai_bundle("verify_metadata", bundle, **options)
    assert done.returncode != 0
    assert "num_channels" in done.stderr


def test_the_bundles_network_can_be_built_by_monai_alone(home, tmp_path):
    from monai.bundle import ConfigParser

    bundle = export_bundle(find_model("tiny"), tmp_path / "bundle")
    parser = ConfigParser()
    parser.read_config(bundle / "configs" / "inference.json")
    network = parser.get_parsed_content("network_def")
    network.load_state_dict(torch.load(bundle / "models" / "model.pt", weights_only=True))
    assert network.eval()(torch.zeros(1, 4, 32, 32, 32)).shape == (1, 4, 32, 32, 32)
    assert "pip install napari-brainmvp" in (bundle / "docs" / "README.md").read_text()


def test_a_network_whose_outputs_are_unions_is_built_by_monai_as_well(home, tmp_path):
    from monai.bundle import ConfigParser

    parts = ((), (0,), (0, 1), (0,), ())
    spec = tiny_card().network.model_copy(update={"parts": parts, "out_channels": 2})
    folder = tiny_model(home / "models", "unions", network=spec, activation="sigmoid", channels=(2, 1))
    bundle = export_bundle(find_model(folder), tmp_path / "bundle")
    parser = ConfigParser()
    parser.read_config(bundle / "configs" / "inference.json")
    network = parser.get_parsed_content("network_def")
    network.load_state_dict(torch.load(bundle / "models" / "model.pt", weights_only=True))
    x = torch.rand(1, 4, 32, 32, 32)
    torch.testing.assert_close(network.eval()(x), load_model(find_model(folder)).network(x))
    assert network(x).shape == (1, 2, 32, 32, 32)


def test_regions_are_exported_too(home, studies, tmp_path):
    tiny_model(home / "models", "regions", activation="sigmoid", channels=(2, 1, 3, 3))
    bundle = export_bundle(find_model("regions"), tmp_path / "bundle")
    one = studies / "second"
    options = {"config_file": "configs/inference.json", "dataset_dir": str(one), "output_dir": str(tmp_path / "o")}
    ran = monai_bundle("run", bundle, **options)
    assert ran.returncode == 0, ran.stderr[-2000:]
    labels = np.asarray(nib.load(tmp_path / "o" / "second_seg.nii.gz").dataobj)
    np.testing.assert_array_equal(labels, segment(read_study(one), "regions").labels)


def test_what_cannot_be_exported_says_so(home, tmp_path):
    tiny_encoder(home / "models")
    with pytest.raises(ModelError, match="is a pretraining model"):
        export_bundle(find_model("tiny-encoder"), tmp_path / "b")
    assert list(tmp_path.glob("*b*.part")) == []
    (tmp_path / "there").mkdir()
    with pytest.raises(FileError, match="already exists"):
        export_bundle(find_model("tiny"), tmp_path / "there")
    done = brainmvp("models", "export", "nothing", "--out", tmp_path / "x")
    assert done.returncode == 2
    assert "There is no model" in done.stderr


def test_push_and_pull_through_a_folder(home, tmp_path, monkeypatch):
    shared = tmp_path / "shared"
    done = brainmvp("models", "push", "tiny", shared)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (shared / "tiny").iterdir()) == ["README.md", "card.json", "model.safetensors"]
    again = brainmvp("models", "push", "tiny", shared)
    assert again.returncode == 2
    assert "already exists" in again.stderr
    monkeypatch.setenv("BRAINMVP_HOME", str(tmp_path / "elsewhere"))
    done = brainmvp("models", "pull", shared / "tiny")
    assert done.returncode == 0, done.stderr
    assert "tiny" in {entry.card.name for entry in list_models()}
    assert pull_model(str(shared / "tiny"), "renamed").card.name == "renamed"
    with pytest.raises(ModelError, match="exists already"):
        pull_model(str(shared / "tiny"))
    weights = shared / "tiny" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ModelError, match="SHA-256"):
        pull_model(str(shared / "tiny"), "broken")
    with pytest.raises(ModelError, match="cannot be read"):
        pull_model(str(tmp_path / "nowhere"))


def test_studies_of_a_bids_tree_have_a_bundle_s_result_each(tmp_path):
    for subject in ("sub-01", "sub-02"):
        for place in ("anat/{}_T1w.nii.gz", "dwi/{}_adc.nii.gz"):
            path = tmp_path / subject / place.format(subject)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    found = find_cases(str(tmp_path))
    assert [case["name"] for case in found] == ["sub-01", "sub-02"]
    assert [[Path(path).parent.name for path in case["image"]] for case in found] == [["anat", "dwi"]] * 2


def test_a_pretrained_model_can_be_shared(home, tmp_path):
    tiny_encoder(home / "models")
    export_folder(find_model("tiny-encoder"), tmp_path / "out")
    assert pull_model(str(tmp_path / "out"), "other").card.task == "pretraining"


@pytest.mark.skipif(find_spec("huggingface_hub") is not None, reason="huggingface_hub is installed")
def test_without_huggingface_hub_the_message_says_what_is_missing(home):
    done = brainmvp("models", "pull", "hf:someone/something")
    assert done.returncode == 2
    assert done.stderr.strip().endswith("pip install huggingface_hub, then retry.")
    with pytest.raises(BrainMVPError, match="huggingface_hub is not installed"):
        push_model(find_model("tiny"), "hf:someone/something")


def test_a_misspelt_repository_is_refused_before_the_network_is_touched():
    from napari_brainmvp.models import sharing

    with pytest.raises(ModelError, match="write hf:USER/REPOSITORY"):
        sharing._repository("hf:no-user")
    assert sharing._repository("hf:some.one/thing_1") == "some.one/thing_1"
