"""`generate --csv --t2i2v`: each row's picture drawn once and kept, rows with a picture of their own, failures, and going on after a stop."""

import json
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from demo import tiny_flux
from opensora_core import pipeline as pipeline_module
from opensora_core.cli import main
from opensora_core.commands import jobs
from opensora_core.commands.options import DONE, REFUSED, SOME_FAILED
from opensora_core.errors import OpenSoraError
from opensora_core.media.video import read_clip
from opensora_core.memory.loaded import LoadedModels
from opensora_core.pipeline import OpenSoraPipeline
from opensora_core.run import parts as networks

SIZE = ["--width", "32", "--height", "32", "--num-frames", "5", "--num-steps", "2", "--device", "cpu"]
PICTURE = ["--image-resolution", "144px", "--image-steps", "2"]


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return [str(path) for path in tiny_flux.write(tmp_path_factory.mktemp("flux"))]


@pytest.fixture
def run(tiny_checkpoint, flux, tmp_path, monkeypatch):
    """Write a table and run it with small sizes in an empty folder; what is given later on the line holds."""
    monkeypatch.chdir(tmp_path)

    def run(table: str, *arguments: str) -> int:
        Path("list.csv").write_text(table)
        base = ["generate", "--model", str(tiny_checkpoint), "--csv", "list.csv", "--t2i2v", "--flux", flux[0], "--flux-vae", flux[1]]
        return main([*base, *SIZE, *PICTURE, "--out", "out", *arguments])

    return run


@pytest.fixture
def drawn(monkeypatch) -> list[list[int]]:
    """The seeds of the pictures of every call of the painter."""
    calls, real = [], pipeline_module.paint
    monkeypatch.setattr(
        pipeline_module, "paint", lambda flux, pictures, *rest: calls.append([seed for *_, seed in pictures]) or real(flux, pictures, *rest)
    )
    return calls


def files(folder="out") -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir() if path.suffix in (".png", ".mp4"))


def test_a_row_gives_what_its_own_command_gives(run, tiny_checkpoint, flux, drawn, capsys):
    assert run("prompt,seed,aspect_ratio,resolution\na cat,7,,\na dog,8,9:16,256px\n") == DONE
    assert capsys.readouterr().out.split() == ["out/0001_a-cat.mp4", "out/0002_a-dog.mp4"]
    assert drawn == [[7, 8]]  # Flux was read once for both
    assert files() == ["0001_a-cat.mp4", "0001_a-cat_picture.png", "0002_a-dog.mp4", "0002_a-dog_picture.png"]
    alone = [
        "generate",
        "--t2i2v",
        "--model",
        str(tiny_checkpoint),
        "--flux",
        flux[0],
        "--flux-vae",
        flux[1],
        *PICTURE,
        "--num-frames",
        "5",
    ]
    alone += ["--num-steps", "2", "--device", "cpu", "--out", "alone"]
    assert main([*alone, "--prompt", "a cat", "--seed", "7", "--width", "32", "--height", "32"]) == DONE
    assert main([*alone, "--prompt", "a dog", "--seed", "8", "--aspect-ratio", "9:16", "--resolution", "256px"]) == DONE
    for row, seed, video in (("0001_a-cat", 7, "video_0000"), ("0002_a-dog", 8, "video_0001")):
        assert same_frames(Path(f"out/{row}.mp4"), Path(f"alone/{video}.mp4"))
        pictures = [numpy.asarray(Image.open(path)) for path in (f"out/{row}_picture.png", f"alone/picture_seed_{seed}.png")]
        assert (pictures[0] == pictures[1]).all()


def test_a_row_with_a_picture_of_its_own_uses_it(run, drawn, made):
    Image.new("RGB", (96, 64), (255, 30, 30)).save("red.png")
    assert run("prompt,image,end_image,seed\na cat,red.png,,1\na dog,,red.png,2\n", "--num-frames", "9") == DONE
    assert drawn == [[2]] and files() == ["0001_a-cat.mp4", "0002_a-dog.mp4", "0002_a-dog_picture.png"]
    assert made[0]["image"] == "red.png" and made[0]["last_image"] is None
    assert made[1]["image"] == Path("out/0002_a-dog_picture.png") and made[1]["last_image"] == "red.png"


