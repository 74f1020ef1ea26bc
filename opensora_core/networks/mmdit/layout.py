"""How files keep an MMDiT: as Open-Sora 2.0 was released, or as Flux was, and how the latter becomes the former.

The released layout has q_proj, k_proj, v_proj and v_mlp apart and rotary pairs (j, j + D/2) in a head of D; its q and k norms are called
`.scale`, which is `.weight` here because that is what a namespace's RMSNorm calls it. Flux has them in one piece, and pairs (2j, 2j + 1).
"""

import re

from torch import Tensor

from ...shapes import Layout, Manifest
from .config import TransformerConfig

# What every file has, fused or not.
KEYS = ("double_blocks.0.img_attn.norm.key_norm.scale|double_blocks.0.img_attn.norm.key_norm.weight", "img_in.bias")
# The linear layers by what they do. Which are quantised by default is the result of benchmarks/quantise_layers.py
# (benchmarks/results/quantise_layers_cpu.json): embedders and final layer save 0.2 % of the file and more than double the error,
# modulation saves 14 % of it and raises the error by a third.
GROUPS = {
    "embedders": re.compile(r"(img_in|txt_in|cond_in|(time|vector|guidance)_in\.(in|out)_layer)"),
    "modulation": re.compile(r"(double_blocks\.\d+\.(img|txt)_mod\.lin|single_blocks\.\d+\.modulation\.lin)"),
    "final_layer": re.compile(r"final_layer\..+"),
    "attention": re.compile(r"(double_blocks\.\d+\.(img|txt)_attn\.(q_proj|k_proj|v_proj|proj)|single_blocks\.\d+\.(q_proj|k_proj))"),
    "mlp": re.compile(r"(double_blocks\.\d+\.(img|txt)_mlp\.[02]|single_blocks\.\d+\.(v_mlp|linear2))"),
}

_ATTENTION = re.compile(r"(double_blocks\.\d+\.(?:img|txt)_attn)\.qkv\.(weight|bias)")
_LINEAR1 = re.compile(r"(single_blocks\.\d+)\.linear1\.(weight|bias)")
_NORM = re.compile(r"(.*\.norm\.(?:query|key)_norm)\.(?:scale|weight)")


def file_name(name: str) -> str:
    """A parameter's name in a file: `norm.query_norm.weight` -> `norm.query_norm.scale`; a file's name stays."""
    return _NORM.sub(r"\1.scale", name)


def module_name(name: str) -> str:
    """The inverse of file_name; a name that is the module's already stays."""
    return _NORM.sub(r"\1.weight", name)


def unfuse(name: str, tensor: Tensor, config: TransformerConfig) -> list[tuple[str, Tensor]]:
    """One tensor of a fused, interleaved-rotary Flux file as tensors of the unfused, rotate-half layout.

    Exact: rows are moved, never computed. Within every head the rows of q and k (weights, biases and both
    norm scales) go from pairs (2j, 2j+1) to pairs (j, j + D/2); v, MLP and everything else stay views of
    what was given, which may be on meta. The pairs are (name in the module, tensor).
    """
    hidden, head_dim = config.hidden_size, config.head_dim
    match = _ATTENTION.fullmatch(name) or _LINEAR1.fullmatch(name)
    if match:
        stem, kind = match.groups()
        q, k, rest = tensor.split([hidden, hidden, tensor.shape[0] - 2 * hidden])
        last = "v_proj" if stem.endswith("_attn") else "v_mlp"
        parts = {"q_proj": _pairs_to_halves(q, head_dim), "k_proj": _pairs_to_halves(k, head_dim), last: rest}
        return [(f"{stem}.{part}.{kind}", value) for part, value in parts.items()]
    return [(module_name(name), _pairs_to_halves(tensor, head_dim) if _NORM.fullmatch(name) else tensor)]


def _pairs_to_halves(rows: Tensor, head_dim: int) -> Tensor:
    """Reorder axis 0, head by head: 0, 2, 4, ..., then 1, 3, 5, ..."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def _released_manifest(manifest: Manifest) -> Manifest:
    return {file_name(name): shape for name, shape in manifest.items()}


def _fused_manifest(manifest: Manifest) -> Manifest:
    fused: Manifest = {}
    for name, shape in _released_manifest(manifest).items():
        stem, _, kind = name.rpartition(".")
        owner, _, part = stem.rpartition(".")
        double = owner.endswith("_attn")
        if part == "q_proj":
            rest = ("k_proj", "v_proj") if double else ("k_proj", "v_mlp")
            rows = shape[0] + sum(manifest[f"{owner}.{other}.{kind}"][0] for other in rest)
            fused[f"{owner}.{'qkv' if double else 'linear1'}.{kind}"] = (rows, *shape[1:])
        elif part not in ("k_proj", "v_proj", "v_mlp"):
            fused[name] = shape
    return fused


UNFUSED = Layout(file_name=file_name, convert=lambda key, tensor, config: [(module_name(key), tensor)], manifest=_released_manifest)
FUSED = Layout(
    mark="double_blocks.0.img_attn.qkv.bias",
    words=" in the fused Flux layout",
    file_name=file_name,
    convert=unfuse,
    manifest=_fused_manifest,
    is_recut=True,
)
