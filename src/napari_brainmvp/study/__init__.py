"""The domain: modalities, grids, scans and studies. Plain data, immutable, validated, no torch."""

from napari_brainmvp.study.grid import Grid
from napari_brainmvp.study.modality import MODALITIES, Modality, modality
from napari_brainmvp.study.study import LabelMap, Scan, Study

__all__ = ["MODALITIES", "Grid", "LabelMap", "Modality", "Scan", "Study", "modality"]
