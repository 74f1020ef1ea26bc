"""Pictures and clips from files, through stock nodes over HTTP: what comes out begins and ends as it was given."""

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from demo import comfy
from opensora_core.media.video import read_clip, save_video

ENCODERS = {"t5_name": "t5xxl.safetensors", "clip_l_name": "clip_l.safetensors", "precision": "auto", "device": "auto"}
PAIR = {"positive": ["text", 0], "negative": ["text", 1]}
RUN = {
    "model": ["model", 0], "seed": 1, "steps": 2, "text_guidance": 7.5, "image_guidance": 3.0, "text_oscillation": True, "image_oscillation": True,
    "temporal_ramp": True, "shift": 0.0, "noise_device": "cpu", "latent_dtype": "fp32",
}  # fmt: skip


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def graph(given: dict, num_frames=9, width=64, height=48, **more) -> dict:
    """A video over what the node `given` lays into the conditioning: frames as a file, its latent as another."""
    return {
        "model": node("OpenSoraModelLoader", model_name="Open_Sora_v2.safetensors", precision="auto"),
        "clip": node("OpenSoraTextEncoderLoader", **ENCODERS),
        "text": node("OpenSoraT5TextEncode", clip=["clip", 0], prompt="a cat", negative_prompt="", motion_score=4, fps=24),
        "vae": node("OpenSoraVAELoader", vae_name="hunyuan_vae.safetensors"),
        "latent": node(
            "OpenSoraEmptyLatentVideo",
            resolution="custom",
            aspect_ratio="16:9",
            num_frames=num_frames,
            width=width,
            height=height,
            batch_size=1,
        ),
        "given": given,
        "run": node("OpenSoraRectifiedFlowSampler", **RUN, positive=["given", 0], negative=["given", 1], latent=["given", 2]),
        "frames": node(
            "OpenSoraTiledVAEDecode", vae=["vae", 0], latent=["run", 0], tile_size=256, overlap=0.25, temporal_tile=0, policy="auto"
        ),
        "video": node("CreateVideo", images=["frames", 0], fps=24.0),
        "save": node("SaveVideo", video=["video", 0], filename_prefix="conditioned", format="auto", codec="auto"),
        "kept": node("SaveLatent", samples=["run", 0], filename_prefix="latents/conditioned"),
        **more,
    }


def image_to_video(**inputs) -> dict:
    return node("OpenSoraImageToVideo", **PAIR, vae=["vae", 0], latent=["latent", 0], fit="crop", **inputs)


def results(server, events):
    """(the latent, the frames of the file) of a finished run."""
    assert events.error is None and {"save", "kept"} <= events.outputs.keys()
    (video,) = server.files({"save": events.outputs["save"]})
    (latent,) = server.files({"kept": events.outputs["kept"]})
    return load_file(latent)["latent_tensor"], read_clip(video, 1000, from_end=True)


