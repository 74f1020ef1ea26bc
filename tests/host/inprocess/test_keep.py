"""Models kept loaded beyond their use: only if asked, within the limit, and never against the host. And one copy of a CLIP for its copies."""

import asyncio
import gc
import threading
import weakref

import pytest
import torch

FILE = "Open_Sora_v2.safetensors"
NAMES = {"t5_name": "t5xxl.safetensors", "clip_l_name": "clip_l.safetensors", "device": "auto"}
GIB = 2**30


@pytest.fixture
def load(run_node):
    return lambda precision="auto": run_node("OpenSoraModelLoader", model_name=FILE, precision=precision)[0]


@pytest.fixture
def load_clip(run_node):
    return lambda precision="auto": run_node("OpenSoraTextEncoderLoader", **NAMES, precision=precision)[0]


@pytest.fixture
def keep(run_node):
    """Run the node with a limit: keep(gib) -> its report."""
    return lambda gib, unload="none": run_node("OpenSoraLoadedModels", unload=unload, keep_gib=gib)[0]


@pytest.fixture(autouse=True)
def nothing_kept(pack, monkeypatch):
    import comfy.memory_management
    import comfy.model_management

    monkeypatch.setattr(comfy.memory_management, "RAM_CACHE_HEADROOM", 0)
    shared = pack("opensora_core.memory.loaded").SHARED
    yield
    shared.keep_up_to(0)
    comfy.model_management.unload_all_models()


def dead(*references) -> list[bool]:
    gc.collect()
    return [reference() is None for reference in references]


def test_nothing_is_kept_unless_asked(load, keep):
    model = load()
    network = weakref.ref(model.model)
    assert "kept" not in keep(0.0) and "stay loaded" not in keep(0.0)
    del model
    assert dead(network) == [True]


def test_kept_models_outlive_their_use_and_are_found_again(load, load_clip, run_node, keep):
    model, clip, vae = load(), load_clip(), run_node("OpenSoraVAELoader", vae_name="hunyuan_vae.safetensors")[0]
    report = keep(4.0)  # what is loaded already counts
    assert "\nUp to 4 GiB stay loaded after their use." in report and report.count(", kept loaded") == 3
    parts = [weakref.ref(part) for part in (model.model, clip.cond_stage_model, vae.first_stage_model)]
    del model, clip, vae
    assert dead(*parts) == [False] * 3
    assert load().model is parts[0]() and load_clip().cond_stage_model is parts[1]()
    keep(0.0)
    assert dead(*parts) == [True] * 3
    assert keep(0.0) == "No model is loaded."


def test_the_least_recently_used_goes_first(load, keep):
    keep(4.0)
    first, second = load("fp32"), load("bf16")
    sizes = first.model_size(), second.model_size()
    load("fp32")  # used again
    networks = [weakref.ref(first.model), weakref.ref(second.model)]
    del first, second
    report = keep((sum(sizes) - 1) / GIB)
    assert "float32" in report and "bfloat16" not in report
    assert dead(*networks) == [False, True]
    third = weakref.ref(load("int8").model)
    assert dead(*networks, third) == [True, True, False]


def test_it_can_be_sampled_after_its_loader_is_gone(load, keep, run_node, conditioning, caplog):
    import comfy.model_management

    keep(4.0)

    def sample():
        given = {"positive": conditioning(1), "negative": conditioning(2), "latent": {"samples": torch.zeros(1, 16, 2, 6, 8)}, "seed": 3}
        return run_node("OpenSoraRectifiedFlowSampler", model=load(), **given, steps=2, text_guidance=7.5, image_guidance=3.0)[0]["samples"]

    expected = sample()
    gc.collect()
    assert torch.equal(sample(), expected)
    comfy.model_management.unload_all_models()
    assert torch.equal(sample(), expected)
    gc.collect()
    comfy.model_management.cleanup_models_gc()
    assert not [record for record in caplog.records if "memory leak" in record.getMessage()]


