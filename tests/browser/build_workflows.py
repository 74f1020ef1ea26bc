"""Makes workflows/*.json, their pictures and subgraphs/*.json (blueprints) with the real front-end: `make workflows`.

A workflow is written here as a graph in API form, naming only what differs from a node's defaults, with its layout in
columns. The front-end turns it into the form that files have, so that slots and widget values are its own.
"""

import json
import re
import sys
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path

import flux_workflows
import high_compression_workflows
import longer_workflows
import reference_workflows

from demo import comfy, front_end, host_record, run
from opensora_core.evaluation import world

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS, BLUEPRINTS = ROOT / "workflows", ROOT / "subgraphs"

HUB = "https://huggingface.co/hpcai-tech/Open-Sora-v2/resolve/main"
ENCODERS = "https://huggingface.co/comfyanonymous/flux_text_encoders/resolve/main"
MODELS = {
    "model": [{"name": "Open_Sora_v2.safetensors", "url": f"{HUB}/Open_Sora_v2.safetensors", "directory": "diffusion_models"}],
    "vae": [{"name": "hunyuan_vae.safetensors", "url": f"{HUB}/hunyuan_vae.safetensors", "directory": "vae"}],
    "text": [
        {"name": "t5xxl_fp16.safetensors", "url": f"{ENCODERS}/t5xxl_fp16.safetensors", "directory": "text_encoders"},
        {"name": "clip_l.safetensors", "url": f"{ENCODERS}/clip_l.safetensors", "directory": "text_encoders"},
    ],
}

SMALL = "small (built in)"  # in nodes/host/paths.py

FILES_NOTE = """## Files this workflow reads

**models/diffusion_models**
- `Open_Sora_v2.safetensors`, 23.8 GB, from the hub repository hpcai-tech/Open-Sora-v2

**models/text_encoders** (the files Flux uses; if you have them, nothing to download)
- `t5xxl_fp16.safetensors`, 9.8 GB (an fp8 file of it works too)
- `clip_l.safetensors`, 246 MB

**models/vae**
- `hunyuan_vae.safetensors`, 493 MB, from hpcai-tech/Open-Sora-v2

## Licences (read them yourself; this is not advice)
- **Open_Sora_v2**: its card says Apache-2.0. The project's finetuning guide starts from FLUX.1-dev, so it may be a \
derivative of it, whose own licence is non-commercial; ask counsel before commercial use.
- **hunyuan_vae**: Tencent Hunyuan Community Licence. It **does not cover the European Union, the United Kingdom and \
South Korea**, and has a size threshold and a use policy.
- **T5** Apache-2.0, **CLIP** MIT.
"""

TEXT_NOTE = {
    "256px": """## Text to video, 256px

129 frames of 336 x 192 at 24 FPS: 5.4 seconds, the quickest way to try a prompt or a seed.
50 steps take 80 forwards of the transformer.

- Another shape: `aspect_ratio`. Another length: `num_frames`, always 4k+1.
- More or less movement: `motion_score` (1 to 15).
- Keep the prompt one flowing description of subject, movement, place, light and camera.
""",
    "768px": """## Text to video, 768px

129 frames of 1024 x 576 at 24 FPS. Each forward works on about nine times the tokens of 256px: find prompt and seed \
there first. 50 steps take 80 forwards.

If memory is short: decode `policy` low_memory, fewer frames, or an fp8 file of the model.
""",
}
PARTS_NOTE = """## Text to video with SamplerCustomAdvanced, 256px

The same video as **Open-Sora Sampler** makes, in parts, so that any of them can be exchanged: another sampler, a LoRA or a patch between loader and \
scheduler, other sigmas.

- **Open-Sora Scheduler** sets the shift for this size and length, in the sigmas and in its model: connect the guider to that model.
- **Open-Sora Guider** runs the passes each step needs; *euler* is what Open-Sora was released with.
"""
IMAGE_NOTE = {
    "256px": """## Image to video, 256px

The picture becomes the first frame and is kept as it is. 129 frames at 24 FPS; 50 steps take 110 forwards of the transformer.

- `fit` says how a picture of another shape is made to fit: crop, pad or stretch.
- Describe what moves, not only what is seen.
- More freedom from the picture: a lower `image_guidance`.
""",
    "768px": """## Image to video, 768px

The picture becomes the first frame of 129 frames of 1024 x 576. Try picture, prompt and seed at 256px first: each forward \
here works on about nine times the tokens. 50 steps take 110 forwards.

If memory is short: decode `policy` low_memory, fewer frames, or an fp8 file of the model.
""",
}

