"""A VAE by itself, outside a pipeline: the video VAE of a model, or Flux's picture autoencoder with its encoder."""

from functools import partial
from pathlib import Path

import torch

from ..checkpoint.detect import identify, require
from ..checkpoint.files import read_network
from ..checkpoint.load import load_vae
from ..memory.component import Component, Placement, resolve_device
from ..memory.decode import VideoVAE
from .files import ModelFiles, whole_vae


def open_vae(path: str | Path = "small", device: str | torch.device = "cpu", torch_dtype: torch.dtype | None = None) -> VideoVAE:
    """A VAE to encode and decode with: `open_vae("hunyuan_vae.safetensors").decode(latents)`. It is read at the first use.

    `.encode(images [T, H, W, 3] in 0..1)` gives latents in the transformer's scale, `.decode(latents)` frames in 0..1; what else it can,
    memory/decode.py says.

    path: a VAE's file, its folder or its shards; a picture autoencoder's (ae.safetensors) too, for clips of one frame; "small" for the built-in
    model's. device: "auto", "cuda", "mps", "cpu". torch_dtype: None = bf16 on an accelerator, fp32 on the CPU.
    """
    file = ModelFiles.in_folder("small").vae if str(path) == "small" else whole_vae(path)
    header = read_network(file)
    identity = identify(header.shapes)
    slot = require(identity, "flux_vae" if identity.slot == "flux_vae" else "vae", header.name).slot
    placement = Placement(resolve_device(device), torch_dtype)
    return VideoVAE(Component(partial(load_vae, file, slot=slot), placement), placement)
