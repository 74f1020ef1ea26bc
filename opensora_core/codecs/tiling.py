"""Encoding and decoding in overlapping tiles, in the sizes and with the blending of upstream.

Every function here works over any callable of the VAE's shape, the host's own VAE included. Tiles have their own
GroupNorm statistics and attention, so a tiled result is not the untiled one: to get upstream's frames, keep
upstream's sizes, which are `Tiling()`: 256 pixels every 192, whole clip in time. `Tiling(temporal_tile=64)` is
upstream's temporal tiling.

Starts run over the whole range with the stride, so the last tile may be a sliver. A tile is blended, linearly and in
place, with the tile above, then with the tile on its left, both as they were after their own blending; then it is
cut to one stride. In time every tile is one latent frame longer than its nominal size, since a tile's first latent
frame gives one frame instead of four: every tile but the first drops its first output, and only then is blended.
Source: hpcaitech/Open-Sora@7ad6a96a opensora/models/hunyuan_vae/autoencoder_kl_causal_3d.py.

A VAE that is not causal (`grid`; the Video DC-AE, whose own sizes are `Tiling(temporal_tile=32)`) needs no such frame in time.
There a last tile of one latent frame would be decoded as a picture, to one frame instead of four: upstream does that and
loses three frames of 52, 76, 100 or 124. Here the tile before, which reaches as far, keeps all of its frames.
Source: hpcaitech/Open-Sora@7ad6a96a opensora/models/dc_ae/models/dc_ae.py.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import count, product
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import OpenSoraError
from ..geometry import CAUSAL, TIME_COMPRESSION, WHOLE_CLIP, Grid, Tiling
from .codec import Encoded

MIN_TILE_SIZE = 64  # pixels
TILE_SIZE_MULTIPLE = 16
MIN_TEMPORAL_TILE = 8  # frames
HOME = torch.device("cpu")  # where a parked decode has its activations
MAX_OVERLAP = 0.5  # share of a tile; beyond it, three tiles would meet

Progress = Callable[[int, int], None]


class _Axis(NamedTuple):
    """How one axis is cut, in the units of the tiled function's input and output (pixels or latents)."""

    size: int  # of a tile, in
    stride: int  # between tile starts, in
    blend: int  # out
    keep: int  # of a tile after blending, out

    def scaled(self, side: int) -> int:
        """A position or size of the input, a multiple of the compression, in the output's units."""
        return side * self.keep // self.stride


def check_tiling(tiling: Tiling, grid: Grid = CAUSAL) -> Tiling:
    """Return `tiling` if it can be used.

    Raises:
        OpenSoraError: a tile size that is not 0 or a multiple of 16 (of the grid's latent pixels) from 64 pixels, a temporal
            tile that is not 0, WHOLE_CLIP or a multiple of 4 from 8 frames, or an overlap outside 0..0.5.
    """
    _check_multiple("tile_size", tiling.tile_size, max(TILE_SIZE_MULTIPLE, grid.space), MIN_TILE_SIZE, "pixels")
    if tiling.temporal_tile != WHOLE_CLIP:
        _check_multiple("temporal_tile", tiling.temporal_tile, TIME_COMPRESSION, MIN_TEMPORAL_TILE, "frames")
    if not 0 <= tiling.overlap <= MAX_OVERLAP:  # also false for NaN
        raise OpenSoraError(
            f"overlap={tiling.overlap} is not a share of a tile between 0 and {MAX_OVERLAP}; use 0.25, as the reference does."
        )
    return tiling


def num_tiles(shape: tuple[int, ...], tiling: Tiling, latents: bool, grid: Grid = CAUSAL) -> int:
    """How many times a tensor of this shape calls the VAE: 24x42 latents 2, 72x128 latents 18 at `Tiling()`.

    shape: ending in (T, H, W): of the latents to decode (latents: True), or of the frames to encode.
    """
    frames, height, width = shape[-3:]
    time, space = _axes(tiling, latents, grid)
    is_whole = space is None or max(height, width) <= space.size
    in_space = 1 if is_whole else len(range(0, height, space.stride)) * len(range(0, width, space.stride))
    return in_space * len(_time_tiles(frames, time, grid))


