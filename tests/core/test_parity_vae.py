"""The VAE gives the reference's moments and pixels: whole, tiled in space, in time, in both, and at the released tile size."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from opensora_core.checkpoint.load import load_vae
from opensora_core.codecs.codec import Encoded
from opensora_core.codecs.hunyuan.config import LATENT_SCALE
from opensora_core.codecs.tiling import tiled_decode, tiled_encode
from opensora_core.geometry import Tiling

TOLERANCE = 1e-5  # fp32 rounding
with safe_open(Path(__file__).resolve().parent.parent / "golden" / "vae.safetensors", "pt") as file:
    CASES = json.loads(file.metadata()["cases"])


@pytest.fixture(scope="module")
def vae(golden_path):
    return load_vae(golden_path / "vae_weights.safetensors", torch.float32)


@pytest.fixture(scope="module")
def recorded(golden):
    return golden("vae")[0]


def tiling(case):
    return Tiling(case["tile_size"] if case["spatial"] else 0, 0.25, case["temporal_tile"] if case["temporal"] else 0)


def pixels(recorded, name):
    blocks = recorded[f"{name}.blocks"].repeat_interleave(8, -1).repeat_interleave(8, -2)
    return blocks.float() / 127.5 - 1


@pytest.mark.parametrize("name", CASES)
def test_encode(vae, recorded, relative_error, name):
    with torch.no_grad():
        found = tiled_encode(vae.encode, pixels(recorded, name), tiling(CASES[name])).values
    assert relative_error(found, recorded[f"{name}.moments"]) < TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_decode(vae, recorded, relative_error, name):
    case = CASES[name]
    with torch.no_grad():
        found = tiled_decode(vae.decode, recorded[f"{name}.latents"] / LATENT_SCALE, tiling(case))
    assert list(found.shape) == case["decoded_shape"]
    stride = case["stride"]
    assert relative_error(found[..., ::stride, ::stride], recorded[f"{name}.decoded"]) < TOLERANCE
    assert abs(found.double().mean().item() - case["decoded_mean"]) < TOLERANCE


@pytest.mark.parametrize("name", ["spatial", "temporal", "both", "released_tiles"])
def test_goldens_see_the_tiles(vae, recorded, relative_error, name):
    """Tiles have their own statistics: untiled, the same input gives something else, so a wrong tile plan would show."""
    with torch.no_grad():
        found = vae.encode(pixels(recorded, name)).values
    assert relative_error(found, recorded[f"{name}.moments"]) > 0.01


def _attention_to_every_frame(q, k, v):
    flat = (x.flatten(1, 2).unsqueeze(1) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*flat).reshape(q.shape)


def test_goldens_see_the_causal_mask(vae, recorded, relative_error, monkeypatch):
    monkeypatch.setattr("opensora_core.codecs.hunyuan.layers.frame_causal_attention", _attention_to_every_frame)
    with torch.no_grad():
        found = vae.decode(recorded["whole.latents"] / LATENT_SCALE)
    assert relative_error(found, recorded["whole.decoded"]) > 0.01


def test_posterior(recorded, relative_error):
    mean, logvar = Encoded(recorded["posterior.moments"]).moments()
    assert torch.equal(mean, recorded["posterior.mean"])
    assert torch.equal(logvar, recorded["posterior.logvar"])  # clamped to -30..20
    assert torch.equal(Encoded(recorded["posterior.moments"]).mode(), mean)
    sample = Encoded(recorded["posterior.moments"]).sample(torch.Generator().manual_seed(5))
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(5))
    assert torch.equal(sample, mean + torch.exp(0.5 * logvar) * noise)
    # The last bit of an exponential, and of normal noise, is the processor's: the recorded ones are another's.
    torch.testing.assert_close(sample, recorded["posterior.sample"], rtol=1e-6, atol=1e-6)
