"""The two walks: from a request to a clip, and from finished videos to longer ones, segment by segment; what a segment is, segments.py says."""

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy
import torch
from torch import Tensor

from ..choices import SCRIPTS
from ..errors import OpenSoraError, OutOfMemory
from ..media.pictures import LATENT_RANK, References
from ..sampling.guidance import ReferenceUse
from ..sampling.longer import Continuation, LongRule
from .decode import decode_latents
from .given import encode_references
from .parts import Networks
from .request import GenerationRequest
from .result import GenerationResult, Watchers, timed
from .sample import sample_latents
from .segments import context_of, join, segment_seed
from .text import encode

logger = logging.getLogger(__name__)


def make_clip(networks: Networks, request: GenerationRequest, watchers: Watchers, has_frames: bool = True) -> GenerationResult:
    """Encode, sample, and decode unless has_frames is False."""
    result, device = GenerationResult(seeds=request.seeds, request=request), networks.placement.device
    note = networks.files.clip_note(request.height, request.width, request.num_frames)
    if note:
        logger.warning("%s", note)
        result.notes.append(note)
    with timed(result, "text", device):
        watchers.tell("text", 0, 1)
        (result.prompt,) = encode(networks, [request.asked])
        watchers.tell("text", 1, 1)
    with timed(result, "condition", device):
        condition = encode_references(networks, request, watchers.stage("condition"))
    with timed(result, "sampling", device):
        watchers.tell("sampling", 0, request.num_steps)
        result.latents, notes = sample_latents(networks, request, result.prompt, condition, watchers.steps(result), has_frames)
        result.notes += notes
    if has_frames:
        with timed(result, "decode", device):
            result.frames, notes = decode_latents(networks, result.latents, watchers.stage("decode"))
            result.notes += notes
    return result


def make_longer(
    networks: Networks,
    latents: Tensor,
    continuation: Continuation,
    requests: list[GenerationRequest],
    watchers: Watchers,
    first: GenerationRequest | None = None,
) -> GenerationResult:
    """Add a segment for every request, then decode the whole.

    latents: [B, C, T, H, W] of the finished videos, in the transformer's scale. requests: what differs between them is the prompt; a segment's seed
    and what it is given follow from the continuation. first: of the videos, where it is known: upstream has another script for those to which
    something was given. Where a segment could not be made, `latents` of the OutOfMemory are what is finished.
    """
    seed, latents, device = requests[0].seed, latents.float().cpu(), networks.placement.device
    rule, as_scripts = networks.files.family.check_longer(), requests[0].options.parity == SCRIPTS
    is_given, result = bool(first and first.references.given), GenerationResult(latents=latents, seeds=requests[0].seeds)
    with timed(result, "text", device):
        prompts = encode(networks, [request.asked for request in requests], watchers.stage("text"))
    with timed(result, "sampling", device):
        for index, (request, prompt) in enumerate(zip(requests, prompts, strict=True)):
            is_alone, is_tied = (as_scripts and not rule.re_encodes and is_given == given for given in (False, True))
            request = replace(request, seed=seed if is_alone else segment_seed(seed, latents.shape[2]))
            watchers.tell("sampling", index * request.num_steps, len(requests) * request.num_steps)
            try:
                going = References() if is_alone else _given(networks, latents, continuation, request.seeds if as_scripts else None)
                if is_tied or index == len(requests) - 1:
                    going = replace(going, last=_end(networks, requests[0]))
                masks = {name: getattr(request.references, name) for name in ("several", "groups")}
                request = replace(request, references=replace(going, **masks, loop=index + 1))
                condition = encode_references(networks, request, lambda done, total: None)
                on_step, is_last = watchers.steps(result, index, len(requests)), index == len(requests) - 1
                made, notes = sample_latents(networks, request, prompt, condition, on_step, then_decode=is_last)
            except OutOfMemory as error:
                error.latents = latents
                raise
            latents = result.latents = join(latents, made, continuation)
            result.prompt, result.notes = prompt, result.notes + notes
            if watchers.on_segment is not None:
                watchers.on_segment(index + 1, latents)
    with timed(result, "decode", device):
        joined = None if networks.files.grid.piece else continuation
        result.frames, notes = decode_latents(networks, latents, watchers.stage("decode"), joined)
        result.notes += notes
    return result


def _end(networks: Networks, request: GenerationRequest) -> Tensor | None:
    """Latents [B, C, 1, H, W] of the picture that videos are to end with, if there is one."""
    request = replace(request, references=References(last=request.references.last))
    condition = encode_references(networks, request, lambda done, total: None)
    return None if condition is None else condition.latents[:, :, -1:].cpu()


def going_on(latents: Tensor, continuation: Continuation, rule: LongRule) -> References:
    """The end of videos, latents [B, C, T, H, W], given to their next segment as it is."""
    context = context_of(latents, continuation)
    return References(first=context) if rule.from_picture else References(clip=context, use=ReferenceUse(is_clip=True))


def _given(networks: Networks, latents: Tensor, continuation: Continuation, seeds: Sequence[int] | None) -> References:
    """What the next segment begins with, in whichever way the model goes on. seeds: of posterior samples; None = its modes."""
    rule = networks.files.family.check_longer()
    if rule.re_encodes:
        # The last frame depends on those before it: it is decoded with them.
        length = continuation.segment if rule.from_picture else continuation.context
        videos, _ = decode_latents(networks, latents[:, :, -length:], lambda done, total: None)
        clips = [torch.from_numpy(numpy.stack(frames[-1:] if rule.from_picture else frames)).float() / 255 for frames in videos]
        draws = [None] * len(clips) if seeds is None else [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        latents = torch.cat([networks.video_vae.encode(clip, [draw]) for clip, draw in zip(clips, draws, strict=True)]).cpu()
    return going_on(latents, continuation, rule)


def checked_latents(latents: Tensor | None) -> Tensor:
    """Latents [B, C, T, H, W] that can be gone on from; that they are this model's is checked with the request."""
    if isinstance(latents, Tensor) and latents.ndim == LATENT_RANK and 0 not in latents.shape and torch.isfinite(latents).all():
        return latents
    found = list(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
    raise OpenSoraError(
        f"A video to go on from is a result, or its latents, finite numbers [videos, channels, latent frames, height, width]; this is {found}."
    )
