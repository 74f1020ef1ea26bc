"""The planner: what it predicts is what is allocated, what it recommends fits, what it refuses has no way."""

import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.profiler import ProfilerActivity, profile

from demo import tiny
from opensora_core.checkpoint import quantize as quantize_file
from opensora_core.checkpoint.load import load_transformer, open_model
from opensora_core.checkpoint.quantize import FORMATS, quantize
from opensora_core.choices import DTYPES, PRECISIONS as WORDS, torch_dtype
from opensora_core.cli import main
from opensora_core.codecs.hunyuan import layers
from opensora_core.codecs.hunyuan.config import VAEConfig
from opensora_core.codecs.hunyuan.model import CausalVAE
from opensora_core.codecs.tiling import tiled_decode, tiled_encode
from opensora_core.commands.options import DONE, REFUSED
from opensora_core.encoders.clip import CLIPSizes
from opensora_core.encoders.t5 import T5Sizes, load_t5
from opensora_core.errors import OpenSoraError
from opensora_core.families import table
from opensora_core.family import QUANTISED_GROUPS
from opensora_core.geometry import Tiling
from opensora_core.memory import estimate as estimate_module
from opensora_core.memory.count import AllocationCounter
from opensora_core.memory.decode import counted_peak
from opensora_core.memory.estimate import CONTEXT_BYTES, Memory, Request, Settings, Stages, estimate
from opensora_core.memory.footprint import (
    ModelSizes,
    _counted_forward,
    forward_peak,
    sampling_peak,
    sizes_of_files,
    text_peak,
    text_weights,
    tile_peak,
    tiled_peak,
    transformer_weights,
)
from opensora_core.memory.preflight import memory_of, preflight
from opensora_core.memory.residency import GIB
from opensora_core.memory.stream import module_bytes
from opensora_core.networks.mmdit.config import OPEN_SORA_2, TransformerConfig
from opensora_core.networks.mmdit.model import MMDiT
from opensora_core.pipeline import OpenSoraPipeline
from opensora_core.sampling.guidance import Guidance
from opensora_core.sampling.run import Conditions, SamplingRecipe, TextCondition, sample
from opensora_core.sampling.schedule import flow_schedule
from opensora_core.sampling.solvers import noise
from tests.golden import cogvideox_files, open_sora_1_files

SMALL = TransformerConfig(16, 2, 96, 3, 384, 2, 3, 64, 64, True, False)
MEDIUM = TransformerConfig(16, 2, 512, 4, 2048, 1, 2, 64, 64, True, False)
VAE = VAEConfig(16, (16, 32, 32, 32), 2)
MEDIUM_VAE = VAEConfig(16, (32, 64, 64, 64), 2)
PRECISIONS = WORDS[1:]  # without auto
MODEL = ModelSizes()
FP8_FILE = ModelSizes(stored="fp8_e4m3fn")
LOW = Request(192, 336)  # 256px
HIGH = Request(576, 1024)  # 768px


def card(gb, ram_gib=64):
    """A card with no more than its GB of 10**9 bytes; main memory is sold in GiB."""
    return Memory("cuda", f"{gb} GB card", int(gb * 1e9), int(gb * 1e9), ram_gib * GIB, ram_gib * GIB)


def filled(module):
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).mul_(0.02).to(parameter.dtype)
    return module.requires_grad_(False)


def stage_of(found, name):
    return next(stage for stage in found.stages if stage.name == name)


def counted(run):
    with torch.inference_mode(), AllocationCounter() as counter:
        run()
    return counter.peak


@pytest.fixture
def chunks_as_on_cpu(monkeypatch):
    """The VAE's chunks are smaller on a CPU; let the prediction have the same."""
    monkeypatch.setattr(layers, "CHUNK_ELEMENTS", layers.CHUNK_ELEMENTS_CPU)


# The counter


