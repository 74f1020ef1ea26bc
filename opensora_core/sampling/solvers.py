"""The Euler solver, and a whole guided run over a transformer, for use without a host.

In ComfyUI the host's own sampler runs the loop; both ask guidance.py what a step needs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import OpenSoraError
from .given import ImageCondition, restore
from .guidance import PICTURES, Guidance

MAX_SEED = 2**64 - 1


@dataclass(frozen=True)
class TextCondition:
    """Encoded prompt and negative prompt.

    Attributes:
        context, negative_context: T5 hidden states [B, 512, 4096].
        pooled, negative_pooled: CLIP pooled outputs [B, 768].
    """

    context: Tensor
    pooled: Tensor
    negative_context: Tensor
    negative_pooled: Tensor


@dataclass(frozen=True)
class StepReport:
    """What a callback is told after a step: step counts from 1."""

    step: int
    num_steps: int
    forwards_done: int
    forwards_saved: int  # against three passes at every step so far
    latents: Tensor


def noise(shape, seed: int, device="cpu", dtype=torch.float32) -> Tensor:
    """Standard normal noise from a fresh generator of `device`: on the CPU, the same for a seed on every machine.

    Raises:
        OpenSoraError: a seed outside 0..2**64-1.
    """
    if not 0 <= seed <= MAX_SEED:
        raise OpenSoraError(f"seed={seed} is out of range; use 0 to {MAX_SEED}.")
    generator = torch.Generator(device=device).manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, device=device, dtype=dtype)


def euler(
    velocity: Callable[[Tensor, Tensor, int], Tensor],
    latents: Tensor,
    sigmas: Tensor,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Integrate from sigmas[0] to sigmas[-1] with explicit Euler steps: x + (sigma_next - sigma) * v.

    Args:
        velocity: (latents [B, C, T, H, W], sigma as a 0-d tensor, step) -> velocity of the same shape.
        sigmas: [N + 1], fp32.
        on_step: called with (steps done, latents) after each; raising from it stops the run.
    """
    steps = sigmas.tolist()  # Python numbers: a bf16 latent is then scaled by an unrounded step, as in the reference
    for step in range(len(steps) - 1):
        latents = latents + (steps[step + 1] - steps[step]) * velocity(latents, sigmas[step], step)
        if on_step is not None:
            on_step(step + 1, latents)
    return latents


def sample(
    transformer,
    latents: Tensor,
    sigmas: Tensor,
    guidance: Guidance,
    text: TextCondition,
    condition: ImageCondition | None = None,
    on_step: Callable[[StepReport], None] | None = None,
) -> Tensor:
    """A guided run from noise to latents, reference frames restored where their use says so.

    Args:
        transformer: an MMDiT; its parameters' dtype is the dtype it is called in.
        latents: noise [B, C, T, H, W]; kept in its own dtype (fp32 by default) between steps.
        text, condition: on any device; moved once to that of `latents`.

    Passes run one after another, so that a step needs the activations of one.
    """
    device, dtype = latents.device, transformer.dtype
    num_steps, latent_frames = len(sigmas) - 1, latents.shape[2]
    use = PICTURES if condition is None else condition.use
    reference = None if condition is None else condition.packed_input().to(device, dtype)
    prompt = (text.context.to(device, dtype), text.pooled.to(device, dtype))
    negative = (text.negative_context.to(device, dtype), text.negative_pooled.to(device, dtype))
    with_reference = {"cond": (*prompt, reference), "uncond": (*negative, reference), "uncond_image": (*negative, None)}
    without = {"cond": (*prompt, None), "uncond": (*negative, None), "uncond_image": (*negative, None)}
    done = 0

    def velocity(x: Tensor, sigma: Tensor, step: int) -> Tensor:
        nonlocal done
        now = guidance.at_step(step, num_steps, latent_frames, condition is not None, use)
        inputs = with_reference if now.reads_reference else without
        timestep = sigma.to(device).expand(x.shape[0])
        network_input = x.to(dtype)
        predictions = {name: transformer(network_input, timestep, *inputs[name]).to(x.dtype) for name in now.passes}
        done += len(now.passes)
        return now.combine(predictions)

    def report(step: int, x: Tensor) -> None:
        if on_step is not None:
            on_step(StepReport(step, num_steps, done, 3 * step - done, x))

    return restore(euler(velocity, latents, sigmas, report), condition)
