"""The colours of previews: a red circle on blue is red on blue, by the built-in model's own latents."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from opensora_core.cli import main
from opensora_core.evaluation import world
from opensora_core.evaluation.clips import quantised
from opensora_core.pipeline import OpenSoraPipeline
from opensora_core.run.files import SMALL


@pytest.fixture(scope="module")
def fitted(tmp_path_factory) -> dict:
    """What `colours` keeps beside a copy of the built-in VAE."""
    folder = tmp_path_factory.mktemp("vae")
    shutil.copy(SMALL / "hunyuan_vae.safetensors", folder / "mine.safetensors")
    assert main(["colours", str(folder / "mine.safetensors"), "--device", "cpu"]) == 0
    return json.loads((folder / "mine.colours.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("source", ["built in", "fitted"])
def test_a_red_circle_on_blue_is_red_on_blue(source, fitted):
    held = fitted if source == "fitted" else json.loads((SMALL / "latent_colours.json").read_text(encoding="utf-8"))
    scene = world.Scene(world.Combination("circle", "red", "blue", "right"), 4, 12.0, (32.0, 24.0), "")
    with torch.inference_mode():
        latents = OpenSoraPipeline.from_pretrained("small").vae.encode(quantised(scene.render()), [None])
    seen = latents[0].movedim(0, -1).float() @ torch.tensor(held["factors"]) + torch.tensor(held["bias"])
    assert seen.shape[0] == 5
    red, _, blue = seen[0, 4, 3]
    assert red > blue + 0.5, "the circle"
    red, _, blue = seen[0, 0, 7]
    assert blue > red + 0.5, "the background"


def test_what_is_kept_says_of_which_vae(fitted):
    assert (fitted["codec"], len(fitted["factors"]), len(fitted["bias"])) == ("hunyuan_vae", 16, 3)
    assert fitted["error"] < 0.35


def test_another_file_is_said(capsys):
    assert main(["colours", str(SMALL / "Open_Sora_v2.safetensors")]) == 2
    assert "Give the HunyuanVideo VAE" in capsys.readouterr().err


def test_where_nothing_can_be_written_is_said_before_the_minute_that_it_takes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("opensora_core.commands.colours.fit", lambda *given: ([], [], 0.0))
    vae, out = str(SMALL / "hunyuan_vae.safetensors"), tmp_path / "none yet" / "mine.json"
    assert main(["colours", vae, "--out", str(out)]) == 0 and out.is_file()
    monkeypatch.setattr("opensora_core.commands.colours.fit", None)
    for path in (tmp_path, out / "below.json"):
        assert main(["colours", vae, "--out", str(path)]) == 2
    assert "is a folder" in (said := capsys.readouterr().err) and "othing can be written" in said


@pytest.mark.parametrize("family", ["dc_ae", "1.1", "1.2", "1.3", "cogvideox"])
def test_every_vae_can_be_fitted(family, tmp_path, monkeypatch):
    """Random weights have no colours; what is kept has the shape of the VAE's latents, and its model's row knows the VAE by the kept name."""
    from opensora_core.commands import colours
    from opensora_core.families import table
    from tests.golden import cogvideox_files, open_sora_1_files

    monkeypatch.setattr(colours, "PICTURES", 2)
    if family == "dc_ae":
        path = tmp_path / "dc_ae.safetensors"
        shutil.copy(Path(__file__).parents[1] / "golden" / "dc_ae_weights.safetensors", path)
    elif family == "cogvideox":
        path = cogvideox_files.write(tmp_path / "cog", "2b") / "vae" / "diffusion_pytorch_model.safetensors"
    else:
        folder = open_sora_1_files.write(tmp_path / "one", family)
        path = next(file for file in folder.rglob("*.safetensors") if "VAE" in file.parent.name or "vae" in file.parent.name)
    assert main(["colours", str(path), "--device", "cpu"]) == 0
    held = json.loads(path.with_name(path.stem + ".colours.json").read_text(encoding="utf-8"))
    assert any(held["codec"] in row.codecs for row in table.FAMILIES)
    assert held["factors"] and all(len(row) == 3 for row in held["factors"])
