"""The walk from a request to a clip."""

import logging

from .decode import decode_latents
from .given import encode_references
from .parts import Networks
from .request import GenerationRequest
from .result import GenerationResult, Watchers, timed
from .sample import sample_latents
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
