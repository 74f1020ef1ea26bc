"""Rotary position embedding over (t, h, w), in the rotate-half layout the released 2.0 file was trained with.

Pairs inside a head of dimension D are (j, D/2 + j). Files in the interleaved layout (2j, 2j + 1) are
permuted once at load (layout.py), so that there is one layout here.
"""

import torch
from torch import Tensor

from ...ops import token_chunks


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


def rotate_half(x: Tensor, pe: Tensor) -> Tensor:
    """Rotate [B, L, H, D] by the table of [2, L, 1, D/2], in fp32, a chunk of tokens at a time; the result has x's dtype."""
    chunks = token_chunks(x)
    if len(chunks) == 1:
        return _rotate(x, pe)
    out = torch.empty_like(x)
    for tokens in chunks:
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