def test_one_picture_for_several_rows_is_drawn_once(run, drawn, made, monkeypatch):
    """Also where they come to be made at different times; prompt and seed of the picture may be the row's."""
    monkeypatch.setattr(jobs, "DRAWN_TOGETHER", 2)
    table = "prompt,seed,image_prompt,image_seed\nit runs,1,a cat,5\nit sleeps,2,a cat,5\nit jumps,3,a cat,5\nit jumps,3,a dog,5\n"
    assert run(table) == DONE
    assert drawn == [[5], [5]] and files()[1] == "0001_it-runs.mp4"
    assert [call["image"].name for call in made] == ["0001_a-cat_picture.png"] * 3 + ["0004_a-dog_picture.png"]
    assert [call["seed"] for call in made] == [1, 2, 3, 3] and made[0]["text"].startswith("it runs. 24 FPS")


def test_the_prompt_of_a_picture_is_read_as_it_is(run, monkeypatch):
    asked, real = [], OpenSoraPipeline.encode_prompts
    monkeypatch.setattr(
        OpenSoraPipeline, "encode_prompts", lambda self, prompts, *rest: asked.extend(prompts) or real(self, prompts, *rest)
    )
    assert run("prompt,negative,seed\na cat,blur,1\n", "--image-prompt", "a sleeping cat") == DONE
    assert [(one[0], one[1], one[2] is None) for one in asked] == [("a cat", "blur", False), ("a sleeping cat", "", True)]


def test_encoders_and_flux_are_read_once_and_the_two_large_networks_are_never_there_together(run, monkeypatch):
    shared, read = LoadedModels(), []
    monkeypatch.setattr(networks, "SHARED", shared)
    for name in ("transformer", "vae", "t5", "clip", "decoder"):
        real = getattr(networks, f"load_{name}")

        def watched(*arguments, real=real, name=name, **more):
            import gc

            gc.collect()
            label = f"flux {name}" if name == "decoder" or more.get("slot") == "flux" else name
            present = {entry.key.kind for entry in shared.listing()}
            assert not (label == "flux transformer" and "transformer" in present) and not (label == "transformer" and "flux" in present)
            read.append(label)
            return real(*arguments, **more)

        monkeypatch.setattr(networks, f"load_{name}", watched)
    monkeypatch.setattr(jobs, "DRAWN_TOGETHER", 2)
    assert run("prompt,seed\na,1\nb,2\nc,3\n") == DONE
    some = ["t5", "clip", "flux transformer", "flux decoder"]
    assert [name for name in read if name != "vae"] == [*some, "transformer", *some, "transformer"]