def test_the_counter_counts_storages_while_they_live():
    x = torch.zeros(100)
    with AllocationCounter() as counter:
        a = x + 1
        view = a[10:].view(9, 10).transpose(0, 1)
        a.add_(1)
        x[0] = 3  # made outside
        assert (counter.live, counter.peak) == (400, 400)
        b = a.double()
        assert counter.live == 1200
        del a
        assert counter.live == 1200  # the view keeps it
        del view
        assert (counter.live, counter.peak) == (800, 1200)
        counter.count_at_most(100)
        assert counter.peak == 1200
        counter.count_at_most(1000)
        assert counter.peak == 1800
        del b
    assert counter.live == 0
    outside = x + 1
    assert (counter.peak, outside.nbytes) == (1800, 400)


def test_the_counter_leaves_after_an_exception():
    with pytest.raises(KeyError), AllocationCounter() as counter:
        raise KeyError
    torch.zeros(5) + 1
    assert counter.peak == 0


def test_attention_on_meta_has_no_square_matrix():
    q = torch.empty(1, 3, 4096, 32, device="meta", dtype=torch.bfloat16)
    with AllocationCounter() as counter:
        out = nn.functional.scaled_dot_product_attention(q, q, q)
    assert out.shape == q.shape and counter.peak == q.nbytes + 4 * 3 * 4096


# Predicted beside measured, on this machine


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize(("config", "shape"), [(SMALL, (1, 16, 3, 12, 10)), (MEDIUM, (2, 16, 3, 8, 8))])
def test_a_forward_takes_what_was_predicted(config, shape, precision):
    dtype = torch_dtype(precision)
    model = filled(MMDiT(config, dtype=dtype))
    batch, channels, *extent = shape
    inputs = [
        torch.zeros(shape, dtype=dtype),
        torch.ones(batch),
        torch.zeros(batch, 512, 64, dtype=dtype),
        torch.zeros(batch, 64, dtype=dtype),
    ]
    cond = torch.zeros(batch, channels + 1, *extent, dtype=dtype)
    predicted = forward_peak(config, precision, shape)
    assert counted(lambda: model(*inputs, cond)) == pytest.approx(predicted, rel=0.1)
    # The allocator's own account, which our counter has no part in.
    assert allocated(lambda: model(*inputs, cond)) == pytest.approx(predicted, rel=0.1)


def allocated(run):
    """Peak of what torch's allocator gave out, by its profiler."""
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert peak
    return peak


@pytest.mark.parametrize(
    ("precision", "shape"),
    [(precision, (1, 16, 33, 72, 128)) for precision in PRECISIONS]  # 768px, 129 frames
    + [("bf16", (1, 16, 33, 128, 128)), ("bf16", (2, 16, 17, 72, 128)), ("int8", (1, 16, 1, 394, 334)), ("fp32", (1, 16, 129, 32, 34))],
)
def test_a_long_sequence_is_on_the_line_of_two_shorter_ones_to_the_byte(precision, shape):
    assert forward_peak(MODEL.transformer, precision, shape) == _counted_forward(MODEL.transformer, precision, shape, 512)


@pytest.mark.parametrize(
    ("precision", "size"),
    [
        ("bf16", (33, 32, 32)),  # a tile of 129 frames, as it comes
        ("fp32", (33, 32, 32)),
        ("bf16", (65, 24, 32)),
        ("fp32", (33, 32, 10)),
        ("fp32", (41, 16, 16)),
        ("bf16", (17, 72, 64)),
        ("bf16", (129, 16, 8)),
    ],
)
def test_a_long_decode_is_on_the_line_of_two_shorter_ones_to_the_byte(precision, size):
    decode = (MODEL.vae, torch_dtype(precision), (1, 16, *size), True)
    assert tile_peak(*decode) == counted_peak(*decode)


def test_a_decode_of_a_minute_is_near_enough_to_the_line():
    decode = (MODEL.vae, torch.bfloat16, (1, 16, 361, 8, 16), True)
    assert tile_peak(*decode) == pytest.approx(counted_peak(*decode), rel=0.05)


