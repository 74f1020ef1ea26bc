"""The stage sampling: from noise, a prompt and references to finished latents."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..choices import DIFFUSERS, EXACT, GPU, torch_dtype
from ..errors import OpenSoraError
from ..families.table import family_of
from ..family import NetworkSizes
from ..sampling import plan
from ..sampling.given import ImageCondition
from ..sampling.guidance import Guidance, ReferenceUse
from ..sampling.run import Conditions, SamplingRecipe, StepReport, TextCondition, sample
from ..sampling.schedule import Schedule
from . import plans
from .parts import Networks
from .ran_out import sampling_ran_out, with_less
from .request import EncodedPrompt, GenerationRequest
from .shared import SAMPLE, on_cpu, shared_out

logger = logging.getLogger(__name__)


def sample_latents(
    networks: Networks,
    request: GenerationRequest,
    prompt: EncodedPrompt,
    condition: ImageCondition | None,
    on_step: Callable[[StepReport], None],
    then_decode: bool = False,
) -> tuple[Tensor, list[str]]:
    """([B, C, T, H, W] fp32 on the CPU in the transformer's scale, lines a person should see).

    prompt: in place of the request's; every video of the request is made of it. condition: from encode_references.
    then_decode: the VAE works next; its weights set out for the device as the last step begins.
    Raises an OutOfMemory where the device has no room in any way that the offload mode permits, an OpenSoraError for values that are not numbers.
    """
    placement, said, group = networks.placement, [], networks.group
    if group is not None:
        group.order(SAMPLE, request, prompt, on_cpu(condition))

    def work(transformer) -> Tensor:
        options, config = request.options, transformer.config
        family = family_of(config)
        recipe = family.sampling.chosen(options.solver, options.parity == DIFFUSERS)
        frames, *size = request.latent_extent
        lead = config.grid.lead_in(frames)
        shape = (1, config.in_channels, lead + frames, *size)
        use = None if condition is None else condition.use
        schedule, guidance, said[:] = way(networks, request, recipe, config, shape, use)
        told = conditions(request, _repeated(prompt.condition, request.num_videos), condition, family.usual.fps)
        start = _noise(request, shape, placement.device, recipe.noise)
        with _vae_ahead(networks, on_step) if then_decode else nullcontext(on_step) as each_step:
            if group is None:
                latents = sample(recipe, transformer, start, schedule, guidance, told, each_step, request.seeds)
            else:
                passes = [len(guidance.at_step(step, schedule.num_steps, shape[2], use).passes) for step in range(schedule.num_steps)]
                with shared_out(networks, transformer, passes, sampling_ran_out(request, placement)) as shares:
                    recipe = replace(recipe, each_pass=shares.passes)
                    latents = sample(recipe, transformer, start, schedule, guidance, told, each_step, request.seeds)
                said.append(shares.words(schedule.num_steps))
                logger.warning("%s", said[-1])
            return finished(latents[:, :, lead:], placement.dtype)

    beside_bytes = networks.needs.beside_transformer(request)
    say = partial(sampling_ran_out, request, placement)
    latents, notes = with_less(networks.transformer, placement, work, beside_bytes, ("sampling", "the transformer"), say)
    return latents, said + notes


@contextmanager
def _vae_ahead(networks: Networks, on_step: Callable[[StepReport], None]) -> Iterator[Callable[[StepReport], None]]:
    num_bytes = networks.needs.vae_weights()  # read now: a file that is gone by the last step must not cost the steps before it

    def each_step(report: StepReport) -> None:
        on_step(report)
        if report.step == report.num_steps - 1:
            networks.vae.set_out(num_bytes)

    try:
        yield each_step
    except BaseException:
        networks.vae.call_back()
        raise


def conditions(request: GenerationRequest, text: TextCondition, condition: ImageCondition | None, usual_fps: float) -> Conditions:
    """What the network of a request's run is told."""
    if condition is not None and not request.options.sdedit:
        condition = replace(condition, use=replace(condition.use, is_renoised=False))
    numbers = {name: getattr(request, name) for name in ("num_frames", "height", "width")}
    own = {"fps": request.options.fps or usual_fps, "condition_scale": request.options.condition_scale}
    return Conditions(text, condition, numbers | own)


def way(
    networks: Networks,
    request: GenerationRequest,
    recipe: SamplingRecipe,
    config: NetworkSizes,
    shape: tuple[int, ...],
    use: ReferenceUse | None,
) -> tuple[Schedule, Guidance | plan.Averaged, list[str]]:
    """The points of a run, its guidance, and what a person should know of its plan, if it has one. shape: of the run's latents."""
    shift, guidance = request.options.shift, recipe.guidance(request.guidance, recipe.solvers[0])
    if request.speed == EXACT:
        schedule = recipe.way(config, shape, request.num_steps, shift, (request.num_frames, request.height, request.width))
        return schedule if use is None else recipe.cut(schedule, use), guidance, []
    subject = plans.Subject(networks.fingerprint, plan.mode_of(use), (request.height, request.width), request.num_frames)
    chosen = plans.find(request.speed, None if shift else subject, networks.plan_folders, family_of(config).usual.num_steps)
    whole = recipe.schedule(config, shape, chosen.num_steps, shift)
    return *plan.planned(guidance, whole, chosen), [chosen.words(request.speed)]


def finished(latents: Tensor, dtype: torch.dtype, who: str = "The transformer") -> Tensor:
    """Latents on the CPU in fp32; an OpenSoraError if they are not numbers. dtype: of the network that made them."""
    if not torch.isfinite(latents).all():
        raise OpenSoraError(f"{who} gave values that are not numbers (in {dtype}); try fp32, or check the file with inspect.")
    return latents.float().cpu()


def _noise(request: GenerationRequest, shape: tuple[int, ...], device: torch.device, noise: Callable[..., Tensor]) -> Tensor:
    """[B, C, T, H, W] on the device, in the dtype that latents have between steps: what was given, or of every video what its seed gives alone."""
    options = request.options
    if request.noise is not None:
        return request.noise.to(device, torch_dtype(options.latent_dtype))
    source = device if options.noise_device == GPU else torch.device("cpu")
    return torch.cat([noise(shape, seed, source, torch_dtype(options.latent_dtype)) for seed in request.seeds]).to(device)


def _repeated(text: TextCondition, count: int) -> TextCondition:
    sides = vars(text).items()
    return TextCondition(**{side: {name: part.expand(count, *part.shape[1:]) for name, part in parts.items()} for side, parts in sides})


def do_share(networks: Networks) -> None:
    """The work of a process that is not the first of its group: its share of all that the first orders, until that ends."""
    for work, told in networks.group.orders():
        if work == SAMPLE:
            sample_latents(networks, *told, lambda report: None)
        else:
            networks.video_vae.decode_own_tiles(*told)
