"""A trial of real weights: one block of each kind of a transformer, or one frame through a VAE, and what came out.

Only the tensors that run are read, on the CPU: about 1 GB of the 24 GB transformer.
"""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..checkpoint.detect import Identity
from ..checkpoint.files import Header
from ..checkpoint.formats import LayerFormat
from ..checkpoint.load import converted, fill, load_vae
from ..checkpoint.quantised import QuantisedOperations
from ..networks.mmdit.model import MMDiT
from ..ops import TorchOperations

_GRID = 4  # patches along each side of the one latent frame
_TEXT_TOKENS = 8
_PIXELS = 64


class Trial(NamedTuple):
    """Whether every number was finite, and (label, text) lines about it."""

    finite: bool
    lines: list[tuple[str, str]]


def try_blocks(header: Header, identity: Identity, formats: Mapping[str, LayerFormat]) -> Trial:
    """Run the embedders, the first double block, the first single block and the final layer on noise.

    Args:
        identity: of a transformer file, with its config.
        formats: its quantised layers, by name; empty for a file of plain numbers.

    Raises:
        CheckpointError: a tensor is missing or cannot be read.
    """
    config = replace(identity.config, depth=min(1, identity.config.depth), depth_single_blocks=min(1, identity.config.depth_single_blocks))
    # Nothing here computes in fp16, whose range such a model's activations leave; its weights are exact in fp32.
    dtype = torch.float32 if header.compute_dtype is torch.float16 else header.compute_dtype
    started = time.perf_counter()
    model = MMDiT(config, QuantisedOperations if formats else TorchOperations, dtype=dtype, device="meta")
    layers = dict(model.named_modules())
    formats = {layer: layer_format for layer, layer_format in formats.items() if layer in layers}
    for layer, layer_format in formats.items():
        layers[layer].keep_in(layer_format.form)
    fill(model, header, converted(identity), "cpu", formats)
    side = _GRID * config.patch_size
    with torch.inference_mode():
        velocity = model(
            _noise((1, config.in_channels, 1, side, side), dtype, 0),
            torch.full((1,), 0.5, dtype=dtype),
            _noise((1, _TEXT_TOKENS, config.context_in_dim), dtype, 1),
            _noise((1, config.vec_in_dim), dtype, 2),
            cond=_noise((1, config.in_channels + 1, 1, side, side), dtype, 3) if config.cond_embed else None,
            guidance=torch.full((1,), 4.0, dtype=dtype) if config.guidance_embed else None,
        )
    what = f"{config.depth} double and {config.depth_single_blocks} single block, {_GRID**2} + {_TEXT_TOKENS} tokens"
    seconds = time.perf_counter() - started
    lines = [("run", f"{what}, {_short(dtype)} on cpu, {seconds:.1f} s: {_statistics(velocity)}"), *_about_weights(model, formats)]
    return Trial(bool(velocity.isfinite().all()), lines)


def try_vae(header: Header) -> Trial:
    """Encode and decode one frame of a smooth test picture, in fp32; errors as load_vae's."""
    started = time.perf_counter()
    vae = load_vae(header.path, dtype=torch.float32)
    ramp = torch.linspace(-0.8, 0.8, _PIXELS)
    across, down = torch.meshgrid(ramp, ramp, indexing="xy")
    picture = torch.stack((across, down, 0.8 * torch.sin(4 * (across + down))))[None, :, None]
    with torch.inference_mode():
        latents = vae.encode(picture).mode()
        again = vae.decode(latents)
    error = (again - picture).pow(2).mean().clamp_min(1e-12)
    psnr = 10 * torch.log10(4.0 / error).item()  # the picture's range is 2 wide
    seconds = time.perf_counter() - started
    lines = [
        ("run", f"one {_PIXELS}x{_PIXELS} frame, fp32 on cpu, {seconds:.1f} s: reconstructed at {psnr:.1f} dB"),
        ("latents", f"scaled by {vae.config.latents.scale:g}: {_statistics(vae.config.latents.to_model(latents))}"),
    ]
    return Trial(bool(latents.isfinite().all() and again.isfinite().all()), lines)


def _about_weights(model: MMDiT, formats: Mapping[str, LayerFormat]) -> list[tuple[str, str]]:
    layers = {"img_in": model.img_in, "cond_in": model.cond_in}
    if len(model.double_blocks):
        layers["key_norm"] = model.double_blocks[0].img_attn.norm.key_norm
    lines = [
        ("weights", f"{name}: {_statistics(layer.weight)}") for name, layer in layers.items() if layer is not None and name not in formats
    ]
    if model.cond_in is not None and not model.cond_in.weight.any():
        lines.append(("note", "cond_in is all zero: untrained start weights, image conditions have no effect"))
    return lines


def _noise(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _statistics(tensor: Tensor) -> str:
    values = tensor.float()
    finite = "finite" if values.isfinite().all() else "NOT FINITE"
    return f"{finite}, mean {values.mean():.4g}, std {values.std():.4g}, largest {values.abs().max():.4g}"


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, str(dtype).removeprefix("torch."))
