"""The videos that an evaluation judges: made by a pipeline, each once however often it is asked for, and read at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from ..commands.progress import CountedBar
from ..errors import OpenSoraError
from ..media.video import to_uint8
from ..pipeline import OpenSoraPipeline
from ..run.request import SamplingOptions
from .prompts import Case
from .verdict import Verdict
from .vision import Reading, read
from .world import FPS, NUM_FRAMES, SIZE

# An encoded prompt of the released model takes 17 MB.
_ENCODED_AT_A_TIME = 128


@dataclass(frozen=True)
class Job:
    """A video to make.

    Attributes:
        case: what is asked for.
        text_guidance: in place of the run's own.
        negative_prompt: what to avoid; encoded as it is.
        is_unprompted: with an empty prompt in place of the case's.
        every_pass: without skipping guidance passes.
    """

    case: Case
    text_guidance: float | None = None
    negative_prompt: str = ""
    is_unprompted: bool = False
    every_pass: bool = False

    @property
    def prompt(self) -> str:
        return "" if self.is_unprompted else self.case.prompt

    @property
    def options(self) -> SamplingOptions:
        return SamplingOptions(fps=FPS, motion_score=self.case.motion_score, every_pass=self.every_pass)


@dataclass(frozen=True)
class Clip:
    """A video that was made: frames [17, 64, 64, 3] uint8, and what it shows."""

    job: Job
    frames: numpy.ndarray
    reading: Reading

    @property
    def verdict(self) -> Verdict:
        return Verdict(self.job.case.asked, self.job.case.motion_score, self.reading)


@dataclass(frozen=True)
class Sampling:
    """How every video of a run is made, but for what a job changes."""

    num_steps: int
    guidance: float
    guidance_img: float

    def arguments(self, job: Job) -> dict:
        """Keywords of the pipeline's call, but for the prompt."""
        first, last = job.case.pictures()
        return {
            "height": SIZE,
            "width": SIZE,
            "num_frames": NUM_FRAMES,
            "num_inference_steps": self.num_steps,
            "guidance_scale": self.guidance if job.text_guidance is None else job.text_guidance,
            "image_guidance_scale": self.guidance_img,
            "image": first,
            "last_image": last,
            "seed": job.case.seed,
            "options": job.options,
        }


def check(pipe: OpenSoraPipeline, sampling: Sampling, job: Job) -> None:
    """Say before any work that a model, or a setting, cannot make the evaluation's clips.

    Raises:
        OpenSoraError: what the pipeline refuses.
    """
    try:
        pipe(job.case.prompt, check_only=True, **sampling.arguments(job))
    except OpenSoraError as error:
        raise OpenSoraError(f"The clips of the evaluation ({SIZE}x{SIZE}, {NUM_FRAMES} frames) cannot be made: {error}") from error


def make(pipe: OpenSoraPipeline, sampling: Sampling, jobs: Sequence[Job], title: str) -> dict[Job, Clip]:
    """Make and read the videos of `jobs`, with a bar. A job that comes twice is done once."""
    unique = list(dict.fromkeys(jobs))
    made: dict[Job, Clip] = {}
    num_right = 0
    with CountedBar(title, len(unique), sampling.num_steps) as bar:
        for start in range(0, len(unique), _ENCODED_AT_A_TIME):
            some = unique[start : start + _ENCODED_AT_A_TIME]
            bar.note("text")
            prompts = _encode(pipe, some)
            for job in some:
                result = pipe(prompts[_text(job)], progress=bar.step, **sampling.arguments(job))
                frames = numpy.stack(result.frames[0])
                made[job] = Clip(job, frames, read(frames))
                num_right += made[job].verdict.is_right
                bar.clip(f"{num_right} right")
    return made


@torch.inference_mode()
def round_trip(pipe: OpenSoraPipeline, frames: Tensor) -> numpy.ndarray:
    """Frames [T, H, W, 3] in 0..1 (T = 4k + 1) through the VAE and back, uint8."""
    return decoded(pipe, pipe.vae.encode(quantised(frames), [None]))


@torch.inference_mode()
def in_place(pipe: OpenSoraPipeline, clip: Tensor, ends: str) -> numpy.ndarray:
    """A true clip through the VAE and back, its first or last latent (or both) being that of a picture alone, uint8.

    This is what a perfect transformer would give for these pictures.
    """
    clip = quantised(clip)
    latents = pipe.vae.encode(clip, [None]).clone()
    if ends in ("first", "both"):
        latents[:, :, :1] = pipe.vae.encode(clip[:1], [None])
    if ends in ("last", "both"):
        latents[:, :, -1:] = pipe.vae.encode(clip[-1:], [None])
    return decoded(pipe, latents)


def decoded(pipe: OpenSoraPipeline, latents: Tensor) -> numpy.ndarray:
    return numpy.stack(pipe.decode(latents)[0])


def quantised(frames: Tensor) -> Tensor:
    """Frames in steps of 1/255, as every picture that is given is."""
    return torch.from_numpy(to_uint8(frames)).float() / 255


def _text(job: Job) -> tuple[str, str, int]:
    return job.prompt, job.negative_prompt, job.case.motion_score


def _encode(pipe: OpenSoraPipeline, jobs: Sequence[Job]) -> dict:
    wanted = {_text(job): (job.prompt, job.negative_prompt, job.options) for job in jobs}
    return dict(zip(wanted, pipe.encode_prompts(list(wanted.values())), strict=True))
