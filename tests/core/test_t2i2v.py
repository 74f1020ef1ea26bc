"""Text to picture to video with no host: one prompt, one pair of text encoders, Flux gone before the video's transformer is read."""

import gc

import numpy
import pytest
import torch
from PIL import Image

from demo import tiny_flux
from opensora_core import cli
from opensora_core.commands.options import DONE, REFUSED
from opensora_core.errors import CheckpointError, OpenSoraError
from opensora_core.media.video import read_clip
from opensora_core.memory.loaded import LoadedModels
from opensora_core.pipeline import OpenSoraPipeline
from opensora_core.run import parts as networks
from opensora_core.run.picture import PictureRequest
from opensora_core.sampling.given import fit_image

PROMPT = "raining, sea"
SMALL = ("--width", "96", "--height", "64", "--num-frames", "5", "--num-steps", "2")
PICTURE = ("--image-resolution", "256px", "--image-steps", "2")


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return tiny_flux.write(tmp_path_factory.mktemp("flux"))


@pytest.fixture
def pipe(tiny_checkpoint, flux):
    return OpenSoraPipeline.from_pretrained(tiny_checkpoint).load_flux(*flux)


def request(**changes):
    return PictureRequest(64, 96, **{"steps": 2, **changes})


@pytest.fixture
def reads(monkeypatch):
    """What is read, in its order, and which models were in memory at that time."""
    shared, found = LoadedModels(), []
    monkeypatch.setattr(networks, "SHARED", shared)  # not what other tests' pipelines still hold

    def watch(name, kind):
        read = getattr(networks, f"load_{name}")

        def watched(*arguments, **keywords):
            gc.collect()
            found.append((keywords.get("slot", kind), {entry.key.kind for entry in shared.listing()}))
            return read(*arguments, **keywords)

        monkeypatch.setattr(networks, f"load_{name}", watched)

    for name in ("transformer", "t5", "clip", "vae"):
        watch(name, name)
    watch("decoder", "flux_vae")
    return found


def test_picture_then_video(pipe):
    (picture,), prompt = pipe.draw(PROMPT, [5], request())
    assert prompt.text == "raining, sea. 24 FPS. 4 motion score."
    result = pipe(prompt, image=picture, height=64, width=96, num_frames=5, num_inference_steps=2, seed=5)
    # The first latent is the picture's: nothing between it and the VAE.
    expected = pipe.vae.encode(fit_image(picture.float() / 255, 64, 96, "crop"), [None])
    assert torch.equal(result.latents[:, :, :1], expected)
    assert numpy.stack(result.frames[0]).shape == (5, 64, 96, 3)


def test_each_network_is_read_once_and_flux_is_gone_before_the_video_s(tiny_checkpoint, flux, reads):
    pipe = OpenSoraPipeline.from_pretrained(tiny_checkpoint).load_flux(*flux).enable_offload("auto", device="cpu")
    pictures, prompt = pipe.draw(PROMPT, [1, 2], request())
    for picture in pictures:
        pipe(prompt, image=picture, height=64, width=96, num_frames=5, num_inference_steps=1, seed=1)
    assert [kind for kind, _ in reads] == ["t5", "clip", "flux", "flux_vae", "vae", "transformer"]
    assert all(not {"flux", "flux_vae"} & present for kind, present in reads if kind != "flux_vae")
    assert "flux" not in dict(reads)["flux_vae"]


def test_flux_reads_the_prompt_as_it_is_or_another(pipe):
    (one,), _ = pipe.draw(PROMPT, [5], request())
    (decorated,), _ = pipe.draw(PROMPT, [5], request(), picture_prompt="raining, sea. 24 FPS. 4 motion score.")
    (same,), prompt = pipe.draw("another video", [5], request(), picture_prompt=PROMPT)
    assert torch.equal(one, same) and not torch.equal(one, decorated)
    assert prompt.text.startswith("another video.")


