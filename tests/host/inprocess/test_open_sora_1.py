"""Open-Sora 1.0 to 1.3 inside a host: loaded by our loaders, read and sampled as the library does, given frames included."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
WIDTH = 16
SIZES = {"1.0": (64, 64), "1.1": (40, 56), "1.2": (40, 56), "1.3": (40, 56)}
FRAMES = {"1.0": 3, "1.1": 4, "1.2": 17, "1.3": 17}
LENGTHS = {"1.0": 120, "1.1": 200, "1.2": 300, "1.3": 300}


def cases():
    spec = importlib.util.spec_from_file_location("open_sora_1_cases", GOLDEN / "open_sora_1_cases.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def files(base, pack):
    """{version: names of its transformer and VAE}, and the name of T5 under "t5"."""
    with safe_open(GOLDEN / "open_sora_1.safetensors", "pt") as file:
        info = json.loads(file.metadata()["info"])
    weights, made = cases().random_weights, {}
    for version in SIZES:
        vae = info[version]["vae_shapes"] if version in ("1.2", "1.3") else info["1.2"]["kl_shapes"]
        for folder, of in (
            ("diffusion_models", info[version]["shapes"] | {"y_embedder.y_embedding": (LENGTHS[version], WIDTH)}),
            ("vae", vae),
        ):
            state = {name: tensor.contiguous() for name, tensor in weights({name: tuple(shape) for name, shape in of.items()}).items()}
            save_file(state, base / "models" / folder / f"open_sora_{version}.safetensors")
        made[version] = f"open_sora_{version}.safetensors"
    t5 = pack("opensora_core.encoders.t5")
    sizes = t5.T5Sizes(d_model=WIDTH, d_ff=48, num_layers=2, num_heads=2, d_kv=16)
    state = {name: 0.1 * tensor for name, tensor in weights(t5.t5_manifest(sizes)).items()}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, base / "models" / "text_encoders" / "t5_small.safetensors")
    return {**made, "t5": "t5_small.safetensors"}


@pytest.fixture(scope="module")
def loaded(files, run_node):
    clip = run_node("OpenSoraTextEncoderLoader", t5_name=files["t5"], clip_l_name="none (T5 alone)", precision="auto", device="cpu")[0]

    def of(version):
        model = run_node("OpenSoraModelLoader", model_name=files[version], precision="fp32")[0]
        return model, clip, run_node("OpenSoraVAELoader", vae_name=files[version])[0]

    return of


@pytest.fixture(scope="module")
def library(files, base, pack):
    def of(version):
        models = base / "models"
        parts = {
            "dit": models / "diffusion_models" / files[version],
            "vae": models / "vae" / files[version],
            "t5": models / "text_encoders" / files["t5"],
        }
        return pack("opensora_core.pipeline").OpenSoraPipeline.from_files(**parts, torch_dtype=torch.float32)

    return of


def latent(model, pack, version, frames=0):
    config = model.model.config
    shape = (1, config.in_channels, config.grid.latent_frames(frames or FRAMES[version]), *config.grid.latent_size(*SIZES[version]))
    return {"samples": torch.zeros(shape)}


def encoded(run_node, model, clip, prompt="a Red kite", **said):
    said = {"negative_prompt": "", "motion_score": 4, "fps": 24, **said}
    return run_node("OpenSoraT5TextEncode", clip=clip, prompt=prompt, model=model, **said)


def picture_of(version, seed=1):
    return torch.rand(1, *SIZES[version], 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("version", "given", "speed"),
    [
        ("1.0", False, "exact"),
        *((version, given, "exact") for version in ("1.1", "1.2", "1.3") for given in (False, True)),
        *((version, given, "fast") for version in ("1.2", "1.3") for given in (False, True)),
    ],
)
def test_a_run_is_the_librarys(loaded, library, run_node, pack, relative_error, version, given, speed):
    model, clip, vae = loaded(version)
    assert type(model.model).__name__ == f"OpenSora1{version[-1]}Model"
    positive, negative, text = encoded(run_node, model, clip, camera_motion="static")
    assert text.endswith("camera motion: static.") == (version >= "1.2") and positive[0][1]["attention_mask"].sum() < 40
    empty, picture = latent(model, pack, version), picture_of(version)
    options, said = pack("opensora_core.run.request").SamplingOptions(camera_motion="static"), {}
    if given:
        said["image"] = picture[0]
        sides = {"positive": positive, "negative": negative}
        positive, negative, empty = run_node("OpenSoraImageToVideo", **sides, vae=vae, latent=empty, start_image=picture, fit="crop")
    run = {
        "model": model,
        "positive": positive,
        "negative": negative,
        "latent": empty,
        "seed": 5,
        "text_guidance": 7.0,
        "image_guidance": 5.0,
    }
    out = run_node("OpenSoraRectifiedFlowSampler", **run, steps=13, speed=speed)[0]["samples"]
    pipe, (height, width) = library(version), SIZES[version]
    expected = pipe(
        "a Red kite", height=height, width=width, num_frames=FRAMES[version], num_inference_steps=13, guidance_scale=7.0, image_guidance_scale=5.0,
        seed=5, options=options, latents_only=True, speed=speed, **said,
    ).latents  # fmt: skip
    assert relative_error(pipe.latents.to_model(out.float()), expected) < 1e-2  # the host's T5 is near the library's, not equal
    frames = run_node(
        "OpenSoraTiledVAEDecode", vae=vae, latent={"samples": out}, tile_size=256, overlap=0.25, temporal_tile=8, policy="auto"
    )[0]
    assert frames.shape == (FRAMES[version], height, width, 3)


@pytest.mark.parametrize("version", SIZES)
def test_four_bits_are_the_librarys(files, loaded, base, run_node, pack, relative_error, version):
    pytest.importorskip("bitsandbytes")
    plain, clip, _ = loaded(version)
    model = run_node("OpenSoraModelLoader", model_name=files[version], precision="nf4")[0]
    path = base / "models" / "diffusion_models" / files[version]
    library = pack("opensora_core.checkpoint.load").load_transformer(path, torch.float32, precision="nf4")
    held, network = {name: of for name, of in library.named_modules() if getattr(of, "form", None) is not None}, model.model.diffusion_model
    assert len(held) == 7 * len(library.blocks()) + 2 * (version < "1.2") * len(library.blocks())
    for name, layer in held.items():
        assert torch.equal(network.get_submodule(name).weight, layer.weight), name
    positive, negative, _ = encoded(run_node, plain, clip)
    run = {"positive": positive, "negative": negative, "latent": latent(plain, pack, version), "seed": 5, "text_guidance": 1.0, "steps": 2}
    few, many = (run_node("OpenSoraRectifiedFlowSampler", model=one, image_guidance=1.0, **run)[0]["samples"] for one in (model, plain))
    assert 1e-4 < relative_error(few, many) < 0.5
    with pytest.raises(pack("opensora_core.errors").OpenSoraError, match="weights in nf4 take no LoRA"):
        model.add_patches({})


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_learned_variance_needs_our_steps_and_no_second_forward(loaded, run_node, pack, monkeypatch, version):
    error = pack("opensora_core.errors").OpenSoraError
    model, clip, _ = loaded(version)
    positive, negative, _ = encoded(run_node, model, clip)
    empty, forwards = latent(model, pack, version), []
    network = pack("nodes.host.network")._HostNetwork
    forward = network.forward
    monkeypatch.setattr(network, "forward", lambda self, x, *more, **named: (forwards.append(len(x)), forward(self, x, *more, **named))[1])
    ready, sigmas = run_node("OpenSoraScheduler", model=model, latent=empty, steps=3)
    *_, sampler = run_node("OpenSoraDefaults", model=model)
    (guider,) = run_node("OpenSoraGuider", model=ready, positive=positive, negative=negative, text_guidance=7.0, image_guidance=1.0)
    (noise,) = run_node("RandomNoise", noise_seed=5)
    custom = {"noise": noise, "guider": guider, "latent_image": empty}
    made = run_node("SamplerCustomAdvanced", **custom, sampler=sampler, sigmas=sigmas)[0]["samples"]
    assert sum(forwards) == 6
    run = {
        "model": model,
        "positive": positive,
        "negative": negative,
        "latent": empty,
        "seed": 5,
        "text_guidance": 7.0,
        "image_guidance": 1.0,
    }
    assert torch.equal(run_node("OpenSoraRectifiedFlowSampler", **run, steps=3)[0]["samples"], made)
    with pytest.raises(error, match="no whole run of this model"):
        run_node("SamplerCustomAdvanced", **custom, sampler=sampler, sigmas=sigmas[1:])
    (euler,) = run_node("KSamplerSelect", sampler_name="euler")
    with pytest.raises(error, match=f"Open-Sora {version} takes its own steps"):
        run_node("SamplerCustomAdvanced", **custom, sampler=euler, sigmas=sigmas)
    how = {"seed": 1, "steps": 2, "cfg": 7.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    with pytest.raises(error, match=f"Open-Sora {version} takes its own steps"):
        run_node("KSampler", model=model, positive=positive, negative=negative, latent_image=empty, **how)
    with pytest.raises(error, match="Leave it at 0"):
        run_node("OpenSoraScheduler", model=model, latent=empty, steps=3, shift=2.0)


def test_a_stock_sampler_makes_videos_of_text_and_refuses_given_frames(loaded, run_node, pack):
    model, clip, vae = loaded("1.2")
    positive, negative, _ = encoded(run_node, model, clip)
    empty = latent(model, pack, "1.2")
    how = {"seed": 1, "steps": 2, "cfg": 7.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    ready, *_ = run_node("OpenSoraScheduler", model=model, latent=empty, steps=2)
    made = run_node("KSampler", model=ready, positive=positive, negative=negative, latent_image=empty, **how)[0]
    assert torch.isfinite(made["samples"]).all()
    sides = {"positive": positive, "negative": negative}
    positive, negative, empty = run_node("OpenSoraImageToVideo", **sides, vae=vae, latent=empty, start_image=picture_of("1.2"), fit="crop")
    with pytest.raises(pack("opensora_core.errors").OpenSoraError, match="Use Open-Sora Sampler"):
        run_node("KSampler", model=ready, positive=positive, negative=negative, latent_image=empty, **how)


STRATEGIES = {
    "1.1": (8, "0,0,0,0,2;0,1,0,-1,1,0.4"),
    "1.2": (51, "0;0,1,0,5,5,0.4;0,0,0,-1"),
    "1.3": (33, "0;0,1,0,5,5,0.4;0,0,0,-1"),
}


@pytest.mark.parametrize("version", STRATEGIES)
def test_a_mask_strategy_is_the_librarys(loaded, library, run_node, pack, relative_error, version):
    model, clip, vae = loaded(version)
    positive, negative, _ = encoded(run_node, model, clip)
    count, strategy = STRATEGIES[version]
    moving = torch.rand(20, *SIZES[version], 3, generator=torch.Generator().manual_seed(4))
    sides = {"positive": positive, "negative": negative, "vae": vae, "latent": latent(model, pack, version, count)}
    positive, negative, empty = run_node(
        "OpenSoraMaskStrategy", **sides, strategy=strategy, reference_0=picture_of(version), reference_1=moving
    )
    run = {
        "model": model,
        "positive": positive,
        "negative": negative,
        "latent": empty,
        "seed": 5,
        "text_guidance": 7.0,
        "image_guidance": 1.0,
    }
    out = run_node("OpenSoraRectifiedFlowSampler", **run, steps=6)[0]["samples"]
    pipe, (height, width) = library(version), SIZES[version]
    expected = pipe(
        "a Red kite", height=height, width=width, num_frames=count, num_inference_steps=6, guidance_scale=7.0, seed=5, latents_only=True,
        references=[picture_of(version)[0], moving], mask_strategy=strategy,
    ).latents  # fmt: skip
    assert relative_error(pipe.latents.to_model(out.float()), expected) < 1e-2
    free = run_node("OpenSoraRectifiedFlowSampler", **{**run, "positive": sides["positive"], "negative": sides["negative"]}, steps=6)[0]
    assert relative_error(free["samples"], out) > 0.05, "the frames have no effect"
    error = pack("opensora_core.errors").OpenSoraError
    for changes, words in (
        ({"strategy": "0,1"}, "names reference 1; 1 are given"),
        ({"reference_2": moving}, "reference_2 is connected and reference_1 is not"),
        ({"strategy": "0,x"}, "reference is 'x'"),
        ({"reference_0": moving[:, :, :, :1], "strategy": "0"}, "height, width, 3"),
    ):
        with pytest.raises(error, match=words):
            run_node("OpenSoraMaskStrategy", **{**sides, "strategy": strategy, "reference_0": picture_of(version), **changes})


@pytest.mark.parametrize("version", ["1.1", "1.2", "1.3"])
def test_videos_go_on_as_the_librarys(loaded, library, run_node, pack, relative_error, version):
    model, clip, vae = loaded(version)
    pipe, (height, width) = library(version), SIZES[version]
    count = {"1.1": 8, "1.2": 34, "1.3": 33}[version]
    how = {"num_inference_steps": 3, "guidance_scale": 7.0, "seed": 5}
    first = pipe("a Red kite", height=height, width=width, num_frames=count, latents_only=True, **how)
    expected = pipe.extend(first, "a dog", segments=2, image_guidance_scale=5.0, **how)
    positive, negative, _ = encoded(run_node, model, clip, "a dog")
    inputs = {
        "model": model, "positive": positive, "negative": negative, "vae": vae, "latent": {"samples": pipe.latents.to_codec(first.latents)},
        "segments": 2, "seed": 5, "steps": 3, "text_guidance": 7.0, "image_guidance": 5.0,
    }  # fmt: skip
    whole, frames, file = run_node("OpenSoraContinueVideo", **inputs)
    with safe_open(file, "pt") as kept:
        assert kept.metadata()["frames"] == str(len(frames))
    assert relative_error(pipe.latents.to_model(whole["samples"].float()), expected.latents) < 1e-2
    assert len(frames) == len(expected.frames[0])
    again, *_ = run_node("OpenSoraContinueVideo", **inputs, clip=clip, prompts="a dog")
    assert relative_error(again["samples"], whole["samples"]) < 1e-4
    with pytest.raises(pack("opensora_core.errors").OpenSoraError, match="works on the latents of"):
        run_node("OpenSoraContinueVideo", **{**inputs, "vae": loaded("1.3" if version == "1.2" else "1.2")[2]})


@pytest.mark.parametrize("version", ["1.1", "1.2", "1.3"])
def test_a_clip_is_extended_as_the_librarys(loaded, library, run_node, pack, relative_error, version):
    model, clip, vae = loaded(version)
    positive, negative, _ = encoded(run_node, model, clip)
    count = {"1.1": 36, "1.2": 51, "1.3": 49}[version]
    moving = torch.rand(40, *SIZES[version], 3, generator=torch.Generator().manual_seed(4))
    sides = {"positive": positive, "negative": negative, "vae": vae, "latent": latent(model, pack, version, count)}
    positive, negative, empty = run_node("OpenSoraVideoToVideo", **sides, video=moving, direction="backwards", context="33")
    run = {
        "model": model,
        "positive": positive,
        "negative": negative,
        "latent": empty,
        "seed": 5,
        "text_guidance": 7.0,
        "image_guidance": 5.0,
    }
    out = run_node("OpenSoraRectifiedFlowSampler", **run, steps=2)[0]["samples"]
    pipe, (height, width) = library(version), SIZES[version]
    expected = pipe(
        "a Red kite", height=height, width=width, num_frames=count, num_inference_steps=2, guidance_scale=7.0, image_guidance_scale=5.0, seed=5,
        latents_only=True, video=moving, direction="backwards",
    ).latents  # fmt: skip
    assert relative_error(pipe.latents.to_model(out.float()), expected) < 1e-2


def test_a_wrong_pairing_is_one_sentence(loaded, run_node, pack):
    error = pack("opensora_core.errors").OpenSoraError
    model, clip, vae = loaded("1.2")
    other = loaded("1.1")[2]  # of as many channels
    empty, *_ = run_node(
        "OpenSoraEmptyLatent", model=model, size="custom", aspect_ratio="16:9", length="17", width=56, height=40, batch_size=1
    )
    positive, negative, _ = encoded(run_node, model, clip)
    sides = {"positive": positive, "negative": negative, "latent": empty}
    decode = {"latent": empty, "tile_size": 256, "overlap": 0.25, "temporal_tile": 0, "policy": "auto"}
    for node, inputs in (("OpenSoraImageToVideo", {**sides, "start_image": picture_of("1.2")}), ("OpenSoraTiledVAEDecode", decode)):
        with pytest.raises(error, match="Stable Diffusion VAE.* works on the latents of the Open-Sora 1.2 VAE"):
            run_node(node, vae=other, **inputs)
        with pytest.raises(error, match=r"This LATENT is \[1, 4, 5, 5, 7\]; the VAE given, the HunyuanVideo VAE"):
            run_node(node, vae=run_node("OpenSoraVAELoader", vae_name="hunyuan_vae.safetensors")[0], **inputs)
    model, clip, _ = loaded("1.0")
    positive, negative, _ = encoded(run_node, model, clip)
    sides = {"positive": positive, "negative": negative, "latent": latent(model, pack, "1.0")}
    positive, negative, empty = run_node("OpenSoraImageToVideo", vae=other, **sides, start_image=picture_of("1.0"))
    run = {
        "model": model,
        "positive": positive,
        "negative": negative,
        "latent": empty,
        "seed": 5,
        "text_guidance": 7.0,
        "image_guidance": 1.0,
    }
    with pytest.raises(error, match="Leave out image.*makes videos of a prompt alone"):
        run_node("OpenSoraRectifiedFlowSampler", **run, steps=2)


def test_a_wrong_pairing_is_said_before_anything_is_sampled(files, loaded, run_node, pack, monkeypatch):
    from comfy_execution.graph import DynamicPrompt

    import nodes

    model, clip, _ = loaded("1.2")
    positive, negative, _ = encoded(run_node, model, clip)
    given = {"model": model, "positive": positive, "negative": negative, "text_guidance": 7.0, "image_guidance": 1.0}
    run = {**given, "latent": latent(model, pack, "1.2"), "seed": 5, "steps": 1}
    graph = {
        "8:1": {"class_type": "any", "inputs": {}},
        "2": {"class_type": "SamplerCustomAdvanced", "inputs": {"guider": ["8:1", 0]}},
        "3": {"class_type": "OpenSoraVAELoader", "inputs": {"vae_name": files["1.1"]}},
        "4": {"class_type": "VAEDecode", "inputs": {"samples": ["2", 0], "vae": ["3", 0]}},
        "5": {"class_type": "VAEEncode", "inputs": {"pixels": ["4", 0], "vae": ["6", 0]}},
        "6": {"class_type": "VAELoader", "inputs": {"vae_name": "hunyuan_vae.safetensors"}},
    }
    for node_id, inputs in (("OpenSoraRectifiedFlowSampler", run), ("OpenSoraGuider", given)):
        node = nodes.NODE_CLASS_MAPPINGS[node_id]
        hidden = {"hidden_inputs": {"UNIQUE_ID": "8:1", "DYNPROMPT": DynamicPrompt(graph)}}
        for name, wrong in ((files["1.1"], True), (files["1.2"], False), ("taesd", False)):
            graph["3"]["inputs"]["vae_name"] = name
            call = node.PREPARE_CLASS_CLONE(hidden).EXECUTE_NORMALIZED
            with torch.inference_mode():
                if not wrong:
                    call(**inputs)
                    continue
                with pytest.raises(
                    pack("opensora_core.errors").OpenSoraError, match="open_sora_1.1.* Diffusion VAE.* works on .* Open-Sora 1.2 VAE"
                ):
                    call(**inputs)


@pytest.mark.parametrize("given", [False, True], ids=["t2v", "i2v"])
@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_a_calibrated_plan_is_as_far_from_exact_as_it_says(loaded, run_node, pack, base, monkeypatch, version, given):
    monkeypatch.setattr(pack("opensora_core.run.calibrate"), "MEASURED_POINTS", (9,))
    model, clip, vae = loaded(version)
    positive, negative, _ = encoded(run_node, model, clip)
    empty, scales = latent(model, pack, version), {"text_guidance": 7.0, "image_guidance": 5.0}
    if given:
        sides = {"positive": positive, "negative": negative}
        positive, negative, empty = run_node(
            "OpenSoraImageToVideo", **sides, vae=vae, latent=empty, start_image=picture_of(version), fit="crop"
        )
    asked = {"model": model, "positive": positive, "negative": negative, "latent": empty, "seed": 5, **scales}
    run_node("OpenSoraCalibrate", **{name: [value] for name, value in asked.items()})
    (file,) = (base / "models/open_sora_plans").iterdir()
    (error,) = [one["error"] for one in json.loads(file.read_text())["plans"] if len(one["points"]) == 10]
    near, exact = (
        model.model.process_latent_in(run_node("OpenSoraRectifiedFlowSampler", **asked, steps=30, speed=speed)[0]["samples"].float())
        for speed in ("draft", "exact")
    )
    file.unlink()
    assert ((near - exact).norm() / exact.norm()).item() == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_model_that_has_no_speed_is_not_calibrated(loaded, run_node, pack, version):
    model, clip, _ = loaded(version)
    positive, negative, _ = encoded(run_node, model, clip)
    asked = {"model": model, "positive": positive, "negative": negative, "latent": latent(model, pack, version), "seed": 5}
    with pytest.raises(pack("opensora_core.errors").OpenSoraError, match="sampled by another process"):
        run_node("OpenSoraCalibrate", **{name: [value] for name, value in asked.items()}, text_guidance=[7.0], image_guidance=[1.0])


def test_a_temporal_file_beside_sdxl_s_vae_is_one_vae(files, loaded, base, run_node, pack):
    whole = loaded("1.2")[2]
    state = load_file(base / "models" / "vae" / files["1.2"])
    folder, spatial = base / "models" / "vae" / "halves", "spatial_vae.module."
    folder.mkdir()
    save_file(
        {key.removeprefix("temporal_vae."): value for key, value in state.items() if key.startswith("temporal_vae.")},
        folder / "t.safetensors",
    )
    error, name = pack("opensora_core.errors").OpenSoraError, "halves/t.safetensors"
    with pytest.raises(error, match="is the temporal half of the Open-Sora 1.2 VAE.*none lies beside it"):
        run_node("OpenSoraVAELoader", vae_name=name)
    save_file(
        {key.removeprefix(spatial): value for key, value in state.items() if key.startswith(spatial)}, folder / "sdxl_vae.safetensors"
    )
    vae = run_node("OpenSoraVAELoader", vae_name=name)[0]
    latents = torch.randn(1, 4, 5, 5, 7, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(vae.decode(latents), whole.decode(latents))


@pytest.mark.parametrize("version", SIZES)
def test_the_stock_loader_gives_the_same_model_and_a_lora_changes_it(files, loaded, run_node, pack, base, relative_error, version):
    model, clip, _ = loaded(version)
    positive, negative, _ = encoded(run_node, model, clip)
    run = {
        "positive": positive,
        "negative": negative,
        "latent": latent(model, pack, version),
        "seed": 5,
        "text_guidance": 7.0,
        "image_guidance": 1.0,
    }

    def made(of):
        return run_node("OpenSoraRectifiedFlowSampler", model=of, **run, steps=2)[0]["samples"]

    stock = run_node("UNETLoader", unet_name=files[version], weight_dtype="default")[0]
    assert type(stock.model).__name__ == type(model.model).__name__ and torch.equal(made(stock), made(model))
    layer = "blocks.0.mlp.fc1" if version < "1.2" else "spatial_blocks.0.mlp.fc1"
    out, into = next(
        shape for name, shape in ((n, p.shape) for n, p in model.model.diffusion_model.named_parameters()) if name == f"{layer}.weight"
    )
    lora = {f"base_model.model.{layer}.lora_A.weight": torch.randn(2, into), f"base_model.model.{layer}.lora_B.weight": torch.randn(out, 2)}
    save_file(lora, base / "models" / "loras" / f"lora_{version}.safetensors")
    (changed,) = run_node("OpenSoraLoraLoader", model=model, lora_name=f"lora_{version}.safetensors", strength=1.0)
    (without,) = run_node("OpenSoraLoraLoader", model=model, lora_name=f"lora_{version}.safetensors", strength=0.0)
    assert relative_error(made(changed), made(model)) > 1e-3 and torch.equal(made(without), made(model))


@pytest.mark.parametrize("version", SIZES)
def test_a_run_can_be_interrupted_and_its_preview_has_the_vaes_colours(loaded, run_node, pack, monkeypatch, version):
    import comfy.latent_formats
    import comfy.model_management

    model, clip, _ = loaded(version)
    positive, negative, _ = encoded(run_node, model, clip)
    empty = latent(model, pack, version)
    run = {
        "model": model,
        "positive": positive,
        "negative": negative,
        "latent": empty,
        "seed": 5,
        "text_guidance": 7.0,
        "image_guidance": 1.0,
    }
    steps, euler = [], pack("opensora_core.sampling.run").run

    def stopping(predict, *more, **named):
        def counted(x, step):
            steps.append(step)
            if step == 1:
                comfy.model_management.interrupt_current_processing()
            return predict(x, step)

        return euler(counted, *more, **named)

    monkeypatch.setattr(pack("opensora_core.sampling.run"), "run", stopping)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run_node("OpenSoraRectifiedFlowSampler", **run, steps=4)
    assert steps == [0, 1]
    colours = pack("nodes.host.preview").colours(model)
    if version < "1.2":
        assert torch.equal(colours[0], torch.tensor(comfy.latent_formats.SD15().latent_rgb_factors).T)
    else:
        assert colours is None, "nobody knows these colours: grey"


@pytest.mark.parametrize(("version", "frames"), [("1.0", 16), ("1.1", 16), ("1.2", 51), ("1.3", 49)])
def test_preflight_plans_in_the_models_own_sizes(files, run_node, pack, version, frames):
    import nodes

    asked = {"model_name": files[version], "precision": "auto", "offload": "auto"}
    report, *_ = run_node("OpenSoraPreflight", width=426, height=240, num_frames=frames, **asked)
    assert f"{frames} frames" in report and "426x240 (width x height)" in report
    node = nodes.NODE_CLASS_MAPPINGS["OpenSoraPreflight"]
    size = {"width": 426, "height": 240, "model_name": files[version]}
    assert node.validate_inputs(num_frames=frames, **size) is True
    if version >= "1.2":
        assert f"num_frames={frames + 1} is not" in str(node.validate_inputs(num_frames=frames + 1, **size))
