"""Solvers: one step of a run, from a network's prediction to the next latents; and the noise that a run begins with."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import OpenSoraError
from . import ddpm
from .schedule import Process, Schedule
from .v_prediction import ddim, dpm

MAX_SEED = 2**64 - 1
_PIECE = 2**22  # values of noise drawn at a time, a multiple of 16
_STRIDE = 0xD1B54A32D192ED03  # between the seeds of different uses
Solver = Callable[[Process, Tensor, int, Tensor, Schedule], Tensor]


def noise(shape, seed: int, device="cpu", dtype=torch.float32, on_piece: Callable[[], None] | None = None) -> Tensor:
    """Standard normal noise from a fresh generator of `device`: on the CPU, the same for a seed (0..2**64-1) on every machine.

    on_piece: called again and again while a CPU draws, which takes seconds for each gigabyte; raising from it stops that.
    """
    if not 0 <= seed <= MAX_SEED:
        raise OpenSoraError(f"seed={seed} is out of range; use 0 to {MAX_SEED}.")
    generator, count = torch.Generator(device=device).manual_seed(seed), math.prod(shape)
    if on_piece is None or generator.device.type != "cpu" or count <= 2 * _PIECE:
        return torch.randn(tuple(shape), generator=generator, device=device, dtype=dtype)
    drawn = torch.empty(count, dtype=dtype)
    # A CPU draws in groups of 16, the last group anew: pieces of whole groups, none of them shorter than one, are the same numbers.
    ends = [*range(_PIECE, count - _PIECE + 1, _PIECE), count]
    for start, end in zip([0, *ends], ends, strict=False):
        on_piece()
        drawn[start:end].normal_(generator=generator)
    return drawn.reshape(tuple(shape))


def euler(process: Process, x: Tensor, step: int, prediction: Tensor, schedule: Schedule) -> Tensor:
    """The explicit Euler step x + (next point - point) * slope."""
    here, there = schedule.points[step : step + 2].tolist()  # Python numbers: a bf16 latent is scaled by an unrounded step, as in upstream
    return x + (there - here) * process.slope(x, prediction, here)


def clip_noise(shape, seed: int, device="cpu", dtype=torch.float32, before: int = 0) -> Tensor:
    """`noise` of one clip [1, C, T, H, W] in the order of models that keep latents as [1, T, C, H, W]: the same numbers in other places.

    before: frames of noise that the stream has given to something else first.
    """
    one, channels, frames, *size = shape
    if not before:
        return noise((one, frames, channels, *size), seed, device, dtype).transpose(1, 2).contiguous()
    generator = torch.Generator(device=device).manual_seed(seed)
    torch.randn((one, channels, before, *size), generator=generator, device=device, dtype=dtype)
    return torch.randn((one, frames, channels, *size), generator=generator, device=device, dtype=dtype).transpose(1, 2).contiguous()


class StepNoise:
    """Standard normal noise for the steps of a run, drawn on the CPU; every video's from its own seed, and other than what it begins with.

    use: what it is for, from 1: another has other noise.
    """

    def __init__(self, seeds: Sequence[int], use: int):
        self._generators = [torch.Generator().manual_seed((seed + use * _STRIDE) % 2**64) for seed in seeds]

    def __call__(self, like: Tensor) -> Tensor:
        parts = [torch.randn(like.shape[1:], generator=generator) for generator in self._generators]
        return torch.stack(parts).to(like)


def ancestral(seeds: Sequence[int], before: int = 0) -> Solver:
    """The steps of learned variance (ddpm.py), along a ddpm.Respaced schedule."""
    draw = StepNoise(seeds, 2)

    def step(process: Process, x: Tensor, step: int, prediction: Tensor, schedule: Schedule) -> Tensor:
        return ddpm.ancestral_step(x, prediction, schedule.num_steps - 1 - step, schedule.table, draw(x))

    return step


# name -> what makes the solver of one run, of the videos' seeds and of SamplingRecipe.before: a solver that adds noise or remembers earlier
# steps is new for each run.
SOLVERS: dict[str, Callable[..., Solver]] = {
    "euler": lambda seeds, before=0: euler,
    "ddim": lambda seeds, before=0: ddim,
    "dpm": dpm,
    "ddpm": ancestral,
}
