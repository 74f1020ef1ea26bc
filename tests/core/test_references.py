"""What a video is given besides its prompt: clips, latents, how closely it holds to them, and the shape it takes from them."""

from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from opensora_core import cli
from opensora_core.commands.frames import PATHS, call_arguments
from opensora_core.commands.model import pipeline
from opensora_core.commands.options import GenerateOptions, taken
from opensora_core.errors import OpenSoraError
from opensora_core.media.pictures import References, read_references
from opensora_core.media.video import media_size, read_clip, save_video
from opensora_core.pipeline import OpenSoraPipeline
from opensora_core.run.request import EncodedPrompt
from opensora_core.sampling import given as conditioning, schedule, solvers as solver
from opensora_core.sampling.guidance import Guidance, ReferenceUse, num_forwards
from opensora_core.sampling.run import Conditions, SamplingRecipe, TextCondition, sample


def frames_of(count, height=32, width=48):
    """uint8 frames that differ, smooth enough for a lossy file to keep them apart."""
    ramp = torch.linspace(0, 40, width).view(1, 1, width, 1) + torch.linspace(0, 40, height).view(1, height, 1, 1)
    shade = (torch.arange(count) * 37 % 170).view(-1, 1, 1, 1)
    return (ramp + shade).expand(-1, -1, -1, 3).to(torch.uint8)


# Reading


@pytest.fixture
def clip_file(tmp_path):
    return save_video(frames_of(70), tmp_path / "clip.mp4")


def test_either_end_of_a_file_is_read_frame_by_frame(clip_file):
    whole, last, first = (read_clip(clip_file, count, from_end=end) for count, end in ((500, True), (33, True), (33, False)))
    assert whole.shape == (70, 32, 48, 3) and whole.dtype == torch.uint8
    assert torch.equal(last, whole[-33:]) and torch.equal(first, whole[:33])
    assert (whole.float() - frames_of(70).float()).abs().mean() < 3  # what the encoder leaves of them
    assert media_size(clip_file) == (32, 48)


def test_an_uneven_rate_neither_repeats_nor_drops_a_frame(tmp_path, clip_file):
    from imageio_ffmpeg import write_frames

    uneven = tmp_path / "uneven.mkv"
    output = ["-vf", "setpts='PTS+gte(N,20)*2/TB'", "-fps_mode", "passthrough"]  # two seconds of nothing after the twentieth frame
    writer = write_frames(str(uneven), (48, 32), fps=24, macro_block_size=1, output_params=output, ffmpeg_log_level="error")
    writer.send(None)
    for frame in frames_of(40).numpy():
        writer.send(numpy.ascontiguousarray(frame))
    writer.close()
    assert len(read_clip(uneven, 500, from_end=True)) == 40


def test_a_turned_picture_has_the_size_that_it_is_seen_in(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (48, 32)).save(tmp_path / "turned.jpg", exif=exif)
    assert media_size(tmp_path / "turned.jpg") == (48, 32)


@pytest.mark.parametrize(("direction", "part"), [("forwards", slice(7, 40)), ("backwards", slice(0, 33))])
def test_a_clip_may_be_a_file_frames_an_array_or_a_tensor(direction, part, tmp_path):
    frames = frames_of(40)
    path = save_video(frames, tmp_path / "clip.mp4")
    expected = frames[part]
    for video in (frames, frames.numpy(), list(frames.numpy()), [Image.fromarray(f) for f in frames.numpy()]):
        assert torch.equal(read_references(video=video, direction=direction).clip, expected)
    assert torch.equal(read_references(video=frames / 255, direction=direction).clip, expected / 255)
    assert torch.equal(read_references(video=str(path), direction=direction).clip, read_clip(path, 500, from_end=True)[part])


def test_latents_of_a_clip_are_cut_by_the_same_count_of_frames():
    latents = torch.randn(2, 16, 12, 4, 6)
    assert torch.equal(read_references(video=latents).clip, latents[:, :, -9:])
    assert torch.equal(read_references(video=latents, direction="backwards", context=5).clip, latents[:, :, :2])
    assert read_references(video=latents, context=17).ends[0].shape[2] == 5


