"""The command line as a person meets it: flags, files, exit codes, one sentence for every refusal."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import numpy
import pytest
import torch
from PIL import Image

from opensora_core.cli import build_parser, main
from opensora_core.commands import jobs
from opensora_core.commands.frames import call_arguments
from opensora_core.commands.model import pipeline, with_usual
from opensora_core.commands.options import DONE, INTERRUPTED, REFUSED, SOME_FAILED, GenerateOptions, taken
from opensora_core.errors import OpenSoraError
from opensora_core.families.table import DEFAULT
from opensora_core.media import video
from opensora_core.media.latent_file import read_latents
from opensora_core.media.video import read_clip
from opensora_core.memory import decode as video_vae
from opensora_core.pipeline import OpenSoraPipeline

ROOT = Path(__file__).resolve().parents[2]
SIZE = ["--width", "48", "--height", "32", "--num-frames", "5", "--num-steps", "2", "--device", "cpu", "--seed", "5"]

BIGGER = ["--width", "96", "--height", "64"]  # the last of two equal options holds

# The contract's flags that have landed: adding is free, renaming or dropping one fails.
SHARED = """
    --model --dit --vae --t5 --clip --prompt --negative-prompt --resolution --aspect-ratio --width --height --num-frames --fps --num-steps
    --guidance --guidance-img --motion-score --cond-type --ref --ref-end --seed --device --dtype --precision --offload --attention
    --budget-gib --decode-policy --tokenizers --lora --lora-strength
""".split()
FLAGS = {
    "generate": [*SHARED, "--num-samples", "--out"],
    "benchmark": [*SHARED, "--warmup-count", "--eval-count", "--benchmark-save-path"],
    "inspect": ["--check"],
}
DEFAULTS = {
    "num_frames": None, "fps": 24, "num_steps": 50, "guidance": 7.5, "guidance_img": 3.0, "motion_score": None, "num_samples": 1,
    "device": "auto", "dtype": "auto", "precision": "auto", "offload": "auto", "attention": "auto", "decode_policy": "auto",
    "negative_prompt": "", "seed": None, "lora_strength": 1.0, "budget_gib": None,
}  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def generate(tiny_checkpoint, here):
    """Run `generate` in this process with a small size; what is given later on the line holds."""

    def run(*arguments: str, prompt: str = "a cat") -> int:
        return main(["generate", "--model", str(tiny_checkpoint), "--prompt", prompt, *SIZE, *arguments])

    return run


def run_process(*arguments, **options) -> subprocess.CompletedProcess:
    """`python -m opensora_core` in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "opensora_core", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, **options)


def read_video(path) -> tuple[dict, list[bytes]]:
    reader = imageio_ffmpeg.read_frames(str(path))
    return next(reader), list(reader)


def test_text_to_video_writes_an_mp4_and_says_where(tiny_checkpoint, tmp_path):
    done = run_process("generate", "--model", tiny_checkpoint, "--prompt", "a cat", *SIZE, *BIGGER, "--out", "cat.mp4", cwd=tmp_path)
    assert done.returncode == DONE, done.stderr
    assert done.stdout == "cat.mp4\n"
    meta, frames = read_video(tmp_path / "cat.mp4")
    assert len(frames) == 5 and meta["size"] == (96, 64) and meta["fps"] == 24
    assert meta["codec"] == "h264" and meta["pix_fmt"].startswith("yuv420p")
    assert (tmp_path / "cat.txt").read_text() == "a cat. 24 FPS. 4 motion score.\n"
    for word in ("seed 5", "text", "sampling", "4 forwards, 2 saved", "decode"):
        assert word in done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr


@pytest.mark.parametrize(
    "pictures",
    [["--ref", "red.png"], ["--ref-end", "red.png"], ["--cond-type", "i2v_loop", "--ref", "red.png"]],
    ids=lambda words: words[-2],
)
def test_image_to_video_uses_the_picture(generate, here, capsys, pictures):
    Image.new("RGB", (96, 64), (255, 30, 30)).save("red.png")
    assert generate("--num-frames", "9", "--out", "out", *pictures) == DONE
    assert generate("--num-frames", "9", "--out", "out") == DONE
    assert capsys.readouterr().out.split() == ["out/video_0000.mp4", "out/video_0001.mp4"]
    assert read_video("out/video_0000.mp4")[1] != read_video("out/video_0001.mp4")[1]


