"""The high-compression variant inside a host: whole runs equal the reference's, stock nodes work, and wrong pairs are refused first."""

import shutil
from pathlib import Path

import comfy.model_management
import pytest
import torch
from safetensors.torch import load_file

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
MODEL, VAE = "Open_Sora_v2_Video_DC_AE.safetensors", "F32T4C128_AE.safetensors"


@pytest.fixture(scope="module")
def recorded():
    return load_file(GOLDEN / "dc_ae_runs.safetensors")


@pytest.fixture(scope="module", autouse=True)
def files(base):
    shutil.copy(GOLDEN / "dc_ae_transformer_weights.safetensors", base / "models" / "diffusion_models" / MODEL)
    shutil.copy(GOLDEN / "dc_ae_weights.safetensors", base / "models" / "vae" / VAE)


@pytest.fixture(scope="module")
def model(run_node, files):
    return run_node("OpenSoraModelLoader", model_name=MODEL, precision="fp32", offload="auto", budget_gib=8.0)[0]


@pytest.fixture(scope="module")
def vae(run_node, files):
    return run_node("OpenSoraVAELoader", vae_name=VAE)[0]


@pytest.fixture(scope="module")
def prompts(recorded):
    return tuple([[recorded["context"][i : i + 1], {"pooled_output": recorded["y"][i : i + 1]}]] for i in range(2))


def clip(run_node, model, height, width, frames, batch=1):
    settings = {"resolution": "custom", "aspect_ratio": "16:9", "width": width, "height": height}
    return run_node("OpenSoraEmptyLatentHighCompression", **settings, num_frames=frames, batch_size=batch, model=model)[0]


def sample(run_node, model, positive, negative, latent, steps=12):
    return run_node(
        "OpenSoraRectifiedFlowSampler", model=model, positive=positive, negative=negative, latent=latent, seed=7, steps=steps,
        text_guidance=7.5, image_guidance=3.0,
    )[0]  # fmt: skip


@pytest.mark.parametrize(("name", "size"), [("t2v", (64, 96, 8)), ("head", (96, 64, 12)), ("loop", (64, 64, 16)), ("tiled", (288, 32, 36))])
def test_a_run_ends_at_the_references_frames(run_node, model, vae, prompts, recorded, relative_error, name, size):
    latent = clip(run_node, model, *size)
    positive, negative = prompts
    if name != "t2v":
        pictures = (recorded["blocks"].repeat_interleave(8, 1).repeat_interleave(8, 2).float() / 255).split(1)
        given = {"start_image": pictures[0]} | ({"end_image": pictures[1]} if name == "loop" else {})
        positive, negative, latent = run_node("OpenSoraImageToVideo", positive=positive, negative=negative, vae=vae, latent=latent, **given)
    finished = sample(run_node, model, positive, negative, latent)
    assert relative_error(finished["samples"], recorded[f"{name}.latents"]) < 2e-4
    decoded = run_node("OpenSoraTiledVAEDecode", vae=vae, latent=finished, tile_size=256, overlap=0.25, temporal_tile=0, policy="auto")[0]
    expected = ((recorded[f"{name}.pixels"][0].permute(1, 2, 3, 0) + 1) / 2).clamp(0, 1)
    assert decoded.shape == (size[2], size[0], size[1], 3)
    assert (decoded[:, ::5, ::5] - expected).abs().max() < 2e-4
    stock = run_node("VAEDecode", vae=vae, samples=finished)[0]
    assert torch.equal(stock, decoded)


def test_a_clip_past_the_makers_tile_is_decoded_whole_where_that_is_asked(run_node, model, vae):
    shape = clip(run_node, model, 64, 64, 48)["samples"].shape
    latent = {"samples": torch.randn(shape, generator=torch.Generator().manual_seed(1))}
    asked = {"vae": vae, "latent": latent, "tile_size": 256, "overlap": 0.25, "policy": "exact"}
    whole, cut, made = (run_node("OpenSoraTiledVAEDecode", **asked, temporal_tile=tile)[0] for tile in (-4, 32, 0))
    assert whole.shape == cut.shape == (48, 64, 64, 3)
    assert torch.equal(made, cut) and not torch.equal(whole, cut)


def test_stock_encode_decode_and_tiled_nodes(run_node, vae, pack):
    frames = torch.rand(12, 64, 96, 3, generator=torch.Generator().manual_seed(1))
    latent = run_node("VAEEncode", vae=vae, pixels=frames)[0]
    assert latent["samples"].shape == (1, 8, 3, 2, 3)
    assert torch.equal(
        latent["samples"],
        run_node("OpenSoraTiledVAEEncode", vae=vae, image=frames, tile_size=256, overlap=0.25, posterior="mode", seed=0)[0]["samples"],
    )
    again = run_node("VAEDecode", vae=vae, samples=latent)[0]
    assert again.shape in ((12, 64, 96, 3), (1, 12, 64, 96, 3))
    tiled = run_node("VAEDecodeTiled", vae=vae, samples=latent, tile_size=64, overlap=32, temporal_size=64, temporal_overlap=8)[0]
    assert tiled.shape[-4:] == (12, 64, 96, 3)
    assert run_node("VAEEncodeTiled", vae=vae, pixels=frames, tile_size=64, overlap=32, temporal_size=64, temporal_overlap=8)[0][
        "samples"
    ].shape == (1, 8, 3, 2, 3)
    assert vae.memory_used_decode((1, 8, 3, 2, 3), torch.float32) > 0 < vae.memory_used_encode((1, 3, 12, 64, 96), torch.float32)
    assert vae.spacial_compression_decode() == 32 and vae.temporal_compression_decode() == 4


