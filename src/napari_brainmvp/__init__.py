"""Multi-modal brain MRI in napari and on the command line: segment, annotate, fine-tune, pre-train.

An independent implementation of the method of BrainMVP (Rui et al., CVPR 2025). For research use; not a medical device.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("napari-brainmvp")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"

__all__ = ["__version__"]
