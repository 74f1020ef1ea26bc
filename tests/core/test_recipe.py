"""A video says how it was made, without a path of anyone's machine, and the line that makes it again is printed."""

import json
import shlex

import imageio_ffmpeg
import pytest
import torch

from opensora_core.cli import main
from opensora_core.media.recipe import as_tag, recipe_of, tags
from opensora_core.media.video import save_video

FRAMES = torch.zeros(5, 32, 48, 3)


def test_a_video_is_made_again_from_what_it_says(small_checkpoint, tmp_path, capsys, monkeypatch):
    from opensora_core.run import files

    monkeypatch.setattr(files, "SMALL", small_checkpoint)
    monkeypatch.setattr("opensora_core.commands.recipe.SMALL", small_checkpoint)
    prompt = 'a "red" circle; 中文\nsecond line'
    first = ["--prompt", prompt, "--num-frames", "5", "--num-steps", "1", "--seed", "7", "--guidance", "5"]
    assert main(["generate", *first, "--out", str(tmp_path / "one.mp4")]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "one.mp4")]) == 0
    said = capsys.readouterr().out
    assert "seed: 7" in said and "Open_Sora_v2.safetensors" in said and str(tmp_path) not in said
    assert str(tmp_path) not in json.dumps(recipe_of(tmp_path / "one.mp4"))
    assert main(["inspect", "--as-command", str(tmp_path / "one.mp4")]) == 0
    words = shlex.split(capsys.readouterr().out)
    assert words[:4] == ["python", "-m", "opensora_core", "generate"] and prompt in words
    assert main([*words[3:], "--out", str(tmp_path / "two.mp4")]) == 0
    pixels = [b"".join(list(imageio_ffmpeg.read_frames(str(tmp_path / name)))[1:]) for name in ("one.mp4", "two.mp4")]
    assert pixels[0] == pixels[1]


def test_comfyuis_tags_are_read(tmp_path):
    graph = {
        "1": {"class_type": "OpenSoraT5TextEncode", "inputs": {"prompt": ["5", 0], "fps": 24, "motion_score": 4, "negative_prompt": ""}},
        "2": {"class_type": "OpenSoraEmptyLatentVideo", "inputs": {"resolution": "256px", "aspect_ratio": "16:9", "num_frames": 129, "length": "5s", "width": 336}},
        "3": {"class_type": "OpenSoraRectifiedFlowSampler", "inputs": {"seed": 3, "steps": 50, "text_guidance": 7.5}},
        "5": {"class_type": "PrimitiveStringMultiline", "inputs": {"value": "waves"}},
    }  # fmt: skip
    path = tmp_path / "comfy.mp4"
    writer = imageio_ffmpeg.write_frames(
        str(path),
        (48, 32),
        output_params=["-movflags", "use_metadata_tags", "-metadata", f"prompt={json.dumps(graph)}", "-metadata", "workflow={}"],
    )
    writer.send(None)
    writer.send(bytes(48 * 32 * 3))
    writer.close()
    assert set(tags(path)) >= {"prompt", "workflow"}
    from opensora_core.commands.recipe import as_command

    words = as_command(path).split()
    expected = "--prompt waves --motion-score 4 --fps 24 --resolution 256px --aspect-ratio 16:9 --num-frames 5s --seed 3 --num-steps 50"
    assert words[4:] == [*expected.split(), "--guidance", "7.5"]


@pytest.mark.parametrize("damage", [lambda data: data[:200], lambda data: b"", lambda data: b"\xff" * 400], ids=["cut", "empty", "noise"])
def test_what_is_no_video_is_said(damage, tmp_path, capsys):
    path = tmp_path / "clip.mp4"
    save_video(FRAMES, path, comment=as_tag({"prompt": "x"}))
    path.write_bytes(damage(path.read_bytes()))
    assert main(["inspect", str(path)]) == 2
    assert "clip.mp4" in capsys.readouterr().err


def test_a_video_that_says_nothing_is_said(tmp_path, capsys):
    save_video(FRAMES, tmp_path / "clip.mp4")
    assert main(["inspect", str(tmp_path / "clip.mp4")]) == 2
    assert "does not say how it was made" in capsys.readouterr().err


def test_a_file_that_cannot_be_used_ends_as_a_bad_one(tmp_path, capsys):
    from safetensors.torch import save_file

    save_file({"some.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    assert main(["inspect", str(tmp_path / "other.safetensors")]) == 2
    assert capsys.readouterr().out


def test_help_opens_with_three_examples(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    assert capsys.readouterr().out[:700].count("python -m opensora_core generate --") == 4
