"""Text to picture to video over HTTP, with a small Flux in the official layout through the host's own Flux code."""

import io
import shutil

import numpy
import pytest
from PIL import Image

from demo import tiny_flux

STEPS, PICTURE_STEPS = 2, 3


@pytest.fixture(scope="module", autouse=True)
def flux_files(server, tmp_path_factory):
    """Small Flux dev and schnell and their VAE, in the host's model folders."""
    folder = tmp_path_factory.mktemp("flux")
    for schnell in (False, True):
        dit, vae = tiny_flux.write(folder, schnell=schnell)
        shutil.copy(dit, server.base / "models" / "diffusion_models")
    shutil.copy(vae, server.base / "models" / "vae")


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


def ran(events, kind: str) -> list[str]:
    """Ids of nodes whose progress moved, of those the node stands for, whose bar has as many steps as `kind` takes."""
    steps = {"picture": PICTURE_STEPS, "video": STEPS}[kind]
    nodes = {data["node"] for name, data in events.messages if name == "progress" and data["max"] == steps}
    return sorted(node for node in nodes if node.startswith("both."))


def pictures(server, events, node: str) -> list[numpy.ndarray]:
    return [numpy.asarray(Image.open(path)) for path in server.files({node: events.outputs[node]})]


def shown_on(events, display: str) -> list[str]:
    """Message types in which a picture arrived that is shown on a node, and the bars that moved, in their order."""
    order = []
    for name, data in events.messages:
        if name == "executed" and data.get("display_node") == display and "images" in (data["output"] or {}):
            order.append("picture")
        if name == "progress" and data["max"] == STEPS and data["node"].startswith("both."):
            order.append("video step")
    return order


def test_prompt_in_picture_and_video_out(server, listen):
    events = listen(graph())
    assert events.error is None
    (picture,), frames = pictures(server, events, "picture"), pictures(server, events, "frames")
    assert picture.shape == (192, 336, 3) and len(frames) == 5 and frames[0].shape == picture.shape
    assert picture.std() > 20
    # The picture is on the node before the first step of the video.
    order = shown_on(events, "both")
    assert order[0] == "picture" and order.count("video step") >= STEPS
    lines = [line for node, line in events.texts if node == "both"]
    assert "Picture 336x192, seed 7: Flux dev, 3 steps, open-sora schedule" in lines
    assert any(line.startswith(f"Step {STEPS} of {STEPS}") for line in lines)
    assert all(preview[:2] == b"\xff\xd8" for preview in events.previews) and events.previews
    assert io.BytesIO(events.previews[0])


def test_a_new_video_from_the_same_picture_does_not_draw_it_again(server, listen):
    first = listen(graph(seed=20, image_seed=9))
    again = listen(graph(seed=21, image_seed=9))
    assert ran(first, "picture") and not ran(again, "picture")
    assert ran(again, "video")
    assert shown_on(again, "both")[0] == "picture"  # shown all the same
    pairs = [(pictures(server, events, "picture")[0], pictures(server, events, "frames")) for events in (first, again)]
    assert (pairs[0][0] == pairs[1][0]).all() and (pairs[0][1][0] == pairs[1][1][0]).all()  # both begin with it
    assert (pairs[0][1][4] != pairs[1][1][4]).any()
    # Nothing that the picture does not depend on draws it again; what it depends on does.
    assert not ran(listen(graph(seed=21, image_seed=9, negative_prompt="blur", motion_score=7, num_frames=9)), "picture")
    assert ran(listen(graph(seed=21, image_seed=9, flux_guidance=3.0)), "picture")
    assert ran(listen(graph(seed=22)), "picture")  # -1: the video's seed is the picture's


def test_the_same_graph_is_not_run_twice(listen):
    listen(graph(seed=30))
    again = listen(graph(seed=30))
    assert again.error is None and not ran(again, "picture") and not ran(again, "video")


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
        ({"model": ["flux", 0]}, "model: This MODEL is Flux, not Open-Sora 2.0"),
        ({"flux_vae": ["vae", 0]}, "flux_vae holds VAENetwork (16 latent channels, 3D); Flux needs its own picture VAE"),
        ({"vae": ["flux_vae", 0]}, "vae: This VAE holds AutoencodingEngine (16 latent channels, 2D)"),
        ({"aspect_ratio": "8:5"}, "aspect_ratio='8:5' is not known"),
    ],
)  # fmt: skip
def test_wrong_parts_get_one_sentence_before_anything_is_drawn(listen, changes, sentence):
    events = listen(graph(seed=50, **changes))
    assert sentence in events.error["exception_message"] and events.error["node_id"] == "both"
    assert not ran(events, "picture")
    assert listen(graph(seed=7)).error is None


def test_a_frame_count_that_cannot_be_is_refused_at_once(server):
    from demo.comfy import HostError

    with pytest.raises(HostError, match="use 5 or 9"):
        server.post("/prompt", {"prompt": graph(num_frames=7)})
