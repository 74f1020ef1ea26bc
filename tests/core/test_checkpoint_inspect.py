"""What `inspect` and `inspect --check` say about real, damaged, foreign and full-size files."""

import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from opensora_core.codecs.hunyuan.config import HUNYUAN_VAE
from opensora_core.codecs.picture import FLUX_AE
from opensora_core.encoders.clip import CLIPSizes, clip_manifest
from opensora_core.encoders.t5 import T5Sizes, t5_manifest
from opensora_core.errors import CheckpointError
from opensora_core.families import table
from opensora_core.inspection.report import check, report
from opensora_core.networks.mmdit.config import FLUX_DEV, OPEN_SORA_2


def head(manifest, count):
    return dict(list(manifest.items())[:count])


@pytest.mark.parametrize(
    ("manifest", "dtype", "lines"),
    [
        (lambda: table.manifest(OPEN_SORA_2), "BF16", ("the Open-Sora 2.0 transformer", "1,082 tensors, 11,891,390,528 parameters, 23.78 GB, BF16")),
        (lambda: table.manifest(FLUX_DEV), "BF16", ("a Flux.1 transformer (fused", "780 tensors, 11,901,408,320 parameters")),
        (lambda: table.manifest(HUNYUAN_VAE), "BF16", ("the HunyuanVideo VAE", "248 tensors, 246,478,803 parameters, 492.99 MB, BF16")),
        (t5_manifest, "F32", ("a T5 XXL encoder", "219 tensors", "19.05 GB, F32")),
        (clip_manifest, "F32", ("the CLIP-L text encoder", "196 tensors")),
        (lambda: table.manifest(FLUX_AE), "F32", ("the Flux.1 picture autoencoder", "244 tensors, 83,819,683 parameters")),
    ],
)  # fmt: skip
def test_released_files_are_recognised_as_such(write_hole, tmp_path, manifest, dtype, lines):
    text = report(write_hole(tmp_path / "x.safetensors", manifest(), dtype))
    for line in (*lines, "all there", f"every key and shape as in the released file, dtype {dtype} as released"):
        assert line in text


def test_other_dtypes_missing_keys_and_extra_keys_are_said(write_hole, tmp_path):
    manifest = table.manifest(OPEN_SORA_2)
    text = report(write_hole(tmp_path / "x.safetensors", manifest | {"extra.weight": (3,)}, "F32"))
    assert "1 unexpected (extra.weight)" in text and "dtype F32 (released: BF16)" in text
    del manifest["single_blocks.5.linear2.bias"]
    text = report(write_hole(tmp_path / "y.safetensors", manifest))
    assert "INCOMPLETE" in text and "1 missing (single_blocks.5.linear2.bias)" in text


def test_a_file_without_its_last_blocks_is_whole_by_itself_but_not_the_released_one(write_hole, tmp_path):
    manifest = {key: shape for key, shape in table.manifest(OPEN_SORA_2).items() if not key.startswith("single_blocks.37.")}
    checked = check(write_hole(tmp_path / "x.safetensors", manifest))
    assert not checked.passed
    assert "like the released file, but 12 tensors are missing" in checked.text


def test_a_quantised_file_is_compared_by_name(write_hole, tmp_path):
    manifest = table.manifest(OPEN_SORA_2)
    scales = {f"double_blocks.{i}.img_attn.q_proj.weight_scale": () for i in range(19)}
    text = report(write_hole(tmp_path / "x.safetensors", manifest | scales))
    assert "quantised" in text and "of 1082 tensors: all there" in text and "unexpected" not in text


def test_check_runs_a_small_transformer(golden_path):
    checked = check(golden_path / "transformer_weights.safetensors")
    assert checked.passed and checked.text.endswith("verdict: PASS, of another size than the released model")
    assert "1 double and 1 single block" in checked.text and "finite, mean" in checked.text
    assert "not the released size" in checked.text and torch.__version__ in checked.text


