"""Quantised weights: how much each format changes, files written whole or not at all, what the library reads and refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from opensora_core.checkpoint import quantised, quantize as writer
from opensora_core.checkpoint.files import read_header
from opensora_core.checkpoint.load import load_transformer
from opensora_core.checkpoint.lora import merge_lora
from opensora_core.checkpoint.quantised import NF4, Float8, Int8, Int8Matmul, QuantisedOperations, relative_error
from opensora_core.checkpoint.quantize import quantize
from opensora_core.cli import main
from opensora_core.commands.options import DONE, REFUSED
from opensora_core.errors import CheckpointError, OpenSoraError
from opensora_core.families import table
from opensora_core.family import QUANTISED_GROUPS
from opensora_core.networks.mmdit.config import OPEN_SORA_2, TransformerConfig
from opensora_core.pipeline import OpenSoraPipeline

FAMILY = table.DEFAULT
Q = "double_blocks.0.img_attn.q_proj"
ROOT = Path(__file__).resolve().parents[2]
FP32 = torch.float32
# Largest relative RMS error of a Gaussian weight. A quarter of the step at the middle of a binade bounds fp8's, rows of 129 int8's.
BOUNDS = {"fp8_e4m3fn": 0.03, "int8": 0.008, "nf4": 0.1}


@pytest.fixture
def source(tiny_checkpoint):
    return tiny_checkpoint / "Open_Sora_v2.safetensors"


@pytest.fixture(scope="module")
def written(tiny_checkpoint, tmp_path_factory):
    """{format: (file, report)} of the small model."""
    folder = tmp_path_factory.mktemp("quantised")
    files = {name: folder / f"{name}.safetensors" for name in writer.FORMATS}
    return {name: (file, quantize(tiny_checkpoint / "Open_Sora_v2.safetensors", file, name)) for name, file in files.items()}


@pytest.fixture(scope="module")
def predict():
    """A model's prediction of fixed inputs."""
    generator = torch.Generator().manual_seed(0)
    x, cond = (torch.randn(1, channels, 3, 6, 8, generator=generator) for channels in (16, 17))
    context, y = torch.randn(1, 12, 64, generator=generator), torch.randn(1, 64, generator=generator)

    @torch.inference_mode()
    def run(model):
        dtype = model.dtype
        return model(x.to(dtype), torch.tensor([0.6]), context.to(dtype), y.to(dtype), cond.to(dtype)).float()

    return run


@pytest.fixture(scope="module")
def expected(tiny_checkpoint, predict):
    return predict(load_transformer(tiny_checkpoint / "Open_Sora_v2.safetensors", FP32))


def rms_error(found, wanted):
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def uneven(rows=200, columns=129):
    """A weight whose rows differ thirtyfold in size, and whose columns do not."""
    noise = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    return noise * torch.linspace(0.1, 3, rows)[:, None]


# --- formats ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [Float8, Int8, NF4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_round_trip_stays_within_the_formats_error(form, dtype):
    form, weight = form(), uneven().to(dtype)
    stored, scale = form.quantise(weight)
    restored = form.dequantise(stored, scale, tuple(weight.shape), FP32)
    assert stored.dtype == torch.int8 and scale.dtype == FP32
    assert (tuple(stored.shape), tuple(scale.shape)) == form.shapes(*weight.shape)
    assert rms_error(restored, weight) < BOUNDS[form.name]
    assert relative_error(weight, form, stored, scale) == pytest.approx(rms_error(restored, weight), rel=1e-5)


def test_int8_scales_belong_to_outputs_not_inputs():
    """Every row keeps its own relative error; with one scale for all, or one for each column, the small rows would be lost."""
    weight = uneven()
    stored, scale = Int8().quantise(weight)
    restored = Int8().dequantise(stored, scale, tuple(weight.shape), FP32)
    assert max(rms_error(*rows) for rows in zip(restored, weight, strict=True)) < 0.01
    assert stored.abs().amax(dim=1).min() >= 126  # every row uses the whole range
    assert max(rms_error(*rows) for rows in zip(restored[:10], (weight / weight.abs().max() * 127).round()[:10], strict=True)) > 0.1