def test_every_further_block_needs_what_the_second_does():
    deep = replace(SMALL, depth=5, depth_single_blocks=6)
    model = MMDiT(deep, device="meta").requires_grad_(False)
    shape = (1, 16, 3, 8, 8)
    inputs = [torch.empty(1, *size, device="meta") for size in ((16, 3, 8, 8), (), (512, 64), (64,), (17, 3, 8, 8))]
    peak = counted(lambda: model(*inputs))
    assert peak == forward_peak(deep, "fp32", shape) == forward_peak(SMALL, "fp32", shape)


@pytest.mark.parametrize("has_given", [False, True])
def test_a_sampling_run_takes_what_was_predicted(has_given):
    model = filled(MMDiT(MEDIUM))
    shape = (1, 16, 3, 16, 16)

    def run():
        text = TextCondition(*({"context": torch.zeros(1, 512, 64), "y": torch.zeros(1, 64)} for _ in range(2)))
        condition = None
        if has_given:
            from opensora_core.sampling.given import image_condition

            condition = image_condition(shape, torch.zeros(1, 16, 1, 16, 16), None)
        sample(SamplingRecipe(), model, noise(shape, 0), flow_schedule(2, 3.0), Guidance(), Conditions(text, condition))

    one, rest = sampling_peak(MEDIUM, "fp32", shape, has_given)
    assert sampling_peak(MEDIUM, "fp32", shape, has_given, 32)[0] < one
    assert counted(run) == pytest.approx(one + rest, rel=0.1)
    assert rest > 3 * 4 * 16 * 3 * 16 * 16  # latents and both predictions at least


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("tiling", [Tiling(64), Tiling(64, temporal_tile=8), Tiling(0)])
def test_a_decode_takes_what_was_predicted(chunks_as_on_cpu, precision, tiling):
    vae = filled(CausalVAE(VAE, dtype=torch_dtype(precision)))
    shape = (1, 16, 3, 8, 12)
    latents = torch.zeros(shape, dtype=torch_dtype(precision))
    peak = counted(lambda: tiled_decode(vae.decode, latents, tiling))
    predicted = sum(tiled_peak.__wrapped__(VAE, precision, shape, tiling))
    assert peak == pytest.approx(predicted, rel=0.1)


def test_a_medium_tile_and_an_encoded_picture_take_what_was_predicted(chunks_as_on_cpu):
    vae = filled(CausalVAE(MEDIUM_VAE))
    latents = torch.zeros(1, 16, 2, 8, 8)
    assert counted(lambda: vae.decode(latents)) == pytest.approx(
        tiled_peak.__wrapped__(MEDIUM_VAE, "fp32", (1, 16, 2, 8, 8), Tiling())[0], rel=0.1
    )
    pixels = torch.zeros(1, 3, 1, 64, 96)
    predicted = sum(tiled_peak.__wrapped__(MEDIUM_VAE, "fp32", (1, 3, 1, 64, 96), Tiling(64), False))
    assert counted(lambda: tiled_encode(vae.encode, pixels, Tiling(64))) == pytest.approx(predicted, rel=0.1)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8_e4m3fn"])
def test_encoding_takes_what_was_predicted_and_weights_are_counted_whole(tiny_checkpoint, precision):
    sizes = sizes_of_files(t5=tiny_checkpoint / "t5xxl.safetensors").text
    dtype = torch_dtype(precision) or torch.bfloat16
    quantised = precision if precision not in DTYPES else None
    t5 = load_t5(tiny_checkpoint / "t5xxl.safetensors", dtype, "cpu", tiny_checkpoint, precision=quantised)
    weights, _ = text_weights(sizes, precision, "fp32")
    assert sum(p.nbytes for p in t5.model.parameters()) == pytest.approx(weights.sizes.total, rel=0.01)
    assert not weights.is_mapped or precision == "fp32"
    ids = torch.zeros(2, 512, dtype=torch.int64)
    assert counted(lambda: t5.model(input_ids=ids)) == pytest.approx(text_peak(sizes, precision), rel=0.1)


