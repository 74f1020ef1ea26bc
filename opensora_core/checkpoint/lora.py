"""LoRA files: the common forms of their keys, merged into our transformer or renamed for ComfyUI.

Read: PEFT (`base_model.model.<layer>.lora_A.weight`, upstream's own), kohya
(`lora_unet_<layer with underscores>.lora_down.weight` with `.alpha`), and bare, `transformer.` or
`diffusion_model.` prefixed ones; under the same stems LyCORIS's LoHa and LoKr, whole differences (`.diff`) and differences of biases
(`.diff_b`, `.lora_B.bias`). A LoRA's change is strength * alpha / rank * B @ A. Every key of a file is used, named or refused.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..families.table import DEFAULT, family_of
from ..family import Family
from ..readers import json_object, read_json
from .detect import identify
from .files import find_weights, open_tensors, read_header
from .lora_keys import DORA, FORMS, TEXT_ENCODERS, by_layer, layers_are_of, no_match, said_to_be_of
from .quantised import Adapter, is_quantised

logger = logging.getLogger(__name__)

_BY_COMFYUI = "ComfyUI's own LoRA loader (LoraLoaderModelOnly) reads more kinds"


@dataclass(frozen=True)
class LoraLayer:
    """What a file changes of one layer: its weight, its bias or both.

    parts: tensors by ComfyUI's words. lora_down.weight [rank, in] and lora_up.weight [out, rank]; or hada_w1_a [out, rank], hada_w1_b [rank, in],
    hada_w2_a and hada_w2_b likewise; or lokr_w1 and lokr_w2 or two factors of either; or diff, as the weight is. diff_b: the change of the bias.
    alpha: the weight's change is multiplied by alpha / rank; None means alpha = rank. A difference is not multiplied.
    """

    parts: Mapping[str, Tensor]
    alpha: float | None = None

    @property
    def form(self) -> str:
        """Which of FORMS says how the weight changes; "" where only the bias does."""
        return next((form for form, parts in FORMS.items() if not self.parts.keys().isdisjoint(parts)), "")

    @property
    def rank(self) -> int | None:
        """The rank of the change; None for a difference and for a LoKr of two whole matrices, which have none."""
        factors = (self.parts.get(part) for part in ("lora_down.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"))
        return next((factor.shape[0] for factor in factors if factor is not None), None)

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None or self.rank is None else self.alpha / self.rank

    def delta(self) -> Tensor | None:
        """[out_features, in_features] in fp32 at strength 1, a difference as it is; None where only the bias changes."""
        part = {name: tensor.float() for name, tensor in self.parts.items()}

        def matrix(name: str) -> Tensor:
            return part[name].flatten(1) if name in part else part[f"{name}_a"].flatten(1) @ part[f"{name}_b"].flatten(1)

        if self.form == "LoRA":
            return self.scale * (matrix("lora_up.weight") @ matrix("lora_down.weight"))
        if self.form == "LoHa":
            return self.scale * (matrix("hada_w1") * matrix("hada_w2"))
        if self.form == "LoKr":
            return self.scale * torch.kron(matrix("lokr_w1"), matrix("lokr_w2"))
        return part.get("diff")

    def shape(self) -> tuple[int, ...] | None:
        """The shape that delta() has, without computing it. Raises what torch or Python does where the parts do not fit each other."""
        delta = LoraLayer({name: tensor.to("meta") for name, tensor in self.parts.items()}, self.alpha).delta()
        return None if delta is None else tuple(delta.shape)


def merge_lora(model: nn.Module, path: str | Path, strength: float = 1.0) -> None:
    """Add a LoRA to a loaded transformer's weights.

    Into a quantised weight (fp8, int8, nf4) it is not rounded, which would lose most of a small change: it is kept
    beside the weight and added to the layer's output.

    path: a LoRA file or a PEFT folder (adapter_config.json and adapter_model.safetensors).
    strength: factor on the change; 0 leaves the model as it is, negative subtracts.
    """
    if not math.isfinite(strength):
        raise CheckpointError(f"strength={strength} is not a number a LoRA can be applied with; use 1, the file's own.")
    for key, layer in fitting_layers(model, path).items():
        module = model.get_submodule(key)
        if "diff_b" in layer.parts:
            module.bias = _added(module.bias, layer.parts["diff_b"].float(), strength)
        if not layer.form:
            continue
        if is_quantised(module):
            down, up = (layer.parts[part].flatten(1).to(module.weight.device, torch.float32) for part in FORMS["LoRA"][:2])
            module.adapters.append(Adapter(down.to(module.bias.dtype), (strength * layer.scale * up).to(module.bias.dtype)))
        else:
            module.weight = _added(module.weight, layer.delta(), strength)


def _added(parameter: nn.Parameter, delta: Tensor, strength: float) -> nn.Parameter:
    delta = delta.to(parameter.device).view(parameter.shape)
    return nn.Parameter((parameter.detach().float() + strength * delta).to(parameter.dtype), requires_grad=False)


def fitting_layers(model: nn.Module, path: str | Path) -> dict[str, LoraLayer]:
    """Read a LoRA as changes to layers of this model; only the model's shapes are looked at, so it may be on meta.

    Raises a CheckpointError as read_lora and in_model do, and for weights in a form that nothing can be added to.
    """
    name = Path(path).name
    matched = in_model(read_lora(path, family_of(model.config)), shapes_of(model), name)
    for key, layer in matched.items():
        module = model.get_submodule(key)
        weight = module.weight
        if is_quantised(module):
            if layer.form not in ("LoRA", ""):
                raise CheckpointError(f"{name} is a {layer.form}, which quantised weights ({key}) cannot take; load the model in bf16.")
        elif not weight.is_floating_point() or weight.dtype.itemsize < 2:
            raise CheckpointError(f"{name} cannot be merged into quantised weights ({key} is {weight.dtype}); load the model in bf16.")
    return matched


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's weights by layer, and of its biases by name, as in_model takes them."""
    modules = {key: module for key, module in model.named_modules() if getattr(module, "weight", None) is not None}
    shapes = {key: (m.out_features, m.in_features) if is_quantised(m) else tuple(m.weight.shape) for key, m in modules.items()}
    return shapes | {f"{key}.bias": tuple(m.bias.shape) for key, m in modules.items() if getattr(m, "bias", None) is not None}


