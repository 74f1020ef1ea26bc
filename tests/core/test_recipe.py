"""A video says how it was made, without a path of anyone's machine, and the line that makes it again is printed."""

import json
import shlex

import imageio_ffmpeg
import pytest
import torch

from opensora_core.cli import main
from opensora_core.errors import OpenSoraError
from opensora_core.media.recipe import PROGRAM, as_tag, recipe_of, tags
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


TINY = ["--width", "48", "--height", "32", "--num-steps", "2", "--model", "{tiny}"]
MODES = {
    "text": ["--prompt", "-a fox", *TINY, "--num-frames", "5", "--motion-score", "0", "--negative-prompt", "grey/blurry"],
    "first": ["--prompt", "a fox", *TINY, "--num-frames", "9", "--ref", "{here}/first.png", "--fit", "pad", "--strength", "0.5"],
    "first and last": ["--prompt", "a fox", *TINY, "--num-frames", "9", "--ref", "{here}/first.png", "--ref-end", "{here}/last.png"],
    "last": ["--prompt", "a fox", *TINY, "--num-frames", "9", "--cond-type", "i2v_tail", "--ref", "{here}/last.png"],
    "clip": ["--prompt", "a fox", *TINY, "--num-frames", "37", "--ref", "{here}/clip.mp4", "--cond-type", "v2v_head"],
    "longer": ["--prompt", "a fox", *TINY, "--num-frames", "9", "--extend", "2", "--extend-prompt", "night", "--extend-prompt=-day"],
    "longer from latents": ["--prompt", "a fox", "--num-steps", "2", "--model", "{tiny}", "--extend", "1", "--extend-from", "{here}/kept.latent"],
    "drawn": ["--prompt", "a fox", *TINY, "--num-frames", "5", "--t2i2v", "--flux", "{here}/flux1-dev.safetensors", "--flux-vae", "{here}/ae.safetensors",
              "--image-steps", "1", "--image-resolution", "144px"],
    "fast": ["--prompt", "a fox", "--width", "48", "--height", "32", "--num-frames", "5", "--speed", "draft", "--model", "{tiny}"],
    "row": ["--csv", "{here}/list.csv", *TINY],
    "1.2": ["--prompt", 'a fox {{"reference_path": "{here}/first.png;{here}/last.png", "mask_strategy": "0;0,1,0,-1,1"}}', "--image-size", "40", "56",
            "--num-frames", "34", "--num-steps", "2", "--model", "{one}", "--aes", "7"],
    "1.2, loops": ["--prompt", "|0| a fox |1| a wolf", "--loop", "2", "--condition-frame-length", "5", "--image-size", "40", "56", "--num-frames", "34",
                   "--num-steps", "2", "--model", "{one}"],
    "1.2, loops as the scripts": ["--prompt", "|0| a fox |1| a wolf", "--loop", "2", "--parity", "scripts", "--condition-frame-length", "5", "--image-size",
                                  "40", "56", "--num-frames", "34", "--num-steps", "2", "--model", "{one}"],
    "CogVideoX": ["--prompt", "a fox", "--width", "80", "--height", "48", "--num-frames", "17", "--num-steps", "2", "--model", "{cog}", "--solver", "ddim",
                  "--ref", "{here}/first.png"],
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tiny_checkpoint, tmp_path_factory) -> dict[str, str]:
    """A folder with everything that the modes name, models by links, and names for it."""
    from PIL import Image

    from demo import tiny_flux
    from opensora_core.media.latent_file import save_latents
    from tests.golden import cogvideox_files, open_sora_1_files

    here = tmp_path_factory.mktemp("recipes")
    (here / "tiny").symlink_to(tiny_checkpoint)
    open_sora_1_files.write(here / "one", "1.2", False)
    cogvideox_files.write(here / "cog", "1.5_5b_i2v")
    tiny_flux.write(here)
    for name, colour in (("first", (200, 40, 40)), ("last", (40, 40, 200))):
        Image.new("RGB", (64, 40), colour).save(here / f"{name}.png")
    save_video(torch.linspace(0, 1, 33 * 32 * 48 * 3).reshape(33, 32, 48, 3), here / "clip.mp4")
    save_latents(here / "kept.latent", torch.linspace(-1, 1, 16 * 5 * 4 * 6).reshape(1, 16, 5, 4, 6))
    (here / "list.csv").write_text("prompt,image,seed,length,motion_score\na fox,first.png,5,9,7\n", encoding="utf-8")
    return {"here": str(here), **{name: str(here / name) for name in ("tiny", "one", "cog")}}