# Sizes


def test_sizes_come_from_headers(tiny_checkpoint, tmp_path):
    found = sizes_of_files(
        *(tiny_checkpoint / name for name in ("Open_Sora_v2.safetensors", "hunyuan_vae.safetensors", "t5xxl.safetensors"))
    )
    assert found.transformer == tiny.TRANSFORMER and found.vae == tiny.VAE
    assert (found.stored, found.stored_text) == ("bf16", "fp16")
    assert found.text.t5 == T5Sizes(d_model=64, d_ff=128, num_layers=2, num_heads=2, d_kv=64)
    clip = sizes_of_files(clip=tiny_checkpoint / "clip_l.safetensors").text
    assert clip.clip == CLIPSizes(hidden_size=64, num_hidden_layers=2, intermediate_size=256)
    quantize(tiny_checkpoint / "Open_Sora_v2.safetensors", tmp_path / "int8.safetensors", "int8", groups=("attention", "modulation"))
    stored = sizes_of_files(tmp_path / "int8.safetensors")
    assert (stored.stored, stored.groups) == ("int8", ("attention", "modulation"))
    model = load_transformer(tmp_path / "int8.safetensors", torch.bfloat16)
    assert transformer_weights(stored.transformer, "int8", "int8", stored.groups).sizes == module_bytes(model, model.blocks())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_are_those_of_a_loaded_model(tiny_checkpoint, precision):
    path = tiny_checkpoint / "Open_Sora_v2.safetensors"
    if precision in DTYPES:
        model = load_transformer(path, torch_dtype(precision))
    else:
        if precision != "fp8_e4m3fn":
            pytest.importorskip("bitsandbytes")
        model = load_transformer(path, torch.bfloat16, precision=precision)
    weights = transformer_weights(tiny.TRANSFORMER, precision, "fp32")
    assert weights.sizes == module_bytes(model, model.blocks())
    assert weights.is_mapped == (precision == "fp32")


def test_the_released_sizes():
    total = transformer_weights(MODEL.transformer, "bf16", "bf16").sizes.total
    assert total == pytest.approx(2 * 11.89e9, rel=1e-3)
    by_precision = [transformer_weights(MODEL.transformer, p, p).sizes.total for p in ("fp32", "bf16", "int8", "nf4")]
    assert by_precision == sorted(by_precision, reverse=True)


# The promises: decode included


@pytest.mark.parametrize("model", [MODEL, FP8_FILE], ids=["bf16 file", "fp8 file"])
@pytest.mark.parametrize("mode", ["auto", "minimal"])
@pytest.mark.parametrize(("request_", "gb"), [(LOW, 8), (HIGH, 12)], ids=["256px in 8 GB", "768px in 12 GB"])
def test_the_promise(request_, gb, mode, model):
    found = preflight(replace(request_, settings=Settings(offload=mode)), model, card(gb))
    assert found.asked.fits, found.report()
    assert all(stage.num_bytes <= gb * 1e9 for stage in found.asked.stages)
    # Neither needs anything but an exact decode.
    assert found.asked.tiling == Tiling() and not found.asked.notes
    assert "129 frames: exact" in found.report()


@pytest.fixture
def released_file(write_hole, tmp_path):
    """A file of the released model's 11.9 billion parameters, in bf16 or as `quantize` writes it, that holds no weights: a hole."""
    plain = write_hole(tmp_path / "Open_Sora_v2.safetensors", table.manifest(OPEN_SORA_2))

    def make(precision):
        if precision not in FORMATS:
            return plain
        header, identity = open_model(plain, "transformer")
        form, path = FORMATS[precision](), tmp_path / f"{precision}.safetensors"
        entries = quantize_file._entries(header, identity, form, QUANTISED_GROUPS)
        with path.open("wb") as file:
            file.write(quantize_file._head(entries, header, QUANTISED_GROUPS))
            for entry in entries:
                if entry.key.endswith(".comfy_quant"):
                    file.write(next(one.note for one in entries if one.layer == entry.key.removesuffix(".comfy_quant")).encode())
                else:
                    file.seek(entry.num_bytes, os.SEEK_CUR)
            file.truncate()
        return path

    return make


