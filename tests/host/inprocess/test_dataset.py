"""A folder of clips with captions becomes what the host's own LoRA trainer takes, is encoded once, and what is wrong in it is one sentence."""

import csv
import sys
from types import SimpleNamespace

import pytest
import torch

FRAMES, FPS = 17, 24


@pytest.fixture
def folder(pack, base):
    """Three clips of the built-in model's world, the last too short, each with its caption beside it."""
    import folder_paths

    video, world = pack("opensora_core.media.video"), pack("opensora_core.evaluation.world")
    place = base / "input" / "lesson"
    place.mkdir(parents=True)
    for name, colour, count in (("a", "red", FRAMES), ("b", "blue", FRAMES), ("c", "green", 9)):
        scene = world.Scene(world.Combination("circle", colour, "black", "left"), 4, 11.0, (32.0, 32.0), f"a {colour} circle")
        video.save_video(scene.render(count), place / f"{name}.mp4", FPS)
        (place / f"{name}.txt").write_text(f"{scene.caption}\n")
    assert folder_paths.get_input_directory() == str(base / "input")
    yield place
    for path in sorted(place.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    place.rmdir()


@pytest.fixture
def read(pack, small, run_node, folder):
    """-> what the node makes of the folder, with the built-in model's VAE and text encoders."""
    name = pack("nodes.host.paths").SMALL
    (vae,) = run_node("OpenSoraVAELoader", vae_name=name)
    (clip,) = run_node("OpenSoraTextEncoderLoader", t5_name=name, clip_l_name=name, precision="auto", device="cpu")

    def run(**changes):
        latent = {"samples": torch.zeros(1, 16, 5, 8, 8)}
        return run_node("OpenSoraVideoDataset", **{"folder": "lesson", "vae": vae, "clip": clip, "latent": latent, **changes})

    return run


def test_clips_and_captions_are_encoded_as_they_are_for_a_run_and_only_once(read, pack, folder, run_node, monkeypatch):
    notice, said = pack("nodes.host.notice"), []
    monkeypatch.setattr(notice, "show", lambda line, *args, **named: line and said.append(line))
    latents, positive = read()
    assert [latent["samples"].shape for latent in latents] == [(1, 16, 5, 8, 8)] * 2
    assert said == ["2 samples of 17 frames, 1 too short and left out (c.mp4)"]
    name = pack("nodes.host.paths").SMALL
    (clip,) = run_node("OpenSoraTextEncoderLoader", t5_name=name, clip_l_name=name, precision="auto", device="cpu")
    [[context, values]] = run_node("OpenSoraT5TextEncode", clip=clip, prompt="a blue circle", negative_prompt="", motion_score=4, fps=FPS)[
        0
    ]
    [[found, others]] = positive[1]
    assert torch.equal(found, context.cpu()) and torch.equal(others["pooled_output"], values["pooled_output"].cpu())
    monkeypatch.setattr(pack("nodes.host.clips"), "encode", lambda *args: pytest.fail("what is kept is encoded again"))
    again, _ = read()
    assert all(torch.equal(one["samples"], other["samples"]) for one, other in zip(latents, again, strict=True))
    kept = next((folder / ".open_sora_encoded").iterdir())
    kept.write_bytes(kept.read_bytes()[:50])  # as of a copy that was cut off: made again, not an error
    with pytest.raises(pytest.fail.Exception, match="encoded again"):
        read()
    (folder / "b.txt").write_text("a sad blue circle")
    with pytest.raises(pytest.fail.Exception, match="encoded again"):
        read()


def test_a_table_names_clips_captions_and_frames(read, folder):
    with (folder / "clips.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "text", "num_frames"], ["b.mp4", "a blue, round thing", "17"], ["a.mp4", "red", ""]])
    latents, _ = read()
    assert len(latents) == 2 and not torch.equal(latents[0]["samples"], latents[1]["samples"])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"a.txt": None}, r"Write what it shows into a\.txt.*a\.mp4 has no caption"),
        ({"a.txt": " \n"}, r"a\.txt holds no caption"),
        ({"x.csv": "path,text\n../../x.mp4,a kite\n"}, r"x\.csv, line 2: path='../../x.mp4' is no file of the folder"),
        ({"x.csv": "path,text,num_frames\na.mp4,a kite,-3\n"}, "num_frames='-3' is no number of frames"),
        ({"x.csv": "file,words\na.mp4,a kite\n"}, "Name the columns path and text"),
        ({"x.csv": "path,text\n", "y.csv": ""}, "holds 2 tables"),
        ({"x.csv": "path,text\n\na.mp4,a kite\n../../x.mp4,a kite\n"}, r"x\.csv, line 4: path="),
        (
            {"x.csv": "path,text\na.mp4,a blue, round thing\n"},
            r"Put a caption that holds a comma in double quotes: x\.csv, line 2 has more cells",
        ),
        ({"x.csv": "path,text\na.mp4\n"}, r"x\.csv, line 2 holds no caption"),
        ({"a.mp4": "no video"}, r"a\.mp4 is not a video that can be read"),
        ({"x.csv": f"path,text\n{'a' * 5000}.mp4,a kite\n"}, "is no file of the folder"),
        ({"x.csv": f"path,text\na.mp4,{'a' * 200000}\n"}, "no table that can be read"),
        ({"x.csv": 'path,text\na.mp4,"a kite\n'}, "no table that can be read"),
    ],
)
def test_what_is_wrong_in_a_folder_is_named(read, folder, changes, sentence, pack):
    for name, text in changes.items():
        (folder / name).unlink() if text is None else (folder / name).write_text(text)
    with pytest.raises(pack("opensora_core.errors").OpenSoraError, match=sentence):
        read()


