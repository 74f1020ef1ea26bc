"""The recipe of a video: what `generate` writes into it, and what `inspect` says of one."""

import json
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..choices import AUTO, FORWARDS, SCRIPTS
from ..errors import OpenSoraError
from ..media.recipe import PROGRAM, as_tag, recipe_of
from ..pipeline import OpenSoraPipeline
from ..run.files import SMALL
from .options import PARTS, PATH_WORDS, GenerateOptions, flag

# What says where to write, what to do with what is there, or is said by other options once it is understood; not what is made.
_NOT_OF_THE_VIDEO = "out csv num_samples seed prompt prompt_path decode num_frames refine_prompt refine_model shard sample_name save_latents gpus loop".split()
_SIZE = "aspect_ratio num_frames length:num_frames width height"
_GUIDANCE = "text_guidance:guidance image_guidance:guidance_img speed text_oscillation image_oscillation solver guidance_curve"
# node -> its inputs, with our flag behind a colon where it has another name. What stands in an input that has a file behind it is the file's name.
_NODES = {
    "OpenSoraT5TextEncode": "prompt negative_prompt motion_score fps aesthetic_score camera_motion unconditional",
    **dict.fromkeys(("OpenSoraEmptyLatentVideo", "OpenSoraEmptyLatentHighCompression"), f"resolution {_SIZE}"),
    "OpenSoraEmptyLatent": f"size:resolution {_SIZE}",
    "OpenSoraImageToVideo": "start_image:ref end_image:ref_end fit strength condition_scale",
    "OpenSoraVideoToVideo": "video:ref direction context fit strength",
    "OpenSoraRectifiedFlowSampler": f"seed steps:num_steps {_GUIDANCE}",
    "OpenSoraFluxToVideo": "prompt negative_prompt motion_score fps seed resolution flux_vae flux_schedule flux_guidance image_steps image_seed "
    f"image_prompt image_resolution flux_model:flux steps:num_steps {_SIZE} {_GUIDANCE}",
    "OpenSoraContinueVideo": "segments:extend num_frames:extend_frames context_frames:extend_context",
    "OpenSoraScheduler": "steps:num_steps",
    "OpenSoraGuider": _GUIDANCE,
    "RandomNoise": "noise_seed:seed",
    "OpenSoraModelLoader": "model_name:dit precision",
    "OpenSoraTextEncoderLoader": "t5_name:t5 clip_l_name:clip",
    "OpenSoraVAELoader": "vae_name:vae",
    "OpenSoraLoraLoader": "lora_name:lora strength:lora_strength",
}
_SMALL, _NO_CLIP = "small (built in)", "none (T5 alone)"  # as nodes name them
# node -> its input that names a file, or lets through what lies behind it
_BEHIND = {"LoadImage": "image", "LoadVideo": "file", "UNETLoader": "unet_name", "VAELoader": "vae_name", "GetVideoComponents": "video",
           "ImageScale": "image", "LatentFromBatch": "samples"}  # fmt: skip
_UNASKED = ("", AUTO, -1, _NO_CLIP)  # what nodes say where nothing is asked for, and no flag needs to
_OPTIONS = {one.name: one for one in fields(GenerateOptions)}


def recipe_for(job, seed: int, pipe: OpenSoraPipeline) -> str:
    """What a video says of itself, as a tag: no path of anyone's machine, names and sizes of files alone. job: a jobs.Job, made with this seed."""
    options, files, settings = job.options, pipe.files, {}
    for name, one in _OPTIONS.items():
        value = getattr(options, name)
        if name not in _NOT_OF_THE_VIDEO and value != one.default:
            is_path = one.metadata["values"] in PATH_WORDS
            settings[name] = ";".join(Path(part.strip()).name for part in value.split(";")) if is_path else value
    parts = {name: {"name": path.name, "bytes": path.stat().st_size} for name in PARTS if (path := getattr(files, name)) and path.is_file()}
    if files.dit.parent == SMALL:
        settings["model"] = "small"
    made = {"prompt": options.prompt, "seed": seed, "num_frames": job.arguments["num_frames"]}
    made |= {"request": job.request} if job.request else {}
    how = {"dtype": str(pipe.dtype).removeprefix("torch."), "device": pipe.device.type, "settings": settings, "files": parts}
    return as_tag({**made, **how, "versions": {PROGRAM: __version__, "torch": torch.__version__}})


