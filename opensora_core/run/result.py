"""What a run of a pipeline makes, and who is told what while it does."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy
import torch
from torch import Tensor

from ..codecs.tiling import Progress
from ..errors import OpenSoraError
from ..sampling.run import StepReport
from .request import EncodedPrompt, GenerationRequest

StepCallback = Callable[[int, int, int, int, Tensor], None]
StageProgress = Callable[[str, int, int], None]
SegmentCallback = Callable[[int, Tensor], None]


@dataclass
class GenerationResult:
    """What a run made.

    frames: for every video, its frames, uint8 [H, W, 3]; empty where latents alone were asked for.
    latents: [B, C, T, H, W] fp32 on the CPU, in the transformer's scale (LATENT_SCALE times the VAE's).
    prompt: its text as it was encoded, and what may be given to a next call in place of the text. seeds: of every video.
    forwards: transformer rows of each video; forwards_saved: against the passes of the released code, at every step.
    seconds: spent in each stage: text, condition, sampling, decode. Reading a network counts where it happened.
    notes: lines a person should see, such as a decode that memory made other than exact. request: what was asked for.
    """

    frames: list[list[numpy.ndarray]] = field(default_factory=list)
    latents: Tensor | None = None
    prompt: EncodedPrompt | None = None
    seeds: list[int] = field(default_factory=list)
    forwards: int = 0
    forwards_saved: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    request: GenerationRequest | None = None


@dataclass(frozen=True)
class Watchers:
    """Who is told while videos are made; each may be left out.

    callback: after every step, (step from 1, num_steps, forwards_done, forwards_saved, latents). progress: (stage, done, total).
    on_segment: (segments done, latents of the whole video so far).
    """

    callback: StepCallback | None = None
    progress: StageProgress | None = None
    on_segment: SegmentCallback | None = None

    def __post_init__(self):
        for name, told in vars(self).items():
            if not (told is None or callable(told)):
                raise OpenSoraError(f"{name} is of the type {type(told).__name__}; give a function, or None.")

    def tell(self, stage: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(stage, done, total)

    def stage(self, name: str) -> Progress:
        """(done, total) of one stage."""
        return partial(self.tell, name)

    def steps(self, result: GenerationResult, segment: int = 0, num_segments: int = 1) -> Callable[[StepReport], None]:
        """The callback for the sampling of one segment: counts forwards into `result`, and tells of the steps of all segments."""
        forwards, saved = result.forwards, result.forwards_saved

        def on_step(report: StepReport) -> None:
            result.forwards, result.forwards_saved = forwards + report.forwards_done, saved + report.forwards_saved
            if self.callback is not None:
                self.callback(report.step, report.num_steps, report.forwards_done, report.forwards_saved, report.latents)
            self.tell("sampling", segment * report.num_steps + report.step, num_segments * report.num_steps)

        return on_step


@contextmanager
def timed(result: GenerationResult, stage: str, device: torch.device) -> Iterator[None]:
    """Write the seconds of the block into a result, the device's work included."""
    begun = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    result.seconds[stage] = time.perf_counter() - begun
