"""One whole sampling run through the host's machinery: noise, schedule, guider, Euler, progress."""

import logging
import math
import time
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

from ...opensora_core.choices import AUTO, EXACT, GPU, torch_dtype
from ...opensora_core.errors import OpenSoraError
from ...opensora_core.families.table import family_of
from ...opensora_core.geometry import Grid
from ...opensora_core.run import plans
from ...opensora_core.sampling import ddpm, plan, run as sampling, schedule, solvers
from ...opensora_core.sampling.given import NOTHING, Given
from ...opensora_core.sampling.guidance import Guidance, ReferenceUse
from ...opensora_core.sampling.run import SamplingRecipe
from . import notice, paths
from .condition import reference_of
from .families import require_open_sora
from .guider import HELD_KEY, SPEED_KEY, OpenSoraGuider, check_latent
from .vae import CODECS_KEY


@dataclass(frozen=True)
class RunInputs:
    """What a run needs besides model and conditioning.

    shift: 0 = from the clip's size and length.
    noise_device: cpu (same noise for a seed on every machine) or gpu.
    latent_dtype: fp32, or bf16 as upstream keeps its latents between steps.
    speed: exact, or a plan, and then steps are not read.
    solver: of choices.SOLVERS; auto is the model's own.
    """

    seed: int
    steps: int
    shift: float
    noise_device: str
    latent_dtype: str
    speed: str
    solver: str = AUTO


def shifted(
    model, samples: Tensor, steps: int, shift: float, speed: str = EXACT, use: ReferenceUse | None = None
) -> tuple[Any, Tensor, str]:
    """A copy of the MODEL whose own sampling shift is the clip's, the clip's sigmas [steps + 1] (fp32, 1 to 0), and a line about its plan.

    speed: other than exact, the sigmas are a plan's and steps are not read. use: of what is given, for its plan.
    Raises OpenSoraError: another MODEL, a LATENT it cannot denoise, no steps, a shift that is negative or not finite, or no such speed.
    """
    config = require_open_sora(model)
    shape, family, line = check_latent(samples, config), family_of(config), ""
    recipe = family.sampling
    recipe.check_speed(speed)
    if hasattr(model.model, "sampling_of"):
        own, patched = model.model.sampling_of(shift), model.clone()
        patched.add_object_patch("model_sampling", own)
        way = recipe.schedule(config, shape, steps, shift)
        if use is not None and use.is_whole:
            family.check_given(["video"], use)
            way = schedule.last_steps(way, round(1 - use.strength, 6))
        return patched, torch.cat((own.sigmas[way.timesteps.long()], torch.zeros(1))), line
    if isinstance(recipe.process, ddpm.NoisePrediction):
        return model.clone(), recipe.schedule(config, shape, steps, shift).points, line
    if recipe.reads_size:
        half = float(recipe.way(config, shape, 2, shift).points[1])
        alpha = half / (1 - half)
    else:
        alpha = shift or schedule.latent_flow_shift(shape, config.patch_size)
    if speed != EXACT:
        chosen = plans.find(speed, None if shift else subject(model, shape, use), paths.plan_folders(), family.usual.num_steps)
        sigmas = chosen.schedule(recipe.way(config, shape, chosen.num_steps, shift)).points
        line = f"{chosen.words(speed).capitalize()}. Steps are as the plan has them."
    else:
        sigmas = recipe.way(config, shape, steps, shift).points
    patched = agreeing(model, comfy.model_sampling.ModelSamplingDiscreteFlow, shift=alpha)
    patched.set_attachments(SPEED_KEY, speed)
    return patched, sigmas, line


def subject(model, shape: tuple[int, ...], use: ReferenceUse | None) -> plans.Subject:
    """What identifies the plan for clips of this latent shape."""
    fingerprint = plan.fingerprint_of(model.model.diffusion_model.named_parameters())
    return plans.Subject.of(fingerprint, require_open_sora(model).grid, shape, use)


def agreeing(model, base: type, **options: float) -> Any:
    """A copy of the MODEL whose own sampling is the rectified flow with these options, for whatever asks it where in a run it is.

    base: one of the host's ways to shift sigmas, which takes the options.
    """
    own, patched = type("Sampling", (base, comfy.model_sampling.CONST), {})(model.model.model_config), model.clone()
    own.set_parameters(**options)
    patched.add_object_patch("model_sampling", own)
    return patched


