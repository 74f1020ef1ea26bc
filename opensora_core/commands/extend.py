"""`generate --extend`: a video made longer by segments, and the file that holds what is finished of it."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from ..errors import OpenSoraError
from ..media.latent_file import SUFFIX, read_latents, save_latents
from ..pipeline import OpenSoraPipeline
from ..run.request import EncodedPrompt
from ..run.result import GenerationResult
from ..run.segments import continuation, segment_prompts
from .options import CallSettings, say
from .progress import Bars

# What a file of latents decides, so that it cannot be asked for beside one.
_OF_THE_FIRST_CLIP = ("resolution", "aspect_ratio", "width", "height", "num_frames", "cond_type", "ref", "ref_end")


class LongVideo:
    """What `--extend` and its companions ask for, checked as far as it can be before a network is read.

    Attributes:
        is_wanted: whether anything is to be added.

    Raises:
        OpenSoraError: arguments that contradict each other, or a file that holds no latents.
    """

    def __init__(self, args: argparse.Namespace, settings: CallSettings, pipe: OpenSoraPipeline):
        self.is_wanted = args.extend is not None
        if not self.is_wanted:
            given = [f"--extend-{name}" for name in ("prompt", "frames", "context", "from") if getattr(args, f"extend_{name}") is not None]
            if given:
                raise OpenSoraError(f"{given[0]} goes with --extend N, the number of segments to add.")
            return
        if not pipe.files.grid.is_causal:
            raise OpenSoraError("The high-compression variant goes on from no clip: its training knows text and a first frame.")
        self._pipe, self._args = pipe, args
        self._latents = None if args.extend_from is None else self._read(args)
        self._prompts = segment_prompts(args.extend_prompt or args.prompt, args.extend)
        self._arguments = {
            name: settings.arguments[name]
            for name in ("negative_prompt", "num_inference_steps", "guidance_scale", "image_guidance_scale", "options")
        } | {"num_frames": args.extend_frames, "context_frames": args.extend_context}
        length = pipe.latent_frames(settings.arguments["num_frames"]) if self._latents is None else self._latents.shape[2]
        continuation(length, args.extend_frames, args.extend_context)  # raises before the first clip is made

    def make(self, prompt: str | EncodedPrompt, seed: int, arguments: dict, kept: "KeptFile") -> GenerationResult:
        """The first clip, unless latents were given, and what is added to it.

        Args:
            prompt: of the first clip. arguments: of the call that makes it.
            kept: is told what is finished.
        """
        if self._latents is None:
            with Bars(f"first clip, seed {seed}") as bars:
                first = self._pipe(prompt, seed=seed, latents_only=True, callback=bars.step, progress=bars.progress, **arguments)
            kept.keep(0, first.latents)
        else:
            first = GenerationResult(latents=self._latents)
        segments = len(self._prompts)
        with Bars(f"{segments} segment{'s' * (segments > 1)} more, kept in {kept.path}") as bars:
            return self._pipe.extend(
                first,
                [first.prompt if text == self._args.prompt and first.prompt else text for text in self._prompts],
                segments=segments,
                seed=seed,
                on_segment=kept.keep,
                callback=bars.step,
                progress=bars.progress,
                **self._arguments,
            )

    def _read(self, args: argparse.Namespace) -> Tensor:
        given = [name for name in _OF_THE_FIRST_CLIP if getattr(args, name) is not None]
        if given:
            raise OpenSoraError(f"--{given[0].replace('_', '-')} is of a first clip; with --extend-from the file is what is gone on from.")
        return read_latents(Path(args.extend_from).expanduser()) * self._pipe.latent_scale


class KeptFile:
    """The .latent file beside a long video: all that is finished of it, replaced as it grows."""

    def __init__(self, video: Path, scale: float):
        self.path = video.with_suffix(SUFFIX)
        self.num_segments: int | None = None
        self._scale = scale

    def keep(self, num_segments: int, latents: Tensor) -> None:
        save_latents(self.path, latents / self._scale)
        self.num_segments = num_segments

    @property
    def sentence(self) -> str:
        """Where finished work is, and how to go on from it; "" before there is any."""
        if self.num_segments is None:
            return ""
        done = (
            "the first clip" if not self.num_segments else f"the first clip and {self.num_segments} segment{'s' * (self.num_segments > 1)}"
        )
        return f"What is finished ({done}) is in {self.path}; go on with --extend-from {self.path}."

    @contextmanager
    def named_if_stopped(self) -> Iterator[None]:
        """Say where finished work is when the block is interrupted."""
        try:
            yield
        except KeyboardInterrupt:
            if self.sentence:
                say(self.sentence)
            raise
