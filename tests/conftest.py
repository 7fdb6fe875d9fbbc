"""Shared fixtures. Tests make their own data; they never need a network connection or a GPU."""

import os
import subprocess
import sys
from contextlib import contextmanager

os.environ.setdefault("NAPARI_ASYNC", "0")

import nibabel as nib
import numpy as np
import pytest

from models_for_tests import tiny_model


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep all tests with a window in one process: only one window has the keyboard."""
    for item in items:
        if "qtbot" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.windows)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A model registry of its own, with the tiny model in it."""
    monkeypatch.setenv("BRAINMVP_HOME", str(tmp_path / "home"))
    tiny_model(tmp_path / "home" / "models")
    return tmp_path / "home"


def brain(shape=(40, 44, 36), seed=0) -> np.ndarray:
    """A ball of textured intensities in zeros."""
    rng = np.random.default_rng(seed)
    index = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"), -1)
    inside = np.linalg.norm(index, axis=-1) < 0.8
    return np.where(inside, rng.uniform(50, 150, shape), 0).astype(np.float32)


def filled(shape=(32, 32, 32)) -> np.ndarray:
    """Textured intensities everywhere, so that nothing is cut off."""
    return np.random.default_rng(0).uniform(100, 200, shape).astype(np.float32)


@contextmanager
def ordinary_user(closed):
    """Close a folder, and be a user whom that keeps out; root is let in everywhere."""
    closed.chmod(0)
    root = os.geteuid() == 0
    above = [folder for folder in closed.parents if root and folder.stat().st_uid == 0 and folder != folder.parent]
    modes = [folder.stat().st_mode for folder in above]
    for folder, mode in zip(above, modes, strict=True):
        folder.chmod(mode | 0o755)
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        for folder, mode in zip(above, modes, strict=True):
            folder.chmod(mode)
        closed.chmod(0o755)


def without_privilege(path, code: str) -> str:
    """Return what code prints in a process that has given root's capabilities up; the path is closed to it."""
    drop = (  # version 3 of capset's header
        "import ctypes, sys; from pathlib import Path; path = Path(sys.argv[1])\n"
        "ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())\n"
        "try: path.read_bytes(); sys.exit(77)\nexcept PermissionError: pass\n"
    )
    done = subprocess.run([sys.executable, "-c", drop + code, str(path)], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("root may read everything here, also without capabilities")
    return done.stdout + done.stderr


@contextmanager
def full_disk():
    """Write nothing into any file meanwhile: the kernel refuses this process, as a full disk does. Not on Windows."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def save(path, data, affine=None, **header) -> None:
    image = nib.Nifti1Image(data, np.diag([1.0, 1, 1, 1]) if affine is None else affine)
    for key, value in header.items():
        image.header[key] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)


@pytest.fixture
def study_folder(tmp_path):
    """A BraTS-like study in LPS orientation."""
    folder = tmp_path / "BraTS-GLI-00001-000"
    affine = np.array([[-1.0, 0, 0, 20], [0, -1, 0, 30], [0, 0, 1, -10], [0, 0, 0, 1]])
    for seed, key in enumerate(("t1n", "t1c", "t2w", "t2f")):
        save(folder / f"{folder.name}-{key}.nii.gz", brain(seed=seed), affine)
    return folder
