"""Writes the small model's card from what was measured: every figure in it comes from a file.

    python -m opensora_core evaluate --model DIRECTORY --out report.json
    python -m training.card DIRECTORY --report report.json [--folder training/runs/small --machine "two CPU cores"]

Scores come from the report of `evaluate`, steps and time from the training states, sizes from the files themselves.
"""

import argparse
import hashlib
import json
from pathlib import Path

import torch

from opensora_core.checkpoint.files import read_header
from opensora_core.evaluation import world

from .tokenizers import T5_TEXT_LENGTH

FILE_NAME = "MODEL_CARD.md"
STAGES = {
    "vae": "VAE",
    "data": "clips encoded",
    "transformer": "transformer and both text encoders, together",
    "samples": "scenes sampled for the decoder",
    "decoder": "VAE's decoder alone",
}
_WEIGHTS = {
    "Open_Sora_v2.safetensors": "transformer (Open-Sora 2.0's MMDiT, unfused)",
    "hunyuan_vae.safetensors": "video VAE (HunyuanVideo's layout)",
    "google/t5-v1_1-xxl/model.safetensors": "T5 v1.1 encoder",
    "openai/clip-vit-large-patch14/model.safetensors": "CLIP text encoder",
}


def write(directory: str | Path, report: dict, folder: str | Path, machine: str) -> Path:
    """Write <directory>/MODEL_CARD.md and return its path.

    Args:
        directory: of the exported files.
        report: what `evaluate --out` wrote; its first run is the one that counts.
        folder: of the training states.
        machine: what it was trained on, in words.
    """
    directory = Path(directory)
    text = _CARD.format(
        size=world.SIZE,
        frames=world.NUM_FRAMES,
        fps=world.FPS,
        shapes=", ".join(world.SHAPES),
        colours=", ".join(world.COLOURS),
        backgrounds=", ".join(world.BACKGROUNDS),
        directions=", ".join(world.DIRECTIONS),
        scores=f"{world.MOTION_SCORES[0]} to {world.MOTION_SCORES[-1]}",
        seen=len(world.split()[0]),
        held_out=len(world.split()[1]),
        text_length=T5_TEXT_LENGTH,
        files=_table(["file", "what", "parameters", "MB", "SHA-256"], _files(directory)),
        stages=_table(["stage", "steps", "minutes"], _stages(Path(folder))),
        machine=machine,
        settings=_settings(report),
        figures=_table(["part", "figure", "found", "95 % interval", "by chance", "required", "reached"], _figures(report)),
        reached=_reached(report),
    )
    path = directory / FILE_NAME
    path.write_text(text, encoding="utf-8")
    return path


def _files(directory: Path) -> list[list[str]]:
    rows = []
    for name, what in _WEIGHTS.items():
        content = (directory / name).read_bytes()
        parameters = sum(torch.Size(info.shape).numel() for info in read_header(directory / name).tensors.values())
        rows.append([f"`{name}`", what, f"{parameters:,}", f"{len(content) / 1e6:.2f}", f"`{hashlib.sha256(content).hexdigest()[:16]}...`"])
    return rows


def _stages(folder: Path) -> list[list[str]]:
    rows = []
    for name, what in STAGES.items():
        state = torch.load(folder / f"{name}.pt", weights_only=True, map_location="cpu", mmap=True)
        rows.append([what, f"{state['step']:,}", f"{state['seconds'] / 60:.0f}"])
    return rows


def _settings(report: dict) -> str:
    settings = report["runs"][0]["settings"]
    return (
        f"{settings['num_prompts']} prompts of each kind, {settings['num_steps']} steps, guidance {settings['guidance']:g} (text) and "
        f"{settings['guidance_img']:g} (pictures), seed {settings['seed']}, computed in {settings['dtype']} on {settings['device']}"
    )


def _figures(report: dict) -> list[list[str]]:
    rows = []
    for line in report["runs"][0]["figures"]:
        interval = line["interval"]
        if "share" in line:
            found = f"{line['share']:.1%} ({line['right']} of {line['of']})"
            interval = f"{interval[0]:.1%} to {interval[1]:.1%}"
        else:
            found = "not measurable" if line["value"] is None else f"{line['value']:.2f} {line['unit']}".strip()
            interval = f"{interval[0]:.2f} to {interval[1]:.2f}" if interval else ""
        chance = "" if line["chance"] is None else f"{line['chance']:.1%}"
        reached = {True: "yes", False: "**no**", None: ""}[line["is_reached"]]
        rows.append([line["part"], line["what"], found, interval, chance, line["must"], reached])
    return rows


def _reached(report: dict) -> str:
    """How many requirements are reached, and which are not."""
    needed = [line for line in report["runs"][0]["figures"] if line["is_reached"] is not None]
    missed = [f"{line['part']}: {line['what']} ({line['must']})" for line in needed if not line["is_reached"]]
    text = f"{len(needed) - len(missed)} of {len(needed)} requirements are reached."
    return text if not missed else f"{text} Not reached:\n\n" + "\n".join(f"- {one}" for one in missed)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


_CARD = """# The built-in model

A small Open-Sora 2.0: the released architecture, file formats and key names, trained from nothing by this project (`training/`). It is
there so that the whole path, from a prompt to a video, can be tried and tested on any machine with no download. It is not a small
version of the released weights and knows nothing of their world.

```bash
python -m opensora_core generate --prompt "a red circle moving right on a blue background" --out circle.mp4
```

In ComfyUI it is "small (built in)" in every Open-Sora loader.

## What it knows

Clips of {frames} frames, {size}x{size} pixels, {fps} FPS, of one shape that moves across a plain background:

- shapes: {shapes}; colours: {colours}; backgrounds: {backgrounds}
- directions: {directions}; speed by the motion score, {scores}
- prompts such as "a red circle moving right on a blue background", in a few wordings, in English
- a picture as first frame, last frame or both, and going on from the last latents of a clip

Of the combinations of shape, colour, background and direction, {seen} were trained on and {held_out} were held out whole, to see that it
combines words rather than remembers clips.

## What it cannot

Anything else: other objects, two objects, other colours or words, other sizes and lengths (they are made, with a warning, and mostly
show nothing sensible). Nothing about the quality of the released weights follows from it.

## Scores

Measured on these files by `python -m opensora_core evaluate`: {settings}. A clip is read by plain computer vision; "all four" is colour,
background, shape and direction together.

{figures}

{reached}

## Files

{files}

All weights are stored in float16. T5 reads {text_length} tokens (`model_max_length` in its tokenizer's settings), CLIP 77; both vocabularies are
made of the captions (`training/tokenizers.py`). The latents' mean and spread are folded into the VAE, so that the released latent scale
holds.

## Training

On clips drawn on the fly by `opensora_core/evaluation/world.py`; no other data, no other weights. One command does it again,
and goes on after a stop at any moment:

```bash
python -m training --out DIRECTORY
```

{stages}

Machine: {machine}.

## Licence

That of this repository (`LICENSE`).
"""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="of the exported files")
    parser.add_argument("--report", type=Path, required=True, help="what `evaluate --out` wrote for these files")
    parser.add_argument("--folder", default="training/runs/small", help="of the training states (default training/runs/small)")
    parser.add_argument("--machine", default="a CPU", help="what it was trained on, in words")
    args = parser.parse_args(arguments)
    print(write(args.directory, json.loads(args.report.read_text(encoding="utf-8")), args.folder, args.machine))


if __name__ == "__main__":
    main()
