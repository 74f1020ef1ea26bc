"""What memory a device has, how to tell that it ran out, and the sentence for people when it did for good."""

import os
from collections.abc import Callable
from typing import TypeVar

import torch

from .limits import limits, proc_fields
from .residency import GIB, at_most

T = TypeVar("T")

# What torch says where it has no class of its own for it: Apple's GPU, the CPU (on Windows too), cuBLAS, and cuDNN, which tries every
# algorithm of a convolution and says that none was left when none found its workspace.
_SAID = ("out of memory", "can't allocate memory", "not enough memory", "status_alloc_failed", "valid cudnn algorithm")


def free_bytes(device: torch.device) -> int | None:
    """Memory that a device has left, or None where it cannot be asked. Of main memory, what this process may still take of it."""
    if device.type == "cuda":
        # What torch holds in reserve without using it is free for us too.
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserve
    if device.type == "cpu":
        said = proc_fields("meminfo").get("MemAvailable")  # kB
        return _least("free", int(said.split()[0]) * 1024 if said else _pages("SC_AVPHYS_PAGES"))
    return None


def untaken_bytes(device: torch.device) -> int:
    """Memory of a device that nobody holds, less a margin: what torch keeps in reserve is for the work that goes on. 0 where that means nothing."""
    return max(0, torch.cuda.mem_get_info(device)[0] - GIB) if device.type == "cuda" else 0


def total_bytes(device: torch.device) -> int | None:
    """All memory of a device, or None where it cannot be asked. For main memory, what this process may have of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return _least("total", _pages("SC_PHYS_PAGES")) if device.type == "cpu" else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory of any kind ran out."""
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _SAID)


def unless_out_of_memory(run: Callable[[], T]) -> T | None:
    """The result, or None when memory ran out; by then the exception, which holds the tensors of its frames, is gone."""
    try:
        return run()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
    return None


def ran_out(work: str, device: torch.device, advice: str) -> str:
    """The sentence: what ran out, what the device has now that it is given up, what to change.

    work: what was done, "Sampling 129 frames of ...". advice: what follows the colon, without a full stop.
    """
    free, total = free_bytes(device), total_bytes(device)
    has = "" if free is None or total is None else f"; {_name(device)} has {at_most(free)} of {at_most(total)} GiB free without it"
    return f"{work} ran out of memory{has}: {advice}."


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    machine, allowed = _pages("SC_PHYS_PAGES"), total_bytes(device)
    return "this process, which may not have all of the machine," if machine and allowed and allowed < machine else "this machine"


def _least(what: str, of_machine: int | None) -> int | None:
    """The least of what the machine has and what each limit of this process leaves."""
    return min((bytes_ for bytes_ in (of_machine, *(getattr(limit, what) for limit in limits())) if bytes_ is not None), default=None)


def _pages(name: str) -> int | None:
    """Bytes of the machine's pages, where a system says how many there are."""
    if not hasattr(os, "sysconf") or name not in os.sysconf_names:
        return None
    return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")
