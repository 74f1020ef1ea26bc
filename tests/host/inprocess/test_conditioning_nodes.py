"""Clips, latents and strength: what a video is given besides pictures, inside a host."""

import av
import numpy
import pytest
import torch
from comfy_api.latest import InputImpl, Types
from in_core import run_in_core

SHAPE = (1, 16, 11, 4, 6)


@pytest.fixture(scope="module")
def error(pack):
    return pack("opensora_core.errors").OpenSoraError


@pytest.fixture(scope="module")
def vae(run_node):
    return run_node("OpenSoraVAELoader", vae_name="hunyuan_vae.safetensors")[0]


def clip_of(shape=SHAPE):
    return {"samples": torch.zeros(shape)}


def frames_of(count, height=40, width=56, seed=0):
    """Frames that differ, in steps of 1/255, smooth enough for a lossy file to keep them apart."""
    ramp = torch.linspace(0, 1, width).view(1, 1, width, 1) * torch.linspace(0.3, 1, height).view(1, height, 1, 1)
    shade = (torch.arange(count) * 37 % 200 / 255).view(-1, 1, 1, 1)
    return ((ramp * 0.2 + shade).expand(-1, -1, -1, 3) * 255).round() / 255


def given(conditioning, **changes):
    return {"positive": conditioning(1), "negative": conditioning(2), **changes}


def from_video(run_node, conditioning, vae, **changes):
    inputs = given(conditioning, vae=vae, latent=clip_of(), direction="forwards", context="33", fit="crop", strength=1.0)
    return run_node("OpenSoraVideoToVideo", **{**inputs, **changes})


def write_mp4(path, frames, rate=24):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for frame in frames:
            pixels = (frame * 255).round().to(torch.uint8).numpy()
            container.mux(stream.encode(av.VideoFrame.from_ndarray(numpy.ascontiguousarray(pixels), format="rgb24")))
        container.mux(stream.encode())
    return path


# A clip


@pytest.mark.parametrize(("direction", "place"), [("forwards", slice(0, 9)), ("backwards", slice(2, 11))])
def test_the_end_that_the_video_touches_is_fitted_and_encoded_as_one_clip(
    direction, place, run_node, conditioning, vae, pack, relative_error
):
    frames = frames_of(40)
    latent = clip_of()
    positive, negative, passed = from_video(run_node, conditioning, vae, latent=latent, video=frames, direction=direction)
    part = frames[-33:] if direction == "forwards" else frames[:33]
    fitted = torch.nn.functional.interpolate(part.movedim(-1, 1), size=(34, 48), mode="bilinear", align_corners=False)[:, :, 1:33].movedim(
        1, -1
    )
    with torch.inference_mode():
        expected = vae.encode(fitted)
    for _, values in (*positive, *negative):
        known, mask = values["concat_latent_image"], values["concat_mask"]
        assert known.shape == SHAPE and mask[0, 0, :, 0, 0].tolist() == [float(not place.start <= i < place.stop) for i in range(11)]
        assert relative_error(known[:, :, place], expected) < 1e-5
        assert not (known * mask).any() and values["open_sora_use"].is_clip
    assert passed is latent


def test_sixty_five_frames_are_the_easy_mode(run_node, conditioning, vae):
    positive, *_ = from_video(run_node, conditioning, vae, latent=clip_of((2, 16, 18, 4, 6)), video=frames_of(65), context="65")
    assert positive[0][1]["concat_mask"][:, 0, :, 0, 0].tolist() == [[0.0] * 17 + [1.0]] * 2


@pytest.mark.parametrize("direction", ["forwards", "backwards"])
def test_a_file_is_read_where_it_is_wanted(direction, run_node, conditioning, vae, tmp_path, monkeypatch):
    path = write_mp4(tmp_path / "clip.mp4", frames_of(130))
    whole = InputImpl.VideoFromFile(str(path)).get_components().images
    assert len(whole) == 130
    expected, *_ = from_video(run_node, conditioning, vae, video=whole, direction=direction)
    counts = []
    real = InputImpl.VideoFromFile.get_components

    def counting(self):
        found = real(self)
        counts.append(len(found.images))
        return found

    monkeypatch.setattr(InputImpl.VideoFromFile, "get_components", counting)
    found, *_ = from_video(run_node, conditioning, vae, video=InputImpl.VideoFromFile(str(path)), direction=direction)
    assert torch.equal(found[0][1]["concat_latent_image"], expected[0][1]["concat_latent_image"])
    assert counts and max(counts) < 70  # 33 frames, and a second more


