"""Mask strategies of Open-Sora 1.1 to 1.3: frames that are given, half given or made, by the published grammar."""

from functools import partial

from comfy_api.latest import Input, io

from ..opensora_core.errors import OpenSoraError
from ..opensora_core.families.table import FAMILIES, codec_of
from ..opensora_core.geometry import Tiling
from ..opensora_core.media.pictures import read_masked
from ..opensora_core.run.given import masked
from ..opensora_core.sampling.given import fit_image
from ..opensora_core.sampling.masks import parse_mask_strategy
from .host import clips, inputs, notice
from .host.condition import with_condition
from .host.node import Node, outputs
from .host.vae import clip_shape, vae_config

_MOST = 4


class OpenSoraMaskStrategy(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OpenSoraMaskStrategy",
            category="Open-Sora/conditioning",
            inputs=[
                *inputs.clip(),
                io.String.Input("strategy", default="0"),
                *(io.MultiType.Input(f"reference_{place}", [io.Image, io.Video], optional=place > 0) for place in range(_MOST)),
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
