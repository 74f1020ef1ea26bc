"""LoRA files on a MODEL: keys brought into the host's form by the core, applied by the host."""

import math
from pathlib import Path

import comfy.sd

from ...opensora_core.checkpoint.lora import comfy_keys, read_lora
from ...opensora_core.errors import CheckpointError, OpenSoraError
from .model import require_open_sora


def apply_lora(model, path: str, strength: float):
    """A copy of the MODEL with a LoRA on it.

    Args:
        strength: factor on the change; 0 returns the model as it is.

    Raises:
        CheckpointError: not a LoRA, or no layer of it is this model's.
        OpenSoraError: another MODEL, or a strength that is not a finite number.
    """
    require_open_sora(model)
    if not math.isfinite(strength):
        raise OpenSoraError(f"strength={strength} is not a finite number; 1 is the file's own, 0 is none.")
    layers = read_lora(path)
    name = Path(path).name
    _check_fits(model, layers, name)
    if strength == 0:
        return model
    patched, _ = comfy.sd.load_lora_for_models(model, None, comfy_keys(layers), strength, 0)
    if len(patched.patches) == 0:
        raise CheckpointError(f"ComfyUI applied nothing of {name}; update ComfyUI and this pack.")
    return patched


def _check_fits(model, layers: dict, name: str) -> None:
    """Raise unless the LoRA's layers exist in the model in these shapes; the host would pass over them with a line in the log."""
    weights = model.model.diffusion_model.state_dict()
    matched = [layer for layer in layers if f"{layer}.weight" in weights]
    if not matched:
        raise CheckpointError(f"{name}: none of its {len(layers)} layers is in this model; the first is {next(iter(layers))}.")
    for layer in matched:
        change, weight = layers[layer], weights[f"{layer}.weight"]
        rows, columns = change.up.shape[0], change.down.flatten(1).shape[1]
        if (rows, columns) != tuple(weight.shape) and weight.is_floating_point():
            raise CheckpointError(
                f"{name} was trained for another model: {layer} changes a weight of {[rows, columns]}, this model's is {list(weight.shape)}."
            )
