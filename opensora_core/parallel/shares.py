"""How the work of one step is shared out: guidance passes over groups of processes, and inside a group the tokens of a forward.

Tokens of text and of video are cut each, as evenly as can be. Where attention needs all of them, each process gets all tokens of some
heads and gives the results back: two exchanges (arXiv 2309.14509). No padding and no mask, so that any number of tokens and heads does.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import OpenSoraError

_AS_GOOD = 1.05  # of the time of the best way: sharing out passes sends next to nothing, so that it is taken where it is nearly as good


def sizes(count: int, parts: int) -> list[int]:
    """`count` things in so many parts, the first ones with one more."""
    return [(count + parts - 1 - part) // parts for part in range(parts)]


def groups_for(passes: Sequence[int], heads: int, size: int) -> int:
    """Over how many groups of processes guidance passes are shared out; the best by what a process computes in a run.

    Args:
        passes: of each step. heads: of the attention, 1 of a network whose tokens cannot be shared out. size: processes.

    Raises:
        OpenSoraError: so many processes have no work.
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
