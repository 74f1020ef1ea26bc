"""The diffusion of Open-Sora 1.0 and 1.1: noise is predicted and its variance learned, over a thousand steps of which some are taken.

A `place` counts the steps that are taken from the cleanest, 0.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..errors import OpenSoraError
from .given import ImageCondition
from .masks import Frames
from .schedule import Schedule

NUM_TIMESTEPS = 1000
GUIDED_CHANNELS = 3  # of the four; the last, and the variance, stay as the prompt alone has them


def respaced(num_steps: int, total: int = NUM_TIMESTEPS) -> list[int]:
    """The timesteps that are taken, evenly from 0 to the last, halves to even. Source: improved-diffusion respace.py, space_timesteps."""
    if not 1 <= num_steps <= total:
        raise OpenSoraError(f"steps={num_steps} cannot be taken; use 1 to {total} (the model's own default is 100).")
    stride, place, taken = (total - 1) / (num_steps - 1) if num_steps > 1 else 1, 0.0, []
    for _ in range(num_steps):  # summed up, as there: a product may round otherwise
        taken.append(round(place))
        place += stride
    return taken


@dataclass(frozen=True)
class Tables:
    """Tables of the steps that are taken, [N] each.

    timesteps: what the network is told. betas: variance that a step adds. clean: share of the clean picture's variance, cumulated.
    """

    timesteps: Tensor
    betas: Tensor
    clean: Tensor

    @property
    def clean_before(self) -> Tensor:
        return torch.cat((self.clean.new_ones(1), self.clean[:-1]))

    @property
    def least_log_variance(self) -> Tensor:
        variance = self.betas * (1 - self.clean_before) / (1 - self.clean)
        return variance[[1, *range(1, len(variance))]].log() if len(variance) > 1 else variance

    @property
    def mean_of_clean(self) -> Tensor:
        return self.betas * self.clean_before.sqrt() / (1 - self.clean)

    @property
    def mean_of_noisy(self) -> Tensor:
        return (1 - self.clean_before) * (1 - self.betas).sqrt() / (1 - self.clean)


@lru_cache
def tables(num_steps: int, dtype: torch.dtype = torch.float64) -> Tables:
    """Tables of linear betas 1e-4 .. 0.02. dtype: fp64 for 1.0; 1.1 rounds the respaced betas to fp32 and goes on from there."""
    taken = respaced(num_steps)
    clean = (1 - torch.linspace(0.0001, 0.02, NUM_TIMESTEPS, dtype=torch.float64)).cumprod(0)[taken]
    betas = (1 - clean / torch.cat((clean.new_ones(1), clean[:-1]))).to(dtype)
    return Tables(torch.tensor(taken), betas, (1 - betas).cumprod(0))


@dataclass(frozen=True)
class Respaced(Schedule):
    """The way of one run; points are the ratio of noise to clean, and the timesteps those that are taken, the noisiest first."""

    table: Tables | None = None


def respaced_schedule(config, extent, num_steps: int, shift: float = 0.0, dtype: torch.dtype = torch.float64) -> Respaced:
    """The released schedule; this diffusion has no shift. dtype: see `tables`."""
    if shift:
        raise OpenSoraError(f"shift={shift} is of the rectified flow, which this model does not follow; leave it at 0.")
    table = tables(num_steps, dtype)
    ratio = ((1 - table.clean) / table.clean).sqrt().float().flip(0)
    return Respaced(torch.cat((ratio, ratio.new_zeros(1))), table.timesteps.float().flip(0), table)


@dataclass(frozen=True)
class NoisePrediction:
    """The process whose network predicts the noise; a point is the ratio of noise to clean, and its second half, the variance, is left out."""

    def slope(self, x: Tensor, prediction: Tensor, point) -> Tensor:
        raise OpenSoraError("This model's variance is learned; use its own sampler (ddpm), which alone reads it.")

    def denoised(self, x: Tensor, prediction: Tensor, point) -> Tensor:
        return (1 + point**2) ** 0.5 * x - point * prediction[:, : x.shape[1]]

    def prediction(self, x: Tensor, clean: Tensor, point) -> Tensor:
        return ((1 + point**2) ** 0.5 * x - clean) / point

    def noised(self, clean: Tensor, noise: Tensor, point) -> Tensor:
        return (clean + point * noise) / (1 + point**2) ** 0.5


def ancestral_step(x: Tensor, prediction: Tensor, place: int, table: Tables, noise: Tensor) -> Tensor:
    """x [B, C, T, H, W] at a place -> at the one below, with as much noise as the prediction's second half asks for.

    Source: improved-diffusion gaussian_diffusion.py, p_sample with learned range.
    """
    share = table.clean[place]
    clean = float((1 / share).sqrt()) * x - float((1 / share - 1).sqrt()) * prediction[:, : x.shape[1]]
    mean = float(table.mean_of_clean[place]) * clean + float(table.mean_of_noisy[place]) * x
    if place == 0:
        return mean
    share = (prediction[:, x.shape[1] :] + 1) / 2
    log_variance = share * float(table.betas[place].log()) + (1 - share) * float(table.least_log_variance[place])
    return mean + torch.exp(0.5 * log_variance) * noise


def places_of(edit: Tensor, num_steps: int) -> Tensor:
    """The place in the schedule at which each frame [B, T] begins to be made: 1.1 counts edits in whole steps, in fp32."""
    return (edit.float() * num_steps).int()


def network_edit(edit: Tensor, table: Tables) -> Tensor:
    """The edit that a network compares with its timestep (networks/stdit): a frame is made while its place is above the step's."""
    places = places_of(edit, len(table.timesteps))
    times = torch.cat((table.timesteps, table.timesteps.new_tensor([NUM_TIMESTEPS]))).to(edit)[places.long()]
    return torch.where(places >= len(table.timesteps), torch.ones_like(edit), (times - 0.5) / NUM_TIMESTEPS)


class RespacedFrames(Frames):
    """1.1's given frames: one is kept until its place comes, noised there, and made below it.

    At its own place the network still takes it for given, and the step's result is kept: so a given frame moves a little in the last step.
    """

    def __init__(self, condition: ImageCondition, x: Tensor, schedule: Respaced, dtype: torch.dtype):
        super().__init__(NoisePrediction(), condition, x, schedule, dtype)
        self._table, self._places = schedule.table, places_of(self.edit, schedule.num_steps)
        self.edit = network_edit(self.edit, schedule.table)

    def made(self, step: int) -> Tensor:
        return self._places >= len(self._table.timesteps) - 1 - step

    def begun(self, step: int) -> Tensor:
        return self._places == len(self._table.timesteps) - 1 - step

    def noised(self, x: Tensor, step: int) -> Tensor:
        share = self._table.clean[len(self._table.timesteps) - 1 - step]
        return float(share.sqrt()) * x + float((1 - share).sqrt()) * self.draw(x).to(x)
