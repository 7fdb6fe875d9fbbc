"""Cards, registry and weights."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from conftest import ordinary_user
from models_for_tests import tiny_card, tiny_model
from napari_brainmvp.errors import FileError, ModelError
from napari_brainmvp.models import find_model, import_model, list_models, load_model, remove_model, save_model
from napari_brainmvp.models.weights import build_network
from napari_brainmvp.networks import EncoderSpec, PretrainingNetwork, SegmentationNetwork


def change_card(folder, **changes):
    path = folder / "card.json"
    card = json.loads(path.read_text())
    card.update(changes)
    path.write_text(json.dumps(card))


def names():
    return {entry.card.name for entry in list_models()}


def test_a_saved_model_comes_back_the_same(home):
    entry = find_model("tiny")
    loaded = load_model(entry)
    torch.manual_seed(0)
    made = build_network(entry.card)
    for key, value in made.state_dict().items():
        torch.testing.assert_close(loaded.network.state_dict()[key], value, rtol=1e-3, atol=1e-4)
    assert not loaded.network.training
    assert loaded.templates.volumes.shape == (4, 6, 7, 6)
    assert "torch" in entry.card.versions


def test_statistics_beyond_half_precision_are_kept_and_what_is_not_finite_refused(home, tmp_path):
    entry = find_model("tiny")
    network = build_network(entry.card)
    network.encoder.norm.running_var.fill_(1e6)  # half precision ends at 65504
    save_model(tmp_path / "large", entry.card, network, load_model(entry).templates)
    assert float(load_model(find_model(tmp_path / "large")).network.encoder.norm.running_var.min()) == 1e6
    with torch.no_grad():
        network.encoder.blocks1[0].conv1.weight[0] = 1e6
    with pytest.raises(ModelError, match=r"encoder\.blocks1\.0\.conv1\.weight has values that are not finite"):
        save_model(tmp_path / "broken", entry.card, network)
    assert [path.name for path in tmp_path.iterdir() if "broken" in path.name] == []


def test_models_are_listed_found_and_removed(home, tmp_path):
    assert "tiny" in names()
    elsewhere = tiny_model(tmp_path / "elsewhere", "other")
    assert find_model(elsewhere).card.name == "other"
    with pytest.raises(ModelError, match=r"no model 'none'.*tiny"):
        find_model("none")
    remove_model("tiny")
    assert "tiny" not in names()
    with pytest.raises(ModelError, match="only models there"):
        remove_model(str(elsewhere))
    assert elsewhere.exists()


def test_a_copy_of_a_model_is_not_removed_in_its_place(home):
    shutil.copytree(home / "models" / "tiny", home / "models" / "backup")
    remove_model("tiny")
    assert [path.name for path in (home / "models").iterdir()] == ["backup"]
    assert find_model("tiny").folder.name == "backup"


def test_a_card_in_another_encoding_is_left_out(home):
    folder = tiny_model(home / "models", "foreign")
    said = (folder / "card.json").read_text().replace("Tiny random", "Müller's")
    (folder / "card.json").write_bytes(said.encode("latin-1"))
    assert {"tiny"} == {name for name in names() if not name.startswith("brain-")}
    with pytest.raises(ModelError, match="not text in UTF-8"):
        find_model(folder)


def test_a_closed_model_folder_is_left_out(home):
    folder = tiny_model(home / "models", "closed")
    with ordinary_user(folder):
        assert "tiny" in names()
        assert "closed" not in names()


@pytest.mark.parametrize("name", ["My Model", "../x", "a/b", ".hidden"])
def test_models_are_imported_under_names_only(home, tmp_path, name):
    made = tiny_model(tmp_path, "mine")
    with pytest.raises(ModelError, match=r"not a model name.*--name"):
        import_model(made, name)
    assert sorted(path.name for path in (home / "models").iterdir()) == ["tiny"]


def test_the_folder_one_is_in_is_imported_by_its_name(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_model(tmp_path / "v1.2", "mine").rename(tmp_path / "mine.v2"))
    assert import_model(".").card.name == "mine.v2"


def test_a_folder_is_never_overwritten(home, tmp_path):
    with pytest.raises(FileError, match="already exists"):
        tiny_model(home / "models")


def test_lies_are_found_out(home):
    folder = find_model("tiny").folder
    good = (folder / "card.json").read_text()
    change_card(folder, sha256="0" * 64)
    with pytest.raises(ModelError, match="SHA-256 differs"):
        load_model(find_model("tiny"))
    (folder / "card.json").write_text(good)
    network = json.loads(good)["network"] | {"channels": [16, 8, 16, 16]}
    change_card(folder, network=network)
    with pytest.raises(ModelError, match="not the network its card describes"):
        load_model(find_model("tiny"))
    change_card(folder, network=network | {"head_size": 7})
    with pytest.raises(ModelError, match="do not fit together"):
        load_model(find_model("tiny"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": [30, 32, 32]}, "multiples of 16"),
        ({"modalities": ["t1"]}, "input channels"),
        ({"channels": [0, 1, 2, 9]}, "do not describe"),
        ({"name": "../../evil"}, "not a model name"),
        ({"surplus": 1}, "Extra inputs"),
    ],
)
def test_broken_cards_are_left_out_and_said(home, changes, message):
    folder = find_model("tiny").folder
    change_card(folder, **changes)
    assert "tiny" not in names()
    with pytest.raises(ModelError, match=message):
        find_model(folder)


@pytest.mark.parametrize("parts", [[[0], [1], [2]], [[0], [1], [2], [4]], [[0], [1], [2], [3, 1]], [[0], [1], [2], []]])
def test_unions_that_do_not_make_up_the_output_are_refused(home, parts):
    folder = find_model("tiny").folder
    change_card(folder, network=tiny_card().network.model_dump(mode="json") | {"parts": parts})
    with pytest.raises(ModelError, match="do not make up 4 output channels of softmax"):
        find_model(folder)


def test_damaged_or_missing_weights(home):
    entry = find_model("tiny")
    content = entry.weights.read_bytes()
    entry.weights.write_bytes(content[:-100])
    with pytest.raises(ModelError, match="SHA-256"):
        load_model(entry)
    entry.weights.unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        load_model(entry)


def test_surplus_tensors_are_refused(home):
    import hashlib

    entry = find_model("tiny")
    save_file(load_file(entry.weights) | {"surplus": torch.zeros(1)}, entry.weights)
    change_card(entry.folder, sha256=hashlib.sha256(entry.weights.read_bytes()).hexdigest())
    with pytest.raises(ModelError, match="surplus"):
        load_model(find_model("tiny"))


def test_a_name_is_a_plain_folder_name():
    with pytest.raises(ValidationError):
        tiny_card("a/b")


def test_checkpoints_and_folders_are_imported(home, tmp_path):
    torch.manual_seed(0)
    spec = EncoderSpec(channels=(8, 16, 64, 64), depths=(1, 1, 1, 1))
    network = SegmentationNetwork(4, 3, spec).eval()
    torch.save({"state_dict": network.state_dict()}, tmp_path / "Fine Tuned.pt")
    entry = import_model(tmp_path / "Fine Tuned.pt", modalities=["flair", "t1ce", "t1", "t2"])
    assert entry.card.name == "fine-tuned"
    assert entry.card.modalities == ("flair", "t1c", "t1", "t2")
    assert entry.card.activation == "sigmoid"
    x = torch.rand(1, 4, 16, 16, 16)
    torch.testing.assert_close(load_model(entry).network(x), network(x), rtol=0.05, atol=0.05)
    with pytest.raises(ModelError, match="exists already"):
        import_model(tmp_path / "Fine Tuned.pt")
    torch.save(PretrainingNetwork(spec).state_dict(), tmp_path / "pre.pth")
    assert import_model(tmp_path / "pre.pth", "encoder").card.task == "pretraining"
    copied = import_model(tiny_model(tmp_path / "x", "y"), "z")
    assert load_model(copied).card.name == "z"
    with pytest.raises(ModelError, match="input channels"):
        import_model(tmp_path / "Fine Tuned.pt", "wrong", ["t1"])
    assert "wrong" not in names()


def test_cards_and_registry_need_no_torch():
    code = "import sys, napari_brainmvp.models as m; m.list_models(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
