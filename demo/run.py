"""`make demo`: prompt in, right video out, on a bare machine, with the built-in model.

    python -m demo.run [--no-host] [--out DIR] [--num-frames N] [--num-steps N]

Three prompts, and one picture with a prompt, each to a video; a contact sheet of them; and for each, by plain computer vision,
whether it shows what was asked. Where a ComfyUI is found, the workflows that need no download run in it over HTTP as well.
Everything it writes lies in demo/out.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch

from opensora_core.evaluation import world
from opensora_core.evaluation.verdict import Verdict, judge
from opensora_core.evaluation.world import Combination
from opensora_core.media.video import read_clip, save_video, to_uint8
from opensora_core.pipeline import OpenSoraPipeline

from . import comfy

SEED = 42
MOTION_SCORE = 4  # what a prompt asks for where it says nothing else


@dataclass(frozen=True)
class Wish:
    """One video to make: what it should show, and the name of its files; has_picture: its first frame is given."""

    name: str
    asked: Combination
    has_picture: bool = False


WISHES = (
    Wish("red-circle-right", Combination("circle", "red", "blue", "right")),
    Wish("yellow-square-up", Combination("square", "yellow", "black", "up")),
    Wish("white-triangle-down", Combination("triangle", "white", "gray", "down")),
    Wish("picture-of-green-square-left", Combination("square", "green", "gray", "left"), has_picture=True),
)
# workflows/ that use the built-in model, and what their prompts ask for (tests/browser/build_workflows.py).
WORKFLOWS = {"01 Text to video, no download": WISHES[0], "02 Image to video, no download": WISHES[3]}


@dataclass(frozen=True)
class Demo:
    """Where it writes, how long the videos are, and the steps that the model's scores were measured with."""

    out: Path
    num_frames: int = world.NUM_FRAMES
    num_steps: int = 40


@dataclass(frozen=True)
class Made:
    """A finished video. frames: uint8 [T, H, W, 3]."""

    title: str
    path: Path
    frames: numpy.ndarray
    verdict: Verdict


def first_frame(path: Path) -> Path:
    """Draw the picture to start from: the first frame of the last wish, as the world has it."""
    from PIL import Image

    wish = next(wish for wish in WISHES if wish.has_picture)
    middle = (world.SIZE / 2, world.SIZE / 2)
    scene = world.Scene(wish.asked, MOTION_SCORE, sum(world.RADII) / 2, middle, wish.asked.prompt())
    Image.fromarray(to_uint8(scene.render()[:1])[0]).save(path)
    return path


def generate(pipe: OpenSoraPipeline, demo: Demo, wish: Wish, picture: Path) -> Made:
    """Make one video with the library."""
    result = pipe(
        wish.asked.prompt(),
        height=world.SIZE,
        width=world.SIZE,
        num_frames=demo.num_frames,
        num_inference_steps=demo.num_steps,
        image=picture if wish.has_picture else None,
        seed=SEED,
    )
    path = demo.out / f"{wish.name}.mp4"
    path.unlink(missing_ok=True)
    save_video(result.frames[0], path, world.FPS, prompt=result.prompt.text)
    frames = numpy.stack(result.frames[0])
    title = f"{wish.asked.prompt()}{', from a picture' if wish.has_picture else ''}"
    return Made(title, path, frames, judge(frames, wish.asked, MOTION_SCORE))


def run_workflows(demo: Demo, installation: comfy.Installation, picture: Path) -> list[Made]:
    """Run the workflows that need no download in the host, on the processor."""
    base, made = demo.out / "comfyui", []
    comfy.prepare_base(base)
    (base / "input" / "example.png").write_bytes(picture.read_bytes())
    with comfy.Server(installation, base) as server:
        for name, wish in WORKFLOWS.items():
            workflow = json.loads((comfy.PACK / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
            graph = comfy.to_api(workflow, server.get("/object_info"))
            short = {"num_frames": demo.num_frames, "steps": demo.num_steps}
            for node in graph.values():
                node["inputs"] |= {name: value for name, value in short.items() if name in node["inputs"]}
            path = server.files(server.run(graph))[0]
            frames = read_clip(path, demo.num_frames, from_end=False).numpy()
            made.append(Made(f"{name} in ComfyUI", path, frames, judge(frames, wish.asked, MOTION_SCORE)))
    return made


def contact_sheet(videos: list[Made], path: Path, columns: int = 9, scale: int = 2) -> Path:
    """A picture with a row of frames, evenly spread over time, for every video, and its verdict above them."""
    from PIL import Image, ImageDraw

    side, gap, line = world.SIZE * scale, 4, 18
    height = (side + line + gap) * len(videos)
    sheet = Image.new("RGB", ((side + gap) * columns, height), (32, 32, 32))
    draw = ImageDraw.Draw(sheet)
    for row, video in enumerate(videos):
        top = row * (side + line + gap)
        draw.text((4, top + 3), f"{video.title}: {video.verdict.sentence()}", fill=(235, 235, 235))
        for column in range(columns):
            frame = video.frames[round(column * (len(video.frames) - 1) / (columns - 1))]
            picture = Image.fromarray(frame).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(picture, (column * (side + gap), top + line))
    sheet.save(path)
    return path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.run", description=__doc__.splitlines()[0])
    parser.add_argument("--no-host", action="store_true", help="leave ComfyUI out")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "out", help="a folder (default demo/out)")
    parser.add_argument("--num-frames", type=int, default=Demo.num_frames, help=f"4k+1 (default {Demo.num_frames})")
    parser.add_argument("--num-steps", type=int, default=Demo.num_steps, help=f"default {Demo.num_steps}")
    options = parser.parse_args(arguments)
    demo = Demo(options.out.resolve(), options.num_frames, options.num_steps)
    demo.out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    pipe = OpenSoraPipeline.from_pretrained("small").to("cuda" if torch.cuda.is_available() else "cpu")
    picture = first_frame(demo.out / "first.png")
    videos = [generate(pipe, demo, wish, picture) for wish in WISHES]
    installation = None if options.no_host else comfy.find()
    if installation:
        videos += run_workflows(demo, installation, picture)
    sheet = contact_sheet(videos, demo.out / "contact-sheet.png")
    right = sum(video.verdict.is_right for video in videos)
    print(
        f"\n{len(videos)} videos in {time.monotonic() - start:.0f} s on {pipe.device} with the built-in model; {right} show what was asked:"
    )
    for video in videos:
        print(f"  {os.path.relpath(video.path)}: {video.verdict.sentence()}")
    print(f"  {os.path.relpath(sheet)}: all of them, side by side")
    if not installation and not options.no_host:
        print("  No ComfyUI was found, so no workflow was run in one; set COMFYUI_PATH to a checkout to include it.")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except comfy.HostError as error:
        sys.exit(f"error: {error}")
