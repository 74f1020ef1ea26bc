"""The pipeline, from two pictures and encoded prompts to pixels, ends at the reference's video."""

import numpy
import pytest
import torch

from opensora_core.pipeline import OpenSoraPipeline
from opensora_core.run.request import EncodedPrompt, SamplingOptions
from opensora_core.sampling.run import TextCondition


@pytest.fixture(scope="module")
def pipeline(golden_path, tiny_checkpoint):
    weights = {"dit": golden_path / "transformer_weights.safetensors", "vae": golden_path / "vae_weights.safetensors"}
    # The prompts come encoded, so that these two are never read.
    encoders = {"t5": tiny_checkpoint / "google" / "t5-v1_1-xxl", "clip": tiny_checkpoint / "openai" / "clip-vit-large-patch14"}
    return OpenSoraPipeline.from_files(**weights, **encoders, precision="fp32")


def test_first_and_last_picture_to_video(golden, pipeline):
    """Fit, encode with a sampled posterior, noise, 12 guided steps, restored frames, decode: every pixel, to its rounding."""
    recorded, _ = golden("generate")
    pictures = recorded["blocks"].repeat_interleave(8, 1).repeat_interleave(8, 2).numpy()
    prompt, negative = ({name: recorded[name][i : i + 1] for name in ("context", "y")} for i in range(2))
    result = pipeline(
        EncodedPrompt("", TextCondition(prompt, negative)),
        height=48, width=80, num_frames=9, num_inference_steps=12, image=pictures[0], last_image=pictures[1], seed=7,
        options=SamplingOptions(posterior="sample"),
    )  # fmt: skip
    expected = ((recorded["pixels"][0].permute(1, 2, 3, 0) + 1) * 127.5).clamp(0, 255).numpy()
    found = numpy.stack(result.frames[0])[:, ::3, ::3].astype(numpy.float64)
    assert found.shape == expected.shape == (9, 16, 27, 3)
    assert abs(found - expected).max() < 0.51  # rounding to whole levels, nothing else


def test_a_clip_extended_backwards(golden, pipeline):
    """v2v_tail: the clip's frames fitted, encoded as one and sampled, no ramp, nothing put back, decoded: every pixel, to its rounding."""
    recorded, _ = golden("generate_clip")
    clip = recorded["blocks"].repeat_interleave(8, 1).repeat_interleave(8, 2)
    prompt, negative = ({name: recorded[name][i : i + 1] for name in ("context", "y")} for i in range(2))
    result = pipeline(
        EncodedPrompt("", TextCondition(prompt, negative)),
        height=32, width=32, num_frames=37, num_inference_steps=12, video=clip, direction="backwards", seed=7,
        options=SamplingOptions(posterior="sample"),
    )  # fmt: skip
    expected = ((recorded["pixels"][0].permute(1, 2, 3, 0) + 1) * 127.5).clamp(0, 255).numpy()
    found = numpy.stack(result.frames[0])[:, ::3, ::3].astype(numpy.float64)
    assert found.shape == expected.shape == (37, 11, 11, 3)
    assert abs(found - expected).max() < 0.51


@pytest.mark.parametrize("name", ["generate", "generate_clip"])
def test_noise_of_the_run_is_the_recorded_one(golden, name):
    recorded, _ = golden(name)
    generator = torch.Generator().manual_seed(7)
    assert torch.equal(torch.randn(recorded["noise"].shape, generator=generator), recorded["noise"])
