"""LoRA files: the common forms of their keys, merged into our transformer or renamed for ComfyUI.

Read: PEFT (`base_model.model.<layer>.lora_A.weight`, the reference's own), kohya
(`lora_unet_<layer with underscores>.lora_down.weight` with `.alpha`), and bare, `transformer.` or
`diffusion_model.` prefixed ones. A layer's change is strength * alpha / rank * B @ A.
"""

import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..families.table import DEFAULT, FAMILIES, family_of
from ..family import Family
from ..shapes import Shapes
from .detect import identify
from .files import find_weights, open_tensors, read_header
from .quantised import Adapter, is_quantised

logger = logging.getLogger(__name__)

T = TypeVar("T")

_PREFIXES = (
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
    "base_model.model.",
    "base_model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "module.",
    "model.",
)
_DOWN = (
    ".lora_A.default.weight", ".lora_A.weight", ".lora_A", ".lora_down.weight", ".lora.down.weight", "_lora.down.weight",
    ".lora_linear_layer.down.weight",
)  # fmt: skip
_UP = tuple(suffix.replace("lora_A", "lora_B").replace("down", "up") for suffix in _DOWN)
_DORA = (".lora_magnitude_vector.weight", ".lora_magnitude_vector.default.weight", ".lora_magnitude_vector", ".dora_scale")

_FUSED = re.compile(r"(double_blocks|single_blocks).*(qkv|linear1)$|(single_)?transformer_blocks.*(to_q|to_k|to_v|add_q_proj)$")


@dataclass(frozen=True)
class LoraLayer:
    """One layer's change.

    Attributes:
        down: A, [rank, in_features].
        up: B, [out_features, rank].
        alpha: the change is alpha / rank * up @ down; None means alpha = rank.
    """

    down: Tensor
    up: Tensor
    alpha: float | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def delta(self) -> Tensor:
        """[out_features, in_features] in fp32 at strength 1."""
        return self.scale * (self.up.float().flatten(1) @ self.down.float().flatten(1))


@dataclass(frozen=True)
class MergedLora:
    """What a merge changed. `restore` puts it back, bit for bit; undo several merges last first.

    Attributes:
        originals: weights that were replaced, by layer.
        adapters: what was laid beside quantised weights, by layer.
    """

    model: nn.Module
    originals: Mapping[str, nn.Parameter]
    adapters: Mapping[str, Adapter]

    def restore(self) -> None:
        for name, original in self.originals.items():
            self.model.get_submodule(name).weight = original
        for name, adapter in self.adapters.items():
            self.model.get_submodule(name).drop(adapter)


def merge_lora(model: nn.Module, path: str | Path, strength: float = 1.0) -> MergedLora:
    """Add a LoRA to a loaded transformer's weights.

    Into a quantised weight (fp8, int8, nf4) it is not rounded, which would lose most of a small change: it is kept
    beside the weight and added to the layer's output.

    Args:
        model: a transformer.
        path: a LoRA file or a PEFT folder (adapter_config.json and adapter_model.safetensors).
        strength: factor on the change; 0 leaves the model as it is, negative subtracts.

    Returns:
        What was replaced, to restore it. Memory-mapped originals cost nothing to keep.

    Raises:
        CheckpointError: no layer matches, shapes differ, or weights are in a form that nothing can be added to.
    """
    if not math.isfinite(strength):
        raise CheckpointError(f"strength={strength} is not a number a LoRA can be applied with; 1 is the file's own.")
    matched, modules = fitting_layers(model, path), dict(model.named_modules())
    originals, adapters = {}, {}
    for key, layer in matched.items():
        module, weight = modules[key], modules[key].weight
        if is_quantised(module):
            down, up = (part.flatten(1).to(weight.device, torch.float32) for part in (layer.down, layer.up))
            adapters[key] = Adapter(down.to(module.bias.dtype), (strength * layer.scale * up).to(module.bias.dtype))
            module.adapters.append(adapters[key])
            continue
        originals[key] = weight
        delta = layer.delta().to(weight.device)
        module.weight = nn.Parameter((weight.detach().float() + strength * delta).to(weight.dtype), requires_grad=False)
    return MergedLora(model, originals, adapters)