def largest_tile(shape: tuple[int, ...], tiling: Tiling, latents: bool, grid: Grid) -> tuple[int, int, int]:
    """(frames, height, width) of the largest tile of a tensor of this shape; arguments as for `num_tiles`."""
    frames, height, width = shape[-3:]
    time, space = _axes(tiling, latents, grid)
    frames = max(stop - start for start, stop in _time_tiles(frames, time, grid))
    return frames, min(height, space.size if space else height), min(width, space.size if space else width)


def tiled_decode(
    decode: Callable[[Tensor], Tensor],
    latents: Tensor,
    tiling: Tiling,
    progress: Progress | None = None,
    grid: Grid = CAUSAL,
) -> Tensor:
    """Decode latents, in tiles where they are larger than one.

    Args:
        decode: latents [B, C, t, h, w] -> pixels [B, 3, 4 * (t - 1) + 1, 8 * h, 8 * w], a new tensor. Where tiles are parked it is given
            a home as well, as Codec.decode.
        latents: unscaled VAE latents.
        tiling: sizes in pixels and frames.
        progress: called with (tiles done, tiles in all) after every tile. What it raises ends the decoding.
        grid: of the VAE; sizes above are the causal one's.

    Returns what `decode` would have given of the whole. Raises an OpenSoraError for an impossible tiling, or latents that are not 5-dimensional.
    """
    _check_rank(latents, "latents")
    return _tiled((lambda tile: decode(tile, HOME)) if tiling.parked else decode, latents, tiling, progress, True, grid)


def tiled_encode(
    encode: Callable[[Tensor], Encoded],
    pixels: Tensor,
    tiling: Tiling,
    progress: Progress | None = None,
    grid: Grid = CAUSAL,
) -> Encoded:
    """Encode frames, in tiles where they are larger than one. Moments are what is blended, not samples.

    Args:
        encode: `Codec.encode` of pixels [B, 3, T, H, W]; its values a new tensor.
        pixels: -1..1; T = 4k + 1, sides multiples of 8.
        tiling, progress, grid: as for `tiled_decode`.

    Returns what `encode` would have given of the whole. Raises an OpenSoraError for an impossible tiling, rank, frame count or size.
    """
    _check_rank(pixels, "pixels")
    grid.frames.check(pixels.shape[2])
    grid.check_size(*pixels.shape[3:], multiple=grid.space)
    kind = None

    def values_of(tile: Tensor) -> Tensor:
        nonlocal kind
        encoded = encode(tile)
        kind = replace(encoded, values=None)  # a name for the tile itself would keep it alive
        return encoded.values

    values = _tiled(values_of, pixels, tiling, progress, False, grid)
    return replace(kind, values=values)


