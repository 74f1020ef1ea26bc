"""How files name CogVideoX's tensors: as diffusers, which is as published; as SAT, the authors' training code; or as ComfyUI's own class.

A table says which parameters of the module a tensor holds; where it holds several, their rows follow one another.

Source: huggingface/diffusers@58eb52c0 scripts/convert_cogvideox_to_diffusers.py; zai-org/CogVideo@e519eced tools/export_sat_lora_weight.py.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ...shapes import AS_RELEASED, Layout, Manifest, Shapes
from .config import CogVideoXConfig

KEYS = ("patch_embed.text_proj.weight|mixins.patch_embed.text_proj.weight",)
GROUPS = {
    "embedders": re.compile(r"patch_embed\.(proj|text_proj)|(time|ofs)_embedding\.linear_[12]"),
    "modulation": re.compile(r"transformer_blocks\.\d+\.norm[12]\.linear"),
    "final_layer": re.compile(r"norm_out\.linear|proj_out"),
    "attention": re.compile(r"transformer_blocks\.\d+\.attn1\.(to_[qkv]|to_out\.0)"),
    "mlp": re.compile(r"transformer_blocks\.\d+\.ff\.net\.(0\.proj|2)"),
}

_BLOCK = "transformer_blocks.{}."
_QKV = tuple(f"{_BLOCK}attn1.to_{part}" for part in "qkv")
_SAT = {
    **{f"{name}_embed.{2 * n}": (f"{name}_embedding.linear_{n + 1}",) for name in ("time", "ofs") for n in (0, 1)},
    **{f"mixins.patch_embed.{name}": (f"patch_embed.{name}",) for name in ("proj", "text_proj")},
    "mixins.pos_embed": ("patch_embed",),
    "transformer.layers.{}.input_layernorm": (_BLOCK + "norm1.norm",),
    "transformer.layers.{}.post_attention_layernorm": (_BLOCK + "norm2.norm",),
    "transformer.layers.{}.attention.query_key_value": _QKV,
    "transformer.layers.{}.attention.dense": (_BLOCK + "attn1.to_out.0",),
    "transformer.layers.{}.mlp.dense_h_to_4h": (_BLOCK + "ff.net.0.proj",),
    "transformer.layers.{}.mlp.dense_4h_to_h": (_BLOCK + "ff.net.2",),
    **{f"mixins.adaln_layer.{name}_layernorm_list.{{}}": (f"{_BLOCK}attn1.norm_{name[0]}",) for name in ("query", "key")},
    "mixins.adaln_layer.adaLN_modulations.{}.1": (_BLOCK + "norm1.linear", _BLOCK + "norm2.linear"),
    "transformer.final_layernorm": ("norm_final",),
    "mixins.final_layer.norm_final": ("norm_out.norm",),
    "mixins.final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "mixins.final_layer.linear": ("proj_out",),
}
_HOST = {
    **{f"{name}_embedding_linear_{n}": (f"{name}_embedding.linear_{n}",) for name in ("time", "ofs") for n in (1, 2)},
    **{f"blocks.{{}}.{name}": (_BLOCK + name,) for name in ("norm1.linear", "norm1.norm", "norm2.linear", "norm2.norm")},
    **{f"blocks.{{}}.{name}": (f"{_BLOCK}attn1.{name}",) for name in ("norm_q", "norm_k")},
    **{f"blocks.{{}}.{part}": (name,) for part, name in zip("qkv", _QKV, strict=True)},
    "blocks.{}.attn_out": (_BLOCK + "attn1.to_out.0",),
    "blocks.{}.ff_proj": (_BLOCK + "ff.net.0.proj",),
    "blocks.{}.ff_out": (_BLOCK + "ff.net.2",),
}
_NUMBERED = re.compile(r"\b(layers|adaLN_modulations|(?:query|key)_layernorm_list|(?:transformer_)?blocks)\.(\d+)\b")
_COMPUTED = re.compile(r"embed_tokens|word_embeddings|freqs_(sin|cos)|position_embedding")  # in SAT files only


def _numbered(stem: str) -> tuple[str, str]:
    """A tensor's name with a place for the block's number, and the number."""
    found = _NUMBERED.search(stem)
    return (_NUMBERED.sub(r"\1.{}", stem, count=1), found[2]) if found else (stem, "")


def convert(key: str, tensor: Tensor, config: CogVideoXConfig | None = None) -> list[tuple[str, Tensor]]:
    """One tensor of a file of any layout as (name in the module, tensor) pairs; none for what is computed anew.

    Exact: rows are moved, never computed. A key of the published layout stays as it is.
    """
    if _COMPUTED.search(key):
        return []
    stem, _, leaf = key.rpartition(".")
    place, number = _numbered(stem)
    names = (_SAT | _HOST).get(place)
    if names is None:
        return [(key, tensor)]
    parts = [tensor] if len(names) == 1 else tensor.chunk(len(names))
    if "adaLN_modulations" in stem:
        # Three each of the attention's and the MLP's for video, then the same for text: each norm has its own six together.
        twelve = tensor.chunk(12)
        parts = torch.cat(twelve[0:3] + twelve[6:9]), torch.cat(twelve[3:6] + twelve[9:12])
    return [(f"{name.format(number)}.{leaf}", part) for name, part in zip(names, parts, strict=True)]


def config_of(shapes: Shapes) -> CogVideoXConfig:
    """Sizes from the shapes of a file of any layout, without prefix. Raises as CogVideoXConfig.of."""
    found = (pair for key, shape in shapes.items() for pair in convert(key, torch.empty(tuple(shape), device="meta")))
    return CogVideoXConfig.of({name: tuple(tensor.shape) for name, tensor in found})


def _manifest_by(table: Mapping[str, tuple[str, ...]]):
    """Layout.manifest of a table."""
    keys = {name: key for key, names in table.items() for name in names}

    def manifest(module: Manifest) -> Manifest:
        found: Manifest = {}
        for name, shape in module.items():
            stem, _, leaf = name.rpartition(".")
            place, number = _numbered(stem)
            key = f"{keys.get(place, place).format(number)}.{leaf}"
            found[key] = shape if key not in found else (found[key][0] + shape[0], *shape[1:])
        return found

    return manifest


SAT = Layout(
    mark="mixins.patch_embed.text_proj.weight", words=" in SAT's layout", convert=convert, manifest=_manifest_by(_SAT), is_recut=True
)
HOST = Layout(mark="blocks.0.attn_out.weight", words=" in ComfyUI's own layout", convert=convert, manifest=_manifest_by(_HOST))
LAYOUTS = (SAT, HOST, AS_RELEASED)

_SAT_LORA = re.compile(r".*?\b(transformer\.layers\.\d+\..+)\.matrix_([AB])\.(\d)")


def lora_key(key: str) -> str:
    """A key of a LoRA file as checkpoint/lora.py reads it: SAT's as PEFT's, kohya's with one underscore after its prefix; others stay.

    SAT's `transformer.layers.0.attention.query_key_value.matrix_A.2` is the third part, v, of what is one layer there. It says no scale,
    and was trained with 1/rank: the strength says it.
    """
    match = _SAT_LORA.fullmatch(key)
    if not match:
        return key.replace("lora_unet__", "lora_unet_")
    stem, side, part = match.groups()
    names = [name.removesuffix(".") for name, _ in convert(f"{stem}.", torch.empty(3, device="meta"))]
    return f"{names[int(part)]}.lora_{side}.weight" if int(part) < len(names) else key
