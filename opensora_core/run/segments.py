"""Going on from a finished video: how long a segment is, what it is given, and how segments become one video.

A segment is a clip like any other whose first latent frames are given: the last ones of the video so far, as they were
sampled, so that nothing passes through pixels. What it makes beyond them is put behind the video's latents. A latent frame
behind the first stands for four frames wherever it is, so that the joined latents are those of one long clip: every frame is
there once. (Decoded alone, a segment's first latent frame would give one frame, not four. That is why segments are joined
before they are decoded.)

The video is decoded in windows of a segment's length, which is all that the device ever holds. Windows overlap, and fade into
each other, where segments do: at the released length of 129 frames and its 33 given ones, that is the reference's own temporal
tiling (codecs/tiling.py), 33 latent frames every 24.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import OpenSoraError
from ..geometry import CAUSAL, MAX_TEXT_FRAMES, TIME_COMPRESSION, Grid

# Latent frames that one window of a decode has in common with the one before, where segments share fewer: the first of a
# window is dropped, and something must be left to fade over.
_LEAST_SHARED = 2
LEAST_CONTEXT = 4  # latent frames, of a video that is gone on from piece by piece
# Odd, so that no two segments of a video below 2**63 latent frames get the same noise; CPU generators read the low 32 bits alone.
_SEED_STRIDE = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Continuation:
    """How a video goes on, in latent frames.

    Attributes:
        segment: of a segment, what it is given included.
        context: that each is given.
        shared: that one window of a decode has in common with the one before, where segments share fewer.
    """

    segment: int
    context: int
    shared: int = _LEAST_SHARED

    @property
    def added(self) -> int:
        """Latent frames that a segment adds; four frames each."""
        return self.segment - self.context


def continuation(video_length: int, num_frames: int | None = None, context_frames: int | None = None) -> Continuation:
    """How a video of `video_length` latent frames goes on.

    Args:
        num_frames: 4k+1, of a segment with what it is given; None = as long as the video, at most 129.
        context_frames: 4k+1, given to each segment, counted as the beginning of a clip (33 = 9 latent frames, the reference's
            rule for video to video); None = a quarter of the segment, at least 5 where it has 9 or more: 33 of 129, 5 of 17.

    Raises:
        OpenSoraError: counts that are not 4k+1, a context that leaves nothing to make, or more of it than the video has.
    """
    if num_frames is None:
        if video_length == 1:
            raise OpenSoraError("This video is a single frame; say how long a segment is (num_frames, such as 129) to go on from it.")
        segment = min(video_length, CAUSAL.latent_frames(MAX_TEXT_FRAMES))
    else:
        segment = CAUSAL.latent_frames(num_frames)
    if segment < 2:
        raise OpenSoraError("A segment of 1 frame has no room for what comes next; use num_frames of 5 or more.")
    if context_frames is None:
        context = min(max((segment - 1) // 4 + 1, 2 if segment > 2 else 1), video_length)
    else:
        context = CAUSAL.latent_frames(context_frames)
    if context >= segment:
        raise OpenSoraError(
            f"A context of {CAUSAL.pixel_frames(context)} frames leaves nothing of a segment of {CAUSAL.pixel_frames(segment)} to make; "
            f"use a context of at most {CAUSAL.pixel_frames(segment - 1)} frames or a longer segment."
        )
    if context > video_length:
        raise OpenSoraError(
            f"A context of {CAUSAL.pixel_frames(context)} frames is more than this video of {CAUSAL.pixel_frames(video_length)} has; "
            f"use at most {CAUSAL.pixel_frames(video_length)}."
        )
    return Continuation(segment, context)


def from_picture(video_length: int, num_frames: int | None, context_frames: int | None, grid: Grid) -> Continuation:
    """How a video goes on whose segments begin with a picture, the last frame; arguments and errors as continuation's.

    num_frames: None = as long as the video, at most the model's usual length.
    """
    if context_frames not in (None, 1):
        raise OpenSoraError(f"This model goes on from the last frame alone; a context of {context_frames} frames cannot be given to it.")
    usual = grid.latent_frames(grid.default_frames)
    segment = min(video_length, usual) if num_frames is None else grid.latent_frames(num_frames)
    if segment < 2:
        raise OpenSoraError(f"A segment of 1 frame has no room for what comes next; use num_frames of {grid.frames.shortest_clip} or more.")
    return Continuation(segment, 1, shared=3)  # its windows, as its clips, have an odd number of latent frames


def by_pieces(video_length: int, num_frames: int | None, context_frames: int | None, grid: Grid) -> Continuation:
    """How a video goes on whose codec decodes pieces by themselves; arguments and errors as continuation's.

    num_frames: None = as long as the video, at most the model's usual length. context_frames: None = one piece.
    """
    usual = grid.latent_frames(grid.default_frames)
    segment = min(video_length, usual) if num_frames is None else grid.latent_frames(num_frames)
    context = max(grid.piece, LEAST_CONTEXT) if context_frames is None else grid.latent_frames(context_frames)
    if context % grid.piece or context >= segment:
        raise OpenSoraError(
            f"A context of {grid.pixel_frames(context)} frames leaves nothing of a segment of {grid.pixel_frames(segment)} frames to make; "
            "use a longer segment (num_frames), or a shorter context."
        )
    if context > video_length:
        raise OpenSoraError(
            f"A context of {grid.pixel_frames(context)} frames is more than this video of {grid.pixel_frames(video_length)} has."
        )
    return Continuation(segment, context)


def segment_prompts(prompts, segments: int) -> list:
    """A prompt for each segment: the last one given holds for all that follow.

    Args:
        prompts: one, or a sequence of them, texts or encoded.

    Raises:
        OpenSoraError: no segment, no prompt, or more prompts than segments.
    """
    if not isinstance(segments, int) or isinstance(segments, bool) or segments < 1:
        raise OpenSoraError(f"segments={segments!r} adds nothing; use 1 or more.")
    given = list(prompts) if isinstance(prompts, Sequence) and not isinstance(prompts, str) else [prompts]
    if not given or None in given:
        raise OpenSoraError("There is no prompt to go on with; give one, or one for each segment.")
    if len(given) > segments:
        raise OpenSoraError(f"{len(given)} prompts for {segments} segment(s); give at most {segments}, or add more segments.")
    return given + [given[-1]] * (segments - len(given))


def segment_seed(seed: int, begins_at: int) -> int:
    """Seed of the noise of a segment whose first new latent frame is `begins_at` of the whole video.

    It depends on nothing else, so that a video that is gone on from later is the one made in one go.
    """
    return (seed + begins_at * _SEED_STRIDE) % 2**63


def context_of(latents: Tensor, plan: Continuation) -> Tensor:
    """What the next segment is given, [B, C, context, H, W], of a video's latents [B, C, T, H, W]."""
    return latents[:, :, latents.shape[2] - plan.context :]


