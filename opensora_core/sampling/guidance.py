"""Text and image guidance: which passes a step needs, and how they combine.

Three predictions: `cond` (prompt, reference), `uncond` (negative, reference) and `uncond_image` (negative, no
reference). The reference runs all three at every step and combines them as
    uncond_image + g_image * (uncond - uncond_image) + g_text * (cond - uncond).
A pass whose weight is exactly zero is not run, and a video without a reference has uncond = uncond_image, so
that 50 steps at the defaults take 80 forwards (text to video) or 110 (image to video) in place of 150.
Source: hpcaitech/Open-Sora@7ad6a96a opensora/utils/sampling.py, I2VDenoiser.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import OpenSoraError

WARMUP_STEPS = 10  # steps before oscillation begins, whatever the number of steps


@dataclass(frozen=True)
class StepGuidance:
    """Guidance of one step.

    Attributes:
        text: scale of the prompt against the negative prompt; 1 is neutral.
        image: scale of the reference against none; 1 is neutral; a [1, 1, T, 1, 1] tensor where it grows along time.
        passes: the forwards this step needs, in the order the host expects.
    """

    text: float
    image: float | Tensor
    passes: tuple[str, ...]

    def combine(self, predictions: dict[str, Tensor]) -> Tensor:
        """Combine predictions ([B, C, T, H, W], velocity or denoised alike, since the weights sum to 1)."""
        cond = predictions["cond"]
        if self.passes == ("cond",):
            return cond
        uncond = predictions["uncond"]
        guided = uncond + self.text * (cond - uncond)
        if "uncond_image" in self.passes:
            guided = guided + self.image_excess(cond) * (uncond - predictions["uncond_image"])
        return guided

    def image_excess(self, like: Tensor) -> float | Tensor:
        """The image scale minus its neutral 1, on the device and in the dtype of `like`."""
        excess = self.image - 1
        return excess.to(like) if isinstance(excess, Tensor) else excess


@dataclass(frozen=True)
class Guidance:
    """Settings of a whole run; the defaults are the released configuration's.

    every_pass: run all three at every step, also those of no weight, as the reference does; for comparison.
    """

    text: float = 7.5
    image: float = 3.0
    text_oscillation: bool = True
    image_oscillation: bool = True
    temporal_ramp: bool = True
    every_pass: bool = False

    def __post_init__(self):
        for name in ("text", "image"):
            value, default = getattr(self, name), getattr(type(self), name)
            if not math.isfinite(value):
                raise OpenSoraError(f"{name}_guidance={value} is not a finite number; 1 is neutral, the default is {default}.")
            if value < 0:
                raise OpenSoraError(f"{name}_guidance={value} is negative; use 0 or more: 1 is neutral, the default is {default}.")

    def at_step(self, step: int, num_steps: int, latent_frames: int, has_image: bool) -> StepGuidance:
        """Guidance of step 0..num_steps-1.

        Args:
            latent_frames: T of the latent; the length of the temporal ramp.
            has_image: the video has a conditioned frame (else the image scale has no effect).
        """
        text = oscillate(self.text, step) if self.text_oscillation else self.text
        image: float | Tensor = oscillate(self.image, step) if self.image_oscillation else self.image
        if not self.every_pass and (not has_image or image == 1.0):
            return StepGuidance(text, 1.0, ("cond",) if text == 1.0 else ("cond", "uncond"))
        if has_image and self.temporal_ramp and image > 1.0:
            image = temporal_ramp(image, step, num_steps, latent_frames)
        return StepGuidance(text, image, ("cond", "uncond", "uncond_image"))


def oscillate(scale: float, step: int) -> float:
    """`scale` during warm-up and on even steps, 1 on odd ones."""
    return scale if step < WARMUP_STEPS or step % 2 == 0 else 1.0


def temporal_ramp(image_scale: float, step: int, num_steps: int, latent_frames: int) -> Tensor:
    """Image scale per latent frame: 1 at the first, at the last falling from image_scale towards 1 over the steps.

    Returns:
        [1, 1, T, 1, 1] fp32.
    """
    ceiling = torch.linspace(image_scale, 1.0, num_steps + 1)[step]
    return torch.linspace(1.0, float(ceiling), latent_frames).view(1, 1, -1, 1, 1)


def num_forwards(guidance: Guidance, num_steps: int, latent_frames: int, has_image: bool) -> int:
    """Transformer rows per batch item over a whole run; the naive count is 3 * num_steps."""
    steps = (guidance.at_step(i, num_steps, latent_frames, has_image) for i in range(num_steps))
    return sum(len(step.passes) for step in steps)
