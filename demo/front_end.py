"""Asks the real ComfyUI front-end, in a headless Chromium, to make a workflow file or to open one (front_end.mjs).

Needs node, playwright-core (`npm install playwright-core`, found through NODE_PATH or beside this folder) and a Chromium.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).with_suffix(".mjs")
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
    "Comfy.Minimap.Visible": False,
    "Comfy.Sidebar.Location": "left",
}


def chromium() -> str | None:
    """The browser to use: $CHROMIUM, else one on the path."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return os.environ.get("CHROMIUM") or next((found for name in names if (found := shutil.which(name))), None)


def missing() -> str | None:
    """What the front-end cannot be driven without, in words; None where all of it is there."""
    if not shutil.which("node"):
        return "node is not installed"
    if not chromium():
        return "no Chromium is installed (or set CHROMIUM)"
    probe = subprocess.run(["node", "-e", "require('playwright-core')"], cwd=SCRIPT.parent, capture_output=True, env=_environment())
    return "playwright-core is not installed (npm install playwright-core)" if probe.returncode else None


def build(url: str, jobs: list[dict]) -> dict:
    """name -> workflow in the front-end's own form, for graphs in API form with a layout."""
    return _ask(url, {"build": jobs})


def blueprints(url: str, jobs: list[dict]) -> dict:
    """name -> blueprint file, for jobs of `build` that also say which nodes are `inside`, and what is seen on the one node they become."""
    return _ask(url, {"blueprint": jobs})


def check(url: str, jobs: list[dict]) -> dict:
    """name -> {api, missing, broken, links, errors}: what the front-end made of a workflow file."""
    return _ask(url, {"check": jobs})


def _ask(url: str, request: dict) -> dict:
    text = json.dumps(request | {"settings": SETTINGS})
    done = subprocess.run(["node", str(SCRIPT), url], input=text, capture_output=True, text=True, env=_environment(), timeout=300)
    if done.returncode:
        raise RuntimeError(f"The front-end could not be driven:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout)


def _environment() -> dict:
    return os.environ | {"CHROMIUM": chromium() or ""}
