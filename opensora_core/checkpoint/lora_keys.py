"""Whose LoRA a file is, by the names of its tensors and by its header: keys of the common forms as layers of our transformers."""

import re
from collections.abc import Mapping
from functools import cache

from ..families.table import DEFAULT, FAMILIES
from ..family import Family
from ..shapes import Shapes

_PREFIXES = (
    "lora_unet_", "lora_transformer_", "lycoris_", "base_model.model.", "base_model.", "model.diffusion_model.", "diffusion_model.",
    "transformer.", "module.", "model.",
)  # fmt: skip
_DOWN = (
    ".lora_A.default.weight", ".lora_A.weight", ".lora_A", ".lora_down.weight", ".lora.down.weight", "_lora.down.weight",
    ".lora_linear_layer.down.weight",
)  # fmt: skip
_UP = tuple(suffix.replace("lora_A", "lora_B").replace("down", "up") for suffix in _DOWN)
_HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_KRON = ("lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b")
# What the keys of a layer end in, by ComfyUI's words for its tensors. "up_bias" is PEFT's, which is scaled as the matrices are.
_PARTS = {
    "lora_down.weight": _DOWN,
    "lora_up.weight": _UP,
    "lora_mid.weight": (".lora_mid.weight",),
    "up_bias": (".lora_B.bias", ".lora_B.default.bias", ".lora_up.bias", ".lora.up.bias"),
    **{part: (f".{part}",) for part in (*_HADA, *_KRON, "diff", "diff_b", "alpha")},
}
# The ways to say how a weight changes: a file says one of them of a layer.
FORMS = {"LoRA": ("lora_down.weight", "lora_up.weight", "lora_mid.weight"), "LoHa": _HADA, "LoKr": _KRON, "difference": ("diff",)}
DORA = (".lora_magnitude_vector.weight", ".lora_magnitude_vector.default.weight", ".lora_magnitude_vector", ".dora_scale")
TEXT_ENCODERS = re.compile(r"(lora_te\d?_|te\d?\.|text_encoders?(_\d)?\.|text_model\.|conditioner\.|cond_stage_model\.)")
# Models whose LoRAs are tried on ours, by their layers (dots as underscores) and by what trainers write into a file's header.
_OTHERS = (
    ("HunyuanVideo", r"token_refiner|(img|txt)_mlp_fc[12]$|_mod_linear$|_modulation_linear$", r"hunyuan|framepack"),
    ("Chroma", r"distilled_guidance_layer", r"chroma"),
    ("LTX-Video", r"transformer_blocks_\d+_attn2_", r"ltx"),
    ("CogVideoX", r"transformer_blocks_\d+_attn1_", r"cogvideo"),
    ("Stable Diffusion 3", r"joint_blocks_", r"sd3|stable-diffusion-3"),
    ("Stable Diffusion", r"(down|up|input|output|mid|middle)_blocks?_", r"sd_|sdxl|sd1|sd2|stable-diffusion"),
    ("Wan", r"^blocks_\d+_(self_attn|cross_attn|ffn)_", r"\bwan"),
    ("Mochi", r"^blocks_\d+_attn_(qkv|proj)_[xy]$", r"mochi"),
    ("Qwen-Image", r"transformer_blocks_\d+_(img|txt)_mlp_net", r"qwen"),
    (
        "Flux (fused or diffusers layout)",
        r"(double_blocks|single_blocks).*(qkv|linear1)$|single_transformer_blocks|transformer_blocks.*(to_q|to_k|to_v|add_[qkv]_proj)$",
        r"flux",
    ),
)


def by_layer(state: Mapping[str, object], family: Family) -> tuple[dict[str, dict[str, object]], list[str], list[str]]:
    """({layer: {part: what the state has of it}}, stems that are no layer of the family's, keys that end in nothing known)."""
    found: dict[str, dict[str, object]] = {}
    foreign, unread = {}, []
    for key, value in state.items():
        stem, part = _stem_and_part(family.lora_key(key))
        if not part:
            unread.append(key)
        elif layer := _layers(family).get(_bare(stem)):
            found.setdefault(layer, {})[part] = value
        else:
            foreign[stem] = None
    return found, list(foreign), unread