def test_a_video_of_frames_or_cut_before_is_taken_as_it_is(run_node, conditioning, vae, tmp_path):
    frames = frames_of(50)
    components = InputImpl.VideoFromComponents(Types.VideoComponents(images=frames, frame_rate=24))
    expected, *_ = from_video(run_node, conditioning, vae, video=frames)
    found, *_ = from_video(run_node, conditioning, vae, video=components)
    assert torch.equal(found[0][1]["concat_latent_image"], expected[0][1]["concat_latent_image"])
    path = write_mp4(tmp_path / "clip.mp4", frames_of(130))
    cut = InputImpl.VideoFromFile(str(path)).as_trimmed(start_time=0.0, duration=2.0)
    expected, *_ = from_video(run_node, conditioning, vae, video=cut.get_components().images)
    found, *_ = from_video(run_node, conditioning, vae, video=cut)
    assert torch.equal(found[0][1]["concat_latent_image"], expected[0][1]["concat_latent_image"])


def test_another_frame_rate_is_said(run_node, conditioning, vae, pack, monkeypatch):
    lines = []
    monkeypatch.setattr(pack("nodes.host.notice"), "show", lambda line, *_, **__: lines.append(line))
    for rate in (24, 30):
        video = InputImpl.VideoFromComponents(Types.VideoComponents(images=frames_of(33), frame_rate=rate))
        from_video(run_node, conditioning, vae, video=video)
    assert len(lines) == 1 and "30 FPS" in lines[0]


@pytest.mark.parametrize("direction", ["forwards", "backwards"])
def test_latents_of_a_clip_go_in_as_they_are(direction, run_node, conditioning, vae):
    finished = torch.randn(2, 16, 12, 4, 6)
    positive, *_ = from_video(
        run_node, conditioning, vae, latent=clip_of((2, *SHAPE[1:])), video={"samples": finished}, direction=direction
    )
    known = positive[0][1]["concat_latent_image"]
    if direction == "forwards":
        assert torch.equal(known[:, :, :9], finished[:, :, -9:])
    else:
        assert torch.equal(known[:, :, -9:], finished[:, :, :9])


# The run: no ramp, nothing put back, 110 forwards


def run_of(run_node, model, positive, negative, latent, steps, **guidance):
    settings = {"text_guidance": 7.5, "image_guidance": 3.0, "text_oscillation": True, "image_oscillation": True, "temporal_ramp": True}
    return run_node(
        "OpenSoraRectifiedFlowSampler", model=model, positive=positive, negative=negative, latent=latent, seed=3, steps=steps, shift=0.0,
        noise_device="cpu", latent_dtype="fp32", **{**settings, **guidance},
    )[0]["samples"]  # fmt: skip


def core_run(pack, base, entries, condition, shape, steps, ramp=True):
    """The same without the host, from the conditions as the core states them: unscaled latents."""
    schedule = pack("opensora_core.sampling.schedule")
    guidance, scale = (
        pack("opensora_core.sampling.guidance").Guidance(temporal_ramp=ramp),
        pack("opensora_core.codecs.hunyuan.config").LATENT_SCALE,
    )
    path = base / "models/diffusion_models/Open_Sora_v2.safetensors"
    model = pack("opensora_core.checkpoint.load").load_transformer(path, torch.float32)
    sigmas = schedule.sigmas(steps, schedule.latent_flow_shift(shape))
    return run_in_core(pack, model, (shape, 3), sigmas, guidance, entries, condition) / scale


def condition_of(pack, head, use):
    conditioning, scale = pack("opensora_core.sampling.given"), pack("opensora_core.codecs.hunyuan.config").LATENT_SCALE
    return conditioning.image_condition(SHAPE, head=scale * head, use=pack("opensora_core.sampling.guidance").ReferenceUse(**use))


def test_a_clip_is_neither_ramped_nor_put_back(run_node, conditioning, vae, model, pack, base, relative_error):
    before = torch.randn(1, 16, 9, 4, 6, generator=torch.Generator().manual_seed(4))
    positive, negative, latent = from_video(run_node, conditioning, vae, video={"samples": before})
    found = run_of(run_node, model, positive, negative, latent, 13)
    entries = conditioning(1)[0], conditioning(2)[0]
    # The reference has no ramp for clips: the core's run is told so by its own switch.
    expected = core_run(pack, base, entries, condition_of(pack, before, {"is_clip": True}), SHAPE, 13, ramp=False)
    assert relative_error(found, expected) < 5e-6
    assert not torch.allclose(found[:, :, :9], before, atol=1e-2)


