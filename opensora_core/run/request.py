"""What one generation asks for. Everything a person can get wrong is checked here, before any file is read."""

import random
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import choices
from ..errors import OpenSoraError, check_choice
from ..geometry import Workload, check_whole
from ..media.pictures import References
from ..sampling.guidance import Guidance
from ..sampling.run import TextCondition
from ..sampling.solvers import MAX_SEED
from ..text.prompt import check_text, decorate


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt ready to sample with, from OpenSoraPipeline.encode_prompt; give it in place of a prompt to encode only once.

    text: the positive prompt as it was encoded. condition: what the transformer reads of it and of the negative prompt, batch 1, on the CPU.
    """

    text: str
    condition: TextCondition


MAX_SHIFT = 1000.0  # far above any; at the released sizes it is 2 to 12
_WORDS = {
    "fit": choices.FITS,
    "posterior": choices.POSTERIORS,
    "noise_device": choices.NOISE_DEVICES,
    "latent_dtype": choices.DTYPES,
    "solver": choices.SOLVERS,
    "guidance_curve": choices.CURVES,
    "condition_scale": choices.CONDITION_SCALES,
    "unconditional": choices.UNCONDITIONALS,
    "parity": ("", choices.DIFFUSERS, choices.SCRIPTS),
}


@dataclass(frozen=True)
class SamplingOptions:
    """Settings that are seldom changed; the defaults are the released configuration's, but for fp32 latents and CPU noise.

    Attributes:
        fps: frames per second, said to the model in the prompt; 0 leaves the sentence out.
        motion_score: how much moves, said in the prompt: 1 (still) to 15 (wild); of Open-Sora 1.2 and 1.3 0 to 100. 0 leaves the
            sentence out, None is the model's own way (4 for 2.0).
        aesthetic_score: 0 to 10, camera_motion: such as "pan left": said to 1.2 and 1.3. None is the model's own way, 0 and "" leave it out.
        text_oscillation, image_oscillation: guidance falls to 1 on every odd step after the tenth.
        sdedit: of 1.3: every step begins with what is given at that step's noise.
        temporal_ramp: image guidance grows from 1 at the first frame to its full value at the last.
        shift: of the schedule; 0 = from size and length.
        fit: how a picture is brought to the video's size: crop, pad or stretch.
        posterior: the VAE's mode, or a sample drawn with the seed.
        noise_device: cpu (the same noise for a seed on every machine) or gpu (where the model works).
        latent_dtype: fp32 or bf16, of the noise and of the latents between steps.
        solver: euler, ddim or dpm; auto is the model's own.
        guidance_curve: constant, released or by index, see sampling/guidance.py; auto is what the model and solver were released with.
        condition_scale: what a picture's latents are multiplied by for CogVideoX, 1.0 or diffusers; auto is the model's own.
        unconditional: what the unconditional pass reads: encoded (the negative prompt) or zero (nothing); auto is encoded.
        parity: "diffusers": schedules and scales as that library has them, where they differ.
        every_pass: run all three guidance passes at every step, also those of no weight; slower, the same video.
    """

    fps: int = 24
    motion_score: float | None = None
    text_oscillation: bool = True
    image_oscillation: bool = True
    temporal_ramp: bool = True
    shift: float = 0.0
    fit: str = choices.FITS[0]
    posterior: str = choices.POSTERIORS[0]
    noise_device: str = choices.NOISE_DEVICES[0]
    latent_dtype: str = choices.DTYPES[0]
    every_pass: bool = False
    solver: str = choices.AUTO
    guidance_curve: str = choices.AUTO
    condition_scale: str = choices.AUTO
    unconditional: str = choices.AUTO
    parity: str = ""
    aesthetic_score: float | str | None = None
    camera_motion: str | None = None
    sdedit: bool = True

    def __post_init__(self):
        decorate("", self.fps, None)  # raises for a number outside its range
        for name, words in _WORDS.items():
            check_choice(name, getattr(self, name), words)
        if self.motion_score is not None and not 0 <= finite("motion_score", self.motion_score) <= 100:
            raise OpenSoraError(f"motion_score={self.motion_score} is no score; use 1 to 15 with Open-Sora 2.0, 0 to 100 with 1.2 and 1.3.")
        if not 0 <= finite("shift", self.shift) <= MAX_SHIFT:
            raise OpenSoraError(f"shift={self.shift} is out of range; use 0 (from size and length) to {MAX_SHIFT:g}.")

    def guidance(self, guidance_scale: float, image_guidance_scale: float) -> Guidance:
        """Guidance of a whole run with these scales; 1 is neutral."""
        scales = finite("guidance_scale", guidance_scale), finite("image_guidance_scale", image_guidance_scale)
        flags = self.text_oscillation, self.image_oscillation, self.temporal_ramp, self.every_pass
        return Guidance(*scales, *flags, curve=self.guidance_curve)


# A prompt to encode: as it was encoded before, or (prompt, negative prompt, the options that hold what is said to the model beside it),
# options None = it is read as it is, as that of a picture.
Asked = EncodedPrompt | tuple[str, str, SamplingOptions | None]


@dataclass(frozen=True, kw_only=True)
class GenerationRequest(Workload):
    """One call of the pipeline, checked.

    references: what it begins or ends with. seed: of the first video; video k of the batch is the one that seed + k gives alone.
    noise: [B, C, T, H, W] to begin from, in place of what the seeds give; None = theirs.
    speed: exact, or a plan (sampling/plan.py), whose steps num_steps then counts.
    """

    prompt: str | EncodedPrompt
    negative_prompt: str
    guidance: Guidance
    references: References
    seed: int
    options: SamplingOptions
    noise: Tensor | None = None
    speed: str = choices.EXACT

    def __post_init__(self):
        if not isinstance(self.prompt, (str, EncodedPrompt)):
            raise OpenSoraError(f"A prompt is one text; this is a {type(self.prompt).__name__}. For several, call once for each.")
        if not isinstance(self.negative_prompt, str):
            raise OpenSoraError(f"A negative prompt is one text ('' for none); this is a {type(self.negative_prompt).__name__}.")
        if isinstance(self.prompt, str):
            check_text(self.prompt)
        check_text(self.negative_prompt, "The negative prompt")
        check_whole("seed", self.seed)
        super().__post_init__()
        self.references.check(self.num_videos, self.latent_extent, self.grid)
        if not (0 <= self.seed and self.seed + self.num_videos - 1 <= MAX_SEED):
            raise OpenSoraError(f"seed={self.seed} is out of range; use 0 to {MAX_SEED - self.num_videos + 1}.")

    def check_noise(self, channels: int) -> None:
        """Raise an OpenSoraError unless the noise, if any is given, is that of latents of this request. channels: of the latents."""
        if self.noise is None:
            return
        wanted = [self.num_videos, channels, *self.latent_extent]
        if not isinstance(self.noise, Tensor) or not self.noise.is_floating_point() or list(self.noise.shape) != wanted:
            found = list(self.noise.shape) if isinstance(self.noise, Tensor) else type(self.noise).__name__
            raise OpenSoraError(f"noise is {found}; it is a tensor of floats {wanted}: videos, channels, latent frames, height, width.")
        if not torch.isfinite(self.noise).all():
            raise OpenSoraError("noise holds values that are not numbers (NaN or infinite).")

    @property
    def asked(self) -> Asked:
        return self.prompt if isinstance(self.prompt, EncodedPrompt) else (self.prompt, self.negative_prompt, self.options)

    @property
    def seeds(self) -> list[int]:
        """The seed of every video of the batch."""
        return [self.seed + k for k in range(self.num_videos)]

    @property
    def has_given(self) -> bool:
        """Whether the network reads anything besides noise and prompt."""
        references = self.references
        return bool(references.given or references.groups) and references.use.strength > 0


def finite(name: str, value) -> float:
    """`value` as a float; an OpenSoraError if it is no finite number."""
    if not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:  # NaN too
        shown = "a number without end" if isinstance(value, int) else f"{value!r}"  # Python itself refuses to write the longest
        raise OpenSoraError(f"{name}={shown} is not a finite number; give one.")
    return float(value)


def random_seed() -> int:
    """A fresh seed of 32 bits; Python's and torch's global generators are left alone."""
    return random.SystemRandom().randrange(2**32)