def test_one_frame_is_a_picture(generate, here, capsys):
    assert generate("--num-frames", "1", "--out", "still.mp4") == DONE
    assert capsys.readouterr().out == "still.png\n"
    assert Image.open("still.png").size == (48, 32)


def test_samples_take_the_next_seeds_and_nothing_is_overwritten(generate, here, capsys):
    assert generate("--num-samples", "2", "--out", "clip.mp4") == DONE
    assert generate("--seed", "6", "--out", "clip.mp4") == DONE
    told = capsys.readouterr()
    assert told.out.split() == ["clip.mp4", "clip_1.mp4", "clip_2.mp4"]
    assert "seed 5" in told.err and "seed 6" in told.err and "clip.mp4 is there already; writing clip_2.mp4" in told.err
    first, second, again = (Path(name).read_bytes() for name in ("clip.mp4", "clip_1.mp4", "clip_2.mp4"))
    assert first != second and second == again


def test_what_has_taken_a_name_is_said(generate, here, capsys):
    (here / "clip.latent").touch()
    assert generate("--out", "clip.mp4") == DONE
    assert "clip.latent is there already; writing clip_1.mp4" in capsys.readouterr().err


def test_the_prompt_is_encoded_once_for_all_samples(generate, here, monkeypatch):
    from opensora_core.run import text

    encoded, real = [], text._encode
    monkeypatch.setattr(jobs, "ENCODED_TOGETHER", 1)
    monkeypatch.setattr(text, "_encode", lambda networks, texts, progress: encoded.extend(texts) or real(networks, texts, progress))
    assert generate("--num-samples", "2") == DONE
    assert encoded == [("a cat. 24 FPS. 4 motion score.", "")] and len(list(Path("outputs").glob("*.mp4"))) == 2


@pytest.mark.parametrize("offload", [["resident"], ["minimal"], ["budget"], ["budget", "--budget-gib", "0.003"]])
def test_offload_attention_and_precision_choices_make_the_same_video(generate, here, capsys, offload):
    assert generate("--out", "auto.mp4") == DONE
    assert generate("--out", "other.mp4", "--offload", *offload, "--attention", "sliced", "--dtype", "fp32", "--precision", "fp32") == DONE
    assert read_video("auto.mp4")[1] == read_video("other.mp4")[1]


def test_seconds_are_counted_in_frames_and_said(generate, here, capsys):
    assert generate("--num-frames", "2s", "--fps", "4", "--out", "clip.mp4", "--motion-score", "0") == DONE
    told = capsys.readouterr().err
    assert "2s at 4 FPS: 9 frames" in told
    meta, frames = read_video("clip.mp4")
    assert len(frames) == 9 and meta["fps"] == 4
    assert Path("clip.txt").read_text() == "a cat. 4 FPS.\n"


def arguments_of(*words: str) -> dict:
    options = taken(GenerateOptions, build_parser().parse_args(["generate", "--prompt", "x", *words]))
    return call_arguments(options, pipeline(options).files)


def test_four_seconds_are_97_frames_and_256px_is_192x336(tiny_checkpoint, capsys):
    found = arguments_of("--num-frames", "4s", "--model", str(tiny_checkpoint), "--resolution", "256px")
    assert (found["num_frames"], found["height"], found["width"]) == (97, 192, 336)
    assert "4s at 24 FPS: 97 frames" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "pictures"),
    [
        ([], (None, None)),
        (["--ref", "a"], ("a", None)),
        (["--ref-end", "b"], (None, "b")),
        (["--ref", "a", "--ref-end", "b"], ("a", "b")),
        (["--cond-type", "i2v_head", "--ref", "a"], ("a", None)),
        (["--cond-type", "i2v_tail", "--ref-end", "b"], (None, "b")),
        (["--cond-type", "i2v_tail", "--ref", "a"], (None, "a")),
        (["--cond-type", "i2v_loop", "--ref", "a"], ("a", "a")),
        (["--cond-type", "i2v_loop", "--ref", "a", "--ref-end", "b"], ("a", "b")),
    ],
)
def test_pictures_go_to_the_end_they_were_given_for(words, pictures):
    found = arguments_of(*words)
    assert (found["image"], found["last_image"]) == pictures


