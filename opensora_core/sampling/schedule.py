"""Sigmas of the rectified flow, shifted by resolution and length."""

import math

import torch
from torch import Tensor

from ..errors import OpenSoraError
from ..geometry import PATCH_SIZE

# The line through (256 tokens, shift 1) and (4096 tokens, shift 3).
_SLOPE = 2 / (4096 - 256)
_INTERCEPT = 1 - 256 * _SLOPE


def flow_shift(tokens_per_frame: int, latent_frames: int) -> float:
    """The shift alpha of a clip: linear in tokens per latent frame, times the root of latent frames.

    256px 16:9 at 129 frames (252 tokens, 33 latent frames) -> 5.732595; 768px (2304, 33) -> 11.872096.
    Source: hpcaitech/Open-Sora@7ad6a96a opensora/utils/sampling.py, get_schedule.
    """
    return (_SLOPE * tokens_per_frame + _INTERCEPT) * math.sqrt(latent_frames)


def latent_flow_shift(latent_shape, patch_size: int = PATCH_SIZE) -> float:
    """flow_shift of a latent [..., T, H, W]."""
    frames, height, width = latent_shape[-3:]
    return flow_shift(height * width // patch_size**2, frames)


def sigmas(num_steps: int, alpha: float) -> Tensor:
    """num_steps + 1 sigmas from 1 to exactly 0, fp32: alpha * t / (1 + (alpha - 1) * t) of equally spaced t.

    Raises:
        OpenSoraError: fewer than one step, or a shift that is not a positive, finite number.
    """
    if num_steps < 1:
        raise OpenSoraError(f"steps={num_steps} makes no video; use at least 1 (the model's own default is 50).")
    if not (math.isfinite(alpha) and alpha > 0):
        raise OpenSoraError(f"shift={alpha} is not a positive, finite number; use 0 in the interface for the shift from size and length.")
    t = torch.linspace(1, 0, num_steps + 1)
    return alpha * t / (1 + (alpha - 1) * t)