def test_stock_sampler_takes_an_empty_latent_of_the_other_kind(run_node, model, prompts):
    """The host itself makes channels and size of an empty latent the model's."""
    latent = run_node(
        "OpenSoraEmptyLatentVideo", resolution="custom", aspect_ratio="16:9", num_frames=9, width=96, height=64, batch_size=1
    )[0]
    finished = run_node(
        "KSampler", model=model, seed=1, steps=2, cfg=2.0, sampler_name="euler", scheduler="simple", positive=prompts[0], negative=prompts[1],
        latent_image=latent, denoise=1.0,
    )[0]  # fmt: skip
    assert finished["samples"].shape == (1, 8, 3, 2, 3) and finished["samples"].isfinite().all()


def test_what_the_host_knows_of_the_model(model, pack):
    latent_format = model.model.latent_format
    assert (latent_format.latent_channels, latent_format.spacial_downscale_ratio, latent_format.scale_factor) == (8, 32, 1.0)
    assert model.model.memory_usage_factor == 4 * pack("nodes.host.families").ROWS[0].memory_factor
    assert model.model.process_latent_in(torch.ones(1)).item() == 1


def test_wrong_pairs_are_refused_before_anything_is_computed(run_node, model, vae, prompts, pack, monkeypatch):
    def computed(*args, **kwargs):
        raise AssertionError("something was loaded")

    error = pack("opensora_core.errors").OpenSoraError
    other_model = run_node("OpenSoraModelLoader", model_name="Open_Sora_v2.safetensors", precision="fp32", offload="auto", budget_gib=8.0)[
        0
    ]
    other_vae = run_node("OpenSoraVAELoader", vae_name="hunyuan_vae.safetensors")[0]
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", computed)
    mine = clip(run_node, model, 64, 96, 8)
    other = run_node("OpenSoraEmptyLatentVideo", resolution="custom", aspect_ratio="16:9", num_frames=9, width=96, height=64, batch_size=1)[
        0
    ]
    positive, negative = prompts
    picture = {"positive": positive, "negative": negative, "start_image": torch.zeros(1, 64, 96, 3)}
    decode = {"tile_size": 256, "overlap": 0.25, "temporal_tile": 0, "policy": "auto"}
    encode = {"vae": vae, "tile_size": 256, "overlap": 0.25, "posterior": "mode", "seed": 0}
    for says, run in (
        (r"\[1, 16, 3, 8, 12\]; this model denoises \[videos, 8, .*height / 32.*\(High Compression\)", lambda: sample(run_node, model, *prompts, other)),
        (r"\[1, 8, 2, 2, 3\]; this model denoises \[videos, 16, .*Empty Latent Video", lambda: sample(run_node, other_model, *prompts, mine)),
        (r"the Video DC-AE of the high-compression variant, works on \[videos, 8", lambda: run_node("OpenSoraTiledVAEDecode", vae=vae, latent=other, **decode)),
        ("the HunyuanVideo VAE, works on", lambda: run_node("OpenSoraTiledVAEDecode", vae=other_vae, latent=mine, **decode)),
        ("the Video DC-AE of the high-compression variant", lambda: run_node("OpenSoraImageToVideo", vae=vae, latent=other, **picture)),
        ("the HunyuanVideo VAE, works on", lambda: run_node("OpenSoraImageToVideo", vae=other_vae, latent=mine, **picture)),
        ("Use at least 8 frames", lambda: run_node("OpenSoraImageToVideo", vae=vae, latent={"samples": mine["samples"][:, :, :1]}, **picture)),
        ("not its high-compression variant", lambda: clip(run_node, other_model, 64, 96, 8)),
        ("Use 12 or 16.*8, 12, ... 128", lambda: run_node("OpenSoraTiledVAEEncode", image=torch.zeros(13, 64, 96, 3), **encode)),
        ("multiples of 32", lambda: run_node("OpenSoraTiledVAEEncode", image=torch.zeros(12, 64, 80, 3), **encode)),
        ("goes on from no clip", lambda: run_node(
            "OpenSoraVideoToVideo", positive=positive, negative=negative, vae=vae, latent=mine, video=torch.zeros(40, 64, 96, 3),
            direction="forwards", context="33",
        )),
    ):  # fmt: skip
        with pytest.raises(error, match=says) as caught:
            run()
        assert "\n" not in str(caught.value)


def test_the_node_offers_the_released_sizes(run_node, pack):
    latent, width, height, fps = run_node(
        "OpenSoraEmptyLatentHighCompression", resolution="768px", aspect_ratio="16:9", num_frames=128, width=1024, height=576, batch_size=2
    )
    assert (width, height, fps) == (1024, 576, 24.0)
    assert latent["samples"].shape == (2, 128, 32, 18, 32) and latent["downscale_ratio_spacial"] == 32
    node = pack("nodes.latents").OpenSoraEmptyLatentHighCompression
    assert node.validate_inputs(resolution="768px", num_frames=126, width=1024, height=576).startswith("Use 124 or 128: ")
    assert "Use 64x96" in node.validate_inputs(resolution="custom", num_frames=128, width=80, height=64)
    assert node.validate_inputs(resolution="768px", num_frames=128, width=100, height=100) is True  # not used


def test_preflight_plans_the_frames_that_the_variant_has(run_node):
    settings = {"model_name": MODEL, "precision": "auto", "offload": "auto"}
    report = run_node("OpenSoraPreflight", width=96, height=64, num_frames=13, **settings)[0]
    assert "\nThe high-compression variant has clips of 4k frames: planned for 12." in report and "12 frames" in report