def test_single_files_may_be_named_instead_of_a_folder(tiny_checkpoint, here, capsys):
    parts = {
        "--dit": tiny_checkpoint / "Open_Sora_v2.safetensors",
        "--vae": tiny_checkpoint / "hunyuan_vae.safetensors",
        "--t5": tiny_checkpoint / "google" / "t5-v1_1-xxl",
        "--clip": tiny_checkpoint / "openai" / "clip-vit-large-patch14",
    }
    words = [str(word) for pair in parts.items() for word in pair]
    assert main(["generate", "--prompt", "a cat", *SIZE, *words, "--out", "a.mp4"]) == DONE
    assert main(["generate", "--prompt", "a cat", *SIZE, *words, "--out", "b.mp4", "--tokenizers", str(tiny_checkpoint)]) == DONE
    assert same_frames(Path("a.mp4"), Path("b.mp4"))


@pytest.mark.parametrize("name", ["700px", "768", "768P", "256px "])
def test_a_resolution_that_is_not_in_the_list_is_refused(name, tiny_checkpoint):
    with pytest.raises(OpenSoraError, match=f"Use one of 256px, .*, or a width and a height.*resolution='{name}' is not known"):
        arguments_of("--model", str(tiny_checkpoint), "--resolution", name)


REFUSALS = [
    (["--num-frames", "6"], "Use 5 or 9"),
    (["--num-frames", "1000001"], "at most 1025"),
    (["--num-frames", "99999999999s"], "at most 1025"),
    (["--width", "100000"], "at most 8192"),
    (["--num-steps", "1000000"], "at most 1000"),
    (["--num-frames", "many"], "is no length"),
    (["--num-frames", "0s"], "not a clip"),
    (["--width", "100"], "Use 32x96 (height x width)"),
    (["--num-steps", "0"], "at least 1"),
    (["--guidance", "nan"], "finite"),
    (["--guidance-img", "inf"], "finite"),
    (["--guidance", "-5"], "text_guidance=-5.0 is negative"),
    (["--guidance-img", "-0.1"], "image_guidance=-0.1 is negative"),
    (["--seed", "-1"], "out of range"),
    (["--num-samples", "0"], "at least 1"),
    (["--fps", "0"], "frame rate"),
    (["--motion-score", "99"], "motion_score"),
    (["--resolution", "256px"], "either --resolution"),
    (["--ref", "missing.png"], "missing.png does not exist"),
    (["--cond-type", "i2v_head"], "needs a picture"),
    (["--cond-type", "t2v", "--ref", "x.png"], "uses no picture"),
    (["--cond-type", "i2v_head", "--ref", "x.png", "--ref-end", "x.png"], "i2v_loop"),
    (["--cond-type", "i2v_tail", "--ref", "x.png", "--ref-end", "x.png"], "i2v_loop"),
    (["--cond-type", "i2v_loop", "--ref-end", "x.png"], "needs --ref"),
    (["--out", "clip.avi"], ".mp4"),
    (["--out", "clip.png"], "one picture"),
    (["--out", "notes.txt/clip.mp4"], "Choose another folder"),
    (["--out", f"{'n' * 300}.mp4"], "File name too long"),
    (["--out", f"{'n' * 240}.mp4"], "Choose a shorter name"),
    (["--out", "n" * 300], "File name too long"),
    (["--device", "nonsense"], "device"),
    (["--dtype", "fp32", "--precision", "bf16"], "contradict"),
    (["--dit", "x.safetensors"], "all four parts"),
    (["--lora", "missing.safetensors"], "does not exist"),
    (["--lora", "notes.txt"], "notes.txt"),
    (["--tokenizers", "nowhere"], "tokenizer"),
    (["--offload", "budget", "--budget-gib", "0"], "Give at least 0.00"),
    (["--offload", "budget", "--budget-gib", "nan"], "not an amount"),
    (["--offload", "budget", "--budget-gib", "0.001"], "minimal, which needs 0.00"),
    (["--budget-gib", "4"], "goes with the offload mode budget"),
    (["--lora-strength", "0.5"], "Add --lora FILE: --lora-strength 0.5 is that of no LoRA"),
]


