"""Writes a small Flux.1 with random weights in the official layout, for the text encoders of demo/tiny.py.

    python -m demo.tiny_flux DIRECTORY [--schnell] [--seed N]

What ComfyUI fixes of Flux is as released: heads of 128, and of the autoencoder 32 groups and how its widths grow. Of the autoencoder's encoder, which
drawing does not need, the one tensor is written that names the file. About 10 MB; it draws patterns, not the prompt.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from opensora_core.codecs.picture import PictureConfig, PictureVAE
from opensora_core.families import table
from opensora_core.networks.mmdit.config import FLUX_DEV

from .tiny import random_weights

TRANSFORMER = replace(
    FLUX_DEV, hidden_size=128, num_heads=1, mlp_hidden_size=512, depth=1, depth_single_blocks=2, context_in_dim=64, vec_in_dim=64
)
AUTOENCODER = PictureConfig(widths=(32, 64, 128, 128), has_encoder=False)


def write(directory: str | Path, seed: int = 0, schnell: bool = False) -> tuple[Path, Path]:
    """Write flux1-dev.safetensors (or flux1-schnell) and ae.safetensors, and return their paths. The same seed gives the same files."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    dit = directory / f"flux1-{'schnell' if schnell else 'dev'}.safetensors"
    config = replace(TRANSFORMER, guidance_embed=not schnell)
    weights = random_weights(table.manifest(config), generator)
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}, dit)
    vae = directory / "ae.safetensors"
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in autoencoder_weights(generator).items()}, vae)
    return dit, vae


def autoencoder_weights(generator: torch.Generator) -> dict[str, Tensor]:
    """fp32, scaled so that noise decodes to clearly visible contrast."""
    weights = random_weights(table.manifest(AUTOENCODER), generator)
    with torch.device("meta"):
        codec = PictureVAE(AUTOENCODER)
    codec.load_state_dict(weights, assign=True)
    with torch.no_grad():
        pixels = codec.decode(AUTOENCODER.latents.to_codec(torch.randn(1, 16, 1, 8, 12, generator=generator)))
    weights["decoder.conv_out.weight"] *= 0.5 / pixels.std()
    weights["decoder.conv_out.bias"] = (weights["decoder.conv_out.bias"] - pixels.mean()) * (0.5 / pixels.std())
    return weights | {"encoder.down.0.block.0.conv1.weight": torch.zeros(128, 128, 3, 3)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--schnell", action="store_true")
    arguments = parser.parse_args()
    print(*write(arguments.directory, arguments.seed, arguments.schnell))