def fitting_layers(model: nn.Module, path: str | Path) -> dict[str, LoraLayer]:
    """Read a LoRA as changes to layers of this model; only the model's shapes are looked at, so it may be on meta.

    Raises:
        CheckpointError: as read_lora and in_model; or weights are in a form that nothing can be added to.
    """
    name, modules = Path(path).name, {key: module for key, module in model.named_modules() if getattr(module, "weight", None) is not None}
    shapes = {key: (m.out_features, m.in_features) if is_quantised(m) else tuple(m.weight.shape) for key, m in modules.items()}
    matched = in_model(read_lora(path, family_of(model.config)), shapes, name)
    for key in matched:
        weight = modules[key].weight
        if not is_quantised(modules[key]) and (not weight.is_floating_point() or weight.dtype.itemsize < 2):
            raise CheckpointError(f"{name} cannot be merged into quantised weights ({key} is {weight.dtype}); load the model in bf16.")
    return matched


def in_model(layers: Mapping[str, LoraLayer], shapes: Mapping[str, tuple[int, ...] | None], name: str) -> dict[str, LoraLayer]:
    """The layers that a model has; what it lacks is named in a warning.

    Args:
        shapes: of the weights of its layers; None where a form of quantisation hides it.
        name: the LoRA's, for messages.

    Raises:
        CheckpointError: the model has none of them, or one in another shape.
    """
    matched = {key: layer for key, layer in layers.items() if key in shapes}
    if not matched:
        raise CheckpointError(f"{name}: none of its {len(layers)} layers is in this model; the first is {next(iter(layers))}.")
    if lacking := sorted(layers.keys() - matched.keys()):
        logger.warning("%s: left out %d of %d layers, which this model lacks: %s", name, len(lacking), len(layers), ", ".join(lacking))
    for key, layer in matched.items():
        changed, shape = (layer.up.shape[0], layer.down.flatten(1).shape[1]), shapes[key]
        if shape is not None and (shape != changed or layer.up.shape[1] != layer.rank):
            raise CheckpointError(
                f"{name} was trained for another model: {key} changes a weight of {list(changed)}, this model's is {list(shape)}."
            )
    return matched


def read_lora(path: str | Path, family: Family = DEFAULT) -> dict[str, LoraLayer]:
    """Read a LoRA file or PEFT folder as changes by layer name ("double_blocks.0.img_attn.q_proj").

    alpha comes from the file's own `.alpha` tensors, else from adapter_config.json in the folder, else from
    the file's metadata, else it equals the rank.

    Raises:
        CheckpointError: not a LoRA, or no layer of it belongs to the family's transformer.
    """
    path = Path(path)
    settings = {}
    if path.is_dir():
        settings = _adapter_settings(path / "adapter_config.json")
        files = [file for file in find_weights(path) if file.stem == "adapter_model"] or find_weights(path)
        if not files:
            raise CheckpointError(f"{path.name} holds no LoRA; expected adapter_model.safetensors in it.")
        path = files[0]
    elif path.stem == "adapter_model":
        settings = _adapter_settings(path.parent / "adapter_config.json")
    header = read_header(path)
    found = identify(header.shapes)
    if found.kind != "lora":
        raise CheckpointError(f"{path.name} is {found.title}, not a LoRA.")
    with open_tensors(header) as get:
        state = {key: get(key) for key in header.tensors}
    return parse_lora(state, settings or _metadata_settings(header.metadata), path.name, family)


def parse_lora(
    state: Mapping[str, Tensor], settings: Mapping | None = None, name: str = "This LoRA", family: Family = DEFAULT
) -> dict[str, LoraLayer]:
    """Tensors of a LoRA file as changes by layer name.

    Args:
        state: the file's tensors by key, in any of the forms above.
        settings: PEFT's adapter_config: lora_alpha, alpha_pattern, use_rslora. Used where the file has no `.alpha`.
        name: for messages.

    Raises:
        CheckpointError: no pair of tensors belongs to a layer of the transformer, or it is a DoRA.
    """
    if dora := next((key for key in state if key.endswith(_DORA)), None):
        raise CheckpointError(f"{name} is a DoRA ({dora} scales directions), which is not supported; use a plain LoRA.")
    downs, ups, alphas = (_collect(state, suffixes) for suffixes in (_DOWN, _UP, (".alpha",)))
    layers, foreign = {}, []
    for stem in {**downs, **ups}:
        layer = _layer_name(stem, family)
        if layer is None:
            foreign.append(stem)
        elif stem not in downs or stem not in ups:
            raise CheckpointError(f"{name} is incomplete: {stem} has only one of its two matrices; download it again.")
        else:
            layers[layer] = LoraLayer(downs[stem], ups[stem], float(alphas[stem]) if stem in alphas else None)
            if layers[layer].alpha is None:
                layers[layer] = _with_settings(layer, layers[layer], settings or {})
    if not layers:
        raise CheckpointError(_no_match(name, list(state), family))
    if foreign:
        logger.warning("%s: left out %d layers that %s does not have: %s", name, len(foreign), family.title, ", ".join(sorted(foreign)))
    return layers