@pytest.mark.parametrize(("words", "says"), REFUSALS, ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else "")
def test_bad_arguments_end_with_2_and_one_sentence_before_any_network_is_read(generate, here, capsys, monkeypatch, words, says):
    from opensora_core.run import parts as networks

    def read(*args, **kwargs):
        raise AssertionError("a network was read before the request was refused")

    for name in ("load_transformer", "load_vae", "load_t5", "load_clip"):
        monkeypatch.setattr(networks, name, read)
    (here / "notes.txt").write_text("not a folder, not weights")
    if "--dit" in words:
        assert main(["generate", "--prompt", "a cat", *SIZE, *words]) == REFUSED
    else:
        assert generate(*words) == REFUSED
    told = capsys.readouterr()
    lines = told.err.strip().splitlines()
    assert told.out == "" and lines[-1].startswith("error: ") and says in lines[-1]
    # A length in seconds is told in frames first.
    assert len(lines) == (2 if "s at 24 FPS: " in told.err else 1)
    assert not list(here.rglob("*.mp4"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["generate"], "--prompt"),
        (["generate", "--prompt", "x", "--num-steps", "few"], "--num-steps"),
        (["generate", "--prompt", "x", "--offload", "some"], "minimal"),
        (["generate", "--prompt", "x", "--cond-type", "v2v"], "i2v_loop"),
        (["generate", "--prompt", "x", "--num-step", "5"], "--num-step"),  # no abbreviations: they would freeze names by accident
        (["paint"], "generate"),
        ([], "COMMAND"),
    ],
)
def test_what_the_parser_refuses_ends_with_2_and_one_line(capsys, words, says):
    with pytest.raises(SystemExit) as ended:
        main(words)
    told = capsys.readouterr()
    assert ended.value.code == REFUSED and says in told.err and len(told.err.strip().splitlines()) == 1


def test_a_missing_built_in_model_is_said_in_one_sentence(here, capsys, monkeypatch):
    from opensora_core.run import files as model_files

    monkeypatch.setattr(model_files, "SMALL", here / "absent")
    assert main(["generate", "--prompt", "a cat", *SIZE]) == REFUSED
    told = capsys.readouterr().err
    assert told.startswith("error: ") and "Install it again" in told and told.count("\n") == 1


def test_a_bad_model_folder_ends_with_2_in_a_process_of_its_own(tmp_path):
    done = run_process("generate", "--model", tmp_path / "absent", "--prompt", "a cat", cwd=tmp_path)
    assert done.returncode == REFUSED and done.stdout == ""
    assert done.stderr.startswith("error: Give a folder that holds ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(28, "No space left on device"), "No space left"),
        (MemoryError(), "out of memory"),
        (RuntimeError("can't allocate memory: x"), "out of memory"),
    ],
)
def test_a_sample_that_fails_ends_with_1_and_the_others_are_made(generate, here, capsys, monkeypatch, error, says):
    real, count = video.save_video, []

    def fails_first(*args, **kwargs):
        count.append(1)
        if len(count) == 1:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(jobs, "save_video", fails_first)
    assert generate("--num-samples", "2", "--out", "clip.mp4") == SOME_FAILED
    told = capsys.readouterr()
    assert told.out == "clip.mp4\n" and "1 of 2 videos failed" in told.err
    assert f"video 1 (seed 5) failed: {says}" in told.err or says in told.err


