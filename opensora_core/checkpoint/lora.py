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
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .detect import identify
from .files import find_weights, open_tensors, read_header
from .quantised import Adapter, is_quantised

logger = logging.getLogger(__name__)

T = TypeVar("T")

_PREFIXES = ("base_model.model.", "base_model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "module.", "model.")
_DOWN = (
    ".lora_A.default.weight",
    ".lora_A.weight",
    ".lora_A",
    ".lora_down.weight",
    ".lora.down.weight",
    "_lora.down.weight",
    ".lora_linear_layer.down.weight",
)
_UP = (
    ".lora_B.default.weight",
    ".lora_B.weight",
    ".lora_B",
    ".lora_up.weight",
    ".lora.up.weight",
    "_lora.up.weight",
    ".lora_linear_layer.up.weight",
)
_DORA = (".lora_magnitude_vector.weight", ".lora_magnitude_vector.default.weight", ".lora_magnitude_vector", ".dora_scale")

_DOUBLE = ("_mod.lin", "_attn.q_proj", "_attn.k_proj", "_attn.v_proj", "_attn.proj", "_mlp.0", "_mlp.2")
_SINGLE = ("q_proj", "k_proj", "v_mlp", "linear2", "modulation.lin")
_TOP = (
    "img_in", "txt_in", "cond_in", "time_in.in_layer", "time_in.out_layer", "vector_in.in_layer", "vector_in.out_layer",
    "final_layer.linear", "final_layer.adaLN_modulation.1",
)  # fmt: skip
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
        model: MMDiT.
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
        CheckpointError: not a LoRA, no layer matches, shapes differ, or weights are in a form that nothing can be added to.
    """
    name = Path(path).name
    layers = read_lora(path)
    modules = dict(model.named_modules())
    matched = {key: layer for key, layer in layers.items() if hasattr(modules.get(key), "weight")}
    if not matched:
        raise CheckpointError(_no_match(name, list(layers)))
    if unmatched := sorted(layers.keys() - matched.keys()):
        logger.warning("%s: left out %d of %d layers, which this model lacks: %s", name, len(unmatched), len(layers), ", ".join(unmatched))
    for key, layer in matched.items():
        _check_fits(name, key, layer, modules[key])
    return matched


def read_lora(path: str | Path) -> dict[str, LoraLayer]:
    """Read a LoRA file or PEFT folder as changes by layer name ("double_blocks.0.img_attn.q_proj").

    alpha comes from the file's own `.alpha` tensors, else from adapter_config.json in the folder, else from
    the file's metadata, else it equals the rank.

    Raises:
        CheckpointError: not a LoRA, or no layer of it belongs to the Open-Sora 2.0 transformer.
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
    return parse_lora(state, settings or _metadata_settings(header.metadata), path.name)


def parse_lora(state: Mapping[str, Tensor], settings: Mapping | None = None, name: str = "This LoRA") -> dict[str, LoraLayer]:
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
        layer = _layer_name(stem)
        if layer is None:
            foreign.append(stem)
        elif stem not in downs or stem not in ups:
            raise CheckpointError(f"{name} is incomplete: {stem} has only one of its two matrices; download it again.")
        else:
            layers[layer] = LoraLayer(downs[stem], ups[stem], float(alphas[stem]) if stem in alphas else None)
            if layers[layer].alpha is None:
                layers[layer] = _with_settings(layer, layers[layer], settings or {})
    if not layers:
        raise CheckpointError(_no_match(name, list(state)))
    if foreign:
        logger.warning("%s: left out %d layers that Open-Sora 2.0 does not have: %s", name, len(foreign), ", ".join(sorted(foreign)))
    return layers


def describe_lora(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """How many layers of the Open-Sora 2.0 transformer a LoRA changes, and at which ranks, from its shapes alone."""
    downs = _collect(shapes, _DOWN)
    ranks = sorted({shape[0] for stem, shape in downs.items() if _layer_name(stem) and shape})
    known = sum(_layer_name(stem) is not None for stem in downs)
    if not known:
        return f"none of its {len(downs)} layers is of the Open-Sora 2.0 transformer"
    return f"{known} of its {len(downs)} layers are of the Open-Sora 2.0 transformer, rank {', '.join(map(str, ranks))}"


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


def _layer_name(stem: str) -> str | None:
    """Layer that a key's stem names, or None.

    "base_model.model.single_blocks.3.q_proj", "lora_unet_single_blocks_3_q_proj" -> "single_blocks.3.q_proj".
    """
    for prefix in ("lora_unet_", "lora_transformer_", "lycoris_"):
        if stem.startswith(prefix):
            return _from_underscores(stem[len(prefix) :])
    stripped = True
    while stripped:  # prefixes may be stacked: base_model.model.module.
        stripped = next((prefix for prefix in _PREFIXES if stem.startswith(prefix)), "")
        stem = stem[len(stripped) :]
    return stem if _is_layer(stem) else None


def _is_layer(layer: str) -> bool:
    if layer in _TOP:
        return True
    if match := re.fullmatch(r"double_blocks\.\d+\.(?:img|txt)(.+)", layer):
        return match[1] in _DOUBLE
    match = re.fullmatch(r"single_blocks\.\d+\.(.+)", layer)
    return bool(match) and match[1] in _SINGLE


def _from_underscores(flat: str) -> str | None:
    for layer in _TOP:
        if flat == layer.replace(".", "_"):
            return layer
    if match := re.fullmatch(r"double_blocks_(\d+)_(img|txt)(_.+)", flat):
        tail = next((leaf for leaf in _DOUBLE if leaf.replace(".", "_") == match[3]), None)
        return tail and f"double_blocks.{match[1]}.{match[2]}{tail}"
    if match := re.fullmatch(r"single_blocks_(\d+)_(.+)", flat):
        tail = next((leaf for leaf in _SINGLE if leaf.replace(".", "_") == match[2]), None)
        return tail and f"single_blocks.{match[1]}.{tail}"
    return None


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


def _check_fits(name: str, key: str, layer: LoraLayer, module: nn.Module) -> None:
    weight, shape = module.weight, tuple(module.weight.shape)
    if is_quantised(module):
        shape = (module.out_features, module.in_features)
    elif not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise CheckpointError(f"{name} cannot be merged into quantised weights ({key} is {weight.dtype}); load the model in bf16.")
    wanted = (layer.up.shape[0], layer.down.flatten(1).shape[1])
    if shape != wanted or layer.up.shape[1] != layer.rank:
        raise CheckpointError(
            f"{name} was trained for another model: {key} changes a weight of {list(wanted)}, this model's is {list(shape)}."
        )


def _no_match(name: str, keys: list[str]) -> str:
    found = ", ".join(keys[:3]) or "none"
    layers = [key for key in keys if _FUSED.search(re.sub(r"\.?_?lora.*$|\.alpha$", "", key.replace("lora_unet_", "")))]
    flux = " It is a LoRA for Flux (fused or diffusers layout), whose layers Open-Sora 2.0 does not have." if layers else ""
    return (
        f"{name}: no key matches the Open-Sora 2.0 transformer. Found: {found}. "
        f"Expected for instance base_model.model.double_blocks.0.img_attn.q_proj.lora_A.weight.{flux}"
    )
