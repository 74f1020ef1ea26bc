"""Going on from a finished video: what a segment is given, that no frame repeats or is missing, and where finished work stays."""

import pytest
import torch
from safetensors.torch import save_file

from opensora_core.encoders.t5 import T5Encoder
from opensora_core.errors import DecodeOutOfMemory, OpenSoraError
from opensora_core.geometry import CAUSAL
from opensora_core.geometry.open_sora_1 import PIECES, SHARED_PIECES
from opensora_core.media import latent_file
from opensora_core.run import segments as long_video
from opensora_core.run.segments import decode_windows, join, windows
from opensora_core.sampling.longer import Continuation, LongRule


@pytest.mark.parametrize(
    ("length", "num_frames", "context_frames", "expected"),
    [
        (33, None, None, Continuation(33, 9)),  # 129 frames, 33 given: the reference's rule for video to video
        (5, None, None, Continuation(5, 2)),  # 17 frames, as small models make them
        (3, None, None, Continuation(3, 2)),
        (2, None, None, Continuation(2, 1)),
        (57, None, None, Continuation(33, 9)),  # gone on from before: a segment is never longer than the model was trained on
        (33, 65, None, Continuation(17, 5)),
        (33, 129, 65, Continuation(33, 17)),
        (5, 129, None, Continuation(33, 5)),  # a short beginning is given whole
        (1, 129, None, Continuation(33, 1)),  # from a picture's latent
    ],
)
def test_the_length_of_a_segment_and_what_it_is_given(length, num_frames, context_frames, expected):
    assert LongRule().continuation(length, num_frames, context_frames, CAUSAL) == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((1,), "Say how long a segment is.*single frame"),
        ((33, 1), "Use num_frames of 5.*no room for what comes next"),
        ((33, 30), "Use 29 or 33.*not 4k\\+1"),
        ((33, 33, 33), "Use a context of at most 29.*leaves nothing of a segment of 33 to make"),
        ((33, 129, 34), "not 4k\\+1"),
        ((5, 129, 33), "Use at most 17.*more than this video of 17 has"),
    ],
)
def test_what_cannot_be_gone_on_from_gets_a_sentence(arguments, words):
    with pytest.raises(OpenSoraError, match=words):
        LongRule().continuation(*(*arguments, None, None)[:3], CAUSAL)


@pytest.mark.parametrize("grid", [PIECES, SHARED_PIECES])
def test_a_model_of_pieces_is_told_no_context_that_it_refuses(grid):
    with pytest.raises(OpenSoraError, match="Use a longer segment") as refusal:
        LongRule().continuation(5, None, None, grid)
    assert "at most" not in str(refusal.value)
    with pytest.raises(OpenSoraError, match="pieces of 17 frames, not from 1"):
        LongRule().continuation(10, None, 1, grid)
    with pytest.raises(OpenSoraError, match=f"at most {grid.pixel_frames(10)} frames"):
        LongRule().continuation(15, None, grid.pixel_frames(15), grid)
    assert LongRule().continuation(15, None, grid.pixel_frames(10), grid) == Continuation(15, 10)


def test_every_segment_has_its_own_noise_and_going_on_later_is_going_on_at_once():
    seeds = {long_video.segment_seed(7, 33 + 24 * k) % 2**32 for k in range(500)}  # CPU generators read 32 bits
    assert len(seeds) == 500 and 7 not in seeds
    assert long_video.segment_seed(8, 57) == long_video.segment_seed(7, 57) + 1  # video k of a batch is what seed + k gives
    assert all(0 <= long_video.segment_seed(2**64 - 1, k) < 2**63 for k in range(1000))


def test_the_last_prompt_holds_for_the_rest():
    assert long_video.segment_prompts(["a", "b"], 4) == ["a", "b", "b", "b"]
    assert long_video.segment_prompts("a cat", 2) == ["a cat", "a cat"]
    for prompts, segments, words in (
        (["a", "b"], 1, "2 prompts for 1 segment"),
        ([], 1, "no prompt"),
        (None, 1, "no prompt"),
        ("a", 0, "adds nothing"),
    ):
        with pytest.raises(OpenSoraError, match=words):
            long_video.segment_prompts(prompts, segments)