def in_model(layers: Mapping[str, LoraLayer], shapes: Mapping[str, tuple[int, ...] | None], name: str) -> dict[str, LoraLayer]:
    """The layers; a CheckpointError if the model lacks some of them, or has one in another shape: it was made for another model.

    shapes: of the weights of its layers, and of its biases as "<layer>.bias"; None where a form of quantisation hides it. name: the LoRA's.
    """
    if wrong := _misfit(layers, shapes):
        raise CheckpointError(f"{name} was trained for another model: {wrong}; use a LoRA of this model.")
    return dict(layers)


def _misfit(layers: Mapping[str, LoraLayer], shapes: Mapping[str, tuple[int, ...] | None]) -> str | None:
    if lacking := [key for key in layers if key not in shapes]:
        if len(lacking) == len(layers):
            return f"none of its {len(layers)} layers is in this model; the first is {lacking[0]}"
        return f"{len(lacking)} of its {len(layers)} layers are not in this one, the first is {lacking[0]}"
    for key, layer in layers.items():
        changes = [("weight", layer.shape(), shapes[key])] if layer.form else []
        if "diff_b" in layer.parts:
            if f"{key}.bias" not in shapes:
                return f"it changes the bias of {key}, which has none in this one"
            changes.append(("bias", tuple(layer.parts["diff_b"].shape), shapes[f"{key}.bias"]))
        for what, changed, shape in changes:
            if shape is not None and shape != changed:
                return f"{key} changes a {what} of {list(changed)}, this model's is {list(shape)}"
    return None


def changed_words(layers: Mapping[str, LoraLayer], shapes: Mapping[str, tuple[int, ...] | None]) -> str:
    """For people: "changes 304 of the model's 462 layers". shapes: as in_model's."""
    linear = [key for key, shape in shapes.items() if not key.endswith(".bias") and (shape is None or len(shape) == 2)]
    return f"changes {len(layers)} of the model's {len(linear)} layers"


