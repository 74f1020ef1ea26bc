"""Plans: a run that computes some of the released steps, each with the mean of the released guidance over the steps that it stands for.

A held prediction times that mean is what the released run does between two of these steps if the network's answers stay as they are there,
so a plan of all steps is the released run, bit for bit. Places are counted by t, from 1 (noise) to 0 (clean): the released run has its steps
at equal distances of t, and the schedule shifts them. So a plan holds for any size, for a run that begins in the middle, and for given
frames that are read in a part of the run only.

Which steps are best depends on the model, the shift and what is given. They are found by dynamic programming from a released run that is
recorded: if the predictions of step a are held up to step b, the latents end as far from the released run's as the sum over those steps of
(next point - point) * (released guided prediction - that of the held predictions): the cost of the interval. A plan's is the sum of its
intervals' squares, as of errors that do not lean the same way. `calibrate` writes the best plans to a file for each model, mode, size and
length (run/plans.py). Where there is none the steps are those that were best for the built-in model: they keep its scores, but how near
another model comes to its exact run was not measured.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..choices import BALANCED, DRAFT, FAST
from ..errors import OpenSoraError
from .guidance import PASSES, Guidance, ReferenceUse, StepGuidance
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
    """Which steps of a released run are computed: from 0, rising. num_steps: of the released run.

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
    guidance: of the released run. whole: its points. points: of this run, from noise to clean; any that lie in the same range.
    """

    guidance: Guidance
    whole: Sequence[float]
    points: Sequence[float]

    def at_step(self, step: int, num_steps: int, latent_frames: int, use: ReferenceUse | None, timestep: float = 0.0) -> StepGuidance:
        """Guidance of step 0..len(points) - 2, as Guidance.at_step; whether the reference is read is as at the first step that it stands for."""
        shares = self._shares(*self.points[step : step + 2])
        parts = [self.guidance.at_step(index, len(self.whole) - 1, latent_frames, use) for index in shares]
        now = parts[0]
        if len(parts) > 1:
            text, image = (
                sum(getattr(part, name) * share for part, share in zip(parts, shares.values(), strict=True)) / sum(shares.values())
                for name in ("text", "image")
            )
            now = replace(now, text=text, image=image, passes=max((part.passes for part in parts), key=len))
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


def planned(guidance: Guidance, whole: Schedule, plan: StepPlan) -> tuple[Schedule, Averaged]:
    """The way and the guidance of a run by a plan. whole: the released run's way."""
    schedule = plan.schedule(whole)
    return schedule, Averaged(guidance, whole.points.tolist(), schedule.points.tolist())


def mode_of(use: ReferenceUse | None) -> str:
    """The mode of a run that uses what it is given so."""
    return TEXT if use is None or use.strength == 0 else CLIP if use.is_clip else PICTURES


def fingerprint_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """What a network is known by, whatever its weights are held in and whatever LoRA comes on top.

    tensors: its named parameters. Those of one dimension count, which no format quantises: names, shapes and a few values in bf16.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda one: one[0]):
        if tensor.ndim == 1 and name.endswith((".weight", ".bias")) and tensor.is_floating_point() and not tensor.is_meta:
            values = tensor.detach()[torch.tensor([*range(min(_SAMPLED, len(tensor))), -1], device=tensor.device)]
            digest.update(f"{name} {len(tensor)} {values.to('cpu', torch.bfloat16).tolist()}\n".encode())
    return digest.hexdigest()[:32]


@dataclass(frozen=True)
class Recorder(Guidance):
    """Guidance of a released run for which every pass is run at every step, and kept, in fp32 on the CPU.

    steps, record: of the run so far: guidance and predictions.
    """

    steps: list[StepGuidance] = field(default_factory=list)
    record: list[dict[str, Tensor]] = field(default_factory=list)

    def at_step(self, step: int, num_steps: int, latent_frames: int, use: ReferenceUse | None, timestep: float = 0.0) -> StepGuidance:
        self.steps[step : step + 1] = [super().at_step(step, num_steps, latent_frames, use, timestep)]  # a step may be asked for twice
        return replace(self.steps[step], passes=PASSES[:2] if use is None else PASSES, record=self.record)


def interval_costs(points: Tensor, steps: Sequence[StepGuidance], predictions: Sequence[dict[str, Tensor]], latents: Tensor) -> Tensor:
    """[N, N + 1] fp64: at [a, b] the cost of holding step a up to step b, as a share of the finished latents' squared length; inf for b <= a.

    points: [N + 1] of the released run. steps, predictions: of its N steps. latents: [B, C, T, H, W] that it ended with.
    """
    strides, num_steps = (points[1:] - points[:-1]).tolist(), len(steps)
    costs = torch.full((num_steps, num_steps + 1), torch.inf, dtype=torch.float64)
    whole = latents.double().square().sum().item()
    guided = [now.combine(one) for now, one in zip(steps, predictions, strict=True)]
    for first in range(num_steps):
        error = torch.zeros_like(guided[first])
        for step in range(first, num_steps):
            error += strides[step] * (guided[step] - steps[step].combine(predictions[first]))
            costs[first, step + 1] = error.square().sum().item() / whole
    return costs


def best_steps(costs: Tensor, num_points: int) -> tuple[int, ...]:
    """The steps of the plan of so many points with the least sum of costs [N, N + 1]."""
    num_steps = costs.shape[0]
    best = torch.full((num_steps + 1,), torch.inf, dtype=torch.float64)
    best[0], came_from = 0.0, []
    for _ in range(min(num_points, num_steps)):
        best, origin = (best[:num_steps, None] + costs).min(dim=0)  # [from, to]
        came_from.append(origin)
    steps = [num_steps]
    for origin in reversed(came_from):
        steps.append(int(origin[steps[-1]]))
    return tuple(reversed(steps[1:]))
