"""One network of a pipeline: read when it is first needed, and where it lives meanwhile; and what devices and precisions there are.

`everything`: all networks on the device from their first use on. In the other modes they live in main memory, or in no
memory at all where the file is mapped as it is, and come to the device only for their work:
`resident`: but the transformer, once read, stays. `auto`: each whole, or streamed as far as it does not fit. `budget`: the
transformer and T5 stream block by block, so that their weights take no more than a budget. `minimal`: one block at a time,
and the networks that have no blocks a layer at a time, by accelerate. All modes compute the same numbers.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..checkpoint.quantised import precision_format
from ..choices import AUTO, BUDGET, DTYPES, EVERYTHING, MINIMAL, PRECISIONS, QUANTISED, RESIDENT, torch_dtype
from ..errors import OpenSoraError, check_choice
from .device import free_bytes, unless_out_of_memory, untaken_bytes
from .residency import GIB, Residency, UnitBytes, make_residency, residency_in_mode
from .stream import BlockStream, Place, module_bytes, move, places

logger = logging.getLogger(__name__)

# Layers that read the weights of the layers inside them and so must have all of them at once: codecs/hunyuan/layers.py.
_WHOLE = ["Encoder", "Decoder", "Upsample", "Half"]
# Page-locked where it cannot be asked how much main memory is free.
_PINNED_BLINDLY = 4 * GIB
_MEANWHILE = ThreadPoolExecutor(1, "open-sora-next-network")


@dataclass
class Placement:
    """Where and how the networks of one pipeline compute; shared by its components, changed only by the pipeline."""

    device: torch.device
    torch_dtype: torch.dtype | None = None  # None: bf16 on an accelerator, fp32 on the CPU
    mode: str = EVERYTHING
    budget_gib: float | None = None

    @property
    def dtype(self) -> torch.dtype:
        if self.torch_dtype is not None:
            return self.torch_dtype
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16


class Component:
    """One network, read at its first use.

    read: (dtype, device) -> the network: a module, or an object whose `.model` is one; reads files. One whose `blocks()` gives its
    blocks in the order in which they run is streamed where it must be. placement: shared with the pipeline.
    is_main: it is the one that `resident` and a budget are about.
    is_kept: False for one that works once a run (a text encoder): outside `everything` it is given up after its work.
    """

    def __init__(self, read: Callable[[torch.dtype, torch.device], Any], placement: Placement, is_main: bool = False, is_kept: bool = True):
        self._read, self._placement = read, placement
        self._is_main, self._is_kept = is_main, is_kept
        self._network: Any = None
        self._ahead: Future | None = None  # of (the network, what takes it back from the device)

    @contextmanager
    def at_work(self, beside_bytes: int = 0, is_last_try: bool = False) -> Iterator[Any]:
        """The network, able to compute on the placement's device inside the block.

        beside_bytes: what the device will need beside the weights; only `auto` asks.
        is_last_try: the device ran out of memory before: in auto and budget one block at a time, whatever was planned.
        """
        visit, network = self._arrive(), self._network
        try:
            with visit, self._visit(network, None if is_last_try else beside_bytes):
                yield network
        finally:
            if self._placement.mode != EVERYTHING and not self._is_kept:
                self.release()

    def set_out(self, num_bytes: int) -> None:
        """Begin to read the network and to copy it to the device while another computes there; `at_work` waits for what is left of that.

        num_bytes: of its weights. Nothing is done where the offload mode limits what is on the device, and where the device has not that much
        that the network at work cannot come to need.
        """
        placement = self._placement
        if self._ahead is None and placement.mode not in (BUDGET, MINIMAL) and num_bytes <= untaken_bytes(placement.device):
            self._ahead = _MEANWHILE.submit(self._bring)

    def call_back(self) -> None:
        """Undo `set_out`, where no work follows."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and not ahead.cancel() and ahead.exception() is None:
            ahead.result()[1].close()

    def release(self) -> None:
        """Forget the network; the next use reads it again."""
        self.call_back()
        self._network = None

    def _arrive(self) -> AbstractContextManager:
        """Have the network read; what takes it back from the device where it set out before."""
        ahead, self._ahead = self._ahead, None
        brought = ahead and unless_out_of_memory(ahead.result)  # else the memory of the network before it is free by now
        if brought:
            self._network, visit = brought
            return visit
        if self._network is None:
            self._network = self._load()
        return nullcontext()

    def _bring(self) -> tuple[Any, ExitStack]:
        device, visit = self._placement.device, ExitStack()
        with torch.inference_mode(False), torch.no_grad(), _own_stream(device):
            network = self._load() if self._network is None else self._network
            if not self._stays:
                visit.enter_context(visiting(_module(network), device))
        return network, visit

    def _load(self) -> Any:
        placement = self._placement
        home = placement.device if self._stays else torch.device("cpu")
        with torch.inference_mode(False):  # parameters made inside could not be replaced outside
            network = self._read(placement.dtype, home)
            if placement.mode == MINIMAL and not _blocks(network):
                _by_layers(_module(network), placement.device)
        return network

    @property
    def _stays(self) -> bool:
        mode = self._placement.mode
        return mode == EVERYTHING or (mode == RESIDENT and self._is_main)

    def _visit(self, network: Any, beside_bytes: int | None) -> AbstractContextManager:
        placement, module, blocks = self._placement, _module(network), _blocks(network)
        if self._stays or (placement.mode == MINIMAL and not blocks):
            return nullcontext()
        residency = self._residency(module_bytes(module, blocks), beside_bytes) if blocks else None
        if residency is None or residency.mode == RESIDENT:
            return visiting(module, placement.device)
        # Half of what is free: page-locked memory is nobody else's, and the rest of the file streams from the mapped pages.
        free = free_bytes(torch.device("cpu"))
        return BlockStream(module, residency, placement.device, blocks, _PINNED_BLINDLY if free is None else free // 2)

    def _residency(self, sizes: UnitBytes, beside_bytes: int | None) -> Residency:
        placement = self._placement
        if beside_bytes is None and placement.mode in (AUTO, BUDGET):
            return make_residency(sizes, MINIMAL)
        free = free_bytes(placement.device) if placement.mode == AUTO and placement.device.type == "cuda" else None
        room = None if free is None else free - beside_bytes
        residency = residency_in_mode(sizes, placement.mode, placement.budget_gib, room, self._is_main)
        if placement.mode == AUTO and residency.streamed:
            logger.warning("Not all weights fit beside the computation. %s", residency.sentence())
        return residency


@contextmanager
def visiting(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Bring a module to a device for the length of the block.

    The tensors it had are kept and put back rather than copied back, so that leaving costs nothing and memory-mapped ones stay mapped.
    """
    home: list[Place] = []
    try:
        move(places(module), device, home)
        yield
    finally:
        for store, name, tensor in home:
            store[name] = tensor


@contextmanager
def _own_stream(device: torch.device) -> Iterator[None]:
    """Copies inside the block run beside what computes on the device, and are done when it ends."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def _module(network: Any) -> nn.Module:
    return network if isinstance(network, nn.Module) else network.model


def _blocks(network: Any) -> Sequence[nn.Module]:
    return network.blocks() if hasattr(network, "blocks") else ()


def resolve_precision(dtype: torch.dtype | None, precision: str, runs_in_half: bool = False) -> tuple[torch.dtype | None, str | None]:
    """The dtype two settings ask for together, None to leave it to the device; and the quantised precision of weights, if one is asked for.

    runs_in_half: the model was trained in float16, so that its numbers stay within it.
    Raises an OpenSoraError for an unknown precision or dtype, for two that differ, and where bitsandbytes is missing.
    """
    check_choice("precision", precision, PRECISIONS)
    if precision in QUANTISED:
        precision_format(precision)  # says at once if its library is missing
    wanted = torch_dtype(precision)
    if dtype not in (None, *map(torch_dtype, DTYPES)) and not (dtype == torch.float16 and runs_in_half):
        raise OpenSoraError(f"dtype {dtype} is not one the networks are run in; use torch.bfloat16 or torch.float32.")
    if wanted and dtype and wanted != dtype:
        raise OpenSoraError(f"precision={precision!r} and dtype {dtype} contradict each other; give one of them.")
    return wanted or dtype, precision if precision in QUANTISED else None


def resolve_device(device: str | torch.device) -> torch.device:
    """A device that can be computed on; "auto" is CUDA, else Apple's GPU, else the CPU. Raises an OpenSoraError if there is no such device here."""
    if str(device) == AUTO:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch says "not compiled with" by an assertion
        raise OpenSoraError(f"The device {device} cannot be used here; use auto or cpu.") from error
    if found.type == "meta":
        raise OpenSoraError("The device meta holds no numbers; use auto or cpu.")
    return found


def _by_layers(module: nn.Module, device: torch.device) -> None:
    try:
        from accelerate import cpu_offload
    except ImportError as error:
        raise OpenSoraError("Keeping one layer at a time on the device needs accelerate; install it (pip install accelerate).") from error
    cpu_offload(module, execution_device=device, offload_buffers=True, preload_module_classes=_WHOLE)
