"""What a video begins and ends with, or has in it: pictures, clips and latents laid into the conditioning."""

from comfy_api.latest import Input, io

from ..opensora_core import geometry
from ..opensora_core.choices import BACKWARDS, CONDITION_SCALES, DIRECTIONS
from ..opensora_core.errors import OpenSoraError
from ..opensora_core.families.table import FAMILIES, codec_of
from ..opensora_core.geometry import Tiling
from ..opensora_core.media.pictures import read_masked
from ..opensora_core.run.given import masked
from ..opensora_core.sampling.given import CONTEXTS, check_room, clip_cond_type, fit_clip, fit_image, image_condition, nearest_frames
from ..opensora_core.sampling.guidance import ReferenceUse
from ..opensora_core.sampling.masks import parse_mask_strategy
from .host import clips, inputs, references
from .host.condition import SCALE_KEY, marked, with_condition
from .host.node import Node, gathered
from .host.vae import clip_shape, vae_config

_GIVES = {"positive": io.Conditioning, "negative": io.Conditioning, "latent": io.Latent}
_REFERENCES = tuple(f"reference_{place}" for place in range(4))


class OpenSoraImageToVideo(Node, category="conditioning", outputs=_GIVES, hidden=()):
    takes = [
        *inputs.of("positive", "negative", "vae", "latent"),
        *inputs.of("start_image", "end_image", optional=True),
        *inputs.of("fit", "strength"),
        *inputs.of("start_latent", "end_latent", optional=True),
        inputs.choice("condition_scale", CONDITION_SCALES, optional=True, advanced=True),
    ]

    @classmethod
    @gathered(start=("start_image", "start_latent"), end=("end_image", "end_latent"))
    def execute(cls, positive, negative, vae, latent, fit, strength, condition_scale, start, end) -> io.NodeOutput:
        shape, grid, size = _check_clip(vae, latent)
        ends = _check_ends([start, end], shape, grid)
        if strength > 0:
            ends = [one if one is None or one.ndim == 5 else clips.encode_pictures(vae, fit_image(one, *size, fit)) for one in ends]
            condition = image_condition(shape, *ends, ReferenceUse(strength=strength))
            sides = (with_condition(conditioning, condition) for conditioning in (positive, negative))
            positive, negative = (marked(side, **{SCALE_KEY: condition_scale}) for side in sides)
        return io.NodeOutput(positive, negative, latent)


def _check_ends(given: list[dict], shape: tuple[int, ...], grid: geometry.Grid) -> list:
    """What begins and what ends the clip, as pictures or latents or None, once nothing about them can be wrong."""
    ends = []
    for (image_name, image), (latent_name, latent) in (tuple(one.items()) for one in given):
        if image is not None and latent is not None:
            raise OpenSoraError(f"{image_name} and {latent_name} are both given; disconnect one of them.")
        if latent is not None:
            ends.append(references.check_latents(latent_name, latent, shape, 1, grid))
        else:
            ends.append(None if image is None else references.check_pictures(image_name, image, shape[0]))
    count = sum(end is not None for end in ends)
    if not count:
        raise OpenSoraError(
            "Image to video without a picture; connect start_image, end_image or both, or the prompts to the sampler directly."
        )
    check_room(count, shape[2], f"the picture{'s' * (count > 1)} given", grid)
    return ends


def _check_clip(vae, latent: dict) -> tuple[tuple[int, ...], geometry.Grid, tuple[int, int]]:
    """The clip's latent shape, grid, and height and width in pixels, if this VAE can encode references for it."""
    grid, shape = vae_config(vae).grid, clip_shape(vae, latent)
    return shape, grid, grid.check_size(*grid.decoded(shape)[1:])


