"""Sizes of the HunyuanVideo VAE, and those of the released one."""

from dataclasses import dataclass

from ...geometry import CAUSAL, Grid, Tiling

LATENT_SCALE = 0.476986  # model latents = LATENT_SCALE * VAE latents, shift 0


@dataclass(frozen=True)
class VAEConfig:
    """The causal 3D VAE (HunyuanVideo layout): time x4, space x8."""

    latent_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int  # of the encoder; the decoder has one more
    in_channels: int = 3

    @property
    def norm_groups(self) -> int:
        """Groups of four channels at the narrowest width: 128 -> 32, the released value."""
        return min(self.block_out_channels) // 4

    @property
    def grid(self) -> Grid:
        return CAUSAL

    @property
    def latent_scale(self) -> float:
        """What latents are multiplied by on their way to the transformer."""
        return LATENT_SCALE

    @property
    def short_tile(self) -> int:
        """Frames of a temporal tile where memory is short: the reference's own temporal tile."""
        return 64

    def in_tiles(self, tiling: Tiling) -> Tiling:
        """`tiling` with what it leaves to the VAE. The reference takes a whole clip in time."""
        return tiling


HUNYUAN_VAE = VAEConfig(latent_channels=16, block_out_channels=(128, 256, 512, 512), layers_per_block=2)
