"""Plans: a run that computes some of the released steps, each with the mean of the released guidance over the steps that it stands for.

A held prediction times that mean is what the released run does between two of these steps if the network's answers stay as they are there,
so a plan of all steps is the released run, bit for bit. Places are counted by t, from 1 (noise) to 0 (clean): the released run has its steps
at equal distances of t, and the schedule shifts them. So a plan holds for any size, for a run that begins in the middle, and for given
frames that are read in a part of the run only.

Which steps are best depends on the model, the shift and what is given. `calibrate` finds them (calibration.py) and writes a file for each
model, mode, size and length (run/plans.py); a model is known by its fingerprint. Where there is no such file the steps are those that were best for the
built-in model: they keep its scores, but how near another model comes to its exact run was not measured.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..choices import BALANCED, DRAFT, FAST
from ..errors import OpenSoraError
from .guidance import Guidance, ReferenceUse, StepGuidance
from .schedule import Schedule

RELEASED_STEPS = 50
POINTS = {BALANCED: 20, FAST: 12, DRAFT: 9}  # steps that a speed computes
TEXT, PICTURES, CLIP = MODES = ("t2v", "i2v", "v2v")  # what a plan is for: nothing given, pictures, a clip
_UNCALIBRATED = {
    20: (0, 1, 2, 3, 4, 6, 8, 11, 14, 17, 21, 25, 29, 33, 37, 41, 44, 46, 48, 49),
    12: (0, 2, 4, 8, 12, 18, 25, 32, 38, 43, 47, 49),
    9: (0, 2, 6, 13, 22, 32, 40, 46, 49),
}  # fmt: skip
_LEAST_SHARE = 1e-3  # of a released step that is counted as a part of an interval; less is rounding
_SAMPLED = 4  # values at either end of a tensor


@dataclass(frozen=True)
class StepPlan:
    """Which steps of a released run are computed.

    Attributes:
        steps: from 0, rising. num_steps: of the released run.
        error: distance of the finished latents to the exact run's, as a share of their length, as calibrated; None where it was not.
    """

    steps: tuple[int, ...]
    num_steps: int = RELEASED_STEPS
    error: float | None = None

    def __post_init__(self):
        if not self.steps or self.steps[0] != 0 or list(self.steps) != sorted(set(self.steps)) or self.steps[-1] >= self.num_steps:
            raise OpenSoraError(f"The steps {list(self.steps)} are no plan of {self.num_steps}; begin with 0, and let them rise.")

    @classmethod
    def uncalibrated(cls, speed: str, num_steps: int = RELEASED_STEPS) -> "StepPlan":
        """The plan of a speed where none was calibrated; num_steps: of the model's released run."""
        steps = _UNCALIBRATED[POINTS[speed]]
        return cls(tuple(sorted({round(step * (num_steps - 1) / (RELEASED_STEPS - 1)) for step in steps})), num_steps)

    @property
    def points(self) -> list[float]:
        """Places on t, the end at 0 included."""
        return [*(1 - step / self.num_steps for step in self.steps), 0.0]

    def schedule(self, whole: Schedule) -> Schedule:
        """The way of a run by this plan. whole: the released run's."""
        steps = list(self.steps)
        return Schedule(torch.cat((whole.points[steps], whole.points[-1:])), whole.timesteps[steps])

    def words(self, speed: str) -> str:
        """For a person: what the speed does here."""
        if self.error is None:
            how = "a plan that was not calibrated for this model, size and length: how near it comes to exact was not measured here"
        else:
            how = f"a plan calibrated for it, {self.error:.1%} from exact in the mean of the prompts it was measured on"
        return f"speed {speed}: {len(self.steps)} of {self.num_steps} steps, by {how}"


@dataclass(frozen=True)
class Averaged:
    """Guidance of a run at other points than the released ones: at each, the mean of the released guidance up to the next.

    Where there are fewer points, what the reference changes is computed at every second one and held at the next.

    Attributes:
        guidance: of the released run. whole: its points. points: of this run, from noise to clean; any that lie in the same range.
    """

    guidance: Guidance
    whole: tuple[float, ...]
    points: tuple[float, ...]

    @classmethod
    def over(cls, guidance: Guidance, whole: Iterable[float] | Tensor, points: Iterable[float] | Tensor) -> "Averaged":
        return cls(guidance, *(tuple(values.tolist() if isinstance(values, Tensor) else values) for values in (whole, points)))

    def at_step(self, step: int, num_steps: int, latent_frames: int, use: ReferenceUse | None, timestep: float = 0.0) -> StepGuidance:
        """Guidance of step 0..len(points) - 2; as Guidance.at_step. num_steps: of this run."""
        shares = self._shares(*self.points[step : step + 2])
        parts = [self.guidance.at_step(index, len(self.whole) - 1, latent_frames, use) for index in shares]
        now = parts[0] if len(parts) == 1 else _mean(parts, list(shares.values()))
        is_held = step % 2 == 1 and len(self.points) < len(self.whole) and not self.guidance.every_pass
        if is_held and "uncond_image" in now.passes:
            now = replace(now, passes=now.passes[:2], holds_image=True)
        return now

    def released_steps(self, steps: int) -> int:
        """How many steps of the released run the first so many of this one stand for."""
        return len({index for step in range(steps) for index in self._shares(*self.points[step : step + 2])})

    def _shares(self, begin: float, end: float) -> dict[int, float]:
        """Released step -> how much of it lies between two points, in the points' own measure; the nearest where hardly any does."""
        found = {}
        for index, (first, last) in enumerate(zip(self.whole, self.whole[1:], strict=False)):
            common = min(begin, first) - max(end, last)
            if common > _LEAST_SHARE * (first - last):
                found[index] = common
        nearest = min(range(len(self.whole) - 1), key=lambda index: abs(self.whole[index] - begin))
        return found or {nearest: 1.0}


def _mean(parts: list[StepGuidance], shares: list[float]) -> StepGuidance:
    """The mean of released steps; whether the reference is read is as at the first of them."""
    total = sum(shares)
    text = sum(part.text * share for part, share in zip(parts, shares, strict=True)) / total
    image = sum(part.image * share for part, share in zip(parts, shares, strict=True)) / total
    passes = max((part.passes for part in parts), key=len)
    return StepGuidance(text, image, passes, parts[0].reads_reference, parts[0].of)


def planned(guidance: Guidance, whole: Schedule, plan: StepPlan) -> tuple[Schedule, Averaged]:
    """The way and the guidance of a run by a plan. whole: the released run's way."""
    schedule = plan.schedule(whole)
    return schedule, Averaged.over(guidance, whole.points, schedule.points)


def mode_of(use: ReferenceUse | None) -> str:
    """The mode of a run that uses what it is given so."""
    return TEXT if use is None or use.strength == 0 else CLIP if use.is_clip else PICTURES


def fingerprint_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """What a network is known by, whatever its weights are held in and whatever LoRA comes on top.

    Args:
        tensors: its named parameters. Those of one dimension count, which no format quantises: names, shapes and a few values in bf16.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda one: one[0]):
        if tensor.ndim == 1 and name.endswith((".weight", ".bias")) and tensor.is_floating_point() and not tensor.is_meta:
            values = tensor.detach()[torch.tensor([*range(min(_SAMPLED, len(tensor))), -1], device=tensor.device)]
            digest.update(f"{name} {len(tensor)} {values.to('cpu', torch.bfloat16).tolist()}\n".encode())
    return digest.hexdigest()[:32]
