"""The high-compression variant over HTTP, from prompt and picture to frames: its own nodes, a stock sampler and decoder, wrong pairs."""

import pytest

MODEL, VAE = "Open_Sora_v2_Video_DC_AE.safetensors", "F32T4C128_AE.safetensors"


def graph(with_picture=False, vae=VAE) -> dict:
    """8 frames of 64x64, text to video or from a picture."""
    size = {"resolution": "custom", "aspect_ratio": "16:9", "num_frames": 8, "width": 64, "height": 64, "batch_size": 1}
    texts = {"prompt": "a cat", "negative_prompt": "", "motion_score": 4, "fps": 24, "keep_encoded": False}
    sampling = {"seed": 1, "steps": 2, "text_guidance": 7.5, "image_guidance": 3.0, "latent": ["latent", 0]}
    sampling |= {"text_oscillation": True, "image_oscillation": True, "temporal_ramp": True, "shift": 0.0}
    sampling |= {"noise_device": "cpu", "latent_dtype": "fp32"}
    encoders = {"t5_name": "t5xxl.safetensors", "clip_l_name": "clip_l.safetensors", "precision": "auto", "device": "auto"}
    nodes = {
        "model": ("OpenSoraModelLoader", {"model_name": MODEL, "precision": "fp32"}),
        "vae": ("OpenSoraVAELoader", {"vae_name": vae}),
        "clip": ("OpenSoraTextEncoderLoader", encoders),
        "text": ("OpenSoraT5TextEncode", {"clip": ["clip", 0], **texts}),
        "latent": ("OpenSoraEmptyLatentHighCompression", {**size, "model": ["model", 0]}),
        "sampler": ("OpenSoraRectifiedFlowSampler", {"model": ["model", 0], "positive": ["text", 0], "negative": ["text", 1], **sampling}),
        "decode": ("OpenSoraTiledVAEDecode", {
            "vae": ["vae", 0], "latent": ["sampler", 0], "tile_size": 256, "overlap": 0.25, "temporal_tile": 0, "policy": "auto",
        }),
        "save": ("SaveImage", {"images": ["decode", 0], "filename_prefix": "high"}),
    }  # fmt: skip
    if with_picture:
        nodes["picture"] = ("EmptyImage", {"width": 90, "height": 70, "batch_size": 1, "color": 255})
        given = {
            "positive": ["text", 0],
            "negative": ["text", 1],
            "vae": ["vae", 0],
            "latent": ["latent", 0],
            "start_image": ["picture", 0],
        }
        nodes["image"] = ("OpenSoraImageToVideo", {**given, "fit": "crop"})
        nodes["sampler"][1].update(positive=["image", 0], negative=["image", 1], latent=["image", 2])
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}


@pytest.mark.parametrize("with_picture", [False, True])
def test_a_video(listen, with_picture):
    events = listen(graph(with_picture))
    assert events.error is None and len(events.outputs["save"]["images"]) == 8


def test_stock_sampler_and_decoder(listen):
    nodes = graph()
    stock = {
        "seed": 1,
        "steps": 2,
        "cfg": 2.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "denoise": 1.0,
        "latent_image": ["latent", 0],
    }
    nodes["sampler"] = {
        "class_type": "KSampler",
        "inputs": {**stock, "model": ["model", 0], "positive": ["text", 0], "negative": ["text", 1]},
    }
    nodes["decode"] = {"class_type": "VAEDecode", "inputs": {"vae": ["vae", 0], "samples": ["sampler", 0]}}
    events = listen(nodes)
    assert events.error is None and len(events.outputs["save"]["images"]) == 8


def test_the_other_vae_is_refused_before_sampling(listen):
    events = listen(graph(True, "hunyuan_vae.safetensors"))
    assert "the VAE given, the HunyuanVideo VAE, works on [videos, 16," in events.error["exception_message"]
    assert events.error["node_id"] == "image"
