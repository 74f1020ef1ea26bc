"""Every row: what the rooms above this one import. A new model is a file beside this one and a line here."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ..family import Family, Part
from ..shapes import Layout, Manifest
from . import cogvideox, open_sora_1
from .flux import AUTOENCODER, FLUX_1, FLUX_1_UNFUSED
from .open_sora_2 import DC_AE, HIGH_COMPRESSION_VARIANT, HUNYUAN, OPEN_SORA

# Where the keys of one are in another's files too, the more particular stands first.
FAMILIES: tuple[Family, ...] = (OPEN_SORA, HIGH_COMPRESSION_VARIANT, FLUX_1, FLUX_1_UNFUSED, *cogvideox.ROWS, *open_sora_1.FAMILIES)
CODECS: tuple[Part, ...] = (HUNYUAN, DC_AE, AUTOENCODER, cogvideox.VAE, *open_sora_1.CODECS)

DEFAULT = OPEN_SORA  # what is planned for where no file is given
PAINTER = FLUX_1  # what draws the picture that a video begins with


def family_of(config: Any) -> Family:
    """The row of a network's sizes."""
    return _owner(FAMILIES, config)


def codec_of(config: Any) -> Part:
    """The row of a codec's sizes."""
    return _owner(CODECS, config)


def codecs_of(family: Family) -> list[Part]:
    """The rows of the codecs that a family was trained with, the usual one first."""
    return [codec for kind in family.codecs for codec in CODECS if codec.kind == kind]


def usual_codec(config: Any) -> Any:
    """The released sizes of the codec whose latents a network of these sizes works on, with as many channels as it reads."""
    family = family_of(config)
    return codec_for(family, replace(codecs_of(family)[0].released, latent_channels=config.in_channels))


def codec_for(family: Family, config: Any) -> Any:
    """A codec's sizes as a family's network was trained on its latents, where the codec's file does not tell."""
    return replace(config, scale=family.latent_scale) if family.latent_scale else config


def manifest(config: Any, layout: Layout | None = None) -> Manifest:
    """Every tensor of a file of a network or codec of these sizes; without a layout, of the released one."""
    return _owner((*FAMILIES, *CODECS), config).manifest(config, layout)


def _owner(rows: Iterable[Part], config: Any) -> Any:
    return next(row for row in rows if isinstance(config, type(row.released)) and row.owns(config))
