"""Segments that become one video. How long each is and what it is given, sampling/longer.py says.

A segment is a clip like any other whose first latent frames are given: the last ones of the video so far, as they were
sampled, so that nothing passes through pixels. What it makes beyond them is put behind the video's latents. A latent frame
behind the first stands for four frames wherever it is, so that the joined latents are those of one long clip: every frame is
there once. (Decoded alone, a segment's first latent frame would give one frame, not four. That is why segments are joined
before they are decoded.)

The video is decoded in windows of a segment's length, which is all that the device ever holds. Windows overlap, and fade into
each other, where segments do: at the released length of 129 frames and its 33 given ones, that is upstream's own temporal
tiling (codecs/tiling.py), 33 latent frames every 24.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..errors import OpenSoraError
from ..geometry import TIME_COMPRESSION
from ..sampling.longer import Continuation

MOST_SEGMENTS = 10_000  # that are asked for at once
# Odd, so that no two segments of a video below 2**63 latent frames get the same noise; CPU generators read the low 32 bits alone.
_SEED_STRIDE = 0x9E3779B97F4A7C15


def segment_prompts(prompts, segments: int) -> list:
    """A prompt for each segment: the last one given holds for all that follow. prompts: one, or a sequence of them, texts or encoded."""
    if not isinstance(segments, int) or isinstance(segments, bool) or segments < 1:
        raise OpenSoraError(f"segments={segments!r} adds nothing; use 1 or more.")
    if segments > MOST_SEGMENTS:
        raise OpenSoraError(f"{segments} segments are more than can be asked for at once; use at most {MOST_SEGMENTS} and go on from them.")
    given = list(prompts) if isinstance(prompts, Sequence) and not isinstance(prompts, str) else [prompts]
    if not given or None in given:
        raise OpenSoraError("There is no prompt to go on with; give a prompt, or one for each segment.")
    if len(given) > segments:
        raise OpenSoraError(f"{len(given)} prompts for {segments} segment(s); give at most {segments}, or add more segments.")
    return given + [given[-1]] * (segments - len(given))


def segment_seed(seed: int, begins_at: int) -> int:
    """Seed of the noise of a segment whose first new latent frame is `begins_at` of the whole video.

    It depends on nothing else, so that a video that is gone on from later is the one made in one go.
    """
    return (seed + begins_at * _SEED_STRIDE) % 2**63


def context_of(latents: Tensor, continuation: Continuation) -> Tensor:
    """What the next segment is given, [B, C, context, H, W], of a video's latents [B, C, T, H, W]."""
    return latents[:, :, latents.shape[2] - continuation.context :]


def join(latents: Tensor, segment: Tensor, continuation: Continuation) -> Tensor:
    """A video's latents [B, C, T, H, W] with what a segment [B, C, segment, H, W] adds, [B, C, T + added, H, W]."""
    if segment.shape[2] != continuation.segment:
        raise OpenSoraError(f"A segment of {segment.shape[2]} latent frames does not fit a plan of {continuation.segment}.")
    return torch.cat((latents, segment[:, :, continuation.context :].to(latents)), dim=2)


def windows(length: int, continuation: Continuation) -> list[tuple[int, int]]:
    """(first, past the last) latent frames of the parts in which a video of `length` latent frames is decoded.

    All are of one length where the video is as long; the last reaches back further than the others where it has to.
    """
    size = max(continuation.segment, continuation.added + continuation.shared)
    stride = size - max(continuation.context, continuation.shared)
    if length <= size:
        return [(0, length)]
    stops = [*range(size, length, stride), length]
    return [(stop - size, stop) for stop in stops]


def decode_windows(latents: Tensor, continuation: Continuation, decode: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    """Decode one long video a window at a time.

    latents: [1, C, T, H, W]. decode: latents [1, C, t, H, W] of a window -> its frames, [4t - 3, ...], of a floating type.
    Yields frames in their order, as they become final: 4T - 3 in all. Those of a window that the next has too are held back and faded into it,
    linearly.
    """
    parts = windows(latents.shape[2], continuation)
    held = None
    for number, (start, stop) in enumerate(parts):
        frames = decode(latents[:, :, start:stop])
        if start:
            # The window's own first frame stands for four, and of those before the held ones there are better.
            first = TIME_COMPRESSION * (parts[number - 1][1] - 1 - start) + 1 - held.shape[0]
            frames = frames[first:]
            for place, before in enumerate(held):  # in place, by weights 0, 1/n, 2/n ... as tiles are blended
                frames[place] = torch.lerp(before.float(), frames[place].float(), place / len(held)).to(frames.dtype)
        keep = 0
        if number + 1 < len(parts):
            shared = stop - parts[number + 1][0]
            keep = TIME_COMPRESSION * (min(shared, max(continuation.context, continuation.shared)) - 1)
            held = frames[frames.shape[0] - keep :].clone()
        yield frames[: frames.shape[0] - keep]
