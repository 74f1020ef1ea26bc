"""Sizes of the STDiT networks of Open-Sora 1.0 to 1.3, read from a checkpoint's tensor shapes.

What shapes cannot tell follows the released files, and is written here.
"""

import math
from dataclasses import dataclass

from ...errors import CheckpointError
from ...geometry import Grid
from ...geometry.open_sora_1 import EVERY_FRAME, PIECES, SHARED_PIECES
from ...shapes import EqualBlocks, Shapes, count, dim, size

PATCH_SIZE = 2  # latent pixels per token side; time is never patched
BASE_SIZE = 512  # pixels: position scale 1 is a picture of 512x512
HEAD_DIM = 72  # where no tensor has the size of a head (1.0)
PICTURE_FPS = 120  # what the networks are told of a picture
WINDOW = 8  # tokens per side of the windows of 1.3's temporal blocks


@dataclass(frozen=True)
class STDiTConfig(EqualBlocks):
    """An STDiT.

    Attributes:
        in_channels, out_channels: latent channels; twice as many go out, the second half a variance.
        text_length, context_in_dim: of the null caption, which is what the network was trained on.
        in_turn: whether blocks over space and over time are two lists, of `depth` each (1.2, 1.3); else each block does both.
        window: side of the windows in which temporal blocks attend over all frames (1.3), or 0: single positions over time.
        has_sizes: whether picture size, length and frame rate are embedded and frame masks known (1.1).
        space_scale, time_scale: divide the positions of 1.0's fixed embeddings.
    """

    in_channels: int
    out_channels: int
    hidden_size: int
    head_dim: int
    mlp_hidden_size: int
    depth: int
    text_length: int
    context_in_dim: int
    in_turn: bool = False
    window: int = 0
    has_sizes: bool = True
    space_scale: float = 1.0
    time_scale: float = 1.0

    @classmethod
    def of(cls, shapes: Shapes) -> "STDiTConfig":
        """Sizes from a file's shapes without prefix. Raises a CheckpointError where one is missing, or they contradict each other."""
        hidden, blocks = size(shapes, "x_embedder.proj.bias"), "spatial_blocks." if count(shapes, "spatial_blocks.") else "blocks."
        head_dim = dim(shapes, f"{blocks}0.attn.q_norm.weight", 0, HEAD_DIM)
        if hidden % head_dim or hidden % 4:
            raise CheckpointError(
                f"The sizes of this transformer cannot be: hidden {hidden} with heads of {head_dim}. Download the file again."
            )
        tokens, frames = dim(shapes, "pos_embed", 1, 1024), dim(shapes, "pos_embed_temporal", 1, 16)
        return cls(
            in_channels=size(shapes, "x_embedder.proj.weight", 1),
            out_channels=size(shapes, "final_layer.linear.bias") // PATCH_SIZE**2,
            hidden_size=hidden,
            head_dim=head_dim,
            mlp_hidden_size=size(shapes, f"{blocks}0.mlp.fc1.bias"),
            depth=count(shapes, blocks),
            text_length=size(shapes, "y_embedder.y_embedding"),
            context_in_dim=size(shapes, "y_embedder.y_embedding", 1),
            in_turn=blocks == "spatial_blocks.",
            window=WINDOW if "x_embedder_cond.proj.bias" in shapes else 0,
            has_sizes="fps_embedder.mlp.0.bias" in shapes,
            # The released 1.0 models: positions in steps of 1/32 of the side, and 16 frames, or 64 of which three stand for two.
            space_scale=math.isqrt(tokens) / 32,
            time_scale=2 / 3 if frames > 16 else 1.0,
        )

    @property
    def predicted_channels(self) -> int:
        """Channels of a forward's result: 1.2 and 1.3 leave the variance out."""
        return self.in_channels if self.in_turn else self.out_channels

    @property
    def patch_size(self) -> int:
        return PATCH_SIZE

    @property
    def grid(self) -> Grid:
        if self.window:
            return SHARED_PIECES
        return PIECES if self.in_turn else EVERY_FRAME