def test_too_long_a_clip_and_no_such_folder(read, pack):
    error = pack("opensora_core.errors").OpenSoraError
    with pytest.raises(error, match="no clip in lesson has 33 frames at 24 FPS"):
        read(latent={"samples": torch.zeros(1, 16, 9, 8, 8)})
    with pytest.raises(error, match="folder='../lesson' is no folder with captions in ComfyUI's input folder"):
        read(folder="../lesson")


def test_a_latent_that_is_no_video_s_is_refused(read, pack):
    with pytest.raises(pack("opensora_core.errors").OpenSoraError, match=r"Connect another LATENT.*\[1, 16, 8, 8\]"):
        read(latent={"samples": torch.zeros(1, 16, 8, 8)})


def test_a_full_disk_is_one_sentence_and_leaves_nothing_there(read, pack, folder):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**12, limits[1]))
    try:
        with pytest.raises(pack("opensora_core.errors").OpenSoraError, match="Make room there: what is encoded cannot be kept in lesson"):
            read()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [*(folder / ".open_sora_encoded").iterdir()]


def test_a_sample_of_each_scene_and_a_clip_that_cannot_be_cut(read, pack, monkeypatch):
    class Unopened(Exception):
        pass

    def detect(path, detector):
        if path.endswith("b.mp4"):
            raise Unopened
        return [
            tuple(SimpleNamespace(get_seconds=lambda frame=frame: frame / FPS) for frame in scene) for scene in ((0, 8), (8, 10), (10, 17))
        ]

    monkeypatch.setitem(sys.modules, "scenedetect", SimpleNamespace(ContentDetector=object, VideoOpenFailure=Unopened, detect=detect))
    with pytest.raises(pack("opensora_core.errors").OpenSoraError, match="b.mp4 cannot be read by PySceneDetect"):
        read(cut_scenes=True)
    pieces = pack("opensora_core.media.dataset")
    (whole,) = (clip for clip in pieces.captioned_clips(pack("nodes.host.dataset").folder_of("lesson")) if clip.path.name == "a.mp4")
    assert [(piece.first, piece.length) for piece in whole.scenes(FPS)] == [(0, 8), (8, 2), (10, 7)]
    first, short, last = (piece.read(5, FPS) for piece in whole.scenes(FPS))
    assert short is None and torch.equal(last, pack("opensora_core.media.video").read_clip(whole.path, 5, from_end=False, skip=10))
    assert torch.equal(first, whole.read(5, FPS)) and not torch.equal(first, last)


def test_captions_say_to_another_model_what_its_prompts_do(read, pack, monkeypatch):
    """The default motion score is 2.0's own, and the frame rate travels with what is encoded."""
    dataset, said = pack("nodes.host.dataset"), []
    row = pack("opensora_core.families.open_sora_1").OPEN_SORA_1_2
    monkeypatch.setattr(dataset, "family_of", lambda model: row)
    entry = [[[torch.zeros(1, 4, 8), {"attention_mask": torch.ones(1, 4)}]]]
    monkeypatch.setattr(dataset.prompts, "encode", lambda clip, texts, *args, **named: said.extend(texts) or entry)
    for _ in range(2):  # made, and kept
        assert [values["open_sora_fps"] for ((_, values),) in read(model=object())[1]] == [FPS] * 2
    read(model=object(), motion_score=7)
    assert ["motion score" in text for text in said] == [False, False, True, True] and "motion score: 7" in said[2]


def test_the_lesson_of_a_colour_needs_no_file_and_each_caption_says_its_speed(read, pack, monkeypatch):
    world, dataset = pack("opensora_core.evaluation.world"), pack("nodes.host.dataset")
    monkeypatch.setattr(world, "LESSON", 2)
    said = []
    encode = dataset.prompts.encode
    monkeypatch.setattr(
        dataset.prompts, "encode", lambda clip, texts, *args, **named: said.extend(texts) or encode(clip, texts, *args, **named)
    )
    latents, positive = read(folder=dataset.LESSON)
    assert [latent["samples"].shape for latent in latents] == [(1, 16, 5, 8, 8)] * 4 and len(positive) == 4
    scenes = world.lesson("charcoal")
    assert said == [f"{scene.caption}. 24 FPS. {scene.motion_score} motion score." for scene in scenes]
    assert ["charcoal" in text for text in said] == [True, True, False, False]


def test_the_host_s_trainer_learns_from_it(read, pack, small, run_node):
    """The loss falls on what it is shown, and what it learned changes the model through the host's loader."""
    latents, positive = read()
    (model,) = run_node("OpenSoraModelLoader", model_name=pack("nodes.host.paths").SMALL, precision="fp32")
    one = {
        "batch_size": 1, "grad_accumulation_steps": 1, "steps": 30, "learning_rate": 2e-3, "rank": 4, "optimizer": "AdamW", "loss_function": "MSE",
        "seed": 1, "training_dtype": "fp32", "lora_dtype": "fp32", "quantized_backward": False, "algorithm": "LoRA", "gradient_checkpointing": False,
        "checkpoint_depth": 1, "offloading": False, "existing_lora": "[None]", "bucket_mode": False, "bypass_mode": False,
    }  # fmt: skip
    lists = {name: [value] for name, value in one.items()}
    import nodes

    trainer = nodes.NODE_CLASS_MAPPINGS["TrainLoraNode"]
    output = trainer.execute(model=[model], latents=latents, positive=positive, **lists)
    lora, losses, _ = output.args
    assert sum(losses["loss"][-10:]) < sum(losses["loss"][:10])
    (taught,) = run_node("LoraModelLoader", model=model, lora=lora, strength_model=1.0, bypass=False)
    assert len(taught.patches) > 10
