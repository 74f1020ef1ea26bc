"""Count the memory a piece of torch code has at once, by running it: on real tensors, or on the meta device for nothing.

On the meta device every layer runs with its shapes and no numbers, so the real modules at the real sizes are counted in
a fraction of a second on any machine. What is counted are storages that torch makes. What a library takes for itself
inside one operation (convolution, matrix product) is not seen, on either device.
"""

import weakref
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class AllocationCounter(ExitStack):
    """While it is entered, follows the bytes of all storages that are made inside and still alive: `live` now, at most `peak` at once.

    Attention on meta tensors counts as a fused kernel does: its output and one fp32 number for each row, and no
    L x L matrix. Real attention is counted as it allocates.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __enter__(self) -> "AllocationCounter":
        for mode in (_Storages(self), _FusedAttention()):
            self.enter_context(mode)
        return self

    def count_at_most(self, num_bytes: int) -> None:
        """Count code that is not run here: a peak of `num_bytes` on top of what is alive now."""
        self.peak = max(self.peak, self.live + num_bytes)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)  # a storage is the same object for all tensors on it while it is alive
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


class _Storages(TorchDispatchMode):
    def __init__(self, counter: AllocationCounter):
        super().__init__()
        self._counter = counter

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = function(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and id(made.untyped_storage()) not in given:
                self._counter._add(made)
        self._counter.count_at_most(0)
        return result


class _FusedAttention(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention and args[0].device.type == "meta":
            query, value = args[0], args[2]
            rows = query.new_empty(query.shape[:-1], dtype=torch.float32)  # log-sum-exp, kept until the kernel ends
            result = torch.empty_like(query) if value.shape[-1] == query.shape[-1] else query.new_empty(*query.shape[:-1], value.shape[-1])
            del rows
            return result
        return function(*args, **(kwargs or {}))
