"""Carry a residency out: blocks' weights copied to the device as they are needed, around a network that knows nothing of it.

Streamed weights stay where they were read to: pages of the mapped file, or main memory. Before a block runs, its
tensors are exchanged for views of a staging buffer on the device; after it, the originals are put back. On CUDA the
next streamed block is copied on a stream of its own while the present one computes; other devices copy at once, in
the same order. Copying a page-locked original is what makes this fast on CUDA, so each block is page-locked when it
is first needed, up to a limit: a second copy in main memory of those blocks only, given back at the end. A mapped
file's own pages are the system's to drop meanwhile, so that only weights that were converted on reading exist twice.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor, nn

from ..errors import OpenSoraError
from .residency import Residency, UnitBytes, padded

logger = logging.getLogger(__name__)

_SMALLEST_PIECE = 2**20
_PLAIN = (Tensor, nn.Parameter)
Place = tuple[dict, str, Tensor]  # a dictionary of a module, a name in it, and the tensor that is there


def module_bytes(model: nn.Module, blocks: Sequence[nn.Module]) -> UnitBytes:
    """What a residency is made from, of a module that may be on meta: parameters and buffers, each counted once in a block.

    blocks: its blocks in the order in which they run. Raises an OpenSoraError if there are none.
    """
    if not blocks:
        raise OpenSoraError("This network cannot be streamed: it has no blocks.")
    inside = {id(tensor) for block in blocks for _, _, tensor in places(block)}
    rest = _bytes_of(tensor for _, _, tensor in places(model) if id(tensor) not in inside)
    return UnitBytes(tuple(_bytes_of(tensor for _, _, tensor in places(block)) for block in blocks), rest)


class BlockStream(AbstractContextManager):
    """A residency at work on a network, from the moment this is made until `release()` or the end of a `with` block.

    An exception or an interrupt in the middle of a forward leaves the network usable; the next forward begins afresh.
    Raises an OpenSoraError where the network is streamed already, its weights are elsewhere or of a kind that cannot be streamed.

    model: with its streamed weights in main memory, its LoRAs merged. For inference. residency: made from this model's sizes (module_bytes).
    device: where it is to compute. blocks: its blocks in the order in which they run, as they were for the residency.
    pin_limit_bytes: main memory that may be page-locked for a CUDA device; None is as much as the residency streams. Blocks beyond the limit are
    copied from pageable memory: slower, but still beside the computation.
    """

    def __init__(
        self, model: nn.Module, residency: Residency, device: torch.device, blocks: Sequence[nn.Module], pin_limit_bytes: int | None = None
    ):
        self._device = device
        _check(model, blocks, residency, self._device)
        self._lane = lane(self._device, residency.num_buffers)
        self._pin_left = (residency.copied_bytes if pin_limit_bytes is None else pin_limit_bytes) if self._lane.is_async else 0
        self._away: list[Place] = []  # resident tensors as they were
        self._hooks: list = []
        self._buffers: list[Tensor] = []
        self._holds: list[int | None] = [None] * residency.num_buffers  # the streamed block in each buffer, or on its way there
        self._streamed: list[_Block] = []
        self._at_work: int | None = None
        try:
            # Tensors made in inference mode could not be written to outside it.
            with torch.inference_mode(False), torch.no_grad():
                self._start(model, blocks, residency)
        except BaseException:
            self.release()
            raise

    def __exit__(self, *exception) -> None:
        self.release()

    @property
    def pinned_bytes(self) -> int:
        """Page-locked in main memory so far."""
        return sum(piece.nbytes for block in self._streamed for _, piece in block.pinned)

    def release(self) -> None:
        """Leave the network as it was, its weights where they were; may be called twice."""
        for hook in self._hooks:
            hook.remove()
        self._put_back()
        for store, name, home in self._away:
            store[name] = home
        self._lane.wait()
        had_pinned = self.pinned_bytes > 0
        self._hooks, self._away, self._streamed, self._buffers = [], [], [], []
        if had_pinned:
            self._lane.give_back_pinned()

    def _start(self, model: nn.Module, blocks: Sequence[nn.Module], residency: Residency) -> None:
        streamed = [blocks[index] for index in residency.streamed]
        passing = {id(tensor) for block in streamed for _, _, tensor in places(block)}
        # One hook on the network itself marks it as streamed, whatever the residency.
        self._hooks.append(model.register_forward_pre_hook(_marked))
        resident = (place for place in places(model) if id(place[2]) not in passing and place[2].device != self._device)
        move(resident, self._device, self._away)
        self._buffers = [torch.empty(residency.buffer_bytes, dtype=torch.uint8, device=self._device) for _ in range(residency.num_buffers)]
        self._lane.open()
        self._streamed = [_Block(block, self._buffers[index % residency.num_buffers]) for index, block in enumerate(streamed)]
        for index, block in enumerate(streamed):
            self._hooks.append(block.register_forward_pre_hook(partial(self._before, index), prepend=True))
            self._hooks.append(block.register_forward_hook(partial(self._after, index), always_call=True))
        if streamed:
            self._fetch(0)

    def _before(self, index: int, module: nn.Module, args) -> None:
        self._put_back()  # of a forward that was interrupted
        block = self._streamed[index]
        if any(store[name] is not home for (store, name, home), _ in block.entries):
            raise OpenSoraError("The network's weights were changed while it is streamed; merge LoRAs before, or end the offload first.")
        self._fetch(index)
        self._lane.begin(index % len(self._buffers))
        self._at_work = index
        for (store, name, _), staged in block.entries:
            store[name] = staged

    def _after(self, index: int, module: nn.Module, args, output) -> None:
        if self._at_work == index:
            self._put_back()
            # The work of this block is on its way: what is copied from here on is copied beside it.
            self._fetch((index + 1) % len(self._streamed))

    def _put_back(self) -> None:
        if self._at_work is None:
            return
        for (store, name, home), _ in self._streamed[self._at_work].entries:
            store[name] = home
        self._lane.end(self._at_work % len(self._buffers))
        self._at_work = None

    def _fetch(self, index: int) -> None:
        """See that a block is in its buffer or on its way there."""
        slot = index % len(self._buffers)
        if self._holds[slot] == index:
            return
        self._holds[slot] = None
        self._lane.copy(slot, partial(self._copy, index))
        self._holds[slot] = index

    def _copy(self, index: int) -> None:
        block = self._streamed[index]
        buffer = self._buffers[index % len(self._buffers)]
        if not block.pinned and block.num_bytes <= self._pin_left:
            try:
                block.pin()
                self._pin_left -= block.num_bytes
            except (RuntimeError, MemoryError) as error:  # a system's limit on page-locked memory, which CUDA reports as out of memory
                logger.warning(
                    "No more main memory can be page-locked (%s); others are copied from where they are, which is slower.", error
                )
                self._pin_left = 0
        for start, piece in block.pinned:
            buffer[start : start + len(piece)].copy_(piece, non_blocking=True)
        if not block.pinned:
            for home, place in block.places:
                place.copy_(_flat(home))


class _Block:
    """A streamed block and its places in a staging buffer.

    entries: where the module keeps its tensors, each with the view of the buffer that stands in for it. places: every tensor once, with the bytes
    of the buffer that it is copied to. pinned: (first byte, page-locked bytes) that together are the block as it lies in the buffer; empty if not page-locked.
    """

    def __init__(self, block: nn.Module, buffer: Tensor):
        self.entries: list[tuple[Place, Tensor]] = []
        self.places: list[tuple[Tensor, Tensor]] = []
        self.pinned: list[tuple[int, Tensor]] = []
        self.num_bytes = 0
        staged: dict[int, Tensor] = {}
        for store, name, home in places(block):
            if id(home) not in staged:
                place = buffer[self.num_bytes : self.num_bytes + home.nbytes]
                staged[id(home)] = _like(home, place.view(home.dtype).as_strided(home.shape, _strides(home)))
                self.places.append((home, place))
                self.num_bytes += padded(home.nbytes)
            self.entries.append(((store, name, home), staged[id(home)]))

    def pin(self) -> None:
        sizes, offset = piece_sizes(self.num_bytes), 0
        pieces = [(start, page_locked(size)) for start, size in zip(accumulate(sizes, initial=0), sizes, strict=False)]
        for home, _ in self.places:
            source = _flat(home)
            for start, piece in pieces:
                first, last = max(offset, start), min(offset + len(source), start + len(piece))
                if first < last:
                    piece[first - start : last - start].copy_(source[first - offset : last - offset])
            offset += padded(len(source))
        self.pinned = pieces


class Lane:
    """The order of copying and computing, on devices that do one thing at a time: as they are asked for."""

    is_async = False

    def open(self) -> None:
        """Called once the buffers exist."""

    def copy(self, slot: int, work: Callable[[], None]) -> None:
        """Fill a buffer by `work`, when everything that reads it has ended."""
        work()

    def begin(self, slot: int) -> None:
        """Wait until a buffer is filled, for the work from here on, which reads it."""

    def end(self, slot: int) -> None:
        """Tell that no work from here on reads the buffer."""

    def wait(self) -> None:
        """Wait until no buffer is in use."""

    def give_back_pinned(self) -> None:
        """Return page-locked memory that nothing uses any more to the system."""


class CudaLane(Lane):
    """Copies on a stream of their own; events keep the order.

    The buffers live from open() to wait(), which waits for the device, so the allocator need not be told of their second
    stream (record_stream): it never has one of them back while a copy or a kernel may touch it.
    """

    is_async = True

    def __init__(self, device: torch.device, num_slots: int):
        self._device = device
        self._copies = torch.cuda.Stream(device)
        self._filled = [torch.cuda.Event() for _ in range(num_slots)]
        self._read = [torch.cuda.Event() for _ in range(num_slots)]

    def open(self) -> None:
        for event in self._read:  # the memory was given out in the order of the computing stream
            event.record(torch.cuda.current_stream(self._device))

    def copy(self, slot: int, work: Callable[[], None]) -> None:
        self._copies.wait_event(self._read[slot])
        with torch.cuda.stream(self._copies):
            work()
            self._filled[slot].record(self._copies)

    def begin(self, slot: int) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._filled[slot])

    def end(self, slot: int) -> None:
        self._read[slot].record(torch.cuda.current_stream(self._device))

    def wait(self) -> None:
        torch.cuda.synchronize(self._device)

    def give_back_pinned(self) -> None:
        # torch would keep it for its next user, out of everyone else's reach.
        accelerator = getattr(torch, "accelerator", None)
        if hasattr(accelerator, "empty_host_cache"):
            accelerator.empty_host_cache()


def lane(device: torch.device, num_slots: int) -> Lane:
    """How a device copies and computes."""
    return CudaLane(device, num_slots) if device.type == "cuda" and num_slots else Lane()


def page_locked(num_bytes: int) -> Tensor:
    """Main memory that CUDA copies from directly, uint8 [num_bytes]."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


