"""Sizes of the HunyuanVideo VAE, and those of the released one."""

from dataclasses import dataclass

from ...errors import CheckpointError
from ...geometry import CAUSAL, Grid, Tiling
from ...shapes import Shapes, count, size
from ..codec import Latents

# (time, height, width) of the step after each of the encoder's first three blocks; the decoder's steps are the same
# factors in the same order.
STEPS = ((1, 2, 2), (2, 2, 2), (2, 2, 2))
LATENT_SCALE = 0.476986  # model latents = LATENT_SCALE * VAE latents, shift 0


@dataclass(frozen=True)
class VAEConfig:
    """The causal 3D VAE (HunyuanVideo layout): time x4, space x8."""

    latent_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int  # of the encoder; the decoder has one more
    in_channels: int = 3

    @classmethod
    def of(cls, shapes: Shapes) -> "VAEConfig":
        """Sizes from a file's shapes without prefix.

        Raises:
            CheckpointError: a tensor the sizes are read from is missing or they contradict each other.
        """
        blocks = range(count(shapes, "encoder.down_blocks."))
        widths = tuple(size(shapes, f"encoder.down_blocks.{block}.resnets.0.conv2.conv.bias") for block in blocks)
        groups = min(widths, default=0) // 4
        if len(widths) != len(HUNYUAN_VAE.block_out_channels) or not groups or any(width % groups for width in widths):
            raise CheckpointError(
                f"The widths of this VAE cannot be: {list(widths)}; four multiples of a quarter of the narrowest are expected."
            )
        return cls(
            latent_channels=size(shapes, "post_quant_conv.bias"),
            block_out_channels=widths,
            layers_per_block=count(shapes, "encoder.down_blocks.0.resnets."),
            in_channels=size(shapes, "encoder.conv_in.conv.weight", 1),
        )

    def words(self) -> str:
        """For people: "widths 128/256/512/512, 2 layers per block, 16 latent channels"."""
        widths = "/".join(map(str, self.block_out_channels))
        return f"widths {widths}, {self.layers_per_block} layers per block, {self.latent_channels} latent channels"

    @property
    def norm_groups(self) -> int:
        """Groups of four channels at the narrowest width: 128 -> 32, the released value."""
        return min(self.block_out_channels) // 4

    @property
    def grid(self) -> Grid:
        return CAUSAL

    @property
    def latents(self) -> Latents:
        return Latents(self.latent_channels, LATENT_SCALE)

    @property
    def short_tile(self) -> int:
        """Frames of a temporal tile where memory is short: upstream's own temporal tile."""
        return 64

    def cut(self, tiling: Tiling) -> Tiling:
        """See CodecConfig. Upstream takes a whole clip in time."""
        return tiling


HUNYUAN_VAE = VAEConfig(latent_channels=16, block_out_channels=(128, 256, 512, 512), layers_per_block=2)
