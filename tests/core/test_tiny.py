"""The small random checkpoint: complete, read strictly by our own loaders, lively enough to look at, always the same."""

import hashlib

import pytest
import torch
from safetensors.torch import load_file

from demo import tiny
from opensora_core.checkpoint.detect import identify
from opensora_core.checkpoint.files import read_header
from opensora_core.checkpoint.load import load_transformer, load_vae
from opensora_core.codecs.hunyuan.config import LATENT_SCALE


def digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_layout_of_the_hub_repository(tiny_checkpoint):
    names = set(digests(tiny_checkpoint))
    assert {"Open_Sora_v2.safetensors", "hunyuan_vae.safetensors", "t5xxl.safetensors", "clip_l.safetensors"} < names
    assert {f"google/t5-v1_1-xxl/{name}" for name in ("config.json", "spiece.model", "pytorch_model.bin.index.json")} < names
    assert {f"openai/clip-vit-large-patch14/{name}" for name in ("config.json", "vocab.json", "merges.txt", "model.safetensors")} < names
    assert sum(path.stat().st_size for path in tiny_checkpoint.rglob("*") if path.is_file()) < 30e6


@pytest.mark.parametrize(
    ("file", "kind", "config"),
    [
        ("Open_Sora_v2.safetensors", "open_sora_2", tiny.TRANSFORMER),
        ("hunyuan_vae.safetensors", "hunyuan_vae", tiny.VAE),
        ("t5xxl.safetensors", "t5", None),
        ("clip_l.safetensors", "clip_text", None),
    ],
)
def test_files_are_what_they_are_called(tiny_checkpoint, file, kind, config):
    identity = identify(read_header(tiny_checkpoint / file).shapes)
    assert (identity.kind, identity.config, identity.layout.is_recut) == (kind, config, False)


def test_released_key_names(tiny_checkpoint):
    weights = load_file(tiny_checkpoint / "Open_Sora_v2.safetensors")
    assert weights["double_blocks.0.img_attn.norm.key_norm.scale"].shape == (32,)
    assert weights["single_blocks.2.v_mlp.weight"].shape == (96 + 384, 96)
    assert not any(name.endswith("norm.weight") for name in weights)
    assert (
        len(load_file(tiny_checkpoint / "hunyuan_vae.safetensors")) == 244
    )  # four fewer than the released 248: two levels of one width need no shortcut


def test_the_same_seed_writes_the_same_files(tiny_checkpoint, tmp_path):
    first, again = digests(tiny_checkpoint), digests(tiny.write(tmp_path / "again"))
    assert first == again
    other = tiny.transformer_weights(torch.Generator().manual_seed(1))
    assert not torch.equal(other["img_in.weight"].bfloat16(), load_file(tiny_checkpoint / "Open_Sora_v2.safetensors")["img_in.weight"])


@torch.no_grad()
def test_a_network_that_listens(tiny_checkpoint):
    """Velocities of a sensible size, which depend on the text."""
    model = load_transformer(tiny_checkpoint / "Open_Sora_v2.safetensors", torch.float32)
    generator = torch.Generator().manual_seed(0)
    x, context, y = (torch.randn(size, generator=generator) for size in ((1, 16, 2, 4, 6), (2, 5, 64), (2, 64)))
    one, other = model(x.expand(2, -1, -1, -1, -1), torch.full((2,), 0.5), context, y)
    assert 0.2 < one.std() < 2
    assert (one - other).std() > 0.1 * one.std()


@torch.no_grad()
def test_frames_worth_seeing(tiny_checkpoint):
    """Contrast in space and change in time, and latents of the usual spread on the way back."""
    vae = load_vae(tiny_checkpoint / "hunyuan_vae.safetensors", torch.float32)
    latents = torch.randn(1, 16, 3, 6, 6, generator=torch.Generator().manual_seed(5))
    frames = vae.decode(latents / LATENT_SCALE)
    assert frames.shape == (1, 3, 9, 48, 48)
    assert 0.2 < frames.std() < 1.2 and abs(frames.mean()) < 0.5
    assert (frames[:, :, -1] - frames[:, :, 0]).abs().mean() > 0.03
    moments = vae.encode(frames.clamp(-1, 1)).values
    assert 0.3 < moments[:, :16].std() * LATENT_SCALE < 3
    assert (moments[:, 16:] < -5).all()