def test_check_runs_a_small_vae(golden_path):
    checked = check(golden_path / "vae_weights.safetensors")
    assert checked.passed and " dB" in checked.text and "scaled by 0.476986: finite" in checked.text


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("int8", "(int8 in 2 layers); read here and by ComfyUI's loaders"),
        ("fp8", "scaled float8 (fp8_e4m3fn in 2 layers); read here and by ComfyUI's loaders"),
        ("nf4", "bitsandbytes; not read here; ComfyUI's loaders may read it"),
    ],
)
def test_a_quantised_t5_is_called_what_it_is(tmp_path, form, words):
    sizes = t5_manifest(T5Sizes(d_model=8, d_ff=16, num_layers=2, num_heads=2, vocab_size=10, d_kv=4))
    tensors = {key: torch.ones(shape) for key, shape in sizes.items()}
    for block in range(2):
        layer = f"encoder.block.{block}.layer.0.SelfAttention.q"
        if form == "int8":
            tensors[f"{layer}.weight"] = torch.ones(8, 8, dtype=torch.int8)
            tensors[f"{layer}.weight_scale"] = torch.ones(8, 1)
            tensors[f"{layer}.comfy_quant"] = torch.tensor(list(b'{"format": "int8_tensorwise"}'), dtype=torch.uint8)
        elif form == "fp8":
            tensors[f"{layer}.weight"] = torch.ones(8, 8).to(torch.float8_e4m3fn)
            tensors[f"{layer}.scale_weight"] = torch.ones(())
        else:
            tensors[f"{layer}.weight"] = torch.ones(32, 1, dtype=torch.uint8)
            tensors[f"{layer}.weight.absmax"] = torch.ones(1)
    save_file(tensors, tmp_path / "t5.safetensors")
    text = report(tmp_path / "t5.safetensors")
    assert words in text and "complete" in text
    assert ("not run: a quantised form" in check(tmp_path / "t5.safetensors").text) == (form == "nf4")


def test_check_names_no_folder(golden_path, tmp_path):
    for path in (golden_path / "transformer_weights.safetensors", tmp_path / "missing.safetensors", tmp_path):
        assert str(path.parent) not in check(path).text


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_check_finds_values_that_are_not_numbers(golden_path, tmp_path, bad):
    tensors = load_file(golden_path / "transformer_weights.safetensors")
    tensors["single_blocks.0.linear2.bias"][3] = bad
    save_file(tensors, tmp_path / "x.safetensors")
    checked = check(tmp_path / "x.safetensors")
    assert not checked.passed and "NaN or infinite" in checked.text and checked.text.endswith("verdict: FAIL")


def test_check_finds_the_holes_of_a_broken_download(golden_path, tmp_path):
    tensors = load_file(golden_path / "transformer_weights.safetensors")
    for key in ("double_blocks.1.img_mlp.0.weight", "double_blocks.1.img_mlp.2.weight"):
        tensors[key].zero_()
    save_file(tensors, tmp_path / "x.safetensors")
    checked = check(tmp_path / "x.safetensors")
    assert not checked.passed and "2 matrices end in zeros or NaN (double_blocks.1.img_mlp.0.weight" in checked.text


def test_check_notes_start_weights(golden_path, tmp_path):
    tensors = load_file(golden_path / "transformer_weights.safetensors")
    tensors["cond_in.weight"].zero_()
    save_file(tensors, tmp_path / "x.safetensors")
    checked = check(tmp_path / "x.safetensors")
    assert checked.passed and "cond_in is all zero" in checked.text


@pytest.mark.parametrize(
    ("content", "words"), [(b"", "is empty"), (b"<!DOCTYPE html>", "web page"), (struct.pack("<Q", 900) + b"{", "truncated")]
)
def test_a_bad_file_fails_in_one_sentence(tmp_path, content, words):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    checked = check(path)
    assert not checked.passed and words in checked.text and "verdict: FAIL" in checked.text
    with pytest.raises(CheckpointError, match=words):
        report(path)