def clip(first: int, length: int) -> torch.Tensor:
    """Latents that name their place: frame t of the whole video holds t everywhere."""
    return torch.arange(first, first + length).float().view(1, 1, -1, 1, 1).expand(1, 2, -1, 2, 2).clone()


@pytest.mark.parametrize(
    ("length", "num_frames", "context"), [(33, None, None), (5, None, None), (2, None, None), (7, 33, 17), (40, 65, 5)]
)
def test_joined_latents_have_every_place_once(length, num_frames, context):
    plan = LongRule().continuation(length, num_frames, context, CAUSAL)
    video = clip(0, length)
    for _ in range(3):
        given = long_video.context_of(video, plan)
        begins = video.shape[2] - plan.context
        assert torch.equal(given, clip(begins, plan.context))
        video = join(video, clip(begins, plan.segment), plan)
    assert torch.equal(video, clip(0, length + 3 * plan.added))
    with pytest.raises(OpenSoraError, match="does not fit a plan"):
        join(video, video, plan)


def numbered(latents: torch.Tensor) -> torch.Tensor:
    """A decoder whose frames name their place in the whole video; a clip's first frame stands for four, and is off."""
    places = latents[0, 0, :, 0, 0]
    frames = [4 * places[0:1] + (0.0 if places[0] == 0 else 0.3)] + [4 * place - 3 + torch.arange(4.0) for place in places[1:]]
    return torch.cat(frames).view(-1, 1, 1, 1)


PLANS = [Continuation(33, 9), Continuation(33, 1), Continuation(33, 17), Continuation(5, 2), Continuation(2, 1), Continuation(3, 2)]


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("segments", [0, 1, 2, 5])
@pytest.mark.parametrize("begun", [0, 1, 7])
def test_decoded_frames_are_each_there_once_and_in_order(plan, segments, begun):
    length = plan.segment + begun + segments * plan.added
    pieces = list(decode_windows(clip(0, length), plan, numbered))
    frames = torch.cat(pieces)[:, 0, 0, 0]
    assert torch.equal(frames, torch.arange(4.0 * length - 3))
    assert len(pieces) == len(windows(length, plan))


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_the_device_holds_one_segment_at_a_time(plan):
    seen = []
    list(decode_windows(clip(0, plan.segment + 4 * plan.added + 1), plan, lambda part: seen.append(part.shape[2]) or numbered(part)))
    assert max(seen) <= plan.segment + 1 and len(seen) > 4


def test_windows_fade_into_each_other_and_the_beginning_is_that_of_the_clip_alone():
    plan, level = Continuation(9, 3), iter((0.0, 1.0, 2.0))

    def decode(part):
        return torch.full((4 * part.shape[2] - 3, 1, 1, 1), next(level))

    frames = torch.cat(list(decode_windows(clip(0, 21), plan, decode)))[:, 0, 0, 0]
    assert len(frames) == 81
    assert torch.equal(frames[:25], torch.zeros(25))
    assert torch.allclose(frames[25:34], torch.tensor([*(k / 8 for k in range(8)), 1.0]))
    assert frames.diff().abs().max() <= 1 / 8 + 1e-6


def test_latents_on_disk_are_complete_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "new" / "clip.latent"
    latents = torch.randn(1, 16, 2, 4, 6, dtype=torch.float64).to(torch.bfloat16)
    assert latent_file.save_latents(path, latents, {"prompt": "a cat"}) == path
    assert torch.equal(latent_file.read_latents(path), latents.float())

    def broken(tensors, target, metadata):
        target.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(latent_file, "save_file", broken)
    with pytest.raises(OSError, match="no space"):
        latent_file.save_latents(path, torch.zeros(1, 16, 3, 4, 6))
    assert torch.equal(latent_file.read_latents(path), latents.float())
    assert [file.name for file in path.parent.iterdir()] == ["clip.latent"]


