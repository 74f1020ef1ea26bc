"""How clean latents and noise mix on the way from one to the other, and what a network's prediction says of the mixture.

A `point` is a place on the process's own axis, a number or a 0-d tensor, as a schedule lists them (schedule.py): for the rectified flow
sigma, 1 (noise) to 0 (clean).
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

Point = float | Tensor


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