def test_a_foreign_file_is_not_a_pass(tmp_path):
    save_file({"layer.0.weight": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    checked = check(tmp_path / "x.safetensors")
    assert not checked.passed and "nothing that Open-Sora 2.0 uses was found" in checked.text


def test_a_hub_folder_is_told_part_by_part(golden_path, tmp_path):
    for name in ("transformer_weights", "vae_weights"):
        save_file(load_file(golden_path / f"{name}.safetensors"), tmp_path / f"{name}.safetensors")
    save_file({"layer.0.weight": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    assert "lacks the T5 encoder, the CLIP-L text encoder." in report(tmp_path)
    t5 = t5_manifest(T5Sizes(d_model=8, d_ff=16, num_layers=2, num_heads=2, vocab_size=10, d_kv=4))
    for index, part in enumerate((head(t5, 9), dict(list(t5.items())[9:])), 1):
        folder = tmp_path / "google" / "t5-v1_1-xxl"
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({key: torch.ones(shape) for key, shape in part.items()}, folder / f"pytorch_model-0000{index}-of-00002.bin")
    clip = clip_manifest(CLIPSizes(hidden_size=8, num_hidden_layers=1, intermediate_size=16, vocab_size=10)) | {
        "vision_model.embeddings.patch_embedding.weight": (2, 2)
    }
    (tmp_path / "openai" / "clip-vit-large-patch14").mkdir(parents=True)
    save_file({key: torch.ones(shape) for key, shape in clip.items()}, tmp_path / "openai" / "clip-vit-large-patch14" / "model.safetensors")
    text = report(tmp_path)
    assert "google/t5-v1_1-xxl/pytorch_model.bin in 2 parts: a T5 encoder of width 8" in text
    assert "openai/clip-vit-large-patch14/model.safetensors: a whole CLIP" in text
    assert f"of {len(t5)} tensors: all there" in text
    assert text.endswith("This folder has every part of Open-Sora 2.0.")
    checked = check(tmp_path)
    assert checked.passed and "other.safetensors: not a model that is known here" in checked.text


def test_a_missing_part_and_a_damaged_file_fail_the_folder(golden_path, tmp_path):
    save_file({"shared.weight": torch.ones(2, 2)}, tmp_path / "model-00001-of-00002.safetensors")
    (tmp_path / "vae.safetensors").write_bytes((golden_path / "vae_weights.safetensors").read_bytes()[:-10])
    checked = check(tmp_path)
    assert not checked.passed
    assert "model.safetensors in 2 parts: 1 of them are missing" in checked.text
    assert checked.text.count("vae.safetensors") == 1 and "truncated: 10 of" in checked.text


def test_a_folder_without_weights_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="holds no weights file"):
        report(tmp_path)
    assert not check(tmp_path).passed


def test_the_folder_one_stands_in_has_a_name(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="^Choose another folder: empty holds no weights file"):
        report(".")


def test_a_half_precision_file_is_run_where_its_activations_fit(golden_path, tmp_path):
    tensors = {key: tensor.half() for key, tensor in load_file(golden_path / "transformer_weights.safetensors").items()}
    tensors["double_blocks.0.img_mlp.2.bias"] += 6e4  # a number fp16 has, twice which it has not
    tensors["double_blocks.0.img_mod.lin.bias"] += 2
    save_file(tensors, tmp_path / "half.safetensors")
    checked = check(tmp_path / "half.safetensors")
    assert checked.passed and "fp32 on cpu" in checked.text


def test_a_full_size_file_of_holes_is_found_without_reading_it(write_hole, tmp_path):
    """23.8 GB by its length; only its header and one row of every matrix are read."""
    write_hole(tmp_path / "Open_Sora_v2.safetensors", table.manifest(OPEN_SORA_2))
    checked = check(tmp_path / "Open_Sora_v2.safetensors")
    assert not checked.passed and "464 matrices end in zeros" in checked.text


def test_a_lora_says_what_it_changes(tmp_path):
    layer = "base_model.model.double_blocks.0.img_attn.q_proj"
    state = {f"{layer}.lora_A.weight": torch.ones(4, 96), f"{layer}.lora_B.weight": torch.ones(96, 4)}
    foreign = {"lora_te1_x.lora_down.weight": torch.ones(8, 3), "lora_te1_x.lora_up.weight": torch.ones(3, 8)}
    save_file(state | foreign, tmp_path / "adapter_model.safetensors")
    text = report(tmp_path / "adapter_model.safetensors")
    assert "a LoRA" in text and "1 of its 2 layers are of the Open-Sora 2.0 transformer, rank 4" in text
    assert report(tmp_path).endswith("This folder is a LoRA.")
    save_file(foreign, tmp_path / "adapter_model.safetensors")
    assert "none of its 1 layers is of the Open-Sora 2.0 transformer" in report(tmp_path)


def test_a_quantised_file_that_is_read_here_is_run(golden_path, tmp_path):
    tensors = load_file(golden_path / "transformer_weights.safetensors")
    layer = "double_blocks.0.img_attn.q_proj"
    tensors |= {f"{layer}.weight": tensors[f"{layer}.weight"].to(torch.float8_e4m3fn), f"{layer}.scale_weight": torch.ones(())}
    save_file(tensors | {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, tmp_path / "fp8.safetensors")
    checked = check(tmp_path / "fp8.safetensors")
    assert (
        checked.passed
        and "scaled float8 (fp8_e4m3fn in 1 layer); read here and by ComfyUI" in checked.text
        and "finite, mean" in checked.text
    )
    del tensors[f"{layer}.scale_weight"]
    save_file(tensors | {f"{layer}.weight.absmax": torch.zeros(3)}, tmp_path / "nf4.safetensors")
    checked = check(tmp_path / "nf4.safetensors")
    assert checked.passed and "bitsandbytes; not read here" in checked.text and "not run" in checked.text
