"""One whole sampling run through the host's machinery: noise, schedule, guider, Euler, progress."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ...opensora_core.errors import check_choice
from ...opensora_core.run.request import LATENT_DTYPES, NOISE_DEVICES, SamplingOptions
from ...opensora_core.sampling import schedule, solvers as solver
from ...opensora_core.sampling.guidance import Guidance, num_forwards
from . import notice
from .guider import OpenSoraGuider, check_latent
from .model import require_open_sora


@dataclass(frozen=True)
class RunSettings:
    """What a run needs besides model and conditioning.

    Attributes:
        shift: 0 = from the clip's size and length.
        noise_device: cpu (same noise for a seed on every machine) or gpu.
        latent_dtype: fp32, or bf16 as the reference keeps its latents between steps.
    """

    seed: int
    steps: int
    shift: float = SamplingOptions.shift
    noise_device: str = SamplingOptions.noise_device
    latent_dtype: str = SamplingOptions.latent_dtype

    def __post_init__(self):
        check_choice("noise_device", self.noise_device, NOISE_DEVICES)
        check_choice("latent_dtype", self.latent_dtype, LATENT_DTYPES)


def shifted(model, samples: Tensor, steps: int, shift: float) -> tuple[Any, Tensor]:
    """A copy of the MODEL whose own sampling shift is the clip's, and the clip's sigmas [steps + 1] (fp32, 1 to 0).

    Raises:
        OpenSoraError: another MODEL, a LATENT it cannot denoise, no steps, or a shift that is negative or not finite.
    """
    config = require_open_sora(model)
    shape = check_latent(samples, config)
    alpha = shift if shift else schedule.latent_flow_shift(shape, config.patch_size)
    sigmas = schedule.sigmas(steps, alpha)

    class Sampling(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        """The host's rectified flow."""

    sampling = Sampling(model.model.model_config)
    sampling.set_parameters(shift=alpha)
    patched = model.clone()
    patched.add_object_patch("model_sampling", sampling)
    return patched, sigmas


def run(
    model,
    conditionings: tuple[list, list],
    latent: dict,
    guidance: Guidance,
    settings: RunSettings,
    node_id: str | None,
    title: str = "",
) -> dict:
    """Make the clips of a LATENT from noise.

    Args:
        conditionings: positive, negative.
        latent: the host's LATENT; its samples' shape counts, and a noise_mask if there is one.
        node_id: the node that shows progress.
        title: begins every line of it.

    Returns:
        A LATENT with finished, unscaled VAE latents.

    Raises:
        OpenSoraError: anything that does not fit together, before the model is used; or memory that ran out for good.
    """
    samples = latent["samples"]
    patched, sigmas = shifted(model, samples, settings.steps, settings.shift)
    notes: list[str] = []

    def report(line: str) -> None:
        notes.append(line)
        notice.show(line, node_id)

    guider = OpenSoraGuider(patched, *conditionings, guidance, report)
    shape = tuple(samples.shape)
    if guider.reference is not None:
        guider.reference.check(shape)
    device = comfy.model_management.get_torch_device() if settings.noise_device == "gpu" else torch.device("cpu")
    dtype = LATENT_DTYPES[settings.latent_dtype]
    noise = solver.noise(shape, settings.seed, device, dtype)
    sampler = comfy.samplers.sampler_object("euler") if dtype == torch.float32 else comfy.samplers.KSAMPLER(_euler_in_bf16)
    finished = guider.sample(
        noise,
        samples,
        sampler,
        sigmas,
        denoise_mask=latent.get("noise_mask"),
        callback=_progress(guider, settings.steps, shape[2], _Shown(node_id, title, notes)),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=settings.seed,
    )
    out = {key: value for key, value in latent.items() if not key.startswith("downscale_ratio")}
    out["samples"] = finished.to(comfy.model_management.intermediate_device())
    return out


@dataclass(frozen=True)
class _Shown:
    """Lines of one run on its node: each begins with the title and ends with the last of the notes."""

    node_id: str | None
    title: str
    notes: list[str]

    def show(self, line: str, level: int) -> None:
        notice.show(". ".join([*filter(None, [self.title]), line, *self.notes[-1:]]), self.node_id, level)


def _progress(guider: OpenSoraGuider, num_steps: int, latent_frames: int, shown: _Shown) -> Callable:
    """The host's progress bar and preview, and a line on the node that counts forwards."""
    show = latent_preview.prepare_callback(guider.model_patcher, num_steps)
    has_image = guider.reference is not None

    def callback(step: int, denoised: Tensor, x: Tensor, total_steps: int) -> None:
        show(step, denoised, x, total_steps)
        done = sum(len(guider.guidance.at_step(i, num_steps, latent_frames, has_image, guider.use).passes) for i in range(step + 1))
        saved = 3 * (step + 1) - done
        line = f"Step {step + 1} of {num_steps}: {done} forwards, {saved} of {3 * num_steps} saved"
        shown.show(line, logging.DEBUG)

    total = num_forwards(guider.guidance, num_steps, latent_frames, has_image, guider.use)
    shown.show(
        f"{num_steps} step{'s' * (num_steps > 1)}, {total} forwards (three passes at every step would be {3 * num_steps})", logging.INFO
    )
    return callback


def _euler_in_bf16(model, noise: Tensor, sigmas: Tensor, extra_args=None, callback=None, disable=None) -> Tensor:
    """Euler with the latents rounded to bf16 at every step, as the reference keeps them.

    Called by the host as one of its samplers: model(x, sigma [B]) gives denoised latents in fp32.
    """
    last: dict[str, Tensor] = {}

    def velocity(latents: Tensor, sigma: Tensor, step: int) -> Tensor:
        x = latents.float()
        last["denoised"] = model(x, sigma * x.new_ones(x.shape[0]), **(extra_args or {}))
        return ((x - last["denoised"]) / sigma).to(latents.dtype)

    def on_step(done: int, latents: Tensor) -> None:
        if callback is not None:
            sigma = sigmas[done - 1]
            callback({"x": latents.float(), "i": done - 1, "sigma": sigma, "sigma_hat": sigma, "denoised": last["denoised"]})

    return solver.euler(velocity, noise.to(torch.bfloat16), sigmas, on_step).float()
