"""The VAE as a pipeline uses it, and the ladder that every decode walks, here and in the host: what a tile needs, what is tried in turn."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import count
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..choices import AUTO, EXACT, LOW_MEMORY, POLICIES
from ..codecs.codec import Codec, CodecConfig
from ..codecs.tiling import (
    HOME,
    MIN_TILE_SIZE,
    TILE_SIZE_MULTIPLE,
    Progress,
    check_tiling,
    largest_tile,
    num_tiles,
    tiled_decode,
    tiled_encode,
)
from ..errors import check_choice
from ..families.table import codec_of
from ..geometry import WHOLE_CLIP, Tiling
from ..parallel import Group
from .component import Component, Placement
from .count import AllocationCounter
from .device import free_bytes, is_out_of_memory, unless_out_of_memory
from .residency import GIB

logger = logging.getLogger(__name__)

_DTYPES = {2: torch.bfloat16, 4: torch.float32}  # by the bytes of a value
MARGIN = 1.15  # for convolution workspaces and fragments of the allocator
_PARKED = "Clip decoded exactly, with activations in main memory: slower"
_DECODE, _RANK = "decode", 5  # the order to a group; dimensions of a tile, whose shape goes before it, zeros where memory ran out
_NOT_EXACT = "Frames differ slightly from an exact decode."

Size = tuple[int, int, int]  # frames, height, width
T = TypeVar("T")


def decode_bytes(config: CodecConfig, size: Size, dtype_bytes: int, parked: bool = False) -> int:
    """Peak of the activations of decoding one tile (or untiled clip) of this latent size, in bytes, its result included.

    dtype_bytes: 2 for bf16 and fp16, 4 for fp32. parked: count only what is on the device when activations are parked in main memory.
    """
    if estimate := codec_of(config).build.decode_bytes:
        return estimate(config, size, dtype_bytes, parked)
    return counted_peak(config, _DTYPES[dtype_bytes], (1, config.latents.channels, *size), True)


def encode_bytes(config: CodecConfig, size: Size, dtype_bytes: int) -> int:
    """Peak of encoding (frames, height, width) in pixels, in bytes; of the next larger clip where none can have these."""
    if estimate := codec_of(config).build.encode_bytes:
        return estimate(config, size, dtype_bytes)
    (frames, *sides), grid = size, config.grid
    if frames > 1:
        frames += -(frames - grid.frames.lead) % grid.frames.step
    whole = (-(-side // grid.space) * grid.space for side in sides)
    return counted_peak(config, _DTYPES[dtype_bytes], (1, config.in_channels, frames, *whole), False)


@lru_cache(maxsize=64)
def counted_peak(config: CodecConfig, dtype: torch.dtype, shape: tuple[int, ...], is_decode: bool) -> int:
    """Peak of one call of a codec, its result included, from running it on the meta device, so that the figure follows the code."""
    codec = codec_on_meta(config, dtype)
    x = torch.empty(shape, dtype=dtype, device="meta")
    with torch.inference_mode(), AllocationCounter() as counter:
        (codec.decode if is_decode else codec.encode)(x)
    return counter.peak


@lru_cache(maxsize=4)
def codec_on_meta(config: CodecConfig, dtype: torch.dtype) -> Codec:
    """A codec of which only shapes count."""
    return codec_of(config).build(config, dtype=dtype, device="meta").requires_grad_(False)


def tile_decode_bytes(config: CodecConfig, latent_shape: tuple[int, ...], tiling: Tiling, dtype_bytes: int) -> int:
    """`decode_bytes` of the largest tile of a clip, for the whole batch: of latents [B, C, t, h, w], or any shape that ends so."""
    batch = latent_shape[0] if len(latent_shape) == 5 else 1
    return batch * decode_bytes(config, largest_tile(latent_shape, tiling, True, config.grid), dtype_bytes, tiling.parked)


def tile_encode_bytes(config: CodecConfig, shape: tuple[int, ...], tiling: Tiling, dtype_bytes: int) -> int:
    """`encode_bytes` of the largest tile of one clip, whose shape ends in frames, height, width."""
    return encode_bytes(config, largest_tile(shape, tiling, False, config.grid), dtype_bytes)


class Attempt(NamedTuple):
    """A way to decode a clip, and a line for people where it is not the way that was asked for."""

    tiling: Tiling
    line: str | None = None


@dataclass(frozen=True)
class Ladder:
    """The ways to decode a clip in the memory there is.

    config: of the codec. latent_shape: [B, C, t, h, w] of the clip, or of the longest part of it that is decoded at a time.
    dtype_bytes: of one value. free: gives the bytes free on the device, with the codec's weights already there; None: not known.
    ram: gives the main memory that activations may be parked in; 0 where they cannot be, or where the device works in it.
    Both are asked when they decide something, and so is what a tile needs, which of some codecs takes a moment to count.
    """

    config: CodecConfig
    latent_shape: tuple[int, ...]
    dtype_bytes: int
    free: Callable[[], int | None]
    ram: Callable[[], int] = lambda: 0

    def attempts(self, policy: str, tiling: Tiling) -> Iterator[Attempt]:
        """What to try in turn, each when all before it ran out of memory.

        What is asked for, as far as it fits by the estimate (`_first`); the same with activations parked in main memory; tiles in time
        as well; tiles of half the need.

        policy: "exact": `tiling`, at most parked. "auto": as it is if that fits, else parked, else temporal tiles, else smaller tiles too.
        "low_memory": temporal tiles at once. For a codec that has temporal tiles of its own: shorter ones.
        tiling: what was asked for; what it leaves to the codec (config.cut) is filled in.
        """
        check_choice("policy", policy, POLICIES)
        first = self._first(policy, check_tiling(self.config.cut(tiling), self.config.grid))
        yield first
        if policy != LOW_MEMORY and (parked := self._parked(first.tiling)):
            yield Attempt(parked, f"{_PARKED}: the device ran out of memory.")
        if policy == EXACT:
            return
        tried = replace(first.tiling, parked=False)
        for smaller in (self._shorter, lambda one: self._first_that_fits(one, self.tile_bytes(one) // 2)):
            tiling = smaller(tried)
            if self.need(tiling) < self.need(tried):
                yield Attempt(tiling, f"Ran out of memory ({_words(tried)}); decoding again in {_words(tiling)}. {_NOT_EXACT}")
                tried = tiling

    def _first(self, policy: str, tiling: Tiling) -> Attempt:
        """What fits by the estimate, and why it is another way than the one asked for."""
        if policy == EXACT and not self._ram_for_parking:
            return Attempt(tiling)
        free = self.free()
        if policy != LOW_MEMORY:
            if free is None or self._fits(tiling, free):
                return Attempt(tiling)
            why = f"{_taken(tiling)} {self._gib(tiling)} GiB and {free / GIB:.2f} GiB are free"
            parked = self._parked(tiling)
            if parked and self._fits(parked, free):
                return Attempt(parked, f"{_PARKED} ({self._gib(parked)} GiB of it on the device): {why}.")
            if policy == EXACT:
                return Attempt(tiling)
        frames, doubt = self.config.grid.pixel_frames(self.latent_shape[-3]), ""
        chosen = self._shorter(tiling)
        if policy == LOW_MEMORY and not tiling.tile_size and self._largest_tile < Tiling.tile_size:
            chosen = replace(chosen, tile_size=self._largest_tile)
        reason = f"a tile of the whole clip ({frames} frames) needs {self._gib(tiling)} GiB"
        if policy == AUTO:
            chosen = self._first_that_fits(chosen, free)
            reason = f"{_taken(tiling)} {self._gib(tiling)} GiB for {frames} frames and {free / GIB:.2f} GiB are free{self._in_ram(tiling, free)}"
            doubt = "" if self._fits(chosen, free) else ", which may not fit either"
        if chosen == tiling:
            return Attempt(tiling, f"Decoding may not fit: {reason}." if doubt else None)
        changes = [f"temporal tiles of {chosen.temporal_tile} frames"] if chosen.temporal_tile != tiling.temporal_tile else []
        changes += [f"spatial tiles of {chosen.tile_size} pixels"] if chosen.tile_size != tiling.tile_size else []
        return Attempt(chosen, f"Decoding in {' and '.join(changes)} ({self._gib(chosen)} GiB{doubt}): {reason}. {_NOT_EXACT}")

    @property
    def _largest_tile(self) -> int:
        """Pixels of a side, where there was no tile; a codec that is used without takes the usual size for none."""
        return Tiling.tile_size - (0 if self.config.cut(Tiling()).tile_size else TILE_SIZE_MULTIPLE)

    def _parked(self, tiling: Tiling) -> Tiling | None:
        """These tiles with activations in main memory; None if there is no room, or if activations are there already."""
        ram = self._ram_for_parking
        return None if tiling.parked or not ram or self.tile_bytes(tiling) > ram else replace(tiling, parked=True)

    @property
    def _ram_for_parking(self) -> int:
        return self.ram() if codec_of(self.config).build.can_park else 0

    def _shorter(self, tiling: Tiling) -> Tiling:
        """These tiles cut in time too, unless a temporal tile was asked for or the clip is no longer than one."""
        config = self.config
        is_asked_for = tiling.temporal_tile not in (WHOLE_CLIP, config.cut(Tiling()).temporal_tile)
        is_short = not 0 < config.short_tile < config.grid.pixel_frames(self.latent_shape[-3])
        return tiling if is_asked_for or is_short else replace(tiling, temporal_tile=config.short_tile)

    def _first_that_fits(self, tiling: Tiling, free: int) -> Tiling:
        """`tiling` with the largest spatial tiles, from its own on, that fit; else with the smallest there are."""
        if self._fits(tiling, free):
            return tiling
        multiple = max(TILE_SIZE_MULTIPLE, self.config.grid.space)
        largest = tiling.tile_size - multiple if tiling.tile_size else self._largest_tile
        for size in range(largest, MIN_TILE_SIZE - 1, -multiple):
            tiling = replace(tiling, tile_size=size)
            if self._fits(tiling, free):
                break
        return tiling

    def _fits(self, tiling: Tiling, free: int) -> bool:
        """Whether what a tile needs is free; by a bound from above where that does, and counting would take a second module."""
        at_most = getattr(codec_of(self.config).build, "decode_bytes_at_most", None)
        tile = largest_tile(self.latent_shape, tiling, True, self.config.grid)
        if at_most and MARGIN * self.latent_shape[0] * at_most(self.config, tile, self.dtype_bytes) <= free:
            return True
        return self.need(tiling) <= free

    def need(self, tiling: Tiling) -> int:
        """Bytes that decoding takes on the device beside weights and finished frames, with a margin."""
        return int(MARGIN * self.tile_bytes(tiling))

    def tile_bytes(self, tiling: Tiling) -> int:
        """Bytes of the largest tile's activations on the device; of tiles that are not parked, all that parking them fills of main memory too."""
        return tile_decode_bytes(self.config, self.latent_shape, tiling, self.dtype_bytes)

    def _in_ram(self, tiling: Tiling, free: int) -> str:
        """What there would have to be of main memory for the same tiles to be decoded with activations there, where the device has room."""
        parked = replace(tiling, parked=True)
        if not codec_of(self.config).build.can_park or not self._fits(parked, free) or self._parked(tiling):
            return ""
        return f" ({self._gib(parked)} GiB would do with {self.tile_bytes(tiling) / GIB:.2f} GiB of free main memory)"

    def _gib(self, tiling: Tiling) -> str:
        return f"{self.need(tiling) / GIB:.2f}"