def run(
    model, conditionings: tuple[list, list], latent: dict, guidance: Guidance, options: RunInputs, node_id: str | None, title: str = ""
) -> dict:
    """Make the clips of a LATENT from noise.

    conditionings: positive, negative.
    latent: the host's LATENT; its samples' shape counts, and a noise_mask if there is one.
    node_id: the node that shows progress.
    title: begins every line of it.
    Returns a LATENT with finished, unscaled VAE latents.
    Raises OpenSoraError: anything that does not fit together, before the model is used; or memory that ran out for good.
    """
    samples, reference = latent["samples"], reference_of(conditionings[0])
    use = None if reference is None else reference.use
    patched, sigmas, line = shifted(model, samples, options.steps, options.shift, options.speed, use)
    notice.show(line, node_id, notice.INFO)
    lines = _Lines(node_id, title)
    recipe = family_of(require_open_sora(model)).sampling.chosen(options.solver)
    guider = OpenSoraGuider(patched, *conditionings, guidance, lines.note, options.speed, recipe)
    shape = tuple(samples.shape)
    if (given := guider.reference or guider.made_over) is not None:
        given.check(shape)
    device = comfy.model_management.get_torch_device() if options.noise_device == GPU else torch.device("cpu")
    dtype = torch_dtype(options.latent_dtype)
    noise = _noise(recipe, patched.model.config.grid, shape, options.seed, (device, dtype))
    report = _progress(guider, sigmas, shape[2], lines)
    out = {key: value for key, value in latent.items() if not key.startswith("downscale_ratio")}
    made = walk(recipe, guider, noise, samples, sigmas, report, options.seed, latent.get("noise_mask"))
    return {**out, CODECS_KEY: guider.family.codecs, "samples": made}


def _noise(recipe: SamplingRecipe, grid: Grid, shape: tuple[int, ...], seed: int, place: tuple) -> Tensor:
    """What a run of [B, C, T, H, W] begins with: for a model with an order of its own, of each video what its seed gives, and with the latent
    frames that go in front."""
    if recipe.noise is solvers.noise:
        return solvers.noise(shape, seed, *place, comfy.model_management.throw_exception_if_processing_interrupted)
    videos, channels, frames, *size = shape
    one = (1, channels, frames + grid.lead_in(frames), *size)
    return torch.cat([recipe.noise(one, seed + video, *place) for video in range(videos)])


def walk(
    recipe: SamplingRecipe, guider, noise: Tensor, samples: Tensor, sigmas: Tensor, report: Callable, seed: int, mask: Tensor | None = None
) -> Tensor:
    """Finished, unscaled latents of a guider's run by the library's loop, in the dtype of the noise between steps. report: called after each."""
    # Frames in front are put there by the model's own noise_scaling; the loop knows their noise.
    own, is_quiet = noise[:, :, noise.shape[2] - samples.shape[2] :], not comfy.utils.PROGRESS_BAR_ENABLED
    finished = guider.sample(own, samples, own_sampler(recipe, noise), sigmas, mask, report, is_quiet, seed)
    return finished.to(comfy.model_management.intermediate_device())


class _Lines:
    """Lines of one run on its node: of 40 characters at most, so that none breaks inside a word; the last of the notes stands below."""

    def __init__(self, node_id: str | None, title: str):
        self.node_id, self.title, self.notes, self.began = node_id, title, [], time.monotonic()

    def note(self, line: str) -> None:
        self.notes.append(line)
        notice.show(line, self.node_id)

    def show(self, line: str, level: int) -> None:
        first = " ".join(filter(None, [self.title, line]))
        notice.show("\n".join([first, *self.notes[-1:]]), self.node_id, level)


def step_words(step: int, num_steps: int, seconds: float, passes: tuple[int, int, int]) -> str:
    """Where a run is, for a person.

    step: how many steps are done. seconds: they took. passes: done, of the whole run, and of one with three at every released step.
    """
    words, (done, total, naive) = _CHINESE if notice.language().startswith("zh") else _ENGLISH, passes

    def time_of(seconds: float) -> str:
        size, unit = next(one for one in zip((3600, 60, 1), words["units"], strict=True) if seconds >= 1.5 * one[0] or one[0] == 1)
        return f"{seconds / size:.0f}{unit}"

    if step < num_steps:
        return words["step"].format(step, num_steps, time_of(seconds / step * (num_steps - step)), done, total)
    return words["done"].format(time_of(seconds)) + words["saved"].format(naive - total) * (naive > total)


_ENGLISH = {
    "units": (" h", " min", " s"), "step": "Step {}/{}, {} left, {}/{} passes", "done": "Done in {}", "saved": ", {} passes saved",
}  # fmt: skip
_CHINESE = {"units": (" 小时", " 分钟", " 秒"), "step": "第 {}/{} 步,剩{},{}/{} 遍", "done": "{}完成", "saved": ",省去 {} 遍"}