LIST_NOTE = """## A video for each line, 256px

**Open-Sora Prompt List**: one prompt per line; empty lines and lines that begin with # are left out. The nodes behind it run once for each line, each model is \
loaded once, and every video gets its own file in ComfyUI's output folder.

- All videos of a run are in RAM until the last is decoded (95 MiB each at this size), and are saved together at the end.
- Long lists: set `count` to 1 and the control below `first` to *increment*, and queue as many runs as there are prompts. Each video is then saved before the \
next begins.
"""
LISTED_PROMPTS = """A red paper kite climbs above a wide beach at sunset while long waves roll in.
A small boat crosses a misty lake at dawn, rings spreading behind its oars.
# left out: a line that begins with this sign
Snow falls slowly on a quiet street, lit by a single lamp."""

BUILT_IN_NOTE = """## Files this workflow reads

None of yours: **small (built in)** comes with the pack, in every loader. Nothing is downloaded.

It was trained by this project, from nothing, on clips that it drew itself, and has this pack's licence.
"""
SMALL_NOTE = {
    "text": """## Text to video, with nothing to download

The built-in model makes 17 frames of 64 x 64, in seconds on a processor. It knows one small world:

*a* red, green, blue, yellow, purple or white **circle, square or triangle** *moving* left, right, up or down \
*on a* black, gray, white or blue *background*, faster or slower with `motion_score` (2 to 6).

Everything else is as with the released model: the same nodes, guidance, LoRA and memory modes.
""",
    "image": """## Image to video, with nothing to download

The built-in model goes on from a first frame of 64 x 64. Here stock nodes draw it: a coloured square on a plain background.
Change the prompt's direction, or the picture and the prompt together: what the model knows is told in the workflow \
open-sora-small-text-to-video.

With the released model the picture comes from Load Image; see open-sora-2-image-to-video-256px.
""",
}

TEXT_PROMPT = (
    "A red paper kite climbs above a wide beach at sunset. Long waves roll in and leave a mirror of wet sand that catches the "
    "orange light. The kite turns slowly in the wind, its tail drawing curves, while the camera follows it upward."
)
IMAGE_PROMPT = (
    "The scene comes alive: a light breeze moves through it, leaves and cloth stir, the light shifts softly, and the camera "
    "glides slowly forward."
)


def text_to_video(resolution: str) -> dict:
    """The graph of a text-to-video workflow: id -> API node."""
    return {
        "1": {"class_type": "OpenSoraModelLoader", "inputs": {"model_name": "Open_Sora_v2.safetensors"}},
        "2": {
            "class_type": "OpenSoraTextEncoderLoader",
            "inputs": {"t5_name": "t5xxl_fp16.safetensors", "clip_l_name": "clip_l.safetensors"},
        },
        "3": {"class_type": "OpenSoraVAELoader", "inputs": {"vae_name": "hunyuan_vae.safetensors"}},
        "4": {"class_type": "OpenSoraT5TextEncode", "inputs": {"clip": ["2", 0], "prompt": TEXT_PROMPT, "negative_prompt": ""}},
        "5": {"class_type": "OpenSoraEmptyLatentVideo", "inputs": {"resolution": resolution}},
        "6": {
            "class_type": "OpenSoraRectifiedFlowSampler",
            "inputs": {"model": ["1", 0], "positive": ["4", 0], "negative": ["4", 1], "latent": ["5", 0], "seed": 42},
        },
        "7": {"class_type": "OpenSoraTiledVAEDecode", "inputs": {"vae": ["3", 0], "latent": ["6", 0]}},
        "8": {"class_type": "CreateVideo", "inputs": {"images": ["7", 0], "fps": ["5", 3]}},
        "9": {"class_type": "SaveVideo", "inputs": {"video": ["8", 0], "filename_prefix": f"video/open-sora-{resolution}"}},
    }


def image_to_video(resolution: str) -> dict:
    """The same with a start image between the conditioning and the sampler."""
    graph = text_to_video(resolution)
    graph["4"]["inputs"]["prompt"] = IMAGE_PROMPT
    graph["10"] = {"class_type": "LoadImage", "inputs": {"image": "example.png"}}
    graph["11"] = {
        "class_type": "OpenSoraImageToVideo",
        "inputs": {"positive": ["4", 0], "negative": ["4", 1], "vae": ["3", 0], "latent": ["5", 0], "start_image": ["10", 0]},
    }
    graph["6"]["inputs"] |= {"positive": ["11", 0], "negative": ["11", 1], "latent": ["11", 2]}
    return graph


