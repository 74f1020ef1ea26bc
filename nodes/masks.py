"""Mask strategies of Open-Sora 1.1 to 1.3: frames that are given, half given or made, by the published grammar."""

import torch
from comfy_api.latest import Input, io

from ..opensora_core.errors import OpenSoraError
from ..opensora_core.families.table import FAMILIES, codec_of
from ..opensora_core.geometry import Tiling
from ..opensora_core.sampling.given import ImageCondition, fit_clip
from ..opensora_core.sampling.guidance import ReferenceUse
from ..opensora_core.sampling.masks import parse_mask_strategy
from .host import clips, inputs, notice
from .host.condition import with_condition
from .host.node import Node
from .host.vae import check_latent_shape, vae_config

_MOST = 4


class OpenSoraMaskStrategy(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OpenSoraMaskStrategy",
            display_name="Open-Sora Mask Strategy",
            category="Open-Sora/conditioning",
            description="Lays frames of pictures and clips into a video of Open-Sora 1.2 or 1.3, kept or edited to a degree, by the published six-field grammar.",
            search_aliases=["open sora mask", "mask strategy", "reference", "video editing", "connect", "inpaint frames"],
            inputs=[
                io.Conditioning.Input("positive", tooltip="The encoded prompt; it is copied, never changed."),
                io.Conditioning.Input("negative", tooltip="The encoded negative prompt; it is copied, never changed."),
                inputs.vae("The VAE of the model, from Open-Sora Load VAE."),
                io.Latent.Input("latent", tooltip="The clip to make."),
                io.String.Input(
                    "strategy",
                    default="0",
                    tooltip="loop,reference,reference start,target start,length,edit;... in latent frames. What is left out at a group's end is "
                    "0,0,0,0,1,0; starts below 0 count from the end; edit 0 keeps, 1 makes anew. 0 = the first reference begins the video.",
                ),
                *(
                    io.MultiType.Input(
                        f"reference_{place}",
                        [io.Image, io.Video],
                        optional=place > 0,
                        tooltip=f"Picture or clip number {place}, counted from 0.",
                    )
                    for place in range(_MOST)
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="The prompt with the frames, for Open-Sora Sampler."),
                io.Conditioning.Output(display_name="negative", tooltip="The negative prompt with the same frames."),
                io.Latent.Output(display_name="latent", tooltip="The clip that was given, unchanged."),
            ],
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
        shape = check_latent_shape(tuple(latent["samples"].shape), config)
        given = [references[name] for name in sorted(references) if references[name] is not None]
        size = config.grid.picture_size(*(side * config.grid.space for side in shape[3:]))
        groups, node_id = parse_mask_strategy(strategy or "0"), cls.hidden.unique_id
        several = [
            clips.encode(vae, fit_clip(_frames(place, one, config.grid), *size), Tiling(), None, lambda line: notice.show(line, node_id))[0]
            for place, one in enumerate(given)
        ]
        latents, edit = family.sampling.place(several[0].new_full(shape[1:], torch.nan), groups, several, 0)
        mask = (~latents[:1].isnan()).to(latents)[None]
        condition = ImageCondition(mask, latents.nan_to_num(0.0)[None], ReferenceUse(is_held=True), edit[None])
        return io.NodeOutput(*(with_condition(side, condition) for side in (positive, negative)), latent)


def _frames(place: int, given, grid) -> torch.Tensor:
    """Frames of a reference [t, H, W, 3], as many from the first as a clip can have."""
    frames = given.get_components().images if isinstance(given, Input.Video) else given
    if not isinstance(frames, torch.Tensor) or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise OpenSoraError(f"reference_{place} is no picture or clip, an IMAGE [frames, height, width, 3] or a VIDEO.")
    count = len(frames)
    while count > 1 and grid.frames.nearest(count) != count:
        count -= 1
    return frames[:count]
