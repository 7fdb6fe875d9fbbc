"""The house keeps its order: who may import what, and what is imported when."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import napari_brainmvp

PACKAGE = Path(napari_brainmvp.__file__).parent
ROOMS = (
    "study",
    "io",
    "preparation",
    "synthesis",
    "networks",
    "models",
    "inference",
    "training",
    "annotation",
    "jobs",
    "cli",
    "plugin",
)
GROUND = ("errors", "progress", "resources", "threads")
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_imports_only_what_stands_before_it(path):
    room = path.relative_to(PACKAGE).parts[0]
    for name in imports(path):
        parts = name.split(".")
        if parts[0] in ("napari", "qtpy", "magicgui", "superqt"):
            assert room == "plugin" or path.name == "demo.py", f"{path} imports {name}"
        if parts[0] != "napari_brainmvp" or len(parts) < 2 or parts[1] in GROUND:
            continue
        assert room not in GROUND or room == "resources"
        assert ROOMS.index(parts[1]) <= ROOMS.index(room), f"{path} imports {name}"


def test_every_room_is_known():
    rooms = {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name not in ("__pycache__", "resources")}
    assert rooms <= set(ROOMS)


@pytest.mark.parametrize(
    "module", ["napari_brainmvp", "napari_brainmvp.io", "napari_brainmvp.cli", "napari_brainmvp.plugin.widget"]
)
def test_nothing_heavy_is_imported_early(module):
    code = f"import sys, {module}; print([m for m in ('torch', 'monai', 'lightning') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_files_stay_short():
    lengths = {path: len(path.read_text().splitlines()) for path in MODULES}
    assert {p.name: n for p, n in lengths.items() if n > 320} == {}


def test_the_engine_does_not_print():
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print", path