@pytest.mark.parametrize("form", [Float8, Int8, NF4])
def test_restoring_in_bf16_loses_no_more_than_bf16_does(form):
    form, weight = form(), uneven()
    stored, scale = form.quantise(weight)
    exact, low = (form.dequantise(stored, scale, tuple(weight.shape), dtype) for dtype in (FP32, torch.bfloat16))
    assert low.dtype == torch.bfloat16
    assert ((low.float() - exact).abs() <= exact.abs() * 2**-8).all()


@pytest.mark.parametrize("form", [Float8, Int8, NF4])
def test_rows_of_zeros_and_single_extremes_survive(form):
    form, weight = form(), torch.zeros(4, 128)
    weight[1, 5], weight[2] = 3e4, 1e-6
    stored, scale = form.quantise(weight)
    restored = form.dequantise(stored, scale, (4, 128), FP32)
    assert restored.isfinite().all() and not restored[0].any()
    assert restored[1, 5].item() == pytest.approx(3e4, rel=0.01)


@pytest.mark.parametrize("form", [Float8, Int8, NF4])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(form, value):
    weight = torch.ones(4, 64)
    weight[2, 3] = value
    with pytest.raises(OpenSoraError, match="not finite numbers"):
        form().quantise(weight)


def layer(form, weight, bias, dtype=FP32):
    made = QuantisedOperations.Linear(weight.shape[1], weight.shape[0], dtype=dtype).requires_grad_(False)
    made.bias.copy_(bias)
    made.hold(form, *form.quantise(weight))
    return made


@pytest.mark.parametrize(("form", "bound"), [(Float8, 0.03), (Int8, 0.008), (Int8Matmul, 0.012), (NF4, 0.1)])
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 64), (1, 64)])
def test_a_layer_computes_with_its_weight_and_bias(form, bound, shape):
    weight, bias = uneven(96, 64), torch.linspace(-1, 1, 96)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 5
    out = layer(form(), weight, bias)(x)
    assert out.shape == (*shape[:-1], 96) and rms_error(out, x @ weight.T + bias) < bound
    low = layer(form(), weight, bias, torch.bfloat16)(x.bfloat16())
    assert low.dtype == torch.bfloat16 and rms_error(low, out) < 0.01


def test_tokens_multiplied_in_pieces_give_the_same(monkeypatch):
    made = layer(Int8Matmul(), uneven(96, 64), torch.zeros(96))
    x = torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(2))
    whole = made(x)
    monkeypatch.setattr(quantised, "CHUNK_ROWS", 4)
    assert torch.equal(made(x), whole)


def test_quantising_in_pieces_gives_the_same(monkeypatch):
    weight = uneven()
    whole = {form: (form.quantise(weight), relative_error(weight, form, *form.quantise(weight))) for form in (Float8(), Int8())}
    monkeypatch.setattr(quantised, "_CHUNK_ELEMENTS", 129 * 7)
    for form, ((stored, scale), error) in whole.items():
        again = form.quantise(weight)
        assert torch.equal(again[0], stored) and torch.equal(again[1], scale)
        assert relative_error(weight, form, *again) == pytest.approx(error, rel=1e-6)


def test_a_change_of_dtype_leaves_the_stored_bytes_alone():
    made = layer(Float8(), uneven(96, 64), torch.zeros(96))
    before = made.dequantised()
    assert rms_error(made.to(torch.bfloat16).dequantised(), before) < 1e-6


def test_bitsandbytes_missing_is_said_and_the_rest_works(monkeypatch, source):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    for precision in ("int8", "nf4"):
        with pytest.raises(
            OpenSoraError, match=rf"pip install bitsandbytes.*precision '{precision}' computes with the bitsandbytes library"
        ):
            load_transformer(source, precision=precision)
    load_transformer(source, precision="fp8_e4m3fn")


def test_bitsandbytes_is_imported_without_fetching_code(tmp_path):
    """A stand-in for the package `kernels`, through which bitsandbytes downloads a kernel on some processors as it is imported."""
    (tmp_path / "kernels.py").write_text("def get_kernel(*args, **kwargs):\n    print('fetched')\n    raise OSError\n")
    code = "from opensora_core.checkpoint.quantised import NF4; NF4(); import kernels; print(kernels.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 0 and result.stdout.strip() == str(tmp_path / "kernels.py") and not result.stderr


