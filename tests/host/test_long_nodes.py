"""Longer videos over HTTP: new prompts per segment, what a person is told, what is on disk when a run is cancelled."""

import imageio_ffmpeg
import pytest
from safetensors.torch import load_file

from demo.comfy import HostError

SAID = "The video with {} finished segment{} is in output/latents/"


def graph(segments=2, steps=2, seed=7, **changes) -> dict:
    """A clip of 9 frames of 64x48, made longer and saved; `changes` go into Open-Sora Continue Video."""
    sampler = {
        "model": ["model", 0], "positive": ["text", 0], "negative": ["text", 1], "seed": seed, "steps": steps, "text_guidance": 7.5,
        "image_guidance": 3.0, "text_oscillation": True, "image_oscillation": True, "shift": 0.0, "noise_device": "cpu",
        "latent_dtype": "fp32",
    }  # fmt: skip
    longer = {
        "vae": ["vae", 0], "latent": ["sampler", 0], "segments": segments, "num_frames": 0, "context_frames": 0,
        "filename_prefix": "latents/http", "policy": "auto",
    }  # fmt: skip
    encoders = {"t5_name": "t5xxl.safetensors", "clip_l_name": "clip_l.safetensors", "precision": "auto", "device": "auto"}
    said = {"clip": ["clip", 0], "prompt": "raining, sea", "negative_prompt": "", "motion_score": 4, "fps": 24}
    size = {"resolution": "custom", "aspect_ratio": "16:9", "num_frames": 9, "width": 64, "height": 48, "batch_size": 1}
    nodes = {
        "model": ("OpenSoraModelLoader", {"model_name": "Open_Sora_v2.safetensors", "precision": "auto"}),
        "clip": ("OpenSoraTextEncoderLoader", encoders),
        "vae": ("OpenSoraVAELoader", {"vae_name": "hunyuan_vae.safetensors"}),
        "text": ("OpenSoraT5TextEncode", said),
        "empty": ("OpenSoraEmptyLatentVideo", size),
        "sampler": ("OpenSoraRectifiedFlowSampler", {**sampler, "latent": ["empty", 0], "temporal_ramp": True, "steps": 2, "seed": 7}),
        "longer": ("OpenSoraContinueVideo", {**sampler, **longer, **changes}),
        "video": ("CreateVideo", {"images": ["longer", 1], "fps": 24.0}),
        "save": ("SaveVideo", {"video": ["video", 0], "filename_prefix": "long", "format": "auto", "codec": "auto"}),
    }
    return {name: {"class_type": kind, "inputs": inputs, "_meta": {"title": name}} for name, (kind, inputs) in nodes.items()}


def kept(server) -> dict:
    """Latent files of the output folder by name: how many latent frames each holds."""
    files = (server.base / "output" / "latents").glob("http_*.latent")
    return {path.name: load_file(path)["latent_tensor"].shape[2] for path in files}


def lines(events) -> list[str]:
    return [line for node, line in events.texts if node == "longer"]


def test_a_longer_video_with_a_prompt_for_each_segment(server, listen):
    events = listen(graph(clip=["clip", 0], prompts="the rain stops\nnight falls", seed=20))
    assert events.error is None
    (video,) = server.files(events.outputs)
    assert imageio_ffmpeg.count_frames_and_secs(str(video))[0] == 9 + 4 + 4
    told = lines(events)
    assert any(line.startswith("2/2: Done in ") for line in told)
    assert any(line.startswith(SAID.format(1, "")) for line in told) and any(line.startswith(SAID.format(2, "s")) for line in told)
    assert list(kept(server).values()).count(5) == 1


def test_a_cancelled_run_keeps_what_was_finished_and_says_where(server, listen):
    before = kept(server)

    def cancel(kind, data):
        if kind == "progress" and data.get("node") == "longer" and data["max"] == 40 and data["value"] == 40:
            cancel.segments += 1
        if cancel.segments == 1 and kind == "progress" and data.get("node") == "longer" and data["value"] == 3:
            server.post("/interrupt", {})

    cancel.segments = 0
    events = listen(graph(segments=5, steps=40, seed=21), on_message=cancel)
    assert events.interrupted
    new = {name: length for name, length in kept(server).items() if name not in before}
    assert list(new.values()) == [4]  # three latent frames and one finished segment's
    assert lines(events)[-1].startswith(SAID.format(1, "")) and next(iter(new)) in lines(events)[-1]
    assert listen(graph(segments=1, seed=22)).error is None


def test_what_does_not_fit_gets_one_sentence_before_anything_is_sampled(listen):
    for changes, words in (({"prompts": "night falls"}, "Connect clip"), ({"context_frames": 9}, "leaves nothing of a segment of 9")):
        events = listen(graph(seed=23, **changes))
        assert words in events.error["exception_message"] and not events.progress("longer")


def test_counts_that_no_clip_has_are_refused_at_once(server):
    with pytest.raises(HostError, match="not 4k"):
        server.post("/prompt", {"prompt": graph(num_frames=10)})


def test_a_path_outside_the_output_folder_is_refused(server, listen):
    events = listen(graph(seed=24, filename_prefix="../../outside/long"))
    assert "leads out of the output folder" in events.error["exception_message"]
    assert not (server.base.parent / "outside").exists()
