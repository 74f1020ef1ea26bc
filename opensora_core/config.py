"""What a model is, as flat frozen dataclasses, and the values of the released ones.

Configurations are read from a checkpoint's tensor shapes (checkpoint/detect.py); modules never read
files, environment or arguments. What shapes cannot tell follows the released proportions, written here.
"""

from dataclasses import dataclass, replace

from .geometry import CAUSAL, HIGH_COMPRESSION, Grid

LATENT_SCALE = 0.476986  # HunyuanVideo VAE; model latents = LATENT_SCALE * VAE latents, shift 0
ROPE_THETA = 10000
T5_LENGTH = 512  # tokens, truncated and padded, attended without a mask
CLIP_LENGTH = 77


@dataclass(frozen=True)
class TransformerConfig:
    """The MMDiT. `in_channels` counts latent channels before packing (16), not packed features (64)."""

    in_channels: int
    patch_size: int
    hidden_size: int
    num_heads: int
    mlp_hidden_size: int
    depth: int
    depth_single_blocks: int
    context_in_dim: int
    vec_in_dim: int
    cond_embed: bool
    guidance_embed: bool

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def axes_dim(self) -> tuple[int, int, int]:
        """Rotary dimensions of (t, h, w): 1/8, 7/16, 7/16 of a head; 128 -> 16, 56, 56; 32 -> 4, 14, 14."""
        return self.head_dim // 8, self.head_dim * 7 // 16, self.head_dim * 7 // 16

    @property
    def grid(self) -> Grid:
        """Of the autoencoder whose latents it works on: single latent pixels are tokens only for the Video DC-AE's."""
        return HIGH_COMPRESSION if self.patch_size == HIGH_COMPRESSION.patch else CAUSAL

    @property
    def packed_channels(self) -> int:
        return self.in_channels * self.patch_size**2

    @property
    def packed_cond_channels(self) -> int:
        """One mask channel and the reference latent, packed: 68 for the released model."""
        return (self.in_channels + 1) * self.patch_size**2


@dataclass(frozen=True)
class Tiling:
    """Overlapping tiles. Sizes in pixels and frames; overlap as a share of a tile. 0 = not tiled along that axis.

    Attributes:
        parked: decode with activations in main memory, parts of them at a time on the device (vae/layers.py): the same frames.
    """

    tile_size: int = 256
    overlap: float = 0.25
    temporal_tile: int = 0
    parked: bool = False


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


OPEN_SORA_2 = TransformerConfig(
    in_channels=16,
    patch_size=2,
    hidden_size=3072,
    num_heads=24,
    mlp_hidden_size=12288,
    depth=19,
    depth_single_blocks=38,
    context_in_dim=4096,
    vec_in_dim=768,
    cond_embed=True,
    guidance_embed=False,
)
OPEN_SORA_2_DC_AE = TransformerConfig(**{**OPEN_SORA_2.__dict__, "in_channels": 128, "patch_size": 1})
FLUX_DEV = TransformerConfig(**{**OPEN_SORA_2.__dict__, "cond_embed": False, "guidance_embed": True})
HUNYUAN_VAE = VAEConfig(latent_channels=16, block_out_channels=(128, 256, 512, 512), layers_per_block=2)
VIDEO_DC_AE = DCAEConfig(
    latent_channels=128,
    widths=(128, 256, 512, 512, 1024, 1024),
    encoder_depths=(2, 2, 2, 3, 3, 3),
    decoder_depths=(3, 3, 3, 3, 3, 3),
)
