"""A network in several files, named by its folder, its index or any of its files, is read as one."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from opensora_core.checkpoint.files import network_files
from opensora_core.checkpoint.load import load_transformer, load_vae
from opensora_core.checkpoint.quantize import quantize
from opensora_core.cli import main
from opensora_core.errors import CheckpointError
from opensora_core.inspection.report import check, report
from opensora_core.memory.loaded import stamp
from opensora_core.pipeline import OpenSoraPipeline
from opensora_core.run.files import ModelFiles, check_files


def split(source, folder, stem, with_index=True):
    """A weights file in two parts."""
    folder.mkdir(parents=True, exist_ok=True)
    state = load_file(source)
    names = [f"{stem}-{part:05d}-of-00002.safetensors" for part in (1, 2)]
    shards = {key: names[index % 2] for index, key in enumerate(state)}
    for name in names:
        save_file({key: state[key] for key in state if shards[key] == name}, folder / name)
    if with_index:
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    return folder


@pytest.fixture(scope="module")
def transformer(golden_path, tmp_path_factory):
    return split(golden_path / "transformer_weights.safetensors", tmp_path_factory.mktemp("dit"), "Open_Sora_v2")


STEM = "Open_Sora_v2"
NAMES = ["", f"{STEM}.safetensors.index.json", f"{STEM}-00001-of-00002.safetensors", f"{STEM}-00002-of-00002.safetensors"]


@pytest.mark.parametrize("name", NAMES)
def test_a_transformer_in_parts_is_the_transformer(golden_path, transformer, name):
    whole = load_transformer(golden_path / "transformer_weights.safetensors").state_dict()
    found = load_transformer(transformer / name).state_dict()
    assert found.keys() == whole.keys() and all(torch.equal(found[key], whole[key]) for key in whole)
    assert len(stamp(transformer / name).parts) >= 2


def test_a_vae_in_parts_without_an_index(golden_path, tmp_path):
    folder = split(golden_path / "vae_weights.safetensors", tmp_path, "diffusion_pytorch_model", with_index=False)
    whole = load_vae(golden_path / "vae_weights.safetensors").state_dict()
    for path in (folder, folder / "diffusion_pytorch_model-00002-of-00002.safetensors"):
        assert all(torch.equal(tensor, whole[key]) for key, tensor in load_vae(path).state_dict().items())


@pytest.mark.parametrize("name", NAMES[1:])
def test_inspect_says_which_part_it_was_given(transformer, name):
    said = "the index of 2 parts" if name.endswith("json") else f"part {int(name.split('-')[1])} of 2"
    text = report(transformer / name)
    assert f"{name} ({said}): an Open-Sora 2.0 transformer" in text and "INCOMPLETE" not in text
    assert check(transformer / name).passed


def test_a_missing_part_is_named(transformer, tmp_path, capsys):
    name = "model-00001-of-00002.safetensors"
    shutil.copy(transformer / NAMES[2], tmp_path / name)
    with pytest.raises(CheckpointError, match="is part 1 of 2, and 1 of the others are not beside it, the first is model-00002-of-00002"):
        load_transformer(tmp_path / name)
    assert main(["inspect", str(tmp_path / name)]) == 2
    assert "part 1 of 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "index",
    [
        "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../elsewhere.safetensors"}}', '{"weight_map": {}}',
        '{"weight_map": {"a": "x\\u0000y"}}', '{"weight_map": {"a": "not_there.safetensors"}}', "[" * 100_000, '{"a": ' + "9" * 5000 + "}",
    ],
)  # fmt: skip
def test_a_damaged_index_is_one_sentence(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        with pytest.raises(CheckpointError) as caught:
            network_files(path)
        assert "\n" not in str(caught.value)


def test_quantize_reads_parts(golden_path, transformer, tmp_path):
    quantize(transformer / NAMES[2], tmp_path / "parts.safetensors")
    quantize(golden_path / "transformer_weights.safetensors", tmp_path / "whole.safetensors")
    parts, whole = load_file(tmp_path / "parts.safetensors"), load_file(tmp_path / "whole.safetensors")
    assert parts.keys() == whole.keys() and all(torch.equal(parts[key], whole[key]) for key in whole)


def split_quantised(source, folder, stem):
    """A quantised file in two parts, each of which says how its own layers are quantised."""
    with safe_open(source, "pt") as file:
        note, state = (
            json.loads(file.metadata()["_quantization_metadata"]),
            {key: file.get_tensor(key) for key in file.keys() if not key.endswith(".comfy_quant")},
        )
    layers = list(note["layers"])
    for part in (1, 2):
        own = {layer: note["layers"][layer] for layer in layers[part - 1 :: 2]}
        others = {layer for layer in layers if layer not in own}
        keys = [key for key in state if key.rpartition(".")[0] not in others and (key.rpartition(".")[0] in own or part == 1)]
        about = {"_quantization_metadata": json.dumps({**note, "layers": own})}
        save_file({key: state[key] for key in keys}, folder / f"{stem}-{part:05d}-of-00002.safetensors", about)
    return folder / f"{stem}-00001-of-00002.safetensors"


@pytest.mark.parametrize("form", ["fp8_e4m3fn", "int8"])
def test_what_each_part_says_of_its_quantised_layers_is_read(golden_path, tmp_path, form):
    quantize(golden_path / "transformer_weights.safetensors", tmp_path / "whole.safetensors", form)
    path = split_quantised(tmp_path / "whole.safetensors", tmp_path, "q")
    whole, found = (load_transformer(each).state_dict() for each in (tmp_path / "whole.safetensors", path))
    assert found.keys() == whole.keys() and all(torch.equal(found[key], whole[key]) for key in whole)
    assert sum("int8" in str(value.dtype) or "float8" in str(value.dtype) for value in found.values()) > 10


def test_a_part_that_says_nonsense_of_its_layers_is_named(golden_path, tmp_path):
    quantize(golden_path / "transformer_weights.safetensors", tmp_path / "whole.safetensors")
    path = split_quantised(tmp_path / "whole.safetensors", tmp_path, "q")
    save_file(load_file(path), path, {"_quantization_metadata": '{"layers": [1]}'})
    with pytest.raises(CheckpointError, match="says in an unreadable way how it is quantised"):
        load_transformer(path)


def test_a_models_folder_may_hold_parts(tiny_checkpoint, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, folder)
    for stem in ("Open_Sora_v2", "hunyuan_vae"):
        split(folder / f"{stem}.safetensors", folder, stem)
        (folder / f"{stem}.safetensors").unlink()
    files = ModelFiles.in_folder(folder)
    check_files(files)
    one, other = OpenSoraPipeline.from_pretrained(folder), OpenSoraPipeline.from_pretrained(tiny_checkpoint)
    settings = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 1, "seed": 1}
    assert torch.equal(one("a", **settings).latents, other("a", **settings).latents)
