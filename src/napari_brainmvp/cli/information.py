"""``brainmvp info``: versions, devices, paths."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from napari_brainmvp import __version__
from napari_brainmvp.jobs import jobs_folder
from napari_brainmvp.models import list_models, models_folder

__all__ = ["information"]


def information() -> list[tuple[str, str]]:
    """Return rows of name and value."""
    import torch

    from napari_brainmvp.inference import list_devices

    rows = [("version", __version__), ("python", f"{platform.python_version()} on {platform.platform()}")]
    for package in ("torch", "monai", "nibabel", "numpy", "napari", "npe2"):
        try:
            rows.append((package, version(package)))
        except PackageNotFoundError:
            rows.append((package, "not installed"))
    rows.append(("devices", ", ".join(list_devices())))
    rows.append(("threads", str(torch.get_num_threads())))
    rows.append(("models", ", ".join(entry.card.name for entry in list_models()) or "none"))
    rows.append(("your models", str(models_folder())))
    rows.append(("your jobs", str(jobs_folder())))
    return rows
