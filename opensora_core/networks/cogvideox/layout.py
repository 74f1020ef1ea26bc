"""How files name CogVideoX's tensors: as diffusers, which is as published; as SAT, the authors' training code; or as ComfyUI's own class.

SAT's table says which parameters of the module a tensor holds; where it holds several, their rows follow one another.

Source: huggingface/diffusers@58eb52c0 scripts/convert_cogvideox_to_diffusers.py; zai-org/CogVideo@e519eced tools/export_sat_lora_weight.py.
"""

import re
from dataclasses import replace

import torch
from torch import Tensor

from ...shapes import AS_RELEASED, Layout, Manifest, Shapes, renamed
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
_NUMBERED = re.compile(r"\b(layers|adaLN_modulations|(?:query|key)_layernorm_list|(?:transformer_)?blocks)\.(\d+)\b")
_COMPUTED = re.compile(r"embed_tokens|word_embeddings|freqs_(sin|cos)|position_embedding")  # in SAT files only


def _numbered(stem: str) -> tuple[str, str]:
    """A tensor's name with a place for the block's number, and the number."""
    found = _NUMBERED.search(stem)
    return (_NUMBERED.sub(r"\1.{}", stem, count=1), found[2]) if found else (stem, "")


def convert(key: str, tensor: Tensor, config: CogVideoXConfig | None = None) -> list[tuple[str, Tensor]]:
    """One tensor of SAT's as (name in the module, tensor) pairs; none for what is computed anew. Exact: rows are moved, never computed."""
    if _COMPUTED.search(key):
        return []
    stem, _, leaf = key.rpartition(".")
    place, number = _numbered(stem)
    names = _SAT.get(place)
    if names is None:
        return [(key, tensor)]
    parts = [tensor] if len(names) == 1 else tensor.chunk(len(names))
    if "adaLN_modulations" in stem:
        # Three each of the attention's and the MLP's for video, then the same for text: each norm has its own six together.
        twelve = tensor.chunk(12)
        parts = torch.cat(twelve[0:3] + twelve[6:9]), torch.cat(twelve[3:6] + twelve[9:12])
    return [(f"{name.format(number)}.{leaf}", part) for name, part in zip(names, parts, strict=True)]


def _manifest(module: Manifest) -> Manifest:
    """See Layout."""
    keys, found = {name: key for key, names in _SAT.items() for name in names}, {}
    for name, shape in module.items():
        stem, _, leaf = name.rpartition(".")
        place, number = _numbered(stem)
        key = f"{keys.get(place, place).format(number)}.{leaf}"
        found[key] = shape if key not in found else (found[key][0] + shape[0], *shape[1:])
    return found


SAT = Layout(mark="mixins.patch_embed.text_proj.weight", words=" in SAT's layout", convert=convert, manifest=_manifest, is_recut=True)
_OF_THE_HOST = {
    "_embedding_linear_": "_embedding.linear_",
    "blocks.": "transformer_blocks.",
    ".attn_out.": ".attn1.to_out.0.",
    ".ff_proj.": ".ff.net.0.proj.",
    ".ff_out.": ".ff.net.2.",
    **{f".{part}.": f".attn1.to_{part}." for part in "qkv"},
    **{f".norm_{part}.": f".attn1.norm_{part}." for part in "qk"},
}
# As read it has the published names, under which it is not the host's own class of model any more.
HOST = replace(renamed(list(_OF_THE_HOST.items()), "blocks.0.attn_out.weight", " in ComfyUI's own layout"), file_name=AS_RELEASED.file_name)
LAYOUTS = (SAT, HOST, AS_RELEASED)


def config_of(shapes: Shapes) -> CogVideoXConfig:
    """Sizes from the shapes of a file of any layout, without prefix. Raises as CogVideoXConfig.of."""
    kept = next(each for each in LAYOUTS if each.mark in shapes or each is AS_RELEASED)
    found = (pair for key, shape in shapes.items() for pair in kept.convert(key, torch.empty(tuple(shape), device="meta"), None))
    return CogVideoXConfig.of({name: tuple(tensor.shape) for name, tensor in found})


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
