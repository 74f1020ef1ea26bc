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


@pytest.mark.parametrize(
    ("module", "name"),
    [("comfy.samplers", "CFGGuider"), ("comfy.model_base", "BaseModel"), ("comfy.supported_models_base", "BASE"), ("comfy.sd", "VAE"),
     ("comfy.latent_formats", "HunyuanVideo")],
)  # fmt: skip
def test_a_class_that_is_gone_before_the_pack_is_loaded(module, name, monkeypatch):
    import importlib
    import importlib.util
    import sys
    from pathlib import Path

    monkeypatch.delattr(importlib.import_module(module), name)
    root = Path(__file__).resolve().parents[3]
    spec = importlib.util.spec_from_file_location("open_sora_elsewhere", root / "__init__.py", submodule_search_locations=[str(root)])
    fresh = importlib.util.module_from_spec(spec)
    for loaded in [key for key in sys.modules if key.startswith("open_sora_elsewhere")]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, "open_sora_elsewhere", fresh)
    spec.loader.exec_module(fresh)
    nodes = load(asyncio.run(fresh.comfy_entrypoint()))
    assert len(nodes) >= 12
    with pytest.raises(ValueError, match=rf"lacks.*{name}"):
        nodes[0].EXECUTE_NORMALIZED(model_name="x")


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
