"""A host that has moved what the pack stands on: nodes still appear, and say what is needed."""

import asyncio

import pytest


@pytest.fixture
def extension(pack):
    return pack("nodes").OpenSoraExtension()


def load(extension):
    async def run():
        await extension.on_load()
        return await extension.get_node_list()

    return asyncio.run(run())


def test_this_host_has_everything(pack, extension):
    assert pack("nodes.host.selftest").problem() == ""
    assert load(extension) == list(pack("nodes").NODES)


@pytest.mark.parametrize(
    ("module", "name"),
    [("comfy.samplers", "calc_cond_batch"), ("comfy.sd", "load_diffusion_model_state_dict"), ("latent_preview", "prepare_callback"), ("comfy.samplers", "CFGGuider")],
)  # fmt: skip
def test_a_part_that_is_gone_is_named_and_nodes_stay(module, name, pack, extension, monkeypatch):
    import importlib

    monkeypatch.delattr(importlib.import_module(module), name)
    nodes = load(extension)
    ours = pack("nodes").NODES
    assert [node.GET_SCHEMA().node_id for node in nodes] == [node.GET_SCHEMA().node_id for node in ours]
    assert [node.INPUT_TYPES() for node in nodes] == [node.INPUT_TYPES() for node in ours]
    for node in nodes:
        with pytest.raises(pack("opensora_core.errors").OpenSoraError, match=rf"needs ComfyUI 0\.33\.0.*lacks.*{name}"):
            node.EXECUTE_NORMALIZED(whatever=1)


def test_parameters_that_were_renamed_are_found(pack, monkeypatch):
    import comfy.samplers

    monkeypatch.setattr(comfy.samplers, "calc_cond_batch", lambda model, everything: None)
    assert "comfy.samplers.calc_cond_batch" in pack("nodes.host.selftest").problem()


def test_a_method_that_is_gone_is_found(pack, monkeypatch):
    import comfy.model_base

    monkeypatch.delattr(comfy.model_base.BaseModel, "concat_cond")
    assert "model_base.BaseModel.concat_cond" in pack("nodes.host.selftest").problem()


def test_the_version_is_the_one_the_project_asks_for(pack):
    from pathlib import Path

    project = (Path(__file__).resolve().parents[3] / "pyproject.toml").read_text()
    assert f'requires-comfyui = ">={pack("nodes.host.selftest").NEEDED}"' in project
