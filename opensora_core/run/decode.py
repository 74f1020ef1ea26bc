"""The stage decode: from finished latents to frames, a window at a time where a video is long."""

import logging
from collections.abc import Iterable
from itertools import count

import numpy
import torch
from torch import Tensor

from ..choices import LOW_MEMORY
from ..codecs.tiling import Progress
from ..errors import DecodeOutOfMemory, NotNumbers
from ..media.video import to_uint8
from ..memory.device import ran_out, unless_out_of_memory
from ..sampling.longer import Continuation
from .finite import is_finite, not_numbers, one_colour_between
from .parts import Networks
from .segments import decode_windows, windows

logger = logging.getLogger(__name__)

Frames = list[numpy.ndarray]


def decode_latents(
    networks: Networks, latents: Tensor, progress: Progress, continuation: Continuation | None = None
) -> tuple[list[Frames], list[str]]:
    """(frames of every video, uint8 [H, W, 3]; lines a person should see where memory made the decode other than exact).

    latents: [B, C, T, H, W] in the transformer's scale. continuation: of a video of segments, which is decoded in parts as long as one; None = in
    one part. Both errors hold the latents: NotNumbers, which the VAE gave, and DecodeOutOfMemory, whatever the decode policy could do.
    """
    continuation = continuation or Continuation(segment=latents.shape[2], context=0)
    videos, parts = latents.split(1), windows(latents.shape[2], continuation)
    num_parts = len(videos) * len(parts)
    progress(0, 1)  # how many tiles there are is known with the first

    def decode_all() -> tuple[list[Frames], list[str]]:
        numbers, notes = count(), []
        with networks.video_vae.decoder((*videos[0].shape[:2], parts[0][1], *videos[0].shape[3:]), notes.append) as decode:

            def decode_part(part: Tensor) -> Tensor:
                number = next(numbers)
                pixels = decode(part, lambda done, total: progress(number * total + done, num_parts * total))
                return pixels.permute(0, 2, 3, 4, 1)[0]

            return [_shown(decode_windows(video, continuation, decode_part)) for video in videos], notes

    try:
        made = unless_out_of_memory(decode_all)
    except FloatingPointError as error:
        dtype, cause = networks.placement.dtype, "a damaged VAE file (inspect looks at it)"
        raise NotNumbers(f"{not_numbers('Decoding', dtype, cause)} The latents are kept.", latents) from error
    if made is None:
        frames, height, width = networks.files.grid.decoded(latents.shape)
        size = f"{frames} frames of {height}x{width} (height x width)"
        policy, change = networks.video_vae.policy, "smaller tiles (vae.enable_tiling)"
        advice = f"decode the finished latents, which are kept, with {change if policy == LOW_MEMORY else f'policy low_memory or {change}'}"
        raise DecodeOutOfMemory(ran_out(f"Decoding {size} with policy {policy}", networks.placement.device, advice), latents)
    for frames in made[0]:
        low, high = (torch.from_numpy(numpy.array([least(frame, (0, 1)) for frame in frames])) for least in (numpy.min, numpy.max))
        if line := one_colour_between(low.amin(dim=0) / 255, high.amax(dim=0) / 255, len(frames)):
            logger.warning("%s", line)
            made[1].append(line)
    return made


def _shown(pieces: Iterable[Tensor]) -> Frames:
    """Pixels [t, H, W, 3], about -1..1, as frames. One at a time: fp32 copies of a whole clip would be larger than the clip."""
    frames = []
    for piece in pieces:
        for frame in piece.split(1):
            if not is_finite(frame):
                raise FloatingPointError
            frames.append(to_uint8((frame.float() + 1) / 2)[0])
    return frames
