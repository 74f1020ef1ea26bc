"""The tiles of one decode, computed by all processes of a group and blended by the first, which gets those of the others in their turn.

Tiles go through main memory. A process without room for one says so, so that the first can try another way as if the room were its own.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from ..codecs.codec import Codec
from ..parallel.group import Group
from .device import is_out_of_memory, unless_out_of_memory

DECODE = "decode"
_RANK = 5  # of a tile; before it goes its shape, zeros where memory ran out


class SharedTiles:
    """What decodes the tiles of a clip, in the first process. A context manager. decode: of one tile, as Codec.decode. total: tiles of the clip."""

    def __init__(self, group: Group, decode: Callable[..., Tensor], total: int):
        self._group, self._decode, self._total = group, decode, total
        self._next, self._dtype = 0, torch.float32

    def __call__(self, tile: Tensor, *home: torch.device) -> Tensor:
        owner, self._dtype = self._next % self._group.size, tile.dtype
        self._next += 1
        if owner == 0:
            return self._decode(tile, *home)
        made = self._received(owner)
        if made is None:
            raise torch.cuda.OutOfMemoryError(f"process {owner} is out of memory")
        return made.to(*home or (tile.device,))

    def _received(self, owner: int) -> Tensor | None:
        shape = torch.zeros(_RANK, dtype=torch.int64)
        dist.recv(shape, owner)
        if not shape.any():
            return None
        made = torch.empty(shape.tolist(), dtype=self._dtype)
        dist.recv(made, owner)
        return made

    def __enter__(self) -> "SharedTiles":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is None or not is_out_of_memory(error):
            return
        for number in range(self._next, self._total):  # what the others send all the same
            if owner := number % self._group.size:
                self._received(owner)


class OwnTiles:
    """What decodes a process's own tiles and sends them to the first process; it gives tensors without values. A context manager."""

    def __init__(self, group: Group, vae: Codec):
        self._group, self._vae, self._next = group, vae, 0
        self._on_their_way: list = []

    def __call__(self, tile: Tensor, *home: torch.device) -> Tensor:
        config, (batch, _, frames, height, width) = self._vae.config, tile.shape
        grid = config.grid
        if self._next % self._group.size == self._group.rank:
            made = unless_out_of_memory(lambda: self._vae.decode(tile, *home).cpu().contiguous())
            shape = torch.zeros(_RANK, dtype=torch.int64) if made is None else torch.tensor(made.shape)
            self._on_their_way += [(dist.isend(part, 0), part) for part in (shape, made) if part is not None]
        self._next += 1
        size = (grid.pixel_frames(frames), grid.space * height, grid.space * width)
        return torch.empty(batch, config.in_channels, *size, device="meta")

    def __enter__(self) -> "OwnTiles":
        return self

    def __exit__(self, *exception) -> None:
        for sending, _ in self._on_their_way:
            sending.wait()
