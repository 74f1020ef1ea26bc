"""The pipeline from a prompt to frames, on the small random checkpoint: what a person may rely on, and what is refused."""

import shutil
import sys
import threading
from functools import partial
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from opensora_core import pipeline as pipeline_module
from opensora_core.checkpoint.files import read_header
from opensora_core.cli import main
from opensora_core.codecs.hunyuan.config import LATENT_SCALE
from opensora_core.errors import DecodeOutOfMemory, NotNumbers, OpenSoraError, OutOfMemory
from opensora_core.geometry import Tiling
from opensora_core.media.pictures import reference_image
from opensora_core.memory import component as components, decode as video_vae, residency as residency_module
from opensora_core.memory.component import Component, Placement, visiting
from opensora_core.memory.loaded import LoadedModels
from opensora_core.pipeline import OpenSoraPipeline
from opensora_core.run import files as model_files, needs as capacity, parts as networks_module, sample as sampling
from opensora_core.run.request import EncodedPrompt, SamplingOptions, random_seed
from opensora_core.sampling.given import fit_image

SMALL = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 3, "seed": 7}


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint) -> OpenSoraPipeline:
    """One pipeline with everything resident; tests that change its settings make their own."""
    return OpenSoraPipeline.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module")
def cat(pipe) -> EncodedPrompt:
    return pipe.encode_prompt("a cat")


@pytest.fixture(scope="module")
def whole(pipe, cat):
    """The result that others are compared with."""
    return pipe(cat, **SMALL)


@pytest.fixture
def picture() -> torch.Tensor:
    return torch.linspace(0, 1, 80 * 120 * 3).view(80, 120, 3)


def pixels(result, index=0) -> numpy.ndarray:
    return numpy.stack(result.frames[index])


def test_a_prompt_becomes_frames(pipe, whole):
    result = pipe("a cat", **SMALL)
    assert result.prompt.text == "a cat. 24 FPS. 4 motion score."
    assert len(result.frames) == 1 and len(result.frames[0]) == 5
    assert all(frame.shape == (32, 48, 3) and frame.dtype == numpy.uint8 for frame in result.frames[0])
    assert pixels(result).std() > 5  # not a flat grey
    assert result.latents.shape == (1, 16, 2, 4, 6) and result.latents.dtype == torch.float32
    assert (result.forwards, result.forwards_saved, result.seeds) == (6, 3, [7])
    assert set(result.seconds) == {"text", "condition", "sampling", "decode"} and not result.notes
    assert numpy.array_equal(pixels(result), pixels(whole))  # the same seed, and encoding once for several calls


def test_seed_prompt_and_negative_prompt_each_change_the_result(pipe, cat, whole):
    others = (
        pipe(cat, **{**SMALL, "seed": 8}),
        pipe("a dog", **SMALL),
        pipe("a cat", negative_prompt="blurry", **SMALL),
        pipe("a cat", **SMALL, options=SamplingOptions(motion_score=9)),
        pipe(cat, **SMALL, options=SamplingOptions(shift=2.0)),
        pipe(cat, **SMALL, guidance_scale=2.0),
    )
    for other in others:
        assert not torch.equal(other.latents, whole.latents)


def test_without_a_seed_one_is_drawn_and_told_and_global_generators_are_left_alone(pipe, cat):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    settings = {**SMALL, "seed": None, "num_inference_steps": 1}
    first, second = pipe(cat, **settings), pipe(cat, **settings)
    assert first.seeds != second.seeds
    assert torch.equal(torch.get_rng_state(), state)
    again = pipe(cat, **{**settings, "seed": first.seeds[0]})
    assert torch.equal(again.latents, first.latents)


@pytest.mark.parametrize("options", [SamplingOptions(), SamplingOptions(posterior="sample")])
def test_a_batch_item_is_what_its_seed_gives_alone(pipe, cat, picture, options):
    settings = {**SMALL, "image": picture, "options": options}
    both = pipe(cat, **settings, num_videos_per_prompt=2)
    assert both.seeds == [7, 8] and len(both.frames) == 2
    for index, seed in enumerate(both.seeds):
        alone = pipe(cat, **{**settings, "seed": seed})
        # Batched matrix products may round otherwise.
        assert torch.allclose(both.latents[index], alone.latents[0], atol=1e-4)
        assert abs(pixels(both, index).astype(int) - pixels(alone)).max() <= 1
    assert not torch.allclose(both.latents[0], both.latents[1], atol=0.1)


@pytest.mark.parametrize(
    ("given", "restored"), [(("image",), [0]), (("last_image",), [2]), (("image", "last_image"), [0, 2])], ids=lambda value: str(value)
)
def test_reference_frames_are_encoded_fitted_and_restored(pipe, cat, picture, given, restored):
    settings = {**SMALL, "num_frames": 9}
    result = pipe(cat, **settings, **dict.fromkeys(given, picture))
    without = pipe(cat, **settings)
    fitted = fit_image(picture[None], 32, 48)
    with torch.inference_mode():
        latent = pipe.vae.encode(fitted, [None])[0, :, 0]
    for frame in range(3):
        same = torch.allclose(result.latents[0, :, frame], latent, atol=1e-5)
        assert same == (frame in restored)
        assert not torch.allclose(result.latents[0, :, frame], without.latents[0, :, frame], atol=1e-3)
    assert latent.abs().mean() > 0.01 and result.forwards == 9  # three passes, no step with both scales 1


