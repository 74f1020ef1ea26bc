"""What the stages of a run made, as networks."""

from pathlib import Path

import torch
from torch import nn

from opensora_core.codecs.hunyuan.model import CausalVAE
from opensora_core.networks.mmdit.model import MMDiT

from . import tokenizers
from .data import read
from .export import LatentStatistics
from .text import untrained
from .transformer import Networks
from .vae import trained_vae


def trained(folder: str | Path) -> tuple[tuple[MMDiT, CausalVAE, nn.Module, nn.Module], LatentStatistics]:
    """The averaged transformer, the VAE, T5 and CLIP, and the statistics to fold into the VAE."""
    folder = Path(folder)
    average = Networks(untrained(tokenizers.write(folder / "tokenizers")))
    average.load_state_dict(torch.load(folder / "transformer.pt", weights_only=True, map_location="cpu")["average"])
    return (average.transformer, finished_vae(folder), average.t5, average.clip), read(folder).statistics


def finished_vae(folder: str | Path) -> CausalVAE:
    """The encoder of training/vae.py, and the decoder as far as training/decoder.py has trained it."""
    model = trained_vae(folder)
    tuned = Path(folder) / "decoder.pt"
    if tuned.exists():
        model.load_state_dict(torch.load(tuned, weights_only=True, map_location="cpu")["vae"])
    return model