def test_a_file_that_holds_no_latents_gets_a_sentence(tmp_path):
    (tmp_path / "text.latent").write_text("hello")
    save_file({"weight": torch.zeros(2)}, tmp_path / "weights.latent")
    save_file({"latent_tensor": torch.zeros(1, 4, 8, 8), "latent_format_version_0": torch.tensor([])}, tmp_path / "picture.latent")
    save_file({"latent_tensor": torch.zeros(1, 16, 2, 8, 8)}, tmp_path / "old.latent")
    for name, words in (
        ("absent", "there is no file"), ("text", "cannot be read"), ("weights", "none named latent_tensor"),
        ("picture", r"latents of \[1, 4, 8, 8\]"), ("old", "scale is another model's"),
    ):  # fmt: skip
        with pytest.raises(OpenSoraError, match=words):
            latent_file.read_latents(tmp_path / f"{name}.latent")


# --- the pipeline, on the small random checkpoint

SETTINGS = {"num_inference_steps": 2, "seed": 7}


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint):
    from opensora_core.pipeline import OpenSoraPipeline

    return OpenSoraPipeline.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module")
def clip_made(pipe):
    """17 frames of 32x48."""
    return pipe("a cat", height=32, width=48, num_frames=17, **SETTINGS)


@pytest.fixture(scope="module")
def longer(pipe, clip_made):
    """The clip and two segments."""
    return pipe.extend(clip_made, segments=2, **SETTINGS)


def test_a_video_goes_on_with_every_frame_once(clip_made, longer):
    assert longer.latents.shape == (1, 16, 5 + 3 + 3, 4, 6)
    assert torch.equal(longer.latents[:, :, :5], clip_made.latents)
    assert [len(frames) for frames in longer.frames] == [17 + 12 + 12]
    # The given part's own frames, up to those that fade into the next.
    assert all((ours == theirs).all() for ours, theirs in zip(longer.frames[0][:13], clip_made.frames[0][:13], strict=True))
    assert longer.prompt.text == clip_made.prompt.text and longer.seeds == [7]
    assert (longer.forwards, longer.forwards_saved) == (2 * 6, 0)  # two segments, two steps of three passes
    assert set(longer.seconds) == {"text", "sampling", "decode"}


def test_a_segment_is_video_to_video_from_the_last_latents(pipe, clip_made, longer):
    seed = long_video.segment_seed(7, 5)
    given = {"height": 32, "width": 48, "num_frames": 17, "num_inference_steps": 2, "seed": seed}
    alone = pipe(clip_made.prompt, video=clip_made.latents, context=5, **given)
    assert torch.equal(longer.latents[:, :, 5:8], alone.latents[:, :, 2:])


def test_going_on_later_is_going_on_at_once(pipe, clip_made, longer):
    first = pipe.extend(clip_made, segments=1, num_inference_steps=2)  # the seed is the video's own
    assert torch.equal(first.latents, longer.latents[:, :, :8])
    second = pipe.extend(first.latents, clip_made.prompt, num_frames=17, **SETTINGS)
    assert torch.equal(second.latents, longer.latents)
    assert all((ours == theirs).all() for ours, theirs in zip(second.frames[0], longer.frames[0], strict=True))


