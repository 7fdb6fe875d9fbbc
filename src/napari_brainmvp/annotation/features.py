"""What the probe sees of a voxel: intensities and their surroundings, and a trained network's own maps.

Everything is computed once a study and kept at the resolution at which the probe decides, so that a stroke costs two
matrix products a voxel and nothing else. Only the fine maps of the network are taken. Coarse ones (1/8 and 1/16) tell
a probe where in the brain it is rather than what it looks at; with labels on a few slices it then does not carry over
to the slices between.
"""

from __future__ import annotations

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from napari_brainmvp.errors import ModelError
from napari_brainmvp.inference.device import choose_device, choose_dtype
from napari_brainmvp.inference.windows import gaussian_importance, report_layers, window_starts
from napari_brainmvp.models import LoadedModel
from napari_brainmvp.networks import STRIDE, SegmentationNetwork, channels_last
from napari_brainmvp.networks.layers import to_hwd
from napari_brainmvp.preparation import PreparedStudy, prepare
from napari_brainmvp.progress import CancelToken, Progress, ProgressCallback, no_progress
from napari_brainmvp.study import Grid, Study

__all__ = ["CLASS", "LIMIT", "SCALES", "StudyFeatures", "compute_features"]

SCALES = (1.0, 2.0, 4.0, 8.0)
"""Standard deviations of the Gaussians that describe a voxel's surroundings, mm."""
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

    Each modality's prepared intensity, its Gaussian means at :data:`SCALES`, gradient magnitudes and local standard
    deviations; then the network's logits and its decoder's maps at 1 and 1/2 of the resolution; last the log
    probabilities of its classes, where they are exclusive.

    Parameters
    ----------
    study : Study
        Any modalities; the network sees those it knows, templates or nothing in place of the others.
    model : LoadedModel
        A segmentation model.
    progress, cancel
        Told, and asked, at every modality and layer of the network.
    device : str
        Of the network, as :func:`napari_brainmvp.inference.choose_device` takes it.

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
    mask = prepared.foreground
    rows = np.full(tuple(mask.shape), -1, np.int32)
    rows[mask.numpy()] = np.arange(int(mask.sum()), dtype=np.int32)
    columns = _Columns(mask)
    keys = zip((*wanted, *extra), prepared.images, prepared.present, strict=True)
    present = [(key, image) for key, image, there in keys if there]
    for done, (key, image) in enumerate(present):
        _check(cancel)
        progress(Progress("Describing intensities", done, len(present)))
        for name, volume in _surroundings(image, prepared.grid.spacing[0]):
            columns.add(f"{key} {name}", volume)
    if any(prepared.present[: len(wanted)]):
        for name, volume in _network_maps(network, _fill(prepared, model), mask, device, progress, cancel):
            if name.startswith(CLASS):
                if model.card.activation == "softmax" or model.card.network.parts:  # else they are no classes
                    columns.add_plain(name, volume)
            else:
                columns.add(f"network {name}", volume)
    return StudyFeatures(prepared.grid, prepared.source, rows, columns.stacked(), tuple(columns.names))


class _Columns:
    """Collect foreground values, standardised, one column at a time."""

    def __init__(self, mask: Tensor) -> None:
        self._mask, self._columns = mask, list[Tensor]()
        self.names: list[str] = []

    def add(self, name: str, volume: Tensor) -> None:
        inside = volume[self._mask].float()
        deviation, mean = torch.std_mean(inside)
        self._columns.append(((inside - mean) / (deviation + 1e-4)).clamp(-LIMIT, LIMIT).bfloat16())
        self.names.append(name)

    def add_plain(self, name: str, volume: Tensor) -> None:
        self._columns.append(volume[self._mask].float().clamp(-LIMIT, LIMIT).bfloat16())
        self.names.append(name)

    def stacked(self) -> Tensor:
        """Return (N, F), written in chunks so that a transposed copy never misses the processor's cache."""
        values = torch.empty(len(self._columns[0]), len(self._columns), dtype=torch.bfloat16)
        for start in range(0, len(values), _CHUNK):
            values[start : start + _CHUNK] = torch.stack([c[start : start + _CHUNK] for c in self._columns], 1)
        return values


