"""Sizes of a CogVideoX transformer, read from a checkpoint's tensor shapes, and those of the released ones."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ...errors import CheckpointError, OpenSoraError
from ...geometry import SPACE_COMPRESSION, FrameRule, Grid, sized
from ...shapes import EqualBlocks, Shapes, count, dim, size

BASE_GRID = 13, 30, 45  # tokens (time, height, width) of the 1.0 models' 49 frames at 480x720
SINCOS_HEADS = 30  # the 2B's; shapes hold no other trace of which positions a model computes
TEXT_TOKENS = 226


@dataclass(frozen=True)
class CogVideoXConfig(EqualBlocks):
    """Sizes; the defaults are the 2B's.

    Attributes:
        in_channels: channels of the latents.
        takes_picture: whether the latents of a picture go in beside them (the I2V models).
        patch: latent (frames, rows, columns) of a token: 1, 2, 2 in 1.0; 2, 2, 2 in 1.5.
        time_embed_dim, ofs_embed_dim: of the embedded timestep, and of the constant beside it in 1.5-5B-I2V (0: none).
        table_rows: text tokens and positions of the 5B-I2V's learned table (0: none).
    """

    in_channels: int = 16
    takes_picture: bool = False
    patch: tuple[int, int, int] = (1, 2, 2)
    hidden_size: int = 1920
    head_dim: int = 64
    mlp_hidden_size: int = 7680
    depth: int = 30
    context_in_dim: int = 4096
    time_embed_dim: int = 512
    ofs_embed_dim: int = 0
    table_rows: int = 0

    @classmethod
    def of(cls, shapes: Shapes) -> "CogVideoXConfig":
        """Sizes from shapes without prefix, under the diffusers layout's keys (layout.py brings others there).

        Raises a CheckpointError where a tensor is missing, or the channels are those of another project's model.
        """
        is_flat = len(shapes.get("patch_embed.proj.weight", ())) == 2  # 1.5 has a linear layer where 1.0 has a convolution
        patch = (2 if is_flat else 1, 2, 2)
        channels = size(shapes, "proj_out.bias") // math.prod(patch)
        taken = size(shapes, "patch_embed.proj.weight", 1) // (math.prod(patch) if is_flat else 1)
        if taken not in (channels, 2 * channels):
            raise CheckpointError(
                f"This CogVideoX transformer has {taken} input channels, as other projects' models have (Fun, Control, VOID); use one "
                f"that has {channels} (text to video) or {2 * channels} (picture to video)."
            )
        return cls(
            in_channels=channels,
            takes_picture=taken > channels,
            patch=patch,
            hidden_size=size(shapes, "patch_embed.proj.bias"),
            head_dim=size(shapes, "transformer_blocks.0.attn1.norm_q.weight"),
            mlp_hidden_size=size(shapes, "transformer_blocks.0.ff.net.0.proj.bias"),
            depth=count(shapes, "transformer_blocks."),
            context_in_dim=size(shapes, "patch_embed.text_proj.weight", 1),
            time_embed_dim=size(shapes, "time_embedding.linear_1.bias"),
            ofs_embed_dim=dim(shapes, "ofs_embedding.linear_1.bias", 0, 0),
            table_rows=dim(shapes, "patch_embed.pos_embedding", 1, 0),
        )

    @property
    def patch_size(self) -> int:
        return self.patch[1]

    @property
    def grid(self) -> Grid:
        return GRID_1_0 if self.patch[0] == 1 else GRID_1_5

    @property
    def num_heads(self) -> int:
        return self.hidden_size // self.head_dim

    @property
    def is_rotary(self) -> bool:
        """Whether attention turns queries and keys by their position; the 2B adds a table to its tokens instead."""
        return self.num_heads != SINCOS_HEADS


# Of 1.0 the one size that it was trained on; of 1.5 those whose short side is 768.
_SIZES_1_0 = {"3:2": (480, 720)}
_SIZES_1_5 = {
    "16:9": (768, 1360), "9:16": (1360, 768), "1:1": (768, 768), "4:3": (768, 1024), "3:4": (1024, 768), "3:2": (768, 1152),
    "2:3": (1152, 768),
}  # fmt: skip


def _grid(patch_time: int, name: str, sizes: Mapping[str, tuple[int, int]], frames: FrameRule, default_frames: int) -> Grid:
    def size(resolution: str, aspect_ratio: str, multiple: int) -> tuple[int, int]:
        if resolution != name:
            raise OpenSoraError(f"resolution={resolution!r} is not known to this model; use {name}, or width and height.")
        return sized(sizes, aspect_ratio)

    names = {"size_table": size, "size_names": (name,), "ratios": tuple(sizes)}
    return Grid(SPACE_COMPRESSION, 2, frames, default_frames, **names, patch_time=patch_time)


GRID_1_0 = _grid(1, "480p", _SIZES_1_0, FrameRule("8k+1", step=8, lead=1, shortest_clip=9, longest=49), 49)
GRID_1_5 = _grid(2, "768p", _SIZES_1_5, FrameRule("16k+1", step=16, lead=1, shortest_clip=17, longest=161), 81)
COGVIDEOX_2B = CogVideoXConfig()
COGVIDEOX_5B = replace(COGVIDEOX_2B, hidden_size=3072, mlp_hidden_size=12288, depth=42)
COGVIDEOX_5B_I2V = replace(COGVIDEOX_5B, takes_picture=True, table_rows=TEXT_TOKENS + math.prod(BASE_GRID))
COGVIDEOX_1_5_5B = replace(COGVIDEOX_5B, patch=(2, 2, 2))
COGVIDEOX_1_5_5B_I2V = replace(COGVIDEOX_1_5_5B, takes_picture=True, ofs_embed_dim=512)
