"""What a run would be trained on, found without reading a volume; and a rough idea of what the run costs."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from napari_brainmvp.errors import BrainMVPError, FileError, StudyError
from napari_brainmvp.progress import CancelToken, Progress, ProgressCallback, no_progress
from napari_brainmvp.training.pretraining.spec import PretrainingSpec, read_spec
from napari_brainmvp.training.sources import DataSource, find_files

__all__ = ["Estimate", "Survey", "estimate", "measure_pace", "survey"]


@dataclass(frozen=True)
class Survey:
    """Studies as their files' names tell.

    Parameters
    ----------
    studies : tuple of (str, tuple of str)
        Name and modalities of each study of the folders and lists.
    synthetic : int
        Studies that will be made; each has two to eight modalities.
    problems : tuple of (str, str)
        Name of a study or folder, and why it or a part of it is left out.
    """

    studies: tuple[tuple[str, tuple[str, ...]], ...]
    synthetic: int
    problems: tuple[tuple[str, str], ...]

    @property
    def count(self) -> int:
        """Studies in all."""
        return len(self.studies) + self.synthetic


def survey(
    sources: Sequence[DataSource], progress: ProgressCallback = no_progress, cancel: CancelToken | None = None
) -> Survey:
    """Look through all datasets of a run.

    A source that cannot be used at all becomes a problem too.

    Raises
    ------
    Cancelled
    """
    studies: list[tuple[str, tuple[str, ...]]] = []
    problems: list[tuple[str, str]] = []
    synthetic = 0
    for index, source in enumerate(sources):
        if cancel is not None:
            cancel.raise_if_cancelled()
        try:
            if (seeds := source.seeds) is not None:
                synthetic += len(seeds)
                continue
            files, bad = find_files(source)
        except (FileError, StudyError, OSError) as error:
            problems.append((source.path, str(error)))
            continue
        if not files:
            bad = [*bad, (source.path, "holds no study: files must tell their modality, as in sub-01_T1w.nii.gz.")]
        problems += bad
        for study in files:
            broken = [path for path in study.scans.values() if not _has_content(path)]
            problems += [(study.name, f"{path.name} is missing or empty: the study is left out.") for path in broken]
            problems += [(study.name, warning) for warning in study.warnings]
            if not broken:
                studies.append((study.name, tuple(study.scans)))
        progress(Progress("Looking through folders", index + 1, len(sources)))
    return Survey(tuple(studies), synthetic, tuple(problems))


def _has_content(path: Path) -> bool:
    try:
        return path.is_dir() or path.stat().st_size > 0
    except OSError:
        return False


@dataclass(frozen=True)
class Estimate:
    """A rough idea of a run on this machine's processor.

    Parameters
    ----------
    seconds : float
        From start to end.
    gigabytes : float
        Of memory, at most.
    """

    seconds: float
    gigabytes: float


_BYTES_A_VOXEL = {
    ("compact", "skips"): 7.5e3,
    ("compact", "plain"): 2.5e3,
    ("small", "skips"): 2.1e4,
    ("small", "plain"): 7e3,
}
_BASE_GIGABYTES = {"compact": 0.6, "small": 1.1}
"""Of a sample, and before any sample: ``benchmarks/training_estimates.py`` in float32, crops of 32 and 64; but for
``("compact", "plain")``, which no recipe is and which was taken to be in proportion."""
_TEMPLATE_COPIES = 6
"""Templates, their gradients, their optimiser's two moments, their average, and a checkpoint of all that."""
_PREPARING = 5.0
"""Seconds to read or make, and to prepare a study."""


def measure_pace(recipe: str = "compact", cancel: CancelToken | None = None) -> float:
    """Time updates of a recipe on this machine's processor: seconds a voxel, the better of two.

    Processors differ tenfold, with the instructions they have; so nothing but a measurement tells. It takes some
    seconds, in a process of its own: torch counts its threads for a whole process, and others may be computing in this
    one. It lets everything else go first. A cancelled measurement ends that process.

    Raises
    ------
    Cancelled
        When asked to.
    BrainMVPError
        The process ended otherwise.
    """
    code = (
        f"import os; hasattr(os, 'nice') and os.nice(19); "
        f"from {__name__} import time_update; print(time_update({recipe!r}))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        try:
            while process.poll() is None:
                if cancel is not None:
                    cancel.raise_if_cancelled()
                time.sleep(0.1)
        finally:
            process.kill()
        said = process.communicate()[0]
    if not said:
        raise BrainMVPError(f"The process that times this machine ended with {process.returncode} and no answer.")
    return float(said)


def time_update(recipe: str) -> float:
    """Do what :func:`measure_pace` measures, in this process and on one thread.

    What counts is the processor time of that thread, so that it does not matter what else runs; the cores are taken to
    share the work.
    """
    import torch

    from napari_brainmvp.inference.device import choose_precision
    from napari_brainmvp.training.pretraining.model import PretrainingModel

    small = PretrainingSpec()  # a crop that is soon done
    spec = read_spec(None, recipe, {"crop": small.crop, "template_shape": small.template_shape})
    half = choose_precision(spec.precision, "cpu") == "bf16-mixed"
    model, edge, count = PretrainingModel(spec).train(), spec.crop, len(spec.modalities)
    batch = {
        "scans": torch.rand(1, count, edge, edge, edge),
        "present": torch.ones(1, count, dtype=torch.bool),
        "target": torch.tensor([0]),
        "other": torch.tensor([1]),
        "study": torch.zeros(1),
        "start": torch.zeros(1, 3),
        "stop": torch.ones(1, 3),
        "number": torch.tensor(0),
    }
    seconds, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(2):
        began = time.thread_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model(batch, 1.0)["loss"]
        loss.backward()
        seconds.append(time.thread_time() - began)
    return min(seconds) / edge**3 / threads


def estimate(spec: PretrainingSpec, studies: int, pace: float) -> Estimate:
    """Estimate time and memory of a run on the processor.

    Parameters
    ----------
    spec : PretrainingSpec
    studies : int
        How many have to be prepared first.
    pace : float
        Of this machine with the same networks, see :func:`measure_pace`.
    """
    voxels = spec.batch * spec.crop**3
    trained = spec.max_steps * spec.accumulate * voxels
    templates = 4 * _TEMPLATE_COPIES * len(spec.modalities) * prod(spec.template_shape)
    memory = _BASE_GIGABYTES[spec.encoder] + (templates + voxels * _BYTES_A_VOXEL[spec.encoder, spec.decoder]) / 1e9
    return Estimate(trained * pace + studies * _PREPARING / max(1, spec.workers), memory)
