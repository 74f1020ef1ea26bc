"""Weights in 4 bits (nf4 of bitsandbytes) in the host. Experimental.

The host has no format for them, so they are bytes of layers of ours: layers that cast, like the host's own, so that it moves,
streams and frees them like any others. What the host does to weights themselves (LoRA, merging, saving) would take the bytes
for numbers and is refused in a sentence. Dynamic VRAM reads weights without asking their layer; such a model is loaded
without it.
"""

import functools

import comfy.model_management
import comfy.ops
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...opensora_core.checkpoint.quantised import NF4
from ...opensora_core.errors import OpenSoraError
from . import selftest


class NF4Operations(selftest.base(comfy.ops, "manual_cast")):
    """The host's layers that cast, of which the linear ones take a weight in nf4 where the tensors hold one."""

    class Linear(selftest.base(getattr(comfy.ops, "manual_cast", None), "Linear")):
        """`weight`: [bytes, 1] int8 and `weight_scale`: fp32 if it is in nf4, else as the host has it."""

        def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
            # Without memory: the tensors that come are taken as they are.
            super().__init__(in_features, out_features, bias, device="meta", dtype=dtype)
            self.form = None

        def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
            names, dtype = ("weight", "weight_scale", "bias"), self.weight.dtype
            given = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
            for name, old in list(self._parameters.items()):
                if name not in given and old is not None:
                    missing_keys.append(prefix + name)
                    given[name] = torch.zeros(old.shape, dtype=old.dtype)
            if "weight_scale" in given:
                self.form = NF4()
            for name, tensor in given.items():
                is_ours = self.form is not None and name != "bias"
                # A copy: a file that is mapped could not be replaced while it is loaded.
                tensor = tensor.to(tensor.dtype if is_ours else dtype, copy=True)
                setattr(self, name, nn.Parameter(tensor, requires_grad=False))

        def forward(self, input: Tensor) -> Tensor:
            if self.form is None:
                return super().forward(input)
            comfy.model_management.throw_exception_if_processing_interrupted()
            # What the host left in RAM travels as it is needed.
            weight, scale = (tensor.to(input.device, non_blocking=True) for tensor in (self.weight, self.weight_scale))
            weight = self.form.dequantise(weight, scale, (self.out_features, self.in_features), input.dtype)
            bias = None if self.bias is None else self.bias.to(input.device, input.dtype)
            return F.linear(input, weight, bias)


class Unpatchable:
    """Goes before a patcher class of the host and refuses what would read or change the weights as numbers."""

    def add_patches(self, patches, strength_patch=1.0, strength_model=1.0):
        raise _refusal("take no LoRA, and are not merged")

    def add_hook_patches(self, hook, patches, strength_patch=1.0, strength_model=1.0):
        raise _refusal("take no LoRA")

    def add_weight_wrapper(self, name, function):
        raise _refusal("are not changed by other nodes")

    def get_key_patches(self, filter_prefix=None):
        raise _refusal("are not merged with others")

    def model_state_dict_for_saving(self, model=None, prefix=""):
        raise _refusal("are not saved")


def unpatchable(patcher):
    """The same patcher, of a class that refuses; its copies do as well."""
    patcher.__class__ = _unpatchable_class(type(patcher))
    return patcher


def is_nf4(module: nn.Module) -> bool:
    """Whether a layer holds its weight in nf4."""
    return isinstance(module, NF4Operations.Linear) and module.form is not None


@functools.cache
def _unpatchable_class(host_class: type) -> type:
    return type(f"Unpatchable{host_class.__name__}", (Unpatchable, host_class), {})


def _refusal(what: str) -> OpenSoraError:
    return OpenSoraError(f"Weights in nf4 {what}; load the model with precision auto, bf16, fp8_e4m3fn or int8 for that.")
