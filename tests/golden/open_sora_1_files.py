"""Small Open-Sora 1.0 to 1.3, as their guides lay the files: the networks of the goldens, with a T5 of their width."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from demo.tiny import random_weights
from opensora_core.codecs.picture import OLD_DIFFUSERS, PUBLISHED
from opensora_core.codecs.temporal import TemporalConfig
from opensora_core.encoders.t5 import T5Sizes, t5_manifest
from opensora_core.shapes import AS_RELEASED
from tests.golden import open_sora_1_cases as cases
from training.tokenizers import T5Recipe, write_t5

HERE = Path(__file__).resolve().parent
WIDTH = 16  # of the text that the networks read
LENGTHS = {"1.0": 120, "1.1": 200, "1.2": 300, "1.3": 300}
REPOSITORIES = {
    "1.0": ("OpenSora-v1-HQ-16x512x512.pth", "sd-vae-ft-ema"),
    "1.1": ("OpenSora-STDiT-v2-stage3", "sd-vae-ft-ema"),
    "1.2": ("OpenSora-STDiT-v3", "OpenSora-VAE-v1.2"),
    "1.3": ("OpenSora-STDiT-v4", "OpenSora-VAE-v1.3"),
}


def info():
    with safe_open(HERE / "open_sora_1.safetensors", "pt") as file:
        return json.loads(file.metadata()["info"])


def weights(version, part="shapes", is_golden=False):
    """part: "shapes" (the transformer), "vae_shapes" or "kl_shapes", of which the version 1.2 has one."""
    shapes = info()[version][part]
    if part == "shapes" and not is_golden:  # as many tokens as the released ones read
        shapes["y_embedder.y_embedding"] = [LENGTHS[version], WIDTH]
    return {
        name: tensor.contiguous() for name, tensor in cases.random_weights({name: tuple(shape) for name, shape in shapes.items()}).items()
    }


def t5_weights():
    """A T5 of the networks' width, of the released vocabulary."""
    sizes = T5Sizes(d_model=WIDTH, d_ff=48, num_layers=2, num_heads=2, d_kv=16)
    return {name: tensor.contiguous() for name, tensor in random_weights(t5_manifest(sizes), torch.Generator().manual_seed(0)).items()}


def write(folder, version, is_golden=False):
    """A folder of the version's repositories. is_golden: the transformer reads as few tokens as the recorded one."""
    folder, (dit, vae) = Path(folder), REPOSITORIES[version]
    for name in (vae, "t5-v1_1-xxl"):
        (folder / name).mkdir(parents=True)
    if dit.endswith(".pth"):
        torch.save(weights(version, is_golden=is_golden), folder / dit)
    else:
        (folder / dit).mkdir()
        save_file(weights(version, is_golden=is_golden), folder / dit / "model.safetensors")
    codec = weights(version, "vae_shapes") if version in ("1.2", "1.3") else weights("1.2", "kl_shapes")
    save_file(codec, folder / vae / ("diffusion_pytorch_model.safetensors" if version in ("1.0", "1.1") else "model.safetensors"))
    save_file(t5_weights(), folder / "t5-v1_1-xxl" / "model.safetensors")
    write_t5(folder / "t5-v1_1-xxl", ["a red kite over the sea, raining"], T5Recipe(512, sentinels=100, capitals=False))
    return folder


def write_halves(folder, naming="diffusers"):
    """1.2's VAE in two files, temporal.safetensors and sdxl-vae/. naming: of the picture VAE's keys, "diffusers", "old" or "published"."""
    whole, spatial = weights("1.2", "vae_shapes"), "spatial_vae.module."
    config = TemporalConfig.of({name: tuple(tensor.shape) for name, tensor in whole.items()}).spatial
    layout = {"diffusers": AS_RELEASED, "old": OLD_DIFFUSERS, "published": PUBLISHED}[naming]
    ours = {name.removeprefix(spatial): tensor for name, tensor in whole.items() if name.startswith(spatial)}
    theirs = {}
    for name, shape in layout.manifest({name: tuple(tensor.shape) for name, tensor in ours.items()}).items():
        theirs[name] = ours[layout.convert(name, torch.empty(shape, device="meta"), config)[0][0]].reshape(shape)
    temporal = {name.removeprefix("temporal_vae."): tensor for name, tensor in whole.items() if name.startswith("temporal_vae.")}
    (Path(folder) / "sdxl-vae").mkdir(parents=True)
    save_file(theirs, Path(folder) / "sdxl-vae" / "diffusion_pytorch_model.safetensors")
    save_file(temporal, Path(folder) / "temporal.safetensors")
    return Path(folder)
