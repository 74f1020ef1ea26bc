"""Which tensors a model has, under which names, and how other layouts become the released one.

The manifests are built from the modules themselves on the meta device, so that a file is compared with
what will run; tests pin them to the released files' counts and shapes.
"""

import re

import torch
from torch import Tensor

from ..codecs.dc_ae.config import DCAEConfig
from ..codecs.dc_ae.model import VideoDCAE
from ..codecs.hunyuan.config import VAEConfig
from ..codecs.hunyuan.model import CausalVAE
from ..networks.mmdit.config import TransformerConfig
from ..networks.mmdit.model import MMDiT

Manifest = dict[str, tuple[int, ...]]

_ATTENTION = re.compile(r"(double_blocks\.\d+\.(?:img|txt)_attn)\.qkv\.(weight|bias)")
_LINEAR1 = re.compile(r"(single_blocks\.\d+)\.linear1\.(weight|bias)")
_NORM = re.compile(r".*\.norm\.(?:query|key)_norm\.(?:scale|weight)")


def transformer_manifest(config: TransformerConfig, fused: bool = False) -> Manifest:
    """Shape of every tensor of a transformer file, under the file's names (`.scale` for q and k norms).

    Args:
        fused: the Flux layout (`qkv`, `linear1`) instead of the released 2.0 layout.
    """
    with torch.device("meta"):
        state = MMDiT(config).state_dict()
    manifest = {file_name(name): tuple(tensor.shape) for name, tensor in state.items()}
    return _fuse_shapes(manifest) if fused else manifest


def vae_class(config: VAEConfig | DCAEConfig) -> type[CausalVAE] | type[VideoDCAE]:
    """The module that a VAE's configuration is of."""
    return VideoDCAE if isinstance(config, DCAEConfig) else CausalVAE


