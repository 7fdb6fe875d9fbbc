"""A picture of a segmentation: three planes through the most interesting place, and a legend with volumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from napari_brainmvp.inference import SegmentationResult
from napari_brainmvp.preparation.resampling import network_grid
from napari_brainmvp.study import Grid, Study

__all__ = ["draw_result"]

_PANEL, _GAP, _TOP, _SIDE = 300, 14, 74, 250
_INK, _QUIET, _PAPER = (236, 238, 242), (150, 156, 166), (22, 24, 29)


def draw_result(study: Study, result: SegmentationResult, path: Path) -> None:
    """Draw every scan and the segmentation in axial, coronal and sagittal planes, radiological convention.

    Parameters
    ----------
    study : Study
        Scans on the grid of the result are drawn.
    result : SegmentationResult
    path : Path
        A ``.png``.
    """
    upright = _Upright(result.grid)
    labels = upright(result.labels)
    at = _place(labels, result)
    scans = [s for s in study.scans.values() if s.grid.same_as(result.grid)]
    base = next((s for s in scans if s.modality.key == "flair"), scans[0])
    columns = [(s.modality.title, _grey(upright(s.data))) for s in scans]
    columns.append(("Segmentation", _overlay(_grey(upright(base.data)), labels, result)))
    columns = columns[-5:]
    width = _GAP + len(columns) * (_PANEL + _GAP) + _SIDE
    canvas = Image.new("RGB", (width, _TOP + 3 * (_PANEL + _GAP)), _PAPER)
    pen = ImageDraw.Draw(canvas)
    pen.text((_GAP, 12), f"{study.name} · {result.model}", _INK, _font(22))
    for column, (title, volume) in enumerate(columns):
        left = _GAP + column * (_PANEL + _GAP)
        pen.text((left, 46), title, _QUIET, _font(16))
        for row in range(3):
            tile = _tile(volume, 2 - row, at[2 - row], upright.spacing)
            canvas.paste(tile, (left, _TOP + row * (_PANEL + _GAP)))
    pen.text((_GAP + 4, _TOP + 4), "R", _INK, _font(16))
    pen.text((_GAP + _PANEL - 16, _TOP + 4), "L", _INK, _font(16))
    _legend(pen, result, width - _SIDE + _GAP)
    canvas.save(path, format="PNG")


class _Upright:
    """Reorders voxels to the closest RAS axes, whatever the scanner's order."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        matrix = np.linalg.inv(grid.affine) @ network_grid(grid, max(grid.spacing)).affine
        self.order = np.abs(matrix[:3, :3]).argmax(axis=0)
        self.flipped = [axis for axis in range(3) if matrix[self.order[axis], axis] < 0]
        self.spacing = np.array(grid.spacing)[self.order]

    def __call__(self, volume: NDArray[Any]) -> NDArray[Any]:
        return np.flip(volume.transpose(self.order), tuple(self.flipped))


def _place(labels: NDArray[Any], result: SegmentationResult) -> tuple[int, int, int]:
    """Return the voxel to look at: inside the abnormal tissue where there is any, else the middle of the labels."""
    for values in ((5, 6), (4,), tuple(s.value for s in result.structures)):
        index = np.argwhere(np.isin(labels, values))
        if len(index):
            a, b, c = (int(x) for x in np.median(index, axis=0))
            return a, b, c
    a, b, c = (n // 2 for n in labels.shape)
    return a, b, c


def _grey(volume: NDArray[Any]) -> NDArray[np.uint8]:
    values = volume.astype(np.float32)
    low, high = values.min(), np.percentile(values[values > values.min()], 99.5)
    scaled = np.clip((values - low) / max(high - low, 1e-6), 0, 1)
    return np.repeat((255 * scaled[..., None]).astype(np.uint8), 3, -1)


def _overlay(grey: NDArray[np.uint8], labels: NDArray[Any], result: SegmentationResult) -> NDArray[np.uint8]:
    colors = np.zeros((int(max(s.value for s in result.structures)) + 1, 3), np.float32)
    for s in result.structures:
        colors[s.value] = [int(s.color[k : k + 2], 16) for k in (1, 3, 5)]
    mixed = 0.45 * grey + 0.55 * colors[labels.astype(int)]
    return np.where((labels > 0)[..., None], mixed, grey).astype(np.uint8)


def _tile(volume: NDArray[np.uint8], axis: int, index: int, spacing: NDArray[np.float64]) -> Image.Image:
    """Cut a plane and turn it upright: superior or anterior up, the patient's right on the left."""
    plane = np.take(volume, index, axis)
    plane = plane[::-1, ::-1].swapaxes(0, 1)
    across, up = (spacing[a] for a in range(3) if a != axis)
    height, width = plane.shape[0] * up, plane.shape[1] * across
    scale = _PANEL / max(height, width)
    image = Image.fromarray(np.ascontiguousarray(plane)).resize((round(width * scale), round(height * scale)))
    tile = Image.new("RGB", (_PANEL, _PANEL), (0, 0, 0))
    tile.paste(image, ((_PANEL - image.width) // 2, (_PANEL - image.height) // 2))
    return tile


def _legend(pen: ImageDraw.ImageDraw, result: SegmentationResult, left: int) -> None:
    top = _TOP + 6
    for s in result.structures:
        pen.rounded_rectangle((left, top, left + 18, top + 18), 4, s.color)
        pen.text((left + 28, top - 1), s.name, _INK if s.voxels else _QUIET, _font(16))
        pen.text((left + 28, top + 19), f"{s.volume_ml:.1f} ml", _QUIET, _font(14))
        top += 50
    pen.text((left, top + 10), "Research use.\nNot a medical device.", _QUIET, _font(13))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
