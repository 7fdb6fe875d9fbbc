"""How fast a full pre-training step is, where its time goes, and how much memory it takes.

    python benchmarks/pretraining.py --cache DIR [--encoders small compact] [--device cuda]

A step: one batch of studies, two masked views each, forward, backward, update. The published recipe is measured in its
plain formulation (float32, PyTorch's own depth-wise backward pass and memory layout, attention written out, masks block
by block in Python) and as this project computes the same mathematics, in float32 and with bfloat16; then the project's
own recipe. Every row runs in a process of its own, so that memory is its own. Crops come from synthetic studies.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from forward import contiguous_memory, plain
from napari_brainmvp.networks import layers
from napari_brainmvp.training.cache import cache_synthetic
from napari_brainmvp.training.memory import keep_freed_memory
from napari_brainmvp.training.pretraining import model as pretraining_model
from napari_brainmvp.training.pretraining.data import CropStream, Dataset
from napari_brainmvp.training.pretraining.model import PretrainingModel
from napari_brainmvp.training.pretraining.spec import RECIPES, PretrainingSpec

FORMULATIONS = ("plain, float32", "ours, float32", "ours, bfloat16", "our recipe, bfloat16")
STAGES = ("data", "masking", "forward", "backward", "update")


def loop_mask(rates: torch.Tensor, size: int, generator: torch.Generator, block: int = 8) -> torch.Tensor:
    """Mask block by block in Python, the way :func:`block_mask` is not written."""
    count = size // block
    mask = torch.zeros(len(rates), 1, size, size, size, dtype=torch.bool)
    for sample, rate in enumerate(rates.tolist()):
        for chosen in torch.randperm(count**3, generator=generator)[: round(rate * count**3)].tolist():
            i, j, k = (block * int(n) for n in np.unravel_index(chosen, (count,) * 3))
            mask[sample, 0, i : i + block, j : j + block, k : k + block] = True
    return mask


def plain_model(model: PretrainingModel) -> PretrainingModel:
    """Take every shortcut out of a model."""
    model = plain(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, layers.DepthwiseConv3d):
                width, kernel = child.out_channels, child.kernel_size[0]
                usual = nn.Conv3d(width, width, kernel, padding=kernel // 2, groups=width)
                usual.load_state_dict(child.state_dict())
                setattr(module, name, usual)
    return model


def make_spec(encoder: str, formulation: str, batch: int) -> PretrainingSpec:
    """Return the recipe of a row; the published templates are small here: they are no part of the network."""
    recipe = {} if formulation.startswith("our recipe") else RECIPES["paper"] | {"template_shape": (60, 60, 40)}
    return PretrainingSpec(**{**recipe, "encoder": encoder, "crop": 96, "batch": batch, "accumulate": 1})


def measure(encoder: str, formulation: str, cache: Path, device: str, batch: int, repeats: int) -> dict[str, Any]:
    """Time the stages of a step, best of several, and the process's peak memory."""
    torch.manual_seed(0)
    spec = make_spec(encoder, formulation, batch)
    studies = cache_synthetic(range(4), cache, PretrainingSpec().preparation)
    stream = CropStream([Dataset(tuple(studies), 1.0)], spec)
    model = PretrainingModel(spec).train()
    if formulation.startswith("plain"):
        model = plain_model(model)
        contiguous_memory().__enter__()
        pretraining_model.block_mask = loop_mask
    else:
        keep_freed_memory()
        torch.set_flush_denormal(True)
    model = model.to(device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
    best = dict.fromkeys(STAGES, float("inf"))
    for number in range(repeats):
        times = step(model, stream, optimiser, number, formulation.endswith("bfloat16"), device)
        best = {stage: min(best[stage], times[stage]) for stage in STAGES}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if device.startswith("cuda"):
        peak = torch.cuda.max_memory_allocated() / 2**30
    return {"encoder": encoder, "formulation": formulation, "samples": batch, "gigabytes": peak, **best}


def step(
    model: PretrainingModel, stream: CropStream, optimiser: torch.optim.Optimizer, number: int, half: bool, device: str
) -> dict[str, float]:
    """Take one step and return the seconds of its stages."""
    marks = [time.perf_counter()]

    def mark() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    batch = {key: value.to(device) for key, value in stream.batch(number).items()}
    mark()
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=half):
        with torch.no_grad():
            model.views(batch, 1.0)
        mark()
        losses = model(batch, 1.0)
    mark()
    losses["loss"].backward()
    mark()
    optimiser.step()
    optimiser.zero_grad()
    mark()
    times = dict(zip(STAGES, np.diff(marks).tolist(), strict=True))
    times["forward"] -= times["masking"]  # the model masks again, inside its forward pass
    return times


