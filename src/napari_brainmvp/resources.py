"""Where the files that ship are: ``resources/`` and ``napari.yaml`` of an installed or an editable package.

A wheel carries them inside the package; in a source tree (and so in an editable install) they stand beside
``src``, which holds the only copy.
"""

from __future__ import annotations

from pathlib import Path

from napari_brainmvp.errors import FileError

__all__ = ["resource_path"]

_PACKAGE = Path(__file__).resolve().parent


def resource_path(name: str) -> Path:
    """Return the path of something in ``resources/``.

    Parameters
    ----------
    name : str
        A relative path such as ``"models"`` or ``"icons/brainmvp.svg"``.

    Raises
    ------
    FileError
        Nothing of that name ships with this installation.
    """
    for root in (_PACKAGE / "resources", _PACKAGE.parents[1] / "resources"):
        if (root / name).exists():
            return root / name
    raise FileError(f"The packaged file resources/{name} is missing: reinstall napari-brainmvp.")