@pytest.mark.parametrize("mode", MODES)
def test_the_printed_line_makes_the_same_video(mode, folders, capsys, tmp_path, monkeypatch):
    """Of a video whose files were named with their folders, in the folder where they are."""
    monkeypatch.chdir(folders["here"])
    words = [word.format(**folders) for word in MODES[mode]]
    seed = [] if mode == "row" else ["--seed", "3"]
    assert main(["generate", *words, *seed, "--device", "cpu", "--out", str(tmp_path / "one")]) == 0, capsys.readouterr().err
    (one,) = (tmp_path / "one").glob("*.mp4")
    assert folders["here"] not in json.dumps(recipe_of(one))
    capsys.readouterr()
    assert main(["inspect", "--as-command", str(one)]) == 0
    line = shlex.split(capsys.readouterr().out)
    assert main([*line[3:], "--out", str(tmp_path / "two")]) == 0, (line, capsys.readouterr().err)
    (two,) = (tmp_path / "two").glob("*.mp4")
    pixels = [b"".join(list(imageio_ffmpeg.read_frames(str(path)))[1:]) for path in (one, two)]
    assert len(pixels[0]) and pixels[0] == pixels[1]


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


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"class_type": "OpenSoraImageToVideo", "inputs": {"start_image": ["p", 0], "end_image": ["q", 0], "fit": "pad", "strength": 1.0}},
         ["--ref", "a b.png", "--ref-end", "z.png", "--fit", "pad"]),
        ({"class_type": "OpenSoraVideoToVideo", "inputs": {"video": ["v", 0], "direction": "backwards", "context": "65", "fit": "crop"}},
         ["--ref", "clip.mp4", "--cond-type", "v2v_tail_easy"]),
        ({"class_type": "OpenSoraEmptyLatent", "inputs": {"size": "auto", "aspect_ratio": "16:9", "length": "4s", "width": 426, "height": 240}},
         ["--num-frames", "4s"]),
        ({"class_type": "OpenSoraEmptyLatent", "inputs": {"size": "custom", "aspect_ratio": "16:9", "length": "", "width": 426, "height": 240}},
         ["--width", "426", "--height", "240"]),
        ({"class_type": "OpenSoraModelLoader", "inputs": {"model_name": "small (built in)", "precision": "auto"}}, ["--model", "small"]),
        ({"class_type": "OpenSoraTextEncoderLoader", "inputs": {"t5_name": "t5.safetensors", "clip_l_name": "none (T5 alone)"}},
         ["--t5", "t5.safetensors"]),
        ({"class_type": "OpenSoraContinueVideo", "inputs": {"segments": 2, "num_frames": 0, "context_frames": 33}},
         ["--extend", "2", "--extend-context", "33"]),
        ({"class_type": "OpenSoraGuider", "inputs": {"text_guidance": 6.0, "text_oscillation": False, "image_oscillation": True, "solver": "auto",
                                                     "guidance_curve": "by index", "speed": "fast"}},
         ["--guidance", "6.0", "--speed", "fast", "--text-oscillation", "False", "--guidance-curve", "by index"]),
        ({"class_type": "OpenSoraImageToVideo", "inputs": {"start_image": ["p", 0], "condition_scale": "1.0"}},
         ["--ref", "a b.png", "--condition-scale", "1.0"]),
        ({"class_type": "OpenSoraT5TextEncode", "inputs": {"unconditional": "zero"}}, ["--unconditional", "zero"]),
        ({"class_type": "OpenSoraT5TextEncode", "inputs": {"motion_score": 0}}, ["--motion-score", "0"]),
        ({"class_type": "OpenSoraFluxToVideo", "inputs": {"flux_model": ["f", 0], "flux_vae": ["g", 0], "resolution": "256px", "aspect_ratio": "1:1",
                                                          "num_frames": 129, "length": "", "image_steps": 0, "image_seed": -1, "steps": 20}},
         ["--resolution", "256px", "--flux-vae", "ae.safetensors", "--flux", "dev.safetensors", "--num-steps", "20", "--aspect-ratio", "1:1",
          "--num-frames", "129", "--t2i2v"]),
    ],
)  # fmt: skip
def test_what_a_graph_asks_our_nodes_for_are_our_flags(given, expected, monkeypatch, tmp_path):
    from opensora_core.commands import recipe

    graph = {
        "text": {"class_type": "OpenSoraT5TextEncode", "inputs": {"prompt": "waves"}},
        "asked": given,
        "f": {"class_type": "UNETLoader", "inputs": {"unet_name": "dev.safetensors"}},
        "g": {"class_type": "VAELoader", "inputs": {"vae_name": "ae.safetensors"}},
        "p": {"class_type": "LoadImage", "inputs": {"image": "a b.png"}},
        "q": {"class_type": "ImageScale", "inputs": {"image": ["r", 0], "width": 8}},
        "r": {"class_type": "LoadImage", "inputs": {"image": "z.png"}},
        "v": {"class_type": "GetVideoComponents", "inputs": {"video": ["w", 0]}},
        "w": {"class_type": "LoadVideo", "inputs": {"file": "clip.mp4"}},
    }
    monkeypatch.setattr(recipe, "recipe_of", lambda path: {"program": "ComfyUI", "prompt": graph})
    assert shlex.split(recipe.as_command(tmp_path))[4:] == ["--prompt", "waves", *expected]


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