CLIP = torch.zeros(40, 8, 8, 3)
LATENTS = torch.zeros(1, 16, 9, 4, 6)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"video": CLIP[:32]}, "Use a longer clip.*video has 32 frames; going on from it takes 33"),
        ({"video": CLIP[:1]}, "video has 1 frame;"),
        ({"video": CLIP, "context": 65}, "Use context 33, or a longer clip.*video has 40 frames; .* takes 65"),
        ({"video": CLIP, "context": 40}, "Use 33 or 65.*by 40 of its frames"),
        ({"video": CLIP, "direction": "up"}, "Use one of forwards, backwards.*direction='up' is not known"),
        ({"video": CLIP[..., :2]}, r"video is a clip, .*\[40, 8, 8, 2\]"),
        ({"video": CLIP - 1}, "video holds uint8, or floats from 0 to 1"),
        ({"video": [CLIP[0]] * 32 + [CLIP[0, :4]]}, "frames of video are of different sizes"),
        ({"video": []}, "this is a list"),
        ({"video": "missing.mp4"}, "missing.mp4 does not exist"),
        ({"video": __file__}, "is not a video that can be read"),
        ({"video": CLIP, "image": CLIP[0]}, "given alone"),
        ({"video": LATENTS, "context": 37}, "hold 9 latent frames; context 37 takes 10"),
        ({"video": LATENTS, "context": 34}, "num_frames=34 is not 4k"),
        ({"video": LATENTS * torch.nan}, "finite numbers"),
        ({"image": LATENTS}, "latents of image hold 9 latent frames, a picture's one"),
        ({"image": torch.zeros(8, 8, 4)}, "image has an alpha channel"),
        ({"image": torch.zeros(2, 8, 8, 3)}, "image is one picture"),
        ({"image": torch.zeros(0, 8, 3)}, "image is one picture"),
        ({"image": "clip.mp4"}, "clip.mp4 is a video where a picture is wanted"),
        ({"direction": "backwards"}, "needs a video"),
        ({"strength": 0.5}, "Give an image, a last image or a video"),
        ({"image": CLIP[0], "strength": 1.1}, "strength=1.1 is not between 0"),
        ({"image": CLIP[0], "strength": float("nan")}, "strength=nan is not between 0"),
    ],
)
def test_what_cannot_be_is_one_sentence(given, words):
    with pytest.raises(OpenSoraError, match=words) as caught:
        read_references(**given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("references", "words"),
    [
        (References(first=torch.zeros(1, 16, 1, 4, 8)), "of 32 x 64 pixels .*, the video is 32 x 48"),
        (References(last=torch.zeros(3, 16, 1, 4, 6)), "Give 1 or 2.*last_image holds the latents of 3 videos for a batch of 2"),
        (References(clip=torch.zeros(1, 16, 9, 4, 6)), "Use at least 37.*a video of 33 frames is all taken up by the frames of the clip"),
    ],
)
def test_what_does_not_fit_the_video_is_one_sentence(references, words):
    with pytest.raises(OpenSoraError, match=words):
        references.check(2, (9, 4, 6))


# How a run uses it

SHAPE = (2, 4, 5, 6, 8)


class Model:
    """Non-linear, tells prompts and references apart, and counts rows and how many of them read a reference."""

    dtype = torch.float32
    config = None

    def __init__(self):
        self.rows = self.with_reference = 0

    def __call__(self, x, timestep, context, y, cond=None):
        self.rows += x.shape[0]
        self.with_reference += x.shape[0] * (cond is not None)
        reference = 0.0 if cond is None else cond.mean(dim=1, keepdim=True) + cond.mean(dim=(1, 2, 3, 4), keepdim=True)
        text = context.mean(dim=(1, 2)) + y.mean(dim=1)
        return torch.tanh(x * 0.7 + reference + text.view(-1, 1, 1, 1, 1))


def text_condition(batch, context, y, generator):
    sizes = {"context": (batch, *context), "y": (batch, *y)}
    return TextCondition(*({name: torch.randn(size, generator=generator) for name, size in sizes.items()} for _ in range(2)))


@pytest.fixture
def run():
    generator = torch.Generator().manual_seed(1)
    text = text_condition(2, (3, 6), (6,), generator)
    head = torch.randn(1, SHAPE[1], 2, *SHAPE[-2:], generator=generator)

    def run(use=None, guidance=None, steps=12, model=None):
        condition = None if use is None else conditioning.image_condition(SHAPE, head=head, use=use)
        way = schedule.flow_schedule(steps, 5.7)
        return sample(SamplingRecipe(), model or Model(), solver.noise(SHAPE, 3), way, guidance or Guidance(), Conditions(text, condition))

    run.head = head
    return run


