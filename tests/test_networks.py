"""Networks against the reference numbers, and their layers against plain formulations."""

import json
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from napari_brainmvp.errors import ModelError, StudyError
from napari_brainmvp.models import load_official_checkpoint
from napari_brainmvp.networks import EncoderSpec, ModalityTemplates, SegmentationNetwork, Unions, channels_last
from napari_brainmvp.networks.layers import DepthwiseConv3d, InstanceNorm

REFERENCE = Path(__file__).parent / "reference"
SMALL = EncoderSpec(channels=(8, 16, 32, 32), depths=(1, 1, 1, 1), head_size=16)


def reference(name: str) -> dict:
    return json.loads((REFERENCE / f"{name}.json").read_text())


def rule_tensor(key: str, shape: list[int]) -> torch.Tensor:
    """Fill a tensor by the rule that the reference numbers were made with."""
    rng = np.random.RandomState(zlib.crc32(key.encode()) & 0xFFFFFFFF)
    v = rng.standard_normal(int(np.prod(shape))).astype(np.float32).reshape(shape)
    if key.endswith("running_var"):
        v = np.abs(v) + 0.5
    elif key.endswith("running_mean"):
        v = 0.1 * v
    elif key.endswith("rep_template"):
        pass
    elif v.ndim == 1:
        v = 1 + 0.1 * v if key.endswith("weight") else 0.1 * v
    else:
        v = v / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(np.asarray(v, np.float32))


def checkpoint(ref: dict, template_shape=(8, 6, 5, 4)) -> dict[str, torch.Tensor]:
    """A state dict with every key of the release; the template is made small, its size is free."""
    state = {}
    for key, shape in ref["keys"].items():
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(0)
        else:
            state[key] = rule_tensor(key, list(template_shape) if key == "rep_template" else shape)
    return state


def reference_input(ref: dict) -> torch.Tensor:
    rng = np.random.RandomState(ref["input"]["seed"])
    return torch.from_numpy(rng.rand(*ref["input"]["shape"]).astype(np.float32))


def assert_matches(tensor: torch.Tensor, expected: dict) -> None:
    assert list(tensor.shape) == expected["shape"]
    values = tensor.contiguous().flatten()[expected["index"]]
    error = (values - torch.tensor(expected["value"])).abs().max() / expected["std"]
    assert float(error) < 1e-3


@pytest.mark.parametrize("name", ["pretraining_network", "pretraining_network_unet"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_pretraining_networks_reproduce_the_reference(name, prefix):
    ref = reference(name)
    state = checkpoint(ref)
    network = load_official_checkpoint({"state_dict": {prefix + k: v for k, v in state.items()}, "epoch": 3})
    assert not network.training
    with torch.no_grad():
        x = reference_input(ref)
        for feature, expected in zip(network.encode(x), ref["features"], strict=True):
            assert_matches(feature, expected)
        assert_matches(network.reconstruct(x), ref["reconstruction"])
    torch.testing.assert_close(network.templates.volumes.detach(), state["rep_template"])
    assert network.templates.modalities[:3] == ("flair", "t1", "t1c")


def test_the_segmentation_network_reproduces_the_reference():
    ref = reference("segmentation_network")
    network = load_official_checkpoint(checkpoint(ref))
    x = reference_input(ref)
    with torch.no_grad():
        for feature, expected in zip(network.encoder(x), ref["features"], strict=True):
            assert_matches(feature, expected)
        assert_matches(network(x), ref["logits"])
        network.train()
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm3d):
                module.eval()
        for output, expected in zip(network(x), ref["deep"], strict=True):
            assert_matches(output, expected)


def test_checkpoints_come_from_files_and_sizes_from_shapes(tmp_path):
    torch.manual_seed(0)
    made = SegmentationNetwork(2, 5, EncoderSpec(channels=(8, 16, 64, 64), depths=(1, 2, 1, 1))).eval()
    torch.save({"state_dict": {f"module.{k}": v for k, v in made.state_dict().items()}}, tmp_path / "a.pt")
    loaded = load_official_checkpoint(tmp_path / "a.pt")
    x = torch.rand(1, 2, 32, 16, 48)
    torch.testing.assert_close(loaded(x), made(x))


class Payload:
    def __reduce__(self):
        import pathlib

        return (pathlib.Path.touch, (pathlib.Path("payload-ran"),))


def test_a_pickled_payload_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "extra": Payload()}, tmp_path / "evil.pt")
    with pytest.raises(ModelError, match="could run code"):
        load_official_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "payload-ran").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("decoder.out.conv.conv.weight"), "lacks"),
        (lambda s: s.pop("encoder.norm.bias"), "lacks encoder.norm.bias"),
        (lambda s: s.update({"surplus.weight": torch.zeros(1)}), "unexpected surplus.weight"),
        (lambda s: s.update({"encoder.norm.bias": torch.zeros(3)}), "wrong shapes"),
    ],
)
def test_other_checkpoints_are_refused_by_name(change, message):
    state = SegmentationNetwork(1, 2, EncoderSpec(channels=(8, 16, 64, 64), depths=(1, 1, 1, 1))).state_dict()
    change(state)
    with pytest.raises(ModelError, match=message):
        load_official_checkpoint(state)