def test_what_cannot_be_drawn(pipe, tiny_checkpoint, flux, golden_path, tmp_path):
    with pytest.raises(OpenSoraError, match="Call load_flux"):
        OpenSoraPipeline.from_pretrained(tiny_checkpoint).draw(PROMPT, [1], request())
    with pytest.raises(OpenSoraError, match="seed=-1 is out of range"):
        pipe.draw(PROMPT, [-1], request())
    from dataclasses import replace

    from safetensors.torch import save_file

    from demo.tiny import random_weights
    from opensora_core.families import table

    config = replace(tiny_flux.TRANSFORMER, context_in_dim=32)
    save_file(random_weights(table.manifest(config), torch.Generator().manual_seed(0)), tmp_path / "other.safetensors")
    with pytest.raises(
        CheckpointError, match="Use a Flux that reads the same encoders: picture.*gives 64 features and other.safetensors reads 32"
    ):
        pipe.load_flux(tmp_path / "other.safetensors", flux[1])


def test_command_line(tiny_checkpoint, flux, tmp_path, capsys):
    flags = ["generate", "--t2i2v", "--model", str(tiny_checkpoint), "--flux", str(flux[0]), "--flux-vae", str(flux[1]), "--prompt", PROMPT]
    assert cli.main([*flags, *SMALL, *PICTURE, "--seed", "3", "--num-samples", "2", "--out", str(tmp_path)]) == DONE
    assert [line.rsplit("/", 1)[-1] for line in capsys.readouterr().out.split()] == ["video_0000.mp4", "video_0001.mp4"]
    pictures = [numpy.asarray(Image.open(tmp_path / f"picture_seed_{seed}.png")) for seed in (3, 4)]
    assert pictures[0].shape == (208, 320, 3) and (pictures[0] != pictures[1]).any()
    # Each video begins with the picture of its own seed.
    alone = ["generate", "--model", str(tiny_checkpoint), "--prompt", PROMPT, *SMALL, "--out", str(tmp_path / "alone")]
    for number, seed in enumerate((3, 4)):
        assert cli.main([*alone, "--seed", str(seed), "--ref", str(tmp_path / f"picture_seed_{seed}.png")]) == DONE
        video = f"video_{number:04d}.mp4"
        assert same_frames((tmp_path / video), (tmp_path / "alone" / video))
    # A picture of its own seed is drawn once for all, and never over one that is there.
    assert cli.main([*flags, *SMALL, *PICTURE, "--seed", "8", "--image-seed", "3", "--out", str(tmp_path)]) == DONE
    assert (numpy.asarray(Image.open(tmp_path / "picture_seed_3_1.png")) == pictures[0]).all()


def test_a_drawn_picture_may_begin_a_longer_video(tiny_checkpoint, flux, tmp_path, reads):
    from imageio_ffmpeg import count_frames_and_secs

    flags = ["generate", "--t2i2v", "--model", str(tiny_checkpoint), "--flux", str(flux[0]), "--flux-vae", str(flux[1]), "--prompt", PROMPT]
    longer = ["--extend", "1", "--extend-prompt", "the sea is calm", "--seed", "3", "--out", str(tmp_path)]
    assert cli.main([*flags, *SMALL, *PICTURE, *longer]) == DONE
    assert count_frames_and_secs(str(tmp_path / "video_0000.mp4"))[0] == 5 + 4
    assert {"picture_seed_3.png", "video_0000.latent"} <= {path.name for path in tmp_path.iterdir()}
    assert [kind for kind, _ in reads].count("t5") == 1  # all three prompts together


def test_a_picture_takes_the_nearest_shape_that_its_resolution_has(tiny_checkpoint, flux, tmp_path):
    flags = ["generate", "--t2i2v", "--model", str(tiny_checkpoint), "--flux", str(flux[0]), "--flux-vae", str(flux[1]), "--prompt", PROMPT]
    short = ["--num-frames", "5", "--num-steps", "1", "--image-steps", "1", "--seed", "1", "--out", str(tmp_path)]
    assert cli.main([*flags, *short, "--width", "48", "--height", "32", "--image-resolution", "144px"]) == DONE  # 144px knows no 3:2
    assert Image.open(tmp_path / "picture_seed_1.png").size == (192, 112)


