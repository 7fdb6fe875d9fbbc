"""The command line. ``main`` is what the ``brainmvp`` script calls."""

from napari_brainmvp.cli.app import main

__all__ = ["main"]
