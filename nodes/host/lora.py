"""LoRA files on a MODEL: keys brought into the host's form by the core, applied by the host."""

from pathlib import Path

import comfy.sd

from ...opensora_core.checkpoint.lora import changed_words, comfy_keys, in_model, read_lora
from ...opensora_core.errors import CheckpointError
from ...opensora_core.run.finite import is_finite
from .families import require_open_sora


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
            f"{name} holds values that are not numbers (NaN or infinite), the first for {bad}: a damaged or unfinished file."
        )
    if strength == 0:
        return model, f"{line} at a strength of 0: not at all"
    patched, _ = comfy.sd.load_lora_for_models(model, None, comfy_keys(layers), strength, 0)
    if len(patched.patches) == 0:
        raise CheckpointError(f"ComfyUI applied nothing of {name}; update ComfyUI and this pack.")
    return patched, line