def test_a_picture_may_be_a_path_a_pil_image_an_array_or_a_tensor(tmp_path, picture):
    array = (picture.numpy() * 255).round().astype(numpy.uint8)
    Image.fromarray(array).save(tmp_path / "picture.png")
    kinds = (tmp_path / "picture.png", str(tmp_path / "picture.png"), Image.fromarray(array), array, torch.from_numpy(array), array / 255.0)
    for image in kinds:
        assert torch.equal(reference_image("image", image), torch.from_numpy(array)[None].float() / 255)
    assert reference_image("image", None) is None


OFFLOADS = {"auto": {}, "resident": {}, "budget": {"budget_gib": 0.003}, "minimal": {}}


@pytest.mark.parametrize("mode", OFFLOADS)
def test_offloading_computes_the_same_numbers(tiny_checkpoint, whole, mode):
    pipe = OpenSoraPipeline.from_pretrained(tiny_checkpoint).enable_offload(mode, device="cpu", **OFFLOADS[mode])
    assert pipe.offload == mode
    for _ in range(2):  # and again, with what was put back
        result = pipe("a cat", **SMALL)
        assert torch.equal(result.latents, whole.latents) and numpy.array_equal(pixels(result), pixels(whole))


def test_the_names_people_know_are_offload_modes(tiny_checkpoint):
    pipe = OpenSoraPipeline.from_pretrained(tiny_checkpoint)
    assert pipe.offload == "everything"
    assert pipe.enable_model_cpu_offload("cpu").offload == "auto"
    assert pipe.enable_sequential_cpu_offload("cpu").offload == "minimal"


@pytest.mark.parametrize("mode", ["everything", *OFFLOADS])
def test_only_what_is_meant_to_stays_on_the_device_when_its_work_is_done(tiny_checkpoint, mode):
    """The meta device stands in for a card. T5, CLIP and VAE leave it before the transformer samples, in every mode of enable_offload."""
    pipe = OpenSoraPipeline.from_pretrained(tiny_checkpoint)
    meta = torch.device("meta")
    networks = pipe._networks
    place = networks.placement
    place.device, place.mode, place.budget_gib = meta, mode, OFFLOADS.get(mode, {}).get("budget_gib")
    left = {}
    for name in ("t5", "clip", "vae", "transformer"):
        component = getattr(networks, name)
        with component.at_work() as network:
            module = components._module(network)
            assert any(tensor.device == meta for tensor in module.parameters()), f"{name} never came to the device"
        if not (mode == "minimal" and name in ("clip", "vae")):  # accelerate keeps what it brings in layer by layer as meta tensors
            left[name] = {tensor.device.type for tensor in module.parameters()}
    stays = {"everything": set(left), "resident": {"transformer"}}.get(mode, set())
    assert left == {name: {"meta" if name in stays else "cpu"} for name in left}


@pytest.mark.parametrize("precision", ["bf16", "fp8_e4m3fn", "int8", "nf4"])
def test_a_streamed_pipeline_gives_the_resident_video_in_every_precision(tiny_checkpoint, precision):
    if precision in ("int8", "nf4"):
        pytest.importorskip("bitsandbytes")
    make = lambda: OpenSoraPipeline.from_pretrained(tiny_checkpoint, precision=precision)  # noqa: E731
    expected = make()("a cat", **SMALL)
    for mode, budget in (("budget", 0.0019), ("minimal", None)):
        result = make().enable_offload(mode, budget, "cpu")("a cat", **SMALL)
        assert torch.equal(result.latents, expected.latents) and numpy.array_equal(pixels(result), pixels(expected))


class Ahead:
    """A device with room: what the VAE does while the transformer computes. `at`: how many steps were done when its file was read, or it was moved."""

    def __init__(self, pipe, monkeypatch, room=2**40):
        self.vae, self.steps, self.at, self.fails = pipe._networks.vae, 0, [], 0
        read, visit, main = self.vae._read, components.visiting, threading.current_thread()

        def watched_read(dtype, device):
            self.at.append(("read", self.steps, threading.current_thread() is main))
            return read(dtype, device)

        def watched_visit(module, device):
            if module is self.vae._network or threading.current_thread() is not main:
                self.at.append(("moved", self.steps, threading.current_thread() is main))
                if self.fails:
                    self.fails -= 1
                    raise torch.cuda.OutOfMemoryError("out of memory")
            return visit(module, device)

        self.vae._read = watched_read
        monkeypatch.setattr(components, "visiting", watched_visit)
        monkeypatch.setattr(components, "untaken_bytes", lambda device: room)

    def callback(self, step, *rest):
        self.steps = step


@pytest.mark.parametrize("mode", ["everything", "resident", "auto"])
def test_the_vae_comes_to_the_device_while_the_last_step_computes(tiny_checkpoint, whole, monkeypatch, mode):
    pipe = OpenSoraPipeline.from_pretrained(tiny_checkpoint)
    if mode != "everything":
        pipe.enable_offload(mode, None, "cpu")
    ahead = Ahead(pipe, monkeypatch)
    result = pipe("a cat", callback=ahead.callback, **SMALL)
    assert torch.equal(result.latents, whole.latents) and numpy.array_equal(pixels(result), pixels(whole))
    assert ahead.at[0] == ("read", 2, False)  # after two of three steps, on a thread of its own
    assert ahead.at[1:] == ([] if mode == "everything" else [("moved", 2, False), ("moved", 3, True)])
    ahead.at.clear()
    pipe("a cat", callback=ahead.callback, latents_only=True, **SMALL)
    assert ahead.at == []  # nothing is decoded