class OpenSoraVideoToVideo(Node, category="conditioning", outputs=_GIVES, is_experimental=True):
    takes = [
        *inputs.of("positive", "negative", "vae", "latent"),
        io.MultiType.Input("video", [io.Image, io.Video, io.Latent]),
        inputs.choice("direction", DIRECTIONS),
        inputs.choice("context", [str(count) for count in CONTEXTS]),
        *inputs.of("fit", "strength", advanced=True),
    ]

    @classmethod
    def execute(cls, positive, negative, vae, latent, video, direction, context, fit, strength) -> io.NodeOutput:
        count = int(context)
        clip_cond_type(direction, count)
        shape, grid, size = _check_clip(vae, latent)
        is_whole = any(family.sampling.makes_over for family in _families(vae))  # a clip is made over, not gone on from at its end
        use = ReferenceUse(is_clip=True, strength=strength, is_whole=is_whole)
        if is_whole:
            direction, count = BACKWARDS, grid.pixel_frames(shape[2])
        else:
            grid.check_goes_on("; use Open-Sora Image to Video")
            count = grid.frames.nearest(count)  # of the counts that a clip can have
            check_room(grid.latent_frames(count), shape[2], f"the {count} frames of the clip", grid)
        if isinstance(video, dict):
            latents = _part_of_latents(references.check_latents("video", video, shape, grid=grid), direction, count, grid)
        else:
            frames = references.clip_frames("video", video, direction, count, cls.show)
            if strength > 0:
                latents = clips.encode(vae, fit_clip(frames, *size, fit), Tiling(), None, cls.show)
        if strength > 0:
            ends = (None, latents) if direction == BACKWARDS and not is_whole else (latents, None)
            condition = image_condition(shape, *ends, use)
            positive, negative = (with_condition(conditioning, condition) for conditioning in (positive, negative))
        return io.NodeOutput(positive, negative, latent)


def _families(vae) -> list:
    """The rows of the models that a VAE belongs to."""
    kind = codec_of(vae_config(vae)).kind
    return [family for family in FAMILIES if kind in family.codecs]


def _part_of_latents(samples, direction: str, context: int, grid: geometry.Grid):
    """The latent frames of a finished clip [B, C, T, H, W] that the new video touches."""
    given = grid.latent_frames(context)
    if samples.shape[2] < given:
        raise OpenSoraError(
            f"video has {grid.pixel_frames(samples.shape[2])} frames; going on from it takes {context}: use a longer clip"
            f"{f', or context {CONTEXTS[0]}' * (samples.shape[2] >= grid.latent_frames(grid.frames.nearest(CONTEXTS[0])))}."
        )
    return nearest_frames(samples.movedim(2, 0), direction, given).movedim(0, 2)


class OpenSoraMaskStrategy(Node, category="conditioning", outputs=_GIVES):
    takes = [
        *inputs.of("positive", "negative", "vae", "latent"),
        io.String.Input("strategy", default="0"),
        *(io.MultiType.Input(name, [io.Image, io.Video], optional=name != _REFERENCES[0]) for name in _REFERENCES),
    ]

    @classmethod
    def validate_inputs(cls, strategy=None):
        return {"strategy": inputs.problem(parse_mask_strategy, strategy)}

    @classmethod
    @gathered(references=_REFERENCES)
    def execute(cls, positive, negative, vae, latent, strategy, references) -> io.NodeOutput:
        place = next((family.sampling.place for family in _families(vae) if family.sampling.place is not None), None)
        if place is None:
            title = codec_of(vae_config(vae)).title
            raise OpenSoraError(f"This VAE is {title}, whose models know no mask strategies; use Open-Sora Image to Video.")
        shape, grid = clip_shape(vae, latent), vae_config(vae).grid
        given = read_masked(_in_order(references), strategy, grid)
        size = grid.picture_size(*grid.decoded(shape)[1:])
        several = [clips.encode(vae, fit_image(frames, *size), Tiling(), None, cls.show) for frames in given.several]
        condition = masked(several, given, (1, *shape[1:]), place)
        return io.NodeOutput(*(with_condition(side, condition) for side in (positive, negative)), latent)


def _in_order(references: dict) -> list:
    """Frames of each reference. Raises an OpenSoraError where one is left out before another."""
    names = sorted(name for name, given in references.items() if given is not None)
    for place, name in enumerate(names):
        if name != f"reference_{place}":
            raise OpenSoraError(f"{name} is connected and reference_{place} is not; connect references from 0 on.")
    given = (references[name] for name in names)
    return [one.get_components().images if isinstance(one, Input.Video) else one for one in given]