def test_a_clip_has_no_ramp_and_is_not_put_back(run):
    clip, without_ramp = run(ReferenceUse(is_clip=True)), run(ReferenceUse(), Guidance(temporal_ramp=False))
    assert torch.equal(clip[:, :, 2:], without_ramp[:, :, 2:])
    assert torch.equal(without_ramp[:, :, :2], run.head.expand(2, -1, -1, -1, -1))
    assert not torch.allclose(clip[:, :, :2], without_ramp[:, :, :2], atol=0.1)
    assert not torch.allclose(clip, run(ReferenceUse()), atol=0.01)


def test_strength_one_is_the_run_without_it_and_none_is_text_to_video(run):
    assert torch.equal(run(ReferenceUse(strength=1.0)), run(ReferenceUse()))
    assert torch.equal(run(ReferenceUse(strength=0.0)), run())
    assert torch.equal(run(ReferenceUse(is_clip=True, strength=0.0)), run())


@pytest.mark.parametrize(("strength", "steps"), [(0.5, 6), (0.01, 1), (0.99, 12), (0.25, 3)])
def test_strength_is_the_share_of_steps_that_read_it(run, strength, steps):
    model, use = Model(), ReferenceUse(strength=strength)
    found = run(use, model=model)
    with_reference = sum(
        1 if i >= 10 and i % 2 else 2 for i in range(steps)
    )  # of the three passes, two read it; one where both scales are 1
    assert model.with_reference == SHAPE[0] * with_reference
    assert model.rows == SHAPE[0] * num_forwards(Guidance(), 12, SHAPE[2], use)
    assert not torch.allclose(found[:, :, :2], run.head.expand(2, -1, -1, -1, -1), atol=0.01)  # not put back


def test_the_more_strength_the_nearer_to_the_whole_run(run):
    whole = run(ReferenceUse(is_clip=True))
    distance = [(run(ReferenceUse(is_clip=True, strength=s)) - whole).abs().mean() for s in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert distance[-1] == 0 and all(a > b for a, b in zip(distance, distance[1:], strict=False))


@pytest.mark.parametrize(("strength", "steps", "expected"), [(0.07, 100, 7), (1.0, 50, 50), (0.0, 50, 0), (1e-9, 50, 0), (0.02, 50, 1)])
def test_steps_of_a_strength(strength, steps, expected):
    assert ReferenceUse(strength=strength).num_steps(steps) == expected


@pytest.mark.parametrize("use", [ReferenceUse(), ReferenceUse(is_clip=True)])
def test_forwards_of_fifty_default_steps(use):
    assert num_forwards(Guidance(), 50, 33, use) == 110
    assert num_forwards(Guidance(text_oscillation=False), 50, 33, use) == 130


# In the pipeline


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint):
    return OpenSoraPipeline.from_pretrained(tiny_checkpoint, torch_dtype=torch.float32)


@pytest.fixture(scope="module")
def cat():
    generator = torch.Generator().manual_seed(2)
    return EncodedPrompt("a cat.", text_condition(1, (8, 64), (64,), generator))


SMALL = {"height": 32, "width": 48, "num_inference_steps": 2, "seed": 1}


@pytest.mark.parametrize(("direction", "place"), [("forwards", slice(0, 9)), ("backwards", slice(2, 11))])
def test_a_clip_is_fitted_and_encoded_as_one(pipe, cat, direction, place, monkeypatch):
    seen = []
    real = conditioning.image_condition
    monkeypatch.setattr("opensora_core.run.given.image_condition", lambda *args: seen.append(real(*args)) or seen[-1])
    frames = frames_of(40, 40, 48)
    result = pipe(cat, num_frames=41, video=frames, direction=direction, **SMALL)
    part = conditioning.nearest_frames(frames, direction, 33)
    with torch.inference_mode():
        expected = pipe.vae.encode(conditioning.fit_clip(part, 32, 48), [None])
    (condition,) = seen
    assert torch.equal(condition.latents[:, :, place], expected) and condition.use == ReferenceUse(is_clip=True)
    assert result.latents.shape[2] == 11 and len(result.frames[0]) == 41


