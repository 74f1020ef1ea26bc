"""Sizes of the Video DC-AE, and those of the released one."""

from dataclasses import dataclass, replace

from ...geometry import HIGH_COMPRESSION, Grid, Tiling


@dataclass(frozen=True)
class DCAEConfig:
    """The Video DC-AE of the high-compression variant: time x4, space x32, six stages, the last three with attention."""

    latent_channels: int
    widths: tuple[int, ...]
    encoder_depths: tuple[int, ...]
    decoder_depths: tuple[int, ...]
    in_channels: int = 3

    @property
    def grid(self) -> Grid:
        return HIGH_COMPRESSION

    @property
    def latent_scale(self) -> float:
        """The transformer was trained on its latents as they are."""
        return 1.0

    @property
    def short_tile(self) -> int:
        return 16

    def in_tiles(self, tiling: Tiling) -> Tiling:
        """The reference takes 32 frames at a time."""
        return tiling if tiling.temporal_tile else replace(tiling, temporal_tile=32)

    def problem(self) -> str:
        """Why there can be no such autoencoder, in a sentence; "" if there can."""
        steps = list(zip(self.widths, self.widths[1:], strict=False))
        fits = (
            len(self.widths) == len(self.encoder_depths) == len(self.decoder_depths) == 6
            and min(self.widths) > 0
            and self.latent_channels > 0
            and self.widths[-1] % self.latent_channels == 0
            and all(width % 32 == 0 for width in self.widths[3:])
            and all(4 * one % other == 0 and 4 * other % one == 0 for one, other in steps)
        )
        if fits:
            return ""
        return (
            f"The widths of this DC-AE cannot be: {list(self.widths)} with {self.latent_channels} latent channels; expected six, the last three "
            "multiples of 32, each a quarter to four times the one before, the last a multiple of the latent channels."
        )


VIDEO_DC_AE = DCAEConfig(
    latent_channels=128,
    widths=(128, 256, 512, 512, 1024, 1024),
    encoder_depths=(2, 2, 2, 3, 3, 3),
    decoder_depths=(3, 3, 3, 3, 3, 3),
)
