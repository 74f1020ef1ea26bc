"""Empty clips, and the pictures that a clip begins and ends with, inside a host."""

import comfy.sd
import numpy
import pytest
import torch
from PIL import Image


@pytest.fixture(scope="module")
def error(pack):
    return pack("opensora_core.errors").OpenSoraError


@pytest.fixture(scope="module")
def vae(run_node):
    return run_node("OpenSoraVAELoader", vae_name="hunyuan_vae.safetensors")[0]


def empty(run_node, **inputs):
    defaults = {"resolution": "custom", "aspect_ratio": "16:9", "num_frames": 9, "width": 96, "height": 64, "batch_size": 1}
    return run_node("OpenSoraEmptyLatentVideo", **{**defaults, **inputs})


def pictures(count, height=50, width=130, seed=0):
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(seed))


def given_conditioning():
    return [[torch.zeros(1, 4, 64), {"pooled_output": torch.zeros(1, 64)}], [torch.ones(1, 4, 64), {"pooled_output": torch.ones(1, 64)}]]


# Empty clips


def test_sizes_are_the_references(run_node, pack):
    geometry = pack("opensora_core.geometry")
    assert len(geometry.ASPECT_RATIOS) == 15
    for resolution in ("256px", "768px"):
        for ratio in geometry.ASPECT_RATIOS:
            latent, width, height, fps = empty(run_node, resolution=resolution, aspect_ratio=ratio, num_frames=1)
            assert (height, width) == geometry.resolution_size(resolution, ratio)
            assert latent["samples"].shape == (1, 16, 1, height // 8, width // 8)
    assert fps == 24.0 and isinstance(fps, float)


@pytest.mark.parametrize(("frames", "latent_frames"), [(1, 1), (5, 2), (129, 33)])
def test_an_empty_clip_is_the_hosts(run_node, frames, latent_frames):
    latent, width, height, _ = empty(run_node, num_frames=frames, batch_size=3)
    (stock,) = run_node("EmptyHunyuanLatentVideo", width=96, height=64, length=frames, batch_size=3)
    assert torch.equal(latent["samples"], stock["samples"]) and latent["samples"].shape == (3, 16, latent_frames, 8, 12)
    assert {key: value for key, value in latent.items() if key != "samples"} == {
        key: value for key, value in stock.items() if key != "samples"
    }


def test_validation_speaks_before_the_graph_runs(pack, run_node, error):
    node = pack("nodes.latents").OpenSoraEmptyLatentVideo
    good = {"resolution": "256px", "num_frames": 129, "width": 96, "height": 64}
    assert node.validate_inputs(**good) is True
    assert node.validate_inputs(**dict.fromkeys(good)) is True  # all over wires: execute checks
    assert node.validate_inputs(**{**good, "width": 100}) is True  # not used at 256px
    for inputs, words in (
        ({"num_frames": 128}, "Use 125 or 129: num_frames=128 is not 4k+1."),
        (
            {"resolution": "custom", "width": 100},
            "Use 64x96 (height x width): height=64, width=100 are not both multiples of 16.",
        ),
        ({"resolution": "300px"}, "Use one of 256px, 768px, custom: resolution='300px' is not known."),
    ):
        assert node.validate_inputs(**{**good, **inputs}) == words
    with pytest.raises(error, match="Use 125 or 129"):
        empty(run_node, num_frames=128)
    with pytest.raises(error, match="64x96"):
        empty(run_node, width=100)


# First and last frames


def as_the_reference_fits(picture, height, width):
    """SPEC 1.10 written out: PIL bicubic on 8-bit RGB to cover, cut the middle."""
    image = Image.fromarray((picture * 255).round().to(torch.uint8).numpy())
    scale = max(height / image.height, width / image.width)
    sizes = (height, round(image.width * scale)) if scale == height / image.height else (round(image.height * scale), width)
    array = numpy.array(image.resize(sizes[::-1], Image.Resampling.BICUBIC))
    top, left = round((sizes[0] - height) / 2), round((sizes[1] - width) / 2)
    return torch.from_numpy(array[top : top + height, left : left + width]).float() / 255


def test_every_frame_of_every_item_is_its_picture_encoded_alone(run_node, vae, relative_error):
    latent, *_ = empty(run_node, batch_size=2, num_frames=13)
    start, end = pictures(2), pictures(1, 90, 70, seed=1)
    before = given_conditioning()
    positive, negative, passed = run_node(
        "OpenSoraImageToVideo", positive=before, negative=before[:1], vae=vae, latent=latent, start_image=start, end_image=end, fit="crop"
    )
    assert passed is latent and before[0][1].keys() == {"pooled_output"}  # copies, never in place
    assert [entry[1]["pooled_output"].sum() for entry in positive] == [0, 64] and len(negative) == 1
    for _, values in (*positive, *negative):
        known, mask = values["concat_latent_image"], values["concat_mask"]
        assert known.shape == (2, 16, 4, 8, 12) and mask.shape[-3:] == (4, 8, 12)
        assert mask[:, 0, :, 0, 0].tolist() == [[0, 1, 1, 0]] * mask.shape[0]  # 1 = to be generated
        assert not known[:, :, 1:3].any()
        for item in range(2):
            with torch.inference_mode():
                head, tail = (vae.encode(as_the_reference_fits(picture, 64, 96)[None]) for picture in (start[item], end[0]))
            assert relative_error(known[item, :, :1], head[0]) < 1e-6 and relative_error(known[item, :, 3:], tail[0]) < 1e-6


@pytest.mark.parametrize("kind", ["start", "end"])
def test_one_picture_serves_every_item(run_node, vae, kind):
    latent, *_ = empty(run_node, batch_size=3, num_frames=5)
    inputs = {"positive": given_conditioning(), "negative": given_conditioning(), "vae": vae, "latent": latent, "fit": "crop"}
    positive, *_ = run_node("OpenSoraImageToVideo", **inputs, **{f"{kind}_image": pictures(1)})
    known, mask = positive[0][1]["concat_latent_image"], positive[0][1]["concat_mask"]
    given, free = (0, 1) if kind == "start" else (1, 0)
    assert known[:, :, given].abs().sum() > 0 and not known[:, :, free].any()
    assert torch.equal(known[0], known[2]) and not mask[:, :, given].any() and mask[:, :, free].all()


def test_fits(run_node, vae):
    latent, *_ = empty(run_node)
    inputs = {
        "positive": given_conditioning(),
        "negative": given_conditioning(),
        "vae": vae,
        "latent": latent,
        "start_image": pictures(1, 20, 20),
    }
    results = [run_node("OpenSoraImageToVideo", **inputs, fit=fit)[0][0][1]["concat_latent_image"] for fit in ("crop", "pad", "stretch")]
    assert not torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2]) and not torch.equal(results[1], results[2])