def count_rows(model):
    import comfy.patcher_extension

    rows = []

    def counting(executor, x, *args, **kwargs):
        rows.append(x.shape[0])
        return executor(x, *args, **kwargs)

    model = model.clone()
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "count", counting)
    return model, rows


@pytest.mark.parametrize(("strength", "expected"), [(1.0, 110), (0.4, 95), (0.0, 80)])
def test_forwards_of_fifty_steps(strength, expected, run_node, conditioning, vae, model):
    counted, rows = count_rows(model)
    before = {"samples": torch.randn(1, 16, 9, 2, 2)}
    latent = clip_of((1, 16, 10, 2, 2))
    positive, negative, latent = from_video(run_node, conditioning, vae, latent=latent, video=before, strength=strength)
    run_of(run_node, counted, positive, negative, latent, 50)
    assert sum(rows) == expected


# Strength


def test_strength_is_the_share_of_steps_that_see_the_picture(run_node, conditioning, vae, model, pack, base, relative_error):
    picture = torch.randn(1, 16, 1, 4, 6, generator=torch.Generator().manual_seed(4))
    entries = conditioning(1)[0], conditioning(2)[0]

    def found(**more):
        inputs = given(conditioning, vae=vae, latent=clip_of(), fit="crop", start_latent={"samples": picture}, **more)
        return run_of(run_node, model, *run_node("OpenSoraImageToVideo", **inputs), 12)

    plain, whole, half, none = found(), found(strength=1.0), found(strength=0.5), found(strength=0.0)
    assert torch.equal(plain, whole) and torch.equal(whole[:, :, :1], picture)
    assert relative_error(half, core_run(pack, base, entries, condition_of(pack, picture, {"strength": 0.5}), SHAPE, 12)) < 5e-6
    assert torch.equal(none, run_of(run_node, model, conditioning(1), conditioning(2), clip_of(), 12))
    assert not torch.allclose(half, whole, atol=1e-2) and not torch.allclose(half, none, atol=1e-2)


# Latents of pictures


def test_a_latent_is_the_picture_it_was_encoded_from(run_node, conditioning, vae):
    picture = torch.rand(1, 32, 48, 3)
    (encoded,) = run_node("OpenSoraTiledVAEEncode", vae=vae, image=picture, tile_size=256, overlap=0.25, posterior="mode", seed=0)
    inputs = given(conditioning, vae=vae, latent=clip_of(), fit="crop")
    for kind in ("start", "end"):
        from_image, *_ = run_node("OpenSoraImageToVideo", **inputs, **{f"{kind}_image": (picture * 255).round() / 255})
        from_latent, *_ = run_node("OpenSoraImageToVideo", **inputs, **{f"{kind}_latent": encoded})
        assert torch.allclose(from_image[0][1]["concat_latent_image"], from_latent[0][1]["concat_latent_image"], atol=0.1)
        assert torch.equal(from_image[0][1]["concat_mask"], from_latent[0][1]["concat_mask"])
    mixed, *_ = run_node("OpenSoraImageToVideo", **inputs, start_latent=encoded, end_image=picture)
    assert mixed[0][1]["concat_mask"][0, 0, :, 0, 0].tolist() == [0, *[1] * 9, 0]


# Refusals, before anything is encoded


@pytest.fixture
def nothing_encoded(monkeypatch, pack):
    monkeypatch.setattr(pack("nodes.host.clips"), "encode", lambda *_: pytest.fail("encoded"))


