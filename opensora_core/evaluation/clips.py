"""The videos that an evaluation judges: made by a pipeline, each once however often it is asked for, and read at once."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from ..commands.options import JudgeOptions
from ..commands.progress import Bar
from ..errors import OpenSoraError
from ..media.video import to_uint8
from ..pipeline import OpenSoraPipeline
from ..run.request import SamplingOptions
from ..sampling.plan import POINTS
from .prompts import Case
from .verdict import Verdict
from .vision import Reading, read
from .world import FPS, NUM_FRAMES, SIZE

# An encoded prompt of the released model takes 17 MB.
_ENCODED_AT_A_TIME = 128
# What a VAE may leave of a clip, to try the computer vision on before it judges anything: blur in pixels, and noise. None, either, both, and worse
# than any VAE that is worth judging: about 38, 28, 27 and 25 dB.
DEGREES = ((0.0, 0.0), (1.0, 0.0), (0.0, 0.04), (1.2, 0.04), (1.5, 0.05))
_REACH = 5  # pixels; three standard deviations of the widest blur


@dataclass(frozen=True)
class Job:
    """A video to make.

    case: what is asked for. text_guidance: in place of the run's own. negative_prompt: what to avoid; encoded as it is.
    is_unprompted: with an empty prompt in place of the case's. every_pass: without skipping guidance passes.
    """

    case: Case
    text_guidance: float | None = None
    negative_prompt: str = ""
    is_unprompted: bool = False
    every_pass: bool = False

    @property
    def text(self) -> tuple[str, str, SamplingOptions]:
        """What is encoded, as encode_prompts takes it."""
        options = SamplingOptions(fps=FPS, motion_score=self.case.motion_score)
        return "" if self.is_unprompted else self.case.prompt, self.negative_prompt, options


@dataclass(frozen=True)
class Clip:
    """A video that was made: frames [17, 64, 64, 3] uint8, what it shows, and the forwards it took."""

    job: Job
    frames: numpy.ndarray
    reading: Reading
    forwards: int = 0

    @property
    def verdict(self) -> Verdict:
        return Verdict(self.job.case.asked, self.job.case.motion_score, self.reading)


def arguments(how: JudgeOptions, job: Job) -> dict:
    """Keywords of the pipeline's call for one video, but for the prompt."""
    first, last = job.case.pictures()
    return {
        "height": SIZE,
        "width": SIZE,
        "num_frames": NUM_FRAMES,
        "num_inference_steps": how.num_steps,
        "guidance_scale": how.guidance if job.text_guidance is None else job.text_guidance,
        "image_guidance_scale": how.guidance_img,
        "image": first,
        "last_image": last,
        "seed": job.case.seed,
        "options": replace(job.text[2], every_pass=job.every_pass),
        "speed": how.speed,
    }


def check(pipe: OpenSoraPipeline, how: JudgeOptions, job: Job) -> None:
    """Say before any work that a model, or a setting, cannot make the evaluation's clips."""
    try:
        pipe(job.case.prompt, check_only=True, **arguments(how, job))
    except OpenSoraError as error:
        raise OpenSoraError(f"Choose a model that can make clips of {SIZE}x{SIZE} and {NUM_FRAMES} frames: {error}") from error


def make(pipe: OpenSoraPipeline, how: JudgeOptions, jobs: Sequence[Job], title: str) -> dict[Job, Clip]:
    """Make and read the videos of `jobs`, under a bar of all their steps. A job that comes twice is done once."""
    unique, steps = list(dict.fromkeys(jobs)), POINTS.get(how.speed, how.num_steps)
    made: dict[Job, Clip] = {}
    num_right = 0
    with Bar(total=len(unique) * steps, desc=title, unit="step", mininterval=0.5) as bar:

        def progress(stage: str, done: int, total: int) -> None:
            if stage == "sampling":
                bar.update(len(made) * steps + done - bar.n)

        for start in range(0, len(unique), _ENCODED_AT_A_TIME):
            some = unique[start : start + _ENCODED_AT_A_TIME]
            bar.set_postfix_str("text")
            texts = list(dict.fromkeys(job.text for job in some))
            prompts = dict(zip(texts, pipe.encode_prompts(texts), strict=True))
            for job in some:
                result = pipe(prompts[job.text], progress=progress, **arguments(how, job))
                frames = numpy.stack(result.frames[0])
                made[job] = Clip(job, frames, read(frames, how.colour), result.forwards)
                num_right += made[job].verdict.is_right
                bar.set_postfix_str(f"{len(made)} of {len(unique)} videos, {num_right} right", refresh=False)
                bar.update(len(made) * steps - bar.n)
    return made


@torch.inference_mode()
def round_trip(pipe: OpenSoraPipeline, frames: Tensor, ends: str = "") -> numpy.ndarray:
    """Frames [T, H, W, 3] in 0..1 (T = 4k + 1) through the VAE and back, uint8.

    ends: "first", "last" or "both": that latent of a true clip is of a picture alone, as a perfect transformer would give it.
    """
    clip = quantised(frames)
    latents = pipe.vae.encode(clip, [None]).clone()
    if ends in ("first", "both"):
        latents[:, :, :1] = pipe.vae.encode(clip[:1], [None])
    if ends in ("last", "both"):
        latents[:, :, -1:] = pipe.vae.encode(clip[-1:], [None])
    return numpy.stack(pipe.decode(latents)[0])


def quantised(frames: Tensor) -> Tensor:
    """Frames in steps of 1/255, as every picture that is given is."""
    return torch.from_numpy(to_uint8(frames)).float() / 255


def degraded(clip: Tensor, blur: float, noise: float, seed: int) -> Tensor:
    """A Gaussian blur within frames, noise on every value, 8 bits: [T, H, W, 3] uint8.

    clip: [T, H, W, 3] in 0..1. blur, noise: standard deviations, in pixels and in units of the range.
    """
    frames, height, width, _ = clip.shape
    if blur:
        taps = torch.exp(-torch.arange(-_REACH, _REACH + 1.0).square() / (2 * blur**2))
        taps = taps / taps.sum()
        planes = F.pad(clip.permute(0, 3, 1, 2).reshape(-1, 1, height, width), (_REACH,) * 4, mode="replicate")
        planes = F.conv2d(F.conv2d(planes, taps.view(1, 1, -1, 1)), taps.view(1, 1, 1, -1))
        clip = planes.view(frames, 3, height, width).permute(0, 2, 3, 1)
    clip = clip + noise * torch.randn(clip.shape, generator=torch.Generator().manual_seed(seed))
    return (clip.clamp(0, 1) * 255).round().to(torch.uint8)
