"""A network in several files, named by any of them in the host's list, is read as one by every loader of ours."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

PLACES = {"diffusion_models": "Open_Sora_v2", "vae": "hunyuan_vae", "text_encoders": "t5xxl"}


@pytest.fixture(scope="module")
def shards(base):
    """Every network in two parts beside the whole one."""
    for folder, stem in PLACES.items():
        state = load_file(base / f"models/{folder}/{stem}.safetensors")
        for part in (1, 2):
            keys = list(state)[part - 1 :: 2]
            save_file({key: state[key] for key in keys}, base / f"models/{folder}/{stem}-{part:05d}-of-00002.safetensors")
    return {folder: f"{stem}-00001-of-00002.safetensors" for folder, stem in PLACES.items()}


def test_the_transformer(shards, run_node, model):
    (found,) = run_node("OpenSoraModelLoader", model_name=shards["diffusion_models"])
    expected = model.model.diffusion_model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in found.model.diffusion_model.state_dict().items())


def test_the_transformer_in_eight_bits(shards, run_node):
    (found,) = run_node("OpenSoraModelLoader", model_name=shards["diffusion_models"].replace("00001", "00002"), precision="int8")
    assert found.model.diffusion_model is not None


def test_what_each_part_says_of_its_quantised_layers_is_read(base, run_node, pack):
    folder = base / "models/diffusion_models"
    pack("opensora_core.checkpoint.quantize").quantize(folder / "Open_Sora_v2.safetensors", folder / "whole_8.safetensors")
    with safe_open(folder / "whole_8.safetensors", "pt") as file:
        note, state = (
            json.loads(file.metadata()["_quantization_metadata"]),
            {key: file.get_tensor(key) for key in file.keys() if not key.endswith(".comfy_quant")},
        )
    layers = list(note["layers"])
    for part in (1, 2):
        own = layers[part - 1 :: 2]
        keys = [key for key in state if (layer := key.rpartition(".")[0]) in own or (layer not in layers and part == 1)]
        about = {"_quantization_metadata": json.dumps({**note, "layers": {layer: note["layers"][layer] for layer in own}})}
        save_file({key: state[key] for key in keys}, folder / f"parts_8-{part:05d}-of-00002.safetensors", about)
    whole, found = (
        run_node("OpenSoraModelLoader", model_name=name)[0].model.diffusion_model.state_dict()
        for name in ("whole_8.safetensors", "parts_8-00001-of-00002.safetensors")
    )
    assert whole.keys() == found.keys() and all(found[key].dtype == whole[key].dtype for key in whole)


def test_the_vae(shards, run_node):
    (found,) = run_node("OpenSoraVAELoader", vae_name=shards["vae"])
    (whole,) = run_node("OpenSoraVAELoader", vae_name="hunyuan_vae.safetensors")
    expected = whole.first_stage_model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in found.first_stage_model.state_dict().items())


def test_t5(shards, run_node):
    clips = [
        run_node("OpenSoraTextEncoderLoader", t5_name=name, clip_l_name="clip_l.safetensors")[0]
        for name in (shards["text_encoders"], "t5xxl.safetensors")
    ]
    (found, *_), (expected, *_) = (run_node("OpenSoraT5TextEncode", clip=clip, prompt="a cat") for clip in clips)
    assert torch.equal(found[0][0], expected[0][0])


def test_a_part_that_is_missing_is_named(shards, base, run_node, pack):
    path = base / "models/diffusion_models/Open_Sora_v2-00002-of-00002.safetensors"
    kept = path.read_bytes()
    path.unlink()
    try:
        with pytest.raises(pack("opensora_core.errors").CheckpointError, match="part 1 of 2.*Open_Sora_v2-00002-of-00002"):
            run_node("OpenSoraModelLoader", model_name=shards["diffusion_models"])
    finally:
        path.write_bytes(kept)


def test_another_file_behind_the_second_name_is_another_model(shards, base, pack):
    import os

    stamp = pack("nodes.host.paths").stamp
    before = stamp("diffusion_models", shards["diffusion_models"])
    os.utime(base / "models/diffusion_models/Open_Sora_v2-00002-of-00002.safetensors", (1, 1))
    assert stamp("diffusion_models", shards["diffusion_models"]) != before