def _taken(tiling: Tiling) -> str:
    return "tiles as asked for need" if tiling.tile_size else "whole pictures need"


def _words(tiling: Tiling) -> str:
    space = f"tiles of {tiling.tile_size} pixels" if tiling.tile_size else "no spatial tiles"
    return f"{space}, {f'{tiling.temporal_tile} frames at a time' if tiling.temporal_tile > 0 else 'the whole clip in time'}"


def walk(attempts: Iterator[Attempt], tell: Callable[[str], None], unless_out_of_memory: Callable = unless_out_of_memory) -> Callable:
    """What tries one attempt of a ladder after the other; the one that worked is kept for the next part of the same clip.

    It is called with something to run with a tiling, and gives the result of the first that there is memory for; a torch.cuda.OutOfMemoryError
    if there is none. attempts: Ladder.attempts. tell: takes the lines for people. unless_out_of_memory: runs something and gives None where memory
    ran out; the host has its own.
    """
    at: list[Tiling] = []

    def step() -> None:
        attempt = next(attempts, None)
        if attempt is None:
            raise torch.cuda.OutOfMemoryError("out of memory in every way of decoding that was tried")
        at[:] = [attempt.tiling]
        if attempt.line:
            tell(attempt.line)

    def result_of(run: Callable[[Tiling], T]) -> T:
        if not at:
            step()
        while (made := unless_out_of_memory(partial(run, *at))) is None:
            step()
        return made

    return result_of