def a_video_for_each_line() -> dict:
    """Text to video at 256px over a list of prompts."""
    graph = text_to_video("256px")
    graph["10"] = {"class_type": "OpenSoraPromptList", "inputs": {"prompts": LISTED_PROMPTS, "first": 1}}
    graph["4"]["inputs"]["prompt"] = ["10", 0]
    graph["9"]["inputs"]["filename_prefix"] = ["10", 1]
    return graph


def text_to_video_in_parts() -> dict:
    """Text to video at 256px through the host's own SamplerCustomAdvanced."""
    graph = text_to_video("256px")
    graph["10"] = {"class_type": "OpenSoraScheduler", "inputs": {"model": ["1", 0], "latent": ["5", 0]}}
    graph["11"] = {"class_type": "OpenSoraGuider", "inputs": {"model": ["10", 0], "positive": ["4", 0], "negative": ["4", 1]}}
    graph["12"] = {"class_type": "RandomNoise", "inputs": {"noise_seed": 42}}
    graph["13"] = {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}}
    graph["6"] = {
        "class_type": "SamplerCustomAdvanced",
        "inputs": {"noise": ["12", 0], "guider": ["11", 0], "sampler": ["13", 0], "sigmas": ["10", 1], "latent_image": ["5", 0]},
    }
    return graph


def with_the_built_in_model(graph: dict, wish: run.Wish) -> dict:
    """The same graph with nothing to download: the built-in model, the clips it was trained on, what the demo asks of it."""
    graph["1"]["inputs"] = {"model_name": SMALL}
    graph["2"]["inputs"] = {"t5_name": SMALL, "clip_l_name": SMALL}
    graph["3"]["inputs"] = {"vae_name": SMALL}
    graph["4"]["inputs"]["prompt"] = wish.asked.prompt()
    graph["5"]["inputs"] = {"resolution": "custom", "width": world.SIZE, "height": world.SIZE, "num_frames": world.NUM_FRAMES}
    graph["6"]["inputs"] |= {"seed": run.SEED, "steps": run.Demo.num_steps}
    graph["9"]["inputs"]["filename_prefix"] = "video/open-sora-small"
    return graph


def picture_to_video_built_in(wish: run.Wish) -> dict:
    """Image to video with the built-in model: a picture that stock nodes draw, as the world has it, is the first frame."""
    graph = with_the_built_in_model(image_to_video("256px"), wish)
    side = 21  # of the world's squares
    graph["10"] = {"class_type": "EmptyImage", "inputs": _plain(world.SIZE, world.BACKGROUNDS[wish.asked.background])}
    graph["12"] = {"class_type": "EmptyImage", "inputs": _plain(side, world.COLOURS[wish.asked.colour])}
    at = (world.SIZE - side) // 2
    graph["13"] = {"class_type": "ImageCompositeMasked", "inputs": {"destination": ["10", 0], "source": ["12", 0], "x": at, "y": at}}
    graph["11"]["inputs"]["start_image"] = ["13", 0]
    return graph


def _plain(side: int, colour: tuple[int, int, int]) -> dict:
    return {"width": side, "height": side, "color": int.from_bytes(bytes(colour), "big")}


@dataclass(frozen=True)
class Files:
    """What a workflow says of the files it reads: a note, and where the front-end may fetch those of a loader (by node)."""

    note: str
    models: dict[str, list[dict]]


RELEASED = Files(FILES_NOTE, {"1": MODELS["model"], "2": MODELS["text"], "3": MODELS["vae"]})
BUILT_IN = Files(BUILT_IN_NOTE, {})


