"""The built-in model: read as official files are, 64x64 and 17 frames where nothing else is asked, a sentence where something else is."""

import hashlib
from pathlib import Path

import pytest
import torch

from opensora_core.checkpoint.files import read_header
from opensora_core.cli import build_parser, main
from opensora_core.commands.frames import call_arguments
from opensora_core.commands.model import pipeline
from opensora_core.commands.options import DONE, GenerateOptions, taken
from opensora_core.encoders.tokens import read_tokenizer
from opensora_core.media.video import read_image
from opensora_core.memory.footprint import sizes_of_files
from opensora_core.pipeline import OpenSoraPipeline
from opensora_core.run import files as model_files
from opensora_core.run.files import ModelFiles
from training import export, tokenizers


@pytest.fixture
def small(small_checkpoint, monkeypatch):
    """A model of the built-in one's sizes, with random weights, in its place."""
    monkeypatch.setattr(model_files, "SMALL", small_checkpoint)
    return small_checkpoint


def arguments(*words):
    options = taken(GenerateOptions, build_parser().parse_args(["generate", "--prompt", "x", *words]))
    found = call_arguments(options, pipeline(options).files)
    return found["height"], found["width"], found["num_frames"]


def test_what_is_made_where_nothing_is_asked(small, tiny_checkpoint):
    files = ModelFiles.in_folder(tiny_checkpoint)
    parts = [str(word) for part in ("dit", "vae", "t5", "clip") for word in (f"--{part}", getattr(files, part))]
    assert arguments() == arguments("--model", "small") == (64, 64, 17)
    assert arguments("--model", str(tiny_checkpoint)) == (192, 336, 129)
    assert arguments(*parts) == (192, 336, 129)
    assert arguments("--num-frames", "5") == (64, 64, 5)
    assert arguments("--resolution", "256px") == (192, 336, 17)
    assert arguments("--width", "96", "--height", "32", "--num-frames", "1s") == (32, 96, 25)


def test_the_pipeline_makes_the_clip_it_was_trained_on(small):
    pipe = OpenSoraPipeline.from_pretrained()
    result = pipe("A Red circle moving left on a blue background", num_inference_steps=2, seed=1)
    assert len(result.frames[0]) == 17 and result.frames[0][0].shape == (64, 64, 3)
    assert result.notes == []
    assert result.prompt.condition.positive["context"].shape == (1, 32, 64)
    again = pipe("a red circle moving left on a blue background", num_inference_steps=2, seed=1)
    assert torch.equal(again.latents, result.latents), "capitals change nothing"
    other = pipe("a green circle moving left on a blue background", num_inference_steps=2, seed=1)
    assert not torch.equal(other.latents, result.latents)


def test_other_sizes_are_made_with_a_sentence(small, tiny_checkpoint, caplog):
    result = OpenSoraPipeline.from_pretrained("small")("x", width=96, height=48, num_frames=5, num_inference_steps=1, seed=1)
    assert len(result.frames[0]) == 5 and result.frames[0][0].shape == (48, 96, 3)
    assert "trained on clips of 64x64 pixels and 17 frames; 96x48 and 5 frames" in result.notes[0]
    assert result.notes[0] in caplog.text
    assert ModelFiles.in_folder(tiny_checkpoint).clip_note(48, 96, 5) == ""
    assert ModelFiles.in_folder(tiny_checkpoint).usual.size == (192, 336, 129)


def test_a_prompt_longer_than_it_reads_is_named(small, caplog):
    OpenSoraPipeline.from_pretrained("small").encode_prompt("a red circle " * 20)
    assert "longer than the 32 that T5 reads" in caplog.text


def test_on_the_command_line_it_is_the_default(small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "--prompt", "a red circle", "--num-steps", "1", "--seed", "3", "--out", "a.mp4", "--device", "cpu"]) == DONE
    assert main(["generate", "--prompt", "x", "--num-frames", "1", "--num-steps", "1", "--out", "b.png", "--device", "cpu"]) == DONE
    assert read_image("b.png").shape == (1, 64, 64, 3)
    assert main(["inspect", "--plan", "small", "--device", "cpu"]) == DONE
    assert "64x64" in capsys.readouterr().out


def test_plans_know_its_text_length(small):
    files = ModelFiles.in_folder("small")
    assert sizes_of_files(t5=files.t5).text.length == 32


# The files that are shipped

SHIPPED = Path(__file__).resolve().parents[2] / "opensora_core" / "assets" / "small"


def test_shipped_files_are_whole_and_small_enough():
    assert export.check(SHIPPED) <= 12_000_000
    for header in (read_header(path) for path in SHIPPED.rglob("*.safetensors")):
        assert {info.dtype for info in header.tensors.values()} == {"F16"}


def test_the_card_is_of_the_shipped_files():
    card = (SHIPPED / "MODEL_CARD.md").read_text(encoding="utf-8")
    for path in SHIPPED.rglob("*.safetensors"):
        assert hashlib.sha256(path.read_bytes()).hexdigest()[:16] in card, f"{path.name} was exported again: write the card again"


def test_shipped_tokenizers_are_those_of_the_world(tmp_path):
    made = tokenizers.write(tmp_path)
    for kind, folder in (("T5", tokenizers.T5_FOLDER), ("CLIP", tokenizers.CLIP_FOLDER)):
        found, expected = (read_tokenizer(kind, root / folder) for root in (SHIPPED, made))
        assert (found.size, found.length, found.end) == (expected.size, expected.length, expected.end)
        assert all(found.ids(text) == expected.ids(text) for text in tokenizers.captions()[::50])
