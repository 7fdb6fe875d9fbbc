"""How long a whole study takes, and how much memory: 240 x 240 x 155 voxels, four modalities, the default model.

    python benchmarks/segmentation.py [--head]

The study is a synthetic brain centred in a volume of that size, as BraTS distributes them; with ``--head`` everything
inside the volume is foreground, the worst case. Written to and read from NIfTI files.
"""

from __future__ import annotations

import argparse
import platform
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from napari_brainmvp.inference import SegmentOptions, segment
from napari_brainmvp.io import read_study, write_image
from napari_brainmvp.study import Grid
from napari_brainmvp.synthesis import SynthesisSpec, make_study

SHAPE = (240, 240, 155)


def write_case(folder: Path, seed: int, head: bool) -> None:
    """Write the four scans."""
    study = make_study(seed, SynthesisSpec(lesion="glioma"))
    rng = np.random.default_rng(seed)
    for key, scan in study.scans.items():
        data = rng.uniform(20, 300, SHAPE).astype(np.float32) if head else np.zeros(SHAPE, np.float32)
        brain = scan.data[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
        start = [(n - m) // 2 for n, m in zip(SHAPE, brain.shape, strict=True)]
        box = tuple(slice(s, s + m) for s, m in zip(start, brain.shape, strict=True))
        data[box] = np.where(brain > 0, brain, data[box])
        write_image(folder / f"case-{key}.nii.gz", data, Grid(SHAPE, np.diag([-1.0, -1, 1, 1])))


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--head", action="store_true")
    parser.add_argument("--seed", type=int, default=9_300_000)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as name:
        write_case(Path(name), arguments.seed, arguments.head)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        started = time.perf_counter()
        study = read_study(name)
        read = time.perf_counter() - started
        result = segment(study, arguments.model, SegmentOptions(device=arguments.device))
        total = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{platform.processor() or platform.machine()}, {arguments.threads} threads, seed {arguments.seed}\n")
    print("| study | device | read | segment | in all | peak memory (before) |\n|---|---|---|---|---|---|")
    kind = "whole volume foreground" if arguments.head else "brain in 240x240x155"
    row = f"{read:.1f} s | {result.seconds:.1f} s | {total:.1f} s | {peak:.2f} GB ({before:.2f} GB)"
    print(f"| {kind} | {result.device} | {row} |")


if __name__ == "__main__":
    main()
