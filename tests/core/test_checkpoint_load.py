"""Files on disk: read without loading, refused in one sentence when damaged or wrong, loaded strictly."""

import json
import logging
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from opensora_core.checkpoint.files import open_tensors, quantisation, read_header
from opensora_core.checkpoint.load import load_transformer, load_vae
from opensora_core.errors import CheckpointError, OpenSoraError
from opensora_core.families import table
from opensora_core.networks.mmdit.config import TransformerConfig


@pytest.fixture
def tensors(golden_path):
    return load_file(golden_path / "transformer_weights.safetensors")


@pytest.fixture
def save(tmp_path):
    def write(state, name="model.safetensors", metadata=None):
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / name, metadata)
        return tmp_path / name

    return write


def run(model):
    generator = torch.Generator().manual_seed(0)
    noise = [
        torch.randn(shape, generator=generator) for shape in ((1, 16, 2, 4, 6), (1, 5, model.txt_in.in_features), (1, 64), (1, 17, 2, 4, 6))
    ]
    with torch.inference_mode():
        return model(noise[0], torch.tensor([0.5]), noise[1], noise[2][:, : model.vector_in.in_layer.in_features], noise[3])


# --- reading ------------------------------------------------------------------------------------------------------------


def test_header_says_everything_without_loading(save):
    path = save({"a": torch.zeros(2, 3), "b": torch.zeros(5, dtype=torch.bfloat16)}, metadata={"made": "here"})
    header = read_header(path)
    assert header.shapes == {"a": (2, 3), "b": (5,)}
    assert header.dtypes == {"F32": 6, "BF16": 5}
    assert (header.num_parameters, header.metadata, header.num_bytes) == (11, {"made": "here"}, path.stat().st_size)
    assert header.compute_dtype == torch.float32


@pytest.mark.parametrize("wrap", [None, "ema", "state_dict"])
@pytest.mark.parametrize("legacy", [False, True])
def test_torch_files_are_read_too(tmp_path, wrap, legacy):
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(5, dtype=torch.bfloat16)}
    torch.save({wrap: state, "step": 3} if wrap else state, tmp_path / "m.pth", _use_new_zipfile_serialization=not legacy)
    header = read_header(tmp_path / "m.pth")
    assert header.shapes == {"a": (2, 3), "b": (5,)}
    with open_tensors(header) as get:
        assert torch.equal(get("a"), state["a"])


def test_a_torch_file_that_holds_code_is_refused(tmp_path):
    torch.save({"a": torch.nn.Linear(2, 2)}, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=r"m\.pth cannot be read as a torch weights file"):
        read_header(tmp_path / "m.pth")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 23782781056\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html><head><title>Sign in</title></head></html>", "web page"),
        (b"\n  <html><head>", "web page"),
        (b"GGUF\x03\0\0\0" + b"\0" * 40, "GGUF"),
        (b'{"weight_map": {"a": "b"}}', "JSON"),
        (b"\0" * 4096, "zero bytes"),
        (b"PK\x03\x04" + b"\x01" * 100, "cannot be read as a torch weights file"),
        (b"\x80\x02garbage", "cannot be read as a torch weights file"),
        (b"RIFF\x24\x08\0\0WAVEfmt " + b"\x01" * 100, "neither a safetensors nor a torch file"),
        (b"abc", "neither a safetensors nor a torch file"),
        (struct.pack("<Q", 5000) + b'{"a": {"dtype"', "truncated inside its header"),
        (struct.pack("<Q", 8) + b'{"a":: }', "header of .* is damaged"),
        (struct.pack("<Q", 11) + b'{"a":"b"}  ', "header of .* is damaged"),
    ],
)
def test_what_is_not_weights_is_named(tmp_path, content, sentence):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=sentence) as caught:
        read_header(tmp_path / "x.safetensors")
    assert "x.safetensors" in str(caught.value)


@pytest.mark.parametrize("cut", [1, 100, 5000])
def test_a_truncated_file_says_how_much_is_missing(save, cut):
    path = save({"a": torch.zeros(64, 64), "b": torch.zeros(10)})
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(CheckpointError, match=rf"truncated: {cut:,} of [\d,]+ bytes are missing"):
        read_header(path)