@pytest.mark.parametrize(("mode", "budget", "room"), [("budget", 1.0, 2**40), ("minimal", None, 2**40), ("auto", None, 100)])
def test_the_vae_waits_where_the_device_is_limited_or_full(tiny_checkpoint, whole, monkeypatch, mode, budget, room):
    pipe = OpenSoraPipeline.from_pretrained(tiny_checkpoint).enable_offload(mode, budget, "cpu")
    ahead = Ahead(pipe, monkeypatch, room)
    result = pipe("a cat", callback=ahead.callback, **SMALL)
    assert torch.equal(result.latents, whole.latents) and numpy.array_equal(pixels(result), pixels(whole))
    assert ahead.at[0] == ("read", 3, True)


def test_a_vae_that_finds_no_room_ahead_comes_after_the_transformer(tiny_checkpoint, whole, monkeypatch):
    pipe = OpenSoraPipeline.from_pretrained(tiny_checkpoint).enable_offload("auto", None, "cpu")
    ahead = Ahead(pipe, monkeypatch)
    ahead.fails = 1
    result = pipe("a cat", callback=ahead.callback, **SMALL)
    assert numpy.array_equal(pixels(result), pixels(whole))
    assert ahead.at == [("read", 2, False), ("moved", 2, False), ("read", 3, True), ("moved", 3, True)]


def test_a_run_that_stops_in_its_last_step_calls_the_vae_back(tiny_checkpoint, whole, monkeypatch):
    pipe = OpenSoraPipeline.from_pretrained(tiny_checkpoint).enable_offload("auto", None, "cpu")
    pipe("a cat", **SMALL)
    ahead = Ahead(pipe, monkeypatch)
    home = list(ahead.vae._network.parameters())

    def stop(step, *rest):
        if ahead.callback(step) or step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe("a cat", callback=stop, **SMALL)
    assert ahead.vae._ahead is None
    assert all(one is other for one, other in zip(ahead.vae._network.parameters(), home, strict=True))
    assert numpy.array_equal(pixels(pipe("a cat", callback=ahead.callback, **SMALL)), pixels(whole))
    ahead.vae.set_out(0)
    pipe._networks.release()
    assert ahead.vae._network is None and ahead.vae._ahead is None


def streams_of(pipe, monkeypatch, **settings):
    """The plans that a run of a pipeline streams by, in order, and its result."""
    plans, begin = [], components.BlockStream.__init__
    monkeypatch.setattr(
        components.BlockStream, "__init__", lambda self, model, plan, *rest: plans.append(plan) or begin(self, model, plan, *rest)
    )
    return pipe("a cat", **{**SMALL, **settings}), plans


def test_transformer_and_t5_stream_and_a_budget_too_small_for_t5_alone_does_not_stop_it(tiny_checkpoint, monkeypatch):
    pipe = OpenSoraPipeline.from_pretrained(tiny_checkpoint).enable_offload("budget", 0.003, "cpu")
    with pipe._networks.t5.at_work() as t5:
        least = residency_module.least_bytes(components.module_bytes(t5.model, t5.blocks()), "budget") / 2**30
    _, plans = streams_of(pipe, monkeypatch)
    assert [plan.mode for plan in plans] == ["budget" if least <= 0.003 else "minimal", "budget"]
    assert plans[1].device_bytes <= 0.003 * 2**30


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("some",), "Use one of auto, resident, budget, minimal.*'some' is not known"),
        (("budget",), r"Give at least 0\.00\d+ GiB: the offload mode budget needs a budget"),
        (("budget", 0), "0 GiB is not an amount"),
        (("budget", float("nan")), "nan GiB is not an amount"),
        (("budget", 0.001), r"Give at least 0\.00\d+ GiB, or use minimal, which needs .*too small"),
        (("minimal", 3), "goes with the offload mode budget, and minimal takes none"),
    ],
)
def test_an_offload_that_cannot_be_is_refused_before_any_weight_is_read(tiny_checkpoint, monkeypatch, arguments, says):
    pipe = OpenSoraPipeline.from_pretrained(tiny_checkpoint)
    monkeypatch.setattr(networks_module, "load_transformer", None)
    with pytest.raises(OpenSoraError, match=says):
        pipe.enable_offload(*arguments, device="cpu")
    assert pipe.offload == "everything"


