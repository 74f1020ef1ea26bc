"""When memory runs out for good: one sentence with the numbers, in Python and on the command line, and nothing finished is lost."""

import gc
import weakref

import pytest
import torch

from opensora_core.cli import main
from opensora_core.commands.options import SOME_FAILED
from opensora_core.encoders.t5 import T5Encoder
from opensora_core.errors import DecodeOutOfMemory, OpenSoraError, OutOfMemory
from opensora_core.memory import component as components, decode as video_vae, device as device_memory
from opensora_core.memory.decode import VideoVAE
from opensora_core.memory.device import free_bytes, is_out_of_memory, ran_out, total_bytes, unless_out_of_memory
from opensora_core.networks.mmdit.model import MMDiT
from opensora_core.pipeline import OpenSoraPipeline
from opensora_core.run import ran_out as capacity, sample as sampling

GIB = 2**30
SMALL = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2, "seed": 3}
HAS = r"this machine has [\d.]+ of [\d.]+ GiB free without it"


@pytest.fixture
def no_room(monkeypatch):
    """Let every forward of the transformer run out of memory, from inside; gives weak references to what it had allocated."""
    tensors = []

    def forward(self, x, timestep, **inputs):
        work = torch.zeros(64)
        tensors.append(weakref.ref(work))
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(MMDiT, "forward", forward)
    return tensors


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.cuda.OutOfMemoryError(), True),
        (MemoryError(), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
        (RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory"), False),
        (KeyboardInterrupt("out of memory"), False),
    ],
)
def test_every_way_in_which_it_is_said(error, is_one):
    assert is_out_of_memory(error) == is_one
    if is_one:
        assert unless_out_of_memory(lambda: (_ for _ in ()).throw(error)) is None
    else:
        with pytest.raises(type(error)):
            unless_out_of_memory(lambda: (_ for _ in ()).throw(error))


def test_the_sentence_has_the_numbers(monkeypatch):
    monkeypatch.setattr(device_memory, "free_bytes", lambda device: int(1.251 * GIB))
    monkeypatch.setattr(device_memory, "total_bytes", lambda device: 8 * GIB)
    monkeypatch.setattr(device_memory, "_name", lambda device: "this machine")
    expected = "Making it ran out of memory; this machine has 1.25 of 8 GiB free without it: make less."
    assert ran_out("Making it", torch.device("cpu"), "make less") == expected
    monkeypatch.setattr(device_memory, "free_bytes", lambda device: None)
    assert ran_out("Making it", torch.device("mps"), "make less") == "Making it ran out of memory: make less."


def test_a_machine_knows_its_memory():
    cpu = torch.device("cpu")
    assert 2**20 < free_bytes(cpu) < total_bytes(cpu)
    assert free_bytes(torch.device("mps")) is total_bytes(torch.device("mps")) is None


@pytest.mark.parametrize(
    ("mode", "tried"),
    [("auto", " with one block of the transformer on the device at a time"), ("minimal", ""), ("resident", ""), (None, "")],
)
def test_sampling_that_fails_for_good_is_one_sentence(tiny_checkpoint, no_room, mode, tried):
    pipe = OpenSoraPipeline.from_pretrained(tiny_checkpoint)
    if mode:
        pipe.enable_offload(mode, device="cpu")
    sentence = (
        rf"Make fewer frames, fewer videos[^:]*: sampling 2 videos of 5 frames of 32x48 \(height x width\){tried} ran out of memory; {HAS}"
    )
    with pytest.raises(OutOfMemory, match=sentence) as failed:
        pipe("a cat", **SMALL, num_videos_per_prompt=2)
    assert isinstance(failed.value, OpenSoraError) and failed.value.latents is None and "\n" not in str(failed.value)
    assert failed.value.__context__ is None  # with it the failed run's tensors would live as long as the error
    assert len(no_room) == 1 + bool(tried) and all(tensor() is None for tensor in no_room)


def test_the_advice_is_what_was_not_tried(tiny_checkpoint, monkeypatch, no_room):
    monkeypatch.setattr(capacity, "ran_out", lambda work, device, advice: advice)
    cuda = components.Placement(torch.device("cuda"))
    for mode, words in (("everything", "--offload auto"), ("resident", "auto instead of resident"), ("minimal", "--attention sliced")):
        cuda.mode = mode
        assert words in capacity.change(cuda)
    pipe = OpenSoraPipeline.from_pretrained(tiny_checkpoint)
    with pytest.raises(OutOfMemory, match="^make fewer frames or a smaller size, compute in bf16"):
        pipe("a cat", **SMALL)