def job(name: str, graph: dict, note: str, columns: list[list[str]], files: Files = RELEASED) -> dict:
    """One request to the front-end (front_end.mjs, build). A sampler ends its column: while it runs it shows a line and a preview below."""
    info = host_record.read()
    return {
        "name": name,
        "api": graph,
        "columns": columns,
        "notes": {
            "about": {"title": "About this workflow", "text": note, "size": [440, 240]},
            "files": {"title": "Files and licences", "text": files.note, "size": [440, 500 if files.models else 240]},
        },
        "widgets": {
            "8": {"fps": 24},  # the rate beneath the wire, should it be cut
            **{
                number: {"control_after_generate": "fixed"}
                for number, node in graph.items()
                if {"seed", "noise_seed"} & set(node["inputs"])
            },
        },
        "models": files.models,
        "stamp": {
            "cnr_id": "open-sora",
            "version": _version(),
            "host_version": info["host_version"],
            "ours": [node for node in info["nodes"] if node.startswith("OpenSora")],
        },
        "picture": str(WORKFLOWS / f"{name}.jpg"),
    }


def jobs() -> list[dict]:
    made = []
    for size in ("256px", "768px"):
        text_columns = [["about", "files"], ["1", "2", "3"], ["4", "5"], ["6"], ["7", "8", "9"]]
        made.append(job(f"open-sora-2-text-to-video-{size}", text_to_video(size), TEXT_NOTE[size], text_columns))
        image_columns = [["about", "files"], ["1", "2", "3", "10"], ["4", "5"], ["11", "6"], ["7", "8", "9"]]
        made.append(job(f"open-sora-2-image-to-video-{size}", image_to_video(size), IMAGE_NOTE[size], image_columns))
    part_columns = [["about", "files"], ["1", "2", "3"], ["4", "5"], ["10", "11"], ["12", "13", "6"], ["7", "8", "9"]]
    made.append(job("open-sora-2-text-to-video-custom-sampler", text_to_video_in_parts(), PARTS_NOTE, part_columns))
    list_columns = [["about", "files"], ["1", "2", "3"], ["10", "4", "5"], ["6"], ["7", "8", "9"]]
    made.append(job("open-sora-2-text-to-video-prompt-list", a_video_for_each_line(), LIST_NOTE, list_columns))
    small_text, small_picture = (run.WORKFLOWS[f"open-sora-small-{kind}-to-video"] for kind in ("text", "image"))
    graph = with_the_built_in_model(text_to_video("256px"), small_text)
    made.append(job("open-sora-small-text-to-video", graph, SMALL_NOTE["text"], text_columns, BUILT_IN))
    columns = [["about", "files"], ["1", "2", "3"], ["10", "12", "13"], ["4", "5"], ["11", "6"], ["7", "8", "9"]]
    made.append(job("open-sora-small-image-to-video", picture_to_video_built_in(small_picture), SMALL_NOTE["image"], columns, BUILT_IN))
    made += reference_workflows.jobs(job, text_to_video)
    made += longer_workflows.jobs(job, text_to_video)
    made += flux_workflows.jobs(job, text_to_video, RELEASED)
    made += high_compression_workflows.jobs(job, text_to_video, image_to_video, RELEASED)
    return made


def blueprint_jobs() -> list[dict]:
    """Requests to the front-end for the parts of workflows that are one node."""
    return [one for room in (longer_workflows, flux_workflows) for one in room.blueprints(job, text_to_video)]


def _version() -> str:
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    return next(line.split('"')[1] for line in lines if line.startswith("version ="))


def main(names: list[str]) -> int:
    """Make the named workflows, or all."""
    installation, lacking = comfy.find(), front_end.missing()
    if installation is None or lacking:
        print(lacking or "No ComfyUI found; set COMFYUI_PATH to a checkout.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        host_record.lay_out_stand_ins(base)
        with comfy.Server(installation, base) as server:
            made = front_end.build(server.url, [one for one in jobs() if not names or one["name"] in names])
            asked = [one for one in blueprint_jobs() if not names or one["name"] in names]
            parts = front_end.blueprints(server.url, asked) if asked else {}
    for name, workflow in made.items():
        (WORKFLOWS / f"{name}.json").write_text(json.dumps(workflow, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"workflows/{name}.json")
    for name, blueprint in parts.items():
        (BLUEPRINTS / f"{name}.json").write_text(steady(json.dumps(blueprint, indent=1, ensure_ascii=False), name) + "\n", encoding="utf-8")
        print(f"subgraphs/{name}.json")
    return 0


def steady(text: str, name: str) -> str:
    """The same with ids that are not new each time: the n-th of a blueprint is always the same."""
    found = list(dict.fromkeys(re.findall(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", text)))
    for number, was in enumerate(found):
        text = text.replace(was, str(uuid.uuid5(uuid.NAMESPACE_OID, f"open-sora {name} {number}")))
    return text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
