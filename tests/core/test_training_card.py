"""The card of the small model: its figures are those of the report, the states and the files, and what is missed is said."""

import json
import shutil

import pytest
import torch

from opensora_core.evaluation.score import Line, Share
from training import card

SETTINGS = {"num_prompts": 96, "num_steps": 40, "guidance": 7.5, "guidance_img": 3.0, "seed": 0, "dtype": "float32", "device": "cpu"}


@pytest.fixture
def folder(tmp_path):
    for step, name in enumerate(card.STAGES):
        torch.save({"step": 1000 + step, "seconds": 600.0 * (step + 1), "networks": torch.zeros(2)}, tmp_path / f"{name}.pt")
    return tmp_path


def report(*lines):
    return json.loads(json.dumps({"runs": [{"settings": SETTINGS, "figures": [line.as_json() for line in lines]}]}))


def test_every_figure_is_one_that_was_measured(small_checkpoint, folder, tmp_path):
    directory = shutil.copytree(small_checkpoint, tmp_path / "small")
    lines = [
        Line("text to video, held out", "shape", Share(60, 96), chance=1 / 3, must="at least 85%", is_reached=False),
        Line("text to video, held out", "colour", Share(95, 96), chance=1 / 6, must="at least 95%", is_reached=True),
        Line("text to video, held out", "speed", None, "r", must="at least 0.6", is_reached=False),
        Line("VAE", "PSNR", 31.234, "dB", interval=(31.0, 31.5)),
    ]
    text = card.write(directory, report(*lines), folder, "two cores of a test").read_text(encoding="utf-8")
    assert "| text to video, held out | shape | 62.5% (60 of 96) | 52.5% to 71.5% | 33.3% | at least 85% | **no** |" in text
    assert "| VAE | PSNR | 31.23 dB | 31.00 to 31.50 |  |  |  |" in text
    assert "1 of 3 requirements are reached. Not reached:\n\n- text to video, held out: shape (at least 85%)" in text
    assert "not measurable" in text
    assert "| VAE | 1,000 | 10 |" in text and "| clips encoded | 1,001 | 20 |" in text and "1,002 | 30 |" in text
    assert "96 prompts of each kind, 40 steps, guidance 7.5" in text and "Machine: two cores of a test." in text
    assert "95,680" in text, "parameters of T5"
    assert "{" not in text.replace("```", "")


def test_a_model_that_reaches_everything(small_checkpoint, folder, tmp_path):
    directory = shutil.copytree(small_checkpoint, tmp_path / "small")
    line = Line("VAE", "PSNR", 31.0, "dB", must="at least 30 dB", is_reached=True)
    text = card.write(directory, report(line), folder, "a test").read_text(encoding="utf-8")
    assert "1 of 1 requirements are reached.\n" in text and "Not reached" not in text
    with pytest.raises(FileNotFoundError):
        card.write(directory, report(line), tmp_path / "nowhere", "a test")
