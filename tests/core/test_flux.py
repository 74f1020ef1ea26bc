"""Flux's picture: as the reference draws it, from files in the official layout, and given up before the video's transformer is read."""

import gc

import pytest
import torch
from safetensors.torch import load_file, save_file

from opensora_core.checkpoint.load import load_decoder
from opensora_core.codecs.picture import FLUX_AE, PictureConfig, PictureVAE
from opensora_core.errors import CheckpointError, OpenSoraError
from opensora_core.families import table
from opensora_core.families.flux import num_steps, picture_shift
from opensora_core.geometry import ASPECT_RATIOS, training_size
from opensora_core.memory.component import Placement
from opensora_core.memory.loaded import SHARED
from opensora_core.networks.mmdit.config import FLUX_DEV
from opensora_core.run import parts
from opensora_core.run.files import check_picture_files
from opensora_core.run.parts import PictureNetworks
from opensora_core.run.picture import PictureRequest, draw, paint
from opensora_core.run.request import EncodedPrompt
from opensora_core.sampling.run import TextCondition
from opensora_core.sampling.schedule import sigmas

TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def files(golden_path, tmp_path_factory):
    """(a small Flux dev in the official fused layout, a small picture autoencoder)."""
    weights = load_file(golden_path / "fused_weights.safetensors")
    path = tmp_path_factory.mktemp("flux") / "flux1-dev.safetensors"
    save_file({key: tensor for key, tensor in weights.items() if not key.startswith("cond_in.")}, path)
    # Of the encoder, which is not read, the one tensor that names the file.
    decoder = load_file(golden_path / "flux_vae_weights.safetensors")
    save_file({**decoder, "encoder.down.0.block.0.conv1.weight": torch.zeros(32, 32, 3, 3)}, path.with_name("ae.safetensors"))
    return path, path.with_name("ae.safetensors")


@pytest.fixture(scope="module")
def schnell(files):
    weights = {key: tensor for key, tensor in load_file(files[0]).items() if not key.startswith("guidance_in.")}
    path = files[0].with_name("flux1-schnell.safetensors")
    save_file(weights, path)
    return path


@pytest.fixture
def flux(files):
    return PictureNetworks(*files, Placement(torch.device("cpu"), torch.float32))


@pytest.fixture(scope="module")
def recorded(golden):
    return golden("flux")


def text(context, y):
    return EncodedPrompt("", TextCondition({"context": context, "y": y}, {"context": context, "y": y}))


def text_of(recorded):
    return text(recorded[0]["context"], recorded[0]["y"])


def request(recorded, **changes):
    return PictureRequest(48, 80, **{"steps": recorded[1]["settings"]["num_steps"], **changes})


def pictures(recorded, *seeds, **changes):
    return [(text_of(recorded), request(recorded, **changes), seed) for seed in seeds]


def test_the_picture_is_the_reference_s(flux, recorded):
    tensors, metadata = recorded
    (found,) = paint(flux, pictures(recorded, metadata["settings"]["seed"]))
    expected = (tensors["pixels"][0, :, 0].clamp(-1, 1) + 1) * 127.5
    assert found.shape == (1, 48, 80, 3) and found.dtype == torch.uint8
    assert (found[0].double() - expected.permute(1, 2, 0).double()).abs().max() < 0.51  # rounding to whole levels, nothing else
    assert expected.std() > 20  # the picture is not grey


def test_latents_of_the_run(flux, recorded, relative_error):
    tensors, metadata = recorded
    with flux.transformer.at_work() as transformer, torch.no_grad():
        found = draw(transformer, text_of(recorded), request(recorded), tensors["noise"])
        assert relative_error(found, tensors["latents"][:, :, 0]) < TOLERANCE
        other = draw(transformer, text_of(recorded), request(recorded, guidance=3.0), tensors["noise"])
        assert relative_error(other, tensors["latents"][:, :, 0]) > 10 * TOLERANCE  # the guidance is heard
        own = draw(transformer, text_of(recorded), request(recorded, schedule="flux"), tensors["noise"])
        assert relative_error(own, tensors["latents"][:, :, 0]) > 10 * TOLERANCE
    assert torch.equal(sigmas(metadata["settings"]["num_steps"], picture_shift("open-sora", 15, True)), tensors["sigmas"])
    assert metadata["settings"]["guidance"] == PictureRequest(48, 80).guidance


