"""`pip install .` gives the library with its data, and nothing else of this checkout."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder that `pip install .` filled, from a copy of what it reads: building must leave nothing in the checkout."""
    pytest.importorskip("setuptools", reason="setuptools is not installed: pip install . was not tried")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("pyproject.toml", "README.md", "LICENSE", "__init__.py"):
        shutil.copy(ROOT / name, source)
    for name in ("opensora_core", "nodes", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "golden"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "--target",
        str(target),
        ".",
    ]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def test_the_library_is_whole(installed):
    ours = {path.relative_to(ROOT) for path in (ROOT / "opensora_core").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    there = {path.relative_to(installed) for path in (installed / "opensora_core").rglob("*") if path.is_file()}
    assert ours <= there


def test_nothing_else_is_installed(installed):
    assert {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")} == {"opensora_core"}


def test_it_runs_from_anywhere(installed, tmp_path):
    command = [sys.executable, "-c", "import opensora_core, sys; print(opensora_core.__file__, 'torch' in sys.modules)"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(installed)}, capture_output=True, text=True)
    assert done.stdout.split() == [str(installed / "opensora_core" / "__init__.py"), "False"], done.stderr


@pytest.mark.parametrize("name", ["example_workflows", "example", "examples", "workflow"])
def test_no_folder_stands_before_the_templates(name):
    """ComfyUI serves templates from the first of these folders that a pack has and from no other: beside one, `workflows` would answer 404
    for every template (0.33, app/custom_node_manager.py)."""
    assert (ROOT / "workflows").is_dir() and not (ROOT / name).exists()


def test_the_manager_is_told_of_every_node():
    """ComfyUI Manager finds nodes that a workflow misses by what stands in the sources, or in this file where names are made, as ours are."""
    told = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    listed = json.loads((ROOT / "node_list.json").read_text(encoding="utf-8"))
    assert listed == {name: texts["description"] for name, texts in told.items()}
