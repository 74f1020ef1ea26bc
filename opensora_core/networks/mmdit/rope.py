"""Rotary position embedding over (t, h, w), in the rotate-half layout the released 2.0 file was trained with.

Pairs inside a head of dimension D are (j, D/2 + j). Files in the interleaved layout (2j, 2j + 1) are
permuted once at load (layout.py), so that there is one layout here.
"""

import torch
from torch import Tensor

from .config import ROPE_THETA

CHUNK_ELEMENTS = 2**24  # of one rotated chunk: 64 MiB in fp32, above which kernels are as fast as they get


def position_ids(latent_frames: int, rows: int, columns: int, device, options: dict | None = None) -> Tensor:
    """Integer positions in patch units, [T * rows * columns, 3] fp32 in the order t, h, w.

    Args:
        options: scale and shift of an axis, under the host's names: scale_t, shift_t, scale_y, shift_y,
            scale_x, shift_x. A scale stretches the span from first to last position.
    """
    options = options or {}
    axes = []
    for count, name in ((latent_frames, "t"), (rows, "y"), (columns, "x")):
        positions = torch.arange(count, dtype=torch.float32, device=device)
        axes.append(positions * options.get(f"scale_{name}", 1.0) + options.get(f"shift_{name}", 0.0))
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)


def rotary_table(ids: Tensor, axes_dim: tuple[int, ...]) -> Tensor:
    """Cosines and sines for every token.

    Args:
        ids: [L, 3] positions.
        axes_dim: rotary dimensions of each axis, summing to the head dimension D. Inside an axis of d,
            angle k is pos * theta**(-2k/d), k = 0..d/2-1.

    Returns:
        [2, L, 1, D/2] fp32: cos, sin, ready to broadcast over heads of [B, L, H, D].
    Source: SPEC of RoFormer (arXiv 2104.09864); axes as in black-forest-labs/flux math.py, rope.
    """
    angles = []
    for axis, dim in enumerate(axes_dim):
        # fp64 where it exists: a position of 256 at full frequency loses 1e-5 in fp32.
        precise = torch.float32 if ids.device.type == "mps" else torch.float64
        exponent = torch.arange(0, dim, 2, dtype=precise, device=ids.device) / dim
        angles.append(ids[:, axis, None].to(precise) * ROPE_THETA**-exponent)
    table = torch.cat(angles, dim=-1)[:, None]
    return torch.stack((table.cos(), table.sin())).float()


def rotate_half(x: Tensor, pe: Tensor) -> Tensor:
    """Rotate [B, L, H, D] by the table of [2, L, 1, D/2], in fp32; the result has x's dtype.

    Long sequences go a chunk of tokens at a time: the fp32 work would else be the largest thing in the block.
    """
    step = max(1, CHUNK_ELEMENTS * x.shape[1] // max(1, x.numel()))
    if step >= x.shape[1]:
        return _rotate(x, pe)
    out = torch.empty_like(x)
    for start in range(0, x.shape[1], step):
        tokens = slice(start, start + step)
        out[:, tokens] = _rotate(x[:, tokens], pe[:, tokens])
    return out


def _rotate(x: Tensor, pe: Tensor) -> Tensor:
    cos, sin = pe
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    rotated = wide.unflatten(-1, (2, -1)).mul(cos.unsqueeze(-2)).flatten(-2)
    half = cos.shape[-1]
    rotated[..., :half].addcmul_(second, sin, value=-1)  # our own temporary: half the memory traffic of joining two halves
    rotated[..., half:].addcmul_(first, sin)
    return rotated.to(x.dtype)