def test_things_that_are_no_checkpoint(tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ModelError, match="not a PyTorch checkpoint"):
        load_official_checkpoint(tmp_path / "text.pt")
    with pytest.raises(ModelError, match="does not exist"):
        load_official_checkpoint(tmp_path / "none.pt")
    with pytest.raises(ModelError, match="no BrainMVP checkpoint"):
        load_official_checkpoint({"fc.weight": torch.zeros(2, 2)})


def test_any_size_is_segmented_and_odd_sizes_are_padded():
    torch.manual_seed(1)
    network = SegmentationNetwork(2, 3, SMALL).eval()
    x = torch.rand(1, 2, 32, 32, 48)
    with torch.no_grad():
        assert network(x[..., :30, :21, :45]).shape == (1, 3, 30, 21, 45)
        with pytest.raises(StudyError, match="multiples of 16"):
            network.encoder(x[..., :30, :, :])


def test_axes_are_not_mixed_up():
    """A network on a permuted input is not the permuted output: H, W and D have their own places."""
    torch.manual_seed(2)
    network = SegmentationNetwork(1, 2, SMALL).eval()
    x = torch.rand(1, 1, 16, 32, 48)
    with torch.no_grad():
        straight, turned = network(x), network(x.permute(0, 1, 3, 2, 4))
    assert turned.shape == (1, 2, 32, 16, 48)
    assert (turned.permute(0, 1, 3, 2, 4) - straight).abs().max() > 1e-3


