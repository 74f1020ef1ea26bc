"""Which layers of a file are quantised and how, in the notes ComfyUI reads.

ComfyUI's format: `<layer>.weight` in float8 or int8, `<layer>.weight_scale` in fp32, and the format's name either in a tensor
`<layer>.comfy_quant` (JSON as bytes) or in the header's `_quantization_metadata`. Its older form, `scaled_fp8` with
`<layer>.scale_weight`, is read too.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..readers import json_object
from .files import QUANTISED_NOTE, Header, open_tensors, quantisation
from .quantised import Float8, Float8E5M2, Format, Int8

# Format's name in ComfyUI -> (the format, dtypes its weights are stored in)
_HOST_FORMATS = {
    "float8_e4m3fn": (Float8, ("F8_E4M3", "U8")),
    "float8_e5m2": (Float8E5M2, ("F8_E5M2", "U8")),
    "int8_tensorwise": (Int8, ("I8",)),
}
_FLOAT8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
HOST_NAMES = {form.name: name for name, (form, _) in _HOST_FORMATS.items()}

_NOTE = re.compile(r"(^|\.)(weight_scale|scale_weight|input_scale|scale_input|comfy_quant|scaled_fp8)$")


@dataclass(frozen=True)
class LayerFormat:
    """How one layer's weight becomes a quantised one.

    form: the format it is kept in. is_stored: whether the file holds it so already; if not it is quantised as it is read.
    scale_key: where in the file the scale is; None = the scale is one.
    """

    form: Format
    is_stored: bool
    scale_key: str | None = None

    def take(self, weight: Tensor, get: Callable[[str], Tensor], device: torch.device | str) -> tuple[Tensor, Tensor]:
        """The bytes and the scale, on a device. Raises a CheckpointError for a scale that no quantiser writes."""
        if not self.is_stored:
            weight = weight.to(device)
            return self.form.quantise(weight if weight.dtype.itemsize > 1 else weight.to(torch.bfloat16))
        shape = self.form.shapes(*weight.shape)[1]
        scale = get(self.scale_key).to(torch.float32) if self.scale_key else torch.ones(())
        if not (torch.isfinite(scale).all() and (scale > 0).all()):
            raise CheckpointError(f"The scale {self.scale_key} is not a positive number; download the file again.")
        scale = scale.reshape(-1, 1) if shape and scale.numel() > 1 else scale.reshape(())
        return weight.view(torch.int8).to(device), scale.expand(shape).clone().to(device)


def is_note(key: str) -> bool:
    """Whether a tensor only says how another one is quantised."""
    return bool(_NOTE.search(key))


def stored_formats(header: Header, prefix: str = "") -> dict[str, LayerFormat]:
    """The quantised layers of a file, by name without prefix; empty for a file of plain numbers.

    Raises a CheckpointError for a file that is quantised in a way that is not read here, or whose weights or scales do not fit their notes.
    """
    form = quantisation(header)
    notes = _notes(header, prefix) if form else {}
    if form and not notes:
        raise CheckpointError(f"{header.name} is quantised ({form}), which this library does not read; {_READABLE}")
    return {layer.removeprefix(prefix): _layer_format(header, layer, note) for layer, note in notes.items()}


_READABLE = "it reads ComfyUI's float8_e4m3fn, float8_e5m2 and int8_tensorwise. Give such a file, or the bf16 or fp32 one."


def _notes(header: Header, prefix: str) -> dict[str, dict]:
    """{layer as in the file: what its note says}."""
    what = "The header"
    try:
        notes = json_object(header.metadata.get(QUANTISED_NOTE, "{}"), header.name).get("layers", {})
        notes = {layer if f"{layer}.weight" in header.tensors else prefix + layer: dict(note) for layer, note in notes.items()}
        with open_tensors(header) as get:
            for what in (key for key in header.tensors if key.endswith(".comfy_quant")):
                notes[what.removesuffix(".comfy_quant")] = json_object(bytes(get(what).to(torch.uint8).flatten().tolist()), what)
    except (ValueError, AttributeError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{what} of {header.name} says in an unreadable way how it is quantised; download the file again.") from error
    for key in header.tensors:
        layer, _, leaf = key.rpartition(".")
        # One scale beside an fp8 weight can mean only one thing, note or none.
        if leaf in ("scale_weight", "weight_scale") and f"{layer}.weight" in header.tensors:
            float8 = _FLOAT8.get(header.tensors[f"{layer}.weight"].dtype)
            if float8 or leaf == "scale_weight":
                notes.setdefault(layer, {"format": float8 or "float8_e4m3fn"})
    return notes


def _layer_format(header: Header, layer: str, note: dict) -> LayerFormat:
    name, weight = str(note.get("format"))[:60], header.tensors.get(f"{layer}.weight")
    parameters = note.get("params")
    is_rotated = note.get("convrot") or (isinstance(parameters, dict) and parameters.get("convrot"))
    if name not in _HOST_FORMATS or is_rotated or f"{layer}.pre_quant_scale" in header.tensors:
        kind = f"{name} with rotated weights" if is_rotated else f"{name} with scaled inputs" if name in _HOST_FORMATS else name
        raise CheckpointError(f"{header.name}: {layer} is quantised as {kind}, which this library does not read; {_READABLE}")
    form, dtypes = _HOST_FORMATS[name]
    scale_key = next((key for key in (f"{layer}.weight_scale", f"{layer}.scale_weight") if key in header.tensors), None)
    wrong = ""
    if weight is None or len(weight.shape) != 2:
        wrong = f"says how {layer} is quantised and has no weight for it"
    elif weight.dtype not in dtypes:
        wrong = f"has a {layer}.weight stored as {weight.dtype} though its note says {name}"
    elif scale_key is None and form is Int8:
        wrong = f"lacks {layer}.weight_scale, without which its int8 weight means nothing"
    elif scale_key is not None:
        found, wanted = header.tensors[scale_key].shape, form().shapes(*weight.shape)[1]
        if found not in ((), (1,), (1, 1), wanted, wanted[:1]):
            wrong = f"has a {scale_key} of shape {list(found)}, not {list(wanted)} or a single number"
    if wrong:
        raise CheckpointError(f"{header.name} {wrong}; download the file again.")
    return LayerFormat(form(), True, scale_key)