def test_latents_that_no_memory_was_left_to_decode_are_kept(generate, tiny_checkpoint, here, capsys, monkeypatch):
    def no_room(*arguments, grid):
        raise torch.cuda.OutOfMemoryError

    still = ("--num-frames", "1", "--out", "still.png")  # the frame itself, with no codec between
    with monkeypatch.context() as patched:
        patched.setattr(video_vae, "tiled_decode", no_room)
        assert generate(*still) == generate(*still) == SOME_FAILED
    told = capsys.readouterr().err
    assert "They are in still.latent, which" in told and "They are in still_1.latent, which" in told and not Path("still.png").exists()
    assert Path("still.latent").stat().st_mode == Path("still_1.latent").stat().st_mode == new_file_mode(here)
    # What is kept is all that the frame is decoded from, in the scale of every .latent file.
    assert generate("--num-frames", "1", "--out", "there.png") == DONE
    pipe = OpenSoraPipeline.from_pretrained(tiny_checkpoint)
    frame = pipe.decode(read_latents("still.latent") * pipe.latent_scale)[0][0]
    assert numpy.abs(frame.astype(int) - numpy.asarray(Image.open("there.png")).astype(int)).max() <= 1


def new_file_mode(folder: Path) -> int:
    """What this process gives a file that it makes."""
    (folder / "plain").touch()
    return (folder / "plain").stat().st_mode


def test_a_defect_of_ours_is_not_hidden_behind_a_sentence(generate, monkeypatch):
    def defect(*args, **kwargs):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(jobs, "save_video", defect)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        generate()


def test_a_report_that_finds_no_room_is_one_sentence_and_leaves_nothing(here, capsys, monkeypatch):
    def full(self, *args, **kwargs):
        self.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    assert main(["evaluate", "--parts", "vision", "--num-prompts", "1", "--out", "scores.json"]) == REFUSED
    assert capsys.readouterr().err.splitlines()[-1] == f"error: scores.json: {os.strerror(errno.ENOSPC)}"
    assert list(here.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="SIGINT cannot be sent to one process on Windows")