def test_what_a_card_has_decides(tiny_checkpoint, monkeypatch):
    """resident and budgets are refused by what the card has; auto streams as little as it must."""
    pipe = OpenSoraPipeline.from_pretrained(tiny_checkpoint)
    monkeypatch.setattr(pipeline_module, "weight_capacity", lambda placement: 3_000_000)
    with pytest.raises(OpenSoraError, match="Use minimal.*resident needs 0.00441 GiB"):
        pipe.enable_offload("resident", device="cpu")
    with pytest.raises(OpenSoraError, match="Use minimal"):
        pipe.enable_offload("budget", 0.004, "cpu")
    sizes = capacity.transformer_bytes(pipe.files, pipe._networks.placement, None)
    within = partial(residency_module.residency_in_mode, sizes, "auto", None, is_main=True)
    assert within(room=None).mode == within(room=sizes.total).mode == "resident"
    for room in (sizes.total - 1, 4_000_000, 3_200_000):
        plan = within(room=room)
        assert plan.mode == "budget" and plan.device_bytes <= room
    assert within(room=1_000_000).mode == within(room=-5).mode == "minimal"


@pytest.mark.parametrize("room", [3_500_000, 1_000_000])
def test_auto_streams_what_does_not_fit_beside_the_computation(tiny_checkpoint, whole, monkeypatch, caplog, room):
    """As on a card with little memory: what is free is asked for, and what the computation needs is counted."""
    pipe = OpenSoraPipeline.from_pretrained(tiny_checkpoint).enable_offload("auto", device="cpu")
    beside = []
    monkeypatch.setattr(capacity, "_decides", lambda placement: True)
    at_work = Component.at_work

    def small_card(self, beside_bytes=0, is_last_try=False):
        beside.append(beside_bytes)
        monkeypatch.setattr(components, "residency_in_mode", lambda sizes, mode, gib, _, is_main: real(sizes, mode, gib, room, is_main))
        return at_work(self, beside_bytes, is_last_try)

    real = residency_module.residency_in_mode
    monkeypatch.setattr(Component, "at_work", small_card)
    result, plans = streams_of(pipe, monkeypatch)
    assert torch.equal(result.latents, whole.latents)
    assert plans[-1].mode == ("budget" if room > 3_000_000 else "minimal") and "Not all weights fit" in caplog.text
    t5, clip, transformer, vae = beside
    assert t5 > 0 and transformer > 0 and clip == vae == 0


@pytest.mark.parametrize("mode", ["auto", "budget"])
def test_sampling_that_runs_out_of_memory_begins_again_in_the_least_memory(tiny_checkpoint, whole, monkeypatch, mode):
    real, calls = sampling.sample, []

    def sample(*arguments):
        calls.append(1)
        if len(calls) == 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return real(*arguments)

    monkeypatch.setattr(sampling, "sample", sample)
    pipe = OpenSoraPipeline.from_pretrained(tiny_checkpoint).enable_offload(mode, device="cpu", **OFFLOADS[mode])
    result, plans = streams_of(pipe, monkeypatch)
    assert torch.equal(result.latents, whole.latents) and plans[-1].mode == "minimal" and len(calls) == 2
    assert [note for note in result.notes if "begins again with one block" in note]

    calls.clear()
    resident = OpenSoraPipeline.from_pretrained(tiny_checkpoint)
    with pytest.raises(OutOfMemory):
        resident("a cat", **SMALL)