class VideoVAE:
    """Encodes and decodes clips.

    tiling: sizes of the tiles; the defaults are upstream's. policy: how to decode: auto, exact or low_memory, see Ladder.attempts.
    group: processes that decode tiles of the same clip, or None for this one alone.
    """

    def __init__(self, component: Component, placement: Placement):
        self.tiling, self._is_tiling = Tiling(), False
        self._policy = AUTO
        self._component = component
        self._placement = placement
        self.group: Group | None = None

    @property
    def policy(self) -> str:
        return self._policy

    @policy.setter
    def policy(self, policy: str) -> None:
        check_choice("policy", policy, POLICIES)
        self._policy = policy

    def enable_tiling(self, tile_size: int = 256, tile_overlap: float = 0.25, temporal_tile: int | None = None) -> None:
        """Choose the tiles of encode and decode: pixels of a side, and the share of it that neighbours have in common.

        The defaults are what the released model was used with; other sizes give slightly other pictures.
        temporal_tile: frames; 0 = as the released model was used, geometry.WHOLE_CLIP (-1) = the whole clip at once, None = as before.
        """
        frames = self.tiling.temporal_tile if temporal_tile is None else temporal_tile
        self.tiling, self._is_tiling = check_tiling(Tiling(tile_size, tile_overlap, frames)), True

    def enable_slicing(self) -> None:
        """Nothing to do: the videos of a batch are decoded one after another as it is."""

    def _asked(self, config: CodecConfig) -> Tiling:
        """The tiles of a decode. A codec that works on whole pictures where nobody asks for tiles, does in the next smaller ones."""
        if self._is_tiling and self.tiling.tile_size and not config.cut(self.tiling).tile_size:
            return replace(self.tiling, tile_size=self.tiling.tile_size - TILE_SIZE_MULTIPLE)
        return self.tiling

    def encode(self, images: Tensor, generators: Sequence[torch.Generator | Tensor | None] = (None,)) -> Tensor:
        """Latents of a clip (a picture is one of one frame): [len(generators), C, t, h, w] fp32 in the transformer's scale, on the device.

        images: [T, H, W, 3] fp32 in 0..1. generators: one for each latent wanted: None for the posterior's mode, or what to sample it with: a
        generator, or the noise itself, [1, C, t, h, w].
        """
        pixels = images.permute(3, 0, 1, 2).unsqueeze(0) * 2 - 1
        pixels = pixels.to(self._placement.device, self._placement.dtype)
        with self._component.at_work() as vae:
            config = vae.config
            encoded = tiled_encode(vae.encode, pixels, config.cut(self.tiling), grid=config.grid).to(torch.float32)
            latents = [encoded.mode() if generator is None else encoded.sample(generator) for generator in generators]
        return config.latents.to_model(torch.cat(latents))

    def decode(self, latents: Tensor, progress: Progress | None = None) -> Tensor:
        """Frames [B, T, H, W, 3] fp32 in 0..1 on the CPU, of latents [B, C, t, h, w] in the transformer's scale, as `encode` gives them.

        Raises a torch.cuda.OutOfMemoryError where the device has no room in any way that the policy permits.
        """
        with torch.inference_mode(), self.decoder((1, *latents.shape[1:]), lambda line: None) as decode:
            videos = [decode(video, progress).float().cpu() for video in latents.split(1)]
        return ((torch.cat(videos) + 1) / 2).clamp(0, 1).permute(0, 2, 3, 4, 1)

    @contextmanager
    def decoder(self, latent_shape: tuple[int, ...], tell: Callable[[str], None]) -> Iterator[Callable[[Tensor, Progress | None], Tensor]]:
        """A function that decodes clips, or the parts of a long one, while the block lasts.

        It is called with latents [1, C, t, h, w] in the transformer's scale and a progress, gives pixels [1, 3, T, H, W], about -1..1,
        and raises what the device says where it has no room in any way that the policy permits.
        latent_shape: [1, C, t, h, w], of the largest. tell: takes a line where memory makes the decode other than exact; it is logged too.
        """
        placement = self._placement

        def say(line: str) -> None:
            logger.warning("%s", line)
            tell(line)

        with self._component.at_work() as vae:
            config = vae.config
            free, ram = partial(_free_for_tiles, latent_shape, config, placement), partial(_ram_for_parking, placement)
            ladder = Ladder(config, latent_shape, placement.dtype.itemsize, free, ram)
            result_of = walk(ladder.attempts(self.policy, self._asked(config)), say)

            def decode(latents: Tensor, progress: Progress | None, tiling: Tiling) -> Tensor:
                latents = config.latents.to_codec(latents.to(placement.device).float()).to(placement.dtype)
                total = num_tiles(latents.shape, tiling, True, config.grid)
                if self.group is None or total == 1:
                    return tiled_decode(vae.decode, latents, tiling, progress, grid=config.grid)
                self.group.order(_DECODE, latents.cpu(), tiling)
                with _shared_tiles(self.group, vae.decode, total) as tile:
                    return tiled_decode(tile, latents, tiling, progress, grid=config.grid)

            yield lambda latents, progress=None: result_of(partial(decode, latents, progress))

    def decode_own_tiles(self, latents: Tensor, tiling: Tiling) -> None:
        """Decode this process's tiles of a clip and send them to the first process of the group, which has ordered them.

        latents: [1, C, t, h, w], as the codec takes them.
        """
        with self._component.at_work() as vae, _own_tiles(self.group, vae) as tile:
            tiled_decode(tile, latents.to(self._placement.device), tiling, grid=vae.config.grid)