def test_trailing_bytes_and_contradicting_headers_are_refused(save, tmp_path):
    path = save({"a": torch.zeros(4)})
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(CheckpointError, match="4 bytes more"):
        read_header(path)
    text = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}}).encode()
    (tmp_path / "b.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 12)
    with pytest.raises(CheckpointError, match=r"contradicts itself at a \(F32 \[4\]\)"):
        read_header(tmp_path / "b.safetensors")


def test_missing_files_and_folders_say_what_is_there(save, tmp_path):
    save({"a": torch.zeros(1)}, "Open_Sora_v2.safetensors")
    with pytest.raises(CheckpointError, match=r"does not exist\. Did you mean Open_Sora_v2\.safetensors"):
        read_header(tmp_path / "open_sora_v2.safetensors")
    with pytest.raises(CheckpointError, match=r"Give a file: .*is a folder\. Inside it: Open_Sora_v2\.safetensors"):
        read_header(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        read_header(tmp_path / "nowhere" / "x.safetensors")


@pytest.mark.parametrize(
    ("extra", "metadata", "name"),
    [
        ({"scaled_fp8": torch.zeros(2)}, None, "scaled float8"),
        ({"img_in.weight_scale": torch.zeros(())}, None, "weight_scale"),
        ({"img_in.weight.absmax": torch.zeros(3)}, None, "bitsandbytes"),
        ({"img_in.qweight": torch.zeros(3, dtype=torch.int32)}, None, "GPTQ"),
        ({"txt_in.weight": torch.zeros(96, 64, dtype=torch.int8)}, None, "integer weights"),
        ({}, {"_quantization_metadata": json.dumps({"layers": {"img_in": {"format": "nvfp4"}}})}, "nvfp4"),
    ],
)
def test_files_quantised_in_ways_that_are_not_read_are_recognised_and_refused(tensors, save, extra, metadata, name):
    path = save(tensors | extra, metadata=metadata)
    assert name in quantisation(read_header(path))
    with pytest.raises(CheckpointError, match=rf"quantised .*{name}.*which this library does not read; it reads ComfyUI's"):
        load_transformer(path)


# --- loading ------------------------------------------------------------------------------------------------------------


def test_tensors_are_the_files_own(golden_path, tensors):
    model = load_transformer(golden_path / "transformer_weights.safetensors")
    state = model.state_dict()
    assert len(state) == len(tensors)
    for key, tensor in tensors.items():
        name = key.replace("_norm.scale", "_norm.weight")
        assert state[name].dtype == torch.bfloat16 and torch.equal(state[name], tensor), key
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dtype_casts_every_tensor(golden_path, dtype):
    model = load_transformer(golden_path / "transformer_weights.safetensors", dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype} and model.dtype == dtype


def test_dtypes_that_do_not_compute_are_refused(golden_path):
    with pytest.raises(OpenSoraError, match="float32, bfloat16 or float16"):
        load_transformer(golden_path / "transformer_weights.safetensors", torch.float8_e4m3fn)


def test_plain_float8_is_cast_up(tensors, save):
    stored = {key: tensor.to(torch.float8_e4m3fn) if tensor.ndim == 2 else tensor for key, tensor in tensors.items()}
    model = load_transformer(save(stored))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.img_in.weight, stored["img_in.weight"].to(torch.bfloat16))


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "module."])
def test_prefixed_and_renamed_keys_load_the_same(golden_path, tensors, save, prefix):
    plain = load_transformer(golden_path / "transformer_weights.safetensors", torch.float32)
    renamed = {prefix + key.replace("_norm.scale", "_norm.weight"): tensor for key, tensor in tensors.items()}
    both = load_transformer(save(renamed | {"vae.other": torch.zeros(3)}), torch.float32)
    assert torch.equal(run(plain), run(both))


def test_a_pth_file_loads_the_same(golden_path, tensors, tmp_path):
    torch.save({"ema": tensors}, tmp_path / "m.pth")
    plain = load_transformer(golden_path / "transformer_weights.safetensors", torch.float32)
    assert torch.equal(run(load_transformer(tmp_path / "m.pth", torch.float32)), run(plain))


