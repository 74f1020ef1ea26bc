"""`make demo`: real videos through the whole path on a bare machine, from a small random checkpoint in the released formats.

    python -m demo.run [--no-host]

Makes a text-to-video and an image-to-video clip on the command line and, where a ComfyUI is found, runs a file of
workflows/ in it over HTTP. Everything it writes lies in demo/out. The weights are random: expect moving colours, not the prompt.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from . import comfy, tiny

OUT = Path(__file__).resolve().parent / "out"
CHECKPOINT = OUT / "Open-Sora-v2"
PROMPT = "Two yellow birds fly over the green hills while the sun sets behind the mountains."
NUM_FRAMES, NUM_STEPS = 17, 10  # short on purpose: the path is what is shown


def first_frame(path: Path) -> Path:
    """A picture to start from: a sun over hills, drawn here."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (336, 192), (250, 190, 120))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((200, 40, 250, 90), fill=(255, 240, 180))
    draw.polygon([(0, 192), (0, 130), (90, 90), (200, 150), (336, 100), (336, 192)], fill=(60, 110, 70))
    picture.save(path)
    return path


def generate(name: str, *arguments: str) -> Path:
    """Run the command line once and return the video it wrote."""
    video = OUT / f"{name}.mp4"
    video.unlink(missing_ok=True)  # the command line never overwrites, it would number the new one
    command = [
        sys.executable, "-m", "opensora_core", "generate", "--model", str(CHECKPOINT), "--prompt", PROMPT, "--seed", "42",
        "--resolution", "256px", "--aspect-ratio", "16:9", "--num-frames", str(NUM_FRAMES), "--num-steps", str(NUM_STEPS),
        "--out", str(video), *arguments,
    ]  # fmt: skip
    subprocess.run(command, cwd=comfy.PACK, check=True)
    if not video.is_file():
        raise FileNotFoundError(f"{video.name} was not written")
    return video


def lay_out_models(base: Path) -> None:
    """The small checkpoint in a host's model folders, under the released files' names."""
    comfy.prepare_base(base)
    for source, target in {
        "Open_Sora_v2.safetensors": "diffusion_models/Open_Sora_v2.safetensors",
        "hunyuan_vae.safetensors": "vae/hunyuan_vae.safetensors",
        "t5xxl.safetensors": "text_encoders/t5xxl_fp16.safetensors",
        "clip_l.safetensors": "text_encoders/clip_l.safetensors",
    }.items():
        shutil.copyfile(CHECKPOINT / source, base / "models" / target)
    first_frame(base / "input" / "example.png")


def shorten(graph: dict) -> dict:
    """The same graph with a clip and a run short enough for a processor."""
    for node in graph.values():
        short = {"num_frames": NUM_FRAMES, "steps": NUM_STEPS}
        node["inputs"] |= {name: value for name, value in short.items() if name in node["inputs"]}
    return graph


def run_workflow(installation: comfy.Installation, name: str) -> Path:
    """Run workflows/<name>.json in the host, on the processor, and return the video it saved."""
    workflow = json.loads((comfy.PACK / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    base = OUT / "comfyui"
    lay_out_models(base)
    with comfy.Server(installation, base) as server:
        graph = shorten(comfy.to_api(workflow, server.get("/object_info")))
        return server.files(server.run(graph))[0]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.run", description=__doc__.splitlines()[0])
    parser.add_argument("--no-host", action="store_true", help="leave ComfyUI out")
    options = parser.parse_args(arguments)
    OUT.mkdir(exist_ok=True)
    start = time.monotonic()
    tiny.write(CHECKPOINT)
    videos = {
        "text to video": generate("text-to-video"),
        "image to video": generate("image-to-video", "--cond-type", "i2v_head", "--ref", str(first_frame(OUT / "first.png"))),
    }
    installation = None if options.no_host else comfy.find()
    if installation:
        videos["workflow in ComfyUI"] = run_workflow(installation, "open-sora-2-text-to-video-256px")
    print(f"\nDone in {time.monotonic() - start:.0f} s, with a small random model (moving colours, not the prompt):")
    for what, video in videos.items():
        print(f"  {what}: {video.relative_to(comfy.PACK)}")
    if not installation and not options.no_host:
        print("  No ComfyUI was found, so no workflow was run in one; set COMFYUI_PATH to a checkout to include it.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