def describe_lora(shapes: Shapes) -> str:
    """How many layers of a video transformer a LoRA changes, and at which ranks, from its shapes alone."""
    downs = _collect(shapes, _DOWN)
    known = {family: [stem for stem in downs if _layer_name(stem, family)] for family in FAMILIES if family.slot == DEFAULT.slot}
    family = max(known, key=lambda family: len(known[family]))  # the first of those that have as many
    if not known[family]:
        return f"none of its {len(downs)} layers is of {family.title}"
    ranks = sorted({downs[stem][0] for stem in known[family] if downs[stem]})
    return f"{len(known[family])} of its {len(downs)} layers are of {family.title}, rank {', '.join(map(str, ranks))}"


def comfy_keys(layers: Mapping[str, LoraLayer]) -> dict[str, Tensor]:
    """Layers as the state dict that ComfyUI applies; tensors are passed on as they are."""
    renamed: dict[str, Tensor] = {}
    for layer, change in layers.items():
        stem = f"diffusion_model.{layer}"
        renamed[f"{stem}.lora_down.weight"] = change.down
        renamed[f"{stem}.lora_up.weight"] = change.up
        if change.alpha is not None:
            renamed[f"{stem}.alpha"] = torch.tensor(float(change.alpha))
    return renamed


def _collect(state: Mapping[str, T], suffixes: tuple[str, ...]) -> dict[str, T]:
    found = {}
    for key, tensor in state.items():
        suffix = next((suffix for suffix in suffixes if key.endswith(suffix)), None)
        if suffix:
            found[key[: -len(suffix)]] = tensor
    return found


@cache
def _layers(family: Family) -> dict[str, str]:
    """The linear layers of a family's released network, by their names as they are and with underscores for dots."""
    manifest = family.manifest(family.released)
    layers = [key.removesuffix(".weight") for key, shape in manifest.items() if key.endswith(".weight") and len(shape) == 2]
    return {layer.replace(".", "_"): layer for layer in layers} | {layer: layer for layer in layers}


def _layer_name(stem: str, family: Family) -> str | None:
    """Layer that a key's stem names, or None.

    "base_model.model.single_blocks.3.q_proj", "lora_unet_single_blocks_3_q_proj" -> "single_blocks.3.q_proj".
    """
    stripped = True
    while stripped:  # prefixes may be stacked: base_model.model.module.
        stripped = next((prefix for prefix in _PREFIXES if stem.startswith(prefix)), "")
        stem = stem[len(stripped) :]
    return _layers(family).get(stem)


def _with_settings(layer: str, change: LoraLayer, settings: Mapping) -> LoraLayer:
    """PEFT's alpha: of the longest pattern that names the layer, else lora_alpha; rank-stabilised if it says so."""
    patterns = {key: value for key, value in (settings.get("alpha_pattern") or {}).items() if layer == key or layer.endswith(f".{key}")}
    alpha = patterns[max(patterns, key=len)] if patterns else settings.get("lora_alpha")
    if alpha is None:
        return change
    if settings.get("use_rslora"):
        alpha = alpha * math.sqrt(change.rank)  # alpha / sqrt(rank), written as alpha' / rank
    return replace(change, alpha=float(alpha))


def _adapter_settings(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path.name} beside the LoRA is not readable JSON; download it again.") from error
    return settings if isinstance(settings, dict) else {}


def _metadata_settings(metadata: Mapping[str, str]) -> dict:
    """lora_alpha from a safetensors header: plain, or in the JSON that diffusers stores."""
    try:
        adapter = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        flat = {key.removeprefix("transformer."): value for key, value in adapter.items()}
        if "lora_alpha" in metadata:
            flat["lora_alpha"] = float(metadata["lora_alpha"])
    except (ValueError, AttributeError):
        return {}
    return flat


def _no_match(name: str, keys: list[str], family: Family) -> str:
    found = ", ".join(keys[:3]) or "none"
    of_flux = any(_FUSED.search(re.sub(r"\.?_?lora.*$|\.alpha$", "", key.replace("lora_unet_", ""))) for key in keys)
    flux = f" It is a LoRA for Flux (fused or diffusers layout), whose layers {family.title} does not have." if of_flux else ""
    wanted = next(layer for layer in _layers(family).values() if family.group_of(layer) == "attention")
    return f"{name}: no key matches {family.title}. Found: {found}. Expected for instance base_model.model.{wanted}.lora_A.weight.{flux}"
