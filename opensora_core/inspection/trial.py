"""A trial of real weights: one block of each kind of a transformer, or one frame through a VAE, and what came out.

Only the tensors that run are read, on the CPU: about 1 GB of the 24 GB transformer.
"""

import time
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..checkpoint.detect import Identity
from ..checkpoint.files import Header
from ..checkpoint.formats import LayerFormat
from ..checkpoint.load import fill, load_vae
from ..checkpoint.quantised import QuantisedOperations
from ..choices import dtype_word
from ..family import Network
from ..ops import TorchOperations

_GRID = 4  # patches along each side of the one latent frame
_TEXT_TOKENS = 8
_PIXELS = 64


class Trial(NamedTuple):
    """Whether every number was finite, and (label, text) lines about it."""

    finite: bool
    lines: list[tuple[str, str]]


def try_blocks(header: Header, identity: Identity, formats: Mapping[str, LayerFormat]) -> Trial:
    """Run a network of its first block of each kind on noise.

    identity: of a transformer file, with its config. formats: its quantised layers, by name; empty for a file of plain numbers.
    """
    config = identity.config.with_blocks(1)
    # Nothing here computes in fp16, whose range such a model's activations leave; its weights are exact in fp32.
    dtype = torch.float32 if header.compute_dtype is torch.float16 else header.compute_dtype
    started = time.perf_counter()
    model = identity.row.build(config, QuantisedOperations if formats else TorchOperations, dtype=dtype, device="meta")
    layers = dict(model.named_modules())
    formats = {layer: layer_format for layer, layer_format in formats.items() if layer in layers}
    for layer, layer_format in formats.items():
        layers[layer].keep_in(layer_format.form)
    fill(model, header, identity.convert, "cpu", formats)
    side = _GRID * config.patch_size
    inputs = identity.family.example(config, (1, config.in_channels, 1, side, side), _TEXT_TOKENS, dtype, "cpu")
    for seed, tensor in enumerate(tensor for tensor in inputs.values() if tensor.ndim > 1):
        tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)))
    with torch.inference_mode():
        velocity = model(**inputs)
    what = f"{config.words()}, {_GRID**2} + {_TEXT_TOKENS} tokens"
    seconds = time.perf_counter() - started
    lines = [("run", f"{what}, {dtype_word(dtype)} on cpu, {seconds:.1f} s: {_statistics(velocity)}"), *_about_weights(model, formats)]
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
        ("latents", f"{vae.config.latents.words()}: {_statistics(vae.config.latents.to_model(latents))}"),
    ]
    return Trial(bool(latents.isfinite().all() and again.isfinite().all()), lines)


def _about_weights(model: Network, formats: Mapping[str, LayerFormat]) -> list[tuple[str, str]]:
    """What the weights of the layers outside the blocks, which read the inputs, look like."""
    plain = {name: layer.weight for name, layer in model.named_children() if hasattr(layer, "weight") and name not in formats}
    notes = [("note", f"{name} is all zero: start weights, what it reads has no effect") for name in plain if not plain[name].any()]
    return [*(("weights", f"{name}: {_statistics(weight)}") for name, weight in plain.items()), *notes]


def _statistics(tensor: Tensor) -> str:
    values = tensor.float()
    finite = "finite" if values.isfinite().all() else "NOT FINITE"
    return f"{finite}, mean {values.mean():.4g}, std {values.std():.4g}, largest {values.abs().max():.4g}"
