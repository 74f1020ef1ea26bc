"""Offload: plans that keep every budget, and streamed networks that compute what resident ones do, bit for bit."""

import dataclasses
import os
import random
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from opensora_core.checkpoint.files import read_header
from opensora_core.checkpoint.load import load_transformer
from opensora_core.checkpoint.lora import merge_lora
from opensora_core.choices import BUDGET, MINIMAL, PRECISIONS as WORDS, RESIDENT
from opensora_core.errors import OpenSoraError
from opensora_core.families import table
from opensora_core.memory import stream as stream_module
from opensora_core.memory.residency import GIB, UnitBytes, at_least, at_most, least_bytes, make_residency, padded
from opensora_core.memory.stream import BlockStream, Lane, module_bytes, piece_sizes
from opensora_core.networks.mmdit.config import OPEN_SORA_2
from opensora_core.networks.mmdit.layout import module_name
from opensora_core.networks.mmdit.model import MMDiT

PRECISIONS = WORDS[1:]  # without auto
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def released() -> UnitBytes:
    """The 11.9-billion-parameter transformer in bf16."""
    model = MMDiT(OPEN_SORA_2, dtype=torch.bfloat16, device="meta")
    return module_bytes(model, model.blocks())


# --- plans --------------------------------------------------------------------------------------------------------------


def staging_bytes(stream):
    return sum(buffer.nbytes for buffer in stream._buffers)


def by_name(tensor_bytes: dict[str, int]) -> UnitBytes:
    """What a plan is made from, from nothing but the names of the released model's tensors."""
    blocks = {f"{stem}.{index}.": 0 for stem, count in (("double_blocks", 19), ("single_blocks", 38)) for index in range(count)}
    rest = 0
    for name, size in tensor_bytes.items():
        block = re.match(r"\w+_blocks\.\d+\.", name)
        if block:
            blocks[block[0]] += padded(size)
        else:
            rest += padded(size)
    return UnitBytes(tuple(blocks.values()), rest)


def test_the_released_layout_in_every_form_of_its_sizes(released):
    manifest = table.manifest(OPEN_SORA_2)
    assert by_name({key: 2 * torch.Size(shape).numel() for key, shape in manifest.items()}) == released
    assert len(released.blocks) == 57
    assert 0 <= released.total - 2 * 11_891_390_528 < 256 * len(manifest)
    assert released.blocks[:19] == released.blocks[:1] * 19 and released.blocks[19:] == released.blocks[19:20] * 38
    # One double block in bf16, and the embedders and the final layer beside it.
    minimal = make_residency(released, MINIMAL)
    assert minimal.device_bytes == released.rest + released.blocks[0] and 0.7 < minimal.device_bytes / GIB < 0.85


@pytest.mark.parametrize("budget", [1.5, 2, 4, 6, 8, 11.99, 16, 20, 22])
def test_a_budget_is_kept_and_used(released, budget):
    plan = make_residency(released, BUDGET, budget)
    assert plan.device_bytes <= budget * GIB
    assert plan.device_bytes > budget * GIB - 2 * released.blocks[0]  # no room for another block and a smaller buffer
    assert plan.num_buffers == 2 and plan.streamed == tuple(sorted(plan.streamed))
    stay = sorted(set(range(57)) - set(plan.streamed))
    if len(stay) > 8:  # spread: streamed ones lie between those that stay
        gaps = [after - before for before, after in zip([-1, *stay], [*stay, 57], strict=True)]
        assert max(gaps) <= 2 + 2 * 57 // len(stay)


def test_a_larger_budget_copies_no_more(released):
    copied = [make_residency(released, BUDGET, quarter / 4).copied_bytes for quarter in range(6, 93)]
    assert copied == sorted(copied, reverse=True) and copied[-1] == 0 and copied[0] > 20 * GIB


def test_any_sizes_and_any_budget():
    draw = random.Random(0)
    for _ in range(300):
        sizes = UnitBytes(tuple(256 * draw.randint(1, 40) for _ in range(draw.randint(1, 12))), 256 * draw.randint(0, 30))
        least = least_bytes(sizes, BUDGET)
        budget = draw.randint(least, sizes.total + 1000)
        plan = make_residency(sizes, BUDGET, budget / GIB, device_bytes=2 * GIB)
        assert plan.device_bytes <= budget and (plan.streamed == ()) == (plan.num_buffers == 0)
        assert not plan.streamed or len(plan.streamed) > 2  # two through two buffers would only be copied for nothing
        assert make_residency(sizes, MINIMAL).device_bytes == sizes.rest + max(sizes.blocks) <= max(least, sizes.total)


