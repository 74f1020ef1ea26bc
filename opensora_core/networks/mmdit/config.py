"""Sizes of the MMDiT, read from a checkpoint's tensor shapes, and those of the released ones.

Modules never read files, environment or arguments. What shapes cannot tell follows the released proportions, written here.
"""

from dataclasses import dataclass

from ...geometry import CAUSAL, HIGH_COMPRESSION, Grid

ROPE_THETA = 10000


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
