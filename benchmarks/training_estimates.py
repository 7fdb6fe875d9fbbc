"""What one sample of pre-training costs on this machine: the tables in ``training/pretraining/survey.py``.

    python benchmarks/training_estimates.py compact 64 2

Prints recipe, crop, batch, processor seconds a sample on one core (best of three whole updates, after one that warms
up; processor time, so that it does not matter what else runs) and peak memory. The crops are of two synthetic studies
(seeds 0 and 1) in the cache.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from pathlib import Path

import psutil
import torch

from napari_brainmvp.inference.device import choose_precision
from napari_brainmvp.training.cache_space import cache_folder
from napari_brainmvp.training.memory import keep_freed_memory
from napari_brainmvp.training.pretraining.data import CropStream, collect
from napari_brainmvp.training.pretraining.model import PretrainingModel
from napari_brainmvp.training.pretraining.spec import RECIPES, DataSource, PretrainingSpec


def main() -> None:
    """Time updates in the recipe's precision."""
    recipe, crop, batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    cache = Path(sys.argv[4]) if len(sys.argv) > 4 else cache_folder()
    data = (DataSource(path="synthetic:2"),)
    spec = PretrainingSpec(**{**RECIPES[recipe], "crop": crop, "batch": batch, "data": data, "held_out": 0})
    keep_freed_memory()
    torch.set_num_threads(1)
    datasets, _, _ = collect(spec, cache)
    model = PretrainingModel(spec).train()
    optimiser = torch.optim.AdamW(model.parameters())
    stream = CropStream(datasets, spec)
    half = choose_precision(spec.precision, "cpu") == "bf16-mixed"
    seconds = []
    for number in range(4):
        began = time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            losses = model(stream.batch(number), 1.0)
        losses["loss"].backward()
        optimiser.step()
        optimiser.zero_grad()
        seconds.append((time.process_time() - began) / batch)
    best = min(seconds[1:])
    memory = psutil.Process().memory_info()
    peak = getattr(memory, "peak_wset", 0) or _peak()
    print(
        f"{recipe} crop {crop} batch {batch}: {best:.2f} s a sample (median {statistics.median(seconds[1:]):.2f}),"
        f" {peak / 2**30:.2f} GB, {os.cpu_count()} cores, torch {torch.__version__}"
    )


def _peak() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
