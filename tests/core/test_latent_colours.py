"""The colours of previews: a red circle on blue is red on blue, by the built-in model's own latents."""

import json

import torch

from opensora_core.evaluation import world
from opensora_core.evaluation.clips import quantised
from opensora_core.pipeline import OpenSoraPipeline
from opensora_core.run.files import SMALL


def test_a_red_circle_on_blue_is_red_on_blue():
    held = json.loads((SMALL / "latent_colours.json").read_text(encoding="utf-8"))
    scene = world.Scene(world.Combination("circle", "red", "blue", "right"), 4, 12.0, (32.0, 24.0), "")
    with torch.inference_mode():
        latents = OpenSoraPipeline.from_pretrained("small").vae.encode(quantised(scene.render()), [None])
    seen = latents[0].movedim(0, -1).float() @ torch.tensor(held["factors"]) + torch.tensor(held["bias"])
    assert seen.shape[0] == 5
    red, _, blue = seen[0, 4, 3]
    assert red > blue + 0.5, "the circle"
    red, _, blue = seen[0, 0, 7]
    assert blue > red + 0.5, "the background"
