"""Three-pass guidance inside the host's sampling loop.

The host's sampler asks the guider for one prediction per evaluation; which passes that takes, and how they
combine, is the core's to say (sampling/guidance.py). Nothing is kept on the guider between calls: the host
caches GUIDER objects and uses them again.
"""

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from types import SimpleNamespace

import comfy.model_management
import comfy.samplers
import torch
from torch import Tensor

from ...opensora_core.choices import EXACT
from ...opensora_core.errors import OpenSoraError
from ...opensora_core.ops import FUSED
from ...opensora_core.run.finite import is_finite, not_numbers
from ...opensora_core.sampling import ddpm
from ...opensora_core.sampling.given import Beside
from ...opensora_core.sampling.guidance import PASSES, PICTURES, Guidance, StepGuidance, tame
from ...opensora_core.sampling.plan import Averaged
from ...opensora_core.sampling.run import SamplingRecipe
from . import finite, kept, kernels, notice, preview, selftest
from .condition import BLANK_KEY, STEPS_KEY, check_conditioning, marked, not_its_steps, reference_of, with_reference, without_reference
from .families import family_of, require_open_sora
from .out_of_memory import RUN_KEY, Fallback, unless_out_of_memory
from .vae import latent_words

SPEED_KEY = "open_sora_speed"  # attachment of a MODEL from Open-Sora Scheduler: what its sigmas are of
HELD_KEY = "open_sora_held"  # in the model options of one run: what the reference changed when it was last computed
SIGMA_TOLERANCE = 1e-6  # two sigmas nearer than this are the same one after a trip through another dtype or device
UNCOND_IMAGE = "uncond_image"  # the third pass: negative prompt, no reference
# In place of the first two, at steps that do not read the reference: prompt or negative prompt, no reference.
COND_FREE, UNCOND_FREE = "cond_free", "uncond_free"


