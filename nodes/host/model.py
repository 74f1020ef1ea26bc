"""Transformer files as a MODEL of the host, through its own loader, in the precision that is asked for; families.py says what the host knows."""

import logging

import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from torch import Tensor

from ...opensora_core.checkpoint import detect, quantised
from ...opensora_core.checkpoint.files import Header, quantisation, read_network
from ...opensora_core.checkpoint.load import compare
from ...opensora_core.checkpoint.quantised import Format
from ...opensora_core.checkpoint.quantize import FORMATS
from ...opensora_core.choices import AUTO, DTYPES, INT8, NF4, torch_dtype
from ...opensora_core.errors import CheckpointError
from ...opensora_core.shapes import bare_shapes
from . import nf4
from .families import FileClass, belongs_to_the_host, converted, is_open_sora
from .paths import load_tensors
from .precision import quantise_state

logger = logging.getLogger(__name__)

_HOST_PREFIXES = ("", "model.diffusion_model.", "model.")  # what the host's own loader takes off


def load_model(path: str, precision: str = AUTO, disable_dynamic: bool = False):
    """Load an Open-Sora 2.0 transformer file as a MODEL, through the host's own loader.

    Args:
        precision: auto (as stored, where the device computes in it), fp32, bf16, fp8_e4m3fn or int8 (block weights held in 8 bits),
            or nf4 (in 4 bits, by bitsandbytes; experimental, see nf4.py).
        disable_dynamic: the host asks for a copy without its dynamic memory, for compilation and hooks.

    Raises:
        CheckpointError: another model, a damaged or incomplete file, or a quantised one for which a precision was asked.
        OpenSoraError: nf4 without bitsandbytes.
    """
    header, identity = _check_file(path, precision)
    form = _form(precision, header)
    state, metadata = load_tensors(path)
    if form or identity.prefix not in _HOST_PREFIXES:
        cut = len(identity.prefix)
        state = {key[cut:]: tensor for key, tensor in state.items() if key.startswith(identity.prefix)}
    options = {"dtype": torch_dtype(precision)} if precision in DTYPES else {}
    is_nf4 = precision == NF4
    if is_nf4:
        options = {"custom_operations": nf4.NF4Operations, "dtype": _working_dtype(state)}
    bare = {key.removeprefix(identity.prefix): tensor for key, tensor in state.items()}
    if (form and identity.layout.is_recut) or belongs_to_the_host(bare, identity):
        state = bare
        state = {identity.layout.file_name(key): tensor for key, tensor in converted(state, identity).items()}
    if form:
        state = quantise_state(state, form, identity.family)
    patcher = comfy.sd.load_diffusion_model_state_dict(state, options, metadata, disable_dynamic or is_nf4)
    if patcher is None or not is_open_sora(patcher):
        found = "nothing" if patcher is None else type(patcher.model).__name__
        raise CheckpointError(
            f"ComfyUI took {header.name} for {found}, though its tensors are {identity.title}; update ComfyUI and this pack."
        )
    patcher.cached_patcher_init = (load_model, (path, precision))
    return nf4.unpatchable(patcher) if is_nf4 else patcher


def _form(precision: str, header: Header) -> Format | None:
    """The format that weights are brought into; None for what is stored in 8 bits, which is not rounded again, and for plain numbers."""
    if precision == NF4:
        return quantised.NF4()
    return FORMATS[precision]() if precision in FORMATS and not _is_float8(header) else None


def _working_dtype(state: dict[str, Tensor]) -> torch.dtype:
    """What the host would hold these weights in if they were not to be quantised."""
    stored, size = comfy.utils.weight_dtype(state), comfy.utils.calculate_parameters(state)
    return comfy.model_management.unet_dtype(model_params=size, supported_dtypes=FileClass.supported_inference_dtypes, weight_dtype=stored)


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