PICTURE = torch.rand(1, 32, 48, 3)
CLIP = frames_of(40)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"start_image": torch.rand(1, 32, 48, 4)}, "Split Image with Alpha.*start_image has an alpha channel"),
        ({"end_image": torch.zeros(0, 32, 48, 3)}, r"Give an IMAGE.*end_image is \[0"),
        ({"start_image": torch.rand(5, 32, 48, 3)}, "Give one.*start_image holds 5 pictures for one video"),
        ({"start_image": PICTURE * torch.nan}, "start_image holds values that are not numbers"),
        ({"start_image": PICTURE, "latent": clip_of((1, 16, 1, 4, 6))}, "Use at least 5.*1 frame is all taken up by the picture given"),
        ({"end_latent": {"samples": torch.zeros(1, 16, 1, 4, 6)}, "latent": clip_of((1, 16, 1, 4, 6))}, "Use at least 5 frames"),
        ({"start_image": PICTURE, "start_latent": {"samples": torch.zeros(1, 16, 1, 4, 6)}}, "start_image and start_latent are both given"),
        ({"start_latent": {"samples": torch.zeros(1, 16, 4, 6)}}, "start_latent is .*of a picture model"),
        ({"end_latent": {"samples": torch.zeros(1, 4, 1, 4, 6)}}, "end_latent has 4 latent channels and the clip 16"),
        ({"start_latent": {"samples": torch.zeros(1, 16, 1, 4, 8)}}, "start_latent is of 32x64 pixels .* and the clip 32x48"),
        ({"start_latent": {"samples": torch.zeros(1, 16, 2, 4, 6)}}, "start_latent holds 2 latent frames, a picture is one"),
        ({"start_latent": {"samples": torch.zeros(3, 16, 1, 4, 6)}}, "start_latent holds 3 videos for a batch of 1"),
        ({"start_latent": {"samples": torch.full((1, 16, 1, 4, 6), torch.nan)}}, "start_latent holds values that are not numbers"),
        ({"start_image": PICTURE, "strength": 1.5}, "Use 0.0 to 1.0: strength=1.5 is out of range"),
    ],
)
def test_pictures_that_cannot_be(inputs, words, run_node, conditioning, vae, error, nothing_encoded):
    with pytest.raises(error, match=words) as caught:
        run_node("OpenSoraImageToVideo", **{**given(conditioning, vae=vae, latent=clip_of(), fit="crop"), **inputs})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"video": CLIP[:32]}, "Use a longer clip.*video has 32 frames; going on from it takes 33"),
        (
            {"video": CLIP, "context": "65", "latent": clip_of((1, 16, 20, 4, 6))},
            "Use context 33, or a longer.*video has 40 frames; .*takes 65",
        ),
        (
            {"video": CLIP, "latent": clip_of((1, 16, 9, 4, 6))},
            "Use at least 37.*a video of 33 frames is all taken up by the 33 frames of the clip",
        ),
        ({"video": frames_of(65), "context": "65"}, "Use at least 69 frames"),
        ({"video": CLIP[..., :1]}, r"Give an IMAGE.*video is \[40, 40, 56, 1\]"),
        ({"video": torch.rand(40, 8, 8, 4)}, "video has an alpha channel"),
        ({"video": CLIP[:0]}, r"Give an IMAGE.*video is \[0"),
        ({"video": CLIP * torch.nan}, "video holds values that are not numbers"),
        ({"video": CLIP, "direction": "sideways"}, "direction='sideways' is not known"),
        ({"video": CLIP, "fit": "squeeze"}, "fit='squeeze' is not known"),
        ({"video": {"samples": torch.zeros(1, 16, 8, 4, 6)}}, "Use a longer clip.*video has 29 frames; going on from it takes 33"),
        ({"video": {"samples": torch.zeros(1, 16, 9, 4, 8)}}, "video is of 32x64 pixels"),
        ({"video": {"samples": torch.zeros(1, 8, 9, 4, 6)}}, "video has 8 latent channels"),
    ],
)
def test_clips_that_cannot_be(inputs, words, run_node, conditioning, vae, error, nothing_encoded):
    with pytest.raises(error, match=words) as caught:
        from_video(run_node, conditioning, vae, **inputs)
    assert "\n" not in str(caught.value)


# The shape of a picture


@pytest.mark.parametrize(("size", "ratio"), [((1080, 1920), "16:9"), ((640, 480), "3:4"), ((64, 60), "1:1"), ((10, 300), "2.39:1")])
def test_a_picture_chooses_the_aspect_ratio(size, ratio, run_node, pack):
    inputs = {"aspect_ratio": "1:2", "num_frames": 1, "width": 64, "height": 64, "batch_size": 1, "image": torch.zeros(2, *size, 3)}
    for resolution in ("256px", "768px"):
        _, width, height, _ = run_node("OpenSoraEmptyLatentVideo", resolution=resolution, **inputs)
        assert (height, width) == pack("opensora_core.geometry").resolution_size(resolution, ratio)


@pytest.mark.parametrize(
    ("changes", "words"), [({"resolution": "custom"}, "Disconnect image"), ({"image": torch.zeros(0, 8, 8, 3)}, "at least one")]
)
def test_a_picture_that_cannot_choose(changes, words, run_node, error):
    inputs = {"aspect_ratio": "1:2", "num_frames": 1, "width": 64, "height": 64, "batch_size": 1, "image": torch.zeros(1, 8, 8, 3)}
    with pytest.raises(error, match=words):
        run_node("OpenSoraEmptyLatentVideo", **{"resolution": "256px", **inputs, **changes})
