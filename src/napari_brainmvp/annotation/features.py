"""What the probe sees of a voxel: intensities and their surroundings, and a trained network's own maps.

Everything is computed once a study and kept at the resolution at which the probe decides, so that a stroke costs two
matrix products a voxel and nothing else. Only the fine maps of the network are taken. Coarse ones (1/8 and 1/16) tell
a probe where in the brain it is rather than what it looks at; with labels on a few slices it then does not carry over
to the slices between.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from napari_brainmvp.annotation.surroundings import describe
from napari_brainmvp.errors import ModelError
from napari_brainmvp.inference.device import choose_device, choose_dtype, lacks_memory
from napari_brainmvp.inference.windows import gaussian_importance, report_layers, window_starts
from napari_brainmvp.models import LoadedModel
from napari_brainmvp.networks import STRIDE, SegmentationNetwork, channels_last
from napari_brainmvp.networks.layers import to_hwd
from napari_brainmvp.preparation import PreparedStudy, prepare
from napari_brainmvp.progress import CancelToken, Progress, ProgressCallback, no_progress
from napari_brainmvp.study import Grid, Study

__all__ = ["CLASS", "LIMIT", "StudyFeatures", "compute_features"]

logger = logging.getLogger(__name__)

CLASS = "class "
"""Beginning of the names of columns that hold log probabilities of the network's own classes."""
_WINDOW = (160, 192, 160)
"""Largest window of the network: a whole brain at 1 mm in one pass, in about 2 GB."""
_OVERLAP = 0.25
LIMIT = 8.0
"""Largest size of a value; -8 is the lowest log probability."""
_CHUNK = 1 << 16


@dataclass(frozen=True, eq=False)
class StudyFeatures:
    """The features of a study's foreground.

    Parameters
    ----------
    grid : Grid
        Isotropic, closest to RAS, cut to the foreground: where the probe decides.
    source : Grid
        The study's reference grid, on which labels are painted and predictions given.
    rows : ndarray of shape ``grid.shape``, int32
        The row of each foreground voxel, -1 elsewhere.
    values : Tensor of shape (N, F), bfloat16
        Each column has mean 0 and variance 1 over the study, held within plus and minus 8; but for the last ones, log
        probabilities of the network's classes, from -8 to 0.
    names : tuple of str
        What the columns are, for example ``"flair 2mm"`` or ``"network fine 3"``.
    """

    grid: Grid
    source: Grid
    rows: NDArray[np.int32]
    values: Tensor
    names: tuple[str, ...]

    @property
    def count(self) -> int:
        """Foreground voxels."""
        return len(self.values)


@torch.inference_mode()
def compute_features(
    study: Study,
    model: LoadedModel,
    progress: ProgressCallback = no_progress,
    cancel: CancelToken | None = None,
    device: str = "auto",
) -> StudyFeatures:
    """Compute the features of a study: seconds on a CPU.

    Each modality's prepared intensity and its surroundings, as
    :func:`~napari_brainmvp.annotation.surroundings.describe` measures them; then the network's logits and its decoder's
    maps at 1 and 1/2 of the resolution; last the log probabilities of its classes, where they are exclusive.

    Parameters
    ----------
    study : Study
        Any modalities; the network sees those it knows, templates or nothing in place of the others.
    model : LoadedModel
        A segmentation model.
    progress, cancel
        Told, and asked, at every modality and layer of the network.
    device : str
        As :func:`napari_brainmvp.inference.choose_device` takes it: of the network, and on CUDA of everything after
        the preparation. Where its memory does not suffice, the CPU takes over.

    Raises
    ------
    StudyError
        The scans show nothing but background.
    ModelError
        The model has another architecture.
    Cancelled
        When the token was set.
    """
    network = model.network
    if not isinstance(network, SegmentationNetwork):
        raise ModelError(f"{model.card.name} gives no features: choose a segmentation model of this package.")
    wanted = model.card.modalities
    extra = tuple(key for key in study.scans if key not in wanted)
    progress(Progress("Preparing the scans"))
    prepared = prepare(study, (*wanted, *extra), model.card.preparation)
    where = choose_device(device)
    while True:
        try:
            names, values = _describe(prepared, (*wanted, *extra), model, network, where, progress, cancel)
            break
        except RuntimeError as error:
            if not lacks_memory(error):
                raise
            logger.warning("%s has no memory for the features of %s: the processor computes them.", where, study.name)
            where = torch.device("cpu")
        finally:
            network.to("cpu")
            torch.cuda.empty_cache()  # which a training on the same GPU, in a process of its own, would lack
    mask = prepared.foreground.numpy()
    rows = np.full(mask.shape, -1, np.int32)
    rows[mask] = np.arange(len(values), dtype=np.int32)
    return StudyFeatures(prepared.grid, prepared.source, rows, values, names)


