"""What the documentation says runs."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

import napari_brainmvp

ROOT = Path(__file__).parents[1]
PACKAGE = Path(napari_brainmvp.__file__).parent
EXAMPLES = [p for p in sorted(PACKAGE.rglob("*.py")) if ">>>" in p.read_text()]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_examples_in_docstrings(path):
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    module = importlib.import_module(name)
    import pathlib

    import numpy
    import torch

    names = {"np": numpy, "torch": torch, "Path": pathlib.Path}
    assert doctest.testmod(module, extraglobs=names).failed == 0


def test_examples_in_the_geometry_page():
    failed, tried = doctest.testfile(str(ROOT / "docs" / "geometry.md"), module_relative=False)
    assert (failed, tried > 0) == (0, True)


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))])
def test_links_and_pictures_exist(page):
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target
