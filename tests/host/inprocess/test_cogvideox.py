"""CogVideoX inside a host: loaded by our loaders, sampled as the library does, by stock samplers too; the host's own files stay the host's."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
WIDTH, HEIGHT, SIDE = 24, 48, 80
FRAMES = {"2b": 9, "5b": 9, "5b_i2v": 9, "1.5_5b": 17, "1.5_5b_i2v": 17}
NAMES = tuple(FRAMES)
TOLERANCE = 1e-4  # of the library's fp32: sums in another order


def shapes(name):
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return json.loads(file.metadata()["shapes"])


def value(name, shape):
    spec = importlib.util.spec_from_file_location("cogvideox_formula", GOLDEN / "formula.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.value(name, tuple(shape)).contiguous()


@pytest.fixture(scope="module")
def files(base, pack):
    models = base / "models"
    for name in NAMES:
        state = {key: value(key, shape) for key, shape in shapes("cogvideox")[name].items()}
        save_file(state, models / "diffusion_models" / f"cogvideox_{name}.safetensors")
    save_file({key: value(key, shape) for key, shape in shapes("cogvideox_vae").items()}, models / "vae" / "cogvideox_vae.safetensors")
    t5 = pack("opensora_core.encoders.t5")
    sizes = t5.T5Sizes(d_model=WIDTH, d_ff=48, num_layers=2, num_heads=2, d_kv=16)
    state = {key: 0.1 * value(key, shape) for key, shape in t5.t5_manifest(sizes).items()}
    save_file(state, models / "text_encoders" / "t5_cogvideox.safetensors")


@pytest.fixture(scope="module")
def loaded(files, run_node):
    clip = run_node(
        "OpenSoraTextEncoderLoader", t5_name="t5_cogvideox.safetensors", clip_l_name="none (T5 alone)", precision="auto", device="cpu"
    )[0]
    vae = run_node("OpenSoraVAELoader", vae_name="cogvideox_vae.safetensors")[0]

    def of(name):
        return run_node("OpenSoraModelLoader", model_name=f"cogvideox_{name}.safetensors", precision="fp32")[0], clip, vae

    return of


def encoded(run_node, clip, model):
    return run_node("OpenSoraT5TextEncode", clip=clip, prompt="a kite", negative_prompt="", motion_score=4, fps=24, model=model)[:2]


def size_of(name):
    """Height and width; 5B-I2V has learned positions for one size alone."""
    return (480, 720) if name == "5b_i2v" else (HEIGHT, SIDE)


def empty(run_node, model, name):
    height, width = size_of(name)
    made = run_node(
        "OpenSoraEmptyLatent", model=model, size="custom", aspect_ratio="16:9", length=str(FRAMES[name]), width=width, height=height, batch_size=1
    )  # fmt: skip
    return made[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_the_librarys(loaded, files, base, run_node, pack, relative_error, name):
    model, clip, vae = loaded(name)
    positive, negative = encoded(run_node, clip, model)
    assert positive[0][0].shape == (1, 226, WIDTH)
    latent, said, (height, width) = empty(run_node, model, name), {}, size_of(name)
    if name.endswith("i2v"):
        said["image"] = torch.rand(height, width, 3, generator=torch.Generator().manual_seed(1))
        sides = {"positive": positive, "negative": negative}
        positive, negative, latent = run_node(
            "OpenSoraImageToVideo", **sides, vae=vae, latent=latent, start_image=said["image"][None], fit="crop"
        )
    how = {"seed": 5, "steps": 4, "text_guidance": 6.0, "image_guidance": 1.0}
    out = run_node("OpenSoraRectifiedFlowSampler", model=model, positive=positive, negative=negative, latent=latent, **how)[0]["samples"]
    parts = {"dit": f"diffusion_models/cogvideox_{name}", "vae": "vae/cogvideox_vae", "t5": "text_encoders/t5_cogvideox"}
    parts = {part: base / "models" / f"{file}.safetensors" for part, file in parts.items()}
    pipe = pack("opensora_core.pipeline").OpenSoraPipeline.from_files(**parts, torch_dtype=torch.float32)
    expected = pipe(
        "a kite", height=height, width=width, num_frames=FRAMES[name], num_inference_steps=4, guidance_scale=6.0, seed=5, latents_only=True, **said
    ).latents  # fmt: skip
    assert relative_error(out.float() * pipe.latent_scale, expected) < TOLERANCE
    frames = run_node("VAEDecode", vae=vae, samples={"samples": out})[0]
    assert frames.shape == (FRAMES[name], height, width, 3)


@pytest.mark.parametrize("name", ["2b", "1.5_5b"])
def test_a_stock_euler_is_ddim(loaded, run_node, relative_error, name):
    import comfy.sample

    model, clip, _ = loaded(name)
    positive, negative = encoded(run_node, clip, model)
    latent = empty(run_node, model, name)
    how = {"seed": 1, "steps": 10, "cfg": 6.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    made = run_node("KSampler", model=model, positive=positive, negative=negative, latent_image=latent, **how)[0]["samples"]
    assert made.shape == latent["samples"].shape and torch.isfinite(made).all()
    assert comfy.sample.prepare_noise(latent["samples"], 1).shape == made.shape


def test_the_numbers_of_the_model_are_its_own(loaded, run_node):
    model, _, _ = loaded("2b")
    assert tuple(run_node("OpenSoraDefaults", model=model))[:6] == (50, 6.0, 1.0, 720, 480, 49)


def test_what_does_not_fit_is_said(loaded, run_node, pack):
    error = pack("opensora_core.errors").OpenSoraError
    model, clip, vae = loaded("1.5_5b_i2v")
    sides = dict(zip(("positive", "negative"), encoded(run_node, clip, model), strict=True))
    how = {"seed": 5, "steps": 2, "text_guidance": 6.0, "image_guidance": 1.0}
    with pytest.raises(error, match="Give a picture.*makes videos of a picture"):
        run_node("OpenSoraRectifiedFlowSampler", model=model, latent=empty(run_node, model, "1.5_5b_i2v"), **sides, **how)


def run_of(run_node, loaded, name, given=None, encode=None, **changes):
    """Latents of our sampler; given: inputs of the node by name."""
    model, clip, vae = loaded(name)
    texts = {"prompt": "a kite", "negative_prompt": "", "motion_score": 4, "fps": 24, "model": model, **(encode or {})}
    positive, negative = run_node("OpenSoraT5TextEncode", clip=clip, **texts)[:2]
    latent = empty(run_node, model, name)
    for node, inputs in (given or {}).items():
        positive, negative, latent = run_node(node, positive=positive, negative=negative, vae=vae, latent=latent, **inputs)
    how = {"seed": 5, "steps": 4, "text_guidance": 6.0, "image_guidance": 1.0, **changes}
    return run_node("OpenSoraRectifiedFlowSampler", model=model, positive=positive, negative=negative, latent=latent, **how)[0]


def test_what_a_run_can_be_asked_for(loaded, run_node, pack):
    plain = run_of(run_node, loaded, "5b")["samples"]
    others = [{"solver": "ddim"}, {"guidance_curve": "by index"}, {"encode": {"unconditional": "zero"}}, {"shift": 2.0}]
    made = [plain, *(run_of(run_node, loaded, "5b", **asked)["samples"] for asked in others)]
    assert all(torch.isfinite(one).all() for one in made)
    assert all(not torch.allclose(one, other, rtol=1e-3) for index, one in enumerate(made) for other in made[:index])
    assert torch.equal(run_of(run_node, loaded, "5b", solver="dpm", guidance_curve="released")["samples"], plain)
    error = pack("opensora_core.errors").OpenSoraError
    with pytest.raises(error, match="Use dpm or ddim, or auto"):
        run_of(run_node, loaded, "5b", solver="euler")
    with pytest.raises(error, match="Use speed exact.*sampled by another process"):
        run_of(run_node, loaded, "5b", speed="fast")
    with pytest.raises(error, match="Leave it out.*no negative prompt"):
        run_of(run_node, loaded, "5b", encode={"unconditional": "zero", "negative_prompt": "rain"})
    picture = {"start_image": torch.rand(1, HEIGHT, SIDE, 3, generator=torch.Generator().manual_seed(1)), "fit": "crop"}
    made = [
        run_of(run_node, loaded, "1.5_5b_i2v", {"OpenSoraImageToVideo": {**picture, "condition_scale": scale}})["samples"]
        for scale in ("auto", "1.0", "diffusers")
    ]
    assert torch.equal(made[0], made[1]) and not torch.allclose(made[0], made[2], rtol=1e-3)
    with pytest.raises(error, match="Leave out last_image"):
        run_of(run_node, loaded, "1.5_5b_i2v", {"OpenSoraImageToVideo": {**picture, "end_image": picture["start_image"]}})
    with pytest.raises(error, match="Leave out image.*makes videos of a prompt and video"):
        run_of(run_node, loaded, "5b", {"OpenSoraImageToVideo": picture})


@pytest.mark.parametrize("name", ["2b", "1.5_5b"])
def test_a_clip_is_made_over_as_by_the_library(loaded, files, base, run_node, pack, relative_error, name):
    clip = torch.rand(FRAMES[name] + 2, HEIGHT, SIDE, 3, generator=torch.Generator().manual_seed(2))
    asked = {"video": clip, "direction": "forwards", "context": "33", "fit": "crop", "strength": 0.5}
    out = run_of(run_node, loaded, name, {"OpenSoraVideoToVideo": asked})["samples"]
    parts = {"dit": f"diffusion_models/cogvideox_{name}", "vae": "vae/cogvideox_vae", "t5": "text_encoders/t5_cogvideox"}
    parts = {part: base / "models" / f"{file}.safetensors" for part, file in parts.items()}
    pipe = pack("opensora_core.pipeline").OpenSoraPipeline.from_files(**parts, torch_dtype=torch.float32)
    expected = pipe(
        "a kite", height=HEIGHT, width=SIDE, num_frames=FRAMES[name], num_inference_steps=4, guidance_scale=6.0, seed=5, latents_only=True,
        video=clip.numpy(), image_strength=0.5,
    ).latents  # fmt: skip
    assert relative_error(out.float() * pipe.latent_scale, expected) < TOLERANCE
    error = pack("opensora_core.errors").OpenSoraError
    for strength, words in ((1.0, "a strength below 1, such as the published 0.2"), (0.9, "leaves none")):
        with pytest.raises(error, match=words):
            run_of(run_node, loaded, name, {"OpenSoraVideoToVideo": {**asked, "strength": strength}})
    with pytest.raises(error, match="longer clip"):
        run_of(run_node, loaded, name, {"OpenSoraVideoToVideo": {**asked, "video": clip[:5]}})
    model, text, vae = loaded(name)
    sides = dict(zip(("positive", "negative"), encoded(run_node, text, model), strict=True))
    *sides, latent = run_node("OpenSoraVideoToVideo", **sides, vae=vae, latent=empty(run_node, model, name), **asked)
    how = {"seed": 1, "steps": 4, "cfg": 6.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0, "latent_image": latent}
    with pytest.raises(error, match="encode it with VAEEncode and lower denoise"):
        run_node("KSampler", model=model, positive=sides[0], negative=sides[1], **how)


def test_picture_models_go_on_from_the_last_frame_and_others_refuse(loaded, run_node, pack):
    picture = {"start_image": torch.rand(1, HEIGHT, SIDE, 3, generator=torch.Generator().manual_seed(1)), "fit": "crop"}
    model, clip, vae = loaded("1.5_5b_i2v")
    first = run_of(run_node, loaded, "1.5_5b_i2v", {"OpenSoraImageToVideo": picture})
    sides = dict(zip(("positive", "negative"), encoded(run_node, clip, model), strict=True))
    how = {"segments": 2, "seed": 1, "steps": 2, "text_guidance": 6.0, "image_guidance": 1.0}
    latent, images, _ = run_node("OpenSoraContinueVideo", model=model, vae=vae, latent=first, **sides, **how)
    assert latent["samples"].shape[2] == 13 and images.shape == (49, HEIGHT, SIDE, 3)
    assert torch.equal(latent["samples"][:, :, :5], first["samples"])
    error = pack("opensora_core.errors").OpenSoraError
    with pytest.raises(error, match="from the last frame alone"):
        run_node("OpenSoraContinueVideo", model=model, vae=vae, latent=first, **sides, **how, context_frames=5)
    model, clip, vae = loaded("1.5_5b")
    sides = dict(zip(("positive", "negative"), encoded(run_node, clip, model), strict=True))
    with pytest.raises(error, match="goes on from no video"):
        run_node("OpenSoraContinueVideo", model=model, vae=vae, latent=empty(run_node, model, "1.5_5b"), **sides, **how)


def in_layout(pack, layout, channels=16):
    """Tensors of a small 1.5-5B whose heads are as wide as the released ones, of so many input channels, as a file of a layout."""
    from dataclasses import replace

    configs, detect = pack("opensora_core.networks.cogvideox.config"), pack("opensora_core.families.table")
    config = replace(configs.COGVIDEOX_1_5_5B, hidden_size=64, mlp_hidden_size=256, depth=1, context_in_dim=WIDTH, time_embed_dim=32)
    manifest = detect.manifest(config, layout) | {"patch_embed.proj.weight": (64, 8 * channels)}
    return {key: value(key, shape) for key, shape in manifest.items()}


def written(base, name, state):
    save_file(state, base / "models" / "diffusion_models" / name)
    return name


@pytest.mark.parametrize("channels", [16, 48])
def test_the_hosts_own_layout_stays_the_hosts(files, base, pack, run_node, channels):
    errors, layout = pack("opensora_core.errors"), pack("opensora_core.networks.cogvideox.layout").HOST
    name = written(base, f"cogvideox_host_{channels}.safetensors", in_layout(pack, layout, channels))
    (own,) = run_node("UNETLoader", unet_name=name, weight_dtype="default")
    assert type(own.model).__name__ == "CogVideoX"
    conditioning = [[torch.zeros(1, 226, WIDTH), {}]]
    with pytest.raises(errors.OpenSoraError, match="Load its file with Open-Sora Load Model.*ComfyUI's own CogVideoX"):
        run_node("OpenSoraGuider", model=own, positive=conditioning, negative=conditioning, text_guidance=6.0, image_guidance=1.0)
    if channels == 16:
        (ours,) = run_node("OpenSoraModelLoader", model_name=name, precision="fp32")
        assert type(ours.model).__name__ == "OpenSoraCogVideoX155BModel"
        return
    with pytest.raises(errors.CheckpointError, match="48 input channels, as other projects' models have"):
        run_node("OpenSoraModelLoader", model_name=name, precision="fp32")


@pytest.mark.parametrize("channels", [33, 48])
@pytest.mark.parametrize("loader", ["UNETLoader", "OpenSoraModelLoader"])
def test_another_projects_channels_are_named(files, base, pack, run_node, loader, channels):
    name = written(base, f"cogvideox_{channels}.safetensors", in_layout(pack, None, channels))
    given = {"unet_name": name, "weight_dtype": "default"} if loader == "UNETLoader" else {"model_name": name, "precision": "auto"}
    with pytest.raises(pack("opensora_core.errors").CheckpointError, match=f"{channels} input channels, as other projects' models have"):
        run_node(loader, **given)


def sampled(run_node, model, clip, name="2b", steps=4):
    """What a stock sampler makes of a MODEL."""
    positive, negative = encoded(run_node, clip, model)
    how = {"seed": 1, "steps": steps, "cfg": 6.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    return run_node(
        "KSampler", model=model, positive=positive, negative=negative, latent_image=empty(run_node, model, name), **how
    )[0]["samples"]  # fmt: skip


def test_stock_loaders_open_what_is_published(loaded, base, run_node, pack, relative_error):
    import comfy.ops
    import comfy.sd
    from safetensors.torch import load_file

    class Operations(comfy.ops.manual_cast):
        """What GGUF-type loaders pass."""

        class Linear(comfy.ops.manual_cast.Linear):
            made = 0

            def __init__(self, *args, **kwargs):
                type(self).made += 1
                super().__init__(*args, **kwargs)

    ours, clip, _ = loaded("2b")
    expected = sampled(run_node, ours, clip)
    (stock,) = run_node("UNETLoader", unet_name="cogvideox_2b.safetensors", weight_dtype="default")
    assert torch.equal(sampled(run_node, stock, clip), expected)
    state = load_file(base / "models" / "diffusion_models" / "cogvideox_2b.safetensors")
    found = comfy.sd.load_diffusion_model_state_dict(dict(state), {"custom_operations": Operations})
    assert Operations.Linear.made > 10 and relative_error(sampled(run_node, found, clip), expected) < 1e-4
    shard = {key: tensor for index, (key, tensor) in enumerate(state.items()) if index < len(state) // 2}
    written(base, "cogvideox-00001-of-00002.safetensors", shard)
    written(base, "cogvideox-00002-of-00002.safetensors", {key: tensor for key, tensor in state.items() if key not in shard})
    with pytest.raises(pack("opensora_core.errors").CheckpointError, match="one file of several.*Open-Sora Load Model"):
        run_node("UNETLoader", unet_name="cogvideox-00001-of-00002.safetensors", weight_dtype="default")
    (whole,) = run_node("OpenSoraModelLoader", model_name="cogvideox-00001-of-00002.safetensors", precision="fp32")
    assert torch.equal(sampled(run_node, whole, clip), expected)


def test_the_2b_computes_in_the_type_that_it_is_published_in(loaded, base, run_node, relative_error, monkeypatch):
    import comfy.model_management as management
    from safetensors.torch import load_file

    ours, clip, _ = loaded("2b")
    expected = sampled(run_node, ours, clip)
    for check in ("should_use_fp16", "should_use_bf16"):
        monkeypatch.setattr(management, check, lambda *args, **kwargs: True)
    for name, dtype in (("2b", torch.float16), ("5b", torch.bfloat16)):
        state = load_file(base / "models" / "diffusion_models" / f"cogvideox_{name}.safetensors")
        written(base, f"cogvideox_{name}_half.safetensors", {key: tensor.half() for key, tensor in state.items()})
        for loader, also in (("UNETLoader", {"weight_dtype": "default"}), ("OpenSoraModelLoader", {"precision": "auto"})):
            file = {"unet_name" if loader == "UNETLoader" else "model_name": f"cogvideox_{name}_half.safetensors"}
            (model,) = run_node(loader, **file, **also)
            assert model.model.get_dtype_inference() == dtype, (name, loader)
            assert name != "2b" or relative_error(sampled(run_node, model, clip), expected) < 1e-2


def test_stock_nodes_at_the_joints(loaded, base, run_node):
    model, clip, vae = loaded("1.5_5b")
    plain, layer = sampled(run_node, model, clip, "1.5_5b", 10), "transformer_blocks.0.attn1.to_q"
    state = {
        f"diffusion_model.{layer}.lora_down.weight": value("down", (4, 32)),
        f"diffusion_model.{layer}.lora_up.weight": value("up", (32, 4)),
    }
    save_file(state, base / "models" / "loras" / "cogvideox_stock.safetensors")
    for node, also in (("LoraLoaderModelOnly", {"strength_model": 1.0}), ("OpenSoraLoraLoader", {"strength": 1.0})):
        (changed,) = run_node(node, model=model, lora_name="cogvideox_stock.safetensors", **also)
        made = sampled(run_node, changed, clip, "1.5_5b", 10)
        assert torch.isfinite(made).all() and not torch.allclose(made, plain, rtol=1e-3)
    for threshold, is_same in ((0.0, True), (5.0, False)):
        (cached,) = run_node("EasyCache", model=model, reuse_threshold=threshold, start_percent=0.05, end_percent=0.95, verbose=False)
        made = sampled(run_node, cached, clip, "1.5_5b", 10)
        assert torch.isfinite(made).all() and torch.allclose(made, plain, atol=1e-4) == is_same
    frames = run_node("VAEDecode", vae=vae, samples={"samples": plain})[0]
    tiled = run_node(
        "OpenSoraTiledVAEDecode", vae=vae, latent={"samples": plain}, tile_size=256, overlap=0.25, temporal_tile=0, policy="auto"
    )[0]
    assert frames.shape == (17, HEIGHT, SIDE, 3) and torch.allclose(frames, tiled, atol=1e-4)
