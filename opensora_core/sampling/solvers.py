"""Solvers: one step of a run, from a network's prediction to the next latents; and the noise that a run begins with."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import OpenSoraError
from .process import Process
from .schedule import Schedule

MAX_SEED = 2**64 - 1
Solver = Callable[[Process, Tensor, int, Tensor, Schedule], Tensor]


def noise(shape, seed: int, device="cpu", dtype=torch.float32) -> Tensor:
    """Standard normal noise from a fresh generator of `device`: on the CPU, the same for a seed on every machine.

    Raises:
        OpenSoraError: a seed outside 0..2**64-1.
    """
    if not 0 <= seed <= MAX_SEED:
        raise OpenSoraError(f"seed={seed} is out of range; use 0 to {MAX_SEED}.")
    generator = torch.Generator(device=device).manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, device=device, dtype=dtype)


def euler(process: Process, x: Tensor, step: int, prediction: Tensor, schedule: Schedule) -> Tensor:
    """The explicit Euler step x + (next point - point) * slope."""
    here, there = schedule.points[
        step : step + 2
    ].tolist()  # Python numbers: a bf16 latent is scaled by an unrounded step, as in the reference
    return x + (there - here) * process.slope(x, prediction, here)


# name -> what makes the solver of one run, of the videos' seeds: a solver that adds noise or remembers earlier steps is new for each run.
SOLVERS: dict[str, Callable[[Sequence[int]], Solver]] = {"euler": lambda seeds: euler}
