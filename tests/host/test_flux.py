"""Text to picture to video over HTTP, with a small Flux in the official layout through the host's own Flux code."""

import numpy
import pytest
from PIL import Image
from safetensors.torch import load_file

STEPS, PICTURE_STEPS = 1, 2


def loader(kind: str, name: str) -> dict:
    inputs = {
        "UNETLoader": {"unet_name": name, "weight_dtype": "default"},
        "VAELoader": {"vae_name": name},
        "OpenSoraVAELoader": {"vae_name": name},
        "OpenSoraModelLoader": {"model_name": name, "precision": "auto"},
        "OpenSoraTextEncoderLoader": {"t5_name": name, "clip_l_name": "clip_l.safetensors", "precision": "auto", "device": "auto"},
    }
    return {"class_type": kind, "inputs": inputs[kind], "_meta": {"title": kind}}


def graph(flux="flux1-dev.safetensors", **changes) -> dict:
    """Prompt to video in one node, 5 frames of 336x192 from a picture of the same size; `changes` go into its inputs."""
    inputs = {
        "flux_model": ["flux", 0], "flux_vae": ["flux_vae", 0], "clip": ["clip", 0], "model": ["model", 0], "vae": ["vae", 0],
        "prompt": "raining, sea", "negative_prompt": "", "resolution": "256px", "aspect_ratio": "16:9", "num_frames": 5, "seed": 7,
        "steps": STEPS, "image_steps": PICTURE_STEPS, "flux_schedule": "auto", "flux_guidance": 4.0, "motion_score": 4, "fps": 24,
        "text_guidance": 7.5, "image_guidance": 3.0, "image_resolution": "256px",
    }  # fmt: skip
    save = {"class_type": "SaveImage", "_meta": {"title": "save"}}
    return {
        "flux": loader("UNETLoader", flux),
        "flux_vae": loader("VAELoader", "ae.safetensors"),
        "clip": loader("OpenSoraTextEncoderLoader", "t5xxl.safetensors"),
        "model": loader("OpenSoraModelLoader", "Open_Sora_v2.safetensors"),
        "vae": loader("OpenSoraVAELoader", "hunyuan_vae.safetensors"),
        "both": {"class_type": "OpenSoraFluxToVideo", "inputs": inputs | changes, "_meta": {"title": "both"}},
        "frames": {**save, "inputs": {"images": ["both", 0], "filename_prefix": "flux-frame"}},
        "picture": {**save, "inputs": {"images": ["both", 1], "filename_prefix": "flux-picture"}},
    }


def forwards(events, part: str) -> int:
    """Steps that the picture (part "picture", one forward each) or the video (part "video") took in this run."""
    return max((value for value, _ in events.progress(f"both.0.0.{part}")), default=0)


def pictures(server, events, node: str) -> list[numpy.ndarray]:
    return [numpy.asarray(Image.open(path)) for path in server.files({node: events.outputs[node]})]


def order(events) -> list[str]:
    """What a person sees on the node, in its order: the picture, and the steps of the video."""
    found = []
    for name, data in events.messages:
        if name == "executed" and data.get("display_node") == "both" and "images" in (data["output"] or {}):
            found.append("picture")
        if name == "progress" and data["node"] == "both.0.0.video":
            found.append("step")
    return found


def latent(server, events, node: str):
    """The tensor of a SaveLatent node."""
    (entry,) = events.outputs[node]["latents"]
    return load_file(server.base / "output" / entry["subfolder"] / entry["filename"])["latent_tensor"]


def test_prompt_in_picture_and_video_out(server, listen):
    prompt = graph()
    encode = {"vae": ["vae", 0], "image": ["both", 1], "tile_size": 256, "overlap": 0.25, "posterior": "mode", "seed": 0}
    prompt["encoded"] = {"class_type": "OpenSoraTiledVAEEncode", "inputs": encode}
    for name, source in (("video latent", ["both", 2]), ("picture latent", ["encoded", 0])):
        prompt[name] = {"class_type": "SaveLatent", "inputs": {"samples": source, "filename_prefix": name.replace(" ", "-")}}
    events = listen(prompt)
    assert events.error is None
    (picture,), frames = pictures(server, events, "picture"), pictures(server, events, "frames")
    assert picture.shape == (192, 336, 3) and len(frames) == 5 and frames[0].shape == picture.shape
    assert picture.std() > 20
    begins, expected = latent(server, events, "video latent")[:, :, 0], latent(server, events, "picture latent")[:, :, 0]
    assert (begins - expected).abs().max() < 0.05 * expected.abs().max()  # a level of 8 bits, in which a picture is fitted
    assert order(events) == ["picture"] + ["step"] * STEPS
    lines = [line for node, line in events.texts if node == "both"]
    assert "Picture 336x192, seed 7: Flux dev, 2 steps, open-sora schedule" in lines
    assert any(line.startswith("Done in ") for line in lines)
    assert events.previews and events.previews[0][:2] == b"\xff\xd8"


