"""The processes that make one video together: how they find each other, what the first tells the others to do, how all end when one fails.

The first (rank 0) runs the command. The others wait for its orders and compute their share of each; they read no prompt and write no file.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .. import __version__
from ..errors import OpenSoraError
from .shares import Shares, groups_for

FOUND_WITHIN = 120.0  # seconds, for all processes to be there
ANSWERED_WITHIN = 1800.0  # seconds, for one that is there to do its share
_FAILED, _LOOK_AGAIN = "failed", 0.05


class Group:
    """This process and the others. Made by `find`.

    Attributes:
        rank, size: which of how many this is.
    """

    def __init__(self, store: "dist.Store", rank: int, size: int):
        self.rank, self.size = rank, size
        self._store, self._orders = store, 0
        self._shares: dict[int, Shares] = {}

    def meet(self, device: torch.device) -> None:
        """See that all are there and of one version, and connect them. Raises an OpenSoraError if not."""
        own = f"{__version__}, torch {torch.__version__}"
        self._store.set(f"version {self.rank}", own)
        for other in range(self.size):
            try:
                self._store.wait([f"version {other}"], timedelta(seconds=FOUND_WITHIN))
            except RuntimeError as error:
                raise OpenSoraError(
                    f"Process {other} of {self.size} was not there within {FOUND_WITHIN:g} s; start all of them."
                ) from error
            found = self._store.get(f"version {other}").decode()
            if found != own:
                raise OpenSoraError(
                    f"Process {other} of {self.size} runs Open-Sora {found}, process {self.rank} {own}; install one version."
                )
        is_cuda = device.type == "cuda"
        if is_cuda:
            torch.cuda.set_device(device)
        kind = {"store": self._store, "rank": self.rank, "world_size": self.size, "timeout": timedelta(seconds=ANSWERED_WITHIN)}
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if is_cuda else "gloo", **kind)
        except RuntimeError as error:
            names = "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the network interface"
            raise OpenSoraError(
                f"Process {self.rank} of {self.size} cannot be connected to the others ({_reason(error)}); {names}."
            ) from error

    def shares(self, passes: list[int], heads: int) -> Shares:
        """How a run is shared out, its counts at zero; arguments and errors as groups_for."""
        groups = groups_for(passes, heads, self.size)
        if groups not in self._shares:
            self._shares[groups] = Shares(self.rank, self.size, groups)
        found = self._shares[groups]
        found.sent, found.by_theory = 0, 0.0
        return found

    def order(self, work: str, *told: Any) -> None:
        """Let the others do a piece of work, of which this process does its own share; of those that are not the first, nothing.

        told: what they need for it, tensors on the CPU.
        """
        if self.rank == 0:
            self._store.set(f"order {self._orders}", work)
            self._orders += 1
            dist.broadcast_object_list([(work, told)])

    def orders(self) -> Iterator[tuple[str, tuple]]:
        """What the first orders, until it ends."""
        while True:
            self._wait_for(f"order {self._orders}")
            self._orders += 1
            told: list = [None]
            dist.broadcast_object_list(told)
            if told[0][0] == "end":
                return
            yield told[0]

    def end(self) -> None:
        """Part, the first process last. The others end here: torch's threads now and then abort one that winds up while connections close."""
        if self.rank:
            sys.stdout.flush(), sys.stderr.flush()
            self._store.set(f"ended {self.rank}", "")
            os._exit(0)
        self._store.wait([f"ended {rank}" for rank in range(1, self.size)], timedelta(seconds=FOUND_WITHIN))
        dist.destroy_process_group()

    def _wait_for(self, key: str) -> None:
        """For as long as the first lives: it may read files and encode for long before there is work."""
        while not self._store.check([key]):
            if self._store.check([_FAILED]):
                raise Failed(1)
            time.sleep(_LOOK_AGAIN)

    def is_first_to_fail(self) -> bool:
        """Whether no other process has failed before, and so whether this one says why."""
        try:
            return self._store.add(_FAILED, 1) == 1
        except (RuntimeError, dist.DistError):  # gone with the process that kept it
            return self.rank == 1


class Failed(SystemExit):
    """Another process has failed, and says why: this one ends without a word."""


def find(device: torch.device) -> Group | None:
    """The other processes, as torchrun's environment variables name them; None where this one is alone.

    Raises:
        OpenSoraError: they cannot be reached in time, or share a GPU.
    """
    rank, size = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    if not (rank.isdecimal() and size.isdecimal() and int(size) > 1):
        return None
    if not dist.is_available():
        raise OpenSoraError(
            "This torch was built without torch.distributed, by which several processes make one video; install another torch."
        )
    from torch.distributed.rendezvous import rendezvous

    local = os.environ.get("LOCAL_WORLD_SIZE", "")
    if device.type == "cuda" and local.isdecimal() and int(local) > torch.cuda.device_count():
        raise OpenSoraError(f"{local} processes on a machine with {torch.cuda.device_count()} GPUs; start one for each GPU.")
    try:
        return Group(*next(rendezvous("env://", timeout=timedelta(seconds=FOUND_WITHIN))))
    except (RuntimeError, ValueError) as error:
        where = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise OpenSoraError(
            f"Process {rank} of {size} cannot reach the others at {where} within {FOUND_WITHIN:g} s ({_reason(error)}); start all of them, "
            "and see that MASTER_ADDR and MASTER_PORT are the first one's."
        ) from error


@contextmanager
def together(device: torch.device) -> Iterator[Group | None]:
    """The group, while a command runs; None for a process alone.

    What one process raises ends all; one of them says why, the others end without a word.
    """
    group = find(device)
    if group is None:
        yield None
        return
    try:
        group.meet(device)
        yield group
        group.order("end")
        group.end()
    except Failed:
        raise
    except BaseException as error:
        if not group.is_first_to_fail():
            raise Failed(1) from error
        if isinstance(error, RuntimeError) and _is_of_the_network(error):
            raise OpenSoraError(f"Another of the {group.size} processes ended or does not answer ({_reason(error)}).") from error
        raise


def _is_of_the_network(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "Gloo", "NCCL"))


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:160]