def piece_sizes(num_bytes: int) -> list[int]:
    """Powers of two, and what is left below the smallest: torch rounds page-locked memory up to a power of two (283 MB in one piece would take 512)."""
    sizes = []
    while num_bytes:
        size = 1 << (num_bytes.bit_length() - 1) if num_bytes >= _SMALLEST_PIECE else num_bytes
        sizes.append(size)
        num_bytes -= size
    return sizes


def _marked(module: nn.Module, args) -> None:
    """A hook that does nothing but tell that a network is streamed."""


def places(module: nn.Module) -> Iterator[Place]:
    """Where a module keeps every parameter and buffer, under every name it has."""
    for part in module.modules():
        for store in (part._parameters, part._buffers):
            yield from ((store, name, tensor) for name, tensor in store.items() if tensor is not None)


def move(tensors: Iterable[Place], device: torch.device, home: list[Place]) -> None:
    """Put tensors on a device, one that is under two names once. home: takes what was there, to put back."""
    moved: dict[int, Tensor] = {}
    for store, name, tensor in tensors:
        if id(tensor) not in moved:
            moved[id(tensor)] = _like(tensor, tensor.detach().to(device))
        home.append((store, name, tensor))
        store[name] = moved[id(tensor)]


def _bytes_of(tensors: Iterator[Tensor]) -> int:
    return sum({id(tensor): padded(tensor.nbytes) for tensor in tensors}.values())