def _stem_and_part(key: str) -> tuple[str, str]:
    for part, suffixes in _PARTS.items():
        if suffix := next((suffix for suffix in suffixes if key.endswith(suffix)), None):
            return key[: -len(suffix)], part
    return key, ""


@cache
def _layers(family: Family) -> dict[str, str]:
    """The layers with a weight of a family's released network, by their names as they are and with underscores for dots."""
    layers = [re.sub(r"\.(weight|scale)$", "", key) for key in family.manifest(family.released) if key.endswith((".weight", ".scale"))]
    return {layer.replace(".", "_"): layer for layer in layers} | {layer: layer for layer in layers}


def _bare(stem: str) -> str:
    stripped = True
    while stripped:  # prefixes may be stacked: base_model.model.module.
        stripped = next((prefix for prefix in _PREFIXES if stem.startswith(prefix)), "")
        stem = stem[len(stripped) :]
    return stem


def layers_are_of(stems: list[str]) -> str | None:
    """For people: the model that has such layers, which ours lacks."""
    names = [_bare(stem).replace(".", "_") for stem in stems]
    if known := next((title for title, layers, _ in _OTHERS if any(re.search(layers, name) for name in names)), None):
        return known
    return next((family.title for family in FAMILIES if any(name in _layers(family) for name in names)), None)


def said_to_be_of(metadata: Mapping[str, str], family: Family) -> str | None:
    """For people: another model, if the file's header says that it was trained for one."""
    for key in ("modelspec.architecture", "ss_base_model_version"):
        said = metadata.get(key, "").lower()
        if re.search(r"open-?_?sora", said):
            continue
        title = next((title.split(" (")[0] for title, _, words in _OTHERS if re.search(words, said)), None)
        if title and title not in family.title:
            return f"{title} ({key} says {metadata[key][:60]})"
    return None


def describe_lora(shapes: Shapes, metadata: Mapping[str, str] | None = None) -> str:
    """How many layers of a video transformer a LoRA changes, at which ranks, and of which model it is, from its header alone."""
    known = {family: by_layer(shapes, family) for family in FAMILIES if family.slot == DEFAULT.slot}
    family = max(known, key=lambda family: len(known[family][0]))  # the first of those that have as many
    found, foreign, unread = known[family]
    other = said_to_be_of(metadata or {}, family) or layers_are_of(foreign)
    of_other = f"; it is a LoRA for {other}" if other else ""
    total = len(found) + len(foreign)
    if not found:
        return f"none of its {total} layers is of {family.title}{of_other}"
    ranks = sorted({parts["lora_down.weight"][0] for parts in found.values() if parts.get("lora_down.weight")})
    kinds = [form for form, of_form in FORMS.items() if any(not parts.keys().isdisjoint(of_form) for parts in found.values())]
    how = ", ".join([*([f"rank {', '.join(map(str, ranks))}"] if ranks else []), *(kind for kind in kinds if kind != "LoRA")])
    more = f"; {len(unread)} tensors that are not read here, the first is {unread[0]}" if unread else ""
    return f"{len(found)} of its {total} layers are of {family.title}{f', {how}' if how else ''}{of_other}{more}"


def no_match(name: str, keys: list[str], family: Family) -> str:
    found = ", ".join(keys[:3]) or "none"
    other = layers_are_of([_stem_and_part(key)[0] for key in keys])
    more = f" It is a LoRA for {other}, whose layers {family.title} does not have." if other else ""
    wanted = next(layer for layer in _layers(family).values() if family.group_of(layer) == "attention")
    return f"Use a LoRA of {family.title}. {name}: no key matches {family.title}. Found: {found}. Expected for instance base_model.model.{wanted}.lora_A.weight.{more}"
