"""From what a person gives a call to a checked request: the model's own numbers where none are given, and refusals that need its files."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..choices import EXACT, SCRIPTS
from ..errors import OpenSoraError
from ..media.pictures import LATENT_RANK, References, read_masked, read_references, reference_image
from ..memory.footprint import sizes_of_files
from ..sampling.guidance import Guidance
from ..sampling.longer import Continuation
from ..sampling.plan import StepPlan
from .clip import going_on
from .files import ModelFiles
from .parts import Networks
from .request import GenerationRequest, SamplingOptions, random_seed
from .text import worded


def options_of(options: SamplingOptions | None) -> SamplingOptions:
    """The settings that are given, or the defaults. Raises an OpenSoraError for something else."""
    if not isinstance(options, SamplingOptions | None):
        raise OpenSoraError(f"options is a SamplingOptions(fps=..., ...); this is a {type(options).__name__}.")
    return options or SamplingOptions()


def with_usual(files: ModelFiles, **asked: int | None) -> dict[str, int]:
    """What is asked for, or the model's own numbers."""
    return {name: getattr(files.usual, name) if value is None else value for name, value in asked.items()}


def guidance_of(files: ModelFiles, options: SamplingOptions, text: float | None, image: float | None) -> Guidance:
    """Guidance with the scales asked for, or the model's own."""
    scales = (*files.usual.scales, 1.0)
    return options.guidance(scales[0] if text is None else text, scales[1] if image is None else image)


def steps_of(files: ModelFiles, speed: str, num_steps: int | None) -> int:
    """Steps of a run at a speed; at exact what was asked for, or the model's own. Raises an OpenSoraError for a speed that the model has not."""
    files.family.sampling.check_speed(speed)
    if speed != EXACT:
        return len(StepPlan.uncalibrated(speed, files.family.usual.num_steps).steps)
    return files.usual.num_steps if num_steps is None else num_steps


def seed_of(seed: int | None, generator: torch.Generator | None) -> int:
    """The seed that is given, by itself or in a generator; else one that is drawn."""
    if None not in (seed, generator):
        raise OpenSoraError("A seed and a generator are both given; leave one of them out.")
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise OpenSoraError(f"generator is a torch.Generator, or a seed is given in its place; this is a {type(generator).__name__}.")
        return generator.initial_seed()
    return random_seed() if seed is None else seed


def given_of(files: ModelFiles, given: tuple, how: dict, num_frames: int, references: Sequence, mask_strategy: str) -> References:
    """What a video of num_frames begins or ends with. given, how: arguments of read_references; or references of a mask strategy."""
    if masked := _masked(files, references, mask_strategy, given):
        return masked
    return read_references(*given, **how, whole=num_frames if files.family.sampling.makes_over else 0, grid=files.grid)


def going_on_of(
    files: ModelFiles, latents: Tensor, continuation: Continuation, references: Sequence, mask_strategy: str, last_image
) -> References:
    """What the first segment behind finished latents begins with, references of a mask strategy, and the picture that the last one ends with."""
    if last_image is not None and not files.family.longer.has_scripts:
        raise OpenSoraError(
            f"This model is {files.family.title}, whose longer videos go on without a picture to end with; leave out last_image."
        )
    found, masked = going_on(latents, continuation, files.family.longer), _masked(files, references, mask_strategy, (last_image,))
    found = replace(found, last=reference_image("last_image", last_image))
    return found if masked is None else replace(found, several=masked.several, groups=masked.groups)


def _masked(files: ModelFiles, references: Sequence, mask_strategy: str, others: tuple) -> References | None:
    """What a mask strategy gives, if there is one."""
    if not isinstance(references, list | tuple | None) or not isinstance(mask_strategy, str | None):
        kinds = f"{type(references).__name__} and {type(mask_strategy).__name__}"
        raise OpenSoraError(f"references is a list of pictures and clips, and mask_strategy a text; these are {kinds}.")
    if not references and not mask_strategy:
        return None
    family = files.family
    if family.sampling.place is None:
        raise OpenSoraError(f"This model is {family.title}, which knows no mask strategies; give it a picture or a clip instead.")
    if any(other is not None for other in others):
        raise OpenSoraError("References of a mask strategy are given alone; leave out image, last_image and video, or the strategy.")
    return read_masked(references, mask_strategy, files.grid)


def check_request(networks: Networks, request: GenerationRequest) -> None:
    """Raise an OpenSoraError for a request that the model cannot meet, or files that are not of one model."""
    networks.check_files()
    files = networks.files
    family, references = files.family, request.references
    family.check_given(references.given, references.use)
    files.clip_note(request.height, request.width, request.num_frames)
    family.sampling.chosen(request.options.solver)
    worded(family.text, "", request.options)  # says what the model does not know
    if request.options.parity == SCRIPTS and not (family.longer and family.longer.has_scripts):
        raise OpenSoraError(f"parity={SCRIPTS!r} is of the loops of Open-Sora 1.1 to 1.3, and this model is {family.title}; leave it out.")
    has_latents = any(given.ndim == LATENT_RANK for given in references.given.values())
    if has_latents or request.noise is not None:
        channels = sizes_of_files(files.dit).transformer.in_channels
        request.check_noise(channels)
        if has_latents:
            references.check_channels(channels)