@pytest.mark.parametrize("has_given", [False, True])
@pytest.mark.parametrize(("mode", "budget_gib"), [("auto", 8), ("budget", 2), ("budget", 4), ("minimal", 8)])
@pytest.mark.parametrize("precision", ["fp8_e4m3fn", "int8", "nf4"])
def test_the_promise_of_quantised_weights_from_a_file_of_the_released_size(released_file, precision, mode, budget_gib, has_given):
    """On a machine of 16 GB of RAM, of which nothing else has any; nf4 from the bf16 file, since there are no nf4 files."""
    model = sizes_of_files(released_file(precision))
    assert model.transformer == OPEN_SORA_2 and model.stored == (precision if precision in FORMATS else "bf16")
    for video, gb in ((LOW, 8), (HIGH, 12)):
        found = preflight(replace(video, has_given=has_given, settings=Settings(precision, mode, budget_gib)), model, card(gb, 16))
        assert found.asked.fits and found.recommended.fits, found.report()
        assert max(stage.num_bytes for stage in found.asked.stages) <= gb * 1e9
        assert found.asked.ram.num_bytes <= 16 * GIB and found.asked.tiling == Tiling()  # an exact decode, not parked
        # Minimal copies all of the file every time, a hair more than such a machine holds; said, and not called a failure.
        assert found.asked.is_cached or (mode == "minimal" and "read from disk each time" in found.report())


@pytest.mark.parametrize(("precision", "others"), [("fp8_e4m3fn", 0), ("int8", 0), ("fp8_e4m3fn", 3), ("int8", 3)])
def test_with_nothing_asked_for_the_eight_bit_file_streams_from_ram(released_file, precision, others):
    """others: GiB of the 16 that the system and other programs have."""
    model = sizes_of_files(released_file(precision))
    for video, gb in ((LOW, 8), (HIGH, 12)):
        found = preflight(video, model, card(gb, 16 - others))
        assert found.recommended is found.asked and found.asked.is_cached, found.report()
        assert found.asked.settings == Settings(precision) and found.asked.streamed_bytes + found.asked.ram.num_bytes <= (16 - others) * GIB


@pytest.mark.parametrize(("request_", "gb"), [(LOW, 8), (HIGH, 12)], ids=["256px", "768px"])
def test_what_is_recommended_to_an_impossible_wish_holds_the_promise(released_file, request_, gb):
    model = sizes_of_files(released_file("int8"))
    for wish in (Settings(offload="resident"), Settings(offload="budget", budget_gib=gb)):
        found = preflight(replace(request_, settings=wish), model, card(gb, 16))
        assert not found.asked.fits and found.recommended.settings == Settings("int8") and found.recommended.is_cached
        assert max(stage.num_bytes for stage in found.recommended.stages) <= gb * 1e9


@pytest.mark.parametrize(("request_", "gb"), [(LOW, 8), (HIGH, 12)], ids=["256px", "768px"])
def test_the_eight_bit_file_in_16_gb_of_ram(request_, gb):
    found = preflight(request_, FP8_FILE, card(gb, 16))
    assert found.asked.fits and found.asked.is_cached and found.recommended is found.asked, found.report()
    assert found.asked.ram.num_bytes + found.asked.streamed_bytes <= 16 * GIB
    assert found.asked.ram.num_bytes < 3 * GIB  # what cannot be dropped


def test_forwards():
    assert (LOW.forwards, replace(LOW, has_given=True).forwards) == (80, 110)
    assert "80 forwards" in preflight(LOW, MODEL, card(80)).report()
    assert "110 forwards" in preflight(replace(LOW, has_given=True), MODEL, card(80)).report()


# What it says


