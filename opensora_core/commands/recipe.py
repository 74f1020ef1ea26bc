"""The recipe of a video: what `generate` writes into it, and what `inspect` says of one."""

import json
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..errors import OpenSoraError
from ..geometry import ASPECT_RATIOS
from ..media.recipe import PROGRAM, recipe_of
from ..run.files import SMALL, ModelFiles
from .options import GenerateOptions, flag

# What says where to write and what to do with what is there, not what is made.
_NOT_OF_THE_VIDEO = {"out", "csv", "num_samples", "seed", "prompt", "decode", "num_frames", "refine_prompt", "refine_model"}
# node -> its inputs, and our flags for them.
_NODES = {
    "OpenSoraT5TextEncode": {"prompt": "prompt", "negative_prompt": "negative_prompt", "motion_score": "motion_score", "fps": "fps"},
    "OpenSoraEmptyLatentVideo": {"resolution": "resolution", "aspect_ratio": "aspect_ratio", "num_frames": "num_frames", "length": "num_frames",
                                 "width": "width", "height": "height"},
    "OpenSoraRectifiedFlowSampler": {"seed": "seed", "steps": "num_steps", "text_guidance": "guidance", "image_guidance": "guidance_img"},
    "OpenSoraScheduler": {"steps": "num_steps"},
    "OpenSoraGuider": {"text_guidance": "guidance", "image_guidance": "guidance_img"},
    "RandomNoise": {"noise_seed": "seed"},
}  # fmt: skip
_SMALL = "small (built in)"  # as nodes name it


def recipe_for(options: GenerateOptions, files: ModelFiles) -> dict[str, Any]:
    """What is said of every video of a command, but for its prompt and seed: no path of anyone's machine, names and sizes of files alone."""
    settings = {}
    for one in fields(options):
        value = getattr(options, one.name)
        if one.metadata and one.name not in _NOT_OF_THE_VIDEO and value != one.default:
            settings[one.name] = Path(value).name if isinstance(value, str) and _is_path(value) else value
    given = {name: path for name in ("dit", "vae", "t5", "clip") if (path := getattr(files, name)) is not None}
    named = {name: path for name, path in given.items() if path.exists()}
    parts = {name: {"name": path.name, "bytes": path.stat().st_size} for name, path in named.items() if path.is_file()}
    if files.dit.parent == SMALL:
        settings["model"] = "small"
    return {"settings": settings, "files": parts, "versions": {PROGRAM: __version__, "torch": torch.__version__}}


def _is_path(value: str) -> bool:
    return ("/" in value or "\\" in value) and "\n" not in value and Path(value).exists()


def describe(path: Path) -> str:
    """A video's recipe for a person."""
    recipe = recipe_of(path)
    if recipe["program"] != PROGRAM:
        lines = [f"{path.name}: made by ComfyUI, a graph of {len(recipe['prompt'])} nodes"]
        return "\n".join([*lines, *(f"  {name}: {_short(value)}" for name, value in _of_graph(recipe["prompt"]).items())])
    lines = [f"{path.name}: made by {PROGRAM} {recipe['versions'][PROGRAM]}, torch {recipe['versions']['torch']}"]
    lines += [
        f"  {name}: {_short(recipe[name])}" for name in ("prompt", "request", "seed", "num_frames", "dtype", "device") if name in recipe
    ]
    lines += [f"  {name}: {_short(value)}" for name, value in recipe["settings"].items()]
    lines += [f"  {name}: {part['name']}, {part['bytes']:,} bytes" for name, part in recipe["files"].items()]
    return "\n".join(lines)


def as_command(path: Path) -> str:
    """The line that makes a video again. Files are named without folders, as the video knows them."""
    recipe = recipe_of(path)
    if recipe["program"] == PROGRAM:
        asked = {"prompt": recipe["prompt"], "seed": recipe["seed"], "num_frames": recipe.get("num_frames"), **recipe["settings"]}
    else:
        asked = _of_graph(recipe["prompt"])
    if "prompt" not in asked:
        raise OpenSoraError(f"{path.name} was made by a graph without Open-Sora Text Encode; no command makes it again.")
    words = ["python", "-m", PROGRAM, "generate"]
    for name, value in asked.items():
        if value is True:
            words.append(flag(name))
        elif value not in (None, False, ""):
            words += [flag(name), *map(str, value if isinstance(value, list | tuple) else [value])]
    return shlex.join(words)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else text[:200] + " ..."


def _of_graph(graph: dict) -> dict[str, Any]:
    """Our flags for what a graph of ComfyUI's asks our nodes for."""
    asked: dict[str, Any] = {}
    for node in graph.values():
        inputs = {name: _constant(graph, value) for name, value in node.get("inputs", {}).items()}
        for name, ours in _NODES.get(node.get("class_type"), {}).items():
            if inputs.get(name) not in (None, ""):
                asked[ours] = inputs[name]
        if inputs.get("model_name") == _SMALL:
            asked["model"] = "small"
    unused = ("resolution", "aspect_ratio") if asked.get("resolution") not in ("256px", "768px") else ("width", "height")
    asked = {name: value for name, value in asked.items() if name not in unused}
    if asked.get("aspect_ratio") not in ASPECT_RATIOS:
        asked.pop("aspect_ratio", None)
    return asked


def _constant(graph: dict, value: Any) -> Any:
    """What stands in an input, or in the primitive that it is wired to; None for what a node makes."""
    if isinstance(value, list) and len(value) == 2:
        source = graph.get(str(value[0]), {})
        return source.get("inputs", {}).get("value") if str(source.get("class_type", "")).startswith("Primitive") else None
    return value
