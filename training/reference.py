"""Loads an exported folder with the Open-Sora 2.0 reference's own code and compares its networks with ours, number by number.

    OPENSORA_REF=CHECKOUT PYTHONPATH=STAND_INS python -m training.reference DIRECTORY

Runs only where the reference does, as tests/golden/make_golden.py: STAND_INS holds `refenv`, which makes its GPU packages
importable on a CPU. Nothing of the reference is here: its classes are given the files, and what they say.
"""

import argparse
import sys
from pathlib import Path

import refenv  # stand-ins, outside this repository
import torch
from torch import Tensor

from opensora_core.checkpoint.load import load_transformer, load_vae
from opensora_core.evaluation import world
from opensora_core.model_files import ModelFiles
from opensora_core.text.encoders import load_clip, load_t5

LARGEST = 1e-3  # of an output's largest value; both compute in fp32 and differ in the order of sums
FP32 = torch.float32
PROMPTS = ["a red circle moving right on a blue background. 24 FPS. 4 motion score.", ""]


def transformers_agree(files: ModelFiles, generator: torch.Generator) -> float:
    """Largest difference of one forward of the transformer, relative."""
    from opensora.models.mmdit.model import Flux
    from opensora.utils.sampling import pack, unpack

    ours = load_transformer(files.dit, FP32)
    config = ours.config
    theirs = Flux(
        cache_dir=None,
        from_pretrained=str(files.dit),
        device_map="cpu",
        torch_dtype=FP32,
        strict_load=True,
        in_channels=config.packed_channels,
        vec_in_dim=config.vec_in_dim,
        context_in_dim=config.context_in_dim,
        hidden_size=config.hidden_size,
        mlp_ratio=config.mlp_hidden_size / config.hidden_size,
        num_heads=config.num_heads,
        depth=config.depth,
        depth_single_blocks=config.depth_single_blocks,
        axes_dim=list(config.axes_dim),
        theta=10000,
        qkv_bias=True,
        guidance_embed=config.guidance_embed,
        cond_embed=config.cond_embed,
        fused_qkv=False,
        use_liger_rope=True,
        patch_size=config.patch_size,
    )
    x = torch.randn(2, config.in_channels, 5, 8, 8, generator=generator)
    cond = torch.randn(2, config.in_channels + 1, 5, 8, 8, generator=generator)
    context = torch.randn(2, 32, config.context_in_dim, generator=generator)
    y = torch.randn(2, config.vec_in_dim, generator=generator)
    sigma = torch.tensor([0.9, 0.2])
    axes = (torch.arange(length, dtype=FP32) for length in (5, 4, 4))
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(1, -1, 3).repeat(2, 1, 1)
    found = theirs(
        img=pack(x), img_ids=places, txt=context, txt_ids=torch.zeros(2, 32, 3), timesteps=sigma, y_vec=y, cond=pack(cond), guidance=None
    )
    return _difference(ours(x, sigma, context, y, cond), unpack(found, 64, 64, 5))


def vaes_agree(files: ModelFiles) -> tuple[float, float]:
    """Largest differences of (the moments, the frames) of a clip of the world, relative."""
    from opensora.models.hunyuan_vae.autoencoder_kl_causal_3d import CausalVAE3D_HUNYUAN

    ours = load_vae(files.vae, FP32)
    config = ours.config
    theirs = CausalVAE3D_HUNYUAN(
        from_pretrained=str(files.vae),
        device_map="cpu",
        torch_dtype=FP32,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_groups,
        latent_channels=config.latent_channels,
    )
    theirs.enable_spatial_tiling(False)
    theirs.enable_temporal_tiling(False)
    scene = world.Scene(world.combinations()[0], 4, 11.0, (32.0, 32.0), "")
    pixels = scene.render().permute(3, 0, 1, 2)[None] * 2 - 1
    moments = ours.encode_moments(pixels)
    latents = moments[:, : config.latent_channels]
    _, posterior = theirs.encode(pixels, sample_posterior=False, return_posterior=True)
    # The reference's decode takes latents as the transformer knows them.
    decoded = theirs.decode(latents * theirs.scale_factor)
    return _difference(moments, posterior.parameters), _difference(ours.decode(latents), decoded)


def texts_agree(files: ModelFiles) -> tuple[float, float]:
    """Largest differences of (T5's states, CLIP's pooled vector), relative, through the reference's own embedder."""
    from opensora.models.text.conditioner import HFEmbedder

    t5 = HFEmbedder(str(files.t5), max_length=32, shardformer=False, torch_dtype=FP32)
    clip = HFEmbedder(str(files.clip), max_length=77, shardformer=False, torch_dtype=FP32)
    ours = load_t5(files.t5, FP32, "cpu"), load_clip(files.clip, FP32, "cpu")
    return _difference(ours[0].encode(PROMPTS), t5(PROMPTS)), _difference(ours[1].encode(PROMPTS), clip(PROMPTS))


def _difference(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        raise ValueError(f"{list(found.shape)} against {list(expected.shape)}")
    return ((found - expected).abs().max() / expected.abs().max()).item()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    files = ModelFiles.in_folder(parser.parse_args().directory)
    refenv.activate()
    with torch.no_grad():
        found = {"transformer": transformers_agree(files, torch.Generator().manual_seed(0))}
        found["VAE, encode"], found["VAE, decode"] = vaes_agree(files)
        found["T5"], found["CLIP"] = texts_agree(files)
    for name, difference in found.items():
        print(f"{name:12} differs by {difference:.1e} of its largest value")
    return 0 if max(found.values()) < LARGEST else 1


if __name__ == "__main__":
    sys.exit(main())