class OpenSoraGuider(selftest.base(comfy.samplers, "CFGGuider")):
    """Prompt against negative prompt, reference against none, and the given frames restored at the end.

    Args:
        model: an Open-Sora MODEL.
        positive, negative: CONDITIONING; a reference picture on the positive counts for the negative too.
        guidance: scales of the run.
        report: takes a line for people when memory runs out and the run goes on with less; None = shown on the node that samples.
        speed: other than exact, guidance is averaged over whatever sigmas it gets (sampling/plan.py).
        recipe: how the run is sampled; None = as the model's row says.

    Raises:
        OpenSoraError: another MODEL, conditioning that is not from T5 and CLIP-L, or a speed that the model has not.
    """

    def __init__(
        self,
        model,
        positive: list,
        negative: list,
        guidance: Guidance,
        report: Callable[[str], None] | None = None,
        speed: str = EXACT,
        recipe: SamplingRecipe | None = None,
    ):
        config, self.family = require_open_sora(model), family_of(model)
        self.speed, recipe = speed, recipe or self.family.sampling
        recipe.check_speed(speed)
        check_conditioning("positive", positive, config)
        check_conditioning("negative", negative, config)
        super().__init__(model)
        self.guidance = guidance = recipe.guidance(guidance, recipe.solvers[0])
        self.report = report or _show_where_it_runs
        self.set_cfg(guidance.text)
        self.reference, self.made_over = reference_of(positive), None
        if self.reference is not None and self.reference.use.is_whole:
            self.family.check_given(self.reference.names, self.reference.use)
            self.reference, self.made_over = None, self.reference
            positive, negative = without_reference(positive), without_reference(negative)
        conds = {"positive": positive, "negative": negative}
        self.use = None if self.reference is None else (recipe.use or (lambda use: use))(self.reference.use)
        self.is_stepwise = recipe.use is not None and self.reference is not None
        self.is_put_back = recipe.given is Beside
        self.is_learned = isinstance(recipe.process, ddpm.NoisePrediction)
        self.family.check_given([] if self.reference is None else self.reference.names, self.use or PICTURES)
        if self.reference is not None:
            conds["negative"] = with_reference(negative, self.reference, over=False)
        if self.reference is not None and not self.family.requires:
            conds[UNCOND_IMAGE] = without_reference(negative)
            if self.use.strength < 1:
                conds[COND_FREE], conds[UNCOND_FREE] = without_reference(positive), without_reference(negative)
        if self.is_stepwise:
            conds[UNCOND_IMAGE] = marked(conds["negative"], **{BLANK_KEY: True})
        if self.is_stepwise or self.is_learned:
            conds = {name: marked(cond, **{STEPS_KEY: True}) for name, cond in conds.items()}
        self.inner_set_conds(conds)

    def guidance_over(self, sample_sigmas: Tensor) -> Guidance | Averaged:
        """Guidance of a run of these sigmas; where it is averaged, over the steps that the released run would take with the model's own shift."""
        if self.speed == EXACT:
            return self.guidance
        num_steps, sampling = self.family.usual.num_steps, self.model_patcher.get_model_object("model_sampling")
        whole = [float(sampling.percent_to_sigma(step / num_steps)) for step in range(num_steps + 1)]
        return Averaged(self.guidance, whole, sample_sigmas.tolist())

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options=None, seed=None) -> Tensor:
        """The guided, denoised latents [B, C, T, H, W] of one evaluation, through the host's hooks."""
        options, model = model_options, self.inner_model
        sample_sigmas = options["transformer_options"]["sample_sigmas"]
        step, num_steps = step_index(timestep, sample_sigmas)
        told = float(self.model_patcher.get_model_object("model_sampling").timestep(timestep.max()))
        now = self.guidance_over(sample_sigmas).at_step(step, num_steps, x.shape[2], self.use, told)
        if now.holds_image and getattr(options.get(HELD_KEY), "image", None) is None:
            now = now.computed()  # nothing to hold yet, as where a run begins in the middle
        conds = self._conds_of(now, options)
        # Used outside `sample`, as by a test of one evaluation, there is no run to remember for.
        fallback = options.get(RUN_KEY) or Fallback(self.report)
        # A learned variance comes back beside the clean latents, in channels that go in empty: so the host joins and splits it as it does them.
        wide = torch.cat((x, torch.zeros_like(x)), dim=1) if self.is_learned else x

        def passes(arranged: list) -> list[Tensor]:
            if (replacement := options.get("sampler_calc_cond_batch_function")) is None:
                return comfy.samplers.calc_cond_batch(model, arranged, wide, timestep, options)
            return replacement({"conds": arranged, "input": wide, "sigma": timestep, "model": model, "model_options": options})

        predict = partial(fallback.predict, passes, conds, self.model_patcher, getattr(self, "loaded_models", []), options)
        given = predict()
        if not all(map(is_finite, given)) and is_finite(x) and fallback.widen(model):
            self.report("The network gave values that are not numbers in float16; from here on it computes in bfloat16.")
            given = predict()
        if self.is_learned:
            given, variances = zip(*(one.chunk(2, dim=1) for one in given), strict=True)
            given, held = list(given), options.get(HELD_KEY) or SimpleNamespace()
            held.variance = -variances[0] / timestep.reshape(-1, *[1] * (x.ndim - 1))
        guided = self._guided(given, conds, x, timestep, options, now)
        if not is_finite(guided):
            why = finite.cause(self.model_patcher, x, conds, given, options)
            sentence = not_numbers(f"Sampling, step {step + 1} of {num_steps},", model.get_dtype_inference(), why)
            raise OpenSoraError(f"{sentence} {kept.keep(model.process_latent_out(x), 'as they were before that step')}")
        return guided

    def _guided(self, predictions: list, conds: list, x: Tensor, timestep: Tensor, options: dict, now: StepGuidance) -> Tensor:
        """The passes combined, with the host's hooks on the way."""
        model, third = self.inner_model, predictions[2] if len(conds) > 2 else None
        for hook in options.get("sampler_pre_cfg_function", []):
            predictions = hook(
                {
                    "conds": conds, "conds_out": predictions, "cond_scale": now.text, "timestep": timestep,
                    "input": x, "sigma": timestep, "model": model, "model_options": options,
                }
            )  # fmt: skip
        cond, uncond = predictions[:2]
        guided = comfy.samplers.cfg_function(
            model, cond, uncond, now.text, x, timestep, model_options=options, cond=conds[0], uncond=conds[1]
        )  # fmt: skip
        sigma = timestep.reshape(-1, *[1] * (x.ndim - 1))
        if channels := now.of.channels:
            guided = torch.cat((guided[:, :channels], cond[:, channels:]), dim=1)
        if now.of.tames and not now.reads_reference and uncond is not None:
            guided = x - sigma * tame((x - guided) / sigma, (x - cond) / sigma)  # spreads are of velocities
        if now.record is not None:  # as velocities, of which the host made denoised latents
            now.seen({name: (x - denoised) / sigma for name, denoised in zip(PASSES, predictions, strict=False)})
        if third is None and not now.holds_image:
            return guided
        held = options.get(HELD_KEY)
        if third is None:
            difference = held.image * sigma
        else:
            difference = uncond - (predictions[2] if len(predictions) > 2 else third)
            if held is not None:
                held.image = difference / sigma  # as of velocities, which sigma does not scale
        # The host's combination has the text term; this is the image term of the core's formula (StepGuidance.combine).
        return guided + now.image_excess(x) * difference

    def sample(self, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, disable_pbar=False, seed=None):
        """The host's sampling run; the given frames replace the result's where it went all the way to sigma 0.

        Raises:
            OpenSoraError: memory ran out and running with less did not help; the models are then off the device, as after any such end.
        """
        if self.reference is not None:
            self.reference.check(tuple(latent_image.shape))
        if (self.is_stepwise or self.made_over or self.is_learned) and not getattr(sampler, "lets_frames_in", False):
            raise not_its_steps(self.family.title, self.is_learned)
        self._say_speed(sigmas, latent_image.shape[2])
        fallback, run = Fallback(self.report), super().sample
        callback = preview.watching(self.model_patcher, callback)
        # Afterwards the guider is as it was, also where the host leaves a failed run's tensors on it.
        options, names = self.model_options, set(vars(self))
        self.model_options = {**options, RUN_KEY: fallback, HELD_KEY: SimpleNamespace()}
        if self.speed != EXACT and (layers := kernels.fused(self.model_patcher.load_device, options)) is not None:
            self.model_options["transformer_options"] = {**options.get("transformer_options", {}), FUSED: layers}
        try:
            samples = unless_out_of_memory(lambda: run(noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed))
        finally:
            fallback.end()
            self.model_options = options
            for name in set(vars(self)) - names:
                delattr(self, name)
        if samples is None:
            sentence = fallback.failure(tuple(latent_image.shape), self.model_patcher)
            comfy.model_management.unload_all_models()
            raise OpenSoraError(sentence)
        # A run that stops earlier is continued by another, which needs its noise everywhere.
        finished = len(sigmas) > 0 and float(sigmas[-1]) == 0.0
        return self.reference.restore(samples) if self.reference is not None and finished and self.is_put_back else samples

    def _say_speed(self, sigmas: Tensor, latent_frames: int) -> None:
        """What a plan comes to, and where sigmas and guider are of two speeds."""
        of_sigmas = self.model_patcher.get_attachment(SPEED_KEY)
        if of_sigmas not in (None, self.speed):
            self.report(
                f"Open-Sora Scheduler is set to speed {of_sigmas} and the guider to {self.speed}: the video is neither's; set both the same."
            )
        if self.speed != EXACT and len(sigmas) > 1 and self.report is _show_where_it_runs:  # else whoever reports counts them too
            (*_, forwards), released = self.forwards_after(sigmas, latent_frames)
            line = f"Speed {self.speed}: {len(sigmas) - 1} steps, {forwards} forwards, {released - forwards} of {released} saved"
            notice.show(line, notice.executing_node(), notice.INFO)

    def forwards_after(self, sigmas: Tensor, latent_frames: int) -> tuple[list[int], int]:
        """Transformer rows per batch item up to the end of each step, and those of the released run that these steps stand for."""
        guidance, num_steps = self.guidance_over(sigmas), len(sigmas) - 1
        steps = [guidance.at_step(step, num_steps, latent_frames, self.use).passes for step in range(num_steps)]
        negative = reads_negative(self.model_options)
        forwards = accumulate(len(passes) + (negative and "uncond" not in passes) for passes in steps)
        return list(forwards), self.family.sampling.passes * guidance.released_steps(num_steps)

    def _conds_of(self, now: StepGuidance, options: dict) -> list:
        """The passes in the host's order: positive, negative (None: not run), and without reference if it is needed."""
        uncond = "uncond" in now.passes or reads_negative(options)
        is_free = self.reference is not None and not now.reads_reference
        positive, negative = (COND_FREE, UNCOND_FREE) if is_free else ("positive", "negative")
        conds = [self.conds[positive], self.conds[negative] if uncond else None]
        return [*conds, self.conds[UNCOND_IMAGE]] if "uncond_image" in now.passes else conds


