"""CogVideoX's diffusion: its process, its steps and the two solvers it was published with.

A point is an angle: x = cos(angle) * clean + sin(angle) * noise, from pi/2 (noise) to 0 (clean). The network predicts v = dx / dangle =
cos(angle) * noise - sin(angle) * clean, so that x and v turn as one picture and its partner at a right angle. cos(angle)**2 is what
papers call the cumulative product of alphas.

Source: huggingface/diffusers@58eb52c0 schedulers/scheduling_ddim_cogvideox.py, scheduling_dpm_cogvideox.py.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import OpenSoraError
from .schedule import Point, Process, Schedule

TRAIN_STEPS = 1000
BETAS = 0.00085, 0.012  # first and last, linear in their roots


@dataclass(frozen=True)
class VPrediction:
    """The process of a network that predicts v."""

    def slope(self, x: Tensor, prediction: Tensor, point: Point) -> Tensor:
        return prediction

    def denoised(self, x: Tensor, prediction: Tensor, point: Point) -> Tensor:
        return math.cos(point) * x - math.sin(point) * prediction

    def prediction(self, x: Tensor, clean: Tensor, point: Point) -> Tensor:
        return (math.cos(point) * x - clean) / math.sin(point)

    def noised(self, clean: Tensor, noise: Tensor, point: Point) -> Tensor:
        return math.cos(point) * clean + math.sin(point) * noise


@dataclass(frozen=True)
class DriftingSchedule(Schedule):
    """A schedule whose steps end at `ends` [N], not where the next ones begin, as diffusers' do where the count does not divide 1000."""

    ends: Tensor


def training_angles(snr_shift: float) -> Tensor:
    """The point of every timestep of training, fp64 [1000], 0.029 to exactly pi/2 (zero terminal signal).

    snr_shift: by how much signal is weakened against noise; 3 for the 2B, 1 for the 5B models.
    """
    first, last = (math.sqrt(beta) for beta in BETAS)
    a = torch.cumprod(1 - torch.linspace(first, last, TRAIN_STEPS, dtype=torch.float64) ** 2, dim=0)
    root = (a / (snr_shift + (1 - snr_shift) * a)).sqrt()
    return torch.acos((root - root[-1]) * (root[0] / (root[0] - root[-1])))


def v_schedule(num_steps: int, snr_shift: float, parity: bool = False) -> Schedule:
    """N steps, equally spaced from the noisy end: 50 are timesteps 999, 979, ... 19, and then the clean picture.

    parity: end each step at timestep t - 1000 // N, as diffusers does. Where N does not divide 1000 that is not where the next one
    begins, and for some N (48, 51, ...) the last step leaves noise in the picture.
    """
    if not 1 <= num_steps <= TRAIN_STEPS:
        raise OpenSoraError(f"steps={num_steps} is not between 1 and {TRAIN_STEPS}; use 50, CogVideoX's own default.")
    stride = TRAIN_STEPS - (TRAIN_STEPS - TRAIN_STEPS / num_steps)  # rounded as numpy's arange does it: that decides halves, as at 48
    steps = [round(TRAIN_STEPS - step * stride) - 1 for step in range(num_steps)]
    angles = torch.cat((training_angles(snr_shift), torch.zeros(1, dtype=torch.float64)))  # [-1] is the clean picture
    points, timesteps = angles[[*steps, -1]], torch.tensor(steps, dtype=torch.float32)
    if not parity:
        return Schedule(points, timesteps)
    return DriftingSchedule(points, timesteps, angles[[max(-1, t - TRAIN_STEPS // num_steps) for t in steps]])


def ddim(process: Process, x: Tensor, step: int, prediction: Tensor, schedule: Schedule) -> Tensor:
    """The step of DDIM without noise of its own: x turns to the end of the step. It needs v, whatever the process."""
    here, there = _ends(schedule, step)
    return math.cos(there - here) * x + math.sin(there - here) * prediction


class DPM:
    """The step of CogVideoX's own solver, DPM-Solver++ (SDE) of second order; made anew for each run.

    Args:
        draw: noise of x's shape. In a step of second order it is called twice and the first is thrown away, so that a stream of noise
            gives the published implementation's video: 98 times in 50 steps.
    """

    def __init__(self, draw: Callable[[Tensor], Tensor]):
        self.draw = draw
        self.before: tuple[Tensor, float] | None = None  # what the step before took for clean, and half its log of signal to noise

    def __call__(self, process: Process, x: Tensor, step: int, prediction: Tensor, schedule: Schedule) -> Tensor:
        here, there = _ends(schedule, step)
        clean, noise = process.denoised(x, prediction, here), self.draw(x)
        was, will = _half_log_snr(here), _half_log_snr(there)
        toward, before, self.before = clean, self.before, (clean, was)
        if before is not None and there > 0:
            share = (will - was) / (was - before[1]) / 2  # 0 where the step before began at pure noise
            toward, noise = (1 + share) * clean - share * before[0], self.draw(x)
        shrunk = math.exp(was - will)
        kept, added = math.sin(there) / math.sin(here) * shrunk, math.sin(there) * math.sqrt(1 - shrunk**2)
        return kept * x + math.cos(there) * (1 - shrunk**2) * toward + added * noise


def dpm(seeds: Sequence[int], before: int = 0) -> DPM:
    """The solver of a run whose videos have these seeds. A video's stream begins with `before` frames of noise, [C, before, H, W], and the
    noise of the run's beginning, which are drawn again here and left; it is drawn on the CPU in the published implementation's order,
    [T, C, H, W]."""
    streams = [torch.Generator().manual_seed(seed) for seed in seeds]

    def drawn(x: Tensor) -> Tensor:
        shape = x.transpose(1, 2).shape[1:]
        return torch.stack([torch.randn(shape, generator=stream) for stream in streams]).transpose(1, 2).to(x)

    def first(x: Tensor) -> Tensor:
        if before:
            drawn(x[:, :, :before])  # in the order of [C, before, H, W] while that is one frame, as it is
        drawn(x)
        solver.draw = drawn
        return drawn(x)

    solver = DPM(first)
    return solver


def _ends(schedule: Schedule, step: int) -> tuple[float, float]:
    there = schedule.ends[step] if isinstance(schedule, DriftingSchedule) else schedule.points[step + 1]
    return schedule.points[step].item(), there.item()


def _half_log_snr(angle: float) -> float:
    """Half the logarithm of signal to noise: -inf at pure noise, inf at a clean picture."""
    if 0 < angle < math.pi / 2:
        return math.log(math.cos(angle) / math.sin(angle))
    return -math.inf if angle > 0 else math.inf