def test_latents_go_in_as_they_are(pipe, cat):
    picture = torch.rand(1, 16, 1, 4, 6)
    result = pipe(cat, num_frames=9, image=picture, last_image=picture * 2, num_videos_per_prompt=2, **SMALL)
    assert torch.equal(result.latents[:, :, :1], picture.expand(2, -1, -1, -1, -1))
    assert torch.equal(result.latents[:, :, -1:], 2 * picture.expand(2, -1, -1, -1, -1))
    with pytest.raises(OpenSoraError, match="latents of image have 8 channels, this model's have 16"):
        pipe(cat, num_frames=9, image=picture[:, :8], **SMALL)


def test_no_strength_is_text_to_video_and_encodes_nothing(pipe, cat, monkeypatch):
    expected = pipe(cat, num_frames=9, **SMALL).latents
    monkeypatch.setattr(pipe.vae, "encode", None)
    assert torch.equal(pipe(cat, num_frames=9, image=torch.rand(32, 48, 3), image_strength=0.0, **SMALL).latents, expected)


# On the command line


def settings_of(*words):
    options = taken(GenerateOptions, cli.build_parser().parse_args(["generate", "--prompt", "x", *words]))
    return call_arguments(options, pipeline(options).files)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--ref", "a.mp4"], {"video": "a.mp4", "direction": "forwards", "context": 33}),
        (["--ref", "a.MOV", "--cond-type", "v2v_tail"], {"video": "a.MOV", "direction": "backwards", "context": 33}),
        (["--ref", "a.mp4", "--cond-type", "v2v_head_easy"], {"direction": "forwards", "context": 65}),
        (["--ref", "a.mp4", "--cond-type", "v2v_tail_easy", "--strength", "0.5"], {"context": 65, "image_strength": 0.5}),
        (["--ref", "a.png", "--strength", "0"], {"image": "a.png", "image_strength": 0.0}),
        (["--ref", "a.png"], {"image": "a.png", "last_image": None}),
    ],
)
def test_clips_and_strength_reach_the_pipeline(words, expected):
    found = settings_of(*words)
    assert expected.items() <= found.items()
    assert ("image_strength" in found) == ("--strength" in words) and ("video" in found) == ("mp4" in words[1] or "MOV" in words[1])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--cond-type", "v2v_head"], "takes a clip, --ref"),
        (["--cond-type", "v2v_tail", "--ref", "a.mp4", "--ref-end", "b.png"], "no --ref-end"),
        (["--ref", "a.mp4", "--ref-end", "b.png"], "no --ref-end"),
        (["--strength", "0.5"], "--ref or --ref-end"),
        (["--fit", "pad"], "Give --ref or --ref-end: --fit pad needs something to fit"),
        (["--aspect-ratio", "image"], "Give --ref or --ref-end too"),
        (["--aspect-ratio", "image", "--ref", "missing.png"], "missing.png does not exist"),
    ],
)
def test_what_contradicts_itself_is_refused(words, says):
    with pytest.raises(OpenSoraError, match=says):
        settings_of(*words)


@pytest.mark.parametrize(
    ("size", "ratio"),
    [((1920, 1080), "16:9"), ((600, 600), "1:1"), ((480, 640), "3:4"), ((1000, 667), "3:2"), ((239, 100), "2.39:1"), ((10, 300), "1:2.39")],
)
def test_the_shape_of_a_picture_chooses_the_preset(tmp_path, size, ratio):
    from opensora_core.geometry import resolution_size

    Image.new("RGB", size).save(tmp_path / "a.png")
    for words in (["--ref"], ["--ref-end"]):
        found = settings_of(*words, str(tmp_path / "a.png"), "--aspect-ratio", "image", "--resolution", "768px")
        assert (found["height"], found["width"]) == resolution_size("768px", ratio)


def test_the_shape_of_a_clip_chooses_too(clip_file):
    found = settings_of("--ref", str(clip_file), "--aspect-ratio", "image")
    assert (found["height"], found["width"]) == (208, 304)  # 3:2


def test_a_report_of_a_benchmark_names_no_file(clip_file):
    assert set(PATHS) >= {name for name, value in settings_of("--ref", str(clip_file)).items() if isinstance(value, (str, Path))} - {
        "negative_prompt", "direction",
    }  # fmt: skip
