"""The rectified flow of Open-Sora 1.2 and 1.3: its timesteps, shifted by size and length, and 1.3's image guidance."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import OpenSoraError
from .guidance import temporal_ramp
from .schedule import Schedule

BASE_PIXELS = 512 * 512
NUM_TIMESTEPS = 1000


def pieces(num_frames: Tensor) -> Tensor:
    """1.2's measure of a length: latent frames of whole pieces of 17."""
    return num_frames // 17 * 5


def quarters(num_frames: Tensor) -> Tensor:
    """1.3's measure of a length."""
    return (num_frames - 1) // 4


def sized_schedule(
    size: tuple[int, int, int], num_steps: int, measure: Callable[[Tensor], Tensor], shift: float = 0.0, dtype: torch.dtype = torch.bfloat16
) -> Schedule:
    """Timesteps from 1000 down, shifted by the roots of area and length: r * t / (1 + (r - 1) * t).

    size: frames, height, width in pixels. measure: of the frames, `pieces` or `quarters`; a picture's is 1.
    shift: the ratio r in their place, where it is not 0.
    dtype: that size, length and ratio are rounded to. The released versions work in bf16, where sizes above 256 are not exact.
    Source: hpcaitech/Open-Sora@v1.2.0 opensora/schedulers/rf/rectified_flow.py and @v1.3 time_sampler.py, timestep_transform.
    """
    if num_steps < 1:
        raise OpenSoraError(f"steps={num_steps} makes no video; use at least 1 (the model's own default is 30).")
    frames, height, width = (torch.tensor(float(side), dtype=dtype).view(1) for side in size)
    length = torch.ones_like(frames) if size[0] == 1 else measure(frames)
    ratio = (height * width / BASE_PIXELS).sqrt() * length.sqrt()
    if shift:
        ratio = torch.tensor([shift])
    t = torch.tensor([(1.0 - step / num_steps) * NUM_TIMESTEPS for step in range(num_steps)]) / NUM_TIMESTEPS
    timesteps = ratio * t / (1 + (ratio - 1) * t) * NUM_TIMESTEPS
    return Schedule(torch.cat((timesteps / NUM_TIMESTEPS, torch.zeros(1))), timesteps)


def image_ramp(scale: float, step: int, num_steps: int, latent_frames: int) -> Tensor:
    """1.3's image scale for each latent frame [1, 1, T, 1, 1]: as 2.0's, but at 1 in the last step already."""
    return temporal_ramp(scale, step, num_steps - 1, latent_frames)
