"""Which steps of a released run are best computed: what a run's predictions are, recorded, and the least sum of errors by dynamic programming.

If the predictions of step a are held up to step b, the latents end as far from the released run's as the sum over those steps of
(next point - point) * (released guided prediction - that of the held predictions). That distance is the cost of the interval; a plan's cost
is the sum of its intervals' squares, as of errors that do not lean the same way.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .guidance import Guidance, ReferenceUse, StepGuidance

Predictions = dict[str, Tensor]


@dataclass(frozen=True)
class RecordedStep(StepGuidance):
    """A step that keeps its predictions."""

    record: list = field(default_factory=list)

    def seen(self, predictions: Predictions) -> None:
        self.record.append({name: value.float().cpu() for name, value in predictions.items()})


@dataclass(frozen=True)
class Recorder:
    """Guidance of a released run for which every pass is run at every step, and kept, in fp32 on the CPU.

    steps: of the run so far: guidance and predictions.
    """

    guidance: Guidance
    steps: list[StepGuidance] = field(default_factory=list)
    record: list[Predictions] = field(default_factory=list)

    @property
    def text(self) -> float:
        """Scale of the prompt, as Guidance has it."""
        return self.guidance.text

    def at_step(self, step: int, num_steps: int, latent_frames: int, use: ReferenceUse | None, timestep: float = 0.0) -> StepGuidance:
        now = self.guidance.at_step(step, num_steps, latent_frames, use, timestep)
        self.steps.append(now)
        passes = ("cond", "uncond") if use is None else ("cond", "uncond", "uncond_image")
        return RecordedStep(now.text, now.image, passes, now.reads_reference, now.of, record=self.record)

    def released_steps(self, steps: int) -> int:
        return steps


def interval_costs(points: Tensor, steps: Sequence[StepGuidance], predictions: Sequence[Predictions], latents: Tensor) -> Tensor:
    """[N, N + 1] fp64: at [a, b] the cost of holding step a up to step b, as a share of the finished latents' squared length; inf for b <= a.

    points: [N + 1] of the released run. steps, predictions: of its N steps. latents: [B, C, T, H, W] that it ended with.
    """
    strides, num_steps = (points[1:] - points[:-1]).tolist(), len(steps)
    costs = torch.full((num_steps, num_steps + 1), torch.inf, dtype=torch.float64)
    whole = latents.double().square().sum().item()
    guided = [_combined(now, one) for now, one in zip(steps, predictions, strict=True)]
    for first in range(num_steps):
        error = torch.zeros_like(guided[first])
        for step in range(first, num_steps):
            error += strides[step] * (guided[step] - _combined(steps[step], predictions[first]))
            costs[first, step + 1] = error.square().sum().item() / whole
    return costs


def best_steps(costs: Tensor, num_points: int) -> tuple[int, ...]:
    """The steps of the plan of so many points with the least sum of costs [N, N + 1]."""
    num_steps = costs.shape[0]
    num_points = min(num_points, num_steps)
    best = torch.full((num_steps + 1,), torch.inf, dtype=torch.float64)
    best[0] = 0.0
    came_from = []
    for _ in range(num_points):
        total = best[:num_steps, None] + costs  # [from, to]
        best, origin = total.min(dim=0)
        came_from.append(origin)
    steps, at = [], num_steps
    for origin in reversed(came_from):
        at = int(origin[at])
        steps.append(at)
    return tuple(reversed(steps))


def _combined(now: StepGuidance, predictions: Predictions) -> Tensor:
    """Predictions combined by a step's own scales, whichever passes it runs."""
    passes = tuple(predictions) if now.passes != ("cond",) else now.passes
    if isinstance(now.image, float) and now.image == 1.0:
        passes = passes[:2]
    return replace(now, passes=passes).combine(predictions)
