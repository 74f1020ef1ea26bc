"""The small model's files in the reference's own loading and forward, beside ours.

    OPENSORA_REF=<checkout of hpcaitech/Open-Sora>  PYTHONPATH=<CPU stand-ins, holding refenv.py>  python -m benchmarks.reference_small [--model DIR]

Every part is read by the reference's classes, strictly, in fp32 on the CPU; prompt ids, text features, one velocity with a
picture given, an encoded and a decoded clip are compared. Needs what tests/golden/make_golden.py needs.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from opensora_core.checkpoint.load import load_transformer, load_vae
from opensora_core.codecs.hunyuan.config import LATENT_SCALE
from opensora_core.encoders.clip import load_clip
from opensora_core.encoders.t5 import load_t5
from opensora_core.evaluation import world
from opensora_core.run.files import SMALL, ModelFiles
from opensora_core.text.prompt import decorate

TOLERANCE = 2e-4  # largest difference, relative to the largest value
PROMPTS = ["a red circle moving right on a blue background", "on a gray background, a purple triangle is moving upwards"]
FRAMES, SIDE = 5, 8  # of a clip's latents


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()).item()


def text(files: ModelFiles) -> tuple[dict[str, float], Tensor, Tensor]:
    """Differences of both encoders; and our features, which the transformers then read."""
    from opensora.models.text.conditioner import HFEmbedder

    texts = [decorate(prompt, world.FPS, 4) for prompt in PROMPTS]
    differences, features = {}, []
    for name, load, path in (("T5", load_t5, files.t5), ("CLIP", load_clip, files.clip)):
        ours = load(path, torch.float32, "cpu")
        ids = ours.tokenize(texts)
        theirs = HFEmbedder(str(path), max_length=ids.shape[1], torch_dtype=torch.float32)
        their_ids = theirs.tokenizer(texts, truncation=True, max_length=ids.shape[1], padding="max_length", return_tensors="pt").input_ids
        differences[f"{name}: token ids that differ"] = float((ids != their_ids).sum())
        features.append(ours.encode(texts))
        differences[f"{name}: features"] = relative(features[-1], theirs(texts))
    return differences, *features


def transformer(files: ModelFiles, context: Tensor, y: Tensor) -> dict[str, float]:
    from opensora.models.mmdit.model import Flux
    from opensora.utils.sampling import pack, unpack

    ours = load_transformer(files.dit, torch.float32, "cpu")
    config = ours.config
    theirs = Flux(
        from_pretrained=str(files.dit), device_map="cpu", torch_dtype=torch.float32, strict_load=True, cache_dir=None,
        in_channels=config.packed_channels, vec_in_dim=config.vec_in_dim, context_in_dim=config.context_in_dim, hidden_size=config.hidden_size,
        mlp_ratio=config.mlp_hidden_size / config.hidden_size, num_heads=config.num_heads, depth=config.depth,
        depth_single_blocks=config.depth_single_blocks, axes_dim=list(config.axes_dim), theta=10000, qkv_bias=True, guidance_embed=False,
        cond_embed=True, fused_qkv=False, use_liger_rope=True, patch_size=2,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(y), config.in_channels, FRAMES, SIDE, SIDE, generator=generator)
    timestep = torch.tensor([0.9, 0.3])
    mask = torch.zeros(len(y), 1, FRAMES, SIDE, SIDE)
    mask[:, :, 0] = 1
    cond = torch.cat((mask, mask * torch.randn(x.shape, generator=generator)), 1)
    grid = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in (FRAMES, SIDE // 2, SIDE // 2)), indexing="ij")
    their_output = theirs(
        img=pack(x), img_ids=torch.stack(grid, -1).reshape(1, -1, 3).repeat(len(y), 1, 1), txt=context,
        txt_ids=torch.zeros(len(y), context.shape[1], 3), timesteps=timestep, y_vec=y, cond=pack(cond), guidance=None,
    )  # fmt: skip
    return {"transformer: velocity": relative(ours(x, timestep, context, y, cond), unpack(their_output, 8 * SIDE, 8 * SIDE, FRAMES))}


def vae(files: ModelFiles) -> dict[str, float]:
    from opensora.models.hunyuan_vae.autoencoder_kl_causal_3d import CausalVAE3D_HUNYUAN

    ours = load_vae(files.vae, torch.float32, "cpu")
    config = ours.config
    theirs = CausalVAE3D_HUNYUAN(
        from_pretrained=str(files.vae), device_map="cpu", torch_dtype=torch.float32, in_channels=3, out_channels=3,
        latent_channels=config.latent_channels, block_out_channels=list(config.widths), layers_per_block=config.layers,
        norm_num_groups=config.norm_groups, use_spatial_tiling=False, use_temporal_tiling=False,
    )  # fmt: skip
    combination = world.split()[1][0]
    clip = world.Scene(combination, 4, 11.0, (world.SIZE / 2, world.SIZE / 2), "").render().movedim(-1, 0)[None] * 2 - 1
    encoded = ours.encode(clip)
    _, posterior = theirs.encode(clip, sample_posterior=False, return_posterior=True)
    latents = encoded.mode()
    decoded = theirs.decode(latents * LATENT_SCALE)
    return {
        "VAE: moments of a clip": relative(encoded.values, posterior.parameters),
        "VAE: decoded clip": relative(ours.decode(latents), decoded),
    }


@torch.no_grad()
def main() -> int:
    import refenv  # the stand-ins, outside this repository

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=SMALL)
    files = ModelFiles.in_folder(parser.parse_args().model)
    refenv.activate()
    torch.set_num_threads(1)
    differences, context, y = text(files)
    differences |= transformer(files, context, y) | vae(files)
    print(f"reference {refenv.reference_commit()}, largest difference relative to the largest value")
    for name, value in differences.items():
        print(f"{name:32} {value:.2e}{'' if value <= TOLERANCE else '   MORE THAN ' + str(TOLERANCE)}")
    return int(max(differences.values()) > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
