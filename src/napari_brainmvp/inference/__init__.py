"""Inference: a study and a model in, a result on the scan's own grid out."""

from napari_brainmvp.inference.classify import ClassificationResult, classify
from napari_brainmvp.inference.device import choose_device, list_devices
from napari_brainmvp.inference.reconstruct import (
    ReconstructionOptions,
    impute,
    impute_missing,
    reconstruct,
    template_scan,
)
from napari_brainmvp.inference.reconstruction import ReconstructionResult
from napari_brainmvp.inference.result import SegmentationResult, Structure
from napari_brainmvp.inference.segment import SegmentOptions, segment
from napari_brainmvp.inference.similarity import Similarity

__all__ = [
    "ClassificationResult",
    "ReconstructionOptions",
    "ReconstructionResult",
    "SegmentOptions",
    "SegmentationResult",
    "Similarity",
    "Structure",
    "choose_device",
    "classify",
    "impute",
    "impute_missing",
    "list_devices",
    "reconstruct",
    "segment",
    "template_scan",
]