# --- the transformer ----------------------------------------------------------------------------------------------------

OUTPUT_BOUNDS = {"fp8_e4m3fn": 0.05, "int8": 0.02, "nf4": 0.3}


@pytest.mark.parametrize("precision", quantised.FORMS)
def test_quantising_at_load_changes_the_output_little(source, precision, predict, expected):
    error = rms_error(predict(load_transformer(source, FP32, precision=precision)), expected)
    assert 1e-4 < error < OUTPUT_BOUNDS[precision]


@pytest.mark.parametrize("name", writer.FORMATS)
def test_a_written_file_is_read_as_it_is_stored(written, name, predict, expected):
    model = load_transformer(written[name][0], FP32)
    linear = model.double_blocks[0].img_attn.q_proj
    assert linear.weight.dtype == torch.int8 and linear.weight_scale.dtype == FP32
    assert model.img_in.weight.dtype == FP32 and model.dtype == FP32
    assert 1e-4 < rms_error(predict(model), expected) < OUTPUT_BOUNDS[name]
    assert load_transformer(written[name][0]).dtype == torch.bfloat16  # as the file it was made of


def test_fp8_at_load_and_from_a_file_are_the_same(written, source, predict):
    at_load = predict(load_transformer(source, FP32, precision="fp8_e4m3fn"))
    file = written["fp8_e4m3fn"][0]
    assert torch.equal(predict(load_transformer(file, FP32)), at_load)
    assert torch.equal(predict(load_transformer(file, FP32, precision="fp8_e4m3fn")), at_load)


def test_an_int8_file_is_multiplied_by_bitsandbytes_where_asked(written, source, predict):
    file = written["int8"][0]
    at_load = predict(load_transformer(source, FP32, precision="int8"))
    assert torch.equal(predict(load_transformer(file, FP32, precision="int8")), at_load)
    assert 0 < rms_error(predict(load_transformer(file, FP32)), at_load) < 0.02  # tokens rounded too


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_a_quantised_file_is_not_quantised_again(written, precision):
    with pytest.raises(
        OpenSoraError, match=rf"Leave out precision, or give the bf16 file for {precision}.*already quantised \(fp8_e4m3fn\)"
    ):
        load_transformer(written["fp8_e4m3fn"][0], precision=precision)


def test_an_unknown_precision_is_refused(source):
    with pytest.raises(OpenSoraError, match="Use one of fp8_e4m3fn, int8, nf4: precision='int4' is not a quantised one"):
        load_transformer(source, precision="int4")


def test_the_same_model_whichever_layout_it_comes_in(golden_path, predict):
    """The fused golden file quantised at load; its layers are the released ones by then."""
    fused = next(golden_path.glob("*fused*weights.safetensors"), None)
    if fused is None:
        pytest.skip("no fused golden")
    model = load_transformer(fused, FP32, precision="fp8_e4m3fn")
    assert model.double_blocks[0].img_attn.q_proj.form is not None


def test_every_linear_layer_has_one_group_and_the_default_leaves_the_sensitive_ones():
    manifest = table.manifest(OPEN_SORA_2)
    linears = [key.removesuffix(".weight") for key, shape in manifest.items() if len(shape) == 2]
    assert all(sum(bool(pattern.fullmatch(name)) for pattern in FAMILY.groups.values()) == 1 for name in linears)
    chosen = FAMILY.layers_to_quantise(manifest)
    assert len(chosen) == 19 * 2 * 6 + 38 * 4
    assert {FAMILY.group_of(name) for name in set(linears) - set(chosen)} == {"embedders", "modulation", "final_layer"}
    assert FAMILY.group_of("double_blocks.0.img_attn.norm.key_norm") is None