BAD_BUDGETS = [0, -1, float("nan"), float("inf"), 1.2, None, True, "8"]


@pytest.mark.parametrize("budget", BAD_BUDGETS)
def test_a_budget_that_cannot_be_kept_is_refused_with_one_that_can(released, budget):
    with pytest.raises(OpenSoraError, match=f"{budget} GiB|needs a budget") as refusal:
        make_residency(released, BUDGET, budget, device_bytes=24 * GIB)
    nearest = float(re.search(r"Give at least ([\d.]+) GiB", str(refusal.value))[1])
    assert make_residency(released, BUDGET, nearest).device_bytes <= nearest * GIB
    with pytest.raises(OpenSoraError):
        make_residency(released, BUDGET, nearest - 0.02)


def test_a_budget_larger_than_the_card(released):
    with pytest.raises(OpenSoraError, match="30 GiB is larger than the device, which has 23.6 GiB"):
        make_residency(released, BUDGET, 30, device_bytes=int(23.65 * GIB))
    assert make_residency(released, BUDGET, 23.6, device_bytes=int(23.65 * GIB)).streamed == ()


def test_a_mode_that_does_not_fit_names_those_that_do(released):
    with pytest.raises(OpenSoraError, match=r"Use budget with 1.37 to 16 GiB or minimal.*resident needs 22.2 GiB .* has 16 GiB"):
        make_residency(released, RESIDENT, device_bytes=16 * GIB)
    with pytest.raises(OpenSoraError, match="Use minimal, which needs 0.7.*budget needs 1.37"):
        make_residency(released, BUDGET, 1, device_bytes=GIB)
    for mode in (RESIDENT, MINIMAL):
        with pytest.raises(OpenSoraError, match="quantised weights.*no mode fits"):
            make_residency(released, mode, device_bytes=GIB // 2)
    with pytest.raises(OpenSoraError, match="Use one of resident, budget, minimal.*'auto' is not known"):
        make_residency(released, "auto")
    assert make_residency(released, RESIDENT, device_bytes=23 * GIB).device_bytes == released.total


def test_plans_are_told_in_numbers(released):
    assert make_residency(released, RESIDENT).sentence() == f"All 57 blocks stay on the device: {at_least(released.total)} GiB of weights."
    said = make_residency(released, BUDGET, 8).sentence()
    count = len(make_residency(released, BUDGET, 8).streamed)
    assert f"{57 - count} of 57 blocks stay" in said and f"{count} stream through 2 buffers" in said
    assert (at_least(1), at_most(GIB), at_least(GIB + 1), at_most(12345 * GIB)) == ("0.000000000932", "1", "1.01", "12300")


# --- the same numbers in every mode ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def predict():
    generator = torch.Generator().manual_seed(0)
    x, cond = (torch.randn(1, channels, 3, 6, 8, generator=generator) for channels in (16, 17))
    context, y = torch.randn(1, 12, 64, generator=generator), torch.randn(1, 64, generator=generator)

    @torch.inference_mode()
    def run(model, device=CPU):
        inputs = [tensor.to(device, model.dtype) for tensor in (context, y, cond)]
        return model(x.to(device, model.dtype), torch.tensor([0.6], device=device), *inputs).cpu()

    return run


@pytest.fixture(scope="module")
def load(tiny_checkpoint):
    """A fresh small model of 2 double and 3 single blocks, in a precision."""

    def read(precision="fp32"):
        if precision == "nf4" or precision == "int8":
            pytest.importorskip("bitsandbytes")
        plain = {"fp32": torch.float32, "bf16": torch.bfloat16}
        path = tiny_checkpoint / "Open_Sora_v2.safetensors"
        if precision in plain:
            return load_transformer(path, plain[precision])
        return load_transformer(path, torch.bfloat16, precision=precision)

    return read


def plans(model):
    """Every kind of plan, by name."""
    sizes = module_bytes(model, model.blocks())
    least = least_bytes(sizes, BUDGET)
    return {
        "resident": make_residency(sizes, RESIDENT),
        "roomy": make_residency(sizes, BUDGET, (sizes.total - 1) / GIB),
        "between": make_residency(sizes, BUDGET, (sizes.total + least) / 2 / GIB),
        "least": make_residency(sizes, BUDGET, least / GIB),
        "minimal": make_residency(sizes, MINIMAL),
    }


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_mode_gives_the_resident_result_bit_for_bit_and_leaves_the_model_as_it_was(load, predict, precision):
    model = load(precision)
    expected = predict(model)
    before = dict(model.named_parameters())
    streamed = {}
    for name, plan in plans(model).items():
        with BlockStream(model, plan, CPU, model.blocks()) as stream:
            assert staging_bytes(stream) == plan.num_buffers * plan.buffer_bytes
            for _ in range(2):
                assert torch.equal(predict(model), expected), name
        assert torch.equal(predict(model), expected)
        streamed[name] = plan.streamed
    after = dict(model.named_parameters())
    assert all(after[name] is tensor for name, tensor in before.items()) and before.keys() == after.keys()
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in model.modules())
    assert not streamed["resident"] and 3 <= len(streamed["roomy"]) < 5 and streamed["least"] == streamed["minimal"] == (0, 1, 2, 3, 4)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_with_a_lora_merged_by_the_one_function(load, predict, tmp_path, precision):
    resident, streamed = load(precision), load(precision)
    layers = ("double_blocks.1.img_attn.q_proj", "single_blocks.2.v_mlp", "final_layer.linear")
    state = {}
    for layer in layers:
        rows, columns = resident.get_submodule(layer).out_features, resident.get_submodule(layer).in_features
        wave = torch.arange(4 * (rows + columns), dtype=torch.float32).sin()
        state[f"diffusion_model.{layer}.lora_A.weight"] = wave[: 4 * columns].view(4, columns).clone()
        state[f"diffusion_model.{layer}.lora_B.weight"] = wave[4 * columns :].view(rows, 4).clone()
    save_file(state, tmp_path / "lora.safetensors")
    plain = predict(resident)
    merge_lora(resident, tmp_path / "lora.safetensors", 0.7)
    merge_lora(streamed, tmp_path / "lora.safetensors", 0.7)
    expected = predict(resident)
    assert not torch.equal(expected, plain)
    for plan in plans(streamed).values():
        with BlockStream(streamed, plan, CPU, streamed.blocks()):
            assert torch.equal(predict(streamed), expected)