def _describe(
    prepared: PreparedStudy,
    keys: tuple[str, ...],
    model: LoadedModel,
    network: SegmentationNetwork,
    where: torch.device,
    progress: ProgressCallback,
    cancel: CancelToken | None,
) -> tuple[tuple[str, ...], Tensor]:
    """Return names and values of all columns: of the scans, then of the network, which computes on ``where``.

    All else is done there, too, where that is a CUDA device, and on the CPU otherwise.
    """
    home = where if where.type == "cuda" else torch.device("cpu")
    columns = _Columns(prepared.foreground.to(home))
    scans = [(key, image) for key, image, there in zip(keys, prepared.images, prepared.present, strict=True) if there]
    for done, (key, image) in enumerate(scans):
        _check(cancel)
        progress(Progress("Describing intensities", done, len(scans)))
        for name, volume in describe(image.to(home), prepared.grid.spacing[0]):
            columns.add(f"{key} {name}", volume)
    if any(prepared.present[: len(model.card.modalities)]):
        exclusive = model.card.activation == "softmax" or model.card.network.parts
        for name, volume in _network_maps(network, _fill(prepared, model).to(home), where, progress, cancel):
            if not name.startswith(CLASS):
                columns.add(f"network {name}", volume)
            elif exclusive:  # else they are no classes
                columns.add_plain(name, volume)
    return tuple(columns.names), columns.stacked()


class _Columns:
    """Collect foreground values, standardised, one column at a time, on the device of the mask."""

    def __init__(self, mask: Tensor) -> None:
        self._inside, self._columns = mask.flatten().nonzero()[:, 0], list[Tensor]()
        self.names: list[str] = []

    def add(self, name: str, volume: Tensor) -> None:
        inside = self._gather(volume)
        deviation, mean = torch.std_mean(inside)
        self._keep(name, (inside - mean) / (deviation + 1e-4))

    def add_plain(self, name: str, volume: Tensor) -> None:
        self._keep(name, self._gather(volume))

    def _gather(self, volume: Tensor) -> Tensor:
        return volume.reshape(-1).index_select(0, self._inside).float()

    def _keep(self, name: str, values: Tensor) -> None:
        self._columns.append(values.clamp(-LIMIT, LIMIT).bfloat16())
        self.names.append(name)

    def stacked(self) -> Tensor:
        """Return (N, F) on the CPU, written in chunks so that a transposed copy never misses the processor's cache."""
        values = self._columns[0].new_empty(len(self._inside), len(self._columns))
        for start in range(0, len(values), _CHUNK):
            values[start : start + _CHUNK] = torch.stack([c[start : start + _CHUNK] for c in self._columns], 1)
        return values.cpu()


def _fill(prepared: PreparedStudy, model: LoadedModel) -> Tensor:
    """Take the network's channels, with templates where modalities are missing and the model has some."""
    count = len(model.card.modalities)
    images = prepared.images[:count].clone()
    missing = [k for k in range(count) if not prepared.present[k]]
    if missing and model.templates is not None and model.card.fill_missing == "template":
        images[missing] = model.templates.fill(images.shape[1:])[missing] * prepared.foreground
    return images