def reads_negative(options: dict) -> bool:
    """Whether a MODEL's options ask for the negative pass at steps of scale 1 too: by the host's own word, or by a function that combines
    the passes (PerpNeg, APG, TCFG, FreSca). Such a one would find zeros in its place, which the host has at scale 1 alone, of a whole run."""
    return any(options.get(name) for name in ("disable_cfg1_optimization", "sampler_cfg_function", "sampler_pre_cfg_function"))


def step_index(sigma: Tensor, sample_sigmas: Tensor) -> tuple[int, int]:
    """(step, number of steps): the last step that begins at or above this sigma, for solvers that evaluate between steps too."""
    now, schedule = float(sigma.max()), sample_sigmas.tolist()
    num_steps = max(1, len(schedule) - 1)
    begun = sum(1 for start in schedule[:num_steps] if start >= now - SIGMA_TOLERANCE)
    return max(0, begun - 1), num_steps


def _show_where_it_runs(line: str) -> None:
    notice.show(line, notice.executing_node())


def check_latent(samples: Tensor, config) -> tuple[int, ...]:
    """Shape [B, C, T, H, W] of a LATENT that this transformer can denoise.

    Raises:
        OpenSoraError: another rank or number of channels, or sides that are no whole patches.
    """
    shape = tuple(samples.shape)
    if getattr(samples, "is_nested", False) or len(shape) != 5 or shape[1] != config.in_channels or 0 in shape:
        raise OpenSoraError(
            f"Connect another LATENT. This LATENT is {list(shape)}; this model denoises {latent_words(config.grid, config.in_channels)}."
        )
    if config.grid.size_multiple > 1 and any(side % config.patch_size for side in shape[3:]):
        raise OpenSoraError(
            f"This LATENT is {shape[3] * config.grid.space}x{shape[4] * config.grid.space} pixels (height x width); use multiples of "
            f"{config.grid.size_multiple}."
        )
    return shape