def read_lora(path: str | Path, family: Family = DEFAULT) -> dict[str, LoraLayer]:
    """Read a LoRA file or PEFT folder as changes by layer name ("double_blocks.0.img_attn.q_proj").

    alpha comes from the file's own `.alpha` tensors, else from adapter_config.json in the folder, else from the file's metadata, else it equals
    the rank. Raises a CheckpointError for no LoRA, one of another model, or one that says what is not read.
    """
    path = Path(path)
    if is_folder := path.is_dir():
        files = [file for file in find_weights(path) if file.stem == "adapter_model"] or find_weights(path)
        if not files:
            raise CheckpointError(f"{path.name} holds no LoRA; put its adapter_model.safetensors there.")
        path = files[0]
    settings = path.with_name("adapter_config.json")
    has_settings = (is_folder or path.stem == "adapter_model") and settings.is_file()
    adapter = _checked_adapter(read_json(settings), settings.name) if has_settings else {}
    header = read_header(path)
    found = identify(header.shapes)
    if found.kind != "lora":
        raise CheckpointError(f"{path.name} is {found.title}; give a LoRA.")
    if other := said_to_be_of(header.metadata, family):
        raise CheckpointError(f"{path.name} is a LoRA for {other}; use a LoRA of {family.title}.")
    with open_tensors(header) as get:
        state = {key: get(key) for key in header.tensors}
    return parse_lora(state, adapter or _adapter_of_header(header.metadata), path.name, family)


def parse_lora(
    state: Mapping[str, Tensor], adapter: Mapping | None = None, name: str = "This LoRA", family: Family = DEFAULT
) -> dict[str, LoraLayer]:
    """Tensors of a LoRA file as changes by layer name. What changes a text encoder is named in a warning and left out.

    state: the file's tensors by key, in any of the forms above. name: for messages.
    adapter: PEFT's adapter_config: lora_alpha, alpha_pattern, use_rslora. Used where the file has no `.alpha`.
    Raises a CheckpointError for layers that the transformer lacks, a change that is not read, a file that is not whole, or a DoRA.
    """
    if dora := next((key for key in state if key.endswith(DORA)), None):
        raise CheckpointError(f"{name} is a DoRA ({dora}), which is not supported here; use a plain LoRA. {_BY_COMFYUI}.")
    found, foreign, unread = by_layer(state, family)
    if not found:
        raise CheckpointError(no_match(name, list(state), family))
    of_text = [key for key in (*foreign, *unread) if TEXT_ENCODERS.match(key)]
    if of_text:
        logger.warning("%s: left out what it changes of text encoders, which are used as they are: %s", name, ", ".join(sorted(of_text)))
    if lacking := [stem for stem in foreign if stem not in of_text]:
        what = f"{len(lacking)} of its {len(found) + len(lacking)} layers are not in {family.title}, the first is {lacking[0]}"
        raise CheckpointError(f"{name} is a LoRA for {layers_are_of(lacking) or 'another model'}: {what}; use one of this model.")
    if unknown := [key for key in unread if key not in of_text]:
        what = f"holds {len(unknown)} tensors that are not read here and belong to what it was trained for; the first is {unknown[0]}"
        raise CheckpointError(f"{name} {what}. Use another LoRA. {_BY_COMFYUI}.")
    return {layer: _layer(layer, parts, name, adapter or {}) for layer, parts in found.items()}


