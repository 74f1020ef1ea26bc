"""Several processes that make one video together, each on a GPU of its own: how they find each other, what the first tells the others to do,
how the work of one step is shared out, and how all end when one fails.

The first (rank 0) runs the command. The others wait for its orders and compute their share of each; they read no prompt and write no file.
Guidance passes are shared out over groups of processes, and inside a group the tokens of a forward: those of text and of video are cut each,
as evenly as can be. Where attention needs all of them, each process gets all tokens of some heads and gives the results back: two exchanges
(arXiv 2309.14509). No padding and no mask, so that any number of tokens and heads does.
"""

import atexit
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import __version__
from .errors import OpenSoraError

FOUND_WITHIN = 120.0  # seconds, for all processes to be there
ANSWERED_WITHIN = 1800.0  # seconds, for one that is there to do its share
_FAILED, _LOOK_AGAIN = "failed", 0.05
_AS_GOOD = 1.05  # of the time of the best way: sharing out passes sends next to nothing, so that it is taken where it is nearly as good


def sizes(count: int, parts: int) -> list[int]:
    """`count` things in so many parts, the first ones with one more."""
    return [(count + parts - 1 - part) // parts for part in range(parts)]


def groups_for(passes: Sequence[int], heads: int, size: int) -> int:
    """Over how many groups of so many processes guidance passes are shared out; the best by what a process computes in a run.

    passes: of each step. heads: of the attention, 1 of a network whose tokens cannot be shared out.
    Raises an OpenSoraError where so many processes have no work.
    """
    loads = {}
    for groups in range(1, max(passes) + 1):
        members = size // groups
        if size % groups == 0 and members <= heads:
            loads[groups] = sum(-(-number // groups) for number in passes) * -(-heads // members) / heads
    if not loads:
        most = next(n for n in range(size - 1, 0, -1) if any(n % k == 0 and n // k <= heads for k in range(1, max(passes) + 1)))
        why = f"has {heads} attention heads" if heads > 1 else "does not attend to all frames at once"
        raise OpenSoraError(
            f"A video of this model cannot be shared out over {size} processes: its transformer {why}, and a step has at most "
            f"{max(passes)} guidance passes; use {most}, or make several videos at a time (--csv)."
        )
    best = min(loads.values())
    return max(groups for groups, load in loads.items() if load <= _AS_GOOD * best)


class Shares:
    """What a process computes of a run. Made by all processes at the same time.

    Args:
        rank, size: of this process, of how many. groups: as groups_for gives it; ranks of a group follow one another.

    Attributes:
        sent: bytes that this process has sent to others. by_theory: what it would have with tokens and heads that divide evenly: of each
            attention 4 * tokens * width * (n - 1) / n**2 elements for n processes.
    """

    def __init__(self, rank: int, size: int, groups: int = 1):
        self.groups, self.members = groups, size // groups
        self._group, self._place = divmod(rank, self.members)
        self.sent, self.by_theory = 0, 0.0
        inside = [dist.new_group([*range(first, first + self.members)]) for first in range(0, size, self.members)]
        across = [dist.new_group([*range(place, size, self.members)]) for place in range(self.members)]
        self._inside, self._across = inside[self._group], across[self._place]

    def passes(self, names: Sequence[str], predict: Callable[[str], Tensor], like: Tensor) -> dict[str, Tensor]:
        """The predictions of all passes of a step by name, each of the form of `like`; this group computes every n-th."""
        mine = {name: predict(name).contiguous() for name in names[self._group :: self.groups]}
        found = {}
        for index, name in enumerate(names):
            owner = index % self.groups
            found[name] = mine[name] if name in mine else torch.empty_like(like)
            if self.groups > 1:
                dist.broadcast(found[name], owner * self.members + self._place, group=self._across)
                self.sent += found[name].nbytes * (self.groups - 1) * (name in mine)
        return found

    def count(self, number: int) -> int:
        """As ops.AllTokens, and so are `mine` and `whole`."""
        return sizes(number, self.members)[self._place]

    def mine(self, tokens: Tensor, counts: Sequence[int], dim: int = 1) -> Tensor:
        parts = zip(tokens.split(list(counts), dim), counts, strict=True)
        return torch.cat([part.split(sizes(count, self.members), dim)[self._place] for part, count in parts], dim)

    def whole(self, tokens: Tensor, count: int) -> Tensor:
        shapes = [(tokens.shape[0], share, tokens.shape[2]) for share in sizes(count, self.members)]
        return torch.cat(self._exchange([tokens] * self.members, shapes), dim=1)

    def attention(self, inner: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """An attention of ops.py's form over the tokens of all, of which each process gives its own; `inner` computes it for some heads."""
        if self.members == 1:
            return inner

        @torch.compiler.disable
        def attend(q: Tensor, k: Tensor, v: Tensor, transformer_options: dict) -> Tensor:
            (batch, num_heads, _, dim), counts = q.shape, transformer_options["token_counts"]
            heads = sizes(num_heads, self.members)
            lengths = [sum(shares) for shares in zip(*(sizes(count, self.members) for count in counts), strict=True)]
            shapes = [(batch, heads[self._place], length, dim) for length in lengths]
            of_heads = [torch.cat(self._exchange(x.split(heads, dim=1), shapes), dim=2) for x in (q, k, v)]
            out = inner(*of_heads, transformer_options)
            shapes = [(batch, lengths[self._place], number * dim) for number in heads]
            self.by_theory += 4 * q.itemsize * batch * sum(counts) * num_heads * dim * (self.members - 1) / self.members**2
            return torch.cat(self._exchange(out.split(lengths, dim=1), shapes), dim=-1)

        return attend

    def _exchange(self, parts: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Give every process of the group its part; what each gives to this one, of these shapes."""
        sent, lengths = torch.cat([part.reshape(-1) for part in parts]), [math.prod(shape) for shape in shapes]
        got = sent.new_empty(sum(lengths))
        dist.all_to_all_single(got, sent, lengths, [part.numel() for part in parts], group=self._inside)
        self.sent += sent.nbytes - parts[self._place].nbytes
        return [part.view(shape) for part, shape in zip(got.split(lengths), shapes, strict=True)]

    def words(self, steps: int) -> str:
        """What was sent in a run of so many steps, by all processes together, for people. Called by all."""
        total = torch.tensor([self.sent, self.by_theory], dtype=torch.float64)
        dist.all_reduce(total)
        sent, theory = (total / steps / 1e6).tolist()
        how = " and ".join(
            [f"its guidance passes over {self.groups} groups"] * (self.groups > 1)
            + [f"its tokens and heads over {self.members}"] * (self.members > 1)
        )
        return f"{self.groups * self.members} processes shared each step, {how}; they sent {sent:.2f} MB a step, attention by theory {theory:.2f}"


class Group:
    """This process and the others, made by `together`. rank, size: which of how many this is."""

    def __init__(self, store: "dist.Store", rank: int, size: int):
        self.rank, self.size, self.store, self._orders = rank, size, store, 0
        self._shares: dict[int, Shares] = {}

    def meet(self, device: torch.device) -> None:
        """See that all are there and of one version, and connect them. Raises an OpenSoraError if not."""
        own = f"{__version__}, torch {torch.__version__}"
        self.store.set(f"version {self.rank}", own)
        for other in range(self.size):
            try:
                self.store.wait([f"version {other}"], timedelta(seconds=FOUND_WITHIN))
            except RuntimeError as error:
                raise OpenSoraError(
                    f"Process {other} of {self.size} was not there within {FOUND_WITHIN:g} s; start all of them."
                ) from error
            found = self.store.get(f"version {other}").decode()
            if found != own:
                raise OpenSoraError(
                    f"Process {other} of {self.size} runs Open-Sora {found}, process {self.rank} {own}; install one version."
                )
        backend, limit = "gloo", timedelta(seconds=ANSWERED_WITHIN)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            backend = "cpu:gloo,cuda:nccl"
        try:
            dist.init_process_group(backend, store=self.store, rank=self.rank, world_size=self.size, timeout=limit)
        except RuntimeError as error:
            raise OpenSoraError(
                f"Process {self.rank} of {self.size} cannot be connected to the others ({_reason(error)}); "
                "name the network interface in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME."
            ) from error

    def shares(self, passes: list[int], heads: int) -> Shares:
        """How a run is shared out, its counts at zero; arguments and errors as groups_for."""
        groups = groups_for(passes, heads, self.size)
        found = self._shares[groups] = self._shares.get(groups) or Shares(self.rank, self.size, groups)
        found.sent, found.by_theory = 0, 0.0
        return found

    def order(self, work: str, *told: Any) -> None:
        """Let the others do a piece of work, of which this process does its own share; of those that are not the first, nothing.

        told: what they need for it, tensors on the CPU.
        """
        if self.rank == 0:
            self.store.set(f"order {self._orders}", work)
            self._orders += 1
            dist.broadcast_object_list([(work, told)])

    def orders(self) -> Iterator[tuple[str, tuple]]:
        """What the first orders, until it ends. It is waited for as long as it lives: it may read files and encode for long before."""
        while True:
            while not self.store.check([f"order {self._orders}"]):
                if self.store.check([_FAILED]):
                    raise SystemExit(1)
                time.sleep(_LOOK_AGAIN)
            self._orders += 1
            told: list = [None]
            dist.broadcast_object_list(told)
            if told[0][0] == "end":
                return
            yield told[0]

    def end(self) -> None:
        """Part, the first process last. The others end here: torch's threads now and then abort one that winds up while connections close."""
        self.order("end")
        if self.rank:
            atexit._run_exitfuncs()  # else the semaphores of compiling are said to have leaked
            sys.stdout.flush(), sys.stderr.flush()
            self.store.set(f"ended {self.rank}", "")
            os._exit(0)
        self.store.wait([f"ended {rank}" for rank in range(1, self.size)], timedelta(seconds=FOUND_WITHIN))
        dist.destroy_process_group()


@contextmanager
def together(device: torch.device) -> Iterator[Group | None]:
    """The group of this process, as torchrun's environment variables name it, while a command runs; None for a process alone.

    What one process raises ends all; one of them says why, the others end without a word. Raises an OpenSoraError where they cannot be
    reached in time, are of other versions, or share a GPU.
    """
    rank, size = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    if not (rank.isdecimal() and size.isdecimal() and int(size) > 1):
        yield None
        return
    group = _found(device)
    try:
        group.meet(device)
        yield group
        group.end()
    except BaseException as error:
        try:
            is_first = group.store.add(_FAILED, 1) == 1
        except RuntimeError:  # gone with the process that kept it
            is_first = group.rank == 1
        if not is_first:
            raise SystemExit(1) from error
        if isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or re.search("gloo|Gloo|NCCL", str(error))):
            lost = f"Another of the {group.size} processes ended or does not answer ({_reason(error)})"
            raise OpenSoraError(f"{lost}; look at what it said, and start all of them again.") from error
        raise


def _found(device: torch.device) -> Group:
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
        rank, size, *where = (os.environ.get(name, "?") for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
        raise OpenSoraError(
            f"Process {rank} of {size} cannot reach the others at {':'.join(where)} within {FOUND_WITHIN:g} s ({_reason(error)}); start all of "
            "them, and see that MASTER_ADDR and MASTER_PORT are the first one's."
        ) from error


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:160]