def test_decode(files, recorded, relative_error):
    decoder = load_decoder(files[1], torch.float32)
    with torch.no_grad():
        found = decoder.decode(decoder.config.latents.to_codec(recorded[0]["latents"]))[:, :, 0]
    assert relative_error(found, recorded[0]["pixels"][:, :, 0]) < TOLERANCE


def test_sizes_are_the_reference_s_for_every_ratio(recorded):
    for ratio, size in recorded[1]["sizes"].items():
        asked = PictureRequest.for_ratio(ratio)
        assert [asked.height, asked.width] == size, ratio
    for ratio in ASPECT_RATIOS:
        PictureRequest.for_ratio(ratio)
    with pytest.raises(OpenSoraError, match="8:5"):
        training_size("256px", "8:5")


def test_what_is_encoded_is_what_is_decoded_from():
    torch.manual_seed(0)
    vae = PictureVAE(PictureConfig(widths=(32, 32, 64, 64), layers=2)).requires_grad_(False)
    for parameter in vae.parameters():
        parameter.normal_(std=0.1)
    encoded = vae.encode(torch.rand(2, 3, 3, 24, 32) * 2 - 1)
    latents = encoded.mode()
    assert latents.shape == (2, 16, 3, 3, 4) and encoded.moments()[1].shape == latents.shape
    scaled = vae.config.latents.to_model(latents)
    torch.testing.assert_close(scaled, 0.3611 * (latents - 0.1159))
    torch.testing.assert_close(vae.config.latents.to_codec(scaled), latents)
    assert vae.decode(latents).shape == (2, 3, 3, 24, 32)


def test_dev_and_schnell_have_their_own_steps():
    assert (num_steps(0, True), num_steps(0, False), num_steps(7, False)) == (50, 4, 7)
    assert picture_shift("auto", 2304, True) == pytest.approx(2.066667, abs=1e-6)
    assert picture_shift("auto", 2304, False) == picture_shift("flux", 4096, False) == 1.0
    assert picture_shift("flux", 256, True) == pytest.approx(torch.tensor(0.5).exp().item())
    assert picture_shift("flux", 4096, True) == pytest.approx(torch.tensor(1.15).exp().item())
    with pytest.raises(OpenSoraError, match="flux_schedule='linear' is not known"):
        picture_shift("linear", 256, True)


def test_schnell_draws_in_four_steps(schnell, files, recorded):
    flux = PictureNetworks(schnell, files[1], Placement(torch.device("cpu"), torch.float32))
    done = []
    paint(flux, [(text_of(recorded), PictureRequest(48, 80), 1)], lambda step, steps: done.append((step, steps)))
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_picture_depends_on_its_seed_alone(flux, recorded):
    one, two = paint(flux, pictures(recorded, 3, 4, steps=2))
    (again,) = paint(flux, pictures(recorded, 4, steps=2))
    assert torch.equal(two, again) and not torch.equal(one, two)


def test_pictures_of_other_prompts_sizes_and_steps_are_drawn_together(flux, recorded):
    """Each is what it is alone, and progress counts the steps of all."""
    other = text(recorded[0]["context"].flip(1), recorded[0]["y"].flip(1))
    asked = [*pictures(recorded, 3, steps=2), (other, PictureRequest(64, 32, steps=3), 4)]
    done = []
    together = paint(flux, asked, lambda step, steps: done.append((step, steps)))
    assert done == [(step, 5) for step in range(1, 6)] and [tuple(one.shape) for one in together] == [(1, 48, 80, 3), (1, 64, 32, 3)]
    assert all(torch.equal(one, *paint(flux, [alone])) for one, alone in zip(together, asked, strict=True))


def flux_in_memory() -> list[str]:
    gc.collect()  # accelerate's hooks, of the mode minimal, hold their layers in a cycle
    return [entry.key.kind for entry in SHARED.listing() if entry.key.kind.startswith("flux")]