@pytest.fixture
def lora(tmp_path):
    """A LoRA of some layers, quantised and not: lora(size) -> its file."""

    def write(size):
        generator = torch.Generator().manual_seed(3)
        state = {}
        for layer, rows, columns in ((Q, 96, 96), ("single_blocks.1.linear2", 96, 480), ("img_in", 96, 64)):
            state[f"base_model.model.{layer}.lora_A.weight"] = torch.randn(4, columns, generator=generator) * size
            state[f"base_model.model.{layer}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * size
        save_file(state, tmp_path / "lora.safetensors")
        return tmp_path / "lora.safetensors"

    return write


@pytest.mark.parametrize(
    ("precision", "size"),
    # 0.01 changes weights by less than any of these formats resolves. (Tokens rounded to 8 bits drown it, so int8's is read from a file.)
    [("fp8_e4m3fn", 0.3), ("int8", 0.3), ("nf4", 0.3), ("fp8_e4m3fn", 0.01), ("int8 file", 0.01), ("nf4", 0.01)],
)
def test_a_lora_on_quantised_weights_has_its_whole_effect(source, written, precision, predict, expected, lora, size):
    plain = load_transformer(source, FP32)
    is_file, precision = precision.endswith(" file"), precision.removesuffix(" file")
    model = load_transformer(written[precision][0], FP32) if is_file else load_transformer(source, FP32, precision=precision)
    merge_lora(plain, lora(size), 0.8)
    before = predict(model)
    merge_lora(model, lora(size), 0.8)
    wanted = predict(plain) - expected
    assert rms_error(predict(model) - before, wanted) < 2 * OUTPUT_BOUNDS[precision] + 0.05
    assert {name for name, module in model.named_modules() if len(getattr(module, "adapters", ()))} == {Q, "single_blocks.1.linear2"}


def test_the_default_set_is_the_recorded_measurements():
    recorded = json.loads((ROOT / "benchmarks/results/quantise_layers_cpu.json").read_text())["groups"]
    assert {group for group, verdict in recorded.items() if verdict["quantised"]} == set(QUANTISED_GROUPS)
    assert recorded.keys() == FAMILY.groups.keys()


# --- the file -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "host_name", "dtype"), [("fp8_e4m3fn", "float8_e4m3fn", torch.float8_e4m3fn), ("int8", "int8_tensorwise", torch.int8)]
)
def test_a_file_is_what_comfyui_reads(written, source, name, host_name, dtype):
    original, found = load_file(source), load_file(written[name][0])
    with safe_open(written[name][0], "pt") as file:
        layers = json.loads(file.metadata()["_quantization_metadata"])["layers"]
    assert set(layers) == set(FAMILY.layers_to_quantise({key: tuple(tensor.shape) for key, tensor in original.items()}))
    for key, tensor in original.items():
        stem = key.removesuffix(".weight")
        if stem not in layers:
            assert torch.equal(found[key], tensor)  # bit for bit
            continue
        assert found[key].dtype == dtype and found[key].shape == tensor.shape
        scale = found[f"{stem}.weight_scale"]
        assert scale.dtype == FP32 and scale.shape == (() if name == "fp8_e4m3fn" else (len(tensor), 1))
        assert json.loads(bytes(found[f"{stem}.comfy_quant"].tolist())) == layers[stem] == {"format": host_name}
        assert rms_error(found[key].float() * scale, tensor) < BOUNDS[name]
    assert len(found) == len(original) + 2 * len(layers)


def test_the_report_names_every_layer_and_its_error(written, source):
    file, report = written["int8"]
    weights = load_file(source)
    with safe_open(file, "pt") as stored:
        for layer, error in report.errors.items():
            restored = stored.get_tensor(f"{layer}.weight").float() * stored.get_tensor(f"{layer}.weight_scale")
            assert error == pytest.approx(rms_error(restored, weights[f"{layer}.weight"]), rel=1e-4)
    assert len(report.errors) == 36 and len(report.kept) == 16 and report.target_bytes == file.stat().st_size
    text = report.text(worst=2)
    worst = max(report.errors, key=report.errors.get)
    assert text.splitlines()[2].endswith(worst) and len(text.splitlines()) == 4 and "36 layers in int8" in text


