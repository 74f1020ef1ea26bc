"""Weights in 8 bits, in the host's own format for quantised layers, or in nf4: held so from the moment they are loaded, or written to a file."""

import json
from pathlib import Path

import comfy.model_management
import comfy.utils
import torch
from torch import Tensor

from ...opensora_core.checkpoint.formats import HOST_NAMES
from ...opensora_core.checkpoint.quantised import Format
from ...opensora_core.checkpoint.quantize import quantize
from ...opensora_core.choices import FP8
from ...opensora_core.family import Family


def quantise_state(state: dict[str, Tensor], form: Format, family: Family) -> dict[str, Tensor]:
    """A transformer's tensors with the blocks' attention and MLP weights in a format, the rest as they are.

    Embedders, modulation, norms and the last layer hold little of the size and much of the precision. Weights are only
    stored so: the host multiplies in the input's dtype.

    Args:
        state: tensors by key, without prefix. Memory-mapped ones are read one at a time.
    """
    return quantise_layers(state, family.layers_to_quantise({key: tuple(tensor.shape) for key, tensor in state.items()}), form)


def quantise_layers(state: dict[str, Tensor], layers: list[str], form: Format) -> dict[str, Tensor]:
    """The same tensors, the weights of the named layers in a format and with the notes by which the host knows it, if it does (nf4: nf4.py)."""
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