def test_the_one_node_is_the_chain_of_plain_ones(server, listen):
    settings = {"seed": 61, "steps": 2, "text_guidance": 5.0, "image_guidance": 2.0}
    text = {"prompt": "a kite", "negative_prompt": "blur", "motion_score": 7, "fps": 12}
    one = listen(graph(aspect_ratio="1:1", **settings, **text))
    chain = graph()
    inputs = chain.pop("both")["inputs"]
    picture = {name: inputs[name] for name in ("flux_model", "flux_vae", "clip", "flux_schedule", "flux_guidance")}
    picture |= {"prompt": "a kite", "aspect_ratio": "1:1", "seed": 61, "steps": PICTURE_STEPS, "resolution": "256px", "unload": False}
    latent = {"resolution": "256px", "aspect_ratio": "1:1", "num_frames": 5, "width": 336, "height": 192, "batch_size": 1}
    given = {
        "positive": ["text", 0],
        "negative": ["text", 1],
        "vae": ["vae", 0],
        "latent": ["latent", 0],
        "start_image": ["drawn", 0],
        "fit": "crop",
    }
    sampler = {"model": ["model", 0], "positive": ["begun", 0], "negative": ["begun", 1], "latent": ["begun", 2], **settings}
    sampler |= {"text_oscillation": True, "image_oscillation": True, "temporal_ramp": True, "shift": 0.0, "noise_device": "cpu"}
    decode = {"vae": ["vae", 0], "latent": ["sampled", 0], "tile_size": 256, "overlap": 0.25, "temporal_tile": 0, "policy": "auto"}
    chain |= {
        "drawn": {"class_type": "OpenSoraFluxPicture", "inputs": picture},
        "text": {"class_type": "OpenSoraT5TextEncode", "inputs": {"clip": ["clip", 0], **text, "keep_encoded": False}},
        "latent": {"class_type": "OpenSoraEmptyLatentVideo", "inputs": latent},
        "begun": {"class_type": "OpenSoraImageToVideo", "inputs": given},
        "sampled": {"class_type": "OpenSoraRectifiedFlowSampler", "inputs": sampler | {"latent_dtype": "fp32"}},
        "decoded": {"class_type": "OpenSoraTiledVAEDecode", "inputs": decode},
    }
    chain["frames"]["inputs"]["images"], chain["picture"]["inputs"]["images"] = ["decoded", 0], ["drawn", 0]
    two = listen(chain)
    assert one.error is None and two.error is None
    for node, count in (("picture", 1), ("frames", 5)):
        found, expected = pictures(server, one, node), pictures(server, two, node)
        assert len(found) == len(expected) == count and all((a == b).all() for a, b in zip(found, expected, strict=True))


def test_a_new_video_from_the_same_picture_does_not_draw_it_again(server, listen):
    first = listen(graph(seed=20, image_seed=9))
    assert (forwards(first, "picture"), forwards(first, "video")) == (PICTURE_STEPS, STEPS)
    # Nothing here is of the picture.
    again = listen(graph(seed=21, image_seed=9, negative_prompt="blur", motion_score=7, num_frames=9, text_guidance=5.0))
    assert (forwards(again, "picture"), forwards(again, "video")) == (0, STEPS)
    assert order(again)[0] == "picture"  # shown all the same
    assert (pictures(server, first, "picture")[0] == pictures(server, again, "picture")[0]).all()
    assert len(pictures(server, again, "frames")) == 9
    same = listen(graph(seed=21, image_seed=9, negative_prompt="blur", motion_score=7, num_frames=9, text_guidance=5.0))
    assert same.error is None and not forwards(same, "picture") and not forwards(same, "video")
    assert forwards(listen(graph(seed=22)), "picture") == PICTURE_STEPS  # -1: the video's seed is the picture's


def test_schnell_takes_its_own_few_steps(listen):
    events = listen(graph("flux1-schnell.safetensors", image_steps=0))
    assert events.error is None
    assert "Picture 336x192, seed 7: Flux schnell, 4 steps, flux schedule" in [line for node, line in events.texts if node == "both"]


def test_the_picture_has_a_node_of_its_own_and_a_prompt_of_its_own(server, listen):
    one = listen(graph(image_prompt="a green square", seed=40))
    alone = graph()
    inputs = alone.pop("both")["inputs"]
    del alone["frames"], alone["model"], alone["vae"]
    wanted = {name: inputs[name] for name in ("flux_model", "flux_vae", "clip", "aspect_ratio", "flux_schedule", "flux_guidance")}
    alone["picture node"] = {
        "class_type": "OpenSoraFluxPicture",
        "inputs": {**wanted, "prompt": "a green square", "seed": 40, "steps": PICTURE_STEPS, "resolution": "256px", "unload": False},
    }
    alone["picture"]["inputs"]["images"] = ["picture node", 0]
    two = listen(alone)
    assert one.error is None and two.error is None
    assert (pictures(server, one, "picture")[0] == pictures(server, two, "picture")[0]).all()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"flux_model": ["model", 0]}, "flux_model holds Open-Sora 2.0, the video model"),
        ({"model": ["flux", 0]}, "model: Load Open_Sora_v2.safetensors with Open-Sora Load Model: this MODEL is Flux"),
        ({"flux_vae": ["vae", 0]}, "flux_vae holds VAENetwork (16 latent channels, 3D)"),
        ({"vae": ["flux_vae", 0]}, "this VAE holds AutoencodingEngine (16 latent channels, 2D)"),
        ({"aspect_ratio": "8:5"}, "aspect_ratio='8:5' is not known"),
    ],
)  # fmt: skip
def test_wrong_parts_get_one_sentence_before_anything_is_drawn(listen, changes, sentence):
    events = listen(graph(seed=50, **changes))
    assert sentence in events.error["exception_message"] and events.error["node_id"] == "both"
    assert not forwards(events, "picture")


def test_a_frame_count_that_cannot_be_is_refused_at_once(server):
    from demo.comfy import HostError

    with pytest.raises(HostError, match="Use 5 or 9"):
        server.post("/prompt", {"prompt": graph(num_frames=7)})
