"""A run that failed keeps nothing of ours alive: every network dies when the host lets go of it, and the host reports no leak."""

import gc
import logging
import types
import weakref

import pytest
import torch

NETWORKS = 3  # transformer, text encoders, VAE


@pytest.fixture
def networks(pack, monkeypatch):
    """Weak references to every network that our loaders read."""
    shared, found = pack("nodes.host.shared"), []

    def recording(load, network_of):
        def wrapped(*given):
            loaded = load(*given)
            found.append(weakref.ref(network_of(loaded)))
            return loaded

        return wrapped

    for name, network_of in (
        ("load_model", lambda loaded: loaded.model),
        ("load_text_encoders", lambda loaded: loaded.cond_stage_model),
        ("load_vae", lambda loaded: loaded.first_stage_model),
    ):
        monkeypatch.setattr(shared, name, recording(getattr(shared, name), network_of))
    return found


@pytest.fixture
def executor(monkeypatch):
    """The host's own, with its default kind of cache."""
    import comfy.memory_management
    import execution
    from server import PromptServer

    server = types.SimpleNamespace(
        client_id=None, last_node_id=None, last_prompt_id=None, send_sync=lambda *given: None, send_progress_text=lambda *given: None
    )
    monkeypatch.setattr(PromptServer, "instance", server, raising=False)
    yield execution.PromptExecutor(server, cache_type=execution.CacheType.RAM_PRESSURE, cache_args={"lru": 0, "ram": 0, "ram_inactive": 0})
    comfy.memory_management.set_ram_cache_release_state(None, 0)


def graph(**loader) -> dict:
    sampler = {"text_guidance": 7.5, "image_guidance": 3.0, "seed": 1, "steps": 3}
    decoder = {"tile_size": 256, "overlap": 0.25, "temporal_tile": 0, "policy": "auto"}
    clips = {"t5_name": "t5xxl.safetensors", "clip_l_name": "clip_l.safetensors", "precision": "auto", "device": "auto"}
    prompt = {"clip": ["clip", 0], "prompt": "rain", "negative_prompt": "", "motion_score": 4, "fps": 24}
    nodes = {
        "model": ("OpenSoraModelLoader", {"model_name": "Open_Sora_v2.safetensors", "precision": "auto", **loader}),
        "clip": ("OpenSoraTextEncoderLoader", clips),
        "vae": ("OpenSoraVAELoader", {"vae_name": "hunyuan_vae.safetensors"}),
        "text": ("OpenSoraT5TextEncode", prompt),
        "latent": ("EmptyHunyuanLatentVideo", {"width": 64, "height": 48, "length": 5, "batch_size": 1}),
        "sample": (
            "OpenSoraRectifiedFlowSampler",
            {"model": ["model", 0], "positive": ["text", 0], "negative": ["text", 1], "latent": ["latent", 0], **sampler},
        ),
        "frames": ("OpenSoraTiledVAEDecode", {"vae": ["vae", 0], "latent": ["sample", 0], **decoder}),
        "save": ("SaveImage", {"images": ["frames", 0], "filename_prefix": "nothing_left"}),
    }
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}


def failing(pack, monkeypatch, where: str, error: BaseException) -> None:
    """From the second call on, the transformer's forward or the VAE's decode raises in the middle of its work."""
    owner, name = {
        "forward": (pack("nodes.host.network").HostMMDiT, "_velocity"),
        "decode": (pack("nodes.host.vae").VAENetwork, "decode_tile"),
        "text": (pack("nodes.host.text"), "exact_tokens"),
    }[where]
    real, calls = getattr(owner, name), []

    def fail(*given, **named):
        calls.append(1)
        result = real(*given, **named)
        if len(calls) > 1 or where != "forward":
            raise error
        return result

    monkeypatch.setattr(owner, name, fail)


@pytest.mark.parametrize(
    ("where", "kind", "offload"),
    [("forward", kind, mode) for kind in ("error", "memory", "interrupt") for mode in ("auto", "minimal", "resident")]
    + [("decode", "error", "auto"), ("decode", "memory", "auto"), ("text", "error", "auto")],
)
def test_after_a_failed_run_everything_dies(where, kind, offload, executor, networks, pack, monkeypatch, caplog):
    import comfy.model_management

    error = {"error": RuntimeError("shape mismatch"), "memory": torch.OutOfMemoryError("Tried to allocate 2.00 GiB"),
             "interrupt": comfy.model_management.InterruptProcessingException()}[kind]  # fmt: skip
    caplog.set_level(logging.INFO)
    with monkeypatch.context() as patch:
        failing(pack, patch, where, error)
        executor.execute(graph(offload=offload), "failed", {}, ["save"])
    told = dict(executor.status_messages)
    assert ("execution_interrupted" if kind == "interrupt" else "execution_error") in told
    assert len(networks) >= NETWORKS - (where == "text")
    executor.execute(graph(offload=offload), "again", {}, ["save"])
    assert "execution_success" in dict(executor.status_messages)
    assert len(networks) == NETWORKS  # nothing was read twice
    with monkeypatch.context() as patch:
        failing(pack, patch, where, error)
        changed = graph(offload=offload)
        changed["text"]["inputs"]["prompt"] = "snow"
        executor.execute(changed, "failed", {}, ["save"])
    error.__traceback__ = None  # this test's own reference to the frames that failed
    # What the host does for "Free model and node cache".
    comfy.model_management.unload_all_models()
    executor.reset()
    gc.collect()
    assert [reference() for reference in networks] == [None] * NETWORKS
    comfy.model_management.cleanup_models_gc()
    comfy.model_management.cleanup_models()
    assert not comfy.model_management.current_loaded_models
    assert not [record.getMessage() for record in caplog.records if "memory leak" in record.getMessage().lower()]
