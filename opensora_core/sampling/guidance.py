"""Text and image guidance: which passes a step needs, and how they combine.

Three predictions: `cond` (prompt, reference), `uncond` (negative, reference) and `uncond_image` (negative, no
reference). Upstream runs all three at every step and combines them as
    uncond_image + g_image * (uncond - uncond_image) + g_text * (cond - uncond).
A pass whose weight is exactly zero is not run, and a video without a reference has uncond = uncond_image, so
that 50 steps at the defaults take 80 forwards (text to video) or 110 (image to video) in place of 150.
Source: hpcaitech/Open-Sora@7ad6a96a opensora/utils/sampling.py, I2VDenoiser.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..choices import AUTO, BY_INDEX, CONSTANT, CURVES
from ..errors import OpenSoraError, check_choice

PASSES = ("cond", "uncond", "uncond_image")
WARMUP_STEPS = 10  # steps before oscillation begins, whatever the number of steps


@dataclass(frozen=True)
class ReferenceUse:
    """How a run uses what it was given to begin or end with.

    Attributes:
        is_clip: the reference is a clip, not pictures: no temporal ramp, and its frames are not put back at the end.
            Source: hpcaitech/Open-Sora@7ad6a96a opensora/utils/sampling.py, prepare_api (the v2v modes).
        strength: 0..1, how closely the video holds to the reference: the share of the steps, counted from the first (the
            noisiest), whose passes read it. Later steps are text to video, so that the video may move away from what the
            first ones laid out; the network sees only what it was trained on, a whole reference or none. 1: every step, the
            reference exactly. Below 1 the given frames are not put back at the end; 0 is text to video, number for number.
        is_whole: the reference is a whole clip, which is made over in the last 1 - strength of the steps.
        is_renoised: of 1.3: every step begins with what is given at that step's noise (SDEdit).
        is_held: the run itself keeps what is given, until its noise has fallen so far, and no pass is without it.
    """

    is_clip: bool = False
    strength: float = 1.0
    is_whole: bool = False
    is_held: bool = False
    is_renoised: bool = True

    def __post_init__(self):
        if not 0 <= self.strength <= 1:
            raise OpenSoraError(
                f"strength={self.strength} is not between 0 and 1; use 0 (the reference is not used) to 1 (held to exactly)."
            )

    @property
    def is_restored(self) -> bool:
        """Whether the given frames replace the result's after the last step."""
        return not self.is_clip and not self.is_held and self.strength == 1

    def num_steps(self, num_steps: int) -> int:
        """How many of the steps, from the first, read the reference: at least one unless the strength is 0."""
        return math.ceil(round(self.strength * num_steps, 6))  # 0.07 * 100 is 7.000000000000001


PICTURES = ReferenceUse()


@dataclass(frozen=True)
class StepGuidance:
    """Guidance of one step.

    Attributes:
        text: scale of the prompt against the negative prompt; 1 is neutral.
        image: scale of the reference against none; 1 is neutral; a [1, 1, T, 1, 1] tensor where it grows along time.
        passes: the forwards this step needs, in the order the host expects.
        reads_reference: whether `cond` and `uncond` get the reference at this step; `uncond_image` never does.
        of: the run's.
        holds_image: what the reference changes is taken as it was at the last step that ran `uncond_image` (plan.py).
        record: where its predictions are kept, of a run that is recorded (plan.Recorder).
    """

    text: float
    image: float | Tensor
    passes: tuple[str, ...]
    reads_reference: bool = True
    of: "Guidance | None" = None
    holds_image: bool = False
    record: list | None = None

    def reads(self, name: str) -> tuple[str, bool]:
        """What a pass is told: (positive or negative text, whether it reads the reference)."""
        return "positive" if name == "cond" else "negative", self.reads_reference and name != "uncond_image"

    def computed(self) -> "StepGuidance":
        """This guidance with the pass computed that it would hold."""
        return replace(self, passes=PASSES, holds_image=False)

    def seen(self, predictions: dict[str, Tensor]) -> None:
        """Told of the velocities of its passes before they are combined."""
        if self.record is not None:
            self.record.append({name: value.float().cpu() for name, value in predictions.items()})

    def combine(self, predictions: dict[str, Tensor], held: Tensor | None = None) -> Tensor:
        """Combine predictions ([B, C, T, H, W], velocity or denoised alike, since the weights sum to 1).

        held: `image_difference` of the last step that ran `uncond_image`, for a step that holds it.
        """
        cond = predictions["cond"]
        if self.passes == ("cond",):
            return cond
        uncond = predictions["uncond"]
        guided = uncond + self.text * (cond - uncond)
        difference = self.image_difference(predictions, held)
        if difference is not None:
            guided = guided + self.image_excess(cond) * difference
        return guided if self.of is None else self.of.finish(guided, cond, self.reads_reference)

    def image_difference(self, predictions: dict[str, Tensor], held: Tensor | None = None) -> Tensor | None:
        """What the reference changes, of this step or as it was held; None where the step does not guide by it."""
        if "uncond_image" in self.passes:
            return predictions["uncond"] - predictions["uncond_image"]
        return held if self.holds_image else None

    def image_excess(self, like: Tensor) -> float | Tensor:
        """The image scale minus its neutral 1, on the device and in the dtype of `like`."""
        excess = self.image - 1
        return excess.to(like) if isinstance(excess, Tensor) else excess


