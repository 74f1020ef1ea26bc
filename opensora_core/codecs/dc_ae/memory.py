"""How much memory the Video DC-AE needs for a tile: counted by running it on the meta device, so that it follows the code."""

from functools import lru_cache

import torch

from ...memory.count import AllocationCounter
from .config import DCAEConfig
from .model import VideoDCAE


@lru_cache(maxsize=64)
def decode_bytes(config: DCAEConfig, latent_size: tuple[int, int, int], dtype_bytes: int) -> int:
    """Peak of the activations of decoding latents of this (frames, height, width), their result included.

    Args:
        dtype_bytes: 2 for bf16 and fp16, 4 for fp32.
    """
    return _peak(config, config.latent_channels, latent_size, dtype_bytes, True)


@lru_cache(maxsize=64)
def encode_bytes(config: DCAEConfig, size: tuple[int, int, int], dtype_bytes: int) -> int:
    """As decode_bytes, of encoding (frames, height, width) in pixels; sides that are no multiples of 32 count as the next that is."""
    frames, *sides = size
    space = config.grid.space
    frames = 1 if frames == 1 else -(-frames // 4) * 4
    return _peak(config, config.in_channels, (frames, *(-(-side // space) * space for side in sides)), dtype_bytes, False)


def _peak(config: DCAEConfig, channels: int, size: tuple[int, int, int], dtype_bytes: int, is_decode: bool) -> int:
    model = _on_meta(config, torch.float32 if dtype_bytes == 4 else torch.bfloat16)
    x = torch.empty((1, channels, *size), dtype=model.dtype, device="meta")
    with torch.inference_mode(), AllocationCounter() as counter:
        (model.decode if is_decode else model.encode)(x)
    return counter.peak


@lru_cache(maxsize=2)
def _on_meta(config: DCAEConfig, dtype: torch.dtype) -> VideoDCAE:
    return VideoDCAE(config, dtype=dtype, device="meta").requires_grad_(False)
