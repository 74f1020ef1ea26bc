"""The stage sampling: from noise, a prompt and references to finished latents, by one process or by a group that shares every step."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..choices import DIFFUSERS, EXACT, GPU, torch_dtype
from ..errors import OpenSoraError
from ..families.table import family_of
from ..family import NetworkSizes
from ..memory.device import is_out_of_memory
from ..memory.footprint import sizes_of_files
from ..parallel import groups_for
from ..sampling import plan
from ..sampling.given import ImageCondition
from ..sampling.guidance import Guidance, ReferenceUse
from ..sampling.run import Conditions, SamplingRecipe, StepReport, TextCondition, sample
from ..sampling.schedule import Schedule, last_steps
from . import plans
from .files import ModelFiles
from .needs import beside_transformer, vae_bytes
from .parts import Networks
from .ran_out import sampling_ran_out, with_less
from .request import EncodedPrompt, GenerationRequest

logger = logging.getLogger(__name__)

_SAMPLE = "sample"


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
    placement, said, say = networks.placement, [], partial(sampling_ran_out, request, networks.placement)
    if networks.group is not None:
        given = condition and {name: value.cpu() for name, value in vars(condition).items() if isinstance(value, Tensor)}
        networks.group.order(_SAMPLE, request, prompt, condition and replace(condition, **given))

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
        passes = (len(guidance.at_step(step, schedule.num_steps, shape[2], use).passes) for step in range(schedule.num_steps))
        with _vae_ahead(networks, on_step, then_decode) as each_step:
            with _shared_out(networks, transformer, recipe, passes, say, said) as shared:
                latents = sample(shared, transformer, start, schedule, guidance, told, each_step, request.seeds)
            return finished(latents[:, :, lead:], placement.dtype)

    beside_bytes = beside_transformer(networks, request)
    latents, notes = with_less(networks.transformer, placement, work, beside_bytes, ("sampling", "the transformer"), say)
    return latents, said + notes


@contextmanager
def _vae_ahead(networks: Networks, on_step: Callable[[StepReport], None], then_decode: bool) -> Iterator[Callable[[StepReport], None]]:
    # Read now: a file that is gone by the last step must not cost the steps before it.
    num_bytes = vae_bytes(networks) if then_decode else 0

    def each_step(report: StepReport) -> None:
        on_step(report)
        if then_decode and report.step == report.num_steps - 1:
            networks.vae.set_out(num_bytes)

    try:
        yield each_step
    except BaseException:
        networks.vae.call_back()
        raise


def check_size(files: ModelFiles, size: int) -> None:
    """Raise an OpenSoraError if no run of a model can be shared out over so many processes. No weight is read."""
    config = sizes_of_files(files.dit).transformer
    groups_for([1 + len(family_of(config).usual.scales)], _heads(config), size)


@contextmanager
def _shared_out(
    networks: Networks, transformer: nn.Module, recipe: SamplingRecipe, passes: Iterable[int], say: Callable[[], str], said: list[str]
) -> Iterator[SamplingRecipe]:
    """The recipe by which a group makes a run, of each step of which the transformer then computes its part; as it is for one process alone.

    passes: of each step. say: gives the sentence where memory runs out: another way of computing would have to be begun by all processes, so
    that this ends all. said: takes a line for people.
    """
    group = networks.group
    if group is None:
        yield recipe
        return
    passes, sentence, heads = list(passes), say(), _heads(transformer.config)
    shares = group.shares(passes, heads)
    if heads > 1:
        transformer.tokens = shares
        for block in transformer.blocks():
            block.attention = shares.attention(networks.attention)
    try:
        yield replace(recipe, each_pass=shares.passes)
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error) and not isinstance(error, OpenSoraError):
            raise OpenSoraError(f"Process {group.rank} of {group.size}: {sentence}") from error
        raise
    said.append(shares.words(len(passes)))
    logger.warning("%s", said[-1])


def _heads(config: Any) -> int:
    """Attention heads of a network whose tokens can be shared out (ops.AllTokens); 1 of others."""
    return config.num_heads if hasattr(family_of(config).build, "tokens") else 1


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
    size = (request.num_frames, request.height, request.width)
    if request.speed == EXACT:
        schedule = recipe.way(config, shape, request.num_steps, shift, size)
        schedule = last_steps(schedule, round(1 - use.strength, 6)) if use is not None and use.is_whole else schedule
        return schedule, guidance, []
    subject = None if shift else plans.Subject.of(networks.fingerprint, config.grid, request.latent_extent, use)
    chosen = plans.find(request.speed, subject, networks.plan_folders, family_of(config).usual.num_steps)
    whole = recipe.way(config, shape, chosen.num_steps, shift, size)
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
        if work == _SAMPLE:
            sample_latents(networks, *told, lambda report: None)
        else:
            networks.video_vae.decode_own_tiles(*told)
