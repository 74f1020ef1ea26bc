"""What a script may hand in or take out: noise, posterior noise, latents, and a VAE without a pipeline."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

import opensora_core
from opensora_core.cli import main
from opensora_core.codecs.picture import FLUX_AE, SCALE, SHIFT, PictureVAE
from opensora_core.errors import CheckpointError, OpenSoraError
from opensora_core.media.latent_file import read_latents
from opensora_core.pipeline import OpenSoraPipeline
from opensora_core.sampling.solvers import noise

SETTINGS = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 1}
SHAPE = (1, 16, 2, 4, 4)


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint):
    return OpenSoraPipeline.from_pretrained(tiny_checkpoint)


def test_the_seeds_own_noise_handed_in_is_the_seeds_run(pipe):
    usual = pipe("a", seed=3, latents_only=True, **SETTINGS)
    handed = pipe("a", seed=9, noise=noise(SHAPE, 3, torch.device("cpu"), torch.float32), latents_only=True, **SETTINGS)
    assert torch.equal(usual.latents, handed.latents)
    other = pipe("a", seed=3, noise=torch.randn(SHAPE), latents_only=True, **SETTINGS)
    assert not torch.equal(usual.latents, other.latents)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (torch.zeros(1, 16, 2, 4, 5), r"noise is \[1, 16, 2, 4, 5\]; .*\[1, 16, 2, 4, 4\]"),
        (torch.zeros(SHAPE, dtype=torch.int32), "a tensor of floats"),
        (torch.full(SHAPE, float("nan")), "not numbers"),
        ("noise", "noise is str"),
    ],
)
def test_other_noise_is_refused_before_a_weight_is_read(pipe, given, words):
    with pytest.raises(OpenSoraError, match=words):
        pipe("a", noise=given, check_only=True, **SETTINGS)


def test_the_vae_outside_a_pipeline(tiny_checkpoint, pipe):
    vae = opensora_core.open_vae(tiny_checkpoint / "hunyuan_vae.safetensors")
    images = torch.rand(5, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        latents = vae.encode(images)
        assert latents.shape == SHAPE and torch.equal(latents, pipe.vae.encode(images, [None]))
        given = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
        drawn = vae.encode(images, [given, torch.Generator().manual_seed(1), None])
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[2], latents[0]) and not torch.equal(drawn[0], drawn[2])
    frames = vae.decode(latents)
    assert frames.shape == (1, 5, 32, 32, 3) and 0 <= frames.min() and frames.max() <= 1
    expected = torch.stack([torch.from_numpy(frame) for frame in pipe.decode(latents)[0]])
    assert ((frames[0] * 255).round() - expected.float()).abs().max() <= 1


def test_posterior_noise_of_another_shape_is_refused(tiny_checkpoint):
    vae = opensora_core.open_vae(tiny_checkpoint / "hunyuan_vae.safetensors")
    with pytest.raises(OpenSoraError, match=r"posterior's noise has shape \[1, 16, 2, 4, 5\]; its latents have \[1, 16, 2, 4, 4\]"):
        vae.encode(torch.rand(5, 32, 32, 3), [torch.zeros(1, 16, 2, 4, 5)])


def test_flux_autoencoder_encodes(tmp_path):
    from demo import tiny_flux

    whole = PictureVAE(replace(FLUX_AE, widths=(32, 32, 32, 32), layers=1))
    for parameter in whole.requires_grad_(False).parameters():
        parameter.normal_(std=0.05)
    save_file(whole.state_dict(), tmp_path / "whole.safetensors")
    vae, picture = opensora_core.open_vae(tmp_path / "whole.safetensors"), torch.rand(1, 32, 48, 3)
    with torch.inference_mode():
        latents = vae.encode(picture)
        expected = whole.encode((2 * picture - 1).permute(3, 0, 1, 2)[None]).mode()
    torch.testing.assert_close(latents, (expected - SHIFT) * SCALE)
    assert latents.shape == (1, 16, 1, 4, 6) and vae.decode(latents).shape == (1, 1, 32, 48, 3)
    _, half = tiny_flux.write(tmp_path, schnell=True)
    with pytest.raises(OpenSoraError, match="decoder alone"):
        opensora_core.open_vae(half).encode(picture)


def test_a_file_that_is_no_vae_is_named(tiny_checkpoint):
    with pytest.raises(CheckpointError, match="Open_Sora_v2.safetensors is an Open-Sora 2.0 transformer"):
        opensora_core.open_vae(tiny_checkpoint / "Open_Sora_v2.safetensors")


def test_a_plain_run_writes_its_latents(tiny_checkpoint, tmp_path, capsys):
    asked = ["generate", "--model", str(tiny_checkpoint), "--prompt", "a", "--height", "32", "--width", "32", "--num-frames", "5"]
    assert main([*asked, "--num-steps", "1", "--seed", "1", "--out", str(tmp_path / "clip.mp4"), "--save-latents"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.latent", "clip.mp4", "clip.txt"]
    pipe = OpenSoraPipeline.from_pretrained(tiny_checkpoint)
    expected = pipe("a", seed=1, latents_only=True, **SETTINGS).latents / pipe.latent_scale
    assert torch.equal(read_latents(tmp_path / "clip.latent"), expected)