def test_stages_are_the_sum_of_what_they_are_made_of():
    found = preflight(replace(LOW, has_given=True), MODEL, card(24))
    assert [stage.name for stage in found.asked.stages] == ["text", "image", "sampling", "decode"]
    for stage in found.asked.stages:
        assert stage.num_bytes == sum(item.num_bytes for item in stage.items) > CONTEXT_BYTES
        assert any("assumed" in item.name for item in stage.items)  # libraries' own are a line of their own
    sampling = {item.name: item.num_bytes for item in stage_of(found.asked, "sampling").items}
    assert sampling["activations of one forward"] == forward_peak(MODEL.transformer, "bf16", (1, 16, 33, 24, 42))
    assert dict(found.asked.least)["sampling"] < stage_of(found.asked, "sampling").num_bytes <= found.memory.free
    longer = estimate(replace(LOW, num_frames=257), found.asked.settings, MODEL, found.memory)
    assert dict(longer.least)["sampling"] > dict(found.asked.least)["sampling"]


def test_resident_keeps_the_transformer_in_every_stage_and_is_refused_where_it_cannot():
    resident = replace(LOW, settings=Settings(offload="resident"))
    found = preflight(resident, MODEL, card(80))
    assert found.asked.fits and min(stage.num_bytes for stage in found.asked.stages) > 22 * GIB
    small = preflight(resident, MODEL, card(24))
    assert not small.asked.fits and any("sampling" in problem for problem in small.asked.problems)
    assert small.recommended.settings.offload == "resident"  # asked for by name: kept, in a precision that fits
    assert small.recommended.settings.precision == "fp8_e4m3fn" and small.recommended.fits


def test_exact_first_then_what_ram_can_hold():
    assert preflight(HIGH, MODEL, card(24)).recommended.settings == Settings("bf16")
    # 17 GiB of bf16 would be read from disk in every forward.
    found = preflight(LOW, MODEL, card(8, 16))
    assert found.asked.fits and not found.asked.is_cached and "read from disk" in found.report()
    assert found.recommended.settings.precision == "fp8_e4m3fn" and found.recommended.is_cached
    assert "quantize" in found.recommended.notes[-1]


def test_a_precision_asked_for_by_name_is_kept_and_a_quantised_file_stays_as_it_is():
    named = preflight(replace(LOW, settings=Settings("int8")), MODEL, card(24))
    assert named.recommended.settings.precision == "int8"
    assert preflight(LOW, FP8_FILE, card(24)).recommended.settings.precision == "fp8_e4m3fn"


def test_decoding_is_parked_in_main_memory_where_that_has_room():
    memory = replace(card(24), free=6 * GIB)
    for policy in ("auto", "exact"):
        found = preflight(replace(LOW, settings=Settings(decode_policy=policy)), MODEL, memory)
        assert found.asked.fits and found.asked.tiling == Tiling(parked=True)
        assert "activations in main memory" in found.report() and "activations of the decode" in found.report()
    assert not preflight(replace(LOW, settings=Settings(decode_policy="low_memory")), MODEL, memory).asked.tiling.parked


def test_decoding_finds_its_way_and_an_exact_one_that_does_not_fit_is_a_problem():
    memory = replace(card(24, 6), free=6 * GIB)
    found = preflight(LOW, MODEL, memory)
    assert found.asked.fits and found.asked.tiling.temporal_tile == 64
    assert "64 frames at a time" in found.report() and "Frames differ" in found.report()
    exact = preflight(replace(LOW, settings=Settings(decode_policy="exact")), MODEL, memory)
    assert not exact.asked.fits and exact.asked.problems[0].startswith("decode: ")
    assert exact.recommended.settings.decode_policy == "auto"