def test_a_picture_that_is_there_is_not_drawn_again(run, drawn, made, monkeypatch):
    """Its video failed: with the same seed as the picture, given or not."""
    real = jobs.save_video
    monkeypatch.setattr(jobs, "save_video", lambda *args, **more: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    table = "prompt,seed\na cat,1\na dog,\n"
    assert run(table) == SOME_FAILED and files() == ["0001_a-cat_picture.png", "0002_a-dog_picture.png"]
    monkeypatch.setattr(jobs, "save_video", real)
    assert run(table) == DONE
    assert len(drawn) == 1 and [call["seed"] for call in made[2:]] == [call["seed"] for call in made[:2]] == drawn[0]
    assert files() == ["0001_a-cat.mp4", "0001_a-cat_picture.png", "0002_a-dog.mp4", "0002_a-dog_picture.png"]
    assert run(table) == DONE and len(made) == 4
    # A video that is made anew begins with the same picture, but not where that is gone.
    Path("out/0001_a-cat.mp4").unlink()
    assert run(table) == DONE and len(drawn) == 1
    Path("out/0001_a-cat_picture.png").unlink()
    Path("out/0001_a-cat_1.mp4").unlink()
    assert run(table) == DONE and drawn[1:] == [[1]]


@pytest.mark.parametrize(
    "change", [["--image-steps", "1"], ["--flux-guidance", "2"], ["--image-resolution", "256px"], ["--image-seed", "4"]]
)
def test_another_picture_is_another_video(run, drawn, change):
    assert run("prompt,seed\na,1\n") == run("prompt,seed\na,1\n", *change) == DONE
    assert len(drawn) == 2 and files() == ["0001_a.mp4", "0001_a_1.mp4", "0001_a_picture.png", "0001_a_picture_1.png"]


def test_rows_without_a_seed_have_pictures_of_their_own(run, drawn):
    assert run("prompt\na\na\n") == DONE
    assert len(set(drawn[0])) == 2 and run("prompt\na\na\n") == DONE and len(drawn) == 1


def test_a_picture_that_fails_is_the_failure_of_its_rows_alone(run, monkeypatch, capsys):
    real = pipeline_module.paint

    def fails(flux, pictures, *rest):
        if any(seed == 2 for *_, seed in pictures):
            raise OpenSoraError("Flux gave values that are not numbers.")
        return real(flux, pictures, *rest)

    monkeypatch.setattr(pipeline_module, "paint", fails)
    table = "prompt,seed\na,1\nb,2\nc,3\n"
    assert run(table) == SOME_FAILED
    told = capsys.readouterr()
    assert told.out.split() == ["out/0001_a.mp4", "out/0003_c.mp4"]
    assert told.err.strip().splitlines()[-1] == "  row 2 (line 3): Flux gave values that are not numbers."
    assert "Traceback" not in told.err
    monkeypatch.setattr(pipeline_module, "paint", real)
    assert run(table) == DONE and capsys.readouterr().out.split() == ["out/0002_b.mp4"]


def test_a_stop_while_videos_are_made_loses_no_picture(run, drawn, made, monkeypatch):
    def stop(*args, **more):
        raise KeyboardInterrupt

    real = jobs.save_video
    monkeypatch.setattr(jobs, "save_video", stop)
    assert run("prompt,seed\na,1\nb,2\n") == 130
    monkeypatch.setattr(jobs, "save_video", real)
    assert run("prompt,seed\na,1\nb,2\n") == DONE and drawn == [[1, 2]]
    recorded = json.loads(Path("out/batch.json").read_text())
    assert sorted(entry["file"] for entry in recorded["videos"].values()) == files()


@pytest.mark.parametrize(
    ("table", "arguments", "says"),
    [
        (
            "prompt,length\na,1\nb,5\n",
            [],
            "row 1 (line 2): Use at least 5 frames: a video of 1 frame is all taken up by the picture given.",
        ),
        (
            "prompt,image,image_seed\na,red.png,3\n",
            [],
            "Leave one of them out: image_seed is of a picture that Flux draws, and the row has an image",
        ),
        ("prompt,image_seed\na,x\n", [], "row 1 (line 2): Write one: image_seed 'x' is not a whole number"),
        ("prompt,image_seed\na,-1\n", [], ": image_seed=-1 is out of range"),
        ("prompt\na\n", ["--image-steps", "-1"], "image_steps=-1 draws nothing"),
        ("prompt\na\n", ["--ref", "red.png"], "Leave out --ref and --cond-type: --t2i2v draws the first frame"),
        ("prompt\na\n", ["--flux", "absent.safetensors"], "absent.safetensors"),
    ],
)
def test_what_cannot_be_drawn_is_said_before_anything_is_read(run, drawn, monkeypatch, capsys, table, arguments, says):
    def read(*arguments, **more):
        raise AssertionError("a network was read before every row was checked")

    Image.new("RGB", (96, 64)).save("red.png")
    for name in ("load_t5", "load_transformer", "load_decoder"):
        monkeypatch.setattr(networks, name, read)
    assert run(table, *arguments) == REFUSED
    assert says in capsys.readouterr().err and not drawn and not Path("out").exists()


@pytest.mark.parametrize(
    ("table", "arguments"),
    [("prompt\na\n", ["--flux", "x"]), ("prompt,image_prompt\na,x\n", []), ("prompt\na\n", ["--image-seed", "1"])],
)
def test_what_is_of_a_picture_is_refused_without_one(tiny_checkpoint, tmp_path, capsys, table, arguments):
    (tmp_path / "list.csv").write_text(table)
    base = ["generate", "--model", str(tiny_checkpoint), "--csv", str(tmp_path / "list.csv"), *SIZE, "--out", str(tmp_path / "out")]
    assert main([*base, *arguments]) == REFUSED
    assert "Add --t2i2v: " in capsys.readouterr().err


def same_frames(one, other) -> bool:
    """Whether two videos show the same; what they say of how they were made may differ."""
    return torch.equal(*(read_clip(path, 999, from_end=False) for path in (one, other)))