def join(latents: Tensor, segment: Tensor, plan: Continuation) -> Tensor:
    """A video's latents [B, C, T, H, W] with what a segment [B, C, segment, H, W] adds, [B, C, T + added, H, W]."""
    if segment.shape[2] != plan.segment:
        raise OpenSoraError(f"A segment of {segment.shape[2]} latent frames does not fit a plan of {plan.segment}.")
    return torch.cat((latents, segment[:, :, plan.context :].to(latents)), dim=2)


def windows(length: int, plan: Continuation) -> list[tuple[int, int]]:
    """(first, past the last) latent frames of the parts in which a video of `length` latent frames is decoded.

    All are of one length where the video is as long; the last reaches back further than the others where it has to.
    """
    size = max(plan.segment, plan.added + plan.shared)
    stride = size - max(plan.context, plan.shared)
    if length <= size:
        return [(0, length)]
    stops = [*range(size, length, stride), length]
    return [(stop - size, stop) for stop in stops]


def decode_windows(latents: Tensor, plan: Continuation, decode: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    """Decode one long video a window at a time.

    Args:
        latents: [1, C, T, H, W].
        decode: latents [1, C, t, H, W] of a window -> its frames, [4t - 3, ...], of a floating type.

    Yields:
        Frames in their order, as they become final: 4T - 3 in all. Those of a window that the next has too are held back
        and faded into it, linearly.
    """
    parts = windows(latents.shape[2], plan)
    held = None
    for number, (start, stop) in enumerate(parts):
        frames = decode(latents[:, :, start:stop])
        if start:
            # The window's own first frame stands for four, and of those before the held ones there are better.
            first = TIME_COMPRESSION * (parts[number - 1][1] - 1 - start) + 1 - held.shape[0]
            frames = frames[first:]
            _fade(held, frames)
        keep = 0
        if number + 1 < len(parts):
            shared = stop - parts[number + 1][0]
            keep = TIME_COMPRESSION * (min(shared, max(plan.context, plan.shared)) - 1)
            held = frames[frames.shape[0] - keep :].clone()
        yield frames[: frames.shape[0] - keep]


def _fade(before: Tensor, frames: Tensor) -> None:
    """From `before` into the beginning of `frames`, in place; weights 0, 1/n, 2/n ... as tiles are blended."""
    extent = before.shape[0]
    for position in range(extent):
        frames[position] = torch.lerp(before[position].float(), frames[position].float(), position / extent).to(frames.dtype)
