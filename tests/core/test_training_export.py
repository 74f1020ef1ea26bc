"""Export of the small model: official files that our loaders and the libraries read back, latents folded, small enough."""

import json

import pytest
import torch
from safetensors.torch import load_file

from opensora_core.checkpoint.detect import identify
from opensora_core.checkpoint.files import read_header
from opensora_core.checkpoint.load import load_transformer, load_vae
from opensora_core.codecs.hunyuan.config import LATENT_SCALE
from opensora_core.encoders.clip import load_clip
from opensora_core.encoders.t5 import load_t5
from training import export, tokenizers
from training.text import untrained
from training.transformer import CONFIG

FP32 = torch.float32


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    return export.random_networks(tmp_path_factory.mktemp("tokenizers"), seed=1)


@pytest.fixture(scope="module")
def folder(networks, tmp_path_factory):
    return export.export(*networks, tmp_path_factory.mktemp("small"))


def halved(module):
    return {name: tensor.half().float() for name, tensor in module.state_dict().items()}


def test_files_are_what_they_are_called(folder):
    kinds = {
        "Open_Sora_v2.safetensors": ("open_sora_2", CONFIG),
        "hunyuan_vae.safetensors": ("hunyuan_vae", export.VAE_CONFIG),
        "google/t5-v1_1-xxl/model.safetensors": ("t5", None),
        "openai/clip-vit-large-patch14/model.safetensors": ("clip_text", None),
    }
    for name, (kind, config) in kinds.items():
        header = read_header(folder / name)
        identity = identify(header.shapes)
        assert (identity.kind, identity.config, identity.layout.is_recut) == (kind, config, False)
        assert {info.dtype for info in header.tensors.values()} == {"F16"}
        assert (folder / name).stat().st_mode & 0o044, "others can read what is installed"
    assert "double_blocks.0.img_attn.norm.key_norm.scale" in load_file(folder / "Open_Sora_v2.safetensors")
    assert export.check(folder) <= 12_000_000


def test_loaders_give_back_what_was_written(folder, networks):
    transformer, vae, t5, clip = networks
    for module, read in (
        (transformer, load_transformer(folder / "Open_Sora_v2.safetensors", FP32)),
        (vae, load_vae(folder / "hunyuan_vae.safetensors", FP32)),
        (clip, load_clip(folder / tokenizers.CLIP_FOLDER, FP32, "cpu").model),
    ):
        expected, found = halved(module), read.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    encoder = load_t5(folder / tokenizers.T5_FOLDER, FP32, "cpu")
    text = "on a white background, a red triangle is moving upwards. 24 FPS. 6 motion score."
    ids = encoder.tokenize([text])
    assert ids.shape == (1, 32)
    t5 = t5.train(False)
    torch.testing.assert_close(encoder.encode([text]), t5(input_ids=ids).last_hidden_state, rtol=0.02, atol=0.02)


def test_capitals_have_the_embedding_of_the_word(folder):
    encoder = load_t5(folder / tokenizers.T5_FOLDER, FP32, "cpu")
    assert not torch.equal(encoder.tokenize(["A Red circle"]), encoder.tokenize(["a red circle"]))
    assert torch.equal(encoder.encode(["A Red CIRCLE"]), encoder.encode(["a red circle"]))
    assert not torch.equal(encoder.encode(["a blue circle"]), encoder.encode(["a red circle"]))


def test_the_library_loads_the_folders(folder):
    """As the reference does: from_pretrained on the hub folders."""
    import transformers

    t5 = transformers.T5EncoderModel.from_pretrained(folder / tokenizers.T5_FOLDER, local_files_only=True).float().train(False)
    clip = transformers.CLIPTextModel.from_pretrained(folder / tokenizers.CLIP_FOLDER, local_files_only=True).float().train(False)
    ours, texts = load_t5(folder / tokenizers.T5_FOLDER, FP32, "cpu"), ["a red circle moving up.", ""]
    with torch.no_grad():
        assert torch.equal(t5(input_ids=ours.tokenize(texts)).last_hidden_state, ours.encode(texts))
        ours = load_clip(folder / tokenizers.CLIP_FOLDER, FP32, "cpu")
        assert torch.equal(clip(input_ids=ours.tokenize(texts)).pooler_output, ours.encode(texts))
    config = json.loads((folder / tokenizers.CLIP_FOLDER / "config.json").read_text())["text_config"]
    assert config["eos_token_id"] == config["vocab_size"] - 1


def test_folding_keeps_the_frames_and_standardises_the_latents(networks):
    vae = networks[1]
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 3, 5, 32, 32, generator=generator) * 2 - 1
    statistics = export.latent_statistics(vae, [pixels[:1], pixels[1:]])
    folded = type(vae)(vae.config)
    folded.load_state_dict(export.fold_latents(vae.state_dict(), statistics))
    with torch.no_grad():
        mean, logvar = vae.encode(pixels).moments()
        new_mean, new_logvar = folded.encode(pixels).moments()
        scaled = LATENT_SCALE * new_mean
        assert scaled.mean(dim=(0, 2, 3, 4)).abs().max() < 1e-4
        assert (scaled.std(dim=(0, 2, 3, 4), correction=0) - 1).abs().max() < 1e-3
        torch.testing.assert_close(folded.decode(new_mean), vae.decode(mean), rtol=1e-3, atol=1e-3)
        # A sample drawn with the same noise is the same too.
        noise = torch.randn(mean.shape, generator=generator)
        sample, new_sample = mean + noise * (logvar / 2).exp(), new_mean + noise * (new_logvar / 2).exp()
        torch.testing.assert_close(folded.decode(new_sample), vae.decode(sample), rtol=1e-3, atol=1e-3)
    assert not torch.equal(folded.quant_conv.weight, vae.quant_conv.weight)


def test_what_cannot_be_shipped(networks, tmp_path, monkeypatch):
    transformer, vae, t5, clip = networks
    weight = t5.shared.weight
    with monkeypatch.context() as patch:
        patch.setattr(export, "LARGEST_BYTES", 1_000_000)
        with pytest.raises(ValueError, match="at most 1,000,000"):
            export.export(transformer, vae, t5, clip, tmp_path / "a")
    before = weight[5, 0].item()
    weight.data[5, 0] = 1e6
    try:
        with pytest.raises(ValueError, match="fp16 cannot hold shared.weight"):
            export.export(transformer, vae, t5, clip, tmp_path / "b")
    finally:
        weight.data[5, 0] = before


def test_untrained_encoders_fit_the_tokenizers(tmp_path):
    text = untrained(tokenizers.write(tmp_path))
    context, pooled = (encoder.encode(["a red circle moving up", "A blue square."]) for encoder in text)
    assert context.shape == (2, 32, 64) and pooled.shape == (2, 64)
    assert (context.shape[-1], pooled.shape[-1]) == (CONFIG.context_in_dim, CONFIG.vec_in_dim)
