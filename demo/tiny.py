"""Writes a complete small Open-Sora 2.0 with random weights, in the released files' formats and proportions.

    python -m demo.tiny DIRECTORY [--seed N]

The folder is laid out as the hub repository (`--model DIRECTORY`) and holds single-file text encoders as well, as people
have them for ComfyUI. About 20 MB, a second or two, no network. It shows moving patterns, not pictures of the prompt.
"""

import argparse
import math
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from opensora_core.codecs.hunyuan.config import LATENT_SCALE, VAEConfig
from opensora_core.codecs.hunyuan.model import CausalVAE
from opensora_core.encoders.clip import CLIPSizes, clip_manifest
from opensora_core.encoders.t5 import T5Sizes, t5_manifest
from opensora_core.families import table
from opensora_core.networks.mmdit.config import OPEN_SORA_2, TransformerConfig
from opensora_core.shapes import Manifest
from opensora_core.text.prompt import T5_LENGTH
from training.text import clip_config, t5_config
from training.tokenizers import CLIP_FOLDER, T5_FOLDER, T5Recipe, write_clip, write_json, write_t5

TRANSFORMER = TransformerConfig(
    **{
        **OPEN_SORA_2.__dict__,
        "hidden_size": 96,
        "num_heads": 3,
        "mlp_hidden_size": 384,
        "depth": 2,
        "depth_single_blocks": 3,
        "context_in_dim": 64,
        "vec_in_dim": 64,
    }
)
VAE = VAEConfig(latent_channels=16, widths=(16, 32, 32, 32), layers=2)

T5_SIZES = {"d_model": 64, "d_kv": 64, "num_heads": 2, "d_ff": 128, "num_layers": 2}
CLIP_SIZES = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 1, "num_hidden_layers": 2}
# ComfyUI fixes the sizes of these two encoders; as `model_options` of its load_clip this makes it read the small files.
# (It rebuilds CLIP-L's from "model_config" when it looks for long-text ones.)
HOST_OPTIONS = {"t5xxl_model_config": T5_SIZES, "clip_l_model_config": CLIP_SIZES, "model_config": CLIP_SIZES}

# What the tokenizers are made of. Any text can be read: T5 has an unknown piece, CLIP all bytes.
_SENTENCES = (
    "raining, sea. 24 FPS. 4 motion score.",
    "A red circle moves to the left on a blue background, slowly at first and then faster.",
    "Two yellow birds fly over the green hills while the sun sets behind the mountains.",
    "the quick brown fox jumps over the lazy dog",
    "THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG",
    "0 1 2 3 4 5 6 7 8 9 ! ? . , ; : ( ) [ ] { } / \\ + - * = _ & % $ # @ ' \" < > |",
)


def write(directory: str | Path, seed: int = 0) -> Path:
    """Write the small checkpoint and return its folder. The same seed gives the same files."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    _save(directory / "Open_Sora_v2.safetensors", transformer_weights(generator))
    _save(directory / "hunyuan_vae.safetensors", vae_weights(generator))
    _write_t5(directory, t5_weights(generator))
    _write_clip(directory, clip_weights(generator))
    return directory


def transformer_weights(generator: torch.Generator, config: TransformerConfig = TRANSFORMER) -> dict[str, Tensor]:
    """fp32, under the released names."""
    weights = random_weights(table.manifest(config), generator)
    weights["final_layer.linear.weight"] *= 0.5
    return weights


def vae_weights(generator: torch.Generator, config: VAEConfig = VAE) -> dict[str, Tensor]:
    """fp32. Scaled so that noise decodes to clearly visible contrast and pictures encode to latents of the usual spread."""
    weights = random_weights(table.manifest(config), generator, gain=1.4)
    with torch.device("meta"):
        vae = CausalVAE(config)
    vae.load_state_dict(weights, assign=True)
    with torch.no_grad():
        latents = torch.randn(1, config.latent_channels, 2, 8, 12, generator=generator) / LATENT_SCALE
        _standardise(vae.decode(latents), weights, "decoder.conv_out.conv", 0.5)
        frames = vae.decode(latents).clamp(-1, 1)
        _standardise(vae.encode(frames).mode(), weights, "quant_conv", 1 / LATENT_SCALE)
    # Log variances: a posterior that is narrow, as a trained one is.
    weights["quant_conv.weight"][config.latent_channels :] = 0
    weights["quant_conv.bias"][config.latent_channels :] = -10
    return weights


def t5_weights(generator: torch.Generator) -> dict[str, Tensor]:
    """fp32. The vocabulary is the released one's, so that official tokenizers fit."""
    manifest = t5_manifest(T5Sizes(d_model=64, d_ff=128, num_layers=2, num_heads=2, d_kv=64))
    parts = ("shared", "final", ".q.", ".k.", ".v.", ".o.", "layer.0.layer_norm", "layer.1.layer_norm", "wi_0", "wi_1", ".wo.", "relative")
    return random_weights(_in_order(manifest, parts, late=("relative",)), generator)


