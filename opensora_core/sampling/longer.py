"""How a family goes on from finished videos: how long a segment is, and what each is given of the video so far. Counts alone."""

from dataclasses import dataclass

from ..errors import OpenSoraError
from ..geometry import Grid


@dataclass(frozen=True)
class Continuation:
    """How a video goes on, in latent frames.

    segment: of a segment, what it is given included. context: that each is given.
    shared: that one window of a decode has in common with the one before, where segments share fewer: the first of a window is dropped, and
    something must be left to fade over.
    """

    segment: int
    context: int
    shared: int = 2

    @property
    def added(self) -> int:
        """Latent frames that a segment adds."""
        return self.segment - self.context


@dataclass(frozen=True)
class LongRule:
    """How the videos of a family go on.

    Attributes:
        re_encodes: what a segment is given is decoded and encoded again; False = the latents are given as they were sampled.
        from_picture: a segment begins with the picture of the last frame, not with a clip of the last frames.
        has_scripts: upstream's scripts make loops, and otherwise than here, which parity "scripts" repeats: what is encoded again is a sample of
            the posterior; where latents would be given as they are, a segment is given nothing, begins with the same noise, and loses its head;
            but where something is given to the first clip, every later one ends with the picture that is for the end, and not the last alone.
            Source: hpcaitech/Open-Sora@v1.3 scripts/inference.py, whose reference is of the loop that is over, and inference_i2v.py.
    """

    re_encodes: bool = False
    from_picture: bool = False
    has_scripts: bool = False

    def continuation(self, video_length: int, num_frames: int | None, context_frames: int | None, grid: Grid) -> Continuation:
        """How a video of `video_length` latent frames goes on. Refuses counts that no clip has, and a context that leaves nothing to make.

        num_frames: of a segment with what it is given; None = as long as the video, at most the model's usual length.
        context_frames: given to each segment, counted as the beginning of a clip (33 = 9 latent frames, upstream's rule
        for video to video); None: see usual_context.
        """
        grid.check_goes_on()
        if num_frames is None and video_length == 1:
            raise OpenSoraError(
                f"This video is a single frame; say how long a segment is (num_frames, such as {grid.default_frames}) to go on from it."
            )
        segment = grid.latent_frames(grid.default_frames if num_frames is None else num_frames)
        segment = min(video_length, segment) if num_frames is None else segment
        if segment < 2:
            raise OpenSoraError(
                f"A segment of 1 frame has no room for what comes next; use num_frames of {grid.frames.shortest_clip} or more."
            )
        if self.from_picture:
            if context_frames not in (None, 1):
                raise OpenSoraError(f"This model goes on from the last frame alone, not from {context_frames}; leave the context out.")
            return Continuation(segment, 1, shared=3)  # its windows, as its clips, have an odd number of latent frames
        context = self.usual_context(segment, video_length, grid) if context_frames is None else grid.latent_frames(context_frames)
        piece = grid.piece or 1
        if context % piece:
            whole = grid.pixel_frames(piece)
            raise OpenSoraError(f"This model goes on from pieces of {whole} frames, not from {grid.pixel_frames(context)}; use {whole}.")
        if context >= segment:
            most = (segment - 1) // piece * piece
            shorter = f"a context of at most {grid.pixel_frames(most)} frames or " if most else ""
            raise OpenSoraError(
                f"A context of {grid.pixel_frames(context)} frames leaves nothing of a segment of {grid.pixel_frames(segment)} to make; "
                f"use {shorter}a longer segment."
            )
        if context > video_length:
            raise OpenSoraError(
                f"A context of {grid.pixel_frames(context)} frames is more than this video of {grid.pixel_frames(video_length)} has; "
                f"use at most {grid.pixel_frames(video_length)}."
            )
        return Continuation(segment, context)

    def usual_context(self, segment: int, video_length: int, grid: Grid) -> int:
        """Latent frames of one piece, at least 4; of a clip that is decoded whole a quarter: 33 frames of 129, 5 of 17 (at least 5 of 9)."""
        if grid.piece:
            return max(grid.piece, 4)
        return min(max((segment - 1) // 4 + 1, 2 if segment > 2 else 1), video_length)
