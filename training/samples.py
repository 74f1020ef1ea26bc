"""Clips that the trained transformer ends, or begins and ends, in given pictures: latents that the decoder meets in use.

    python -m training.samples [--folder training/runs/small --scenes 200]

A sampled clip is never quite where its last picture is, which no true clip's latents show. Scenes are those of training; each is sampled
with several seeds at once, with the settings that the model is judged with.
"""

import argparse
import random
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from opensora_core.evaluation import score, world
from opensora_core.pipeline import OpenSoraPipeline
from opensora_core.run.request import SamplingOptions

from . import data, export
from .finished import trained
from .state import Rows, Run

SEEDS = 3  # clips of a scene
ENDS = ("last", "both")
_FIRST_SEED = 3 * 10**9  # far from the seeds of every other stage


@dataclass
class Samples:
    """What `python -m training.samples` wrote.

    Attributes:
        latents: [N, 16, 5, 8, 8] fp16, as the VAE of training/vae.py gives them, pictures' latents in their places.
        frames: [N, 17, 64, 64, 3] uint8, decoded as yet, but for the pictures, which are themselves.
        has_first: [N] bool, whether the first frame is one; the last one always is.
    """

    latents: Tensor
    frames: Tensor
    has_first: Tensor


def _empty(count: int) -> Rows:
    size = world.SIZE
    return Rows(
        {
            "latents": torch.zeros(count, 16, data.CLIP, size // 8, size // 8, dtype=torch.float16),
            "frames": torch.zeros(count, world.NUM_FRAMES, size, size, 3, dtype=torch.uint8),
            "has_first": torch.zeros(count, dtype=torch.bool),
        }
    )


def scene(index: int) -> world.Scene:
    """What clip `index` shows; combinations that are held out never occur."""
    seen, _ = world.split()
    return world.draw(random.Random(_FIRST_SEED + index), seen, anywhere=0.0)


def sample(pipe: OpenSoraPipeline, index: int) -> dict[str, Tensor]:
    """SEEDS clips of a scene: rows of Samples, latents in the transformer's scale."""
    of, has_first = scene(index), ENDS[index % len(ENDS)] == "both"
    clip = of.render()
    text, image = score.REQUIRED_GUIDANCE
    result = pipe(
        of.caption,
        **dict(zip(("num_frames", "height", "width"), clip.shape, strict=False)),
        num_inference_steps=score.REQUIRED_STEPS,
        guidance_scale=text,
        image_guidance_scale=image,
        image=clip[0] if has_first else None,
        last_image=clip[-1],
        seed=_FIRST_SEED + index * SEEDS,
        num_videos_per_prompt=SEEDS,
        options=SamplingOptions(fps=world.FPS, motion_score=of.motion_score),
    )
    frames = torch.from_numpy(numpy.stack([numpy.stack(video) for video in result.frames]))
    pictures = (clip * 255).round().to(torch.uint8)
    frames[:, -1] = pictures[-1]
    if has_first:
        frames[:, 0] = pictures[0]
    return {"latents": result.latents.half(), "frames": frames, "has_first": torch.full((SEEDS,), has_first)}


def read(folder: str | Path) -> Samples:
    """What `python -m training.samples` wrote."""
    with safe_open(Path(folder) / "samples.safetensors", "pt") as file:
        return Samples(**{name: file.get_tensor(name) for name in file.keys()})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default="training/runs/small")
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    folder = Path(args.folder)
    made = _empty(args.scenes * SEEDS)
    run = Run(folder, "samples", {"made": made})
    networks, statistics = trained(folder)
    pipe = OpenSoraPipeline.from_pretrained(export.export(*networks, folder / "sampler", statistics)).to(args.device)
    for step in run.steps(args.scenes):
        rows = sample(pipe, step)
        for name, kept in made.rows.items():
            kept[step * SEEDS : (step + 1) * SEEDS] = rows[name]
        if step % 10 == 0:
            run.progress(args.scenes)
    spread, mean = (part.view(1, -1, 1, 1, 1) for part in (statistics.std, statistics.mean))
    save_file({**made.rows, "latents": (made["latents"].float() * spread + mean).half()}, folder / "samples.safetensors")


if __name__ == "__main__":
    main()
