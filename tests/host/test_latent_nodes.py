"""Sizes and reference pictures over HTTP."""

import pytest

from demo import comfy


def clip(**changes) -> dict:
    inputs = {"resolution": "custom", "aspect_ratio": "16:9", "num_frames": 9, "width": 64, "height": 48, "batch_size": 1}
    return {"class_type": "OpenSoraEmptyLatentVideo", "inputs": {**inputs, **changes}}


def test_the_sizes_are_outputs(listen):
    nodes = {"latent": clip(resolution="768px", aspect_ratio="9:16", num_frames=1)}
    nodes |= {str(slot): {"class_type": "PreviewAny", "inputs": {"source": ["latent", slot]}} for slot in (1, 2, 3)}
    outputs = listen(nodes).outputs
    assert [outputs[str(slot)]["text"] for slot in (1, 2, 3)] == [["576"], ["1024"], ["24.0"]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_frames": 128}, r"Use 125 or 129.*num_frames=128 is not 4k\+1"),
        ({"num_frames": 0}, "num_frames=0 is not a clip"),
        ({"width": 100}, r"Use 48x96 \(height x width\): height=48, width=100 are not both multiples of 16"),
        ({"resolution": "300px"}, "Use one of 256px, 768px, custom: resolution='300px' is not known"),
        ({"aspect_ratio": "5:1"}, "not in list"),
        ({"batch_size": 0}, "smaller than min"),
    ],
)
def test_sizes_that_cannot_be_are_refused_when_queued(server, changes, words):
    nodes = {"latent": clip(**changes), "show": {"class_type": "PreviewAny", "inputs": {"source": ["latent", 1]}}}
    with pytest.raises(comfy.HostError, match=words):
        server.run(nodes)


def test_a_wrong_count_over_a_wire_is_refused_when_it_runs(listen):
    nodes = {
        "number": {"class_type": "PrimitiveInt", "inputs": {"value": 10}},
        "latent": clip(num_frames=["number", 0]),
        "show": {"class_type": "PreviewAny", "inputs": {"source": ["latent", 1]}},
    }
    assert listen(nodes).error["exception_message"].strip() == "Use 9 or 13: num_frames=10 is not 4k+1."


def image_to_video(pictures=2, **changes) -> dict:
    """A first and a last frame given to a batch of two clips; what comes out is the pictures through the VAE."""
    files = {"t5_name": "t5xxl.safetensors", "clip_l_name": "clip_l.safetensors", "precision": "auto", "device": "auto"}
    text = {"clip": ["clip", 0], "prompt": "a cat", "negative_prompt": "", "motion_score": 4, "fps": 24}
    pair = {"positive": ["text", 0], "negative": ["text", 1]}
    given = {**pair, "vae": ["vae", 0], "latent": ["latent", 0], "start_image": ["picture", 0], "end_image": ["picture", 0], "fit": "crop"}
    run = {
        "model": ["model", 0], "positive": ["given", 0], "negative": ["given", 1], "latent": ["given", 2], "seed": 1, "steps": 1,
        "text_guidance": 7.5, "image_guidance": 3.0, "text_oscillation": True, "image_oscillation": True, "temporal_ramp": True,
        "shift": 0.0, "noise_device": "cpu", "latent_dtype": "fp32",
    }  # fmt: skip
    decode = {"vae": ["vae", 0], "latent": ["run", 0], "tile_size": 256, "overlap": 0.25, "temporal_tile": 0, "policy": "auto"}
    return {
        "model": {"class_type": "UNETLoader", "inputs": {"unet_name": "Open_Sora_v2.safetensors", "weight_dtype": "default"}},
        "clip": {"class_type": "OpenSoraTextEncoderLoader", "inputs": files},
        "text": {"class_type": "OpenSoraT5TextEncode", "inputs": text},
        "vae": {"class_type": "OpenSoraVAELoader", "inputs": {"vae_name": "hunyuan_vae.safetensors"}},
        "latent": clip(batch_size=2),
        "picture": {"class_type": "EmptyImage", "inputs": {"width": 80, "height": 90, "batch_size": pictures, "color": 0xFF8000}},
        "given": {"class_type": "OpenSoraImageToVideo", "inputs": {**given, **changes}},
        "run": {"class_type": "OpenSoraRectifiedFlowSampler", "inputs": run},
        "decode": {"class_type": "OpenSoraTiledVAEDecode", "inputs": decode},
        "save": {"class_type": "SaveImage", "inputs": {"images": ["decode", 0], "filename_prefix": "given"}},
    }


def test_pictures_for_every_item_of_a_batch(listen):
    events = listen(image_to_video())
    assert events.error is None and len(events.outputs["save"]["images"]) == 2 * 9


def test_a_wrong_number_of_pictures_is_one_sentence(listen):
    message = listen(image_to_video(pictures=3)).error["exception_message"].strip()
    assert message == "Give 1 or 2: start_image holds 3 pictures for a batch of 2 videos."