def test_tied_strided_and_buffered_tensors_are_streamed_as_they_are():
    class Block(nn.Module):
        def __init__(self, seed):
            super().__init__()
            g = torch.Generator().manual_seed(seed)
            self.first = nn.Parameter(torch.randn(24, 16, generator=g).t(), requires_grad=False)  # strides of the transposed
            self.again = self.first
            self.register_buffer("wide", torch.randn(1, 24, generator=g).expand(16, 24), persistent=False)  # overlaps itself
            self.register_buffer("empty", torch.empty(0, 3))
            self.register_buffer("scalar", torch.tensor(seed + 0.5, dtype=torch.float64))
            self.register_buffer("flags", torch.rand(24, generator=g) > 0.5)

        def forward(self, x):
            assert self.again is self.first and self.first.stride() == (1, 16) and self.empty.shape == (0, 3)
            return (x @ (self.first + self.wide) * self.flags * self.scalar.float()).tanh() @ self.again.t()

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Block(seed) for seed in range(4))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    model, x = Network(), torch.randn(2, 16)
    expected = model(x)
    for plan in (
        make_residency(module_bytes(model, model.layers), MINIMAL),
        make_residency(module_bytes(model, model.layers), BUDGET, 2 / 2**20 * 8),
    ):
        with BlockStream(model, plan, CPU, model.layers):
            assert torch.equal(model(x), expected)
    assert module_bytes(model, model.layers).blocks == (1536 + 1536 + 256 + 256,) * 4