def test_the_host_wins_where_ram_is_short(load, keep, monkeypatch):
    import comfy.memory_management

    keep(4.0)
    model = load()
    network = weakref.ref(model.model)
    other = load("bf16")
    monkeypatch.setattr(comfy.memory_management, "RAM_CACHE_HEADROOM", 2**60)
    del model  # as when the host gives up the output of the loader
    assert dead(network) == [True]
    second = weakref.ref(other.model)
    del other
    assert dead(second) == [True]
    third = weakref.ref(load("int8").model)  # loaded while RAM is short
    assert dead(third) == [True]


def test_freeing_the_hosts_cache_wins(load, keep, pack, monkeypatch):
    """The request as the host's server shows it when it answers. On its thread nothing may die; it does on the queue's, or when that waits."""
    keeping = pack("nodes.host.keep")
    answered, running = keeping._answered, {}
    queue = type("Queue", (), {"mutex": threading.RLock(), "currently_running": running, "flags": {}})
    monkeypatch.setattr(keeping, "PromptServer", type("Server", (), {"instance": type("Instance", (), {"prompt_queue": queue})}))
    monkeypatch.setattr(queue, "get_flags", lambda reset=True: {}, raising=False)

    def request(path, method="POST", status=200, **body):
        async def json():
            return body

        given = type("Request", (), {"path": path, "method": method, "json": staticmethod(json)})
        asyncio.run(answered(given, type("Response", (), {"status": status})))

    keep(4.0)
    network = weakref.ref(load().model)
    request("/free", unload_models=True)
    request("/prompt", free_memory=True)
    request("/free", "GET", free_memory=True)
    request("/free", status=500, free_memory=True)
    assert dead(network) == [False]
    request("/api/free", unload_models=True, free_memory=True)
    assert dead(network) == [False]
    running[0] = "a prompt"
    keeping._free_while_idle()
    assert dead(network) == [False]
    running.clear()
    keeping._free_while_idle()
    assert dead(network) == [True]
    network = weakref.ref(load().model)
    request("/free", free_memory=True)
    other = load("bf16")  # the next that runs
    assert dead(network) == [True]
    assert dead(weakref.ref(other.model)) == [False]


def test_what_is_loaded_while_the_host_is_about_to_free_is_not_kept(load, keep, pack, monkeypatch):
    class Queue:
        def get_flags(self, reset=True):
            assert not reset, "the flags are the host's"
            return {"free_memory": True}

    class Server:
        instance = type("Instance", (), {"prompt_queue": Queue()})

    keep(4.0)
    monkeypatch.setattr(pack("nodes.host.keep"), "PromptServer", Server)
    network = weakref.ref(load().model)
    assert dead(network) == [True]


@pytest.mark.parametrize("gib", [-1.0, float("nan"), float("inf")])
def test_a_limit_is_an_amount(gib, keep):
    with pytest.raises(ValueError, match="not an amount of memory"):
        keep(gib)


def test_a_copy_of_a_clip_keeps_it_shared(load_clip):
    """As when only a LoRA's copy is left in the graph."""
    clip = load_clip()
    copy, network = clip.clone(), weakref.ref(clip.cond_stage_model)
    copy.add_patches({"clip_l.transformer.text_model.final_layer_norm.weight": ("diff", (torch.zeros(64),))})
    copy.tokenizer_options["t5xxl_min_length"] = 1
    del clip
    gc.collect()
    again = load_clip()
    assert again.cond_stage_model is network() is copy.cond_stage_model
    assert again.patcher is not copy.patcher and not again.patcher.patches and not again.tokenizer_options
    assert load_clip().tokenizer_options is not again.tokenizer_options
    del copy, again
    assert dead(network) == [True]


def test_a_clip_dies_without_the_collector(load_clip):
    """No circle of references: the host collects those only when it must."""
    gc.collect()
    clip = load_clip()
    network = weakref.ref(clip.cond_stage_model)
    gc.disable()
    try:
        del clip
        assert network() is None
    finally:
        gc.enable()