def test_nothing_of_flux_is_left_after_the_last_picture(files, recorded, monkeypatch):
    """In no mode, and the transformer is gone before the decoder is read."""
    for mode in ("everything", "auto", "resident", "minimal"):
        flux = PictureNetworks(*files, Placement(torch.device("cpu"), torch.float32, mode))
        loaded = []

        def watched(path, *arguments, read=load_decoder, loaded=loaded):
            loaded.append(flux_in_memory())
            return read(path, *arguments)

        monkeypatch.setattr(parts, "load_decoder", watched)
        flux = PictureNetworks(*files, Placement(torch.device("cpu"), torch.float32, mode))
        paint(flux, pictures(recorded, 1, steps=1))
        assert loaded == [[]], mode
        assert not flux_in_memory(), mode


def test_flux_is_given_up_when_a_run_fails(flux, recorded, monkeypatch):
    def fail(step, steps):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        paint(flux, pictures(recorded, 1), fail)
    assert not flux_in_memory()


def test_wrong_files_are_named_before_any_weight_is_read(files, tiny_checkpoint, golden_path, tmp_path, write_hole):
    placement = Placement(torch.device("cpu"))
    video = tiny_checkpoint / "Open_Sora_v2.safetensors"
    with pytest.raises(CheckpointError, match=r"as --flux: Open_Sora_v2.safetensors is an Open-Sora 2.0 "):
        PictureNetworks(video, files[1], placement)
    with pytest.raises(CheckpointError, match=r"as --flux-vae: hunyuan_vae.safetensors is "):
        PictureNetworks(files[0], tiny_checkpoint / "hunyuan_vae.safetensors", placement)
    with pytest.raises(CheckpointError, match="flux1-dev.safetensors is a Flux.1 transformer"):
        PictureNetworks(files[0], files[0], placement)
    weights = load_file(files[1])
    weights.pop("decoder.up.1.block.0.conv1.weight")
    save_file(weights, tmp_path / "ae.safetensors")
    with pytest.raises(CheckpointError, match="not whole.*up.1.block.0.conv1.weight"):
        PictureNetworks(files[0], tmp_path / "ae.safetensors", placement)
    with pytest.raises(CheckpointError, match="16 expected"):
        manifest = {**table.manifest(FLUX_AE), "decoder.conv_in.weight": (512, 4, 3, 3)}
        PictureNetworks(files[0], write_hole(tmp_path / "sd.safetensors", manifest), placement)


def test_a_flux_that_reads_a_picture_is_refused(files, tmp_path):
    weights = load_file(files[0])
    weights["img_in.weight"] = torch.zeros(weights["img_in.weight"].shape[0], 384)
    save_file(weights, tmp_path / "flux1-fill-dev.safetensors")
    with pytest.raises(CheckpointError, match="also reads a picture .384 features"):
        PictureNetworks(tmp_path / "flux1-fill-dev.safetensors", files[1], Placement(torch.device("cpu")))


def test_text_of_another_width_is_refused(flux, recorded):
    with pytest.raises(CheckpointError, match="give 32 and 64 features and this Flux reads 64 and 64"):
        paint(flux, [(text(torch.zeros(1, 3, 32), torch.zeros(1, 64)), request(recorded), 1)])


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"steps": -1}, "image_steps=-1"), ({"steps": 1001}, "at most 1000"), ({"guidance": float("nan")}, "flux_guidance=nan"),
        ({"guidance": -1.0}, "flux_guidance=-1.0"), ({"schedule": "x"}, "flux_schedule='x'"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_used(settings, sentence):
    with pytest.raises(OpenSoraError, match=sentence):
        PictureRequest(48, 80, **settings)
    with pytest.raises(OpenSoraError, match="multiples of 16"):
        PictureRequest(50, 80)


def test_released_flux_dev_is_read_as_it_is_described(write_hole, tmp_path):
    from opensora_core.families import table

    dit = write_hole(tmp_path / "flux1-dev.safetensors", table.manifest(FLUX_DEV))
    vae = write_hole(tmp_path / "ae.safetensors", table.manifest(FLUX_AE), "F32")
    assert check_picture_files(dit, vae) == FLUX_DEV