# --- never more on the device than planned ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["roomy", "between", "least", "minimal"])
def test_at_no_moment_is_more_there_than_planned(load, predict, name):
    """What a block's forward reads, and what the plan keeps resident, is all that would be on a device of its own."""
    model = load()
    plan = plans(model)[name]
    blocks = [*model.double_blocks, *model.single_blocks]
    home = {block: {parameter.data_ptr() for parameter in block.parameters()} for block in blocks}
    seen = []

    def look(block, args):
        for index, other in enumerate(blocks):
            away = [p for p in other.parameters() if p.data_ptr() not in home[other]]
            assert len(away) in (0, len(list(other.parameters())))
            assert bool(away) == (other is block and index in plan.streamed)  # put back after its work, never before
            seen.extend((index, p.untyped_storage()) for p in away)

    with BlockStream(model, plan, CPU, model.blocks()) as stream:
        hooks = [block.register_forward_pre_hook(look) for block in blocks]
        predict(model)
        for hook in hooks:
            hook.remove()
        buffers = {storage.data_ptr(): storage.nbytes() for _, storage in seen}
        assert len(buffers) == plan.num_buffers and sum(buffers.values()) == staging_bytes(stream)
        stay = sum(size for index, size in enumerate(plan.sizes.blocks) if index not in plan.streamed)
        assert plan.sizes.rest + stay + staging_bytes(stream) == plan.device_bytes
    assert {index for index, _ in seen} == set(plan.streamed)


@pytest.mark.parametrize("name", ["resident", "roomy", "between", "least", "minimal"])
def test_a_device_of_its_own_holds_what_was_planned_and_nothing_after(load, name):
    """The meta device stands in for a card: what is there is counted at every block."""
    model, meta, counts = load("bf16"), torch.device("meta"), []
    plan = plans(model)[name]

    def there():
        storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *stream._buffers) if tensor.device == meta]
        return sum({storage._cdata: storage.nbytes() for storage in storages}.values())

    with torch.inference_mode(), BlockStream(model, plan, meta, model.blocks()) as stream:
        for block in (*model.double_blocks, *model.single_blocks):
            block.register_forward_pre_hook(lambda *_: counts.append(there()))
        x, context, y = (torch.empty(shape, dtype=torch.bfloat16, device=meta) for shape in ((1, 16, 3, 6, 8), (1, 12, 64), (1, 64)))
        assert model(x, torch.empty(1, device=meta), context, y).shape == x.shape
    padding = 256 * len(list(model.parameters()))
    assert len(counts) == 5 and plan.device_bytes - padding < min(counts) and max(counts) <= plan.device_bytes
    assert all(tensor.device == CPU for tensor in model.parameters()) and not stream._buffers


# --- interruptions and refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("name", ["between", "minimal"])
def test_an_interrupted_forward_leaves_a_network_that_works(load, predict, error, name):
    model = load()
    expected, attend, home = predict(model), model.single_blocks[1].attention, dict(model.named_parameters())

    def fail(*args):
        raise error

    with BlockStream(model, plans(model)[name], CPU, model.blocks()):
        for _ in range(2):
            model.single_blocks[1].attention = fail
            with pytest.raises(type(error)):
                predict(model)
            if isinstance(error, RuntimeError):  # weights are put back at once; after an interrupt, by the next forward or at the end
                assert all(parameter is home[name] for name, parameter in model.named_parameters())
            model.single_blocks[1].attention = attend
            assert torch.equal(predict(model), expected)
        model.single_blocks[1].attention = fail
        with pytest.raises(type(error)):
            predict(model)
    model.single_blocks[1].attention = attend
    assert torch.equal(predict(model), expected)  # released in the middle, everything is back


def test_a_copy_that_fails_is_made_again(load, predict, monkeypatch):
    model = load()
    expected, copy, calls = predict(model), BlockStream._copy, []

    def fail_once(self, index):
        calls.append(index)
        if len(calls) == 3:
            self._buffers[index % 2].fill_(7)  # half done
            raise KeyboardInterrupt
        copy(self, index)

    monkeypatch.setattr(BlockStream, "_copy", fail_once)
    with BlockStream(model, plans(model)["least"], CPU, model.blocks()):
        with pytest.raises(KeyboardInterrupt):
            predict(model)
        assert torch.equal(predict(model), expected)
        assert torch.equal(predict(model), expected)