@pytest.fixture(scope="module")
def pictures(server):
    """Two pictures of the video's size in the input folder, and the nodes that load and encode each on its own."""
    nodes = {}
    for name, seed in (("first", 1), ("last", 2)):
        generator = torch.Generator().manual_seed(seed)
        blocks = torch.randint(0, 256, (6, 8, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(blocks.repeat_interleave(8, 0).repeat_interleave(8, 1).numpy()).save(server.base / "input" / f"{name}.png")
        nodes[name] = node("LoadImage", image=f"{name}.png")
        nodes[f"{name} encoded"] = node(
            "OpenSoraTiledVAEEncode", vae=["vae", 0], image=[name, 0], tile_size=256, overlap=0.25, posterior="mode", seed=0
        )
        nodes[f"{name} kept"] = node("SaveLatent", samples=[f"{name} encoded", 0], filename_prefix=f"latents/{name}")
    return nodes


@pytest.mark.parametrize("as_latent", [False, True], ids=["pictures", "latents"])
@pytest.mark.parametrize("given", [("first",), ("last",), ("first", "last")], ids=" and ".join)
def test_loaded_pictures_are_the_ends_of_the_video(server, listen, pictures, given, as_latent):
    ends = {"first": "start", "last": "end"}
    inputs = {f"{ends[name]}_{'latent' if as_latent else 'image'}": [f"{name} encoded" if as_latent else name, 0] for name in given}
    events = listen(graph(image_to_video(**inputs), **pictures))
    latent, frames = results(server, events)
    assert latent.shape == (1, 16, 3, 6, 8) and frames.shape == (9, 48, 64, 3)
    for name, place in (("first", 0), ("last", -1)):
        (path,) = server.files({name: events.outputs[f"{name} kept"]})
        encoded = load_file(path)["latent_tensor"][:, :, 0]
        assert torch.allclose(latent[:, :, place], encoded, atol=1e-6) == (name in given)


def test_the_shape_of_a_loaded_picture_is_the_videos(server, listen, pictures):
    changed = graph(image_to_video(start_image=["first", 0]), num_frames=5, **pictures)
    changed["latent"]["inputs"] |= {"resolution": "256px", "image": ["first", 0]}
    latent, frames = results(server, listen(changed))
    assert frames.shape == (5, 224, 288, 3) and latent.shape[-2:] == (28, 36)  # 64x48 is 4:3


def test_no_strength_is_text_to_video(server, listen, pictures):
    free, _ = results(server, listen(graph(image_to_video(start_image=["first", 0], strength=0.0), **pictures)))
    plain = graph(node("PreviewAny", source=["latent", 1]), **pictures)
    plain["run"]["inputs"] |= {**PAIR, "latent": ["latent", 0]}
    assert torch.equal(free, results(server, listen(plain))[0])


@pytest.fixture(scope="module")
def clip_file(server):
    shade = (torch.arange(40) * 37 % 170).view(-1, 1, 1, 1)
    ramp = torch.linspace(0, 40, 64).view(1, 1, 64, 1) + torch.linspace(0, 40, 48).view(1, 48, 1, 1)
    return save_video((ramp + shade).expand(-1, -1, -1, 3).to(torch.uint8), server.base / "input" / "clip.mp4")


def video_to_video(video, **inputs) -> dict:
    defaults = {"direction": "forwards", "context": "33", "fit": "crop"}
    return node("OpenSoraVideoToVideo", **PAIR, vae=["vae", 0], latent=["latent", 0], video=video, **{**defaults, **inputs})


@pytest.mark.parametrize("direction", ["forwards", "backwards"])
def test_a_loaded_clip_is_extended(server, listen, clip_file, direction):
    load = {"load": node("LoadVideo", file=clip_file.name), "taken apart": node("GetVideoComponents", video=["load", 0])}
    found = [
        results(server, listen(graph(video_to_video(source, direction=direction), num_frames=41, **load)))
        for source in (["load", 0], ["taken apart", 0])
    ]
    assert torch.equal(found[0][0], found[1][0]) and found[0][0].shape == (1, 16, 11, 6, 8)
    assert all(frames.shape == (41, 48, 64, 3) for _, frames in found)


def test_a_finished_video_is_extended_without_pixels(server, listen, clip_file):
    """The latent of one run goes into the next as it is, in one graph."""
    second = {
        "again": video_to_video(["run", 0]),
        "longer": node("OpenSoraRectifiedFlowSampler", **RUN, positive=["again", 0], negative=["again", 1], latent=["again", 2]),
        "longer kept": node("SaveLatent", samples=["longer", 0], filename_prefix="latents/longer"),
        "load": node("LoadVideo", file=clip_file.name),
    }
    events = listen(graph(video_to_video(["load", 0]), num_frames=37, **second))
    results(server, events)
    (path,) = server.files({"longer": events.outputs["longer kept"]})
    assert load_file(path)["latent_tensor"].shape == (1, 16, 10, 6, 8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_frames": 33}, "Use at least 37 frames: a video of 33 frames is all taken up by the 33 frames of the clip."),
        ({"num_frames": 73, "context": "65"}, "Use context 33, or a longer clip: video has 40 frames; going on from it takes 65."),
    ],
)
def test_what_is_too_short_is_one_sentence(listen, clip_file, changes, words):
    changes = {"num_frames": 41, **changes}
    load = {"load": node("LoadVideo", file=clip_file.name)}
    prompt = graph(video_to_video(["load", 0], context=changes.pop("context", "33")), **changes, **load)
    assert listen(prompt).error["exception_message"].strip() == words


def test_a_picture_with_alpha_is_one_sentence(listen, pictures):
    join = {"see-through": node("JoinImageWithAlpha", image=["first", 0], alpha=["first", 1])}
    error = listen(graph(image_to_video(start_image=["see-through", 0]), **pictures, **join)).error
    assert "start_image has an alpha channel" in error["exception_message"] and error["exception_message"].startswith(
        "Take its colours with Split Image"
    )


def test_a_strength_that_cannot_be_is_refused_when_queued(server, pictures):
    with pytest.raises(comfy.HostError, match="bigger than max"):
        server.run(graph(image_to_video(start_image=["first", 0], strength=1.5), first=pictures["first"]))