def _progress(guider: OpenSoraGuider, sigmas: Tensor, latent_frames: int, lines: _Lines) -> Callable:
    """The host's progress bar and preview, and a line on the node that says how far it is."""
    num_steps = len(sigmas) - 1
    show = latent_preview.prepare_callback(guider.model_patcher, num_steps)
    done, naive = guider.forwards_after(sigmas, latent_frames)

    def callback(step: int, denoised: Tensor, x: Tensor, total_steps: int) -> None:
        show(step, denoised, x, total_steps)
        lines.show(step_words(step + 1, num_steps, time.monotonic() - lines.began, (done[step], done[-1], naive)), logging.DEBUG)

    logging.getLogger(__name__).info("Open-Sora: %d steps, %d forwards (all passes at every step would be %d)", num_steps, done[-1], naive)
    return callback


def _entering(recipe: SamplingRecipe, guider, x: Tensor, way: schedule.Schedule, seeds: list[int]) -> Given:
    """How given frames enter a run of noise x, of models where they do."""
    is_stepwise = getattr(guider, "is_stepwise", False)  # a guider of the host's is given nothing
    reference = guider.reference if is_stepwise else getattr(guider, "made_over", None)
    if reference is None:
        return NOTHING
    in_front = guider.model_patcher.model.config.grid.patch_time - 1
    condition = reference.condition(tuple(x[:, :, in_front:].shape), guider.model_patcher.model.process_latent_in)
    made = recipe.given(condition, x, way, torch.float32)
    made.draw = solvers.StepNoise(seeds, 1)
    guidance = guider.guidance_over(way.points)
    made.is_read = lambda step: guidance.at_step(step, way.num_steps, x.shape[2], guider.use).reads_reference
    return made


def _way(recipe: SamplingRecipe, guider, sigmas: Tensor) -> tuple[schedule.Schedule, list, Tensor | None]:
    """A run of the host's sigmas as the library's loop goes it: its schedule, the points of its steps as the process takes them, and the host's
    latents over the library's; None: they are the same."""
    own, scales = None if guider is None else guider.model_patcher.get_model_object("model_sampling"), (1 + sigmas**2).sqrt()
    if hasattr(own, "angles"):
        return schedule.Schedule(own.angles(sigmas), sigmas[:-1]), [math.atan(sigma) for sigma in sigmas.tolist()], scales
    if not isinstance(recipe.process, ddpm.NoisePrediction):
        return schedule.Schedule(sigmas.cpu(), 1000 * sigmas[:-1]), list(sigmas), None
    way = recipe.schedule(None, None, len(sigmas) - 1)
    if not torch.allclose(way.points, sigmas.cpu().float(), rtol=1e-4):
        raise OpenSoraError("Connect the sigmas of Open-Sora Scheduler: these are no whole run of this model, whose steps are its own.")
    return way, list(sigmas), scales


def own_sampler(recipe: SamplingRecipe, start: Tensor | None = None) -> comfy.samplers.KSAMPLER:
    """The library's loop as one of the host's samplers; noise of the steps is of the run's seed.

    start: the noise that the loop begins with, whose dtype latents have between steps; None = what the host gives it, in fp32.
    """
    process, solver = recipe.process, solvers.SOLVERS[recipe.solvers[0]]
    dtype, is_learned = torch.float32 if start is None else start.dtype, isinstance(process, ddpm.NoisePrediction)

    def sampler(model, noise: Tensor, sigmas: Tensor, extra_args=None, callback=None, disable=None) -> Tensor:
        """model: (x, sigma [B]) -> denoised latents in fp32, through guider and hooks."""
        args, guider = extra_args or {}, getattr(model, "inner_model", None)
        seeds = [args.get("seed", 0) + video for video in range(noise.shape[0])]
        way, points, scales = _way(recipe, guider, sigmas)

        def predict(latents: Tensor, step: int) -> Tensor:
            latents, sigma = latents.float(), sigmas[step]
            x = latents if scales is None else latents * scales[step]
            denoised = model(x, sigma * x.new_ones(x.shape[0]), **args)
            if callback is not None:
                callback({"x": x, "i": step, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
            made = process.prediction(latents, denoised, points[step])
            return (torch.cat((made, args["model_options"][HELD_KEY].variance), dim=1) if is_learned else made).to(dtype)

        with comfy.utils.model_trange(way.num_steps, disable=disable) as bar:
            x = noise.to(dtype) if scales is None else (noise / scales[0]).to(dtype) if start is None else start.to(noise.device)
            given = _entering(recipe, guider, x, way, seeds)
            return sampling.run(predict, x, way, process, solver(seeds), given, on_step=lambda *_: bar.update()).float()

    made = comfy.samplers.KSAMPLER(sampler)
    made.lets_frames_in = True
    return made
