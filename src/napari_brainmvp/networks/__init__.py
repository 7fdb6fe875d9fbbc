"""Networks: pure modules, no files, no studies."""

from napari_brainmvp.networks.classification import ClassificationNetwork
from napari_brainmvp.networks.layers import channels_last
from napari_brainmvp.networks.pretraining import PretrainingNetwork
from napari_brainmvp.networks.reconstruction import ReconstructionNetwork
from napari_brainmvp.networks.segmentation import SegmentationDecoder, SegmentationNetwork, Unions
from napari_brainmvp.networks.templates import ModalityTemplates
from napari_brainmvp.networks.unet3d import UNet3DPretrainingNetwork
from napari_brainmvp.networks.uniformer import (
    STRIDE,
    UNIFORMER_COMPACT,
    UNIFORMER_SMALL,
    EncoderSpec,
    UniFormer,
)

__all__ = [
    "STRIDE",
    "UNIFORMER_COMPACT",
    "UNIFORMER_SMALL",
    "ClassificationNetwork",
    "EncoderSpec",
    "ModalityTemplates",
    "PretrainingNetwork",
    "ReconstructionNetwork",
    "SegmentationDecoder",
    "SegmentationNetwork",
    "UNet3DPretrainingNetwork",
    "UniFormer",
    "Unions",
    "channels_last",
]