def test_the_networks_see_one_segment_at_a_time(pipe, clip_made, monkeypatch):
    from opensora_core.codecs.hunyuan.model import CausalVAE
    from opensora_core.run import sample as sampling

    sampled, decoded = [], []
    real_sample, real_decode = sampling.sample, CausalVAE.decode

    def sample(recipe, transformer, latents, schedule, guidance, told, *rest):
        sampled.append((tuple(latents.shape), told.condition))
        return real_sample(recipe, transformer, latents, schedule, guidance, told, *rest)

    monkeypatch.setattr(sampling, "sample", sample)
    monkeypatch.setattr(CausalVAE, "decode", lambda vae, part: decoded.append(part.shape[2]) or real_decode(vae, part))
    result = pipe.extend(clip_made, segments=3, num_inference_steps=1)
    assert [shape for shape, _ in sampled] == [(1, 16, 5, 4, 6)] * 3
    assert decoded == [5, 5, 5, 5]
    for index, (_, condition) in enumerate(sampled):
        end = 5 + 3 * index
        assert condition.mask[0, 0, :, 0, 0].tolist() == [1, 1, 0, 0, 0]
        assert torch.equal(condition.latents[:, :, :2], result.latents[:, :, end - 2 : end])


def test_every_segment_is_in_safety_before_the_next_begins(pipe, clip_made, tmp_path, monkeypatch):
    from opensora_core.run import sample as sampling

    kept, real_sample = tmp_path / "so far.latent", sampling.sample

    def sample(*arguments):
        if kept.exists() and latent_file.read_latents(kept).shape[2] == 11:
            raise KeyboardInterrupt
        return real_sample(*arguments)

    monkeypatch.setattr(sampling, "sample", sample)
    done = []

    def keep(number, latents):
        done.append(number)
        latent_file.save_latents(kept, latents)

    with pytest.raises(KeyboardInterrupt):
        pipe.extend(clip_made, segments=4, on_segment=keep, num_inference_steps=1)
    assert done == [1, 2]
    monkeypatch.undo()
    rest = pipe.extend(latent_file.read_latents(kept), clip_made.prompt, segments=2, num_frames=17, num_inference_steps=1, seed=7)
    at_once = pipe.extend(clip_made, segments=4, num_inference_steps=1)
    assert torch.equal(rest.latents, at_once.latents) and len(rest.frames[0]) == 17 + 4 * 12


def test_each_segment_may_have_a_prompt_of_its_own(pipe, clip_made, longer, monkeypatch):
    encoded, real = [], T5Encoder.encode
    monkeypatch.setattr(T5Encoder, "encode", lambda self, texts: encoded.append(texts) or real(self, texts))
    result = pipe.extend(clip_made, ["a cat", "a dog", "a dog"], segments=3, **SETTINGS)
    assert [one.split(".")[0] for one, _ in encoded] == ["a cat", "a dog"]
    assert torch.allclose(result.latents[:, :, :8], longer.latents[:, :, :8], atol=1e-5)
    assert not torch.allclose(result.latents[:, :, 8:11], longer.latents[:, :, 8:11], atol=1e-3)
    assert result.prompt.text.startswith("a dog")


def test_a_batch_goes_on_item_by_item(pipe, clip_made):
    both = torch.cat((clip_made.latents, clip_made.latents.flip(2)))
    result = pipe.extend(both, clip_made.prompt, **SETTINGS)
    assert result.seeds == [7, 8] and [len(frames) for frames in result.frames] == [29, 29]
    for index, seed in enumerate(result.seeds):
        alone = pipe.extend(both[index : index + 1], clip_made.prompt, num_inference_steps=2, seed=seed)
        assert torch.allclose(result.latents[index], alone.latents[0], atol=1e-4)


def test_progress_counts_the_steps_of_all_segments(pipe, clip_made):
    seen = []
    pipe.extend(clip_made, segments=2, progress=lambda *event: seen.append(event), **SETTINGS)
    sampling = [(done, total) for stage, done, total in seen if stage == "sampling"]
    assert sampling[0] == (0, 4) and sampling[-1] == (4, 4) and {total for _, total in sampling} == {4}
    assert [done for done, _ in sampling] == sorted(done for done, _ in sampling)
    decode = [(done, total) for stage, done, total in seen if stage == "decode"]
    assert decode[-1] == (3, 3)