def test_progress_counts_every_tensor(source, tmp_path):
    calls = []
    quantize(source, tmp_path / "out.safetensors", "int8", progress=lambda *call: calls.append(call))
    tensors = read_header(tmp_path / "out.safetensors").tensors
    assert [call[0] for call in calls] == list(range(1, len(tensors) + 1)) and {call[1] for call in calls} == {len(tensors)}
    assert [call[2] for call in calls] == list(tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_forms_of_the_source_give_the_same_layers(source, tmp_path, written, dtype):
    state = {f"model.diffusion_model.{key}": tensor.to(dtype) for key, tensor in load_file(source).items()}
    save_file(state, tmp_path / "prefixed.safetensors")
    torch.save({"state_dict": state}, tmp_path / "prefixed.pth")
    wanted = load_file(written["int8"][0])
    for suffix in ("safetensors", "pth"):
        quantize(tmp_path / f"prefixed.{suffix}", tmp_path / f"from_{suffix}.safetensors", "int8")
        found = load_file(tmp_path / f"from_{suffix}.safetensors")
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted if key.endswith("q_proj.weight") and dtype == torch.float32)


def test_groups_can_be_chosen(source, tmp_path, predict, expected):
    report = quantize(source, tmp_path / "some.safetensors", "fp8_e4m3fn", groups=("modulation",))
    assert {FAMILY.group_of(layer) for layer in report.errors} == {"modulation"}
    note = load_file(tmp_path / "some.safetensors")["single_blocks.0.modulation.lin.comfy_quant"]
    assert json.loads(bytes(note.tolist())) == {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    load_transformer(tmp_path / "some.safetensors")
    everything = quantize(source, tmp_path / "all.safetensors", "int8", groups=FAMILY.groups)
    model = load_transformer(tmp_path / "all.safetensors", FP32)
    assert not everything.kept and 1e-4 < rms_error(predict(model), expected) < 0.05
    assert model.dtype == FP32 and model.img_in.form is None and model.txt_in.form is not None
    with pytest.raises(OpenSoraError, match="Give some of embedders, modulation.*groups=modulations"):
        quantize(source, tmp_path / "none.safetensors", groups=("modulations",))


# --- refusals of the writer ---------------------------------------------------------------------------------------------


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir())


def test_nothing_is_overwritten_and_no_strange_name_is_written(source, tmp_path):
    taken = tmp_path / "taken.safetensors"
    taken.write_text("mine")
    cases = [
        (taken, {}, "exists and is not overwritten"),
        (tmp_path / "out.bin", {}, r"Use out\.safetensors.*should end in \.safetensors"),
        (tmp_path / "no" / "out.safetensors", {}, "there is no folder"),
        (tmp_path, {}, "Give the new file's name too.*is a folder"),
        (Path("."), {}, "Give the new file's name too.*is a folder"),
        (tmp_path / "out.safetensors", {"format": "nf4"}, "Use one of fp8_e4m3fn, int8.*format='nf4' is not one that files are written in"),
    ]
    for target, options, sentence in cases:
        with pytest.raises(OpenSoraError, match=sentence):
            quantize(source, target, **options)
    assert taken.read_text() == "mine" and leftovers(tmp_path) == ["taken.safetensors"]


def test_wrong_sources_are_refused(source, tmp_path, written, tiny_checkpoint):
    target = tmp_path / "out.safetensors"
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(source.read_bytes()[:-1000])
    incomplete = tmp_path / "incomplete.safetensors"
    save_file({key: tensor for key, tensor in load_file(source).items() if key != "txt_in.bias"}, incomplete)
    plain = tmp_path / "plain8.safetensors"
    save_file({key: tensor.to(torch.float8_e4m3fn) if tensor.ndim == 2 else tensor for key, tensor in load_file(source).items()}, plain)
    cases = [
        (written["int8"][0], r"Quantise the bf16 or fp32 file.*already quantised \(ComfyUI quantised layers \(int8_tensorwise\)\)"),
        (plain, "float8 without scales"),
        (tiny_checkpoint / "hunyuan_vae.safetensors", "Give the Open-Sora 2.0 transformer"),
        (truncated, "is truncated"),
        (incomplete, "not whole"),
        (tmp_path / "nowhere.safetensors", "does not exist"),
    ]
    for path, sentence in cases:
        with pytest.raises(CheckpointError, match=sentence):
            quantize(path, target)
    assert not target.exists() and not list(tmp_path.glob(".*"))