def describe(path: Path) -> str:
    """A video's recipe for a person."""
    recipe = recipe_of(path)
    if recipe["program"] != PROGRAM:
        made, said = f"ComfyUI, a graph of {len(recipe['prompt'])} nodes", _of_graph(recipe["prompt"])
    else:
        made = f"{PROGRAM} {_short(recipe['versions'][PROGRAM])}, torch {_short(recipe['versions']['torch'])}"
        said = {key: recipe[key] for key in ("prompt", "request", "seed", "num_frames", "dtype", "device") if key in recipe}
        said |= recipe["settings"] | {name: f"{part['name']}, {part['bytes']:,} bytes" for name, part in recipe["files"].items()}
    return "\n".join([f"{path.name}: made by {made}", *(f"  {_short(name)}: {_short(value)}" for name, value in said.items())])


def as_command(path: Path) -> str:
    """The line that makes a video again. Files are named without folders, as the video knows them."""
    recipe = recipe_of(path)
    asked = _of_run(recipe) if recipe["program"] == PROGRAM else _of_graph(recipe["prompt"])
    if "prompt" not in asked:
        raise OpenSoraError(
            f"{path.name} was made by a graph that asks for no video; take one with Open-Sora Text Encode or Flux to Video."
        )
    words = ["python", "-m", PROGRAM, "generate"]
    for name, value in asked.items():
        one = _OPTIONS.get(name)
        if one is None or name == "out" or value in (None, ""):  # also what a later version, or another hand, wrote
            continue
        if isinstance(value, bool):
            words += [] if value == one.default else [flag(name), *(["False"] if one.default else [])]
        elif isinstance(value, list) and "tuple" in str(one.type):
            words += [flag(name), *map(str, value)]
        else:
            for each in map(str, value if isinstance(value, list) else [value]):
                words += [f"{flag(name)}={each}"] if each.startswith("-") else [flag(name), each]  # else it would be read as a flag itself
    if odd := next((word for word in words if not word.replace("\n", "").replace("\t", "").isprintable()), None):
        raise OpenSoraError(f"{path.name} has characters that no command can have, {_short(odd)}; look at it with inspect alone.")
    return shlex.join(words)


def _of_run(recipe: dict) -> dict[str, Any]:
    """The flags that one of our own recipes stands for."""
    prompt, settings = recipe["prompt"], dict(recipe["settings"])
    extend, texts = settings.get("extend"), settings.get("extend_prompt")
    if settings.get("parity") == SCRIPTS and isinstance(extend, int) and isinstance(texts, list):
        # The scripts ask for loops, and have them from the prompt.
        prompt = " ".join(f"|{loop}| {text}" for loop, text in enumerate([prompt, *texts]))
        settings |= {"loop": extend + 1, **dict.fromkeys(("extend", "extend_prompt", "extend_context"))}
    else:
        settings.pop("condition_frame_length", None)  # said by extend_context
    length = {} if "extend_from" in settings else {"num_frames": recipe.get("num_frames")}
    return {"prompt": prompt, "seed": recipe["seed"], **length, **settings}


def _short(value: Any) -> str:
    text = value if isinstance(value, str) and value.isprintable() else json.dumps(value)  # a file's own words, on a person's terminal
    return text if len(text) <= 200 else text[:200] + " ..."


def _of_graph(graph: dict) -> dict[str, Any]:
    """Our flags for what a graph of ComfyUI's asks our nodes for."""
    asked: dict[str, Any] = {}
    for node in graph.values():
        for name, _, other in (one.partition(":") for one in _NODES.get(node["class_type"], "").split()):
            ours, value = other or name, _constant(graph, node["inputs"].get(name))
            if isinstance(value, str | int | float) and value not in _UNASKED and (value or not ours.startswith("extend_")):
                asked[ours] = value
        if node["class_type"] == "OpenSoraFluxToVideo":
            asked["t2i2v"] = True
    if asked.get("dit") == _SMALL:
        asked = {name: value for name, value in asked.items() if name not in PARTS} | {"model": "small"}
    direction, context = asked.pop("direction", ""), asked.pop("context", "")
    if direction:
        asked["cond_type"] = f"v2v_{'head' if direction == FORWARDS else 'tail'}{'_easy' * (str(context) == '65')}"
    unused = {"custom": ("resolution", "aspect_ratio"), None: ("aspect_ratio", "width", "height")}
    unused = unused.get(asked.get("resolution"), ("width", "height"))
    return {name: value for name, value in asked.items() if name not in unused and value != _OPTIONS[name].default}


def _constant(graph: dict, value: Any) -> Any:
    """What stands in an input, in the primitive that it is wired to, or the name of the file that lies behind it; None for what a node makes."""
    for _ in range(8):  # nodes on the way
        if not (isinstance(value, list) and len(value) == 2):
            return value
        source = graph.get(str(value[0]), {"class_type": "", "inputs": {}})
        is_value = source["class_type"].startswith("Primitive")
        value = source["inputs"].get("value" if is_value else _BEHIND.get(source["class_type"]))
    return None
