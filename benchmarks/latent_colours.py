"""Fits what turns a VAE's latents into the colours of a preview, on clips of the built-in model's world: `python -m benchmarks.latent_colours`.

Least squares from each latent pixel to the mean colour of the pixels and frames that it stands for. Writes latent_colours.json beside the built-in
model, from where nodes/host/preview.py reads it.
"""

import json
import random

import numpy
import torch
from torch.nn.functional import avg_pool3d

from opensora_core.evaluation import world
from opensora_core.evaluation.clips import quantised
from opensora_core.media.video import to_uint8
from opensora_core.pipeline import OpenSoraPipeline
from opensora_core.run.files import SMALL

CLIPS = 160


def main() -> None:
    pipe = OpenSoraPipeline.from_pretrained("small")
    rng = random.Random(0)
    rows, targets = [], []
    with torch.inference_mode():
        for _ in range(CLIPS):
            clip = quantised(world.draw(rng, world.combinations()).render())
            latents = pipe.vae.encode(clip, [None])  # in the transformer's scale
            pixels = torch.from_numpy(numpy.stack(to_uint8(clip))).float().movedim(-1, 0)[None] / 127.5 - 1
            space = pixels.shape[-1] // latents.shape[-1]
            first, rest = pixels[:, :, :1], pixels[:, :, 1:]
            colour = torch.cat((avg_pool3d(first, (1, space, space)), avg_pool3d(rest, (4, space, space))), 2)
            rows.append(latents[0].flatten(1).T.float())
            targets.append(colour[0].flatten(1).T)
    x, y = torch.cat(rows), torch.cat(targets)
    x = torch.cat((x, torch.ones(len(x), 1)), 1)
    fitted = torch.linalg.lstsq(x, y).solution
    error = (x @ fitted - y).square().mean().sqrt()
    print(f"root mean square error {float(error):.3f} of -1..1")
    table = {"factors": [[round(float(v), 5) for v in row] for row in fitted[:-1]], "bias": [round(float(v), 5) for v in fitted[-1]]}
    (SMALL / "latent_colours.json").write_text(json.dumps(table) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
