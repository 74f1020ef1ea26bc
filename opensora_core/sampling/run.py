"""The one loop from noise to latents, and the guided prediction that the library gives it. The host's sampler node runs the same loop."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor

from ..choices import AUTO, EXACT, SPEEDS
from ..errors import OpenSoraError, check_choice
from .given import NOTHING, Beside, Given, ImageCondition
from .guidance import Guidance, ReferenceUse
from .plan import Averaged
from .schedule import Flow, Process, Schedule, shifted_schedule
from .solvers import SOLVERS, Solver, StepNoise, noise

Side = dict[str, Tensor]


@dataclass(frozen=True)
class TextCondition:
    """Encoded prompt and negative prompt: tensors [B, ...] by the names under which the network's forward takes them."""

    positive: Side
    negative: Side


@dataclass(frozen=True)
class Conditions:
    """What the network of one run is told. text, condition: on any device; moved once to that of the latents.

    numbers: what some networks read besides, such as fps, or guidance of a distilled one; or a word of choices.py.
    """

    text: TextCondition
    condition: ImageCondition | None = None
    numbers: Mapping[str, float | str] = field(default_factory=dict)


@dataclass(frozen=True)
class StepReport:
    """What a callback is told after a step: step counts from 1."""

    step: int
    num_steps: int
    forwards_done: int
    forwards_saved: int  # against the released code's passes at every released step so far
    latents: Tensor


def beside(config, side: Side, given: Given, numbers: Mapping[str, float]) -> Side:
    """The named inputs of a pass that reads given frames beside the noise."""
    return {**side, "cond": given.cond}


def in_turn(names: Sequence[str], predict: Callable[[str], Tensor], like: Tensor) -> dict[str, Tensor]:
    """The predictions of a step's passes, one after another. like: a tensor of their form."""
    return {name: predict(name) for name in names}


@dataclass(frozen=True, kw_only=True)
class SamplingRecipe:
    """How a model is sampled; a family's row holds one.

    Attributes:
        process: what the network predicts.
        schedule: (config, latent extent [..., T, H, W], steps, shift or 0) -> Schedule. reads_size: it takes besides, as `size`, what a
            person asked for: frames, height and width in pixels.
        solvers: names in SOLVERS that it can be sampled with, its own first.
        given: (condition, noise, schedule, network's dtype) -> how given frames enter.
        inputs: (config, text of a side, given or NOTHING, numbers) -> what forward takes by name in one pass.
        guidance: (guidance asked for, solver) -> the one of this model, without what it does not know.
        noise: (shape of one video, seed, device, dtype) -> what its run begins with.
        makes_over: whether a clip that is given is made over as a whole, by the last steps, rather than gone on from.
        place: (latents, groups, references, loop) as masks.place; None where a model knows no mask strategies.
        use: how what is given is used where it enters at every step, from how a person asked for it; None where it does not.
        before: frames of noise that a picture's posterior takes of a run's stream before anything else; 0 = the posterior is not sampled.
        passes: of a step of the released code, which runs all of them; what is saved is counted against it.
        as_diffusers: the same as that library computes it, where it differs.
        each_pass: who computes the guidance passes of a step, as in_turn.
    """

    process: Process = Flow(+1)
    schedule: Callable[..., Schedule] = shifted_schedule
    solvers: tuple[str, ...] = ("euler",)
    given: Callable[[ImageCondition, Tensor, Schedule, torch.dtype], Given] = Beside
    inputs: Callable[..., Side] = beside
    guidance: Callable[[Guidance, str], Guidance] = lambda guidance, solver: guidance
    noise: Callable[..., Tensor] = noise
    makes_over: bool = False
    before: int = 0
    passes: int = 3
    as_diffusers: "SamplingRecipe | None" = None
    reads_size: bool = False
    place: Callable[..., tuple[Tensor, Tensor]] | None = None
    use: Callable[[ReferenceUse], ReferenceUse] | None = None
    each_pass: Callable[..., dict[str, Tensor]] = in_turn

    def way(self, config, extent, num_steps: int, shift: float = 0.0, size: tuple[int, int, int] | None = None) -> Schedule:
        """The schedule of a run; size: (frames, height, width) in pixels, None = what the latents decode to."""
        if not self.reads_size:
            return self.schedule(config, extent, num_steps, shift)
        return self.schedule(config, extent, num_steps, shift, size=size or config.grid.decoded(extent))

    def chosen(self, solver: str = AUTO, parity: bool = False) -> "SamplingRecipe":
        """The recipe of a run: its first solver is the one that is used. solver: a name, or auto. parity: as diffusers computes it."""
        recipe = self.as_diffusers if parity and self.as_diffusers else self
        if solver == AUTO:
            return recipe
        if solver not in self.solvers:
            raise OpenSoraError(f"solver={solver!r} is not one that this model is sampled with; use {' or '.join(self.solvers)}, or auto.")
        return replace(recipe, solvers=(solver,))

    def check_speed(self, speed: str) -> None:
        """Raise an OpenSoraError for a speed that is none, or that this model cannot be sampled at."""
        check_choice("speed", speed, SPEEDS)
        if speed != EXACT and not (isinstance(self.process, Flow) and self.solvers[0] == "euler"):
            raise OpenSoraError(
                f"speed={speed!r} joins steps of a rectified flow, and this model is sampled by another process; use speed {EXACT}."
            )


