"""Which blocks of a network keep their weights on the device and which pass through it: bytes in, a residency out.

Works from numbers alone (of a module on meta), so that one for any model costs nothing.
"""

import math
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

from ..choices import AUTO, BUDGET, MINIMAL, RESIDENT
from ..errors import OpenSoraError, check_choice

GIB = 2**30
ALIGNMENT = 256  # bytes; where a tensor may begin in a staging buffer, as in memory that CUDA itself gives out


@dataclass(frozen=True)
class UnitBytes:
    """Bytes of the weights of a network: of each block in the order in which they run, and of the rest."""

    blocks: tuple[int, ...]
    rest: int

    @property
    def total(self) -> int:
        return self.rest + sum(self.blocks)


@dataclass(frozen=True)
class Residency:
    """Where the weights are while the network works.

    mode: resident, budget or minimal. sizes: what it was made from. streamed: the blocks (indices into sizes.blocks, ascending) whose weights live
    in main memory and are copied to the device for each use. num_buffers: staging buffers on the device, each as large as the largest streamed
    block: two where the next block is copied while one computes, one where only one block may be there at a time.
    """

    mode: str
    sizes: UnitBytes
    streamed: tuple[int, ...] = ()
    num_buffers: int = 0

    @property
    def buffer_bytes(self) -> int:
        return max((self.sizes.blocks[index] for index in self.streamed), default=0)

    @property
    def copied_bytes(self) -> int:
        """Copied to the device in one forward."""
        return sum(self.sizes.blocks[index] for index in self.streamed)

    @property
    def device_bytes(self) -> int:
        """Weights on the device at any moment, at most."""
        return self.sizes.total - self.copied_bytes + self.num_buffers * self.buffer_bytes

    def sentence(self) -> str:
        """For people."""
        count, blocks = len(self.streamed), len(self.sizes.blocks)
        if not count:
            return f"All {blocks} blocks stay on the device: {at_least(self.device_bytes)} GiB of weights."
        return (
            f"{blocks - count} of {blocks} blocks stay on the device and {count} stream through {self.num_buffers} "
            f"buffer{'s' if self.num_buffers > 1 else ''}: at most {at_least(self.device_bytes)} GiB of weights at a time, "
            f"{at_least(self.copied_bytes)} GiB copied in every forward."
        )


