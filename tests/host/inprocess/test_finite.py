"""What is not made of numbers is an error that names stage and cause and keeps the latents; fp16 gives way to what is wider, once."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

SHAPE = (1, 16, 3, 6, 8)


@pytest.fixture(scope="module")
def error(pack):
    return pack("opensora_core.errors").OpenSoraError


@pytest.fixture
def lines(pack, monkeypatch):
    """What a person is shown."""
    shown = []
    monkeypatch.setattr(pack("nodes.host.notice"), "show", lambda text, node_id, level=0: shown.append(text) if text else None)
    return shown


@pytest.fixture
def sample(run_node, conditioning):
    def run(model, **changes):
        inputs = {
            "model": model, "positive": conditioning(1), "negative": conditioning(2), "latent": {"samples": torch.zeros(SHAPE)}, "seed": 3,
            "steps": 4, "text_guidance": 3.0, "image_guidance": 3.0, **changes,
        }  # fmt: skip
        return run_node("OpenSoraRectifiedFlowSampler", **inputs)[0]["samples"]

    return run


def kept(error, base):
    """The latents that an error says are kept."""
    label = re.search(r"are kept in output/(\S+\.latent)\.", str(error))
    return load_file(base / "output" / label[1])["latent_tensor"]


def test_a_hook_that_gives_nan_is_named(model, sample, error, base):
    def spoils(args):
        return args["denoised"] * torch.nan if float(args["sigma"].max()) < 0.9 else args["denoised"]

    patched = model.clone()
    patched.set_model_sampler_post_cfg_function(spoils)
    with pytest.raises(
        error, match=r"guidance \(test_finite: spoils\).*Sampling, step \d of 4, gave values that are not numbers"
    ) as caught:
        sample(patched)
    assert kept(caught.value, base).shape == SHAPE and torch.isfinite(kept(caught.value, base)).all()


def test_the_guider_says_so_under_any_sampler(model, run_node, conditioning, error):
    patched = model.clone()
    patched.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * torch.inf)
    shifted, sigmas = run_node("OpenSoraScheduler", model=patched, latent={"samples": torch.zeros(SHAPE)}, steps=3)
    (guider,) = run_node("OpenSoraGuider", model=shifted, positive=conditioning(1), negative=conditioning(2))
    (sampler,) = run_node("KSamplerSelect", sampler_name="heun")
    (noise,) = run_node("RandomNoise", noise_seed=1)
    with pytest.raises(error, match="step 1 of 3, gave values that are not numbers"):
        run_node(
            "SamplerCustomAdvanced",
            noise=noise,
            guider=guider,
            sampler=sampler,
            sigmas=sigmas,
            latent_image={"samples": torch.zeros(SHAPE)},
        )


@pytest.mark.parametrize("steps", [10, 30, 50])
def test_the_stock_tsr_patch_agrees_with_our_schedule(steps, model, run_node, pack, monkeypatch):
    """Only its function, on the first of our noise levels: it takes their logit, which is NaN beyond 1."""
    geometry = pack("opensora_core.geometry")
    (patched,) = run_node("TemporalScoreRescaling", model=model, tsr_k=0.95, tsr_sigma=1.0)
    (function,) = patched.model_options["sampler_post_cfg_function"]
    sizes = {geometry.CAUSAL.named_size(name, ratio) for name in ("256px", "768px") for ratio in geometry.ASPECT_RATIOS}
    x = torch.ones(1, 16, 1, 2, 2)
    for height, width in sizes:
        for latent_frames in range(1, 34):
            samples = torch.zeros((1, 16, latent_frames, height // 8, width // 8), device="meta")
            shifted, sigmas, _ = pack("nodes.host.run").shifted(patched, samples, steps, 0)
            assert (sigmas[0], sigmas[-1]) == (1, 0), (height, width, latent_frames)
            monkeypatch.setattr(shifted.model, "current_patcher", shifted)
            for sigma in sigmas[:2]:
                args = {"denoised": x, "sigma": sigma[None], "input": x, "model": shifted.model, "model_options": shifted.model_options}
                assert torch.isfinite(function(args)).all(), (height, width, latent_frames, sigma)


def test_a_nan_in_the_file_is_named(weights, base, run_node, sample, error):
    spoilt = {key: tensor.clone() for key, tensor in weights.items()}
    key = "double_blocks.1.img_attn.q_proj.weight"
    spoilt[key][0, 0] = torch.nan
    save_file(spoilt, base / "models/diffusion_models/spoilt.safetensors")
    (model,) = run_node("OpenSoraModelLoader", model_name="spoilt.safetensors")
    with pytest.raises(error, match=rf"{key}, which holds such values: a damaged.*step 1 of 4"):
        sample(model)


def test_a_nan_in_a_stock_lora_is_named(model, sample, error):
    patched = model.clone()
    key = "diffusion_model.single_blocks.0.q_proj.weight"
    patched.add_patches({key: ("diff", (torch.full_like(model.model.state_dict()[key], torch.nan),))}, 1.0)
    with pytest.raises(error, match="single_blocks.0.q_proj"):
        sample(patched)


def test_a_nan_in_the_prompt_is_named(model, conditioning, sample, error):
    (context, values), *_ = conditioning(1)
    with pytest.raises(error, match="the encoded prompt or the reference"):
        sample(model, positive=[[context * torch.nan, values]])


def test_fp16_gives_way_for_the_rest_of_the_run(weights, base, sample, lines, monkeypatch):
    """A network whose first layer overflows fp16, as large ones do, and is harmless after its norm."""
    import comfy.model_management
    import comfy.sd

    state = {key: tensor.clone() for key, tensor in weights.items()}
    state["txt_in.weight"] = state["txt_in.weight"] * 3e4 / state["txt_in.weight"].abs().max()
    save_file(state, base / "models/diffusion_models/wide.safetensors")
    path = str(base / "models/diffusion_models/wide.safetensors")
    monkeypatch.setattr(comfy.model_management, "unet_manual_cast", lambda *args, **options: None)  # as on a GPU with fp16
    narrow = comfy.sd.load_diffusion_model(path, model_options={"dtype": torch.float16})
    assert narrow.model.get_dtype_inference() == torch.float16
    found = sample(narrow)
    assert torch.isfinite(found).all()
    assert len([line for line in lines if line.startswith("The network gave values that are not numbers in float16")]) == 1
    assert narrow.model.get_dtype_inference() == torch.float16
    assert not any(getattr(module, "comfy_cast_weights", False) for module in narrow.model.diffusion_model.modules())
    # 8 bits of a number are what bf16 keeps; a run in fp16 would be nothing at all.
    expected = sample(comfy.sd.load_diffusion_model(path, model_options={"dtype": torch.float32}))
    assert (found - expected).abs().max() < 0.2 * expected.abs().max()


@pytest.fixture
def narrow_vae(base, run_node, monkeypatch):
    """narrow_vae(changes, loader) -> a VAE in fp16 whose tensors are changed, from our loader or the stock one."""
    from comfy.cli_args import args

    def load(name, change, stock=False):
        state = load_file(base / "models/vae/hunyuan_vae.safetensors")
        change(state)
        save_file(state, base / f"models/vae/{name}")
        monkeypatch.setattr(args, "fp16_vae", True)
        node = "VAELoader" if stock else "OpenSoraVAELoader"
        (vae,) = run_node(node, vae_name=name)
        monkeypatch.setattr(args, "fp16_vae", False)
        return vae

    return load


def overflow(state):
    state["decoder.conv_in.conv.weight"] *= 2e4 / state["decoder.conv_in.conv.weight"].abs().max()
    state["encoder.conv_in.conv.weight"] *= 6e4 / state["encoder.conv_in.conv.weight"].abs().max()


@pytest.fixture(scope="module")
def latent():
    return {"samples": torch.randn(1, 16, 2, 6, 6, generator=torch.Generator().manual_seed(1)) * 8}


def test_an_fp16_vae_decodes_once_more_in_fp32(narrow_vae, run_node, latent, lines):
    vae = narrow_vae("wide.safetensors", overflow)
    assert vae.vae_dtype == torch.float16
    (images,) = run_node("OpenSoraTiledVAEDecode", vae=vae, latent=latent)
    assert torch.isfinite(images).all() and images.std() > 0
    assert [line for line in lines if "float16" in line] == [
        "Decoding gave values that are not numbers in float16; it is done once more in float32."
    ]
    (by_stock,) = run_node("VAEDecode", vae=vae, samples=latent)
    assert torch.allclose(by_stock.reshape(images.shape), images, atol=1e-2)
    assert len([line for line in lines if "float16" in line]) == 2


def test_an_fp16_vae_encodes_once_more_in_fp32(narrow_vae, run_node, lines):
    vae = narrow_vae("wide2.safetensors", overflow)
    frames = torch.rand(5, 48, 48, 3, generator=torch.Generator().manual_seed(2))
    (found,) = run_node("OpenSoraTiledVAEEncode", vae=vae, image=frames)
    assert torch.isfinite(found["samples"]).all() and any("Encoding gave" in line for line in lines)


def spoil(state):
    state["decoder.conv_out.conv.weight"][0] = torch.nan


def test_a_damaged_vae_keeps_the_latents(narrow_vae, run_node, latent, error, base):
    vae = narrow_vae("spoilt.safetensors", spoil)
    with pytest.raises(
        error, match="damaged VAE file.*Decoding gave values that are not numbers.*in float32.*finished, are kept"
    ) as caught:
        run_node("OpenSoraTiledVAEDecode", vae=vae, latent=latent)
    assert torch.equal(kept(caught.value, base), latent["samples"])
    with pytest.raises(error, match="Decoding gave values that are not numbers"):
        run_node("VAEDecode", vae=vae, samples=latent)


def test_a_latent_of_nan_blames_the_sampler(run_node, latent, error):
    (vae,) = run_node("OpenSoraVAELoader", vae_name="hunyuan_vae.safetensors")
    with pytest.raises(error, match="sampler that made it: the LATENT to decode holds values that are not numbers"):
        run_node("OpenSoraTiledVAEDecode", vae=vae, latent={"samples": latent["samples"] * torch.nan})


def test_frames_of_one_colour_are_said(narrow_vae, run_node, latent, lines):
    def blank(state):
        state["decoder.conv_out.conv.weight"].zero_()
        state["decoder.conv_out.conv.bias"].fill_(-1)

    (images,) = run_node("OpenSoraTiledVAEDecode", vae=narrow_vae("blank.safetensors", blank), latent=latent)
    assert not images.any()
    assert any(line.startswith("All 5 frames are black") for line in lines)
