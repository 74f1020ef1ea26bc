"""Sizes of the MMDiT, read from a checkpoint's tensor shapes, and those of the released ones.

Modules never read files, environment or arguments. What shapes cannot tell follows the released proportions, written here.
"""

import math
from dataclasses import dataclass, replace

from ...errors import CheckpointError
from ...geometry import CAUSAL, HIGH_COMPRESSION, Grid
from ...shapes import Shapes, count, size


@dataclass(frozen=True)
class TransformerConfig:
    """The MMDiT; the defaults are Open-Sora 2.0's. `in_channels` counts latent channels before packing (16), not packed features (64)."""

    in_channels: int = 16
    patch_size: int = 2
    hidden_size: int = 3072
    num_heads: int = 24
    mlp_hidden_size: int = 12288
    depth: int = 19
    depth_single_blocks: int = 38
    context_in_dim: int = 4096
    vec_in_dim: int = 768
    cond_embed: bool = True
    guidance_embed: bool = False

    @classmethod
    def of(cls, shapes: Shapes) -> "TransformerConfig":
        """Sizes from a file's shapes without prefix, unfused or fused.

        heads = hidden / length of `key_norm`; the patch area is what the condition's one mask channel adds to
        its packed features, cond_in - img_in (2x2 where there is no cond_in, as in Flux). Second dimensions are trusted only
        of input layers: quantisers halve others. Raises a CheckpointError where a tensor is missing or they contradict each other.
        """
        hidden, packed = size(shapes, "img_in.bias"), size(shapes, "final_layer.linear.bias")
        norm = "double_blocks.0.img_attn.norm.key_norm."
        head_dim = size(shapes, norm + "scale" if norm + "scale" in shapes else norm + "weight")
        patch_size = _patch_size(shapes, packed)
        if hidden % head_dim or head_dim % 16 or packed % patch_size**2:
            raise CheckpointError(
                f"The sizes of this transformer cannot be: hidden {hidden} with heads of {head_dim} (rotary axes need a multiple of 16), "
                f"{packed} packed channels with a patch of {patch_size}. Download the file again."
            )
        return cls(
            in_channels=packed // patch_size**2,
            patch_size=patch_size,
            hidden_size=hidden,
            num_heads=hidden // head_dim,
            mlp_hidden_size=size(shapes, "double_blocks.0.img_mlp.0.bias"),
            depth=count(shapes, "double_blocks."),
            depth_single_blocks=count(shapes, "single_blocks."),
            context_in_dim=size(shapes, "txt_in.weight", 1),
            vec_in_dim=size(shapes, "vector_in.in_layer.weight", 1),
            cond_embed="cond_in.bias" in shapes,
            guidance_embed="guidance_in.in_layer.bias" in shapes,
        )

    def with_blocks(self, most: int) -> "TransformerConfig":
        """These sizes with at most so many blocks of each kind."""
        return replace(self, depth=min(most, self.depth), depth_single_blocks=min(most, self.depth_single_blocks))

    def words(self) -> str:
        """For people: "hidden 3072, 24 heads of 128, 19 double and 38 single blocks"."""
        return (
            f"hidden {self.hidden_size}, {self.num_heads} heads of {self.head_dim}, "
            f"{self.depth} double and {self.depth_single_blocks} single blocks"
        )

    @property
    def patch(self) -> tuple[int, int, int]:
        """Latent (frames, rows, columns) of a token."""
        return 1, self.patch_size, self.patch_size

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def axes_dim(self) -> tuple[int, int, int]:
        """Rotary dimensions of (t, h, w): 1/8, 7/16, 7/16 of a head; 128 -> 16, 56, 56; 32 -> 4, 14, 14."""
        return self.head_dim // 8, self.head_dim * 7 // 16, self.head_dim * 7 // 16

    @property
    def grid(self) -> Grid:
        """The grid of the autoencoder whose latents it works on: a single latent pixel is a token only for the Video DC-AE."""
        return HIGH_COMPRESSION if self.patch_size == HIGH_COMPRESSION.patch else CAUSAL

    @property
    def packed_channels(self) -> int:
        return self.in_channels * self.patch_size**2


OPEN_SORA_2 = TransformerConfig()
OPEN_SORA_2_DC_AE = replace(OPEN_SORA_2, in_channels=128, patch_size=1)
FLUX_DEV = replace(OPEN_SORA_2, cond_embed=False, guidance_embed=True)


def _patch_size(shapes: Shapes, packed: int) -> int:
    if "cond_in.weight" not in shapes:
        return FLUX_DEV.patch_size
    img_features = size(shapes, "img_in.weight", 1)
    area = size(shapes, "cond_in.weight", 1) - img_features
    if img_features < packed and packed % img_features == 0:
        area *= packed // img_features  # 4-bit weights show half their columns
    side = math.isqrt(max(area, 0))
    if side < 1 or side * side != area:
        raise CheckpointError(
            f"cond_in reads {area + img_features} features and img_in {img_features}; their difference must be the patch area, 4 or 1. Download the file again."
        )
    return side