def test_it_goes_on_after_a_failed_run(tiny_checkpoint, monkeypatch):
    pipe = OpenSoraPipeline.from_pretrained(tiny_checkpoint)
    expected = pipe("a cat", **SMALL).latents
    with monkeypatch.context() as patch:
        patch.setattr(MMDiT, "forward", lambda *inputs, **named: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError()))
        with pytest.raises(OutOfMemory):
            pipe("a cat", **SMALL)
    assert torch.equal(pipe("a cat", **SMALL).latents, expected)


def test_text_and_pictures_that_no_room_is_left_for(tiny_checkpoint, monkeypatch):
    def no_room(*inputs, **named):
        raise torch.cuda.OutOfMemoryError

    pipe = OpenSoraPipeline.from_pretrained(tiny_checkpoint)
    with monkeypatch.context() as patch:
        patch.setattr(VideoVAE, "encode", no_room)
        with pytest.raises(
            OutOfMemory, match=rf"Use smaller tiles[^:]*: encoding 1 given frame of 32x48 \(height x width\) ran out of memory; {HAS}"
        ):
            pipe("a cat", **SMALL, image=torch.zeros(32, 48, 3))
    monkeypatch.setattr(T5Encoder, "encode", no_room)
    with pytest.raises(OutOfMemory, match=rf"Use T5 in 8 bits[^:]*: encoding the prompt ran out of memory; {HAS}"):
        pipe("another cat", **SMALL)


def test_a_decode_that_fails_keeps_the_latents_and_not_its_own_tensors(tiny_checkpoint, monkeypatch):
    tensors = []

    def no_room(*inputs, **named):
        work = torch.zeros(8)
        tensors.append(weakref.ref(work))
        raise RuntimeError("MPS backend out of memory")

    pipe = OpenSoraPipeline.from_pretrained(tiny_checkpoint)
    expected = pipe("a cat", **SMALL).latents
    monkeypatch.setattr(video_vae, "tiled_decode", no_room)
    sentence = rf"^Decode the finished latents, which are kept, with .*: decoding 5 frames of 32x48 \(height x width\) with policy auto ran out of memory; {HAS}"
    with pytest.raises(DecodeOutOfMemory, match=sentence) as failed:
        pipe("a cat", **SMALL)
    gc.collect()
    assert len(tensors) == 1 and tensors[0]() is None  # so short and small a clip has nothing to cut
    assert torch.equal(failed.value.latents, expected)


def test_finished_segments_are_in_the_error(tiny_checkpoint, monkeypatch):
    pipe, real, runs = OpenSoraPipeline.from_pretrained(tiny_checkpoint), sampling.sample, []
    first = pipe("a cat", **{**SMALL, "num_frames": 37})
    lengths = []

    def sample(*inputs):
        runs.append(1)
        if len(runs) == 2:
            raise torch.cuda.OutOfMemoryError
        return real(*inputs)

    monkeypatch.setattr(sampling, "sample", sample)
    with pytest.raises(OutOfMemory, match="^Make fewer frames.*: sampling") as failed:
        pipe.extend(
            first, segments=2, num_frames=37, num_inference_steps=1, on_segment=lambda done, latents: lengths.append(latents.shape[2])
        )
    assert failed.value.latents.shape[2] == lengths[0] > first.latents.shape[2]


def test_on_the_command_line(tiny_checkpoint, tmp_path, monkeypatch, capsys, no_room):
    monkeypatch.chdir(tmp_path)
    sizes = ["--width", "48", "--height", "32", "--num-frames", "5", "--num-steps", "1", "--seed", "5", "--device", "cpu"]
    assert main(["generate", "--model", str(tiny_checkpoint), "--prompt", "a cat", *sizes, "--out", "clip.mp4"]) == SOME_FAILED
    told = capsys.readouterr().err
    [line] = [line for line in told.splitlines() if "failed:" in line]
    assert line.startswith("error: video 1 (seed 5) failed: Make fewer frames") and ": sampling 5 frames of 32x48 (height x width)" in line
    assert " GiB free without it" in line and "Traceback" not in told
    assert not (tmp_path / "clip.mp4").exists()


def test_where_a_command_does_not_go_on_it_is_a_failure_and_not_a_refusal(tiny_checkpoint, tmp_path, monkeypatch, capsys, no_room):
    monkeypatch.chdir(tmp_path)
    sizes = ["--width", "48", "--height", "32", "--num-frames", "5", "--num-steps", "1", "--device", "cpu", "--warmup-count", "0"]
    assert main(["benchmark", "--model", str(tiny_checkpoint), *sizes, "--eval-count", "1"]) == SOME_FAILED
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: Make fewer frames")
