"""The stage sampling: from noise, a prompt and references to finished latents."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import OpenSoraError, OutOfMemory
from ..memory.component import AUTO, BUDGET
from ..memory.device import unless_out_of_memory
from ..sampling.given import ImageCondition
from ..sampling.run import Conditions, SamplingRecipe, StepReport, TextCondition, sample
from ..sampling.solvers import noise
from .needs import sampling_ran_out
from .parts import Networks
from .request import LATENT_DTYPES, EncodedPrompt, GenerationRequest

RECIPE = SamplingRecipe()
logger = logging.getLogger(__name__)

_AGAIN = "The device ran out of memory while sampling; it begins again with one block of the transformer on the device at a time."


def sample_latents(
    networks: Networks,
    request: GenerationRequest,
    prompt: EncodedPrompt,
    condition: ImageCondition | None,
    on_step: Callable[[StepReport], None],
) -> tuple[Tensor, list[str]]:
    """([B, C, T, H, W] fp32 on the CPU in the transformer's scale, lines a person should see).

    Args:
        prompt: in place of the request's; every video of the request is made of it.
        condition: from encode_references.

    Raises:
        OutOfMemory: the device has no room, in any way that the offload mode permits.
        OpenSoraError: the transformer gave values that are not numbers.
    """
    placement, notes = networks.placement, []

    def run(is_last_try: bool) -> Tensor:
        beside_bytes = 0 if is_last_try else networks.needs.beside_transformer(request)
        with networks.transformer.at_work(beside_bytes, is_last_try) as transformer:
            shape = (1, transformer.config.in_channels, *request.latent_extent)
            schedule = RECIPE.schedule(transformer.config, shape, request.num_steps, request.options.shift)
            told = Conditions(_repeated(prompt.condition, request.num_videos), condition)
            latents = _noise(request, shape, placement.device)
            return _checked(sample(RECIPE, transformer, latents, schedule, request.guidance, told, on_step, request.seeds), placement.dtype)

    latents = unless_out_of_memory(lambda: run(False))
    if latents is None and placement.mode in (AUTO, BUDGET):
        logger.warning("%s", _AGAIN)
        notes.append(_AGAIN)
        latents = unless_out_of_memory(lambda: run(True))
    if latents is None:
        raise OutOfMemory(sampling_ran_out(request, placement))
    return latents, notes


def _noise(request: GenerationRequest, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """[B, C, T, H, W] on the device, in the dtype that latents have between steps: of every video what its seed gives alone."""
    options = request.options
    source = device if options.noise_device == "gpu" else torch.device("cpu")
    return torch.cat([noise(shape, seed, source, LATENT_DTYPES[options.latent_dtype]) for seed in request.seeds]).to(device)


def _repeated(text: TextCondition, num_videos: int) -> TextCondition:
    sides = vars(text).items()
    return TextCondition(
        **{side: {name: part.expand(num_videos, *part.shape[1:]) for name, part in parts.items()} for side, parts in sides}
    )


def _checked(latents: Tensor, dtype: torch.dtype) -> Tensor:
    """Latents on the CPU in fp32; an OpenSoraError if they are not numbers."""
    if not torch.isfinite(latents).all():
        raise OpenSoraError(f"The transformer gave values that are not numbers (in {dtype}); try fp32, or check the file with inspect.")
    return latents.float().cpu()