def padded(num_bytes: int) -> int:
    """Bytes that a tensor takes in a staging buffer."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def least_bytes(sizes: UnitBytes, mode: str) -> int:
    """The least that weights can take on the device in a mode."""
    if mode == RESIDENT:
        return sizes.total
    buffers = (2 if mode == BUDGET else 1) * max(sizes.blocks)
    return min(sizes.total, sizes.rest + buffers)


def make_residency(sizes: UnitBytes, mode: str, budget_gib: float | None = None, device_bytes: int | None = None) -> Residency:
    """Decide where weights live. Raises an OpenSoraError for weights that cannot fit, or a budget that cannot be kept; it says what can.

    sizes: of the network, see stream.module_bytes.
    mode: resident: all on the device. budget: as many as fit in the budget beside two staging buffers, the others stream. minimal: one block
    at a time. budget_gib: for the mode budget: the most that weights may take on the device, buffers included.
    device_bytes: what weights could take on this device at most; None where it is not known.
    """
    check_choice("offload", mode, (RESIDENT, BUDGET, MINIMAL))
    if mode == BUDGET:
        budget = check_budget(sizes, budget_gib, device_bytes)
        streamed = _streamed(sizes, budget)
        return Residency(mode, sizes, streamed, 2 if streamed else 0)
    if device_bytes is not None and least_bytes(sizes, mode) > device_bytes:
        raise OpenSoraError(_does_not_fit(sizes, mode, device_bytes))
    if mode == MINIMAL:
        return Residency(mode, sizes, tuple(range(len(sizes.blocks))), 1)
    return Residency(mode, sizes)


def residency_in_mode(sizes: UnitBytes, offload: str, budget_gib: float | None, room: int | None, is_main: bool) -> Residency:
    """The residency of an offload mode, one of choices.OFFLOADS. budget_gib: for the mode budget.

    room: for the mode auto, which copies least of all that take no more, and is the smallest where none does: bytes that weights can take beside
    the computation; None = as many as they like.
    is_main: of the network that a budget is about, refused if it cannot be kept; another one streams block by block instead.
    """
    least = least_bytes(sizes, BUDGET)
    if offload == AUTO and (room is None or sizes.total <= room):
        offload = RESIDENT
    elif offload == AUTO:
        offload, budget_gib = (BUDGET, room / GIB) if least <= room else (MINIMAL, None)
    elif offload == BUDGET and not is_main and budget_gib * GIB < least:
        offload = MINIMAL
    return make_residency(sizes, offload, budget_gib)


def check_budget(sizes: UnitBytes, budget_gib: float | None, device_bytes: int | None = None) -> int:
    """A budget in bytes. Raises an OpenSoraError if it is not a positive number, larger than the device, or less than two buffers and the rest need."""
    least = least_bytes(sizes, BUDGET)
    if device_bytes is not None and least > device_bytes:
        raise OpenSoraError(_does_not_fit(sizes, BUDGET, device_bytes))
    nearest = f"give at least {at_least(least)} GiB"
    if budget_gib is None:
        raise OpenSoraError(f"The offload mode budget needs a budget in GiB; {nearest}.")
    if isinstance(budget_gib, bool) or not isinstance(budget_gib, int | float) or not math.isfinite(budget_gib) or budget_gib <= 0:
        raise OpenSoraError(f"A budget of {budget_gib} GiB is not an amount of memory; {nearest}.")
    budget = int(budget_gib * GIB)
    if device_bytes is not None and budget > device_bytes:
        raise OpenSoraError(
            f"A budget of {budget_gib:g} GiB is larger than the device, which has {at_most(device_bytes)} GiB; give at most that."
        )
    if budget < least:
        alone = f", or use minimal, which needs {at_least(least_bytes(sizes, MINIMAL))} GiB" if len(sizes.blocks) > 1 else ""
        raise OpenSoraError(
            f"A budget of {budget_gib:g} GiB is too small: two blocks of the network must be on the device at a time; {nearest}{alone}."
        )
    return budget


def at_least(num_bytes: int) -> str:
    """GiB to three digits, rounded up: an amount that has room for the bytes."""
    return _digits(num_bytes, ROUND_CEILING)


def at_most(num_bytes: int) -> str:
    """GiB to three digits, rounded down: an amount that the bytes have room for."""
    return _digits(num_bytes, ROUND_FLOOR)


def _digits(num_bytes: int, rounding: str) -> str:
    exact = Decimal(num_bytes) / GIB
    return f"{exact.quantize(Decimal(1).scaleb(exact.adjusted() - 2), rounding).normalize():f}" if num_bytes else "0"


def _streamed(sizes: UnitBytes, budget: int) -> tuple[int, ...]:
    """The blocks to stream, spread as evenly as can be: each is copied during the work of those that stay."""
    if sizes.total <= budget:
        return ()
    streamed = set(range(len(sizes.blocks)))
    bits = len(sizes.blocks).bit_length()
    for index in sorted(streamed, key=lambda number: int(f"{number:0{bits}b}"[::-1], 2)):
        without = Residency(BUDGET, sizes, tuple(streamed - {index}), 2)
        if without.device_bytes <= budget:
            streamed.remove(index)
    return tuple(sorted(streamed))


def _does_not_fit(sizes: UnitBytes, mode: str, device_bytes: int) -> str:
    said = f"The mode {mode} needs {at_least(least_bytes(sizes, mode))} GiB for weights and the device has {at_most(device_bytes)} GiB"
    budget, minimal = (least_bytes(sizes, other) for other in (BUDGET, MINIMAL))
    ways = [f"budget with {at_least(budget)} to {at_most(device_bytes)} GiB"] if budget <= device_bytes else []
    ways += [f"minimal, which needs {at_least(minimal)} GiB"] if minimal <= device_bytes else []
    if ways:
        return f"{said}; use {' or '.join(ways)}."
    return f"{said}; no mode fits (minimal needs {at_least(minimal)} GiB). Use quantised weights or another device."