def test_ctrl_c_ends_with_130_and_keeps_what_is_finished(tiny_checkpoint, tmp_path):
    command = [sys.executable, "-m", "opensora_core", "generate", "--model", str(tiny_checkpoint), "--prompt", "a cat", *SIZE]
    command += ["--num-samples", "500", "--out", "clip.mp4"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # Python leaves SIGINT ignored where a shell started the tests in the background; a terminal's default is restored.
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "clip.mp4\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == INTERRUPTED
    assert errors.strip().endswith("interrupted") and "Traceback" not in errors
    assert len(read_video(tmp_path / "clip.mp4")[1]) == 5
    assert not list(tmp_path.glob(".*partial*"))


@pytest.mark.skipif(os.name == "nt", reason="a pipe that nobody reads is another error on Windows")
def test_a_closed_standard_output_is_one_sentence(tiny_checkpoint, tmp_path):
    command = [sys.executable, "-m", "opensora_core", "generate", "--model", str(tiny_checkpoint), "--prompt", "a cat", *SIZE]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == SOME_FAILED and "Traceback" not in errors and "Exception ignored" not in errors
    assert errors.endswith("error: standard output is closed\n") and len(list(tmp_path.rglob("*.mp4"))) == 1


def test_benchmark_writes_a_report(tiny_checkpoint, here, capsys):
    words = ["--warmup-count", "1", "--eval-count", "2", "--benchmark-save-path", "new/report.json"]
    assert main(["benchmark", "--model", str(tiny_checkpoint), *SIZE, *words]) == DONE
    assert capsys.readouterr().out == "new/report.json\n"
    report = json.loads(Path("new/report.json").read_text())
    assert len(report["warmup"]) == 1 and len(report["runs"]) == 2
    stages = {"text", "condition", "sampling", "decode", "per_step", "total"}
    for run in report["runs"]:
        assert set(run["seconds"]) == stages and run["forwards"] == 4 and run["forwards_saved"] == 2
        assert run["seconds"]["total"] >= run["seconds"]["sampling"] == pytest.approx(2 * run["seconds"]["per_step"], abs=1e-4)
    first, second = (run["seconds"]["sampling"] for run in report["runs"])
    assert report["median_seconds"]["sampling"] == pytest.approx((first + second) / 2)
    assert report["peak_memory_bytes"] > 2**20 and report["hardware"]["cpu_cores"] >= 1 and report["versions"]["torch"]
    assert report["settings"]["height"] == 32 and report["settings"]["device"] == "cpu" and report["settings"]["dtype"] == "float32"
    assert report["settings"]["precision"] == "auto"
    assert str(tiny_checkpoint) not in Path("new/report.json").read_text()  # a report is made to be shown
    assert not list(here.rglob("*.mp4"))


@pytest.mark.parametrize(
    ("words", "says"),
    [(["--eval-count", "0"], "--eval-count"), (["--warmup-count", "-1"], "--warmup-count"), (["--benchmark-save-path", "."], "folder")],
)
def test_benchmark_refuses_what_it_cannot_measure(tiny_checkpoint, here, capsys, words, says):
    assert main(["benchmark", "--model", str(tiny_checkpoint), *SIZE, *words]) == REFUSED
    assert says in capsys.readouterr().err


def test_inspect_reports_and_checks(tiny_checkpoint, here, capsys):
    assert main(["inspect", str(tiny_checkpoint / "hunyuan_vae.safetensors")]) == DONE
    assert "VAE" in capsys.readouterr().out
    assert main(["inspect", "--check", str(tiny_checkpoint)]) == DONE
    assert "PASS" in capsys.readouterr().out
    (here / "broken.safetensors").write_bytes(b"\0" * 100)
    assert main(["inspect", "broken.safetensors"]) == REFUSED
    assert capsys.readouterr().err.startswith("error: Download the file again: broken.safetensors")
    assert main(["inspect", "absent.safetensors"]) == REFUSED


def test_inspect_knows_the_built_in_model_by_name(tiny_checkpoint, here, capsys, monkeypatch):
    monkeypatch.setattr("opensora_core.commands.inspect.SMALL", tiny_checkpoint)
    assert main(["inspect", "small"]) == DONE
    assert "This folder has every part of Open-Sora 2.0." in capsys.readouterr().out
    (here / "small").mkdir()  # what lies there goes first
    assert main(["inspect", "small"]) == REFUSED


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["small", "--gpu-gib", "8"], "Add --plan: --gpu-gib is about a video"),
        (["small", "--check", "--num-frames", "17"], "--num-frames is about a video"),
        (["--plan", "--aspect-ratio", "image"], "Name the ratio here, such as 16:9"),
    ],
)
def test_inspect_passes_over_nothing_that_it_is_given(words, says, capsys):
    assert main(["inspect", *words]) == REFUSED
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("command", FLAGS)
def test_help_lists_the_contract_s_flags(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert set(FLAGS[command]) <= set(re.findall(r"(?<![\w-])--[a-z0-9-]+", said)) and not re.search(r"default\s+\)", said)


def test_the_home_folder_is_meant_behind_an_equals_sign_too(generate, here, monkeypatch):
    """A shell knows ~ at the beginning of a word alone."""
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.setenv("USERPROFILE", str(here))
    Image.new("RGB", (32, 32)).save(here / "a.png")
    assert generate("--ref=~/a.png", "--out=~/made") == DONE and len(list((here / "made").glob("*.mp4"))) == 1
    args = build_parser().parse_args(["generate", "--prompt", "~/x", "--reference-path=~/a.png;b ~.png", "--lora=~/l"])
    found = taken(GenerateOptions, args)
    assert (found.prompt, found.reference_path, found.lora) == ("~/x", f"{here}/a.png;b ~.png", f"{here}/l")


def test_defaults_are_the_contract_s():
    options = taken(GenerateOptions, build_parser().parse_args(["generate", "--prompt", "x"]))
    args = vars(with_usual(options, DEFAULT.usual))
    assert {name: args[name] for name in DEFAULTS} == DEFAULTS


def test_a_library_that_is_not_installed_is_one_sentence():
    code = "import sys; sys.modules['torch'] = None; from opensora_core.cli import main; sys.exit(main(['generate', '--prompt', 'x']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: Run `pip install .` in") and done.stderr.endswith("the library torch is not installed here\n")
    assert done.stderr.count("\n") == 1


