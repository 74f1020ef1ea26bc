"""What a video begins and ends with, or has in it: pictures, clips and latents laid into the conditioning."""

from functools import partial

from comfy_api.latest import Input, io

from ..opensora_core import geometry
from ..opensora_core.choices import BACKWARDS, CONDITION_SCALES, DIRECTIONS, FITS
from ..opensora_core.errors import OpenSoraError
from ..opensora_core.families.table import FAMILIES, codec_of
from ..opensora_core.geometry import Tiling
from ..opensora_core.media.pictures import read_masked
from ..opensora_core.run.given import masked
from ..opensora_core.sampling.given import CONTEXTS, check_room, clip_cond_type, fit_clip, fit_image, image_condition, nearest_frames
from ..opensora_core.sampling.guidance import ReferenceUse
from ..opensora_core.sampling.masks import parse_mask_strategy
from .host import clips, inputs, notice, references
from .host.condition import SCALE_KEY, marked, with_condition
from .host.node import Node, outputs
from .host.vae import clip_shape, vae_config

_MOST_REFERENCES = 4


def _strength_input() -> io.Float.Input:
    return io.Float.Input("strength", default=1.0, min=0.0, max=1.0, step=0.05, optional=True, advanced=True)


class OpenSoraImageToVideo(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OpenSoraImageToVideo",
            category="Open-Sora/conditioning",
            inputs=[
                *inputs.clip(),
                io.Image.Input("start_image", optional=True),
                io.Image.Input("end_image", optional=True),
                inputs.choice("fit", FITS),
                _strength_input(),
                io.Latent.Input("start_latent", optional=True),
                io.Latent.Input("end_latent", optional=True),
                inputs.choice("condition_scale", CONDITION_SCALES, optional=True, advanced=True),
            ],
            outputs=outputs(positive=io.Conditioning, negative=io.Conditioning, latent=io.Latent),
        )

    @classmethod
    def execute(
        cls,
        positive,
        negative,
        vae,
        latent,
        fit,
        strength,
        condition_scale,
        start_image=None,
        end_image=None,
        start_latent=None,
        end_latent=None,
    ) -> io.NodeOutput:
        use = ReferenceUse(strength=strength)
        images = {"start_image": start_image, "end_image": end_image}
        shape, grid = _check_clip(vae, latent), vae_config(vae).grid
        ends = _check_pictures(shape, images, {"start_latent": start_latent, "end_latent": end_latent}, grid)
        size = shape[3] * grid.space, shape[4] * grid.space
        if strength > 0:
            ends = [
                clips.encode_pictures(vae, fit_image(given, *size, fit)) if images[name] is not None else given
                for name, given in zip(images, ends, strict=True)
            ]
            condition = image_condition(shape, *ends, use)
            sides = (with_condition(conditioning, condition) for conditioning in (positive, negative))
            positive, negative = (marked(side, **{SCALE_KEY: condition_scale}) for side in sides)
        return io.NodeOutput(positive, negative, latent)


def _check_pictures(shape: tuple[int, ...], images: dict, latents: dict, grid: geometry.Grid) -> list:
    """What begins and what ends the clip, as pictures or latents or None, once nothing about them can be wrong."""
    ends = []
    for (image_name, image), (latent_name, latent) in zip(images.items(), latents.items(), strict=True):
        if image is not None and latent is not None:
            raise OpenSoraError(f"{image_name} and {latent_name} are both given; disconnect one of them.")
        if latent is not None:
            ends.append(references.check_latents(latent_name, latent, shape, 1, grid))
        else:
            ends.append(None if image is None else references.check_pictures(image_name, image, shape[0]))
    given = sum(end is not None for end in ends)
    if not given:
        raise OpenSoraError(
            "Image to video without a picture; connect start_image, end_image or both, or the prompts to the sampler directly."
        )
    check_room(given, shape[2], f"the picture{'s' * (given > 1)} given", grid)
    return ends


def _check_clip(vae, latent: dict) -> tuple[int, ...]:
    """The clip's latent shape, if this VAE can encode references for it."""
    config, shape = vae_config(vae), clip_shape(vae, latent)
    config.grid.check_size(*(side * config.grid.space for side in shape[3:]))
    return shape


