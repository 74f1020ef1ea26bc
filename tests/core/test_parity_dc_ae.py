"""The Video DC-AE gives the reference's latents and pixels, whole and tiled, and whole runs of its transformer end at the reference's video."""

import json
from pathlib import Path

import numpy
import pytest
import torch
from safetensors import safe_open

from opensora_core.checkpoint.load import load_vae
from opensora_core.codecs import dc_ae
from opensora_core.codecs.tiling import tiled_decode, tiled_encode
from opensora_core.geometry import HIGH_COMPRESSION, Tiling
from opensora_core.pipeline import OpenSoraPipeline
from opensora_core.run.request import EncodedPrompt
from opensora_core.sampling.run import TextCondition

TOLERANCE = 1e-5  # fp32 rounding
GOLDEN = Path(__file__).resolve().parent.parent / "golden"
with safe_open(GOLDEN / "dc_ae.safetensors", "pt") as file:
    CASES = json.loads(file.metadata()["cases"])
ONE_LATENT_LEFT = "temporal_one"  # the reference loses three frames there


@pytest.fixture(scope="module")
def vae(golden_path):
    return load_vae(golden_path / "dc_ae_weights.safetensors", torch.float32)


@pytest.fixture(scope="module")
def recorded(golden):
    return golden("dc_ae")[0]


def tiling(case):
    return Tiling(case["tile_size"], 0.25, case["temporal_tile"])


def pixels(recorded, name):
    blocks = recorded[f"{name}.blocks"].repeat_interleave(8, -1).repeat_interleave(8, -2)
    return blocks.float() / 127.5 - 1


@pytest.mark.parametrize("name", CASES)
def test_encode(vae, recorded, relative_error, name):
    with torch.no_grad():
        found = tiled_encode(vae.encode, pixels(recorded, name), tiling(CASES[name]), grid=HIGH_COMPRESSION).values
    assert relative_error(found, recorded[f"{name}.encoded"]) < TOLERANCE


@pytest.mark.parametrize("name", [name for name in CASES if name != ONE_LATENT_LEFT])
def test_decode(vae, recorded, relative_error, name):
    case = CASES[name]
    with torch.no_grad():
        found = tiled_decode(vae.decode, recorded[f"{name}.latents"], tiling(case), grid=HIGH_COMPRESSION)
    assert list(found.shape) == case["decoded_shape"]
    stride = case["stride"]
    assert relative_error(found[..., ::stride, ::stride], recorded[f"{name}.decoded"]) < TOLERANCE
    assert abs(found.double().mean().item() - case["decoded_mean"]) < TOLERANCE


def test_a_single_latent_in_the_last_tile_loses_no_frame(vae, recorded, relative_error):
    """The reference gives 25 frames for 7 latents in tiles of 4: 24, and the last of the tile before. Here it gives all four of those."""
    name, case = ONE_LATENT_LEFT, CASES[ONE_LATENT_LEFT]
    with torch.no_grad():
        found = tiled_decode(vae.decode, recorded[f"{name}.latents"], tiling(case), grid=HIGH_COMPRESSION)
    expected, stride = recorded[f"{name}.decoded"], case["stride"]
    assert (found.shape[2], expected.shape[2]) == (28, 25)
    kept = found[..., ::stride, ::stride]
    assert relative_error(kept[:, :, :24], expected[:, :, :24]) < TOLERANCE
    assert relative_error(kept[:, :, 27], expected[:, :, 24]) < TOLERANCE


@pytest.mark.parametrize("name", ["spatial", "temporal", "both", "released_tiles"])
def test_goldens_see_the_tiles(vae, recorded, relative_error, name):
    """Attention sees a tile only: untiled, the same input gives something else, so a wrong tile plan would show."""
    with torch.no_grad():
        found = vae.encode(pixels(recorded, name)).values
    assert relative_error(found, recorded[f"{name}.encoded"]) > 0.01


def test_goldens_see_the_second_scale(vae, recorded, relative_error, monkeypatch):
    attend, calls = dc_ae.linear_attention, []

    def first_scale_only(qkv):
        calls.append(qkv)
        return attend(qkv if len(calls) % 2 else torch.zeros_like(qkv))

    monkeypatch.setattr(dc_ae, "linear_attention", first_scale_only)
    with torch.no_grad():
        found = vae.decode(recorded["whole.latents"])
    assert relative_error(found[..., ::3, ::3], recorded["whole.decoded"]) > 0.01


with safe_open(GOLDEN / "dc_ae_runs.safetensors", "pt") as file:
    RUNS = json.loads(file.metadata()["runs"])


@pytest.fixture(scope="module")
def pipeline(golden_path, tiny_checkpoint):
    weights = {"dit": golden_path / "dc_ae_transformer_weights.safetensors", "vae": golden_path / "dc_ae_weights.safetensors"}
    # The prompts come encoded, so that these two are never read.
    encoders = {"t5": tiny_checkpoint / "google" / "t5-v1_1-xxl", "clip": tiny_checkpoint / "openai" / "clip-vit-large-patch14"}
    return OpenSoraPipeline.from_files(**weights, **encoders, precision="fp32")


@pytest.mark.parametrize(("name", "offload"), [*((name, "everything") for name in RUNS), ("head", "minimal")])
def test_run(golden, pipeline, relative_error, name, offload):
    """Noise, pictures, 12 guided steps, restored frames, tiles: latents to fp32 rounding, pixels to whole levels; streamed too."""
    recorded, _ = golden("dc_ae_runs")
    cond_type, num_frames, (height, width) = RUNS[name]
    if offload != "everything":
        pipeline.enable_offload(offload, device="cpu")
    pictures = recorded["blocks"].repeat_interleave(8, 1).repeat_interleave(8, 2).numpy()
    prompt, negative = ({name: recorded[name][i : i + 1] for name in ("context", "y")} for i in range(2))
    given = {"t2v": {}, "i2v_head": {"image": pictures[0]}, "i2v_loop": {"image": pictures[0], "last_image": pictures[1]}}[cond_type]
    result = pipeline(
        EncodedPrompt("", TextCondition(prompt, negative)),
        height=height, width=width, num_frames=num_frames, num_inference_steps=12, seed=7, **given,
    )  # fmt: skip
    assert relative_error(result.latents, recorded[f"{name}.latents"]) < 1e-4
    expected = ((recorded[f"{name}.pixels"][0].permute(1, 2, 3, 0) + 1) * 127.5).clamp(0, 255).numpy()
    found = numpy.stack(result.frames[0])[:, ::5, ::5].astype(numpy.float64)
    assert found.shape == expected.shape and len(result.frames[0]) == num_frames
    assert abs(found - expected).max() < 0.51  # rounding to whole levels, nothing else