def test_blocks_may_be_skipped_or_repeated(load, predict):
    """As the host's patches and skip-layer guidance do."""
    model = load()

    def run():
        options = {"patches_replace": {"dit": {("single_block", 1): lambda args, extra: {"img": args["img"]}}}}
        twice = {("double_block", 0): lambda args, extra: extra["original_block"]({**args, **extra["original_block"](args)})}
        options["patches_replace"]["dit"] |= twice
        x = torch.ones(1, 16, 1, 4, 4)
        return model(x, torch.tensor([0.5]), torch.ones(1, 3, 64), torch.ones(1, 64), transformer_options=options)

    with torch.inference_mode():
        expected = run()
        for plan in plans(model).values():
            with BlockStream(model, plan, CPU, model.blocks()):
                assert torch.equal(run(), expected) and torch.equal(run(), expected)


def test_a_second_offload_of_one_network_is_refused(load, predict):
    model = load()
    expected = predict(model)
    for first in ("resident", "minimal"):
        with BlockStream(model, plans(model)[first], CPU, model.blocks()):
            with pytest.raises(OpenSoraError, match="Release the first.*streamed already"):
                BlockStream(model, plans(model)["least"], CPU, model.blocks())
            assert torch.equal(predict(model), expected)  # the first goes on
    stream = BlockStream(model, plans(model)["least"], CPU, model.blocks())
    stream.release()
    stream.release()
    assert torch.equal(predict(model), expected)


def test_weights_changed_while_streamed_are_noticed(load, predict):
    model = load()
    with BlockStream(model, plans(model)["minimal"], CPU, model.blocks()):
        layer = model.single_blocks[0].linear2
        kept, layer.weight = layer.weight, nn.Parameter(layer.weight.clone(), requires_grad=False)
        with pytest.raises(OpenSoraError, match="Merge LoRAs before.*were changed while it is streamed"):
            predict(model)
        layer.weight = kept


def test_networks_that_cannot_be_streamed_are_refused(load):
    class Packed(nn.Parameter):
        """Like bitsandbytes' Params4bit: a parameter with more to it than its bytes."""

    model = load()
    plan = plans(model)["minimal"]
    with pytest.raises(OpenSoraError, match="plan is for 5 blocks and the network has 2"):
        BlockStream(model, plan, CPU, model.double_blocks)
    with pytest.raises(OpenSoraError, match="it has no blocks"):
        module_bytes(model, [])
    with pytest.raises(OpenSoraError, match="larger than the plan says"):
        BlockStream(model.double(), plan, CPU, model.blocks())
    model = load()
    layer = model.double_blocks[1].img_attn.proj
    layer.weight = Packed(layer.weight.data, requires_grad=False)
    with pytest.raises(OpenSoraError, match="precision fp8_e4m3fn.*Block 1 keeps its weight as Packed"):
        BlockStream(model, plan, CPU, model.blocks())
    assert not model._forward_pre_hooks
    with pytest.raises(OpenSoraError, match="is on meta; a network that streams must be read to the CPU"):
        model = MMDiT(model.config, device="meta")
        BlockStream(model, plan, CPU, model.blocks())


# --- the order of copies and kernels, and page-locked memory, without a GPU -------------------------------------------------------


class LateLane(Lane):
    """A device whose copies are as late as its events permit, and whose kernels may still run when the host goes on."""

    is_async = True

    def __init__(self, device, num_slots):
        self.waiting = [None] * num_slots
        self.is_read = [False] * num_slots
        self.log = []

    def copy(self, slot, work):
        assert not self.is_read[slot], "a buffer would be filled while a kernel reads it"
        if self.waiting[slot]:
            self.waiting[slot]()
        self.waiting[slot] = work
        self.log.append(("copy", slot))

    def begin(self, slot):
        if self.waiting[slot]:
            self.waiting[slot]()
        self.waiting[slot] = None
        self.is_read[slot] = True
        self.log.append(("begin", slot))

    def end(self, slot):
        self.is_read[slot] = False
        self.log.append(("end", slot))

    def wait(self):
        for work in self.waiting:
            if work:
                work()


@pytest.fixture
def late(monkeypatch):
    """Streams over a LateLane; page-locked memory is ordinary memory of the same sizes."""
    made = []

    def lane(device, num_slots):
        made.append(LateLane(device, num_slots))
        return made[-1]

    monkeypatch.setattr(stream_module, "lane", lane)
    monkeypatch.setattr(stream_module, "page_locked", lambda size: torch.full((size,), 0xFF, dtype=torch.uint8))
    monkeypatch.setattr(stream_module, "_SMALLEST_PIECE", 4096)
    return made


