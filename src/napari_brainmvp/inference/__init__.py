"""Inference: a study and a model in, a result on the scan's own grid out."""

from napari_brainmvp.inference.classify import ClassificationResult, classify
from napari_brainmvp.inference.device import choose_device, list_devices
from napari_brainmvp.inference.result import SegmentationResult, Structure
from napari_brainmvp.inference.segment import SegmentOptions, segment

__all__ = [
    "ClassificationResult",
    "SegmentOptions",
    "SegmentationResult",
    "Structure",
    "choose_device",
    "classify",
    "list_devices",
    "segment",
]