def test_help_answers_without_torch():
    code = "import sys; sys.modules['torch'] = None; sys.modules['numpy'] = None\nfrom opensora_core.cli import main\nmain(['generate', '--help'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--num-frames" in done.stdout


def test_two_commands_into_one_folder_keep_all_their_videos(small_checkpoint, tmp_path):
    """Started together: every video that is named is there, and no two of them are one."""
    command = [sys.executable, "-m", "opensora_core", "generate", "--model", str(small_checkpoint), "--prompt", "a", "--num-samples", "3"]
    short = ["--num-frames", "5", "--num-steps", "1", "--width", "32", "--height", "32", "--out", str(tmp_path / "new")]
    runs = [
        subprocess.Popen([*command, *short, "--seed", str(10 * number)], cwd=ROOT, stdout=subprocess.PIPE, text=True) for number in (1, 2)
    ]
    named = [line for run in runs for line in run.communicate()[0].split()]
    assert [run.returncode for run in runs] == [0, 0]
    assert len(set(named)) == len(named) == 6 and all(Path(name).is_file() for name in named)
    assert {path.suffix for path in (tmp_path / "new").iterdir()} == {".mp4", ".txt"}


def test_what_the_end_needs_is_missed_before_a_weight_is_read(small_checkpoint, here, monkeypatch, capsys):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nowhere/ffmpeg")
    monkeypatch.setattr("opensora_core.run.text.encode", lambda *arguments: pytest.fail("a network was read"))
    Path("videos.csv").write_text("prompt\na\n")
    for asked in (["--prompt", "a"], ["--csv", "videos.csv"]):
        assert main(["generate", "--model", str(small_checkpoint), *asked, "--out", "videos"]) == REFUSED
        assert "IMAGEIO_FFMPEG_EXE names /nowhere/ffmpeg" in capsys.readouterr().err


def test_latents_of_a_video_that_cannot_be_written_are_kept_and_made_a_video(small_checkpoint, here, monkeypatch, capsys):
    from opensora_core.commands import jobs

    def full(*arguments, **named):
        raise OSError("still.mp4 could not be written: No space left on device.")

    command = [
        "generate",
        "--model",
        str(small_checkpoint),
        "--num-frames",
        "5",
        "--num-steps",
        "1",
        "--width",
        "32",
        "--height",
        "32",
        "--seed",
        "3",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "save_video", full)
        assert main([*command, "--prompt", "a", "--out", "still.mp4"]) == SOME_FAILED
    told = capsys.readouterr().err
    assert "No space left on device" in told and "`generate --decode still_finished.latent`" in told
    assert main([*command, "--prompt", "a", "--out", "direct.mp4"]) == DONE
    assert main(["generate", "--model", str(small_checkpoint), "--decode", "still_finished.latent", "--out", "still.mp4"]) == DONE
    assert same_frames(Path("still.mp4"), Path("direct.mp4"))


def test_a_whole_video_is_named_though_its_prompt_finds_no_room(small_checkpoint, here, capsys):
    Path("still.txt").mkdir()
    short = ["--num-frames", "5", "--num-steps", "1", "--width", "32", "--height", "32"]
    assert main(["generate", "--model", str(small_checkpoint), "--prompt", "a", *short, "--out", "still.mp4"]) == DONE
    assert Path(capsys.readouterr().out.strip()).is_file()


def same_frames(one, other) -> bool:
    """Whether two videos show the same; what they say of how they were made may differ."""
    return torch.equal(*(read_clip(path, 999, from_end=False) for path in (one, other)))
