"""Every row: what the rooms above this one import. A new model is a file beside this one and a line here."""

from dataclasses import replace
from typing import Any

from ..family import Family, Part
from .flux import FLUX_1, FLUX_1_UNFUSED
from .open_sora_2 import DC_AE, HIGH_COMPRESSION_VARIANT, HUNYUAN, OPEN_SORA

# Where the keys of one are in another's files too, the more particular stands first.
FAMILIES: tuple[Family, ...] = (OPEN_SORA, HIGH_COMPRESSION_VARIANT, FLUX_1, FLUX_1_UNFUSED)
CODECS: tuple[Part, ...] = (HUNYUAN, DC_AE)


def family_of(config: Any) -> Family:
    """The row of a network's sizes."""
    return next(family for family in FAMILIES if family.owns(config))


def usual_codec(config: Any) -> Any:
    """The released sizes of the codec whose latents a network of these sizes works on, with as many channels as it reads."""
    kind = family_of(config).codecs[0]
    return replace(next(codec for codec in CODECS if codec.kind == kind).released, latent_channels=config.in_channels)


def codec_of(config: Any) -> Part:
    """The row of a codec's sizes."""
    return next(codec for codec in CODECS if isinstance(config, type(codec.released)))
