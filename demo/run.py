"""`make demo`: real videos through the whole path on a bare machine, from a small random checkpoint in the released formats.

    python -m demo.run [--no-host] [--out DIR] [--num-frames N] [--num-steps N]

Makes a text-to-video and an image-to-video clip on the command line and, where a ComfyUI is found, runs a file of
workflows/ in it over HTTP. Everything it writes lies in demo/out. The weights are random: expect moving colours, not the prompt.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from . import comfy, tiny

PROMPT = "Two yellow birds fly over the green hills while the sun sets behind the mountains."
MODEL_FILES = {  # of the small checkpoint -> where a host looks for the released file
    "Open_Sora_v2.safetensors": "diffusion_models/Open_Sora_v2.safetensors",
    "hunyuan_vae.safetensors": "vae/hunyuan_vae.safetensors",
    "t5xxl.safetensors": "text_encoders/t5xxl_fp16.safetensors",
    "clip_l.safetensors": "text_encoders/clip_l.safetensors",
}


@dataclass(frozen=True)
class Demo:
    """Where it writes, and a length and number of steps short enough for a processor: the path is what is shown."""

    out: Path
    num_frames: int = 17
    num_steps: int = 10

    @property
    def checkpoint(self) -> Path:
        return self.out / "Open-Sora-v2"


def first_frame(path: Path) -> Path:
    """A picture to start from: a sun over hills, drawn here."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (336, 192), (250, 190, 120))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((200, 40, 250, 90), fill=(255, 240, 180))
    draw.polygon([(0, 192), (0, 130), (90, 90), (200, 150), (336, 100), (336, 192)], fill=(60, 110, 70))
    picture.save(path)
    return path


def generate(demo: Demo, name: str, *arguments: str) -> Path:
    """Run the command line once and return the video it wrote."""
    video = demo.out / f"{name}.mp4"
    video.unlink(missing_ok=True)  # the command line never overwrites, it would number the new one
    command = [
        sys.executable, "-m", "opensora_core", "generate", "--model", str(demo.checkpoint), "--prompt", PROMPT, "--seed", "42",
        "--resolution", "256px", "--aspect-ratio", "16:9", "--num-frames", str(demo.num_frames), "--num-steps", str(demo.num_steps),
        "--out", str(video), *arguments,
    ]  # fmt: skip
    subprocess.run(command, cwd=comfy.PACK, check=True)
    if not video.is_file():
        raise FileNotFoundError(f"{video.name} was not written")
    return video


def run_workflow(demo: Demo, installation: comfy.Installation, name: str) -> Path:
    """Run workflows/<name>.json, shortened, in the host on the processor, and return the video it saved."""
    workflow = json.loads((comfy.PACK / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    base = demo.out / "comfyui"
    comfy.prepare_base(base)
    for source, target in MODEL_FILES.items():
        shutil.copyfile(demo.checkpoint / source, base / "models" / target)
    with comfy.Server(installation, base) as server:
        graph = comfy.to_api(workflow, server.get("/object_info"))
        short = {"num_frames": demo.num_frames, "steps": demo.num_steps}
        for node in graph.values():
            node["inputs"] |= {name: value for name, value in short.items() if name in node["inputs"]}
        return server.files(server.run(graph))[0]


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
    tiny.write(demo.checkpoint)
    picture = first_frame(demo.out / "first.png")
    videos = {
        "text to video": generate(demo, "text-to-video"),
        "image to video": generate(demo, "image-to-video", "--cond-type", "i2v_head", "--ref", str(picture)),
    }
    installation = None if options.no_host else comfy.find()
    if installation:
        videos["a workflow in ComfyUI"] = run_workflow(demo, installation, "open-sora-2-text-to-video-256px")
    print(f"\nDone in {time.monotonic() - start:.0f} s, with a small random model (moving colours, not the prompt):")
    for what, video in videos.items():
        print(f"  {what}: {os.path.relpath(video)}")
    if not installation and not options.no_host:
        print("  No ComfyUI was found, so no workflow was run in one; set COMFYUI_PATH to a checkout to include it.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