class OpenSoraVideoToVideo(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OpenSoraVideoToVideo",
            category="Open-Sora/conditioning",
            is_experimental=True,
            inputs=[
                *inputs.clip(),
                io.MultiType.Input("video", [io.Image, io.Video, io.Latent]),
                inputs.choice("direction", DIRECTIONS),
                inputs.choice("context", [str(count) for count in CONTEXTS]),
                inputs.choice("fit", FITS, advanced=True),
                _strength_input(),
            ],
            outputs=outputs(positive=io.Conditioning, negative=io.Conditioning, latent=io.Latent),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, positive, negative, vae, latent, video, direction, context, fit, strength) -> io.NodeOutput:
        count, grid, report = int(context), vae_config(vae).grid, partial(notice.show, node_id=cls.hidden.unique_id)
        clip_cond_type(direction, count)
        shape, is_whole = _check_clip(vae, latent), _makes_over(vae)
        use = ReferenceUse(is_clip=True, strength=strength, is_whole=is_whole)
        if is_whole:
            direction, count = BACKWARDS, grid.pixel_frames(shape[2])
        else:
            grid.check_goes_on("; use Open-Sora Image to Video")
            count = grid.frames.nearest(count)  # of the counts that a clip can have
            check_room(grid.latent_frames(count), shape[2], f"the {count} frames of the clip", grid)
        size = shape[3] * grid.space, shape[4] * grid.space
        if isinstance(video, dict):
            latents = _part_of_latents(references.check_latents("video", video, shape, grid=grid), direction, count, grid)
        else:
            frames = references.clip_frames("video", video, direction, count, report)
            if strength > 0:
                latents = clips.encode(vae, fit_clip(frames, *size, fit), Tiling(), None, report)
        if strength > 0:
            ends = (None, latents) if direction == BACKWARDS and not is_whole else (latents, None)
            condition = image_condition(shape, *ends, use)
            positive, negative = (with_condition(conditioning, condition) for conditioning in (positive, negative))
        return io.NodeOutput(positive, negative, latent)


def _makes_over(vae) -> bool:
    """Whether the models of a VAE make a clip over, rather than go on from its end."""
    kind = codec_of(vae_config(vae)).kind
    return any(family.sampling.makes_over for family in FAMILIES if kind in family.codecs)


def _part_of_latents(samples, direction: str, context: int, grid: geometry.Grid):
    """The latent frames of a finished clip [B, C, T, H, W] that the new video touches."""
    given = grid.latent_frames(context)
    if samples.shape[2] < given:
        raise OpenSoraError(
            f"video has {grid.pixel_frames(samples.shape[2])} frames; going on from it takes {context}: use a longer clip"
            f"{f', or context {CONTEXTS[0]}' * (samples.shape[2] >= grid.latent_frames(grid.frames.nearest(CONTEXTS[0])))}."
        )
    return nearest_frames(samples.movedim(2, 0), direction, given).movedim(0, 2)


class OpenSoraMaskStrategy(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OpenSoraMaskStrategy",
            category="Open-Sora/conditioning",
            inputs=[
                *inputs.clip(),
                io.String.Input("strategy", default="0"),
                *(io.MultiType.Input(f"reference_{place}", [io.Image, io.Video], optional=place > 0) for place in range(_MOST_REFERENCES)),
            ],
            outputs=outputs(positive=io.Conditioning, negative=io.Conditioning, latent=io.Latent),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, strategy=None):
        return inputs.problems(strategy=inputs.problem(parse_mask_strategy, strategy))

    @classmethod
    def execute(cls, positive, negative, vae, latent, strategy, **references) -> io.NodeOutput:
        config = vae_config(vae)
        kind = codec_of(config).kind
        family = next((one for one in FAMILIES if kind in one.codecs and one.sampling.place is not None), None)
        if family is None:
            raise OpenSoraError(
                f"This VAE is {codec_of(config).title}, whose models know no mask strategies; use Open-Sora Image to Video."
            )
        shape = clip_shape(vae, latent)
        given = read_masked(_in_order(references), strategy, config.grid)
        size = config.grid.picture_size(*(side * config.grid.space for side in shape[3:]))
        report = partial(notice.show, node_id=cls.hidden.unique_id)
        several = [clips.encode(vae, fit_image(frames, *size), Tiling(), None, report) for frames in given.several]
        condition = masked(several, given, (1, *shape[1:]), family.sampling.place)
        return io.NodeOutput(*(with_condition(side, condition) for side in (positive, negative)), latent)


def _in_order(references: dict) -> list:
    """Frames of each reference. Raises an OpenSoraError where one is left out before another."""
    names = sorted(name for name, given in references.items() if given is not None)
    for place, name in enumerate(names):
        if name != f"reference_{place}":
            raise OpenSoraError(f"{name} is connected and reference_{place} is not; connect references from 0 on.")
    given = (references[name] for name in names)
    return [one.get_components().images if isinstance(one, Input.Video) else one for one in given]