def test_a_full_disk_is_said_before_anything_is_written(source, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(0, 0, 64 << 20))
    with pytest.raises(OpenSoraError, match=r"Make room.*needs [\d.]+ [kM]B and .* has 67\.11 MB left"):
        quantize(source, tmp_path / "out.safetensors")
    assert leftovers(tmp_path) == []


def test_a_disk_that_fills_while_writing_leaves_nothing(source, tmp_path, monkeypatch):
    def fail(file, *rest):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "_write", fail)
    with pytest.raises(OpenSoraError, match=r"out\.safetensors could not be written \(No space left on device\)"):
        quantize(source, tmp_path / "out.safetensors")
    assert leftovers(tmp_path) == []


def test_a_weight_of_nan_is_named_and_leaves_nothing(source, tmp_path):
    state = load_file(source)
    state["single_blocks.1.v_mlp.weight"][3, 4] = float("nan")
    save_file(state, tmp_path / "damaged.safetensors")
    with pytest.raises(
        CheckpointError, match=r"^Download .*not finite numbers\. It is single_blocks\.1\.v_mlp\.weight of damaged\.safetensors"
    ):
        quantize(tmp_path / "damaged.safetensors", tmp_path / "out.safetensors")
    assert leftovers(tmp_path) == ["damaged.safetensors"]


def test_an_interrupt_leaves_nothing(source, tmp_path):
    def interrupt(done, total, key):
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out.safetensors", progress=interrupt)
    assert leftovers(tmp_path) == []


STOPPED = """
import sys, time
from opensora_core.checkpoint.quantize import quantize
def progress(done, total, key):
    if done == 40:
        print("halfway", flush=True)
        time.sleep(60)
quantize(sys.argv[1], sys.argv[2], "int8", progress=progress)
"""


@pytest.mark.skipif(os.name == "nt", reason="kills by signal")
def test_a_killed_run_leaves_nothing_that_looks_whole_and_the_next_one_succeeds(source, tmp_path):
    target = tmp_path / "out.safetensors"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen([sys.executable, "-c", STOPPED, source, target], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment)
    assert run.stdout.readline().strip() == "halfway"
    run.send_signal(signal.SIGKILL)
    run.wait()
    left, claim = leftovers(tmp_path)
    assert claim == "out.safetensors.claim" and left.startswith(".out.safetensors.") and left.endswith(".partial")  # no loader lists it
    with pytest.raises(CheckpointError, match="is truncated"):
        load_transformer(tmp_path / left)
    (tmp_path / left).rename(tmp_path / "renamed.safetensors")  # a person might
    with pytest.raises(CheckpointError, match="is truncated"):
        load_transformer(tmp_path / "renamed.safetensors")
    (tmp_path / "renamed.safetensors").rename(tmp_path / left)
    quantize(source, target, "int8")
    assert leftovers(tmp_path) == ["out.safetensors"]
    load_transformer(target)


# --- refusals of the reader ---------------------------------------------------------------------------------------------


def changed(file, tmp_path, change):
    """A copy of a written file with its tensors and metadata changed."""
    state = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    change(state, metadata)
    save_file(state, tmp_path / "changed.safetensors", metadata)
    return tmp_path / "changed.safetensors"


