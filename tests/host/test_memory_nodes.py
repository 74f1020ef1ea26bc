"""Memory over HTTP: modes, shared weights, /free, files written, and a plan whose outputs feed the loader."""

import time

import numpy as np
import pytest
from PIL import Image

FILE = "Open_Sora_v2.safetensors"
LOADED = {"class_type": "OpenSoraLoadedModels", "inputs": {"unload": "none"}}


def graph(steps=2, decode=None, **loader) -> dict:
    """Text to video, 5 frames of 64x48; `loader`: inputs of the model's loader beside file and precision."""
    sampler = {
        "model": ["model", 0], "positive": ["text", 0], "negative": ["text", 1], "latent": ["latent", 0], "seed": 7, "steps": steps,
        "text_guidance": 7.5, "image_guidance": 3.0, "text_oscillation": True, "image_oscillation": True, "temporal_ramp": True,
        "shift": 0.0, "noise_device": "cpu", "latent_dtype": "fp32",
    }  # fmt: skip
    clips = {"t5_name": "t5xxl.safetensors", "clip_l_name": "clip_l.safetensors", "precision": "auto", "device": "auto"}
    prompt = {"clip": ["clip", 0], "prompt": "raining, sea", "negative_prompt": "", "motion_score": 4, "fps": 24}
    clip = {"resolution": "custom", "aspect_ratio": "16:9", "num_frames": 5, "width": 64, "height": 48, "batch_size": 1}
    decoder = {"vae": ["vae", 0], "latent": ["sampler", 0], "tile_size": 256, "overlap": 0.25, "temporal_tile": 0, "policy": "auto"}
    nodes = {
        "model": ("OpenSoraModelLoader", {"model_name": FILE, "precision": "auto", **loader}),
        "clip": ("OpenSoraTextEncoderLoader", clips),
        "text": ("OpenSoraT5TextEncode", prompt),
        "latent": ("OpenSoraEmptyLatentVideo", clip),
        "sampler": ("OpenSoraRectifiedFlowSampler", sampler),
        "vae": ("OpenSoraVAELoader", {"vae_name": "hunyuan_vae.safetensors"}),
        "frames": ("OpenSoraTiledVAEDecode", {**decoder, **(decode or {})}),
        "save": ("SaveImage", {"images": ["frames", 0], "filename_prefix": "memory"}),
    }
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}


def frames_of(server, events) -> np.ndarray:
    assert events.error is None, events.error
    return np.stack([np.asarray(Image.open(path)) for path in server.files(events.outputs)])


def text_of(events, node: str) -> str:
    return "".join(events.outputs[node]["text"])


def free(server, **what) -> None:
    """POST /free, and wait until the host has done it (it does so between prompts)."""
    server.post("/free", what)
    time.sleep(2)


def test_every_mode_makes_the_same_video(server, listen):
    expected = frames_of(server, listen(graph()))
    assert expected.std() > 1
    for mode in ("minimal", "budget", "resident"):
        events = listen(graph(offload=mode, budget_gib=0.1))
        assert np.array_equal(frames_of(server, events), expected), mode
        [line] = [line for node, line in events.texts if node == "model"]
        assert line.startswith(f"Offload {mode}: ComfyUI computes on the CPU here")
    nodes = graph()
    nodes["offload"] = {"class_type": "OpenSoraOffload", "inputs": {"model": ["model", 0], "mode": "minimal", "budget_gib": 8.0}}
    nodes["sampler"]["inputs"]["model"] = ["offload", 0]
    assert np.array_equal(frames_of(server, listen(nodes)), expected)


def test_a_budget_that_is_none_stops_the_run_in_a_sentence(listen):
    assert "is larger than the device" in listen(graph(offload="budget", budget_gib=1000.0)).error["exception_message"]