def test_files_in_the_model_folder_need_no_name(tiny_checkpoint, flux, tmp_path, capsys):
    for path in tiny_checkpoint.iterdir():
        (tmp_path / path.name).symlink_to(path)
    flags = ["generate", "--t2i2v", "--model", str(tmp_path), "--prompt", PROMPT, *SMALL, *PICTURE, "--out", str(tmp_path / "out")]
    assert cli.main(flags) == REFUSED
    assert "Give --flux FILE and --flux-vae FILE: --t2i2v needs Flux's files, and " in capsys.readouterr().err
    (tmp_path / "flux1-dev.safetensors").symlink_to(flux[0])
    (tmp_path / "flux1-dev-ae.safetensors").symlink_to(flux[1])
    assert cli.main(flags) == DONE


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--flux", "DIT"], "Open_Sora_v2.safetensors is an Open-Sora 2.0"),
        (["--flux-vae", "VAE"], "hunyuan_vae.safetensors is a HunyuanVideo"),
        (["--flux", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--ref", "a.png"], "Leave out --ref and --cond-type: --t2i2v draws the first frame"),
        (["--cond-type", "i2v_tail"], "Leave out --ref and --cond-type: --t2i2v draws the first frame"),
        (["--image-steps", "-1"], "image_steps=-1 draws nothing"),
        (["--image-seed", "-1"], ": image_seed=-1 is out of range"),
        (["--num-frames", "7"], "Use 5 or 9"),
        (["--image-resolution", "769q"], "resolution='769q' is not known"),
        (["--flux-guidance", "nan"], "flux_guidance=nan"),
    ],
)
def test_refused_before_anything_is_read(tiny_checkpoint, flux, tmp_path, capsys, reads, flags, sentence):
    given = {"DIT": str(tiny_checkpoint / "Open_Sora_v2.safetensors"), "VAE": str(tiny_checkpoint / "hunyuan_vae.safetensors")}
    base = ["generate", "--t2i2v", "--model", str(tiny_checkpoint), "--flux", str(flux[0]), "--flux-vae", str(flux[1]), "--prompt", PROMPT]
    assert cli.main([*base, *SMALL, "--out", str(tmp_path), *(given.get(flag, flag) for flag in flags)]) == REFUSED
    assert sentence in capsys.readouterr().err
    assert reads == []


def test_a_flux_file_in_the_video_model_s_place_and_flags_without_a_picture(tiny_checkpoint, flux, tmp_path, capsys):
    parts = ["--vae", str(tiny_checkpoint / "hunyuan_vae.safetensors"), "--t5", str(tiny_checkpoint / "google" / "t5-v1_1-xxl")]
    parts += ["--clip", str(tiny_checkpoint / "openai" / "clip-vit-large-patch14"), "--prompt", PROMPT, "--out", str(tmp_path)]
    assert cli.main(["generate", "--dit", str(flux[0]), *parts, *SMALL]) == REFUSED
    assert "flux1-dev.safetensors is a Flux.1 transformer" in (said := capsys.readouterr().err) and "--flux on the command line" in said
    base = ["generate", "--model", str(tiny_checkpoint), "--prompt", PROMPT, *SMALL, "--out", str(tmp_path)]
    assert cli.main([*base, "--flux", str(flux[0])]) == REFUSED
    assert "Add --t2i2v: --flux is of the picture that Flux draws" in capsys.readouterr().err
    assert cli.main([*base, "--flux-guidance", "3"]) == REFUSED
    assert "Add --t2i2v: --flux-guidance is of the picture that Flux draws" in capsys.readouterr().err


def same_frames(one, other) -> bool:
    """Whether two videos show the same; what they say of how they were made may differ."""
    return torch.equal(*(read_clip(path, 999, from_end=False) for path in (one, other)))
