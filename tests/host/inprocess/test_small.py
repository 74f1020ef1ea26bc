"""The built-in model inside a host: chosen in every loader, read by the code that reads official files, equal to the library's."""

import shutil

import pytest
import torch

PROMPT = "a Red circle moving left on a blue background. 24 FPS. 4 motion score."


@pytest.fixture
def name(pack, small):
    return pack("nodes.host.paths").SMALL


@pytest.fixture
def library(pack, small):
    """The library's pipeline over the same files, in fp32."""
    return pack("opensora_core.pipeline").OpenSoraPipeline.from_pretrained("small", torch_dtype=torch.float32)


def load(run_node, name):
    model = run_node("OpenSoraModelLoader", model_name=name, precision="fp32")[0]
    clip = run_node("OpenSoraTextEncoderLoader", t5_name=name, clip_l_name=name, precision="auto", device="cpu")[0]
    return model, clip, run_node("OpenSoraVAELoader", vae_name=name)[0]


def test_every_loader_offers_it(name, pack):
    import nodes

    slots = {
        "OpenSoraModelLoader": ["model_name"],
        "OpenSoraTextEncoderLoader": ["t5_name", "clip_l_name"],
        "OpenSoraVAELoader": ["vae_name"],
    }
    for node, inputs in slots.items():
        required = nodes.NODE_CLASS_MAPPINGS[node].INPUT_TYPES()["required"]
        for one in inputs:
            options = required[one][1]["options"] if len(required[one]) > 1 and "options" in required[one][1] else required[one][0]
            assert options[-1] == name and len(options) > 1
    paths = pack("nodes.host.paths")
    t5, clip = (paths.stamp("text_encoders", name, part)[0] for part in (paths.T5, paths.CLIP))
    assert "t5-v1_1-xxl" in t5 and "clip-vit-large-patch14" in clip
    with pytest.raises(pack("opensora_core.errors").CheckpointError, match="not in models/loras"):
        paths.model_file("loras", name)


@pytest.mark.parametrize("prompt", [PROMPT, "", "a cat with 7 dogs, naïve! 北京", "a red circle " * 20], ids=range(4))
def test_prompts_are_the_librarys(run_node, pack, name, library, prompt):
    _, clip, _ = load(run_node, name)
    [[context, values]], _, text = run_node("OpenSoraT5TextEncode", clip=clip, prompt=prompt, negative_prompt="", motion_score=0, fps=0)
    bare = pack("opensora_core.run.request").SamplingOptions(fps=0, motion_score=0)
    expected = library.encode_prompt(text, "", bare).condition
    assert context.shape == (1, 32, 64) and values["pooled_output"].shape == (1, 64)
    torch.testing.assert_close(context.float(), expected.positive["context"], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(values["pooled_output"].float(), expected.positive["y"], rtol=1e-3, atol=1e-3)
    [[stock, _]] = run_node("CLIPTextEncode", clip=clip, text=text)[0]
    assert torch.equal(stock, context)


def test_a_video_is_the_librarys(run_node, name, library, relative_error):
    model, clip, vae = load(run_node, name)
    positive, negative, _ = run_node("OpenSoraT5TextEncode", clip=clip, prompt=PROMPT, negative_prompt="", motion_score=4, fps=24)
    sizes = {"resolution": "custom", "aspect_ratio": "16:9", "num_frames": 17, "width": 64, "height": 64, "batch_size": 1}
    latent = run_node("OpenSoraEmptyLatentVideo", **sizes)[0]
    settings = {"seed": 7, "steps": 4, "text_guidance": 7.5, "image_guidance": 3.0}
    found = run_node("OpenSoraRectifiedFlowSampler", model=model, positive=positive, negative=negative, latent=latent, **settings)[0]
    expected = library(PROMPT, num_inference_steps=4, seed=7)
    assert found["samples"].shape == (1, 16, 5, 8, 8)
    from_host = found["samples"].float() * model.get_model_object("latent_format").scale_factor
    assert relative_error(from_host, expected.latents) < 0.01
    frames = run_node("VAEDecode", vae=vae, samples=found)[0]
    assert frames.shape[-4:] == (17, 64, 64, 3)
    shown = torch.stack([torch.from_numpy(frame) for frame in expected.frames[0]]).float() / 255
    assert (frames.reshape(shown.shape) - shown).abs().max() < 0.05


def test_the_stock_loader_reads_the_transformer(run_node, small, base, name, relative_error):
    shutil.copy(small / "Open_Sora_v2.safetensors", base / "models" / "diffusion_models" / "small_transformer.safetensors")
    stock = run_node("UNETLoader", unet_name="small_transformer.safetensors", weight_dtype="default")[0]
    ours = run_node("OpenSoraModelLoader", model_name=name, precision="auto")[0]
    one, other = (model.model.diffusion_model.state_dict() for model in (stock, ours))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert stock.model.config == ours.model.config and stock.model.config.context_in_dim == 64


def test_copied_into_the_hosts_folders_the_encoders_bring_their_tokenizers(run_node, pack, small, base, name):
    folder = base / "models" / "text_encoders" / "small"
    t5, clip = (small / path for path in ("google/t5-v1_1-xxl", "openai/clip-vit-large-patch14"))
    shutil.copytree(t5, folder / "t5")
    shutil.copytree(clip, folder / "clip")
    text = pack("nodes.host.text")
    copied = text.load_text_encoders(str(folder / "clip" / "model.safetensors"), str(folder / "t5" / "model.safetensors"))  # either order
    built_in = load(run_node, name)[1]
    with torch.inference_mode():
        ((one, _),), ((other, _),) = (text.encode(clip, PROMPT)[0] for clip in (copied, built_in))
    assert torch.equal(one, other)
    error = pack("opensora_core.errors").CheckpointError
    for path in (folder / "t5" / "spiece.model", folder / "t5" / "tokenizer.json"):
        path.unlink()
    with pytest.raises(error, match="put its tokenizer beside it: .* with a vocabulary of 209"):
        text.load_text_encoders(str(folder / "t5" / "model.safetensors"), str(clip / "model.safetensors"))


def test_a_prompt_that_is_cut_is_named(run_node, pack, name):
    _, note = pack("nodes.host.text").exact_tokens(load(run_node, name)[1].tokenizer, "a red circle " * 20)
    assert "longer than the 32 that T5 reads" in note


def test_preflight_counts_its_own_text_encoders_and_vae(run_node, name, pack):
    settings = {"width": 64, "height": 64, "num_frames": 17, "precision": "auto", "offload": "auto"}
    report = run_node("OpenSoraPreflight", model_name=name, **settings)[0]
    text = next(line for line in report.splitlines() if line.split()[:1] == ["text"])
    assert float(text.split()[1]) < 0.1  # GiB; a released T5 takes 9


def test_nothing_to_unload_is_said_in_words(pack, monkeypatch):
    shared = pack("nodes.host.shared")
    monkeypatch.setattr(shared, "_host_patchers", lambda: [])
    assert shared.unload(shared.ALL) == "There was nothing to unload."
    assert shared.unload(shared.VAE) == "There was no VAE to unload."