def test_loaders_share_weights_and_free_lets_go_of_them(server, listen):
    # With much RAM the host keeps outputs of earlier graphs, such as a stock loader's MODEL of the same file.
    free(server, unload_models=True, free_memory=True)
    nodes = graph()
    other = graph(offload="minimal")
    nodes |= {"model 2": other["model"], "sampler 2": other["sampler"]}
    nodes["sampler 2"]["inputs"] |= {"model": ["model 2", 0], "seed": 8}
    nodes["save 2"] = {"class_type": "SaveLatent", "inputs": {"samples": ["sampler 2", 0], "filename_prefix": "memory"}}
    nodes["loaded"] = {"class_type": "OpenSoraLoadedModels", "inputs": {"any": ["save", 0], "unload": "none"}}
    lines = text_of(listen(nodes), "loaded").splitlines()
    assert len([line for line in lines if line.startswith(f"model: {FILE} (OpenSora2Model), float32")]) == 1
    assert [line for line in lines if line.startswith("text encoders: t5xxl.safetensors, clip_l.safetensors")]
    assert [line for line in lines if line.startswith("VAE: hunyuan_vae.safetensors")]
    # /free of the models alone keeps the nodes' outputs, and with them the weights in RAM; that of the caches lets all of it go.
    free(server, unload_models=True)
    assert f"model: {FILE}" in text_of(listen({"loaded": LOADED}), "loaded")
    assert frames_of(server, listen(graph(steps=3))).shape[0] == 5
    free(server, unload_models=True, free_memory=True)
    assert text_of(listen({"loaded": LOADED}), "loaded") == "No model is loaded."
    frames_of(server, listen(graph()))
    assert "memory leak" not in server.log.lower()


