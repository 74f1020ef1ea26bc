"""What a group of processes shares of a run: what is checked before, how a transformer takes its part, what those do that are not the first."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..errors import OpenSoraError
from ..families.table import family_of
from ..memory.device import is_out_of_memory
from ..memory.footprint import sizes_of_files
from ..parallel.shares import Shares, groups_for
from ..sampling.given import ImageCondition
from .files import ModelFiles
from .parts import Networks

SAMPLE = "sample"


def check_size(files: ModelFiles, size: int) -> None:
    """Raise an OpenSoraError if no run of a model can be shared out over so many processes. No weight is read."""
    config = sizes_of_files(files.dit).transformer
    groups_for([1 + len(family_of(config).usual.scales)], _heads(config), size)


def on_cpu(condition: ImageCondition | None) -> ImageCondition | None:
    """What is given, as it can be sent."""
    if condition is None:
        return None
    return replace(condition, **{name: value.cpu() for name, value in vars(condition).items() if isinstance(value, Tensor)})


@contextmanager
def shared_out(networks: Networks, transformer: nn.Module, passes: Sequence[int], sentence: str) -> Iterator[Shares]:
    """A transformer that computes its part of every step. passes: of each step. sentence: what to say where memory runs out.

    Another way of computing would have to be begun by all processes, so that memory that runs out ends all.
    """
    heads = _heads(transformer.config)
    shares = networks.group.shares(passes, heads)
    if heads > 1:
        transformer.tokens = shares
        for block in transformer.blocks():
            block.attention = shares.attention(networks.attention)
    try:
        yield shares
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error) and not isinstance(error, OpenSoraError):
            raise OpenSoraError(f"Process {networks.group.rank} of {networks.group.size}: {sentence}") from error
        raise


def _heads(config: Any) -> int:
    """Attention heads of a network whose tokens can be shared out (ops.AllTokens); 1 of others."""
    return config.num_heads if hasattr(family_of(config).build, "tokens") else 1
