"""Every command and example of README.md and docs/COMMAND_LINE.md is run as written, on the small random checkpoint and a short clip."""

import re
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from opensora_core.media.video import save_video

ROOT = Path(__file__).resolve().parents[2]
READMES = ("README.md", "README.zh.md")
PAGES = {"README.md": "docs/COMMAND_LINE.md", "README.zh.md": "docs/COMMAND_LINE.zh.md"}  # what a README leads on to
SHORT = ["--num-frames", "5", "--num-steps", "1"]  # appended: the last of two equal options holds
SHORT_BENCHMARK = [*SHORT, "--warmup-count", "0", "--eval-count", "1"]


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", whole(name), re.S)


def whole(name: str) -> str:
    """A README and the page of the command line."""
    return "\n".join((ROOT / page).read_text(encoding="utf-8") for page in (name, PAGES[name]))


def commands(name: str) -> list[list[str]]:
    """The words of every command in the bash blocks, comments left out."""
    lines = [line for block in blocks(name, "bash") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


OURS = [words[3:] for words in commands("README.md") if words[:3] == ["python", "-m", "opensora_core"]]


@pytest.fixture
def hub_folder(tiny_checkpoint, small_checkpoint, tmp_path, monkeypatch) -> Path:
    """A working directory that looks like a reader's: the checkpoint's folder, one of its files, pictures, a clip, a table of videos."""
    from PIL import Image

    from demo import tiny_flux

    monkeypatch.setattr("opensora_core.run.files.SMALL", small_checkpoint)
    (tmp_path / "Open-Sora-v2").symlink_to(tiny_checkpoint)
    (tmp_path / "Open_Sora_v2.safetensors").symlink_to(tiny_checkpoint / "Open_Sora_v2.safetensors")
    tiny_flux.write(tmp_path)
    for name in ("first.png", "last.png"):
        Image.new("RGB", (200, 120), (90, 140, 200)).save(tmp_path / name)
    save_video(torch.zeros(33, 32, 48, 3), tmp_path / "waves.mp4")
    (table,) = blocks("README.md", "csv")
    (tmp_path / "videos.csv").write_text(table.replace("4s", "5").replace("129", "5"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", READMES)
def test_readme_opens_with_the_two_commands(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert text.startswith("# Open-Sora")
    assert text.index("make demo") < text.index("make test") < text.index("## ")


@pytest.mark.parametrize("name", READMES)
def test_every_command_is_one_that_is_known(name):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert commands(name)
    for words in commands(name):
        known = words[0] == "make" and set(words[1:]) <= targets
        known |= words[:2] == ["pip", "install"] and (words[2:] == ["."] or (words[2] == "-r" and (ROOT / words[3]).is_file()))
        known |= words[:3] == ["python", "-m", "opensora_core"] and words[3:] in OURS
        known |= words[:3] == ["python", "-m", "demo"] or words[:2] == ["comfy", "node"]
        assert known, " ".join(words)


@pytest.mark.parametrize("words", OURS, ids=lambda words: " ".join(words)[:60])
def test_command_does_what_readme_says(words, hub_folder, capsys):
    from opensora_core.cli import main

    extra = {"generate": SHORT, "benchmark": SHORT_BENCHMARK}.get(words[0], [])
    for mode, frames in (("--ref-end", "9"), ("v2v_head", "37")):  # the fewest that leave some to be made
        extra = [*extra, "--num-frames", frames] if mode in words else extra
    extra = [*extra, "--image-steps", "1", "--image-resolution", "256px"] if "--t2i2v" in words else extra
    assert main(words + extra) in ((0, 1) if "--check" in words else (0,)), capsys.readouterr().err
    for option in ("--out", "--benchmark-save-path"):
        if option in words:
            assert (hub_folder / words[words.index(option) + 1]).stat().st_size > 0
    if words[0] == "quantize":
        assert (hub_folder / words[2]).stat().st_size > 0
    if words[0] == "inspect":
        assert "Open-Sora 2.0" in capsys.readouterr().out


@pytest.mark.parametrize("code", blocks("README.md", "python"))
def test_python_example_runs(code, hub_folder):
    short = code.replace("num_frames=17", "num_frames=5").replace("num_inference_steps=50", "num_inference_steps=1")
    assert short != code
    exec(compile(short, "README.md", "exec"), {})  # noqa: S102 - our own README, shortened
    assert (hub_folder / "rain.mp4").stat().st_size > 0


def test_make_demo_makes_videos_and_says_what_they_show(small_checkpoint, tmp_path, capfd, monkeypatch):
    from PIL import Image

    from demo import run
    from opensora_core.run import files as model_files

    assert "$(PY) -m demo.run" in (ROOT / "Makefile").read_text(), "what `make demo` runs"
    monkeypatch.setattr(model_files, "SMALL", small_checkpoint)
    assert run.main(["--no-host", "--out", str(tmp_path), "--num-frames", "5", "--num-steps", "1"]) == 0
    told = capfd.readouterr().out
    assert len(run.WISHES) == 4 and sum(wish.has_picture for wish in run.WISHES) == 1
    for wish in run.WISHES:
        assert (tmp_path / f"{wish.name}.mp4").stat().st_size > 0
        assert re.search(rf"{wish.name}\.mp4: (asked for an? {wish.asked.colour} {wish.asked.shape}.*shows|shows) ", told)
    assert Image.open(tmp_path / "contact-sheet.png").size == (9 * 132, 4 * 150)
    assert "with the built-in model; 0 show what was asked" in told, "random weights cannot"
    assert Image.open(tmp_path / "first.png").getpixel((32, 32)) == (50, 165, 70)


def test_the_demo_counts_what_is_right(monkeypatch, tmp_path, capfd):
    """Ground truth in place of the model's videos."""
    import numpy

    from demo import run
    from opensora_core.media.video import to_uint8

    def ideal(pipe, demo, wish, picture):
        asked = wish.asked if wish.name != "yellow-square-up" else replace(wish.asked, direction="down")
        scene = run.world.Scene(asked, run.MOTION_SCORE, 11.0, (32.0, 32.0), "")
        frames = numpy.stack(to_uint8(scene.render()))
        return run.Made(wish.name, tmp_path / f"{wish.name}.mp4", frames, run.judge(frames, wish.asked, run.MOTION_SCORE))

    monkeypatch.setattr(run, "generate", ideal)
    monkeypatch.setattr(run.OpenSoraPipeline, "from_pretrained", classmethod(lambda cls, model: SimpleNamespace(to=lambda device: cls)))
    assert run.main(["--no-host", "--out", str(tmp_path)]) == 0
    told = capfd.readouterr().out
    assert "3 show what was asked" in told and "red-circle-right.mp4: shows a red circle moving right on blue: right" in told
    assert "asked for a yellow square moving up on black, shows a yellow square moving down on black: wrong direction" in told


def test_links_between_our_own_pages_lead_somewhere():
    for name in (
        *READMES,
        *PAGES.values(),
        "docs/NODES.md",
        "docs/NODES.zh.md",
        "docs/MANY_MACHINES.md",
        "docs/MANY_MACHINES.zh.md",
        "docs/MOVING.md",
        "docs/MOVING.zh.md",
        "CHANGELOG.md",
        *(str(path.relative_to(ROOT)) for path in (ROOT / "web" / "docs").rglob("*.md")),
    ):
        page = ROOT / name
        if page.is_file():
            for target in re.findall(r"\]\((?!https?://|#)([^)]+)\)", page.read_text(encoding="utf-8")):
                # ComfyUI looks for the pictures of a help page from the folder of all of them.
                folder = ROOT / "web" / "docs" if name.startswith("web/docs/") and target.startswith("pictures/") else page.parent
                assert (folder / target).exists(), f"{name}: {target}"


def test_both_readmes_show_the_same_examples_in_as_many_sections():
    for language in ("csv", "python"):
        examples = [blocks(name, language) for name in READMES]
        assert examples[0] == examples[1] and len(examples[0]) == 1
    assert commands(READMES[0]) == commands(READMES[1])
    texts = [whole(name) for name in READMES]
    levels = [re.findall(r"^(#+) ", text, re.M) for text in texts]
    rows = [text.count("\n|") for text in texts]
    options = [set(re.findall(r"`(--[a-z0-9-]+)", text)) for text in texts]
    assert levels[0] == levels[1] and rows[0] == rows[1] and options[0] == options[1]


@pytest.mark.parametrize("name", READMES)
def test_the_memory_table_is_what_the_command_counts(name, capsys):
    """Peaks of the released sizes for a card on which everything has room, and streamed block by block."""
    from opensora_core.cli import main

    rows = re.findall(r"^\| (256px|768px)[^|]*\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", (ROOT / name).read_text(encoding="utf-8"), re.M)
    assert [row[0] for row in rows] == ["256px", "256px", "768px", "768px"]
    for (size, *figures), offload in zip(rows, ["auto", "minimal"] * 2, strict=True):
        for precision, figure in zip(("auto", "fp8_e4m3fn", "nf4"), figures, strict=True):
            words = ["--gpu-gib", "96", "--ram-gib", "96", "--resolution", size, "--precision", precision, "--offload", offload]
            assert main(["inspect", "--plan", *words]) == 0
            peaks = [float(peak) for peak in re.findall(r"^  (?:text|sampling|decode) +([\d.]+)$", capsys.readouterr().out, re.M)]
            assert max(peaks) == float(figure), (size, precision, offload)