def test_what_cannot_fit_is_refused_with_the_nearest_that_can():
    asked, least = replace(HIGH, num_frames=33), Settings("nf4", "minimal")
    needed = stage_of(estimate(asked, least, MODEL, card(24)), "sampling").num_bytes
    memory = replace(card(24), free=needed * 9 // 10)
    found = preflight(asked, MODEL, memory)
    assert not found.asked.fits and found.recommended is None and "No settings fit" in found.report()
    frames = int(found.nearest.split("The nearest that does: ")[1].split()[0])
    size = found.nearest.split(" or ")[1].split()[0]
    width, height = map(int, size.split("x"))
    assert frames % 4 == 1 and 1 <= frames < 33 and 16 <= height < 576
    assert estimate(replace(asked, num_frames=frames), least, MODEL, memory).fits
    assert not estimate(replace(asked, num_frames=frames + 4), least, MODEL, memory).fits
    assert estimate(replace(asked, height=height, width=width), least, MODEL, memory).fits


def test_the_nearest_is_found_without_counting_every_decode_on_the_way(monkeypatch):
    counted_decodes = []

    def counting(config, precision, shape, tiling):
        counted_decodes.append(shape)
        return tiled_peak(config, precision, shape, tiling)

    monkeypatch.setattr(estimate_module.footprint, "tiled_peak", counting)
    assert "The nearest that does: " in preflight(Request(2048, 2048), MODEL, card(8.6)).nearest
    assert len(set(counted_decodes)) <= 2 + 2  # as asked for, and where sampling ends in either search; one of them once more


def test_a_search_runs_few_networks():
    for count in (_counted_forward, sampling_peak, tiled_peak, counted_peak):
        count.cache_clear()
    assert "The nearest that does: " in preflight(Request(2048, 2048), MODEL, card(24)).nearest
    assert _counted_forward.cache_info().misses <= 2 * 2  # two lengths each: as asked for, and with the smallest weights
    assert counted_peak.cache_info().misses <= 2  # however many clips are tried


@pytest.mark.parametrize("request_", [LOW, HIGH, replace(HIGH, num_frames=1)])
def test_no_precision_takes_less_beside_the_weights_than_bf16(request_):
    beside = {precision: Stages(request_, Settings(precision), MODEL, card(24)).beside_transformer for precision in PRECISIONS}
    assert min(beside.values()) == beside["bf16"]


def test_nothing_at_all_fits():
    assert "Not even one frame" in preflight(replace(LOW, num_frames=5), MODEL, card(0.5)).nearest


def test_ram_too_small_for_weights_converted_on_reading():
    nf4 = preflight(replace(LOW, settings=Settings("nf4")), MODEL, card(24, 8))
    assert not nf4.asked.fits and nf4.asked.problems[-1].startswith("RAM: ")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: preflight(replace(LOW, settings=Settings(offload="budget", budget_gib=0)), MODEL, card(24)), "not an amount"),
        (lambda: preflight(replace(LOW, settings=Settings(offload="budget", budget_gib=0.5)), MODEL, card(24)), "too small"),
        (lambda: Settings("fp16"), "bf16, fp8_e4m3fn"),
        (lambda: Settings(offload="disk"), "minimal"),
        (lambda: Settings(decode_policy="fast"), "low_memory"),
        (lambda: replace(LOW, num_frames=130), "129 or 133"),
        (lambda: replace(LOW, width=340), "192x336"),
        (lambda: replace(LOW, num_steps=0), "default is 50"),
        (lambda: replace(card(8), free=-1), "negative"),
    ],
)
def test_bad_input_is_a_sentence(make, says):
    with pytest.raises(OpenSoraError, match=says):
        make()


def test_a_budget_larger_than_the_card_does_not_fit():
    found = preflight(replace(LOW, settings=Settings("bf16", "budget", 16)), MODEL, card(8))
    assert not found.asked.fits and found.recommended.settings.offload == "auto"


def test_this_machine():
    memory = memory_of("cpu")
    assert memory.device == "cpu" and 0 < memory.free == memory.ram_free <= memory.total == memory.ram_total
    found = preflight(Request(32, 32, 5), ModelSizes(tiny.TRANSFORMER, tiny.VAE, stored="fp32"), memory)
    assert found.asked.settings.precision == "fp32" and "GPU" not in found.report()


