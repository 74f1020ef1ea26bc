"""CogVideoX over HTTP: from a prompt, and a picture, to a saved video, with the model's own numbers and a plan of the memory."""

import pytest
import torch
from safetensors.torch import save_file

from opensora_core.networks.cogvideox import layout
from tests.golden import cogvideox_files as files

VAE, T5 = "cogvideox_vae.safetensors", "t5_cogvideox.safetensors"
NAMES = ("2b", "5b", "5b_i2v", "1.5_5b", "1.5_5b_i2v")
SHARDS = ("diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model-00002-of-00002.safetensors")
SAT, BARE_SAT, HOST = "mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt", "cogvideox_host.safetensors"


@pytest.fixture(scope="module", autouse=True)
def written(server, tmp_path_factory):
    models = server.base / "models"
    place = models / "diffusion_models"
    for name in NAMES:
        save_file(files.network(name).state_dict(), place / f"cogvideox_{name}.safetensors")
    folder = files.write(tmp_path_factory.mktemp("cogvideox") / "5b", "5b") / "transformer"
    for name in SHARDS:
        (folder / name).rename(place / name)
    whole = files.sat(files.network("1.5_5b").state_dict())
    torch.save(whole, place / SAT)
    torch.save({"module": whole["module"]}, place / BARE_SAT)
    save_file(files.in_layout(files.network("1.5_5b_i2v").state_dict(), layout.HOST), place / HOST)
    save_file(files.vae().state_dict(), models / "vae" / VAE)
    save_file(files.t5(), models / "text_encoders" / T5)


def graph(name, length, loader="OpenSoraModelLoader", file="") -> dict:
    """A clip of 80x48, or the one size of 5B-I2V, with the steps and scales that the model is usually asked for, but two steps."""
    file, height, width = file or f"cogvideox_{name}.safetensors", *((480, 720) if name == "5b_i2v" else (48, 80))
    size = {"size": "custom", "aspect_ratio": "16:9", "length": length, "width": width, "height": height, "batch_size": 1}
    texts = {"prompt": "a kite", "negative_prompt": "", "motion_score": 4, "fps": 24, "model": ["model", 0], "unconditional": "zero"}
    sampling = {"seed": 1, "steps": 2, "text_guidance": ["usual", 1], "image_guidance": ["usual", 2], "latent": ["latent", 0]}
    sampling |= {"text_oscillation": True, "image_oscillation": True, "temporal_ramp": True, "shift": 0.0}
    sampling |= {"noise_device": "cpu", "latent_dtype": "fp32", "solver": "dpm", "guidance_curve": "by index"}
    stock = loader == "UNETLoader"
    named = {"unet_name": file, "weight_dtype": "default"} if stock else {"model_name": file, "precision": ["plan", 1]}
    encoders = {"t5_name": T5, "clip_l_name": "none (T5 alone)", "precision": "auto", "device": "auto"}
    planned = {
        "width": width,
        "height": height,
        "num_frames": 49,
        "model_name": file,
        "precision": "auto",
        "offload": "auto",
        "length": length,
    }
    nodes = {
        "plan": ("OpenSoraPreflight", planned),
        "model": (loader, named),
        "usual": ("OpenSoraDefaults", {"model": ["model", 0]}),
        "vae": ("OpenSoraVAELoader", {"vae_name": VAE}),
        "clip": ("OpenSoraTextEncoderLoader", encoders),
        "text": ("OpenSoraT5TextEncode", {"clip": ["clip", 0], **texts}),
        "latent": ("OpenSoraEmptyLatent", {"model": ["model", 0], **size}),
        "sampler": ("OpenSoraRectifiedFlowSampler", {"model": ["model", 0], "positive": ["text", 0], "negative": ["text", 1], **sampling}),
        "decode": ("VAEDecode", {"vae": ["vae", 0], "samples": ["sampler", 0]}),
        "frames": ("SaveImage", {"images": ["decode", 0], "filename_prefix": "cogvideox"}),
        "video": ("CreateVideo", {"images": ["decode", 0], "fps": ["latent", 4]}),
        "save": ("SaveVideo", {"video": ["video", 0], "filename_prefix": "cogvideox", "format": "auto", "codec": "auto"}),
    }  # fmt: skip
    if name.endswith("i2v"):
        nodes["picture"] = ("EmptyImage", {"width": 90, "height": 70, "batch_size": 1, "color": 255})
        given = {"positive": ["text", 0], "negative": ["text", 1], "vae": ["vae", 0], "latent": ["latent", 0]}
        nodes["image"] = ("OpenSoraImageToVideo", {**given, "start_image": ["picture", 0], "fit": "crop", "condition_scale": "diffusers"})
        nodes["sampler"][1].update(positive=["image", 0], negative=["image", 1], latent=["image", 2])
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}


@pytest.mark.parametrize(
    ("name", "loader", "file"),
    [
        *((name, "OpenSoraModelLoader", "") for name in NAMES),
        ("2b", "UNETLoader", ""),
        ("5b_i2v", "UNETLoader", ""),
        ("1.5_5b_i2v", "UNETLoader", ""),
        ("5b", "OpenSoraModelLoader", SHARDS[0]),
        ("1.5_5b", "OpenSoraModelLoader", SAT),
        ("1.5_5b", "UNETLoader", BARE_SAT),
        ("1.5_5b_i2v", "OpenSoraModelLoader", HOST),
    ],
)
def test_from_a_prompt_or_a_picture_to_a_video(listen, name, loader, file):
    length = 17 if name.startswith("1.5") else 9
    events = listen(graph(name, str(length), loader, file))
    assert events.error is None, events.error
    assert len(events.outputs["frames"]["images"]) == length and events.outputs["save"]
    (report,) = events.outputs["plan"]["text"]
    assert f"{length} frames, 50 steps, {'with reference picture' if name.endswith('i2v') else 'text to video'}: 100 forwards" in report


@pytest.mark.parametrize(
    ("name", "length", "node", "words"),
    [
        ("2b", "13", "plan", "Use 9 or 17"),
        ("2b", "57", "plan", "Use at most 49: num_frames=57 is longer than this model can make"),
        ("1.5_5b_i2v", "17", "sampler", "Give a picture (image): "),
    ],
)
def test_what_does_not_fit_is_said(listen, name, length, node, words):
    asked = graph(name, length)
    if node == "sampler":
        asked["sampler"]["inputs"] |= {"positive": ["text", 0], "negative": ["text", 1], "latent": ["latent", 0]}
    events = listen(asked)
    assert events.error["node_id"] == node and words in events.error["exception_message"]