def run(
    predict: Callable[[Tensor, int], Tensor],
    x: Tensor,
    schedule: Schedule,
    process: Process,
    solver: Solver,
    given: Given = NOTHING,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """From noise to latents.

    Args:
        predict: (latents [B, C, T, H, W], step from 0) -> the guided prediction, of the same shape.
        x: noise; kept in its own dtype between steps.
        on_step: called with (steps done, latents) after each; raising from it stops the run.
    """
    for step in range(schedule.num_steps):
        x = given.before(x, step)
        x = solver(process, x, step, predict(x, step), schedule)
        x = given.after(x, step)
        if on_step is not None:
            on_step(step + 1, x)
    return given.finish(x)


def sample(
    recipe: SamplingRecipe,
    network,
    x: Tensor,
    schedule: Schedule,
    guidance: Guidance | Averaged,
    conditions: Conditions,
    on_step: Callable[[StepReport], None] | None = None,
    seeds: Sequence[int] = (),
) -> Tensor:
    """A guided run over a network. Passes run one after another, so that a step needs the activations of one.

    Args:
        network: forward(latents, timestep [B], **named inputs); its `dtype` is the one it is called in.
        x: noise [B, C, T, H, W]; kept in its own dtype (fp32 by default) between steps.
        seeds: of every video, for solvers that add noise.
    """
    device, dtype, condition = x.device, network.dtype, conditions.condition
    given = NOTHING
    if condition is not None:
        given = recipe.given(condition, x, schedule, dtype)
        given.draw = StepNoise(seeds, 1)
        given.is_read = lambda step: guidance.at_step(step, schedule.num_steps, x.shape[2], given.use).reads_reference
    text = {  # masks and whole numbers stay of their type
        side: {name: value.to(device, dtype if value.is_floating_point() else None) for name, value in told.items()}
        for side, told in vars(conditions.text).items()
    }
    done, held = 0, None

    @cache
    def inputs(side: str, reads: bool, is_blank: bool) -> Side:
        return recipe.inputs(network.config, text[side], given if reads else given.blank if is_blank else NOTHING, conditions.numbers)

    def predict(x: Tensor, step: int) -> Tensor:
        nonlocal done, held
        now = guidance.at_step(step, schedule.num_steps, x.shape[2], given.use, schedule.timesteps[step].item())
        timestep = schedule.timesteps[step].to(device).expand(x.shape[0])
        network_input = x.to(dtype)

        def velocity(name: str) -> Tensor:
            return network(network_input, timestep, **inputs(*now.reads(name), now.reads_reference)).to(x.dtype)

        predictions = recipe.each_pass(now.passes, velocity, x)
        done += len(now.passes)
        now.seen(predictions)
        held = now.image_difference(predictions, held)
        return now.combine(predictions, held)

    def report(step: int, x: Tensor) -> None:
        if on_step is not None:
            on_step(StepReport(step, schedule.num_steps, done, recipe.passes * guidance.released_steps(step) - done, x))

    return run(predict, x, schedule, recipe.process, SOLVERS[recipe.solvers[0]](seeds, recipe.before), given, report)
