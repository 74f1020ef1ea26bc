"""How clean latents and noise mix on the way from one to the other, what a network's prediction says of the mixture, and the points of the way
that a run goes through: for the rectified flow sigmas, shifted by resolution and length, of 2.0 by one rule and of 1.2 and 1.3 by another.

A `point` is a place on the process's own axis, a number or a 0-d tensor, as a schedule lists them: for the rectified flow sigma, 1 (noise) to
0 (clean).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..errors import OpenSoraError
from ..geometry import PATCH_SIZE

Point = float | Tensor
# The line through (256 tokens, shift 1) and (4096 tokens, shift 3).
_SLOPE = 2 / (4096 - 256)
_INTERCEPT = 1 - 256 * _SLOPE
BASE_PIXELS = 512 * 512  # of a picture of 1.2 and 1.3 that is not shifted


class Process(Protocol):
    """What solvers, given frames and the host ask of a process. All tensors are [B, C, T, H, W]."""

    def slope(self, x: Tensor, prediction: Tensor, point: Point) -> Tensor:
        """dx / dpoint along the way, for solvers that walk it in steps."""

    def denoised(self, x: Tensor, prediction: Tensor, point: Point) -> Tensor:
        """The clean latents that the prediction stands for."""

    def prediction(self, x: Tensor, clean: Tensor, point: Point) -> Tensor:
        """The prediction that stands for these clean latents: the inverse of `denoised`."""

    def noised(self, clean: Tensor, noise: Tensor, point: Point) -> Tensor:
        """Clean latents with as much noise as there is at a point."""


@dataclass(frozen=True)
class Flow:
    """The rectified flow: x = (1 - sigma) * clean + sigma * noise.

    sign: +1 where the network predicts noise - clean (Open-Sora 2.0, Flux), -1 where it predicts clean - noise (Open-Sora 1.2, 1.3).
    """

    sign: int = 1

    def slope(self, x: Tensor, prediction: Tensor, point: Point) -> Tensor:
        return prediction if self.sign > 0 else -prediction

    def denoised(self, x: Tensor, prediction: Tensor, point: Point) -> Tensor:
        return x - point * self.slope(x, prediction, point)

    def prediction(self, x: Tensor, clean: Tensor, point: Point) -> Tensor:
        return self.slope(x, (x - clean) / point, point)

    def noised(self, clean: Tensor, noise: Tensor, point: Point) -> Tensor:
        return (1 - point) * clean + point * noise


@dataclass(frozen=True)
class Schedule:
    """The way of one run.

    points: [N + 1] fp32 on the CPU, of the process's own axis, from noise to clean. timesteps: [N], what the network is told.
    """

    points: Tensor
    timesteps: Tensor

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)


def last_steps(schedule: Schedule, strength: float) -> Schedule:
    """The last int(N * strength) steps, for a video that is made over: from its latents with as much noise as there is at points[0]."""
    count = int(schedule.num_steps * strength) if 0 <= strength <= 1 else 0
    if not count:
        raise OpenSoraError(f"strength={strength} of {schedule.num_steps} steps leaves none; use {1 / schedule.num_steps:.3g} to 1.")
    return replace(schedule, **{name: values[len(values) - count - (name == "points") :] for name, values in vars(schedule).items()})


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
    ratio = torch.tensor([shift]) if shift else (height * width / BASE_PIXELS).sqrt() * length.sqrt()
    t = torch.tensor([(1.0 - step / num_steps) * 1000 for step in range(num_steps)]) / 1000
    timesteps = ratio * t / (1 + (ratio - 1) * t) * 1000
    return Schedule(torch.cat((timesteps / 1000, torch.zeros(1))), timesteps)
