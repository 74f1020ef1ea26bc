"""Open-Sora 1.2 and 1.3 inside a host: loaded by our loaders, read and sampled as the library does, given frames included."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
WIDTH, HEIGHT, SIDE = 16, 40, 56
FRAMES = {"1.2": 17, "1.3": 17}


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
    for version in ("1.2", "1.3"):
        shapes = {name: tuple(shape) for name, shape in info[version]["shapes"].items()} | {"y_embedder.y_embedding": (300, WIDTH)}
        for folder, of in (
            ("diffusion_models", shapes),
            ("vae", {name: tuple(shape) for name, shape in info[version]["vae_shapes"].items()}),
        ):
            state = {name: tensor.contiguous() for name, tensor in weights(of).items()}
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


def latent(model, pack, version):
    config = model.model.config
    shape = (1, config.in_channels, config.grid.latent_frames(FRAMES[version]), *config.grid.latent_size(HEIGHT, SIDE))
    return {"samples": torch.zeros(shape)}


@pytest.mark.parametrize("version", ["1.2", "1.3"])
@pytest.mark.parametrize("given", [False, True])
def test_a_run_is_the_librarys(loaded, library, run_node, pack, relative_error, version, given):
    model, clip, vae = loaded(version)
    assert type(model.model).__name__ == f"OpenSora1{version[-1]}Model"
    positive, negative, text = run_node(
        "OpenSoraT5TextEncode",
        clip=clip,
        prompt="a Red kite",
        negative_prompt="",
        motion_score=4,
        fps=24,
        model=model,
        camera_motion="static",
    )
    assert text.endswith("camera motion: static.") and positive[0][1]["attention_mask"].sum() < 40
    empty, picture = latent(model, pack, version), torch.rand(1, HEIGHT, SIDE, 3, generator=torch.Generator().manual_seed(1))
    options, said = pack("opensora_core.run.request").SamplingOptions(camera_motion="static"), {}
    if given:
        said["image"] = picture[0]
        sides = {"positive": positive, "negative": negative}
        positive, negative, empty = run_node("OpenSoraImageToVideo", **sides, vae=vae, latent=empty, start_image=picture, fit="crop")
    out = run_node(
        "OpenSoraRectifiedFlowSampler", model=model, positive=positive, negative=negative, latent=empty, seed=5, steps=13, text_guidance=7.0, image_guidance=5.0,
    )[0]["samples"]  # fmt: skip
    pipe = library(version)
    expected = pipe(
        "a Red kite", height=HEIGHT, width=SIDE, num_frames=FRAMES[version], num_inference_steps=13, guidance_scale=7.0, image_guidance_scale=5.0, seed=5,
        options=options, latents_only=True, **said,
    ).latents  # fmt: skip
    assert relative_error(pipe.latents.to_model(out.float()), expected) < 1e-2  # the host's T5 is near the library's, not equal
    frames = run_node(
        "OpenSoraTiledVAEDecode", vae=vae, latent={"samples": out}, tile_size=256, overlap=0.25, temporal_tile=0, policy="auto"
    )[0]
    assert frames.shape == (FRAMES[version], 40, 56, 3)


def test_a_stock_sampler_makes_videos_of_text_and_refuses_given_frames(loaded, run_node, pack):
    model, clip, vae = loaded("1.2")
    positive, negative, _ = run_node(
        "OpenSoraT5TextEncode", clip=clip, prompt="a kite", negative_prompt="", motion_score=4, fps=24, model=model
    )
    empty = latent(model, pack, "1.2")
    how = {"seed": 1, "steps": 2, "cfg": 7.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    ready, _ = run_node("OpenSoraScheduler", model=model, latent=empty, steps=2)
    made = run_node("KSampler", model=ready, positive=positive, negative=negative, latent_image=empty, **how)[0]
    assert torch.isfinite(made["samples"]).all()
    picture = torch.zeros(1, HEIGHT, SIDE, 3)
    sides = {"positive": positive, "negative": negative}
    positive, negative, empty = run_node("OpenSoraImageToVideo", **sides, vae=vae, latent=empty, start_image=picture, fit="crop")
    with pytest.raises(pack("opensora_core.errors").OpenSoraError, match="use Open-Sora Sampler"):
        run_node("KSampler", model=ready, positive=positive, negative=negative, latent_image=empty, **how)