@pytest.mark.parametrize("limit", [None, 0, 300_000])
def test_copies_as_late_as_events_permit_give_the_same(load, predict, late, limit):
    model = load("bf16")
    expected = predict(model)
    for name, plan in plans(model).items():
        with BlockStream(model, plan, CPU, model.blocks(), limit) as stream:
            assert torch.equal(predict(model), expected) and torch.equal(predict(model), expected), name
            pinned = stream.pinned_bytes
            assert pinned == plan.copied_bytes if limit is None else pinned <= min(limit, plan.copied_bytes)
            assert limit != 300_000 or not plan.streamed or pinned > 0
        assert torch.equal(predict(model), expected)


@pytest.mark.parametrize("allowed", [0, 2], ids=["none", "some"])
def test_a_system_that_page_locks_no_more_only_makes_it_slower(load, predict, late, monkeypatch, caplog, allowed):
    """CUDA calls such a limit (WSL's, a container's) out of memory; the device has enough."""
    model = load("bf16")
    expected, given = predict(model), []

    def page_locked(size):
        if len(given) >= allowed:
            raise torch.cuda.OutOfMemoryError("CUDA error: out of memory")
        given.append(size)
        return torch.full((size,), 0xFF, dtype=torch.uint8)

    monkeypatch.setattr(stream_module, "_SMALLEST_PIECE", 2**40)  # a block is one piece
    monkeypatch.setattr(stream_module, "page_locked", page_locked)
    with BlockStream(model, plans(model)["least"], CPU, model.blocks()) as stream:
        assert torch.equal(predict(model), expected) and torch.equal(predict(model), expected)
        assert stream.pinned_bytes == sum(given) and len(given) == allowed
    [line] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "can be page-locked" in line


def test_the_next_block_is_copied_while_the_present_one_computes(load, predict, late):
    """Its copy is asked for before the event that it must not wait for, and only ever into the other buffer."""
    model = load()
    with BlockStream(model, plans(model)["least"], CPU, model.blocks()):
        predict(model)
        log = list(late[-1].log)
    assert log[:4] == [("copy", 0), ("begin", 0), ("end", 0), ("copy", 1)]
    begins = [slot for what, slot in log if what == "begin"]
    assert begins == [0, 1, 0, 1, 0]
    for before, (what, _) in zip(log, log[1:], strict=False):
        if what == "copy":
            assert before[0] == "end"  # right after a block's kernels are on their way
    # 5 blocks through two buffers: the fifth leaves buffer 0, into which the first of the next forward goes.
    assert [slot for what, slot in log if what == "copy"] == [0, 1, 0, 1, 0, 0]


def test_page_locked_memory_is_not_rounded_up_by_much():
    block = 141_593_600 * 2
    assert sum(piece_sizes(block)) == block and len(piece_sizes(block)) < 12
    for size in (*piece_sizes(block)[:-1], *piece_sizes(2**20)):
        assert size & (size - 1) == 0
    assert piece_sizes(5) == [5] and piece_sizes(0) == []


# --- the released layout --------------------------------------------------------------------------------------------------------


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024


def mapped(path, header, dtype=torch.bfloat16):
    """A file's tensors as views of one map. (safetensors' own reader asks the system to read ahead, which for a hole takes long.)"""
    whole = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    begin = {key: info.end - info.num_elements * dtype.itemsize for key, info in header.tensors.items()}
    return {key: whole[begin[key] : info.end].view(dtype).view(info.shape) for key, info in header.tensors.items()}


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux to count anonymous memory")
def test_a_file_of_the_released_size_is_mapped_planned_and_streamed_in_bounded_memory(tmp_path, write_hole):
    """22 GiB of which one block is real: what streams takes its buffers, whatever the file's size."""
    model = MMDiT(OPEN_SORA_2, dtype=torch.bfloat16, device="meta").requires_grad_(False)
    sizes = module_bytes(model, model.blocks())
    plan = make_residency(sizes, BUDGET, 19)
    real = next(index for index in plan.streamed if index > 19)  # a single block: 283 MB
    stem = f"single_blocks.{real - 19}."

    path = write_hole(tmp_path / "Open_Sora_v2.safetensors", table.manifest(OPEN_SORA_2))
    header = read_header(path)
    state = mapped(path, header)
    with path.open("r+b") as file:
        for key, info in header.tensors.items():
            if key.startswith(stem):
                values = (torch.arange(info.num_elements, dtype=torch.int32) % 251 - 125).to(torch.bfloat16).div_(4096)
                file.seek(info.end - values.nbytes)
                file.write(values.view(torch.uint8).numpy())
    assert path.stat().st_size > 22 * GIB and path.stat().st_blocks * 512 < 400 * 2**20  # the rest is a hole
    model.load_state_dict({module_name(key): tensor for key, tensor in state.items()}, strict=True, assign=True)
    assert module_bytes(model, model.blocks()) == sizes == by_name({key: 2 * info.num_elements for key, info in header.tensors.items()})

    block = model.single_blocks[real - 19]
    inputs = torch.ones(1, 6, 3072, dtype=torch.bfloat16), torch.ones(1, 3072, dtype=torch.bfloat16), torch.ones(2, 6, 1, 64), 2, {}
    expected, before = block(*inputs), anonymous_bytes()
    assert expected.float().std() > 0
    with torch.no_grad(), BlockStream(model, plan, CPU, model.blocks()) as stream:
        assert torch.equal(block(*inputs), expected)
        held = anonymous_bytes() - before
    assert staging_bytes(stream) == 0 < held < plan.num_buffers * plan.buffer_bytes + 100 * 2**20


