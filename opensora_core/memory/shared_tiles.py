"""The tiles of one decode, computed by all processes of a group and blended by the first, which gets those of the others in their turn.

Tiles go through main memory. A process without room for one says so, so that the first can try another way as if the room were its own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count

import torch
import torch.distributed as dist
from torch import Tensor

from ..codecs.codec import Codec
from ..parallel.group import Group
from .device import is_out_of_memory, unless_out_of_memory

DECODE = "decode"
_RANK = 5  # of a tile; before it goes its shape, zeros where memory ran out


@contextmanager
def shared_tiles(group: Group, decode: Callable[..., Tensor], total: int) -> Iterator[Callable[..., Tensor]]:
    """What decodes the tiles of a clip, in the first process. decode: of one tile, as Codec.decode. total: tiles of the clip."""
    owners, dtype = iter([number % group.size for number in range(total)]), torch.float32

    def received(owner: int) -> Tensor | None:
        shape = torch.zeros(_RANK, dtype=torch.int64)
        dist.recv(shape, owner)
        if not shape.any():
            return None
        made = torch.empty(shape.tolist(), dtype=dtype)
        dist.recv(made, owner)
        return made

    def run(tile: Tensor, *home: torch.device) -> Tensor:
        nonlocal dtype
        owner, dtype = next(owners), tile.dtype
        if owner == 0:
            return decode(tile, *home)
        if (made := received(owner)) is None:
            raise torch.cuda.OutOfMemoryError(f"process {owner} is out of memory")
        return made.to(*home or (tile.device,))

    try:
        yield run
    except (MemoryError, RuntimeError) as error:
        for owner in owners if is_out_of_memory(error) else ():  # what the others send all the same
            if owner:
                received(owner)
        raise


@contextmanager
def own_tiles(group: Group, vae: Codec) -> Iterator[Callable[..., Tensor]]:
    """What decodes a process's own tiles and sends them to the first process; it gives tensors without values."""
    numbers, on_their_way = count(), []

    def run(tile: Tensor, *home: torch.device) -> Tensor:
        (batch, _, frames, height, width), grid = tile.shape, vae.config.grid
        if next(numbers) % group.size == group.rank:
            made = unless_out_of_memory(lambda: vae.decode(tile, *home).cpu().contiguous())
            shape = torch.zeros(_RANK, dtype=torch.int64) if made is None else torch.tensor(made.shape)
            on_their_way.extend((dist.isend(part, 0), part) for part in (shape, made) if part is not None)
        size = (grid.pixel_frames(frames), grid.space * height, grid.space * width)
        return torch.empty(batch, vae.config.in_channels, *size, device="meta")

    try:
        yield run
    finally:
        for sending, _ in on_their_way:
            sending.wait()