def _network_maps(
    network: SegmentationNetwork,
    images: Tensor,
    where: torch.device,
    progress: ProgressCallback,
    cancel: CancelToken | None,
) -> Iterator[tuple[str, Tensor]]:
    """Run the network on a device, and give its maps channel by channel, at full resolution, where the images are."""
    size = tuple(images.shape[1:])
    rest = [-n % STRIDE for n in size]
    images = F.pad(images, (0, rest[2], 0, rest[1], 0, rest[0]))
    full = tuple(images.shape[1:])
    sums = _run(network, images, where, progress, cancel)
    for stride, title in ((1, "fine"), (2, "half")):
        for channel, values in enumerate(sums[stride]):
            if stride > 1:
                values = F.interpolate(values[None, None], full, mode="trilinear", align_corners=False)[0, 0]
            yield f"{title} {channel}", values[: size[0], : size[1], : size[2]]
    logits = sums[1][network.full_resolution_channels :, : size[0], : size[1], : size[2]]
    for k, values in enumerate(logits.log_softmax(0)):
        yield f"{CLASS}{k}", values


def _run(
    network: SegmentationNetwork,
    images: Tensor,
    where: torch.device,
    progress: ProgressCallback,
    cancel: CancelToken | None,
) -> dict[int, Tensor]:
    """Return the network's maps of (C, X, Y, Z) by stride, averaged over windows where one does not do."""
    full = tuple(images.shape[1:])
    window = [_window(n, w) for n, w in zip(full, _WINDOW, strict=True)]
    starts = [
        [STRIDE * round(s / STRIDE) for s in window_starts(n, w, _OVERLAP)] for n, w in zip(full, window, strict=True)
    ]
    corners = list(itertools.product(*starts))
    sums: dict[int, Tensor] = {}
    weights: dict[int, Tensor] = {}
    dtype = choose_dtype(where)
    half = dtype != torch.float32
    network.to(where)
    for done, corner in enumerate(corners):

        def report(share: float, done: int = done) -> None:
            _check(cancel)
            progress(Progress("Reading the study with the network", round(100 * (done + share)), 100 * len(corners)))

        report(0.0)
        box = [slice(s, s + w) for s, w in zip(corner, window, strict=True)]
        with report_layers(network, report), torch.autocast(where.type, dtype if half else None, enabled=half):
            maps = _decode(network, channels_last(images[(slice(None), *box)][None].to(where)))
        for stride, found in maps.items():
            small = tuple(slice(s.start // stride, s.stop // stride) for s in box)
            if stride not in sums:
                shape = [n // stride for n in full]
                sums[stride], weights[stride] = images.new_zeros(found.shape[1], *shape), images.new_zeros(shape)
            importance = gaussian_importance([w // stride for w in window]) if len(corners) > 1 else torch.ones(())
            importance = importance.to(images.device)
            sums[stride][(slice(None), *small)] += found[0].float().to(images.device) * importance
            weights[stride][small] += importance
    return {stride: total.div_(weights[stride]) for stride, total in sums.items()}


def _window(size: int, largest: int) -> int:
    """Return the length of windows along an axis: all of it, or the least with which as many as are needed overlap.

    Examples
    --------
    >>> _window(144, 160), _window(176, 160)
    (144, 112)
    """
    if size <= largest:
        return size
    count = math.ceil((size - _OVERLAP * largest) / ((1 - _OVERLAP) * largest))
    return STRIDE * math.ceil(size / (count - (count - 1) * _OVERLAP) / STRIDE)


def _decode(network: SegmentationNetwork, x: Tensor) -> dict[int, Tensor]:
    """Return the maps at 1 (decoder, then logits) and 1/2 (decoder, then encoder) of the resolution, by stride."""
    image, *stages = network.encoder(x)
    half, quarter, eighth, deepest = (to_hwd(stage) for stage in stages)
    decoder = network.decoder
    at_quarter = decoder.decoder4(decoder.decoder5(deepest, eighth), quarter)
    at_half = decoder.decoder3(at_quarter, half)
    full = decoder.decoder2(at_half, to_hwd(decoder.proj1(image)))
    logits = decoder.out(full)
    return {1: torch.cat([full, logits - logits.mean(1, keepdim=True)], 1), 2: at_half}


def _check(cancel: CancelToken | None) -> None:
    if cancel is not None:
        cancel.raise_if_cancelled()
