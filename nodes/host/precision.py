"""Weights in 8 bits, in the host's own format for quantised layers, or in nf4, which is experimental: held so from the moment they are loaded, or
written to a file.

The host has no format for nf4, so such weights are bytes of layers of ours: layers that cast, like the host's own, so that it moves, streams
and frees them like any others. What the host does to weights themselves (LoRA, merging, saving) would take the bytes for numbers and is
refused in a sentence. Dynamic VRAM reads weights without asking their layer; such a model is loaded without it.
"""

import json
from pathlib import Path

import comfy.model_management
import comfy.ops
import comfy.utils
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...opensora_core.checkpoint.formats import HOST_NAMES
from ...opensora_core.checkpoint.quantised import NF4, Format
from ...opensora_core.checkpoint.quantize import quantize
from ...opensora_core.choices import FP8
from ...opensora_core.errors import OpenSoraError
from ...opensora_core.family import Family
from . import selftest


def quantise_state(state: dict[str, Tensor], form: Format, family: Family) -> dict[str, Tensor]:
    """A transformer's tensors with the blocks' attention and MLP weights in a format, the rest as they are.

    Embedders, modulation, norms and the last layer hold little of the size and much of the precision. Weights are only
    stored so: the host multiplies in the input's dtype.

    Args:
        state: tensors by key, without prefix. Memory-mapped ones are read one at a time.
    """
    return quantise_layers(state, family.layers_to_quantise({key: tuple(tensor.shape) for key, tensor in state.items()}), form)


def quantise_layers(state: dict[str, Tensor], layers: list[str], form: Format) -> dict[str, Tensor]:
    """The same tensors, the weights of the named layers in a format and with the notes by which the host knows it, if it does."""
    name = HOST_NAMES.get(form.name)
    layout = json.dumps({"format": name, "full_precision_matrix_mult": True}).encode()
    result, progress = dict(state), comfy.utils.ProgressBar(len(layers))
    for layer in layers:
        comfy.model_management.throw_exception_if_processing_interrupted()
        stored, scale = form.quantise(state[f"{layer}.weight"])
        result[f"{layer}.weight"] = stored.view(torch.float8_e4m3fn) if form.name == FP8 else stored
        result[f"{layer}.weight_scale"] = scale
        if name is not None:
            result[f"{layer}.comfy_quant"] = torch.tensor(list(layout), dtype=torch.uint8)
        progress.update(1)
    return result


def write_quantised(source: str, target: Path, form: str) -> str:
    """Write a quantised copy of a transformer file, with the host's progress bar; an interrupt leaves no file.

    Returns:
        What was written, for people.

    Raises:
        OpenSoraError, CheckpointError: as opensora_core.checkpoint.quantize.
    """
    bar = None

    def progress(done: int, total: int, name: str) -> None:
        nonlocal bar
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar = bar or comfy.utils.ProgressBar(total)
        bar.update_absolute(done, total)

    return quantize(source, target, form, progress=progress).text()


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
    """Goes before a patcher class of the host and refuses what would read or change weights in nf4 as numbers."""

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
    patcher.__class__ = selftest.before(Unpatchable, type(patcher))
    return patcher


def is_nf4(module: nn.Module) -> bool:
    """Whether a layer holds its weight in nf4."""
    return isinstance(module, NF4Operations.Linear) and module.form is not None


def _refusal(what: str) -> OpenSoraError:
    return OpenSoraError(f"Weights in nf4 {what}; load the model with precision auto, bf16, fp8_e4m3fn or int8 for that.")