@pytest.mark.parametrize(
    "spoilt", [{}, {"seed": "7"}, {"seed": True}, {"prompt": 7}, {"files": {"dit": 5}}, {"files": {"dit": {"name": 5}}}, {"settings": []}, {"versions": {}}]
)  # fmt: skip
def test_a_recipe_of_other_types_is_none(spoilt, tmp_path):
    """What a video says is from whoever wrote it; the first one is whole."""
    files = {"dit": {"name": "a.safetensors", "bytes": 1}}
    whole = {"program": PROGRAM, "prompt": "a kite", "seed": 7, "settings": {}, "files": files, "versions": {PROGRAM: "1", "torch": "2"}}
    path = save_video(torch.zeros(2, 16, 16, 3), tmp_path / "v.mp4", 24, comment=as_tag(whole | spoilt))
    if not spoilt:
        assert recipe_of(path)["seed"] == 7
        return
    with pytest.raises(OpenSoraError, match=r"v\.mp4 does not say how it was made"):
        recipe_of(path)


@pytest.mark.parametrize("settings", [{}, {"extend": "2", "extend_prompt": ["a"]}, {"extend": 2, "extend_prompt": "a"}])
def test_loops_that_another_hand_wrote_otherwise_are_no_defect(settings, tmp_path):
    from opensora_core.commands.recipe import as_command

    whole = {"prompt": "a kite", "seed": 7, "files": {}, "versions": {PROGRAM: "1", "torch": "2"}}
    comment = as_tag(whole | {"settings": {"parity": "scripts", **settings}})
    words = shlex.split(as_command(save_video(torch.zeros(2, 16, 16, 3), tmp_path / "v.mp4", 24, comment=comment)))
    assert words[4:8] == ["--prompt", "a kite", "--seed", "7"] and "scripts" in words