def kernel_share(encoder: str, cache: Path, batch: int) -> float:
    """Share of a CUDA step's kernel time that goes into matrix products and convolutions, 0..1."""
    spec = make_spec(encoder, FORMULATIONS[2], batch)
    studies = cache_synthetic(range(4), cache, PretrainingSpec().preparation)
    stream = CropStream([Dataset(tuple(studies), 1.0)], spec)
    model = PretrainingModel(spec).train().cuda()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
    step(model, stream, optimiser, 0, True, "cuda")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step(model, stream, optimiser, 1, True, "cuda")
    events = [e for e in profile.key_averages() if e.self_device_time_total > 0]
    heavy = ("conv", "gemm", "wgrad", "dgrad", "attention", "flash", "cutlass", "xmma")
    wanted = sum(e.self_device_time_total for e in events if any(word in e.key.lower() for word in heavy))
    return wanted / sum(e.self_device_time_total for e in events)


def crop_milliseconds(cache: Path, recipe: str) -> float:
    """Time of one sample of 96^3 (the modalities it needs, cut, cast and stacked) from the prepared cache, warm."""
    spec = PretrainingSpec(**{**RECIPES[recipe], "preparation": PretrainingSpec().preparation, "crop": 96})
    stream = CropStream([Dataset(tuple(cache_synthetic(range(4), cache, spec.preparation)), 1.0)], spec)
    for index in range(20):
        stream.sample(index)
    started = time.perf_counter()
    for index in range(20, 120):
        stream.sample(index)
    return 10 * (time.perf_counter() - started)


def main() -> None:
    """Measure every row in a process of its own and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder for the prepared synthetic studies")
    parser.add_argument("--encoders", nargs="+", default=["small", "compact"], choices=["small", "compact"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--row", nargs=2, metavar=("ENCODER", "FORMULATION"), help="measure one row, print JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.row:
        repeats = 1 if arguments.row[1].startswith("plain") else arguments.repeats
        row = measure(*arguments.row, arguments.cache, arguments.device, arguments.batch, repeats)
        print(json.dumps(row))
        return
    print(f"{platform.processor() or platform.machine()}, {arguments.threads} threads, torch {torch.__version__}\n")
    two, every = (crop_milliseconds(arguments.cache, recipe) for recipe in ("paper", "compact"))
    print(f"One sample of 96^3 from the prepared cache: {two:.1f} ms; {every:.1f} ms with every modality\n")
    print("| encoder | formulation | step, s | samples/s | " + " | ".join(f"{s}, %" for s in STAGES) + " | GB |")
    print("|" + "---|" * (5 + len(STAGES)))
    for encoder in arguments.encoders:
        for formulation in FORMULATIONS:
            command = [sys.executable, __file__, *sys.argv[1:], "--row", encoder, formulation]
            row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            total = sum(row[stage] for stage in STAGES)
            shares = " | ".join(f"{100 * row[stage] / total:.1f}" for stage in STAGES)
            speed = f"{total:.1f} | {row['samples'] / total:.3f}"
            print(f"| {encoder} | {formulation} | {speed} | {shares} | {row['gigabytes']:.1f} |", flush=True)
        if arguments.device.startswith("cuda"):
            share = kernel_share(encoder, arguments.cache, arguments.batch)
            print(f"\n{encoder}: {100 * share:.0f} % of kernel time in products and convolutions\n")


if __name__ == "__main__":
    main()