@pytest.mark.parametrize("kernel", [3, 5])
def test_depthwise_gradients_are_those_of_the_plain_convolution(kernel):
    torch.manual_seed(3)
    layer = DepthwiseConv3d(6, kernel).double()
    x = channels_last(torch.randn(2, 6, 7, 8, 9, dtype=torch.double)).requires_grad_()
    plain = x.detach().clone().requires_grad_()
    weight = torch.randn(2, 6, 7, 8, 9, dtype=torch.double)
    (layer(x) * weight).sum().backward()
    ours = (x.grad, layer.weight.grad.clone(), layer.bias.grad.clone())
    layer.zero_grad()
    (F.conv3d(plain, layer.weight, layer.bias, padding=kernel // 2, groups=6) * weight).sum().backward()
    for mine, theirs in zip(ours, (plain.grad, layer.weight.grad, layer.bias.grad), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_depthwise_works_under_autocast():
    layer = DepthwiseConv3d(4, 3)
    x = torch.randn(1, 4, 8, 8, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).float().square().sum().backward()
    assert x.grad.dtype == torch.float32
    assert layer.weight.grad.abs().sum() > 0


def test_instance_norm_is_instance_norm_and_keeps_the_layout():
    x = channels_last(torch.randn(2, 5, 6, 7, 8) * 3 + 1)
    out = InstanceNorm()(x)
    torch.testing.assert_close(out, F.instance_norm(x), rtol=1e-4, atol=1e-4)
    assert out.is_contiguous(memory_format=torch.channels_last_3d)


def test_training_mode_gives_three_scales():
    network = SegmentationNetwork(1, 2, SMALL)
    outputs = network(torch.rand(2, 1, 16, 16, 32))
    assert [tuple(o.shape) for o in outputs] == [(2, 2, 16, 16, 32)] * 3


@pytest.mark.parametrize(("parts", "overlapping"), [(((), (0,), (0, 1), ()), True), (((0,), (1,), (2,), (1,)), False)])
def test_unions_have_the_sums_of_their_classes_probabilities(parts, overlapping):
    torch.manual_seed(0)
    unions = Unions(parts, overlapping)
    network = SegmentationNetwork(2, unions.out_channels, SMALL, 8, deep_supervision=True, unions=unions).train()
    x = torch.randn(1, 2, 32, 32, 16)
    with torch.no_grad():
        features = network.encoder(x)
        outputs, classes = network.decode_stages(features), network.class_logits(features)
    assert len(outputs) == 3
    for made, z in zip(outputs, classes, strict=True):
        p = z.softmax(1)
        sums = [sum(p[:, k] for k in range(4) if union in parts[k]) for union in range(unions.out_channels)]
        found = torch.sigmoid(made) if overlapping else made.softmax(1)
        torch.testing.assert_close(found, torch.stack(sums, 1))


@pytest.mark.parametrize(
    "parts",
    [
        ((), (0,), (0, 1), (0, 2, 1), (0,)),  # regions within each other
        ((), (1,), (0,), (), (0,)),  # apart
        ((), (0, 1), (0, 2), (3, 0)),  # a whole of which every part is a region
    ],
)
def test_unions_are_decided_as_between_the_classes_inside(parts):
    torch.manual_seed(0)
    unions = Unions(parts, overlapping=True)
    p = (3 * torch.randn(len(parts), 500)).softmax(0)
    kinds = sorted({tuple(sorted(kind)) for kind in parts})
    share = {kind: sum(p[k] for k, part in enumerate(parts) if tuple(sorted(part)) == kind) for kind in kinds}
    likeliest = [kinds[k] for k in torch.stack([share[kind] for kind in kinds]).argmax(0).tolist()]
    union = range(unions.out_channels)
    given = torch.stack([sum(p[k] for k, part in enumerate(parts) if u in part) for u in union])
    assert unions.decide(given).tolist() == [[u in kind for kind in likeliest] for u in union]
    split = unions.split(given)
    for kind, found in zip(unions.kinds, split, strict=True):
        torch.testing.assert_close(found, share[kind])
    assert not torch.equal(unions.decide(given), given > 0.5), "else the rule would not matter"


def test_unions_that_do_not_tell_the_classes_are_decided_one_by_one():
    unions = Unions([(), (0,), (1,), (0, 1)], overlapping=True)
    given = torch.tensor([[0.6, 0.4], [0.55, 0.7]])
    assert unions.split(given) is None
    assert unions.decide(given).tolist() == [[True, False], [True, True]]


def test_batch_normalisation_over_two_processes_keeps_a_small_variance_beside_a_large_mean(tmp_path):
    code = (
        "import sys, torch, torch.distributed as dist; from napari_brainmvp.networks.layers import SharedBatchNorm\n"
        "rank = int(sys.argv[2]); dist.init_process_group('gloo', f'file://{sys.argv[1]}', rank=rank, world_size=2)\n"
        "x = torch.randn(2, 4, 8, 8, 8, generator=torch.Generator().manual_seed(0)) + 1000\n"
        "shared, plain = SharedBatchNorm(4), torch.nn.BatchNorm3d(4)\n"
        "found, wanted = shared(x[rank : rank + 1]), plain(x)[rank : rank + 1]\n"
        "torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)\n"
        "torch.testing.assert_close(shared.running_var, plain.running_var, rtol=1e-4, atol=1e-4)\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "meeting")]
    pair = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True) for rank in (0, 1)]
    assert [(process.communicate(timeout=120)[1], process.returncode) for process in pair] == [("", 0)] * 2


def test_templates_are_looked_up_where_they_lie_and_get_gradients():
    templates = ModalityTemplates(("t1", "t2"), (4, 5, 6))
    with torch.no_grad():
        templates.volumes.copy_(torch.arange(240.0).reshape(2, 4, 5, 6))
    axes = [torch.linspace(-1, 1, n) for n in (4, 5, 6)]
    everywhere = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)[None]
    found = templates.sample(torch.tensor([1]), everywhere)
    torch.testing.assert_close(found[0, 0], templates.volumes[1], atol=1e-3, rtol=0)
    torch.testing.assert_close(templates.fill((4, 5, 6)), templates.volumes, atol=1e-3, rtol=0)
    found.sum().backward()
    assert templates.volumes.grad[1].min() > 0.5
    assert templates.volumes.grad[0].abs().max() == 0