def test_a_fused_file_gives_the_same_forward(golden_path, tensors, save):
    """The fused file is made here by the inverse permutation, written out index by index."""
    head_dim = tensors["double_blocks.0.img_attn.norm.key_norm.scale"].shape[0]
    inverse = torch.tensor([j // 2 + (j % 2) * head_dim // 2 for j in range(head_dim)])

    def interleave(rows):
        return rows.unflatten(0, (-1, head_dim))[:, inverse].flatten(0, 1)

    fused = {}
    for key, tensor in tensors.items():
        stem, _, kind = key.rpartition(".")
        owner, _, part = stem.rpartition(".")
        if part == "q_proj":
            rest, name = (("v_proj",), "qkv") if owner.endswith("_attn") else (("v_mlp",), "linear1")
            rows = [
                interleave(tensor),
                interleave(tensors[f"{owner}.k_proj.{kind}"]),
                *(tensors[f"{owner}.{other}.{kind}"] for other in rest),
            ]
            fused[f"{owner}.{name}.{kind}"] = torch.cat(rows)
        elif part not in ("k_proj", "v_proj", "v_mlp"):
            fused[key] = interleave(tensor) if kind == "scale" else tensor
    plain = load_transformer(golden_path / "transformer_weights.safetensors", torch.float32)
    loaded = load_transformer(save(fused), torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), loaded.state_dict().values(), strict=True))
    assert torch.equal(run(plain), run(loaded))


def test_missing_keys_are_an_error_that_counts_and_names_them(tensors, save):
    lost = [key for key in tensors if key.startswith("single_blocks.1.")]
    kept = {key: tensor for key, tensor in tensors.items() if key not in lost}
    with pytest.raises(CheckpointError, match=rf"of {len(tensors)} tensors: {len(lost)} missing \(single_blocks\.1\..*; \.\.\.\)"):
        load_transformer(save(kept))


def test_a_lost_cond_in_bias_is_not_forgiven(tensors, save):
    del tensors["cond_in.weight"]
    with pytest.raises(CheckpointError, match="cond_in"):
        load_transformer(save(tensors))


def test_misshaped_keys_are_an_error(tensors, save):
    tensors["double_blocks.1.txt_mlp.0.weight"] = torch.zeros(7, 96)
    with pytest.raises(CheckpointError, match=r"1 of another shape \(double_blocks\.1\.txt_mlp\.0\.weight \[7, 96\], expected"):
        load_transformer(save(tensors))


def test_unexpected_keys_are_one_warning(tensors, save, caplog):
    with caplog.at_level(logging.WARNING):
        load_transformer(save(tensors | {"training.step": torch.zeros(1), "ema_decay": torch.zeros(1)}))
    assert len(caplog.records) == 1
    assert "2 tensors that its model does not use" in caplog.text and "training.step" in caplog.text and "ema_decay" in caplog.text


def test_unexpected_keys_of_another_model_are_an_error(tensors, save, golden_path):
    other = load_file(golden_path / "vae_weights.safetensors")
    with pytest.raises(CheckpointError, match="mixed with a HunyuanVideo-layout VAE"):
        load_transformer(save(tensors | other))


def test_a_wrong_file_in_a_slot_is_told_where_it_belongs(golden_path):
    with pytest.raises(
        CheckpointError, match=r"Give the Open-Sora 2\.0 transformer.*vae_weights\.safetensors is .*VAE.*belongs in the VAE slot"
    ):
        load_transformer(golden_path / "vae_weights.safetensors")
    with pytest.raises(CheckpointError, match=r"Give the HunyuanVideo VAE.*is an Open-Sora 2\.0 transformer"):
        load_vae(golden_path / "transformer_weights.safetensors")


def test_a_vae_loads_strictly(golden_path, save):
    path = golden_path / "vae_weights.safetensors"
    stored = load_file(path)
    vae = load_vae(path)
    assert all(torch.equal(vae.state_dict()[key], tensor) for key, tensor in stored.items()) and len(vae.state_dict()) == len(stored)
    assert {parameter.dtype for parameter in load_vae(path, torch.float32).parameters()} == {torch.float32}
    del stored["decoder.mid_block.attentions.0.to_q.bias"]
    with pytest.raises(CheckpointError, match=r"1 missing \(decoder\.mid_block\.attentions\.0\.to_q\.bias\)"):
        load_vae(save(stored))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts private memory as Linux reports it")
def test_an_unconverted_load_copies_nothing(tmp_path, write_hole):
    """A 70 MB file (a hole, so that it costs no disk) is loaded; private memory hardly grows."""
    manifest = table.manifest(TransformerConfig(16, 2, 768, 12, 3072, 1, 1, 64, 64, True, False))
    write_hole(tmp_path / "m.safetensors", manifest)

    def private_bytes():
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) * 1024

    before = private_bytes()
    model = load_transformer(tmp_path / "m.safetensors")
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert size > 60e6
    assert private_bytes() - before < size / 4
