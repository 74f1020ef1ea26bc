"""Transformer files as a MODEL of the host, through its own loader, in the precision that is asked for, and LoRA files on one, which the core brings
into the host's form; families.py says what the host knows."""

import logging
from pathlib import Path

import comfy.model_management
import comfy.sd
import comfy.utils

from ...opensora_core.checkpoint import detect, quantised
from ...opensora_core.checkpoint.files import Header, quantisation, read_network
from ...opensora_core.checkpoint.load import compare
from ...opensora_core.checkpoint.lora import changed_words, comfy_keys, in_model, read_lora
from ...opensora_core.checkpoint.quantize import FORMATS
from ...opensora_core.choices import AUTO, DTYPES, INT8, NF4, torch_dtype
from ...opensora_core.errors import CheckpointError
from ...opensora_core.run.finite import is_finite
from ...opensora_core.shapes import bare_shapes
from .families import ROWS, FileClass, converted, is_open_sora, require_open_sora
from .paths import load_tensors
from .precision import NF4Operations, quantise_state, unpatchable

logger = logging.getLogger(__name__)

_HOST_PREFIXES = ("", "model.diffusion_model.", "model.")  # what the host's own loader takes off


def load_model(path: str, precision: str = AUTO, disable_dynamic: bool = False):
    """Load an Open-Sora 2.0 transformer file as a MODEL, through the host's own loader.

    Args:
        precision: auto (as stored, where the device computes in it), fp32, bf16, fp8_e4m3fn or int8 (block weights held in 8 bits),
            or nf4 (in 4 bits, by bitsandbytes; experimental, see precision.py).
        disable_dynamic: the host asks for a copy without its dynamic memory, for compilation and hooks.

    Raises:
        CheckpointError: another model, a damaged or incomplete file, or a quantised one for which a precision was asked.
        OpenSoraError: nf4 without bitsandbytes.
    """
    header, identity = _check_file(path, precision)
    # What is stored in 8 bits is not rounded again.
    form = quantised.NF4() if precision == NF4 else FORMATS[precision]() if precision in FORMATS and not _is_float8(header) else None
    state, metadata = load_tensors(path)
    if form or identity.prefix not in _HOST_PREFIXES:
        cut = len(identity.prefix)
        state = {key[cut:]: tensor for key, tensor in state.items() if key.startswith(identity.prefix)}
    options = {"dtype": torch_dtype(precision)} if precision in DTYPES else {}
    is_nf4 = precision == NF4
    if is_nf4:  # in the type that the host would hold these weights in if they were not to be quantised
        stored, size = comfy.utils.weight_dtype(state), comfy.utils.calculate_parameters(state)
        types = {"supported_dtypes": FileClass.supported_inference_dtypes, "weight_dtype": stored}
        options = {"custom_operations": NF4Operations, "dtype": comfy.model_management.unet_dtype(model_params=size, **types)}
    bare = {key.removeprefix(identity.prefix): tensor for key, tensor in state.items()}
    is_of_the_host = any(row.kind == identity.kind and row.own_of_the_host in bare for row in ROWS if row.own_of_the_host)
    if (form and identity.layout.is_recut) or is_of_the_host:
        state = {identity.layout.file_name(key): tensor for key, tensor in converted(bare, identity).items()}
    if form:
        state = quantise_state(state, form, identity.family)
    patcher = comfy.sd.load_diffusion_model_state_dict(state, options, metadata, disable_dynamic or is_nf4)
    if patcher is None or not is_open_sora(patcher):
        found = "nothing" if patcher is None else type(patcher.model).__name__
        raise CheckpointError(
            f"ComfyUI took {header.name} for {found}, though its tensors are {identity.title}; update ComfyUI and this pack."
        )
    patcher.cached_patcher_init = (load_model, (path, precision))
    return unpatchable(patcher) if is_nf4 else patcher


def apply_lora(model, path: str, strength: float):
    """A copy of the MODEL with a LoRA on it, and a line for people: how many of how many layers it changes.

    Args:
        strength: factor on the change; 0 returns the model as it is.

    Raises:
        CheckpointError: not a LoRA, or one that was made for another model.
        OpenSoraError: another MODEL.
    """
    require_open_sora(model)
    layers, name = read_lora(path, model.model.family), Path(path).name
    # Compared here: the host would pass over what does not fit with a line in the log. Weights that it quantised do not say their shape.
    weights = {key.removesuffix(".weight"): weight for key, weight in model.model.diffusion_model.state_dict().items()}
    shapes = {key: tuple(weight.shape) if weight.is_floating_point() else None for key, weight in weights.items()}
    in_model(layers, shapes, name)
    line = f"{name} {changed_words(layers, shapes)}"
    if bad := next((key for key, layer in layers.items() if not all(map(is_finite, layer.parts.values()))), None):
        raise CheckpointError(
            f"{name} holds values that are not numbers (NaN or infinite), the first for {bad}; download the file again, or give a finished one."
        )
    if strength == 0:
        return model, f"{line} at a strength of 0: not at all"
    patched, _ = comfy.sd.load_lora_for_models(model, None, comfy_keys(layers), strength, 0)
    if len(patched.patches) == 0:
        raise CheckpointError(f"ComfyUI applied nothing of {name}; update ComfyUI and this pack.")
    return patched, line


def _check_file(path: str, precision: str) -> tuple[Header, detect.Identity]:
    header = read_network(path)
    identity = detect.require(detect.identify(header.shapes), "transformer", header.name)
    form = quantisation(header)
    if form and precision != AUTO:
        raise CheckpointError(f"{header.name} is already quantised ({form}); use precision auto, or the bf16 file for {precision}.")
    if precision in (INT8, NF4) and _is_float8(header):
        raise CheckpointError(f"{header.name} is stored in float8 already; use precision auto, or the bf16 file for {precision}.")
    found = compare(bare_shapes(header.shapes, identity.prefix), identity.manifest(), identity.layout)
    extra = found.whole(f"{header.name} is {identity.title}", exact=form is None)
    if extra and not form:
        logger.warning("%s holds %d tensors that its model does not use: %s", header.name, len(extra), ", ".join(extra[:5]))
    return header, identity


def _is_float8(header: Header) -> bool:
    return any(name.startswith("F8") for name in header.dtypes)
