"""CogVideoX over HTTP: from a prompt, and a picture, to a saved video, with the model's own numbers and a plan of the memory."""

import pytest
from safetensors.torch import save_file

from tests.golden import cogvideox_files as files

VAE, T5 = "cogvideox_vae.safetensors", "t5_cogvideox.safetensors"


@pytest.fixture(scope="module", autouse=True)
def written(server):
    models = server.base / "models"
    for name in ("2b", "1.5_5b_i2v"):
        save_file(files.network(name).state_dict(), models / "diffusion_models" / f"cogvideox_{name}.safetensors")
    save_file(files.vae().state_dict(), models / "vae" / VAE)
    save_file(files.t5(), models / "text_encoders" / T5)


def graph(name, length, loader="OpenSoraModelLoader", picture=False) -> dict:
    """A clip of 80x48 with the steps and scales that the model is usually asked for, but two steps."""
    file = f"cogvideox_{name}.safetensors"
    size = {"size": "custom", "aspect_ratio": "16:9", "length": length, "width": 80, "height": 48, "batch_size": 1}
    texts = {"prompt": "a kite", "negative_prompt": "", "motion_score": 4, "fps": 24, "model": ["model", 0], "unconditional": "zero"}
    sampling = {"seed": 1, "steps": 2, "text_guidance": ["usual", 1], "image_guidance": ["usual", 2], "latent": ["latent", 0]}
    sampling |= {"text_oscillation": True, "image_oscillation": True, "temporal_ramp": True, "shift": 0.0}
    sampling |= {"noise_device": "cpu", "latent_dtype": "fp32", "solver": "dpm", "guidance_curve": "by index"}
    stock = loader == "UNETLoader"
    named = {"unet_name": file, "weight_dtype": "default"} if stock else {"model_name": file, "precision": ["plan", 1]}
    encoders = {"t5_name": T5, "clip_l_name": "none (T5 alone)", "precision": "auto", "device": "auto"}
    planned = {"width": 80, "height": 48, "num_frames": 49, "model_name": file, "precision": "auto", "offload": "auto", "length": length}
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
    if picture:
        nodes["picture"] = ("EmptyImage", {"width": 90, "height": 70, "batch_size": 1, "color": 255})
        given = {"positive": ["text", 0], "negative": ["text", 1], "vae": ["vae", 0], "latent": ["latent", 0]}
        nodes["image"] = ("OpenSoraImageToVideo", {**given, "start_image": ["picture", 0], "fit": "crop", "condition_scale": "diffusers"})
        nodes["sampler"][1].update(positive=["image", 0], negative=["image", 1], latent=["image", 2])
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}


@pytest.mark.parametrize("loader", ["OpenSoraModelLoader", "UNETLoader"])
def test_text_to_video(listen, loader):
    events = listen(graph("2b", "9", loader))
    assert events.error is None and len(events.outputs["frames"]["images"]) == 9 and events.outputs["save"]
    (report,) = events.outputs["plan"]["text"]
    assert "9 frames, 50 steps, text to video: 100 forwards" in report


def test_picture_to_video(listen):
    events = listen(graph("1.5_5b_i2v", "17", picture=True))
    assert events.error is None and len(events.outputs["frames"]["images"]) == 17
    assert "17 frames" in events.outputs["plan"]["text"][0]


@pytest.mark.parametrize(
    ("name", "length", "node", "words"),
    [
        ("2b", "13", "plan", "not 8k+1; use 9 or 17"),
        ("2b", "57", "plan", "longer than this model can make; use at most 49"),
        ("1.5_5b_i2v", "17", "sampler", "makes videos of a picture; give it one"),
    ],
)
def test_what_does_not_fit_is_said(listen, name, length, node, words):
    events = listen(graph(name, length))
    assert events.error["node_id"] == node and words in events.error["exception_message"]
