"""Studies made by MR physics, with lesions and truth, for samples, tests and training."""

from napari_brainmvp.synthesis.study import LABEL_NAMES, LesionKind, SynthesisSpec, make_study

__all__ = ["LABEL_NAMES", "LesionKind", "SynthesisSpec", "make_study"]
