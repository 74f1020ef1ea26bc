"""What a video needs before it is run, and settings that fit.

Everything is counted, nothing is tried: sizes come from file headers or the released configurations, peaks from the real
modules on the meta device; see estimate.py and footprint.py.

Recommended settings are the first that fit in this order. First every setting that was asked for by name is kept, then
none. Weights that RAM can hold while they stream come before those that must be read from disk again in every forward. Then
the result: the asked-for or stored precision, bf16, fp8_e4m3fn, int8, nf4 (int8 and nf4 need bitsandbytes). The offload mode is the
one asked for, or auto, which streams as little as the device allows. The decode is exact where that fits.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from ..choices import AUTO, BF16, FILE_FORMATS, FP32, QUANTISED
from ..errors import OpenSoraError
from .device import free_bytes, total_bytes
from .estimate import CONTEXT_BYTES, Estimate, Memory, Request, Settings, Stages, estimate
from .footprint import ModelSizes
from .residency import at_least, at_most

_QUANTISE_FIRST = (
    "Write the {precision} file once (`quantize`, or the node Open-Sora Quantize) and give that: it is mapped, where weights that "
    "are converted on reading take main memory."
)


@dataclass(frozen=True)
class Preflight:
    """The answer.

    asked: the need of the settings as asked for. recommended: settings that fit, the asked ones where they do; None if none does.
    nearest: what to ask for instead where nothing fits: a sentence.
    """

    request: Request
    model: ModelSizes
    memory: Memory
    asked: Estimate
    recommended: Estimate | None
    nearest: str | None = None

    def report(self) -> str:
        """Everything, for a person."""
        memory = self.memory
        kind = "Memory" if memory.device == "cpu" else "GPU memory"
        lines = [
            f"{self.model.name}: {self.request.words()}",
            f"On {memory.name}: {at_most(memory.free)} of {at_most(memory.total)} GiB free; "
            f"RAM {at_most(memory.ram_free)} of {at_most(memory.ram_total)} GiB free",
            "",
            *_estimate_lines(self.asked, kind),
            "",
        ]
        if self.asked.fits:
            lines.append(f"This fits: {self.asked.settings.words()}.")
        else:
            lines += ["This does not fit.", *(f"  {problem}" for problem in self.asked.problems)]
        if self.recommended is None:
            lines.append(f"No settings fit. {self.nearest}")
        elif self.recommended is not self.asked:
            better = "Better" if self.asked.fits else "Use"
            lines += ["", f"{better}: {self.recommended.settings.words()}.", *_estimate_lines(self.recommended, kind)]
        lines += ["", "Time: not measured here."]
        return "\n".join(lines)


def preflight(request: Request, model: ModelSizes, memory: Memory) -> Preflight:
    """Plan a video. model: ModelSizes() for the released files, or sizes_of_files(...). memory: see memory_of."""
    asked_for = request.settings.precision
    if {asked_for, model.stored} <= {*QUANTISED} and asked_for != model.stored:  # as on loading
        raise OpenSoraError(
            f"{model.name} is already quantised ({model.stored}); leave out precision, or give the bf16 file for {asked_for}."
        )
    precision = _precisions(request, model, memory, True)[0] if asked_for == AUTO else asked_for
    asked = estimate(request, replace(request.settings, precision=precision), model, memory)
    recommended = asked if asked.fits and asked.is_cached else _first_that_fits(request, model, memory)
    if recommended is None or (asked.fits and not recommended.is_cached):
        recommended = asked if asked.fits else None
    nearest = None if recommended is not None else _nearest(request, model, memory)
    return Preflight(request, model, memory, asked, recommended, nearest)


def memory_of(device: str | torch.device) -> Memory:
    """What this machine has now. A device that cannot be asked (Apple's) counts as what RAM has."""
    device = torch.device(device)
    ram_free, ram_total = (amount(torch.device("cpu")) for amount in (free_bytes, total_bytes))
    if ram_total is None:
        raise OpenSoraError("How much main memory this machine has cannot be found out; say how much (--ram-gib).")
    ram_free = ram_total if ram_free is None else ram_free
    if device.type == "cuda":
        total = total_bytes(device)
        # Asking has made the context, which an estimate counts.
        free = min(total, (free_bytes(device) or total) + CONTEXT_BYTES)
        return Memory("cuda", torch.cuda.get_device_name(device), free, total, ram_free, ram_total)
    return Memory(device.type, {"cpu": "the CPU"}.get(device.type, device.type), ram_free, ram_total, ram_free, ram_total)


def _first_that_fits(request: Request, model: ModelSizes, memory: Memory) -> Estimate | None:
    if Stages(request, Settings(BF16), model, memory).beside_transformer > memory.free:
        return None  # quantised weights come back to bf16 to work, so that no precision needs less beside them
    for is_kept in (True, False):
        uncached = None
        for settings, file in _candidates(request, model, memory, is_kept):
            need = Stages(request, settings, file, memory)
            if max(need.sampling().num_bytes, need.text().num_bytes) > memory.free:
                continue  # without counting a decode, which takes longest
            found = estimate(request, settings, file, memory)
            if file is not model:
                found = replace(found, notes=(*found.notes, _QUANTISE_FIRST.format(precision=settings.precision)))
            if found.fits and found.is_cached:
                return found
            uncached = uncached or (found if found.fits else None)
        if uncached is not None:
            return uncached
    return None


def _candidates(request: Request, model: ModelSizes, memory: Memory, is_kept: bool) -> Iterator[tuple[Settings, ModelSizes]]:
    """Settings in the order of preference (see the module), each with the model as it is, then with a file quantised once.

    is_kept: with the settings that were asked for by name.
    """
    asked = request.settings if is_kept else Settings()
    for precision in _precisions(request, model, memory, is_kept):
        settings = replace(asked, precision=precision)
        yield settings, model
        if precision in FILE_FORMATS and precision != model.stored:
            yield settings, replace(model, stored=precision)


def _precisions(request: Request, model: ModelSizes, memory: Memory, is_kept: bool) -> list[str]:
    """Precisions in the order of preference; the first is the one asked for, else the file's own if it is quantised, else the device's."""
    asked = request.settings.precision
    if model.stored in QUANTISED:
        return [model.stored]  # what was rounded once is not made better or rounded again
    if is_kept and asked != AUTO:
        return [asked]
    first = asked if asked != AUTO else FP32 if memory.device == "cpu" else BF16
    return list(dict.fromkeys((first, BF16, *QUANTISED)))


def _nearest(request: Request, model: ModelSizes, memory: Memory) -> str:
    """The longest clip of this size, and the largest picture of this length, that some settings fit."""

    # The first takes least RAM, mapped as it is, and the last least device memory.
    precisions = _precisions(request, model, memory, False)
    settings = [Settings(precision) for precision in dict.fromkeys((precisions[-1], precisions[0]))]

    def can_be_sampled(changed: Request) -> list[Settings]:
        return [one for one in settings if Stages(changed, one, model, memory).sampling().num_bytes <= memory.free]

    def fits(changed: Request) -> bool:
        return any(estimate(changed, one, model, memory).fits for one in can_be_sampled(changed))

    def largest(high: int, changed: Callable[[int], Request]) -> int:
        # Sampling is nearly always what decides, and counted at once; a decode takes a second to count.
        most = _largest(high, lambda n: bool(can_be_sampled(changed(n))))
        return most if not most or fits(changed(most)) else _largest(most - 1, lambda n: fits(changed(n)))

    free, grid = replace(request, settings=Settings()), request.grid
    multiple = max(grid.size_multiple, grid.space * grid.patch)  # Open-Sora 1 takes any size, from one token of these pixels on

    def shorter(count: int) -> Request:
        """The so many-th of the lengths that a clip can have."""
        return replace(free, num_frames=grid.frames.nearest((count - 1) * grid.frames.step + grid.frames.lead))

    length = largest((request.num_frames - grid.frames.lead - 1) // grid.frames.step + 1, shorter)
    ways = [f"{shorter(length).num_frames} frames at this size"] if length else []

    def smaller(rows: int) -> Request:
        height = rows * multiple
        width = max(multiple, round(height * request.width / request.height / multiple) * multiple)
        return replace(free, height=height, width=width)

    rows = largest(request.height // multiple - 1, smaller)
    if rows:
        ways.append(f"{smaller(rows).width}x{smaller(rows).height} (width x height) with this many frames")
    if not ways:
        return f"Not even one frame of {multiple} pixels fits on {memory.name}; free some memory or use another device."
    return f"The nearest that does: {' or '.join(ways)}."


def _largest(high: int, fits: Callable[[int], bool]) -> int:
    """The largest number from 1 to high that fits, if what is smaller fits too; 0 if none does."""
    return bisect_left(range(1, high + 1), True, key=lambda number: not fits(number))


def _estimate_lines(found: Estimate, kind: str) -> list[str]:
    lines = [f"{kind}, stage by stage, in GiB ({found.settings.words()}):"]
    for stage in found.stages:
        lines += stage.lines()
    if kind != "Memory":
        lines.append(f"  At least, with one block at a time: {', '.join(f'{name} {at_least(size)}' for name, size in found.least)}.")
    lines += ["RAM needed at least, in GiB:", *found.ram.lines()]
    if found.streamed_bytes:
        lines.append(
            f"    and {at_least(found.streamed_bytes)} of the mapped file, streamed in every forward; the system keeps what it can"
        )
    return [*lines, *(f"  Note: {note}" for note in found.notes)]
