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
    "Comfy.TutorialCompleted": True,  # all else as a new user finds it
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
    """name -> {workflow, blueprint}: graphs in API form with a layout, in the front-end's own form; blueprint is None where no part is `whole`."""
    return _ask(url, {"build": jobs})


def look(url: str, jobs: list[dict], locale: str = "en-US", bare: bool = False) -> dict:
    """name -> what a person sees of a workflow file that is opened as a template (front_end.mjs, look), and what `then` gave."""
    return _ask(url, {"look": jobs, "locale": locale, "bare": bare})


def check(url: str, jobs: list[dict]) -> dict:
    """name -> {api, missing, broken, links, errors}: what the front-end made of a workflow file."""
    return _ask(url, {"check": jobs})


def _ask(url: str, request: dict) -> dict:
    text = json.dumps(request | {"settings": SETTINGS})
    done = subprocess.run(["node", str(SCRIPT), url], input=text, capture_output=True, text=True, env=_environment(), timeout=900)
    if done.returncode:
        raise RuntimeError(f"The front-end could not be driven:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout)


def _environment() -> dict:
    return os.environ | {"CHROMIUM": chromium() or ""}