def note(**content):
    return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("int8", lambda s, m: s.pop(f"{Q}.weight_scale"), "lacks .*q_proj.weight_scale, without which"),
        ("int8", lambda s, m: s.update({f"{Q}.weight_scale": torch.ones(7, 1)}), r"q_proj.weight_scale of shape \[7, 1\], not \[96, 1\]"),
        ("int8", lambda s, m: s[f"{Q}.weight_scale"].fill_(float("nan")), "q_proj.weight_scale is not a positive number"),
        ("fp8_e4m3fn", lambda s, m: s[f"{Q}.weight_scale"].fill_(0), "q_proj.weight_scale is not a positive number"),
        ("fp8_e4m3fn", lambda s, m: s[f"{Q}.weight_scale"].fill_(-1), "q_proj.weight_scale is not a positive number"),
        ("fp8_e4m3fn", lambda s, m: s.update({f"{Q}.weight": torch.zeros(96, 96)}), "stored as F32 though its note says float8_e4m3fn"),
        ("fp8_e4m3fn", lambda s, m: s.update({f"{Q}.comfy_quant": note(format="nvfp4")}), "q_proj is quantised as nvfp4, which this library does not"),
        ("int8", lambda s, m: s.update({f"{Q}.comfy_quant": note(format="int8_tensorwise", convrot=True)}), "int8_tensorwise with rotated weights"),
        ("int8", lambda s, m: s.update({f"{Q}.comfy_quant": torch.zeros(4, dtype=torch.uint8)}), "q_proj.comfy_quant .* in an unreadable way"),
        ("int8", lambda s, m: m.update(_quantization_metadata="{"), "says in an unreadable way how it is quantised"),
        ("int8", lambda s, m: m.update(_quantization_metadata='{"layers": {"double_blocks.9": {"format": "int8_tensorwise"}}}'), "has no weight for it"),
        ("int8", lambda s, m: s.pop("txt_in.bias"), "not whole"),
    ],
)  # fmt: skip
def test_damaged_and_unknown_quantised_files_get_a_sentence(written, tmp_path, name, change, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        load_transformer(changed(written[name][0], tmp_path, change))


def test_other_spellings_of_the_same_file_are_read(written, tmp_path, predict):
    """Without notes in the file, without metadata, the older scaled_fp8, under a prefix, and int8 with one scale for a layer."""
    file = written["fp8_e4m3fn"][0]
    wanted = predict(load_transformer(file, FP32))

    def metadata_only(state, metadata):
        for key in [key for key in state if key.endswith(".comfy_quant")]:
            del state[key]

    def scaled_fp8(state, metadata):
        metadata_only(state, metadata)
        del metadata["_quantization_metadata"]
        for key in [key for key in state if key.endswith(".weight_scale")]:
            state[key.replace("weight_scale", "scale_weight")] = state.pop(key).reshape(1)
        state["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)

    def prefixed(state, metadata):
        for key in list(state):
            state[f"model.diffusion_model.{key}"] = state.pop(key)

    for change in (metadata_only, lambda state, metadata: metadata.pop("_quantization_metadata"), scaled_fp8, prefixed):
        assert torch.equal(predict(load_transformer(changed(file, tmp_path, change), FP32)), wanted)

    def scaled_e5m2(state, metadata):
        scaled_fp8(state, metadata)
        for key in [key for key, tensor in state.items() if tensor.ndim == 2 and tensor.dtype == torch.float8_e4m3fn]:
            state[key] = state[key].float().to(torch.float8_e5m2)

    coarse = load_transformer(changed(file, tmp_path, scaled_e5m2), FP32)
    assert coarse.double_blocks[0].img_attn.q_proj.form.name == "fp8_e5m2" and rms_error(predict(coarse), wanted) < 0.1

    def one_scale(state, metadata):
        state[f"{Q}.weight_scale"] = state[f"{Q}.weight_scale"].amax()

    model = load_transformer(changed(written["int8"][0], tmp_path, one_scale), FP32)
    assert model.double_blocks[0].img_attn.q_proj.weight_scale.shape == (96, 1)


# --- command line and pipeline ------------------------------------------------------------------------------------------


def test_the_command_writes_a_file_and_says_what_it_changed(source, tmp_path, written, capsys):
    target = tmp_path / "out.safetensors"
    assert main(["quantize", str(source), str(target), "--format", "int8", "--all-layers"]) == DONE
    assert target.read_bytes() == written["int8"][0].read_bytes()
    out = capsys.readouterr().out
    assert out.startswith("out.safetensors: 36 layers in int8") and out.count("double_blocks.1.txt_mlp.2") >= 1
    assert main(["quantize", str(source), str(target)]) == REFUSED
    assert capsys.readouterr().err.endswith("exists and is not overwritten.\n")
    assert main(["quantize", str(source), str(tmp_path / "b.safetensors"), "--layers", "heads"]) == REFUSED
    assert "Give some of embedders" in capsys.readouterr().err


SHORT = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "seed": 1}


@pytest.fixture(scope="module")
def latents(tiny_checkpoint):
    """Latents of a short run: latents(precision, dit=None, offload=None, lora=None)."""

    def run(precision="auto", dit=None, offload=None, lora=None):
        folder = tiny_checkpoint
        files = {
            "dit": dit or folder / "Open_Sora_v2.safetensors",
            "vae": folder / "hunyuan_vae.safetensors",
            "t5": folder / "t5xxl.safetensors",
        }
        pipe = OpenSoraPipeline.from_files(**files, clip=folder / "clip_l.safetensors", tokenizers=folder, precision=precision)
        if offload:
            getattr(pipe, offload)("cpu")
        if lora:
            pipe.load_lora(lora, 0.8)
        return pipe("a red circle", **SHORT).latents

    return run


@pytest.mark.parametrize("precision", quantised.FORMS)
def test_a_pipeline_quantises_and_where_layers_live_changes_nothing(latents, precision, lora):
    plain, resident = latents(), latents(precision)
    assert 1e-4 < rms_error(resident, plain) < 5 * OUTPUT_BOUNDS[precision]
    for offload in ("enable_model_cpu_offload", "enable_sequential_cpu_offload"):
        assert torch.equal(latents(precision, offload=offload), resident)
        changed = latents(precision, offload=offload, lora=lora(0.3))
        assert torch.equal(changed, latents(precision, lora=lora(0.3))) and not torch.equal(changed, resident)


def test_a_pipeline_reads_a_quantised_file(latents, written):
    assert rms_error(latents(dit=written["int8"][0]), latents()) < 0.1
    with pytest.raises(OpenSoraError, match="already quantised"):
        latents("nf4", dit=written["int8"][0])


# --- size ---------------------------------------------------------------------------------------------------------------

MEASURED = """
import sys
from opensora_core.checkpoint.load import load_transformer
from opensora_core.checkpoint.lora import merge_lora
from opensora_core.checkpoint.quantize import quantize
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024
sizes = []
before = anonymous()
quantize(sys.argv[1], sys.argv[2], sys.argv[3], progress=lambda done, total, key: sizes.append(anonymous()))
print(max(sizes) - before)
"""

LOADED = """
import sys, threading
import torch
from opensora_core.checkpoint.load import load_transformer
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024
load_transformer(sys.argv[1], precision=sys.argv[3])  # whatever libraries need, they have now
before, peak, done = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous() - before)
watcher = threading.Thread(target=watch)
watcher.start()
model = load_transformer(sys.argv[2], precision=sys.argv[3])
done.set()
watcher.join()
print(peak, sum(part.numel() * part.element_size() for part in model.parameters() if part.dtype == torch.int8))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's account of memory")
def test_a_wide_model_is_quantised_in_the_memory_of_a_few_layers(write_hole, tmp_path):
    """28 blocks, a GB in fp32, written in tens of MB: the file's data is a hole, so it costs no disk."""
    config = TransformerConfig(16, 2, 512, 4, 2048, 9, 19, 64, 64, True, False)
    file = write_hole(tmp_path / "wide.safetensors", table.manifest(config), "F32")
    assert file.stat().st_size > 5e8
    command = [sys.executable, "-c", MEASURED, file, tmp_path / "out.safetensors", "int8"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    (tmp_path / "out.safetensors").unlink(missing_ok=True)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 120


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's account of memory")
@pytest.mark.parametrize("precision", ["fp8_e4m3fn", "int8"])
def test_quantising_at_load_needs_little_more_than_what_is_kept(write_hole, source, tmp_path, precision):
    """The plain weights stay in the mapped file; one layer at a time is anonymous memory besides the quantised ones."""
    config = TransformerConfig(16, 2, 512, 4, 2048, 6, 12, 64, 64, True, False)
    file = write_hole(tmp_path / "wide.safetensors", table.manifest(config), "BF16")
    command = [sys.executable, "-c", LOADED, source, file, precision]
    # So small, the kept weights would lie between freed pieces on glibc's heap; the released model's are too large for it.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    peak, kept = map(int, result.stdout.split())
    assert kept > 7e7
    assert peak < 1.1 * kept + 48e6  # besides: a layer and its pieces in fp32; the plain weights would be twice what is kept