def _layer(name: str, parts: Mapping[str, Tensor], file: str, adapter: Mapping) -> LoraLayer:
    """The change of one layer, checked for itself: its tensors are all there, fit each other and say one thing."""
    parts = dict(parts)
    alpha, mid, up_bias = (parts.pop(part, None) for part in ("alpha", "lora_mid.weight", "up_bias"))
    forms = [form for form, of_form in FORMS.items() if not parts.keys().isdisjoint(of_form)]
    if len(forms) > 1:
        raise CheckpointError(f"{file} says twice how {name} changes ({' and '.join(forms)}); download the file again.")
    if forms == ["LoRA"] and len(parts.keys() & set(FORMS["LoRA"])) < 2:
        raise CheckpointError(f"{file} is incomplete, {name} has only one of its two matrices; download the file again.")
    try:
        if mid is not None:
            parts["lora_down.weight"] = mid.float().flatten(1) @ parts["lora_down.weight"].float().flatten(1)
        layer = LoraLayer(parts, None if alpha is None else float(alpha))
        layer = layer if alpha is not None else _with_alpha(name, layer, adapter)
        if up_bias is not None:
            layer = replace(layer, parts={**parts, "diff_b": parts.get("diff_b", 0) + layer.scale * up_bias.float()})
        layer.shape()
        if not math.isfinite(layer.scale) or not (layer.form or "diff_b" in layer.parts):
            raise ValueError("nothing that can be added")
    except (RuntimeError, IndexError, KeyError, ZeroDivisionError, OverflowError, TypeError, ValueError) as error:
        shapes = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in parts.items()) or "alpha alone"
        raise CheckpointError(f"The tensors of {name} in {file} do not fit each other ({shapes}); download the file again.") from error
    return layer


def comfy_keys(layers: Mapping[str, LoraLayer]) -> dict[str, Tensor]:
    """Layers as the state dict that ComfyUI applies; tensors are passed on as they are."""
    renamed: dict[str, Tensor] = {}
    for layer, change in layers.items():
        stem = f"diffusion_model.{layer}"
        renamed |= {f"{stem}.{part}": tensor for part, tensor in change.parts.items()}
        if change.alpha is not None:
            renamed[f"{stem}.alpha"] = torch.tensor(float(change.alpha))
    return renamed


def _with_alpha(name: str, layer: LoraLayer, adapter: Mapping) -> LoraLayer:
    """PEFT's alpha: of the longest pattern that names the layer, else lora_alpha; rank-stabilised if it says so."""
    patterns = adapter.get("alpha_pattern") or {}
    named = [key for key in patterns if name == key or name.endswith(f".{key}")]
    alpha = patterns[max(named, key=len)] if named else adapter.get("lora_alpha", adapter.get("alpha"))
    if alpha is None or layer.form in ("difference", ""):
        return layer
    if layer.rank is None:  # PEFT scales a LoKr of whole matrices too; LyCORIS and ComfyUI do not
        scaled = layer.parts["lokr_w1"].float() * (float(alpha) / float(adapter.get("r", alpha)))
        return replace(layer, parts={**layer.parts, "lokr_w1": scaled})
    if adapter.get("use_rslora"):
        alpha = alpha * math.sqrt(layer.rank)  # alpha / sqrt(rank), written as alpha' / rank
    return replace(layer, alpha=float(alpha))


def _checked_adapter(adapter: dict, name: str) -> dict:
    """Raise a CheckpointError unless what is read of adapter_config.json is of its types."""
    patterns = adapter.get("alpha_pattern") or {}
    values = [*patterns.values()] if isinstance(patterns, dict) else ["not a table"]
    values += [adapter[key] for key in ("lora_alpha", "alpha", "r") if adapter.get(key) is not None]
    if any(type(value) not in (int, float) or not abs(value) <= 1e12 for value in values):  # NaN too
        raise CheckpointError(f"{name} beside the LoRA gives a lora_alpha, alpha_pattern or r that is no number; download the file again.")
    return adapter


def _adapter_of_header(metadata: Mapping[str, str]) -> dict:
    """lora_alpha from a safetensors header: plain, or in the JSON that diffusers stores."""
    try:
        adapter = json_object(metadata.get("lora_adapter_metadata", "{}"), "The LoRA's metadata")
        flat = {key.removeprefix("transformer."): value for key, value in adapter.items()}
        if "lora_alpha" in metadata:
            flat["lora_alpha"] = float(metadata["lora_alpha"])
        return _checked_adapter(flat, "The metadata")
    except ValueError:
        return {}