@contextmanager
def _shared_tiles(group: Group, decode: Callable[..., Tensor], total: int) -> Iterator[Callable[..., Tensor]]:
    """What decodes the tiles of a clip in the first process of a group, which gets those of the others in their turn, through main memory.

    decode: of one tile, as Codec.decode. total: tiles of the clip. A process without room for one says so, so that the first can try another way as
    if the room were its own.
    """
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
def _own_tiles(group: Group, vae: Codec) -> Iterator[Callable[..., Tensor]]:
    """What decodes a process's own tiles and sends them to the first process; it gives tensors without values."""
    numbers, on_their_way = count(), []

    def run(tile: Tensor, *home: torch.device) -> Tensor:
        if next(numbers) % group.size == group.rank:
            made = unless_out_of_memory(lambda: vae.decode(tile, *home).cpu().contiguous())
            shape = torch.zeros(_RANK, dtype=torch.int64) if made is None else torch.tensor(made.shape)
            on_their_way.extend((dist.isend(part, 0), part) for part in (shape, made) if part is not None)
        return torch.empty(len(tile), vae.config.in_channels, *vae.config.grid.decoded(tile.shape), device="meta")

    try:
        yield run
    finally:
        for sending, _ in on_their_way:
            sending.wait()


def _free_for_tiles(latent_shape: tuple[int, ...], config: CodecConfig, placement: Placement) -> int | None:
    """Bytes of the device that are free for a tile's activations once all finished frames are there; None: not known."""
    free = free_bytes(placement.device)
    if free is None:
        return None
    finished = config.in_channels * math.prod(config.grid.decoded(latent_shape)) * placement.dtype.itemsize
    return max(0, free - finished)


def _ram_for_parking(placement: Placement) -> int:
    """Main memory that a decode may park activations in."""
    return 0 if placement.device.type == "cpu" else free_bytes(HOME) or 0