def test_refusals_before_anything_is_encoded(run_node, vae, error, monkeypatch, pack):
    monkeypatch.setattr(pack("nodes.host.clips"), "encode", lambda *_: pytest.fail("encoded"))
    pixel_space = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})
    clip, *_ = empty(run_node, batch_size=2)

    def of(*shape):
        return {"samples": torch.zeros(shape)}

    cases = (
        ({}, "Connect start_image, end_image or both"),
        ({"start_image": pictures(1)[0]}, r"Give an IMAGE.*start_image is \[50, 130, 3\]"),
        ({"end_image": pictures(1)[..., :1]}, r"end_image is \[1, 50, 130, 1\]"),
        ({"start_image": pictures(3)}, "Give 1 or 2.*start_image holds 3 pictures for a batch of 2 videos"),
        ({"start_image": pictures(1), "latent": of(1, 16, 8, 8)}, r"This LATENT is \[1, 16, 8, 8\]"),
        ({"start_image": pictures(1), "latent": of(1, 4, 3, 8, 8)}, r"This LATENT is \[1, 4, 3, 8, 8\]"),
        ({"start_image": pictures(1), "latent": of(1, 16, 1, 8, 8)}, "Use at least 5 frames: .*1 frame"),
        ({"start_image": pictures(1), "end_image": pictures(1), "latent": of(1, 16, 2, 8, 8)}, "Use at least 9 frames: .*5 frame"),
        ({"start_image": pictures(1), "latent": of(1, 16, 3, 9, 8)}, "height=72, width=64 are not both multiples of 16"),
        ({"start_image": pictures(1), "vae": pixel_space}, "this VAE holds PixelspaceConversionVAE"),
    )
    for inputs, words in cases:
        with pytest.raises(error, match=words):
            base = {"positive": given_conditioning(), "negative": given_conditioning(), "vae": vae, "latent": clip, "fit": "crop"}
            run_node("OpenSoraImageToVideo", **{**base, **inputs})