def vae_manifest(config: VAEConfig | DCAEConfig) -> Manifest:
    """Shape of every tensor of a HunyuanVideo VAE file, or of a Video DC-AE's."""
    with torch.device("meta"):
        state = vae_class(config)(config).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def t5_manifest(
    width: int = 4096, mlp: int = 10240, inner: int = 4096, layers: int = 24, heads: int = 64, vocabulary: int = 32128
) -> Manifest:
    """Shape of every tensor of a T5 v1.1 encoder in transformers' names; the defaults are XXL."""
    manifest: Manifest = {"shared.weight": (vocabulary, width), "encoder.final_layer_norm.weight": (width,)}
    for index in range(layers):
        attention, feed = (f"encoder.block.{index}.layer.{part}." for part in (0, 1))
        for name in "qkv":
            manifest[f"{attention}SelfAttention.{name}.weight"] = (inner, width)
        manifest[f"{attention}SelfAttention.o.weight"] = (width, inner)
        manifest[f"{attention}layer_norm.weight"] = manifest[f"{feed}layer_norm.weight"] = (width,)
        manifest[f"{feed}DenseReluDense.wi_0.weight"] = manifest[f"{feed}DenseReluDense.wi_1.weight"] = (mlp, width)
        manifest[f"{feed}DenseReluDense.wo.weight"] = (width, mlp)
    manifest["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, heads)
    return manifest


def clip_text_manifest(width: int = 768, layers: int = 12, mlp: int = 3072, vocabulary: int = 49408, positions: int = 77) -> Manifest:
    """Shape of every tensor of a CLIP text encoder in transformers' names; the defaults are CLIP-L."""
    manifest: Manifest = {
        "text_model.embeddings.token_embedding.weight": (vocabulary, width),
        "text_model.embeddings.position_embedding.weight": (positions, width),
    }
    linears = {f"self_attn.{name}_proj": (width, width) for name in ("q", "k", "v", "out")}
    linears |= {"mlp.fc1": (mlp, width), "mlp.fc2": (width, mlp)}
    norms = [f"text_model.encoder.layers.{index}.layer_norm{part}" for index in range(layers) for part in (1, 2)]
    for index in range(layers):
        for name, shape in linears.items():
            manifest[f"text_model.encoder.layers.{index}.{name}.weight"] = shape
            manifest[f"text_model.encoder.layers.{index}.{name}.bias"] = shape[:1]
    for name in (*norms, "text_model.final_layer_norm"):
        manifest[f"{name}.weight"] = manifest[f"{name}.bias"] = (width,)
    return manifest


def flux_ae_manifest() -> Manifest:
    """Shape of every tensor of the Flux.1 picture autoencoder, which the hub repository also holds."""
    widths, weights = (128, 256, 512, 512), {}

    def conv(name, out, width, kernel=3):
        weights[name] = (out, width, kernel, kernel)

    def resnet(name, width, out):
        weights[f"{name}.norm1"], weights[f"{name}.norm2"] = (width,), (out,)
        conv(f"{name}.conv1", out, width)
        conv(f"{name}.conv2", out, out)
        if width != out:
            conv(f"{name}.nin_shortcut", out, width, 1)

    for side, (first, last, out) in {"encoder": (3, 512, 32), "decoder": (16, 128, 3)}.items():
        conv(f"{side}.conv_in", 128 if side == "encoder" else 512, first)
        for name in ("block_1", "block_2"):
            resnet(f"{side}.mid.{name}", 512, 512)
        weights[f"{side}.mid.attn_1.norm"] = (512,)
        for name in ("q", "k", "v", "proj_out"):
            conv(f"{side}.mid.attn_1.{name}", 512, 512, 1)
        weights[f"{side}.norm_out"] = (last,)
        conv(f"{side}.conv_out", out, last)
    for level, width in enumerate(widths):
        for block in range(2):
            resnet(f"encoder.down.{level}.block.{block}", widths[max(0, level - 1)] if block == 0 else width, width)
        for block in range(3):
            resnet(f"decoder.up.{level}.block.{block}", widths[min(3, level + 1)] if block == 0 else width, width)
        if level < 3:
            conv(f"encoder.down.{level}.downsample.conv", width, width)
        if level > 0:
            conv(f"decoder.up.{level}.upsample.conv", width, width)
    return {f"{name}.{kind}": shape if kind == "weight" else shape[:1] for name, shape in weights.items() for kind in ("weight", "bias")}


def file_name(module_name: str) -> str:
    """A transformer parameter's name in a file: `norm.query_norm.weight` -> `norm.query_norm.scale`."""
    return module_name[: -len("weight")] + "scale" if _NORM.fullmatch(module_name) and module_name.endswith("weight") else module_name


def module_name(file_name: str) -> str:
    """The inverse of file_name; a name that is the module's already stays."""
    return file_name[: -len("scale")] + "weight" if _NORM.fullmatch(file_name) and file_name.endswith("scale") else file_name


def unfuse(name: str, tensor: Tensor, config: TransformerConfig) -> list[tuple[str, Tensor]]:
    """One tensor of a fused, interleaved-rotary Flux file as tensors of the unfused, rotate-half layout.

    Exact: rows are moved, never computed. Within every head the rows of q and k (weights, biases and both
    norm scales) go from pairs (2j, 2j+1) to pairs (j, j + D/2); v, MLP and everything else stay views of
    what was given.

    Args:
        name: the file's key, without prefix.
        tensor: any device and dtype, meta included.

    Returns:
        (key, tensor) pairs under the unfused file names; the given pair where nothing is fused.
    """
    hidden, head_dim = config.hidden_size, config.head_dim
    if match := _ATTENTION.fullmatch(name):
        stem, kind = match.groups()
        q, k, v = tensor.split(hidden)
        parts = {"q_proj": _pairs_to_halves(q, head_dim), "k_proj": _pairs_to_halves(k, head_dim), "v_proj": v}
        return [(f"{stem}.{part}.{kind}", value) for part, value in parts.items()]
    if match := _LINEAR1.fullmatch(name):
        stem, kind = match.groups()
        q, k, v_mlp = tensor.split([hidden, hidden, tensor.shape[0] - 2 * hidden])
        parts = {"q_proj": _pairs_to_halves(q, head_dim), "k_proj": _pairs_to_halves(k, head_dim), "v_mlp": v_mlp}
        return [(f"{stem}.{part}.{kind}", value) for part, value in parts.items()]
    if _NORM.fullmatch(name):
        return [(name, _pairs_to_halves(tensor, head_dim))]
    return [(name, tensor)]


def _pairs_to_halves(rows: Tensor, head_dim: int) -> Tensor:
    """Reorder axis 0, head by head: 0, 2, 4, ..., then 1, 3, 5, ..."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def _fuse_shapes(manifest: Manifest) -> Manifest:
    fused: Manifest = {}
    for name, shape in manifest.items():
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
