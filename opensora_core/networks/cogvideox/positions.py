"""Where tokens are: the table that the 2B adds to them, and the positions by which the other models turn queries and keys.

Source: huggingface/diffusers@58eb52c0 models/embeddings.py and pipelines/cogvideo/pipeline_cogvideox.py.
"""

import torch
from torch import Tensor

from ...ops import THETA
from .config import BASE_GRID, CogVideoXConfig

SINCOS_SCALE = 1.875  # rows and columns of the grid that the 2B's table was made for, to BASE_GRID's

TokenGrid = tuple[int, int, int]  # tokens along time, height, width


def sincos_tables(grid: TokenGrid, dim: int) -> list[Tensor]:
    """The 2B's positions, fp64 on the CPU, as parts of the features that follow one another, each to be broadcast over [T, h, w, part].

    Time has the first quarter, width the next three eighths, height the last; within a part sines come first.
    """
    tables = []
    for axis, features, scale in ((0, dim // 4, 1.0), (2, dim * 3 // 8, SINCOS_SCALE), (1, dim * 3 // 8, SINCOS_SCALE)):
        steps = THETA ** -(torch.arange(0, features, 2, dtype=torch.float64) / features)
        angles = torch.outer(torch.arange(grid[axis], dtype=torch.float64) / scale, steps)
        shape = [grid[axis] if each == axis else 1 for each in range(3)]
        tables.append(torch.cat((angles.sin(), angles.cos()), dim=-1).view(*shape, -1))
    return tables


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
