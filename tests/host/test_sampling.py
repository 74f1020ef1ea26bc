"""A whole video over HTTP: what a person sees while it runs, and what is said when something does not fit."""

import re

import pytest

MODEL = "Open_Sora_v2.safetensors"


def graph(steps=12, image=False, **changes) -> dict:
    """Text to video (5 frames of 64x48) with the one-node sampler; `changes` go into the sampler's inputs."""
    sampler = {
        "model": ["model", 0], "positive": ["text", 0], "negative": ["text", 1], "latent": ["latent", 0], "seed": 7, "steps": steps,
        "text_guidance": 7.5, "image_guidance": 3.0, "text_oscillation": True, "image_oscillation": True, "temporal_ramp": True,
        "shift": 0.0, "noise_device": "cpu", "latent_dtype": "fp32",
    }  # fmt: skip
    nodes = {
        "model": ("OpenSoraModelLoader", {"model_name": MODEL, "precision": "auto"}),
        "clip": (
            "OpenSoraTextEncoderLoader",
            {"t5_name": "t5xxl.safetensors", "clip_l_name": "clip_l.safetensors", "precision": "auto", "device": "auto"},
        ),
        "text": (
            "OpenSoraT5TextEncode",
            {"clip": ["clip", 0], "prompt": "raining, sea", "negative_prompt": "", "motion_score": 4, "fps": 24},
        ),
        "latent": (
            "OpenSoraEmptyLatentVideo",
            {"resolution": "custom", "aspect_ratio": "16:9", "num_frames": 5, "width": 64, "height": 48, "batch_size": 1},
        ),
        "sampler": ("OpenSoraRectifiedFlowSampler", {**sampler, **changes}),
        "vae": ("OpenSoraVAELoader", {"vae_name": "hunyuan_vae.safetensors"}),
        "frames": (
            "OpenSoraTiledVAEDecode",
            {"vae": ["vae", 0], "latent": ["sampler", 0], "tile_size": 256, "overlap": 0.25, "temporal_tile": 0, "policy": "auto"},
        ),
        "save": ("SaveImage", {"images": ["frames", 0], "filename_prefix": "video"}),
    }
    return {name: {"class_type": kind, "inputs": inputs, "_meta": {"title": name}} for name, (kind, inputs) in nodes.items()}


def test_the_pack_loads_without_a_word_of_its_own(server):
    # Only lines about this pack, before anything ran: the host has warnings of its own.
    start = server.log.split("got prompt")[0]
    lines = [line for line in start.splitlines() if "open-sora" in line.lower()]
    assert lines, "the host did not mention the pack"
    assert not [line for line in lines if any(word in line.upper() for word in ("WARNING", "ERROR", "FAILED"))]
    assert "IMPORT FAILED" not in server.log


def test_a_video_with_progress_previews_and_forwards(server, listen):
    events = listen(graph(steps=12))
    assert events.error is None
    assert [value for value, maximum in events.progress("sampler") if maximum == 12][-1] == 12
    assert events.previews and events.previews[0][:2] == b"\xff\xd8"
    lines = [line for node, line in events.texts if node == "sampler"]
    # 12 steps: ten warm-up steps and step 10 with two passes, step 11 with one.
    assert re.fullmatch(r"Done in \d+ s, 13 passes saved", lines[-1])
    assert all(re.fullmatch(r"Step \d+/12, .* left, \d+/23 passes", line) and len(line) <= 40 for line in lines[:-1])
    assert len(events.outputs["save"]["images"]) == 5


def test_an_interrupt_stops_within_a_step_and_the_queue_goes_on(server, listen):
    def interrupt(kind, data):
        if kind == "progress" and data.get("node") == "sampler" and data["value"] == 3:
            server.post("/interrupt", {})

    events = listen(graph(steps=200, seed=8), on_message=interrupt)
    assert events.interrupted
    assert max(value for value, _ in events.progress("sampler")) < 20
    assert listen(graph(steps=2, seed=9)).error is None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"text_guidance": float("nan")}, "text_guidance=nan is not a finite number"),
        ({"shift": float("nan")}, "shift=nan is not a positive, finite number"),
    ],
)
def test_numbers_that_cannot_be_used_get_one_sentence(listen, changes, sentence):
    events = listen(graph(**changes))
    assert sentence in events.error["exception_message"]
    assert not events.progress("sampler")
    assert listen(graph(steps=1)).error is None


def test_numbers_out_of_range_are_refused_at_once(server):
    from demo.comfy import HostError

    for changes in ({"steps": 0}, {"text_guidance": float("inf")}, {"shift": -1.0}, {"seed": -1}):
        with pytest.raises(HostError, match="value_(smaller|bigger)_than"):
            server.post("/prompt", {"prompt": graph(**changes)})


def test_a_path_outside_the_model_folders_is_refused(server):
    from demo.comfy import HostError

    for name in ("../../../etc/passwd", "/etc/passwd", "..\\secret.safetensors"):
        prompt = graph()
        prompt["model"]["inputs"]["model_name"] = name
        with pytest.raises(HostError, match="value_not_in_list"):
            server.post("/prompt", {"prompt": prompt})