@dataclass(frozen=True)
class Guidance:
    """Settings of a whole run; the defaults are the released configuration's.

    every_pass: run all three at every step, also those of no weight, as upstream does; for comparison.
    curve: how the text scale goes over the steps, see curved_scale; auto is constant, unless the model knows better.
    channels: how many of a prediction's are guided, the others being those of the prompt alone; 0 = all.
    tames: scale guided predictions of a video of which nothing is given towards the spread of those with the prompt alone (`tame`).
    ramp: of the image scale along time.
    """

    text: float = 7.5
    image: float = 3.0
    text_oscillation: bool = True
    image_oscillation: bool = True
    temporal_ramp: bool = True
    every_pass: bool = False
    curve: str = AUTO
    channels: int = 0
    tames: bool = False
    ramp: Callable[[float, int, int, int], Tensor] | None = None

    def __post_init__(self):
        check_choice("guidance_curve", self.curve, CURVES)
        for name in ("text", "image"):
            value, default = getattr(self, name), getattr(type(self), name)
            if not math.isfinite(value):
                raise OpenSoraError(
                    f"{name}_guidance={value} is not a finite number; use 0 or more: 1 is neutral, the default is {default}."
                )
            if value < 0:
                raise OpenSoraError(f"{name}_guidance={value} is negative; use 0 or more: 1 is neutral, the default is {default}.")

    def at_step(self, step: int, num_steps: int, latent_frames: int, use: ReferenceUse | None, timestep: float = 0.0) -> StepGuidance:
        """Guidance of step 0..num_steps-1.

        latent_frames: T of the latent; the length of the temporal ramp. timestep: what the network is told, of which the released curve is a function.
        use: how the run uses what it is given; None = nothing is given, and the image scale has no effect.
        """
        reads = use is not None and step < use.num_steps(num_steps)
        has_image = reads and not use.is_held
        text = oscillate(self.text, step) if self.text_oscillation else self.text
        if self.curve not in (AUTO, CONSTANT):
            text = curved_scale(text, step if self.curve == BY_INDEX else num_steps - timestep, num_steps)
        image: float | Tensor = oscillate(self.image, step) if self.image_oscillation else self.image
        if not self.every_pass and (not has_image or image == 1.0):
            return StepGuidance(text, 1.0, PASSES[:1] if text == 1.0 else PASSES[:2], reads, self)
        if has_image and self.temporal_ramp and not use.is_clip and image > 1.0:
            image = (self.ramp or temporal_ramp)(image, step, num_steps, latent_frames)
        return StepGuidance(text, image, PASSES, reads, self)

    def finish(self, guided: Tensor, cond: Tensor, reads_reference: bool) -> Tensor:
        """What becomes of guided predictions besides."""
        if self.tames and not reads_reference:
            guided = tame(guided, cond)
        return torch.cat((guided[:, : self.channels], cond[:, self.channels :]), dim=1) if self.channels else guided

    def released_steps(self, steps: int) -> int:
        """How many steps of the released run so many steps stand for."""
        return steps


ONE_PASS = Guidance(text=1.0, image=1.0)  # of a network that needs no negative prompt


def oscillate(scale: float, step: int) -> float:
    """`scale` during warm-up and on even steps, 1 on odd ones."""
    return scale if step < WARMUP_STEPS or step % 2 == 0 else 1.0


def curved_scale(scale: float, place: float, num_steps: int) -> float:
    """CogVideoX's dynamic guidance: 1 + scale * (1 - cos(pi * (place / N)**5)) / 2.

    Args:
        place: N minus the timestep of training, as the published code has it: irregular, since that runs to 999. With the number of the
            step, which the formula means, it is a ramp from 1 to nearly 1 + scale.

    Source: huggingface/diffusers@58eb52c0 pipelines/cogvideo/pipeline_cogvideox.py.
    """
    return 1 + scale * (1 - math.cos(math.pi * (place / num_steps) ** 5)) / 2


def tame(guided: Tensor, cond: Tensor) -> Tensor:
    """1.3's flaw fix: guided predictions are scaled 0.7 of the way to the spread of those with the prompt alone. [B, ...] both."""
    over = tuple(range(1, guided.ndim))
    return guided * (0.7 * cond.std(over, keepdim=True) / guided.std(over, keepdim=True) + 0.3)


def temporal_ramp(image_scale: float, step: int, num_steps: int, latent_frames: int) -> Tensor:
    """Image scale per latent frame, [1, 1, T, 1, 1] fp32: 1 at the first, at the last falling from image_scale towards 1 over the steps."""
    ceiling = torch.linspace(image_scale, 1.0, num_steps + 1)[step]
    return torch.linspace(1.0, float(ceiling), latent_frames).view(1, 1, -1, 1, 1)


def num_forwards(guidance: Guidance, num_steps: int, latent_frames: int, use: ReferenceUse | None) -> int:
    """Transformer rows per batch item over a whole run; the naive count is 3 * num_steps."""
    return sum(len(guidance.at_step(step, num_steps, latent_frames, use).passes) for step in range(num_steps))