def _surroundings(image: Tensor, spacing: float) -> list[tuple[str, Tensor]]:
    """Describe a modality (X, Y, Z) by Gaussian means, gradient magnitudes, and spread about the mean."""
    volume = image.numpy()

    def blur(values: NDArray[np.float32], scale: float) -> NDArray[np.float32]:
        blurred: NDArray[np.float32] = ndimage.gaussian_filter(values, scale / spacing, truncate=3)
        return blurred

    def steepness(values: NDArray[np.float32]) -> NDArray[np.float32]:
        total = np.zeros_like(values)
        for axis in range(3):
            total += np.square(np.gradient(values, axis=axis))
        return np.sqrt(total)

    with ThreadPoolExecutor(len(SCALES) + 1) as pool:  # scipy's filters let go of the interpreter's lock
        squares = pool.submit(blur, np.square(volume), 2.0)
        means = list(pool.map(lambda scale: blur(volume, scale), SCALES))
        spread = np.sqrt(np.clip(squares.result() - np.square(means[1]), 0, None))
        steep = list(pool.map(steepness, means[:3]))
    named = [("", volume), *((f"{s:g}mm", m) for s, m in zip(SCALES, means, strict=True)), ("spread 2mm", spread)]
    named += [(f"gradient {s:g}mm", g) for s, g in zip(SCALES[:3], steep, strict=True)]
    return [(name, torch.from_numpy(values)) for name, values in named]


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
    mask: Tensor,
    device: str,
    progress: ProgressCallback,
    cancel: CancelToken | None,
) -> list[tuple[str, Tensor]]:
    """Run the network over (C, X, Y, Z) and return its maps, channel by channel, at full resolution."""
    size = tuple(images.shape[1:])
    rest = [-n % STRIDE for n in size]
    images = F.pad(images, (0, rest[2], 0, rest[1], 0, rest[0]))
    full = tuple(images.shape[1:])
    window = [_window(n, w) for n, w in zip(full, _WINDOW, strict=True)]
    starts = [
        [STRIDE * round(s / STRIDE) for s in window_starts(n, w, _OVERLAP)] for n, w in zip(full, window, strict=True)
    ]
    corners = list(itertools.product(*starts))
    sums: dict[int, Tensor] = {}
    weights: dict[int, Tensor] = {}
    where = choose_device(device)
    dtype = choose_dtype(where)
    network.to(where)
    for done, corner in enumerate(corners):

        def report(share: float, done: int = done) -> None:
            _check(cancel)
            progress(Progress("Reading the study with the network", round(100 * (done + share)), 100 * len(corners)))

        report(0.0)
        box = [slice(s, s + w) for s, w in zip(corner, window, strict=True)]
        half = dtype != torch.float32
        with report_layers(network, report), torch.autocast(where.type, dtype if half else None, enabled=half):
            maps = _decode(network, channels_last(images[(slice(None), *box)][None].to(where)))
        for stride, found in maps.items():
            small = tuple(slice(s.start // stride, s.stop // stride) for s in box)
            if stride not in sums:
                shape = [n // stride for n in full]
                sums[stride], weights[stride] = torch.zeros(found.shape[1], *shape), torch.zeros(shape)
            importance = gaussian_importance([w // stride for w in window]) if len(corners) > 1 else torch.ones(())
            sums[stride][(slice(None), *small)] += found[0].float().cpu() * importance
            weights[stride][small] += importance
    network.to("cpu")
    named = []
    for stride, title in ((1, "fine"), (2, "half")):
        for channel, values in enumerate(sums[stride].div_(weights[stride])):
            if stride > 1:
                values = F.interpolate(values[None, None], full, mode="trilinear", align_corners=False)[0, 0]
            named.append((f"{title} {channel}", values[: size[0], : size[1], : size[2]]))
    logits = sums[1][network.full_resolution_channels :, : size[0], : size[1], : size[2]]
    return named + [(f"{CLASS}{k}", values) for k, values in enumerate(logits.log_softmax(0))]


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