# --- on a GPU ---------------------------------------------------------------------------------------------------------------------

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@on_cuda
@pytest.mark.parametrize("precision", PRECISIONS)
def test_on_cuda_every_mode_gives_the_resident_result_within_the_planned_bytes(load, predict, precision):
    device = torch.device("cuda")
    model = load(precision)
    with BlockStream(model, plans(model)["resident"], device, model.blocks()):
        expected = predict(model, device)  # and the libraries have their workspaces
    for name, plan in plans(model).items():
        for limit in (None, 0):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated(device)
            with BlockStream(model, plan, device, model.blocks(), limit) as stream:
                # The allocator gives out 512 bytes at a time.
                assert torch.cuda.memory_allocated(device) - before <= plan.device_bytes + 512 * len(list(model.parameters())), name
                for _ in range(5):
                    assert torch.equal(predict(model, device), expected), (name, limit)
                assert (stream.pinned_bytes > 0) == (limit is None and bool(plan.streamed))
            assert torch.cuda.memory_allocated(device) == before
            assert all(tensor.device.type == "cpu" for tensor in model.parameters())


@pytest.mark.gpu
@on_cuda
@pytest.mark.parametrize("late", ["copies", "kernels"])
@pytest.mark.parametrize("limit", [None, 0])
def test_on_cuda_events_hold_whichever_stream_is_late(monkeypatch, late, limit):
    """Blocks of 50 MB; one of the two streams sleeps before each of its parts, so that a missing event would show."""
    config = dataclasses.replace(OPEN_SORA_2, hidden_size=1024, num_heads=8, mlp_hidden_size=4096, depth=2, depth_single_blocks=6)
    model, generator = MMDiT(config, dtype=torch.bfloat16), torch.Generator().manual_seed(0)
    for parameter in model.requires_grad_(False).parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator).mul_(0.03))
    device = torch.device("cuda")
    inputs = [torch.randn(shape, generator=generator).to(device, torch.bfloat16) for shape in ((1, 16, 3, 8, 8), (1, 64, 4096), (1, 768))]
    time = torch.tensor([0.5], device=device)
    sleep = lambda *_: torch.cuda._sleep(20_000_000)  # noqa: E731 - about ten milliseconds
    with torch.inference_mode():
        with BlockStream(model, make_residency(module_bytes(model, model.blocks()), RESIDENT), device, model.blocks()):
            expected = model(inputs[0], time, *inputs[1:])
        if late == "copies":
            copy = BlockStream._copy
            monkeypatch.setattr(BlockStream, "_copy", lambda self, index: (sleep(), copy(self, index)))
        else:
            for block in (*model.double_blocks, *model.single_blocks):
                block.register_forward_pre_hook(sleep)
        for plan in (
            make_residency(module_bytes(model, model.blocks()), MINIMAL),
            make_residency(module_bytes(model, model.blocks()), BUDGET, 0.2),
        ):
            with BlockStream(model, plan, device, model.blocks(), limit):
                for _ in range(3):
                    assert torch.equal(model(inputs[0], time, *inputs[1:]), expected)
