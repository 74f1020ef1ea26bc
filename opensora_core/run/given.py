"""The stage condition: pictures and clips fitted to the video, encoded, and laid where the network reads them."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..choices import MODE
from ..codecs.tiling import Progress
from ..errors import OutOfMemory
from ..media.pictures import LATENT_RANK, References
from ..memory.device import ran_out, unless_out_of_memory
from ..sampling.given import ImageCondition, fit_clip, fit_image, image_condition
from .parts import Networks
from .request import GenerationRequest


def encode_references(networks: Networks, request: GenerationRequest, progress: Progress) -> ImageCondition | None:
    """What a video begins or ends with, on the device; None where the network reads nothing beside noise and prompt."""
    if not request.has_given:
        return None
    references = request.references
    # One for each video, so that a batch item is what its seed gives alone; the last frame's noise follows the first's. None for the mode.
    generators: list[torch.Generator | None] = [None] * request.num_videos
    if request.options.posterior != MODE or networks.files.family.sampling.chosen(parity=bool(request.options.parity)).before:
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in request.seeds]
    ends: list[Tensor | None] = []
    for given in references.ends:
        progress(sum(end is not None for end in ends), len(references.given))
        ends.append(None if given is None else _latents(networks, request, given, generators))
    count = len(references.given) or len(references.several)
    progress(count, count)
    head, tail = ends
    condition = None
    if references.given:
        channels = (head if head is not None else tail).shape[1]
        condition = image_condition((request.num_videos, channels, *request.latent_extent), head, tail, references.use)
    if any(group.loop == references.loop for group in references.groups):
        several = [_latents(networks, request, frames, generators) for frames in references.several]
        shape = (request.num_videos, several[0].shape[1], *request.latent_extent)
        condition = masked(several, references, shape, networks.files.family.sampling.place, condition)
    return condition


def masked(
    several: list[Tensor], references: References, shape: tuple[int, ...], place: Callable, condition: ImageCondition | None = None
) -> ImageCondition:
    """What a mask strategy lays into a clip [B, C, T, H, W], over what is given of it already.

    several: latents [B, C, t, H, W] of each reference. place: of the model's recipe.
    """
    empty = several[0].new_full(shape, torch.nan)
    if condition is not None:
        empty = torch.where(condition.mask > 0, condition.latents, empty)
    rows = [place(row, references.groups, [one[k] for one in several], references.loop) for k, row in enumerate(empty)]
    latents, edit = (torch.stack(parts) for parts in zip(*rows, strict=True))
    if condition is not None:
        edit = torch.minimum(edit, 1 - condition.mask[:, 0, :, 0, 0])
    mask = (~latents[:, :1].isnan()).to(latents)
    return ImageCondition(mask, latents.nan_to_num(0.0), references.use, edit)


def _latents(networks: Networks, request: GenerationRequest, given: Tensor, generators: list[torch.Generator | None]) -> Tensor:
    """[B, C, t, H, W] of pictures [t, H, W, 3], or of what is latents already."""
    device = networks.placement.device
    if given.ndim == LATENT_RANK:
        return given.to(device)
    fit = fit_clip if request.references.use.is_clip else fit_image
    clip = fit(given, *request.grid.picture_size(request.height, request.width), request.options.fit)
    latents = unless_out_of_memory(partial(networks.video_vae.encode, clip, generators))
    if latents is None:
        frames, height, width = clip.shape[:3]
        work = f"Encoding {frames} given {'frames' if frames > 1 else 'frame'} of {height}x{width} (height x width)"
        advice = "use smaller tiles (vae.enable_tiling), a smaller size, or close other programs that use the memory"
        raise OutOfMemory(ran_out(work, device, advice))
    return latents