# The command


def test_inspect_plan(tiny_checkpoint, capsys):
    assert main(["inspect", "--plan", "--gpu-gib", "8", "--ram-gib", "32", "--resolution", "256px"]) == DONE
    said = capsys.readouterr().out
    assert "336x192" in said and "80 forwards" in said and "sampling" in said and "not measured here" in said
    size = ["--width", "64", "--height", "64", "--num-frames", "5", "--gpu-gib", "1.5"]
    assert main(["inspect", str(tiny_checkpoint), "--plan", *size, "--cond-type", "i2v_head"]) == DONE
    assert "110 forwards" in capsys.readouterr().out
    assert main(["inspect", str(tiny_checkpoint / "Open_Sora_v2.safetensors"), "--plan", *size]) == DONE
    assert "Open_Sora_v2.safetensors: 64x64" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--plan", "--gpu-gib", "0"], "not an amount"),
        (["--plan", "--check", "x"], "one at a time"),
        (["--plan", "--as-command", "x"], "one at a time"),
        (["--plan", "--width", "64"], "Give both, or neither: one of"),
        (["--plan", "--num-frames", "6", "--gpu-gib", "8"], "5 or 9"),
        (["absent.safetensors", "--plan"], "does not exist"),
        ([], "needs a weights file"),
    ],
)
def test_inspect_plan_refuses_in_a_sentence(words, says, capsys):
    assert main(["inspect", *words]) == REFUSED
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_inspect_plan_refuses_what_the_model_would(tmp_path, capsys):
    """A mode that the model does not have, and another precision of a file that is quantised."""
    cog = cogvideox_files.write(tmp_path / "cog", "2b")
    assert main(["inspect", str(cog), "--plan", "--cond-type", "i2v_head"]) == REFUSED
    assert "Leave out image" in capsys.readouterr().err
    assert main(["quantize", str(cog / "transformer"), str(tmp_path / "eight.safetensors")]) == DONE
    for precision, code in (("int8", REFUSED), ("fp8_e4m3fn", DONE), ("bf16", DONE)):
        assert main(["inspect", str(tmp_path / "eight.safetensors"), "--plan", "--precision", precision, "--gpu-gib", "80"]) == code
        assert ("already quantised (fp8_e4m3fn)" in capsys.readouterr().err) == (code == REFUSED)
    parts = {"vae": cog / "vae", "t5": cog / "text_encoder", "tokenizers": cog / "tokenizer"}
    with pytest.raises(OpenSoraError, match="already quantised"):  # before a prompt is encoded
        OpenSoraPipeline.from_files(dit=tmp_path / "eight.safetensors", **parts, precision="int8").check_files()


@pytest.mark.parametrize(
    ("version", "words", "says"),
    [
        ("cogvideox", ["--gpu-gib", "2"], "The nearest that does: 25 frames"),
        ("1.2", ["--gpu-gib", "2", "--resolution", "720p", "--num-frames", "102"], "The nearest that does: 68 frames"),
        ("1.0", ["--gpu-gib", "0.8"], "Not even one frame of 16 pixels"),
    ],
)
def test_the_nearest_is_a_length_and_a_size_that_the_model_has(version, words, says, tmp_path, capsys):
    """CogVideoX has 8k+1 frames, Open-Sora 1.2 multiples of 17; Open-Sora 1 has any size from 16 pixels on."""
    state = cogvideox_files.network("2b").state_dict() if version == "cogvideox" else open_sora_1_files.weights(version)
    save_file(state, tmp_path / "dit.safetensors")
    assert main(["inspect", str(tmp_path / "dit.safetensors"), "--plan", *words]) == REFUSED
    assert says in capsys.readouterr().out


def test_inspect_plan_ends_with_2_where_nothing_fits(capsys):
    assert main(["inspect", "--plan", "--gpu-gib", "0.4", "--num-frames", "1", "--width", "32", "--height", "32"]) == REFUSED
    assert "No settings fit" in capsys.readouterr().out
