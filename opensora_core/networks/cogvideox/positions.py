"""Where tokens are: the table that the 2B adds to them, and the angles by which the other models turn queries and keys.

Source: huggingface/diffusers@58eb52c0 models/embeddings.py and pipelines/cogvideo/pipeline_cogvideox.py.
"""

import torch
from torch import Tensor

from .config import BASE_GRID, CogVideoXConfig

THETA = 10000
SINCOS_SCALE = 1.875  # rows and columns of the grid that the 2B's table was made for, to BASE_GRID's
CHUNK_ELEMENTS = 2**24  # of what is rotated at once: 64 MiB in fp32

TokenGrid = tuple[int, int, int]  # tokens along time, height, width


def sincos_tables(grid: TokenGrid, dim: int) -> list[Tensor]:
    """The 2B's positions, fp64, as parts of the features that follow one another, each to be broadcast over [T, h, w, part].

    Time has the first quarter, width the next three eighths, height the last; within a part sines come first.
    """
    tables = []
    for axis, features, scale in ((0, dim // 4, 1.0), (2, dim * 3 // 8, SINCOS_SCALE), (1, dim * 3 // 8, SINCOS_SCALE)):
        angles = _angles(torch.arange(grid[axis], dtype=torch.float64) / scale, features)
        tables.append(_along(axis, torch.cat((angles.sin(), angles.cos()), dim=-1)))
    return tables


def rotary_table(config: CogVideoXConfig, grid: TokenGrid, device) -> Tensor:
    """Cosines and sines of every video token, [2, T * h * w, 1, head_dim / 2] fp32, in the order of a head's pairs (2k, 2k + 1).

    A quarter of a head is time, three eighths each height and width.
    """
    dims = config.head_dim // 4, config.head_dim * 3 // 8, config.head_dim * 3 // 8
    angles = [_angles(positions, dim) for positions, dim in zip(rotary_positions(config, grid), dims, strict=True)]
    tables = []
    for function in (torch.cos, torch.sin):
        parts = [_along(axis, function(part).float().to(device)).expand(*grid, -1) for axis, part in enumerate(angles)]
        tables.append(torch.cat(parts, dim=-1).flatten(0, 2)[:, None])
    return torch.stack(tables)


def rotary_positions(config: CogVideoXConfig, grid: TokenGrid) -> list[Tensor]:
    """Positions along time, height and width, fp64.

    Integers, but that the 1.0 models lay a grid of another size into the middle of BASE_GRID: as large as fits, its last position at
    the absolute end times (n - 1) / n.
    """
    positions = [torch.arange(side, dtype=torch.float64) for side in grid]
    if config.patch[0] == 1:
        (_, base_h, base_w), (_, h, w) = BASE_GRID, grid
        fitted = (base_h, round(base_h / h * w)) if h / w > base_h / base_w else (round(base_w / w * h), base_w)
        for axis, length in enumerate(fitted, 1):
            start, side = round((BASE_GRID[axis] - length) / 2), grid[axis]
            positions[axis] = torch.linspace(start, (start + length) * (side - 1) / side, side, dtype=torch.float64)
    return positions


def rotate(x: Tensor, pe: Tensor) -> None:
    """Turn the pairs (2k, 2k + 1) of [B, L, H, D] in place, in fp32; a chunk of tokens at a time, or that work would be the block's largest."""
    step = max(1, CHUNK_ELEMENTS * x.shape[1] // max(1, x.numel()))
    for start in range(0, x.shape[1], step):
        tokens = slice(start, start + step)
        cos, sin = pe[:, tokens]
        a, b = x[:, tokens].float().unflatten(-1, (-1, 2)).unbind(-1)
        x[:, tokens] = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)


def _angles(positions: Tensor, dim: int) -> Tensor:
    """positions times THETA**(-2k / dim), [n, dim / 2]. On the CPU: some devices have no fp64."""
    return torch.outer(positions, THETA ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim))


def _along(axis: int, table: Tensor) -> Tensor:
    """[n, D] as [1, 1, 1, D] but for n at an axis of (T, h, w)."""
    return table.view([len(table) if each == axis else 1 for each in range(3)] + [-1])
