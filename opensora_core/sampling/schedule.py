"""The points that a run goes through; for the rectified flow sigmas, shifted by resolution and length."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import OpenSoraError
from ..geometry import PATCH_SIZE

# The line through (256 tokens, shift 1) and (4096 tokens, shift 3).
_SLOPE = 2 / (4096 - 256)
_INTERCEPT = 1 - 256 * _SLOPE


@dataclass(frozen=True)
class Schedule:
    """The way of one run.

    points: [N + 1] fp32 on the CPU, of the process's own axis (process.py), from noise to clean. timesteps: [N], what the network is told.
    """

    points: Tensor
    timesteps: Tensor

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)


def flow_schedule(num_steps: int, alpha: float) -> Schedule:
    """`sigmas`, for a network that is told sigma itself."""
    points = sigmas(num_steps, alpha)
    return Schedule(points, points[:-1])


def shifted_schedule(config, extent, num_steps: int, shift: float = 0.0) -> Schedule:
    """flow_schedule with the shift of a latent [..., T, H, W], or another where it is not 0."""
    return flow_schedule(num_steps, shift or latent_flow_shift(extent, config.patch_size))


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
    """num_steps + 1 sigmas from exactly 1 to exactly 0, fp32: alpha * t / (1 + (alpha - 1) * t) of equally spaced t."""
    if num_steps < 1:
        raise OpenSoraError(f"steps={num_steps} makes no video; use at least 1 (the model's own default is 50).")
    if not (math.isfinite(alpha) and alpha > 0):
        raise OpenSoraError(f"shift={alpha} is not a positive, finite number; use 0 in the interface for the shift from size and length.")
    t = torch.linspace(1, 0, num_steps + 1)
    points = alpha * t / (1 + (alpha - 1) * t)
    points[0], points[-1] = 1, 0  # set, not computed: rounding leaves one shift in twelve a little above or below
    return points