def _tiled(function: Callable[[Tensor], Tensor], x: Tensor, tiling: Tiling, progress: Progress | None, latents: bool, grid: Grid) -> Tensor:
    total, done = num_tiles(x.shape, check_tiling(tiling, grid), latents, grid), count(1)
    (time, space), frames = _axes(tiling, latents, grid), x.shape[2]

    def run(tile: Tensor) -> Tensor:
        result = function(tile)
        if progress is not None:
            progress(next(done), total)
        return result

    tiles = _time_tiles(frames, time, grid)
    if len(tiles) == 1:
        return _spatially_tiled(run, x, space)
    result, tail, written = None, None, 0
    for start, stop in tiles:
        part = _spatially_tiled(run, x[:, :, start:stop], space)
        if result is None:
            length = grid.pixel_frames(frames) if latents else -(-frames // TIME_COMPRESSION)
            result = part.new_empty((*part.shape[:2], length, *part.shape[3:]))
        else:
            part = part[:, :, grid.frames.lead :]
            _blend(tail, part, time.blend, axis=2)
        keep = time.keep + (grid.frames.lead if start == 0 else 0)
        kept = part if (start, stop) == tiles[-1] else part[:, :, :keep]
        result[:, :, written : written + kept.shape[2]] = kept
        written += kept.shape[2]
        tail = _tail(part, time.blend, axis=2)
    return result


def _spatially_tiled(function: Callable[[Tensor], Tensor], x: Tensor, space: _Axis | None) -> Tensor:
    height, width = x.shape[3:]
    if space is None or max(height, width) <= space.size:
        return function(x)
    result, above, beside = None, {}, None
    for top, left in product(range(0, height, space.stride), range(0, width, space.stride)):
        part = function(x[..., top : top + space.size, left : left + space.size])
        if result is None:
            result = part.new_empty((*part.shape[:3], *(space.scaled(side) for side in (height, width))))
        if top:
            _blend(above[left], part, space.blend, axis=3)
        if left:
            _blend(beside, part, space.blend, axis=4)
        row, column = (space.scaled(start) for start in (top, left))
        kept = part[..., : space.keep, : space.keep]
        result[..., row : row + kept.shape[3], column : column + kept.shape[4]] = kept
        # The next row and the next column read no more of this tile than these strips.
        above[left], beside = _tail(part, space.blend, axis=3), _tail(part, space.blend, axis=4)
    return result


def _blend(before: Tensor, tile: Tensor, extent: int, axis: int) -> None:
    """Fade, in place, from the end of `before` into the beginning of `tile`; weights 0, 1/E, 2/E ..."""
    extent = min(before.shape[axis], tile.shape[axis], extent)
    if extent == 0:
        return
    # In double, then in at least fp32: upstream's weights are Python floats. On the CPU, as some devices have no double.
    weight = torch.arange(extent, dtype=torch.float64) / extent
    weight = weight.view([-1 if a == axis else 1 for a in range(tile.ndim)])
    fp = torch.promote_types(tile.dtype, torch.float32)
    fade_in, fade_out = (w.to(fp).to(tile.device) for w in (weight, 1 - weight))
    old = before.narrow(axis, before.shape[axis] - extent, extent).to(fp) * fade_out
    new = tile.narrow(axis, 0, extent)
    new.copy_(old + new.to(fp) * fade_in)


def _tail(tile: Tensor, extent: int, axis: int) -> Tensor:
    """A copy of the last `extent` positions, so that the tile itself can be freed."""
    extent = min(tile.shape[axis], extent)
    return tile.narrow(axis, tile.shape[axis] - extent, extent).clone()


def _axes(tiling: Tiling, latents: bool, grid: Grid) -> list[_Axis | None]:
    """(time, space) of a tiling, None where an axis is not tiled, as time is not of a clip of pieces, which its codec takes one at a time.

    Overlaps are whole latents, rounded down, so that strides and kept sizes agree in pixels and latents.
    """
    axes, in_time = [], 0 if grid.piece else tiling.temporal_tile
    for tile, compression in ((in_time, TIME_COMPRESSION), (tiling.tile_size, grid.space)):
        size = tile // compression
        overlap = int(size * tiling.overlap + 1e-9)  # 0.3 * 40 is 12, also in binary
        stride = size - overlap
        inside, outside = (1, compression) if latents else (compression, 1)
        cut = _Axis(size * inside, stride * inside, overlap * outside, stride * outside)
        axes.append(None if tile in (0, WHOLE_CLIP) else cut)
    return axes


def _time_tiles(frames: int, time: _Axis | None, grid: Grid) -> list[tuple[int, int]]:
    """(first, past the last) of every tile of a clip, in the input's units."""
    if time is None or frames <= time.size:
        return [(0, frames)]
    # A last tile of one frame gives one output: causal, it is dropped, so nothing is computed for it; else see the module.
    starts = [start for start in range(0, frames, time.stride) if start == 0 or frames - start > 1]
    stops = [min(frames, start + time.size + grid.frames.lead) for start in starts]
    return list(zip(starts, [*stops[:-1], frames], strict=True))


def _check_multiple(name: str, value: int, multiple: int, least: int, unit: str) -> None:
    if value != 0 and (value < least or value % multiple):
        nearest = max(least, int(value / multiple + 0.5) * multiple)
        raise OpenSoraError(f"{name}={value} is not a multiple of {multiple} {unit} from {least} on; use {nearest}, or 0 for no tiles.")


def _check_rank(x: Tensor, name: str) -> None:
    if x.ndim != 5:
        raise OpenSoraError(
            f"{name} of shape {list(x.shape)} are not a clip; expected 5 dimensions: batch, channels, frames, height, width."
        )
