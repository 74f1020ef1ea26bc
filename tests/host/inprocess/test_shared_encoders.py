"""Flux and Open-Sora, each with its own loader node in the graph: one T5 and one CLIP-L in memory, each file read once."""

import gc
import weakref
from pathlib import Path

import pytest
import torch

FILES = {"t5_name": "t5xxl.safetensors", "clip_l_name": "clip_l.safetensors"}


@pytest.fixture
def load(run_node):
    """As each of two nodes in a graph does."""
    return lambda: run_node("OpenSoraTextEncoderLoader", **FILES, precision="auto", device="auto")[0]


@pytest.fixture
def prompt(run_node):
    """T5's states of one text as Open-Sora reads it."""
    given = {"prompt": "rain", "negative_prompt": "", "motion_score": 4, "fps": 24}
    return lambda clip: run_node("OpenSoraT5TextEncode", clip=clip, **given)[0][0][0]


@pytest.fixture
def flux_prompt(run_node):
    """As Flux's stock node has it."""
    return lambda clip: run_node("CLIPTextEncodeFlux", clip=clip, clip_l="rain", t5xxl="rain", guidance=4.0)[0][0][0]


@pytest.fixture
def reads(monkeypatch):
    """Names of the encoders' files that the host reads, as often as it does."""
    import comfy.utils

    found, real = [], comfy.utils.load_torch_file

    def read(path, *given, **options):
        found.append(Path(path).name)
        return real(path, *given, **options)

    monkeypatch.setattr(comfy.utils, "load_torch_file", read)
    return found


@pytest.fixture(autouse=True)
def nothing_else_loaded(pack):
    import comfy.model_management

    pack("opensora_core.memory.loaded").PROMPTS.clear()
    comfy.model_management.unload_all_models()
    gc.collect()
    yield
    comfy.model_management.unload_all_models()


def encoders_alive() -> list:
    import comfy.text_encoders.flux

    gc.collect()
    return [thing for thing in gc.get_objects() if issubclass(type(thing), comfy.text_encoders.flux.FluxClipModel)]


def addresses(network) -> set[int]:
    return {parameter.data_ptr() for parameter in network.parameters()}


def test_one_copy_serves_flux_and_open_sora(load, reads, run_node, prompt, flux_prompt):
    import comfy.model_management

    before = len(encoders_alive())
    for_flux, for_video = load(), load()
    network = for_flux.cond_stage_model
    assert sorted(reads) == ["clip_l.safetensors", "t5xxl.safetensors"]
    assert for_video.cond_stage_model is network and for_video.patcher is for_flux.patcher
    held = addresses(network)
    of_flux, of_video = flux_prompt(for_flux), prompt(for_video)
    assert torch.equal(flux_prompt(for_video), of_flux) and torch.equal(prompt(for_flux), of_video) and not torch.equal(of_flux, of_video)
    # In the host's list once, nothing read again, nothing copied.
    loaded = [entry.model.model for entry in comfy.model_management.current_loaded_models]
    assert loaded.count(network) == 1 and len(loaded) == 1
    assert len(reads) == 2 and addresses(network) == held and len(encoders_alive()) == before + 1
    report = run_node("OpenSoraLoadedModels", unload="none")[0]
    assert report.count("t5xxl.safetensors") == report.count("clip_l.safetensors") == 1
    # The host's own unloading takes it off the device for both; either brings it back.
    comfy.model_management.unload_all_models()
    assert torch.equal(prompt(for_video), of_video) and torch.equal(flux_prompt(for_flux), of_flux) and len(reads) == 2
    # It lives until the last of the two lets go.
    gone = weakref.ref(network)
    del network, for_flux, loaded
    comfy.model_management.unload_all_models()
    gc.collect()
    assert gone() is not None
    del for_video
    gc.collect()
    assert gone() is None


def test_a_lora_on_one_of_them_leaves_the_other_as_it_was(load, reads, prompt):
    for_flux, for_video = load().clone(), load()
    plain = prompt(for_video)
    key = "t5xxl.transformer.encoder.final_layer_norm.weight"
    assert for_flux.add_patches({key: ("diff", (torch.ones_like(for_flux.cond_stage_model.state_dict()[key]),))})
    assert not torch.equal(prompt(for_flux), plain) and torch.equal(prompt(for_video), plain)
    assert for_flux.cond_stage_model is for_video.cond_stage_model and len(reads) == 2