def _like(tensor: Tensor, values: Tensor) -> Tensor:
    return nn.Parameter(values, requires_grad=False) if isinstance(tensor, nn.Parameter) else values


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """A tensor's own strides where it fills its memory without gaps, so that kernels see the same layout; else contiguous ones."""
    reach = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.numel() == reach:
        return tensor.stride()
    return torch.empty(tensor.shape, device="meta").stride()


def _flat(tensor: Tensor) -> Tensor:
    """The bytes of a tensor in the order of `_strides`."""
    tensor = tensor.detach()
    if tensor.stride() != _strides(tensor):
        tensor = tensor.contiguous()
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _check(model: nn.Module, blocks: Sequence[nn.Module], residency: Residency, device: torch.device) -> None:
    if any(_marked in part._forward_pre_hooks.values() for part in model.modules()):
        raise OpenSoraError("This network is streamed already; release the first offload before another begins.")
    if len(blocks) != len(residency.sizes.blocks):
        raise OpenSoraError(f"The plan is for {len(residency.sizes.blocks)} blocks and the network has {len(blocks)}; plan it anew.")
    for index in residency.streamed:
        if _bytes_of(tensor for _, _, tensor in places(blocks[index])) > residency.buffer_bytes:
            raise OpenSoraError("The network's weights are larger than the plan says; plan anew, after its precision and LoRAs are chosen.")
        for _, name, tensor in places(blocks[index]):
            if type(tensor) not in _PLAIN:
                raise OpenSoraError(
                    f"Block {index} keeps its {name} as {type(tensor).__name__}, which is more than bytes and cannot be streamed; "
                    "quantise with precision fp8_e4m3fn, int8 or nf4 of this library instead."
                )
            if tensor.device.type != "cpu":
                raise OpenSoraError(f"Block {index} is on {tensor.device}; a network that streams must be read to the CPU.")
