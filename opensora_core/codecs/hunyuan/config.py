"""Sizes of the HunyuanVideo VAE, and those of the released one."""

from dataclasses import dataclass
from typing import ClassVar

from ...geometry import CAUSAL, Tiling
from ...shapes import Shapes, size
from ..codec import WidthsConfig, sizes_of

# (time, height, width) of the step after each of the encoder's first three blocks; the decoder's steps are the same
# factors in the same order.
STEPS = ((1, 2, 2), (2, 2, 2), (2, 2, 2))
LATENT_SCALE = 0.476986  # model latents = LATENT_SCALE * VAE latents, shift 0


@dataclass(frozen=True)
class VAEConfig(WidthsConfig):
    """The causal 3D VAE (HunyuanVideo layout): time x4, space x8."""

    grid: ClassVar = CAUSAL
    scale: ClassVar = LATENT_SCALE
    short_tile: ClassVar = 64  # upstream's own temporal tile

    @classmethod
    def of(cls, shapes: Shapes) -> "VAEConfig":
        """Sizes from a file's shapes without prefix. Raises a CheckpointError where one is missing or they contradict each other."""
        return cls(size(shapes, "post_quant_conv.bias"), **sizes_of(shapes))

    def cut(self, tiling: Tiling) -> Tiling:
        """See CodecConfig. Upstream takes a whole clip in time."""
        return tiling


HUNYUAN_VAE = VAEConfig(latent_channels=16)