@pytest.mark.parametrize(
    ("video", "arguments", "words"),
    [
        (torch.zeros(16, 5, 4, 6), {}, "result, or its latents"),
        ("clip.mp4", {}, "this is str"),
        (torch.full((1, 16, 5, 4, 6), float("nan")), {}, "finite numbers"),
        (torch.zeros(1, 4, 5, 4, 6), {}, "4 channels, this model's have 16"),
        (torch.zeros(1, 16, 5, 4, 6), {"prompts": None}, "no prompt to go on with"),
        (torch.zeros(1, 16, 5, 4, 6), {"segments": 0}, "adds nothing"),
        (torch.zeros(1, 16, 5, 4, 6), {"context_frames": 17}, "leaves nothing"),
        (torch.zeros(1, 16, 5, 4, 5), {}, "16"),
        (torch.zeros(1, 16, 5, 4, 6), {"num_inference_steps": 0}, "makes no video"),
    ],
)
def test_what_cannot_be_met_is_refused_before_any_weight_is_read(tiny_checkpoint, video, arguments, words, monkeypatch):
    from opensora_core.memory.component import Component
    from opensora_core.pipeline import OpenSoraPipeline

    monkeypatch.setattr(Component, "_load", lambda component: pytest.fail("a network was read"))
    arguments = {"prompts": "a cat", **arguments}
    with pytest.raises(OpenSoraError, match=words):
        OpenSoraPipeline.from_pretrained(tiny_checkpoint).extend(video, **arguments)


# --- the command line


@pytest.fixture
def generate(tiny_checkpoint, tmp_path, monkeypatch):
    """generate("--extend", "2", ...) -> exit code, on a clip of 9 frames of 32x48, into `out/` of the working folder."""
    from opensora_core.cli import main

    monkeypatch.chdir(tmp_path)
    fixed = ["generate", "--model", str(tiny_checkpoint), "--prompt", "a cat", "--num-steps", "1", "--seed", "7", "--out", "out"]
    clip = ["--height", "32", "--width", "48", "--num-frames", "9", "--device", "cpu"]
    return lambda *more, is_clip=True: main([*fixed, *(clip if is_clip else ["--device", "cpu"]), *more])


def frames_of(path) -> int:
    from imageio_ffmpeg import count_frames_and_secs

    return count_frames_and_secs(str(path))[0]


def test_generate_makes_a_longer_video_and_keeps_its_latents(generate, capsys):
    assert generate("--extend", "2", "--extend-prompt", "a dog") == 0
    (video,) = (line for line in capsys.readouterr().out.splitlines())
    assert video.endswith("video_0000.mp4") and frames_of(video) == 9 + 4 + 4
    latents = latent_file.read_latents("out/video_0000.latent")
    assert latents.shape == (1, 16, 5, 4, 6)
    # From where it was left: the file and the prompt are all it takes, and nothing is overwritten.
    assert generate("--extend", "1", "--extend-from", "out/video_0000.latent", "--extend-frames", "9", is_clip=False) == 0
    (longer,) = (line for line in capsys.readouterr().out.splitlines())
    assert longer.endswith("video_0001.mp4") and frames_of(longer) == 9 + 4 + 4 + 4
    assert torch.allclose(latent_file.read_latents("out/video_0001.latent")[:, :, :5], latents, atol=1e-5)


def test_the_first_clip_is_decoded_once_with_the_whole(generate, monkeypatch):
    from opensora_core.codecs.hunyuan.model import CausalVAE

    decoded, real = [], CausalVAE.decode
    monkeypatch.setattr(CausalVAE, "decode", lambda vae, part: decoded.append(part.shape[2]) or real(vae, part))
    assert generate("--extend", "2") == 0
    assert decoded == [3] * len(windows(5, Continuation(segment=3, context=2)))