def test_a_visiting_module_gets_its_own_tensors_back_even_after_a_failure():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    module.tied = module[0]
    before = {name: tensor for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    with pytest.raises(KeyboardInterrupt), visiting(module, torch.device("meta")):
        assert all(tensor.device.type == "meta" for tensor in (*module.parameters(), *module.buffers()))
        assert module.tied.weight is module[0].weight
        raise KeyboardInterrupt
    assert all(tensor is before[name] for name, tensor in (*module.named_parameters(), *module.named_buffers()))


@pytest.mark.parametrize(("mode", "reads"), [("everything", (1, 1)), ("auto", (1, 2)), ("resident", (1, 2))])
def test_text_encoders_are_given_up_after_their_work_unless_all_is_resident(mode, reads):
    counted = [0, 0]

    def reader(index):
        def read(dtype, device):
            counted[index] += 1
            return torch.nn.Linear(1, 1, dtype=dtype, device=device)

        return read

    placement = Placement(torch.device("cpu"), mode=mode)
    kept, passing = Component(reader(0), placement), Component(reader(1), placement, is_kept=False)
    assert counted == [0, 0]
    for _ in range(2):
        for component in (kept, passing):
            with component.at_work() as module:
                assert module.weight.dtype == torch.float32
    assert tuple(counted) == reads


def test_sequential_offload_says_what_is_missing_without_accelerate(tiny_checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    pipe = OpenSoraPipeline.from_pretrained(tiny_checkpoint).enable_sequential_cpu_offload("cpu")
    with pytest.raises(OpenSoraError, match="pip install accelerate"):
        pipe("a cat", **SMALL)


def test_attention_slicing_gives_the_same_video(tiny_checkpoint, cat, whole):
    pipe = OpenSoraPipeline.from_pretrained(tiny_checkpoint)
    pipe.enable_attention_slicing(2)  # of three heads
    assert torch.allclose(pipe(cat, **SMALL).latents, whole.latents, atol=1e-5)
    with pytest.raises(OpenSoraError, match="slice_size"):
        pipe.enable_attention_slicing(0)


def test_bf16_networks_keep_fp32_latents(tiny_checkpoint, whole):
    pipe = OpenSoraPipeline.from_pretrained(tiny_checkpoint, torch_dtype=torch.bfloat16)
    result = pipe("a cat", **SMALL)
    assert pipe.dtype == torch.bfloat16 and result.latents.dtype == torch.float32
    assert not torch.equal(result.latents, result.latents.bfloat16().float())
    assert (result.latents - whole.latents).abs().mean() < 0.1 * whole.latents.abs().mean()
    noise = pipe("a cat", **SMALL, options=SamplingOptions(latent_dtype="bf16")).latents
    assert torch.equal(noise, noise.bfloat16().float())


def test_tiling_is_chosen_on_the_vae(tiny_checkpoint, pipe, cat):
    settings = {**SMALL, "height": 128, "width": 160, "num_frames": 1, "num_inference_steps": 1}
    untiled = pipe(cat, **settings)
    tiled = OpenSoraPipeline.from_pretrained(tiny_checkpoint)
    tiled.vae.enable_tiling(tile_size=96, tile_overlap=0.25)
    seen = []
    result = tiled(cat, **settings, progress=lambda *report: seen.append(report))
    assert torch.equal(result.latents, untiled.latents) and not numpy.array_equal(pixels(result), pixels(untiled))
    decode = [(done, total) for stage, done, total in seen if stage == "decode"]
    assert decode[0][0] == 0 and decode[-1] == (6, 6)
    with pytest.raises(OpenSoraError, match="tile_size"):
        tiled.vae.enable_tiling(tile_size=100)
    with pytest.raises(OpenSoraError, match="exact"):
        tiled.vae.policy = "fast"


def test_a_decode_that_memory_changes_is_told_in_one_line(tiny_checkpoint, cat, monkeypatch, caplog):
    monkeypatch.setattr(video_vae, "free_bytes", lambda device: 0)
    pipe = OpenSoraPipeline.from_pretrained(tiny_checkpoint)
    result = pipe(cat, **{**SMALL, "num_inference_steps": 1, "num_frames": 69, "height": 32, "width": 32})
    assert len(result.notes) == 1 and "temporal tiles" in result.notes[0] and result.notes[0] in caplog.text
    assert len(result.frames[0]) == 69
    pipe.vae.policy = "exact"
    assert pipe(cat, **{**SMALL, "num_inference_steps": 1}).notes == []


def test_a_decode_that_runs_out_of_memory_is_tried_once_more_in_temporal_tiles(tiny_checkpoint, cat, monkeypatch):
    real, calls = video_vae.tiled_decode, []

    def no_room_for_whole_clips(decode, latents, tiling, progress, grid):
        calls.append(tiling)
        if tiling.temporal_tile == 0:
            raise torch.cuda.OutOfMemoryError
        return real(decode, latents, tiling, progress, grid=grid)

    monkeypatch.setattr(video_vae, "tiled_decode", no_room_for_whole_clips)
    pipe = OpenSoraPipeline.from_pretrained(tiny_checkpoint)
    settings = {**SMALL, "num_inference_steps": 1, "num_frames": 69, "height": 32, "width": 32}
    result = pipe(cat, **settings, num_videos_per_prompt=2)
    assert [tiling.temporal_tile for tiling in calls] == [0, 64, 64] and len(result.notes) == 1
    pipe.vae.policy = "exact"
    with pytest.raises(DecodeOutOfMemory, match="finished latents, which are kept.*69 frames of 32x32.*exact") as failed:
        pipe(cat, **settings)
    pipe.vae.policy = "low_memory"
    frames = pipe.decode(failed.value.latents)
    torch.testing.assert_close(failed.value.latents, result.latents[:1], rtol=1e-4, atol=1e-4)  # alone and in a batch
    assert all(abs(a.astype(int) - b).max() <= 1 for a, b in zip(frames[0], result.frames[0], strict=True))


@pytest.mark.parametrize("policy", ["auto", "exact"])
def test_a_decode_that_runs_out_of_memory_is_first_parked_in_main_memory(tiny_checkpoint, cat, monkeypatch, policy):
    settings = {**SMALL, "num_inference_steps": 1}
    pipe = OpenSoraPipeline.from_pretrained(tiny_checkpoint)
    expected = pixels(pipe(cat, **settings))
    real, calls = video_vae.tiled_decode, []

    def no_room_on_the_device(decode, latents, tiling, progress, grid):
        calls.append(tiling.parked)
        if not tiling.parked:
            raise torch.cuda.OutOfMemoryError
        return real(decode, latents, tiling, progress, grid=grid)

    monkeypatch.setattr(video_vae, "tiled_decode", no_room_on_the_device)
    monkeypatch.setattr(video_vae, "_ram_for_parking", lambda placement: 2**40)
    pipe.vae.policy = policy
    result = pipe(cat, **settings)
    assert calls == [False, True] and numpy.array_equal(pixels(result), expected)
    assert len(result.notes) == 1 and "decoded exactly, with activations in main memory: slower" in result.notes[0]


@pytest.mark.parametrize(("ram", "ways"), [(0, [False]), (2**40, [False, True])])
def test_a_short_clip_that_nothing_helps_is_given_up(tiny_checkpoint, cat, monkeypatch, ram, ways):
    """It has nothing to cut: each way is tried once."""
    calls = []

    def no_room(decode, latents, tiling, progress, grid):
        calls.append(tiling.parked)
        assert len(calls) < 9, "tried for ever"
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(video_vae, "tiled_decode", no_room)
    monkeypatch.setattr(video_vae, "_ram_for_parking", lambda placement: ram)
    with pytest.raises(DecodeOutOfMemory, match="finished latents, which are kept"):
        OpenSoraPipeline.from_pretrained(tiny_checkpoint)(cat, **{**SMALL, "num_inference_steps": 1})
    assert calls == ways


def test_callback_hears_every_step_and_can_stop_the_run(pipe, cat):
    heard = []
    pipe(cat, **SMALL, callback=lambda *report: heard.append(report))
    assert [report[:4] for report in heard] == [(1, 3, 2, 1), (2, 3, 4, 2), (3, 3, 6, 3)]
    assert heard[-1][4].shape == (1, 16, 2, 4, 6)

    def stop(*report):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe(cat, **SMALL, callback=stop)


def test_a_lora_changes_the_result_by_its_strength(tiny_checkpoint, cat, whole, tmp_path):
    width = 96
    down, up = torch.randn(2, 4, width).mul(0.2).unbind()
    layer = "base_model.model.double_blocks.0.img_attn.proj"
    save_file({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up.T.contiguous()}, tmp_path / "lora.safetensors")
    none, full = (OpenSoraPipeline.from_pretrained(tiny_checkpoint).load_lora(tmp_path / "lora.safetensors", s) for s in (0.0, 1.0))
    assert torch.equal(none(cat, **SMALL).latents, whole.latents)
    assert not torch.allclose(full(cat, **SMALL).latents, whole.latents, atol=1e-4)
    with pytest.raises(OpenSoraError, match="finite"):
        full.load_lora(tmp_path / "lora.safetensors", float("nan"))


def test_a_lora_of_another_model_is_refused_before_any_weight_is_read(tiny_checkpoint, tmp_path, no_weights):
    layer = "base_model.model.double_blocks.0.img_attn.proj"
    save_file({f"{layer}.lora_A.weight": torch.ones(4, 8), f"{layer}.lora_B.weight": torch.ones(8, 4)}, tmp_path / "lora.safetensors")
    pipe = OpenSoraPipeline.from_pretrained(tiny_checkpoint)
    for path, says in (
        (tmp_path / "lora.safetensors", "another model"),
        (pipe.files.vae, "Give a LoRA: "),
        (tmp_path / "none", "not exist"),
    ):
        with pytest.raises(OpenSoraError, match=says):
            pipe.load_lora(path)


@pytest.fixture
def no_weights(monkeypatch):
    """Fails the test if any network is read."""

    def read(*args, **kwargs):
        raise AssertionError("a network was read before the request was refused")

    for name in ("load_transformer", "load_vae", "load_t5", "load_clip"):
        monkeypatch.setattr(networks_module, name, read)


PICTURE = torch.zeros(64, 96, 3)
REFUSED = [
    ({"num_frames": 6}, "Use 5 or 9"),
    ({"num_frames": 0}, "not a clip"),
    ({"num_frames": 5.0}, "whole number"),
    ({"height": 60}, "Use 64x48"),
    ({"width": 0}, "multiples of 16"),
    ({"num_inference_steps": 0}, "at least 1"),
    ({"guidance_scale": float("nan")}, "finite"),
    ({"image_guidance_scale": float("inf")}, "finite"),
    ({"seed": -1}, "out of range"),
    ({"seed": 2**64}, "out of range"),
    ({"seed": 2**64 - 1, "num_videos_per_prompt": 2}, "out of range"),
    ({"num_videos_per_prompt": 0}, "at least 1"),
    ({"negative_prompt": None}, "one text"),
    ({"callback": 3}, "Give a function, or None: callback is of the type int"),
    ({"progress": "bar"}, "progress is of the type str"),
    ({"image": torch.zeros(2, 64, 96, 3)}, r"\[2, 64, 96, 3\]"),
    ({"image": torch.zeros(96, 3)}, r"\[1, 96, 3\]|\[96, 3\]"),
    ({"last_image": PICTURE[..., :2]}, "last_image"),
    ({"image": PICTURE + 2}, "0 to 1"),
    ({"image": PICTURE * torch.nan}, "0 to 1"),
    ({"image": "missing.png"}, "does not exist"),
    ({"image": 3}, "int"),
    ({"image": PICTURE, "num_frames": 1}, "at least"),
    ({"image": PICTURE, "last_image": PICTURE, "num_frames": 5}, "at least 9 frames"),
]


@pytest.mark.parametrize(("change", "says"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_met_is_refused_in_a_sentence_and_no_checkpoint_is_opened(tiny_checkpoint, no_weights, monkeypatch, change, says):
    pipe, real = OpenSoraPipeline.from_pretrained(tiny_checkpoint), model_files.open_model

    def opened(path, *args):
        if Path(path) == pipe.files.dit:  # its header says how the model counts frames and pixels
            return real(path, *args)
        raise AssertionError("a checkpoint was opened before the request was refused")

    for name in ("open_model", "read_network", "open_t5", "open_clip"):
        monkeypatch.setattr(model_files, name, opened)
    with pytest.raises(OpenSoraError, match=says) as caught:
        pipe("a cat", **{**SMALL, **change})
    assert "\n" not in str(caught.value)


def test_prompts_encoded_together_are_those_encoded_alone_and_each_encoder_is_read_once(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(networks_module, "SHARED", LoadedModels())  # what other tests hold would not be read
    read = []
    for name in ("load_t5", "load_clip"):
        real = getattr(networks_module, name)
        monkeypatch.setattr(networks_module, name, lambda *args, real=real, name=name, **more: read.append(name) or real(*args, **more))
    pipe = OpenSoraPipeline.from_pretrained(tiny_checkpoint).enable_offload("auto", device="cpu")
    wanted = [("a cat", "", SamplingOptions()), ("a dog", "blurry", SamplingOptions(motion_score=9))]
    together = pipe.encode_prompts(wanted)
    assert read == ["load_t5", "load_clip"]
    for encoded, arguments in zip(together, wanted, strict=True):
        alone = pipe.encode_prompt(*arguments)
        assert encoded.text == alone.text
        for side, parts in vars(encoded.condition).items():
            assert all(torch.equal(part, vars(alone.condition)[side][name]) for name, part in parts.items())
    assert not torch.equal(*(encoded.condition.positive["context"] for encoded in together))


def test_a_request_can_be_checked_without_being_met(tiny_checkpoint, no_weights):
    pipe = OpenSoraPipeline.from_pretrained(tiny_checkpoint)
    result = pipe("a cat", **SMALL, check_only=True)
    assert result.seeds == [7] and not result.frames and result.latents is None
    with pytest.raises(OpenSoraError, match="Use 5 or 9"):
        pipe("a cat", **{**SMALL, "num_frames": 6}, check_only=True)


@pytest.mark.parametrize("prompt", [None, ["a cat"], 3])
def test_a_prompt_is_one_text(pipe, prompt):
    with pytest.raises(OpenSoraError, match="one text"):
        pipe(prompt, **SMALL)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"fps": 500}, "fps"), ({"motion_score": 101}, "motion_score"), ({"fit": "zoom"}, "crop, pad, stretch"), ({"shift": -1.0}, "shift"),
        ({"shift": 10**30}, "out of range"),
        ({"posterior": "mean"}, "mode, sample"), ({"noise_device": "tpu"}, "cpu, gpu"), ({"latent_dtype": "fp8"}, "fp32, bf16"),
    ],
)  # fmt: skip
def test_options_are_checked_when_they_are_made(options, says):
    with pytest.raises(OpenSoraError, match=says):
        SamplingOptions(**options)


def copy_with(tiny_checkpoint, folder, part, change):
    """A copy of the checkpoint in which the tensors of one file are changed."""
    shutil.copytree(tiny_checkpoint, folder)
    save_file({name: change(name, tensor).contiguous() for name, tensor in load_file(folder / part).items()}, folder / part)
    return folder


def test_parts_that_do_not_belong_together_are_refused_by_their_headers(tiny_checkpoint, tmp_path, no_weights):
    def wrong(part, other):
        files = {**vars(OpenSoraPipeline.from_pretrained(tiny_checkpoint).files), part: other}
        return OpenSoraPipeline.from_files(**files)

    files = OpenSoraPipeline.from_pretrained(tiny_checkpoint).files
    for part, other, says in (
        ("dit", files.vae, "HunyuanVideo-layout VAE"),
        ("vae", files.dit, "Open-Sora 2.0 transformer"),
        ("t5", files.clip, "CLIP"),
        ("clip", files.t5, "T5"),
    ):
        with pytest.raises(OpenSoraError, match=says):
            wrong(part, other)("a cat", **SMALL)

    def narrow(name, tensor):  # a VAE of eight latent channels
        if name.startswith(("post_quant_conv", "quant_conv", "encoder.conv_out")):
            tensor = tensor[: len(tensor) // 2]
        return tensor[:, : 8 if name == "post_quant_conv.weight" else None] if tensor.ndim > 1 else tensor

    folder = copy_with(tiny_checkpoint, tmp_path / "narrow", "hunyuan_vae.safetensors", narrow)
    with pytest.raises(OpenSoraError, match="8 latent channels .* works on 16"):
        OpenSoraPipeline.from_pretrained(folder)("a cat", **SMALL)


def test_text_encoders_of_another_width_are_refused(tiny_checkpoint, tmp_path, no_weights):
    def wider(name, tensor):
        return torch.cat((tensor, tensor), dim=1) if name in ("txt_in.weight", "vector_in.in_layer.weight") else tensor

    folder = copy_with(tiny_checkpoint, tmp_path / "wide", "Open_Sora_v2.safetensors", wider)
    with pytest.raises(OpenSoraError, match="T5 .* gives 64 features .* reads 128"):
        OpenSoraPipeline.from_pretrained(folder)("a cat", **SMALL)


def test_values_that_are_not_numbers_end_in_a_sentence_not_in_a_black_video(tiny_checkpoint, tmp_path):
    def poisoned(name, tensor):
        return tensor * torch.nan if name == "img_in.bias" else tensor

    folder = copy_with(tiny_checkpoint, tmp_path / "nan", "Open_Sora_v2.safetensors", poisoned)
    with pytest.raises(OpenSoraError, match="not numbers"):
        OpenSoraPipeline.from_pretrained(folder)("a cat", **SMALL)


def test_latents_of_a_vae_that_is_no_good_are_not_lost(tiny_checkpoint, tmp_path, capsys):
    def poisoned(name, tensor):
        return tensor * torch.nan if name == "decoder.conv_out.conv.bias" else tensor

    folder = copy_with(tiny_checkpoint, tmp_path / "nan", "hunyuan_vae.safetensors", poisoned)
    with pytest.raises(
        NotNumbers, match="^Suspect a damaged VAE file.*Decoding gave values that are not numbers.*latents are kept"
    ) as failed:
        OpenSoraPipeline.from_pretrained(folder)("a cat", **SMALL)
    good = OpenSoraPipeline.from_pretrained(tiny_checkpoint)
    assert len(good.decode(failed.value.latents)[0]) == SMALL["num_frames"]
    size = [word for name in ("height", "width", "num_frames") for word in (f"--{name.replace('_', '-')}", str(SMALL[name]))]
    out = tmp_path / "clip.mp4"
    assert main(["generate", "--model", str(folder), "--prompt", "a", *size, "--num-steps", "1", "--out", str(out)]) == 1
    assert f"`generate --decode {out.with_suffix('.latent')}` makes the video" in capsys.readouterr().err and not out.exists()
    assert (
        main(["generate", "--model", str(tiny_checkpoint), "--decode", str(out.with_suffix(".latent")), "--out", str(tmp_path / "b.mp4")])
        == 0
    )


def test_frames_that_are_all_black_are_said(tiny_checkpoint, tmp_path, caplog):
    def black(name, tensor):
        return torch.full_like(tensor, -2 * name.endswith("bias")) if name.startswith("decoder.conv_out.") else tensor

    folder = copy_with(tiny_checkpoint, tmp_path / "black", "hunyuan_vae.safetensors", black)
    result = OpenSoraPipeline.from_pretrained(folder)("a cat", **SMALL)
    line = f"All {SMALL['num_frames']} frames are black: look at the latents"
    assert any(note.startswith(line) for note in result.notes) and line in caplog.text


def test_folders_and_settings_that_cannot_be_are_refused(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(model_files, "SMALL", tmp_path / "absent")
    with pytest.raises(OpenSoraError, match="not part of this copy"):
        OpenSoraPipeline.from_pretrained("small")
    with pytest.raises(OpenSoraError, match="not a folder"):
        OpenSoraPipeline.from_pretrained(tmp_path / "absent")
    with pytest.raises(OpenSoraError, match="all four parts"):
        OpenSoraPipeline.from_pretrained(tiny_checkpoint / "Open_Sora_v2.safetensors")
    (tmp_path / "half").mkdir()
    shutil.copy(tiny_checkpoint / "hunyuan_vae.safetensors", tmp_path / "half")
    with pytest.raises(OpenSoraError, match="lacks Open_Sora_v2.safetensors, google"):
        OpenSoraPipeline.from_pretrained(tmp_path / "half")
    with pytest.raises(OpenSoraError, match="precision"):
        OpenSoraPipeline.from_pretrained(tiny_checkpoint, precision="fp4")
    with pytest.raises(OpenSoraError, match="contradict"):
        OpenSoraPipeline.from_pretrained(tiny_checkpoint, torch_dtype=torch.float32, precision="bf16")
    with pytest.raises(OpenSoraError, match="dtype"):
        OpenSoraPipeline.from_pretrained(tiny_checkpoint, torch_dtype=torch.int8)
    for device in ("meta", "nonsense", "cuda:99"):
        with pytest.raises(OpenSoraError, match="device"):
            OpenSoraPipeline.from_pretrained(tiny_checkpoint).to(device)


def test_small_is_read_from_the_package_once_it_is_there(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(model_files, "SMALL", tiny_checkpoint)
    assert OpenSoraPipeline.from_pretrained("small").files.vae == tiny_checkpoint / "hunyuan_vae.safetensors"


def test_what_the_device_decides():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert (Placement(cuda).dtype, Placement(cpu).dtype) == (torch.bfloat16, torch.float32)
    assert Placement(cpu, torch.bfloat16).dtype == torch.bfloat16
    assert components.resolve_device("cpu") == cpu
    assert components.free_bytes(cpu) is None or components.free_bytes(cpu) > 2**20


def test_latents_without_frames_are_those_that_a_decode_shows(pipe, cat, whole):
    bare = pipe(cat, **SMALL, latents_only=True)
    assert bare.frames == [] and "decode" not in bare.seconds and torch.equal(bare.latents, whole.latents)
    assert numpy.array_equal(numpy.stack(pipe.decode(bare.latents)[0]), pixels(whole))


def test_the_latents_of_a_result_are_in_the_transformer_scale(pipe, whole):
    with torch.inference_mode():
        with pipe._networks.vae.at_work() as vae:
            frames = vae.decode(whole.latents / LATENT_SCALE)
    shown = ((frames[0].permute(1, 2, 3, 0) + 1) / 2).clamp(0, 1).mul(255).round().to(torch.uint8).numpy()
    assert numpy.array_equal(shown, pixels(whole))


def test_the_defaults_of_tiling_are_the_reference_s(pipe):
    assert pipe.vae.tiling == Tiling(256, 0.25, 0) and pipe.vae.policy == "auto"
    assert 0 <= random_seed() < 2**32
    assert read_header(pipe.files.vae).num_parameters > 0
