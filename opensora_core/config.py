"""What a model is, as flat frozen dataclasses, and the values of the released ones.

Configurations are read from a checkpoint's tensor shapes (checkpoint/detect.py); modules never read
files, environment or arguments. What shapes cannot tell follows the released proportions, written here.
"""

from dataclasses import dataclass

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
    def packed_channels(self) -> int:
        return self.in_channels * self.patch_size**2

    @property
    def packed_cond_channels(self) -> int:
        """One mask channel and the reference latent, packed: 68 for the released model."""
        return (self.in_channels + 1) * self.patch_size**2


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


@dataclass(frozen=True)
class Tiling:
    """Overlapping tiles. Sizes in pixels and frames; overlap as a share of a tile. 0 = not tiled along that axis."""

    tile_size: int = 256
    overlap: float = 0.25
    temporal_tile: int = 0


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