def test_failed_runs_leave_no_leak_in_the_hosts_log(server, listen):
    """Stopped in the middle of sampling, failed in the middle of it, while decoding, and while loading; then all is let go."""
    stopped = []

    def interrupt(kind, data):
        if not stopped and kind == "progress" and data["node"] == "sampler" and data["value"] > 1:
            stopped.append(server.post("/interrupt", {}))

    listen(graph(steps=500, offload="minimal"), on_message=interrupt)
    assert stopped
    # A stock sampler takes a latent of odd sides and fails in the transformer's forward.
    wrong = graph()
    wrong["latent"] = {"class_type": "EmptyHunyuanLatentVideo", "inputs": {"width": 72, "height": 64, "length": 5, "batch_size": 1}}
    given = {name: wrong["sampler"]["inputs"][name] for name in ("model", "positive", "negative", "seed", "steps")}
    stock = {"latent_image": ["latent", 0], "cfg": 5.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    wrong["sampler"] = {"class_type": "KSampler", "inputs": {**given, **stock}}
    assert listen(wrong).error is not None
    # Another model's latent in the decoder, and a budget that no device has.
    odd = graph(decode={"latent": ["latent 2", 0]})
    odd["latent 2"] = {"class_type": "EmptyLTXVLatentVideo", "inputs": {"width": 64, "height": 64, "length": 9, "batch_size": 1}}
    assert "This LATENT is" in listen(odd).error["exception_message"]
    assert listen(graph(offload="budget", budget_gib=1000.0)).error is not None
    assert frames_of(server, listen(graph(steps=3))).shape[0] == 5
    free(server, unload_models=True, free_memory=True)
    assert text_of(listen({"loaded": LOADED}), "loaded") == "No model is loaded."
    assert "memory leak" not in server.log.lower()


def test_what_is_kept_loaded_outlives_its_graph_and_not_a_free(server, listen):
    keep = {"class_type": "OpenSoraLoadedModels", "inputs": {"unload": "none", "keep_gib": 4.0}}
    nodes = graph()
    nodes["loaded"] = {**keep, "inputs": {**keep["inputs"], "any": ["save", 0]}}
    assert text_of(listen(nodes), "loaded").count(", kept loaded") == 3
    free(server, unload_models=True)
    lines = text_of(listen({"loaded": keep}), "loaded").splitlines()
    assert lines[1] == "Up to 4 GiB stay loaded after their use." and len([line for line in lines if line.endswith(", kept loaded")]) == 3
    free(server, unload_models=True, free_memory=True)
    assert text_of(listen({"loaded": keep}), "loaded").splitlines()[0] == "No model is loaded."
    assert text_of(listen({"loaded": LOADED}), "loaded") == "No model is loaded."
    assert "memory leak" not in server.log.lower()


def test_unloading_by_a_node(server, listen):
    nodes = graph()
    nodes["loaded"] = {"class_type": "OpenSoraLoadedModels", "inputs": {"any": ["save", 0], "unload": "everything"}}
    expected = frames_of(server, listen(graph()))
    events = listen(nodes)
    assert text_of(events, "loaded").splitlines()[1].startswith("Unloaded: ")
    assert np.array_equal(frames_of(server, listen(graph())), expected)


def test_a_written_file_is_offered_and_runs_in_both_loaders(server, listen):
    name = "written.safetensors"
    node = {"class_type": "OpenSoraQuantize", "inputs": {"model_name": FILE, "format": "int8", "file_name": name}}
    events = listen({"quantize": node})
    assert text_of(events, "quantize").startswith(f"{name}: ")
    done, total = events.progress("quantize")[-1]
    assert done == total > 10
    for loader, key in (("OpenSoraModelLoader", "model_name"), ("UNETLoader", "unet_name")):
        sections = server.get(f"/object_info/{loader}")[loader]["input"]["required"]
        kind, options = (*sections[key], {})[:2]
        assert name in (options.get("options") or kind)
    ours = graph(model_name=name)
    stock = graph()
    stock["model"] = {"class_type": "UNETLoader", "inputs": {"unet_name": name, "weight_dtype": "default"}}
    assert np.array_equal(frames_of(server, listen(ours)), frames_of(server, listen(stock)))
    node["inputs"]["format"] = "fp8_e4m3fn"
    assert "is not overwritten" in listen({"quantize": node}).error["exception_message"]
    node["inputs"]["file_name"] = "../outside"
    assert "is not a file name" in listen({"quantize": node}).error["exception_message"]
    assert not (server.base / "models/outside.safetensors").exists()
    (server.base / "models/diffusion_models" / name).unlink()


def test_a_plans_outputs_feed_loader_and_decoder(server, listen):
    inputs = {"width": 64, "height": 48, "num_frames": 5, "model_name": FILE, "precision": "auto", "offload": "auto"}
    nodes = graph(precision=["plan", 1], offload=["plan", 2], decode={"policy": ["plan", 3]})
    nodes["plan"] = {"class_type": "OpenSoraPreflight", "inputs": inputs}
    events = listen(nodes)
    assert np.array_equal(frames_of(server, events), frames_of(server, listen(graph())))
    report = text_of(events, "plan")
    assert "This fits: precision" in report or "Use: precision" in report  # which of the two is for this machine's free memory to say
    assert [text for node, text in events.texts if node == "plan"] == [report.splitlines()[0]]


@pytest.mark.parametrize(("changes", "words"), [({"num_frames": 6}, "Use 5 or 9"), ({"width": 72}, "multiple")])
def test_a_plan_for_impossible_sizes_is_refused_when_queued(changes, words, server):
    from demo import comfy

    inputs = {"width": 64, "height": 48, "num_frames": 5, "model_name": FILE, "precision": "auto", "offload": "auto", **changes}
    with pytest.raises(comfy.HostError, match=words):
        server.run({"plan": {"class_type": "OpenSoraPreflight", "inputs": inputs}})


def test_kept_prompts_outlive_a_free_of_everything(server, listen):
    nodes = graph()
    expected = frames_of(server, listen(nodes))
    nodes["text"]["inputs"]["keep_encoded"] = True
    for _ in range(2):  # encoded and kept, then taken from memory
        free(server, unload_models=True, free_memory=True)
        assert np.array_equal(frames_of(server, listen(nodes)), expected)