def test_an_interrupt_names_what_is_finished(generate, capsys, monkeypatch):
    from opensora_core.run import sample as sampling

    runs, real_sample = [], sampling.sample

    def sample(*arguments):
        runs.append(1)
        if len(runs) == 3:
            raise KeyboardInterrupt
        return real_sample(*arguments)

    monkeypatch.setattr(sampling, "sample", sample)
    assert generate("--extend", "3") == 130
    said = capsys.readouterr().err
    assert "What is finished (the first clip and 1 segment) is in out/video_0000.latent; go on with --extend-from" in said
    assert "--extend-from out/video_0000.latent --extend-frames 9." in said  # a video that is longer by now has longer segments of itself
    assert latent_file.read_latents("out/video_0000.latent").shape[2] == 4
    monkeypatch.setattr(sampling, "sample", real_sample)
    assert generate() == 0
    assert capsys.readouterr().out.strip().endswith("video_0001.mp4")  # the kept latents hold their number


def test_where_frames_alone_are_missing_they_are_what_is_named(generate, capsys, monkeypatch):
    from opensora_core.run import clip

    ends = iter([KeyboardInterrupt(), DecodeOutOfMemory("No memory.", torch.zeros(1))])

    def decode(*told):
        raise next(ends)

    monkeypatch.setattr(clip, "decode_latents", decode)
    for number, code in enumerate((130, 1)):
        assert generate("--extend", "1") == code
        said, file = capsys.readouterr().err, f"out/video_000{number}.latent"
        assert f"All of it is in {file}; `generate --decode {file}` makes the video." in said and "--extend-from" not in said


def test_a_segment_that_fails_names_what_is_finished_and_the_next_video_is_made(generate, capsys, monkeypatch):
    from opensora_core.run import sample as sampling

    runs, real_sample = [], sampling.sample

    def sample(*arguments):
        runs.append(1)
        if len(runs) == 2:
            raise torch.cuda.OutOfMemoryError
        return real_sample(*arguments)

    monkeypatch.setattr(sampling, "sample", sample)
    assert generate("--extend", "1", "--num-samples", "2", "--offload", "minimal") == 1
    captured = capsys.readouterr()
    assert "video 1 (seed 7) failed" in captured.err and "What is finished (the first clip) is in out/video_0000.latent" in captured.err
    assert captured.out.strip().endswith("video_0001.mp4")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--extend-prompt", "a dog"), "--extend-prompt goes with --extend N"),
        (("--extend", "0"), "segments=0 adds nothing"),
        (("--extend", "1", "--extend-prompt", "a", "--extend-prompt", "b"), "2 prompts for 1 segment"),
        (("--extend", "1", "--extend-frames", "10"), "Use 9 or 13: num_frames=10 is not 4k+1"),
        (("--extend", "1", "--extend-context", "9"), "leaves nothing of a segment of 9"),
        (("--extend", "1", "--extend-from", "absent.latent"), "--width is of a first clip"),
        (("--extend", "1", "--csv", "prompts.csv"), "--csv"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused_before_anything_is_read(generate, capsys, monkeypatch, more, words):
    from opensora_core.memory.component import Component

    monkeypatch.setattr(Component, "_load", lambda component: pytest.fail("a network was read"))
    try:
        code = generate(*more)
    except SystemExit as end:
        code = end.code
    assert code == 2 and words in capsys.readouterr().err


def test_the_high_compression_variant_is_refused_before_its_first_clip(generate, capsys, monkeypatch):
    from opensora_core.geometry import HIGH_COMPRESSION
    from opensora_core.memory.component import Component
    from opensora_core.run.files import ModelFiles

    monkeypatch.setattr(ModelFiles, "grid", HIGH_COMPRESSION)
    monkeypatch.setattr(Component, "_load", lambda component: pytest.fail("a network was read"))
    assert generate("--extend", "1") == 2
    assert "goes on from no clip" in capsys.readouterr().err


def test_a_file_that_is_not_there_is_refused(generate, capsys):
    assert generate("--extend", "1", "--extend-from", "absent.latent", is_clip=False) == 2
    assert "there is no file absent.latent" in capsys.readouterr().err