def test_a_wrong_file_in_the_model_slot_gets_one_sentence(server, listen):
    models = server.base / "models" / "diffusion_models"
    (models / "vae.safetensors").write_bytes((server.base / "models" / "vae" / "hunyuan_vae.safetensors").read_bytes())
    (models / "half.safetensors").write_bytes((models / MODEL).read_bytes()[:-500])
    for name, words in (("vae.safetensors", "is a HunyuanVideo"), ("half.safetensors", "is truncated: 500 of")):
        prompt = graph(steps=1)
        prompt["model"]["inputs"]["model_name"] = name
        error = listen(prompt).error
        assert error["node_type"] == "OpenSoraModelLoader" and f"{name} {words}" in error["exception_message"]
    assert listen(graph(steps=1, seed=10)).error is None


def test_the_same_graph_is_not_run_twice(listen):
    first = listen(graph(steps=1, seed=12))
    again = listen(graph(steps=1, seed=12))
    assert first.progress("sampler") and not again.progress("sampler")
    cached = [data["nodes"] for kind, data in again.messages if kind == "execution_cached"][0]
    assert {"model", "sampler", "frames"} <= set(cached)


def test_stock_nodes_at_every_joint(server, listen):
    stock = {
        "model": ("UNETLoader", {"unet_name": MODEL, "weight_dtype": "default"}),
        "shifted": ("ModelSamplingSD3", {"model": ["model", 0], "shift": 5.73}),
        "latent": ("EmptyHunyuanLatentVideo", {"width": 64, "height": 48, "length": 5, "batch_size": 1}),
        "positive": ("CLIPTextEncode", {"clip": ["clip", 0], "text": "raining, sea. 24 FPS. 4 motion score."}),
        "negative": ("CLIPTextEncode", {"clip": ["clip", 0], "text": ""}),
        "sampler": (
            "KSampler",
            {
                "model": ["shifted", 0], "seed": 7, "steps": 3, "cfg": 7.5, "sampler_name": "euler", "scheduler": "simple",
                "positive": ["positive", 0], "negative": ["negative", 0], "latent_image": ["latent", 0], "denoise": 1.0,
            },
        ),
        "frames": ("VAEDecode", {"vae": ["vae", 0], "samples": ["sampler", 0]}),
        "video": ("CreateVideo", {"images": ["frames", 0], "fps": 24.0}),
        "save": ("SaveVideo", {"video": ["video", 0], "filename_prefix": "stock", "format": "auto", "codec": "auto"}),
    }  # fmt: skip
    prompt = graph()
    del prompt["text"]
    prompt |= {name: {"class_type": kind, "inputs": inputs, "_meta": {"title": name}} for name, (kind, inputs) in stock.items()}
    events = listen(prompt)
    assert events.error is None
    (path,) = server.files(events.outputs)
    assert path.stat().st_size > 1000


def of_1_3(sampler: str, vae: str) -> dict:
    """Text to video of Open-Sora 1.3 by one of two samplers."""
    nodes = graph(steps=1)
    nodes["model"]["inputs"]["model_name"] = "OpenSora-STDiT-v4.safetensors"
    nodes["clip"]["inputs"] |= {"t5_name": "t5_1.safetensors", "clip_l_name": "none (T5 alone)"}
    nodes["text"]["inputs"]["model"] = ["model", 0]
    size = {"size": "custom", "aspect_ratio": "16:9", "length": "17", "width": 56, "height": 40, "batch_size": 1}
    nodes["latent"] = {"class_type": "OpenSoraEmptyLatent", "inputs": {"model": ["model", 0], **size}}
    nodes["vae"]["inputs"]["vae_name"] = vae
    if sampler == "KSampler":
        links = {name: nodes["sampler"]["inputs"][name] for name in ("model", "positive", "negative", "seed", "steps")}
        how = {"cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
        nodes["sampler"] = {"class_type": sampler, "inputs": {**links, **how, "latent_image": ["latent", 0]}}
    return nodes


@pytest.mark.parametrize("sampler", ["OpenSoraRectifiedFlowSampler", "KSampler"])
def test_a_wrong_vae_is_said_before_sampling_or_loses_nothing(listen, sampler):
    """Ours looks where its latents go; the host's cannot, and what it made is there when the right VAE is chosen."""
    events = listen(of_1_3(sampler, "hunyuan_vae.safetensors"))
    is_ours = sampler != "KSampler"
    assert "works on the latents of the Open-Sora 1.3 VAE" in events.error["exception_message"]
    assert events.error["node_id"] == ("sampler" if is_ours else "frames")
    assert bool(events.progress("sampler")) != is_ours
    events = listen(of_1_3(sampler, "OpenSora-VAE-v1.3.safetensors"))
    assert events.error is None and len(events.outputs["save"]["images"]) == 17
    assert bool(events.progress("sampler")) == is_ours