def clip_weights(generator: torch.Generator) -> dict[str, Tensor]:
    """fp32, with the two tensors that CLIP-L files hold besides the text model."""
    manifest = clip_manifest(CLIPSizes(hidden_size=64, num_hidden_layers=2, intermediate_size=256))
    parts = ("token", "position", "q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "norm1", "norm2", "final")
    weights = random_weights(_in_order(manifest, parts, late=("norm", "final")), generator)
    return weights | {"text_projection.weight": torch.eye(64), "logit_scale": torch.tensor(4.6055)}


def _in_order(manifest: Manifest, parts: tuple[str, ...], late: tuple[str, ...]) -> Manifest:
    """A manifest in an order of our own, block by block, so that the same numbers are drawn with any version of transformers."""

    def place(name: str) -> tuple[int, int, int]:
        block = re.search(r"\.(\d+)\.", name)
        return sum(word in name for word in late), int(block[1]) if block else -1, [part in name for part in parts].index(True)

    return {name: manifest[name] for name in sorted(manifest, key=place)}


def random_weights(manifest: Manifest, generator: torch.Generator, gain: float = 1.0) -> dict[str, Tensor]:
    """Variance-preserving weights, norms near one, small biases, tables of unit spread."""
    weights = {}
    for name, shape in manifest.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            is_gain = name.endswith(".scale") or ("norm" in name and name.endswith(".weight"))
            weights[name] = 1 + 0.05 * noise if is_gain else 0.02 * noise
        elif "embedding" in name or name == "shared.weight" or "relative_attention_bias" in name:
            weights[name] = noise
        else:
            if len(shape) == 5:
                # Mostly blurs, so that shapes are broad and move from frame to frame instead of flickering.
                noise = noise.mean(dim=(2, 3, 4), keepdim=True) * 0.8 * math.prod(shape[2:]) ** 0.5 + noise * 0.6
            weights[name] = noise * gain / math.sqrt(math.prod(shape[1:]))
    for name in weights:
        # T5 does not scale its dot products; what it learns are small queries.
        if name.endswith("SelfAttention.q.weight"):
            weights[name] /= 8
    return weights


def _standardise(output: Tensor, weights: dict[str, Tensor], layer: str, spread: float) -> None:
    """Rescale the layer that gave `output` [B, C, ...] so that its first C channels have mean zero and the given spread."""
    channels = output.shape[1]
    mean, factor = output.mean(dim=(0, 2, 3, 4)), spread / output.std(dim=(0, 2, 3, 4))
    weights[f"{layer}.weight"][:channels] *= factor[:, None, None, None, None]
    weights[f"{layer}.bias"][:channels] = (weights[f"{layer}.bias"][:channels] - mean) * factor


def _write_t5(directory: Path, weights: dict[str, Tensor]) -> None:
    folder = directory / T5_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    _save(directory / "t5xxl.safetensors", weights, torch.float16)
    shards: dict[str, dict[str, Tensor]] = {"pytorch_model-00001-of-00002.bin": {}, "pytorch_model-00002-of-00002.bin": {}}
    for name, tensor in weights.items():
        shard = "pytorch_model-00001-of-00002.bin" if name.startswith(("shared", "encoder.block.0")) else "pytorch_model-00002-of-00002.bin"
        shards[shard][name] = tensor.half()
    for file, tensors in shards.items():
        torch.save(tensors, folder / file)
    write_json(
        folder / "pytorch_model.bin.index.json",
        {
            "metadata": {"total_size": sum(tensor.numel() * 2 for tensor in weights.values())},
            "weight_map": {name: file for file, tensors in shards.items() for name in tensors},
        },
    )
    write_json(folder / "config.json", t5_config(T5_SIZES, 32128))
    write_t5(folder, list(_SENTENCES), T5Recipe(T5_LENGTH, sentinels=100, capitals=False))


def _write_clip(directory: Path, weights: dict[str, Tensor]) -> None:
    folder = directory / CLIP_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    _save(folder / "model.safetensors", weights, torch.float16)
    single = directory / "clip_l.safetensors"
    single.unlink(missing_ok=True)
    try:
        os.link(folder / "model.safetensors", single)  # the same bytes; half the space
    except OSError:
        shutil.copyfile(folder / "model.safetensors", single)
    # The released configuration's ids are wrong in the same way: a reader must not rely on them.
    wrong_ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    write_json(folder / "config.json", clip_config(CLIP_SIZES, 49408, wrong_ids))
    write_clip(folder, list(_SENTENCES), start=49406)  # the released ids


def _save(path: Path, weights: dict[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> None:
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in weights.items()}, path, metadata={"format": "pt"})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(write(arguments.directory, arguments.seed))
