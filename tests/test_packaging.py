"""What is installed is complete: manifest, models and icons, from a wheel, an sdist and an editable tree."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = [p.relative_to(ROOT).as_posix() for p in sorted((ROOT / "resources").rglob("*")) if p.is_file()]
PROBE = """
import importlib.util, json, sys
from pathlib import Path
from napari_brainmvp.models import list_models
from napari_brainmvp.resources import resource_path
package = Path(importlib.util.find_spec("napari_brainmvp").origin).parent
icon = resource_path("icons/brainmvp.svg").stat().st_size > 100
models = [e.card.name for e in list_models() if e.shipped]
print(json.dumps([str(package), (package / "napari.yaml").exists(), icon, models]))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_there_is_one_copy_of_everything():
    link = ROOT / "src" / "napari_brainmvp" / "napari.yaml"
    assert link.is_symlink()
    assert link.resolve() == ROOT / "napari.yaml"
    assert not (ROOT / "src" / "napari_brainmvp" / "resources").exists()
    assert sum(p.stat().st_size for p in (ROOT / "resources").rglob("*") if p.is_file()) < 16e6


def test_the_wheel_carries_everything(built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = wheel.namelist()
        assert wheel.read("napari_brainmvp/napari.yaml") == (ROOT / "napari.yaml").read_bytes()
    for name in SHIPPED:
        assert f"napari_brainmvp/{name}" in names
    assert len(names) == len(set(names))


def test_the_sdist_carries_everything(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    assert {"napari.yaml", "pyproject.toml", "README.md", "LICENSE", *SHIPPED} <= names


def test_an_installed_wheel_finds_its_parts(built, tmp_path):
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
    subprocess.run([*command, str(next(built.glob("*.whl")))], check=True)
    code = f"import sys; sys.path.insert(0, {str(target)!r})\n{PROBE}"
    import json

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    package, manifest, icon, models = json.loads(done.stdout)
    assert package == str(target / "napari_brainmvp")
    assert manifest
    assert icon
    assert models == [p.name for p in sorted((ROOT / "resources" / "models").iterdir())]


def test_npe2_finds_the_plugin_in_this_installation():
    code = (
        "from npe2 import PluginManager; pm = PluginManager.instance(); pm.discover()\n"
        "c = pm.get_manifest('napari-brainmvp').contributions; print(len(c.sample_data), len(c.widgets))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "1"]
