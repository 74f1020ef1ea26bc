"""Clips of the world as latents, encoded once with the finished VAE: what the transformer is trained on.

    python -m training.data [--folder training/runs/small --clips 6000]

Clip n is the same on every machine. One in ten is a long one, of which a window is used: so the model learns to go on from the
last latents of a finished clip, which stand for four frames each where a clip's first stands for one.
"""

import argparse
import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from opensora_core.codecs.hunyuan.model import CausalVAE
from opensora_core.evaluation import world
from opensora_core.geometry import CAUSAL
from opensora_core.text.prompt import decorate

from .export import LatentStatistics
from .state import Rows, Run
from .vae import trained_vae

LONG_FRAMES = 33
LONG_EVERY = 10
CLIP = CAUSAL.latent_frames(world.NUM_FRAMES)
LONG = CAUSAL.latent_frames(LONG_FRAMES)
USED = 0.3  # a channel that spreads less carries nothing: its posterior is the prior, N(0, 1). It is left small
_FIRST_SEED = 10**9  # far from the seeds of the VAE's training


def scene(index: int) -> world.Scene:
    """What clip `index` shows, with a wording of its own; combinations that are held out never occur."""
    rng = random.Random(_FIRST_SEED + index)
    seen, _ = world.split()
    drawn = world.draw(rng, seen)
    if not is_long(index):
        return drawn
    # Such a clip is in the middle half way, so that it stays in the picture.
    half = (LONG_FRAMES - 1) / 2
    row, column = (rng.uniform(-1, 1) * world.CENTRE_SPREAD + world.SIZE / 2 - half * speed for speed in drawn.velocity)
    return replace(drawn, start=(row, column))


def is_long(index: int) -> bool:
    return index % LONG_EVERY == LONG_EVERY - 1


def mistake(of: world.Scene, rng: random.Random) -> world.Scene:
    """A scene that is asked for by a caption with one wrong word: never that of a held-out combination."""
    seen, _ = world.split()
    near = [other for other in seen if sum(vars(other)[name] != value for name, value in vars(of.combination).items()) == 1]
    wrong = rng.choice(near)
    return replace(of, combination=wrong, caption=world.caption(rng, wrong))


def text_of(of: world.Scene) -> str:
    return decorate(of.caption, world.FPS, of.motion_score)


@dataclass
class Clips:
    """Normalised latents, (z - mean) / std per channel; channels that the VAE does not use stay near zero.

    Attributes:
        whole: [N, 16, 9, 8, 8] fp16; of a clip that is not long the first 5 frames count.
        first, last: [N, 16, 8, 8] fp16, the first and the last picture of a clip of 17 frames, encoded by themselves.
        statistics: the mean and std taken off.
    """

    whole: Tensor
    first: Tensor
    last: Tensor
    statistics: LatentStatistics


def _empty(count: int) -> Rows:
    shape = (count, 16, LONG, world.SIZE // 8, world.SIZE // 8)
    picture = (*shape[:2], *shape[3:])
    return Rows({name: torch.zeros(of, dtype=torch.float16) for name, of in (("whole", shape), ("first", picture), ("last", picture))})


@torch.inference_mode()
def encode(vae: CausalVAE, pixels: Tensor) -> Tensor:
    """Posterior means [B, 16, t, h, w] fp32 of [B, T, H, W, 3] in 0..1."""
    with torch.autocast(pixels.device.type, torch.bfloat16):
        mean, _ = vae.encode(pixels.movedim(-1, 1) * 2 - 1).moments()
    return mean.float()


def read(folder: str | Path) -> Clips:
    """What `python -m training.data` wrote."""
    with safe_open(Path(folder) / "clips.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    return Clips(tensors["whole"], tensors["first"], tensors["last"], LatentStatistics(tensors["mean"], tensors["std"]))


def _encode_batch(vae: CausalVAE, encoded: Rows, indices: list[int], device: str) -> None:
    long = is_long(indices[0])
    clips = torch.stack([scene(index).render(LONG_FRAMES if long else world.NUM_FRAMES) for index in indices]).to(device)
    pictures = torch.cat((clips[:, :1], clips[:, world.NUM_FRAMES - 1 : world.NUM_FRAMES]))
    whole, singles = encode(vae, clips), encode(vae, pictures)[:, :, 0]
    encoded["whole"][indices, :, : whole.shape[2]] = whole.cpu().half()
    for name, part in zip(("first", "last"), singles.chunk(2), strict=True):
        encoded[name][indices] = part.cpu().half()


def _normalise(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    clips = [index for index in range(len(rows["whole"])) if not is_long(index)]
    values = rows["whole"][clips, :, :CLIP].float()
    mean, std = values.mean((0, 2, 3, 4)), values.std((0, 2, 3, 4)).clamp(min=USED)
    normalised = {
        name: ((part.float() - mean.view(1, -1, *[1] * (part.ndim - 2))) / std.view(1, -1, *[1] * (part.ndim - 2))).half()
        for name, part in rows.items()
    }
    return {**normalised, "mean": mean, "std": std}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default="training/runs/small")
    parser.add_argument("--clips", type=int, default=6000, help="a multiple of 80")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    vae = trained_vae(args.folder).to(args.device)
    encoded = _empty(args.clips)
    run = Run(args.folder, "data", {"encoded": encoded})
    # Batches of one length: 8 clips of 10 consecutive ones are 17 frames long in nine of ten tens.
    order = [index for index in range(args.clips) if not is_long(index)] + [index for index in range(args.clips) if is_long(index)]
    batches = [order[start : start + 8] for start in range(0, args.clips, 8)]
    for step in run.steps(len(batches)):
        _encode_batch(vae, encoded, batches[step], args.device)
        if step % 50 == 0:
            run.progress(len(batches))
    save_file(_normalise(encoded.rows), Path(args.folder) / "clips.safetensors")


if __name__ == "__main__":
    main()
