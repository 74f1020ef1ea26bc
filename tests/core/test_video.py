"""Pictures in, videos out: what a player and a person find in the files."""

import os

import imageio_ffmpeg
import numpy
import pytest
import torch
from PIL import Image

from opensora_core.errors import OpenSoraError
from opensora_core.media import video


def clip(num_frames=5, height=64, width=96):
    """Frames that all differ: a grey ramp over time, a red half and a blue half."""
    frames = numpy.zeros((num_frames, height, width, 3), numpy.uint8)
    frames[:, :, : width // 2, 0] = 200
    frames[:, :, width // 2 :, 2] = 200
    frames[..., 1] = numpy.linspace(20, 180, num_frames).astype(numpy.uint8)[:, None, None]
    return frames


def read_back(path):
    """(metadata, frames [T, H, W, 3]) as a player decodes them."""
    reader = imageio_ffmpeg.read_frames(str(path))
    meta = next(reader)
    width, height = meta["size"]
    return meta, numpy.stack([numpy.frombuffer(frame, numpy.uint8).reshape(height, width, 3) for frame in reader])


def top_level_boxes(path):
    data, offset, kinds = path.read_bytes(), 0, []
    while offset < len(data):
        kinds.append(data[offset + 4 : offset + 8])
        offset += int.from_bytes(data[offset : offset + 4], "big")
    return kinds


def test_an_mp4_holds_every_frame_at_its_rate_in_a_form_players_open(tmp_path):
    frames = clip()
    path = video.save_video(frames, tmp_path / "new" / "clip.mp4", fps=24)
    meta, decoded = read_back(path)
    assert meta["codec"] == "h264" and meta["pix_fmt"].startswith("yuv420p") and "bt709" in meta["pix_fmt"]
    assert meta["fps"] == 24 and meta["size"] == (96, 64)
    assert decoded.shape == frames.shape
    assert numpy.abs(decoded[:, :, 8:40].astype(int) - frames[:, :, 8:40]).max() <= 6  # colours too, so the named matrix is the one used
    kinds = top_level_boxes(path)
    assert kinds.index(b"moov") < kinds.index(b"mdat")


def test_a_single_frame_is_a_png_without_loss(tmp_path):
    frames = clip(1, 64, 95)
    path = video.save_video(frames, tmp_path / "clip.mp4", prompt="a cat. 24 FPS.")
    assert path == tmp_path / "clip.png"
    assert numpy.array_equal(numpy.asarray(Image.open(path)), frames[0])
    assert (tmp_path / "clip.txt").read_text(encoding="utf-8") == "a cat. 24 FPS.\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip.png", "clip.txt"]


def test_eight_bits_are_rounded_in_fp32_whatever_the_input():
    levels = torch.arange(256, dtype=torch.float32).div(255).view(1, 1, 256, 1).expand(1, 1, 256, 3)
    assert torch.equal(torch.from_numpy(video.to_uint8(levels))[0, 0, :, 0], torch.arange(256, dtype=torch.uint8))
    assert len(numpy.unique(video.to_uint8(torch.linspace(0, 1, 4096, dtype=torch.bfloat16).view(1, 1, -1, 1).expand(-1, -1, -1, 3)))) > 193
    outside = torch.tensor([-1.0, 0.4999 / 255, 2.0]).view(1, 1, 1, 3)
    assert video.to_uint8(outside).tolist() == [[[[0, 0, 255]]]]
    assert video.to_uint8([torch.zeros(2, 2, 3), torch.ones(2, 2, 3)]).shape == (2, 2, 2, 3)


@pytest.mark.parametrize(
    ("frames", "name", "fps", "says"),
    [
        (clip(2, 64, 95), "clip.mp4", 24, "even sides"),
        (clip(), "clip.avi", 24, ".mp4"),
        (clip(), "clip.png", 24, "one picture"),
        (clip(), "clip.mp4", 0, "frame rate"),
        (clip(), "clip.mp4", float("nan"), "frame rate"),
        (clip()[..., :2], "clip.mp4", 24, "[5, 64, 96, 2]"),
        (clip().astype(numpy.int64), "clip.mp4", 24, "int64"),
        (torch.full((2, 8, 8, 3), torch.nan), "clip.mp4", 24, "not numbers"),
    ],
)
def test_what_no_mp4_can_hold_is_refused_in_a_sentence_before_anything_is_written(tmp_path, frames, name, fps, says):
    with pytest.raises(OpenSoraError) as caught:
        video.save_video(frames, tmp_path / name, fps)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_no_file_and_keeps_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(video.numpy, "ascontiguousarray", interrupted)
    with pytest.raises(KeyboardInterrupt):
        video.save_video(clip(), path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_file_the_encoder_did_not_finish_is_an_error(tmp_path, monkeypatch):
    def encoder_that_dies(path, size, **_):
        with open(path, "wb") as file:
            while True:
                frame = yield
                file.write(b"" if frame is None else frame[:8].tobytes())

    monkeypatch.setattr(imageio_ffmpeg, "write_frames", encoder_that_dies)
    with pytest.raises(OSError, match="did not finish"):
        video.save_video(clip(), tmp_path / "clip.mp4")
    assert not list(tmp_path.iterdir())


def test_a_truncated_mp4_has_no_index(tmp_path):
    path = video.save_video(clip(), tmp_path / "clip.mp4")
    assert video._has_index(path)
    os.truncate(path, path.stat().st_size - 1)
    assert not video._has_index(path)


def test_unused_path_skips_every_file_of_a_taken_name(tmp_path):
    out = tmp_path / "clip.mp4"
    assert video.unused_path(out) == out
    out.touch()
    (tmp_path / "clip_1.png").touch()
    (tmp_path / "clip_2.txt").touch()
    assert video.unused_path(out) == tmp_path / "clip_3.mp4"


def test_a_photo_is_turned_as_its_camera_says(tmp_path):
    pixels = numpy.zeros((4, 6, 3), numpy.uint8)
    pixels[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned a quarter clockwise: the top left corner goes to the top right
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
    image = video.read_image(tmp_path / "photo.png")
    assert image.shape == (1, 6, 4, 3) and image.dtype == torch.float32
    assert image[0, 0, -1, 0] == 1 and image.sum() == 3


def test_transparency_is_one_sentence_unless_nothing_is_transparent_and_16_bit_grey_keeps_its_range(tmp_path):
    pixels = numpy.array([[[0, 255, 0, 254], [255, 0, 0, 255]]], numpy.uint8)
    Image.fromarray(pixels).save(tmp_path / "rgba.png")
    with pytest.raises(OpenSoraError, match="^The image .*rgba.png is transparent in places.*lay it on a background"):
        video.read_image(tmp_path / "rgba.png")
    pixels[..., 3] = 255
    Image.fromarray(pixels).save(tmp_path / "rgba.png")
    assert video.read_image(tmp_path / "rgba.png")[0, 0].tolist() == [[0, 1, 0], [1, 0, 0]]
    Image.fromarray(numpy.array([[0, 32896, 65535]], numpy.uint16)).save(tmp_path / "grey.png")
    assert (video.read_image(tmp_path / "grey.png")[0, 0, :, 0] * 255).round().tolist() == [0, 128, 255]
    palette = Image.fromarray(numpy.array([[0, 1]], numpy.uint8), mode="P")
    palette.putpalette([10, 20, 30, 0, 0, 255])
    palette.save(tmp_path / "palette.gif", transparency=0)
    with pytest.raises(OpenSoraError, match="palette.gif is transparent in places"):
        video.read_image(tmp_path / "palette.gif")


def test_what_is_not_a_picture_is_said_in_one_sentence(tmp_path):
    (tmp_path / "notes.txt").write_text("not a picture")
    Image.fromarray(clip()[0]).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    for name, says in (("missing.png", "does not exist"), ("notes.txt", "not a picture"), ("cut.png", "damaged"), (".", "is a folder")):
        with pytest.raises(OpenSoraError, match=says) as caught:
            video.read_image(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_picture_of_far_too_many_pixels_is_said_to_be_that(tmp_path, monkeypatch):
    Image.new("1", (64, 64)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(OpenSoraError, match=r"large\.png has more pixels than a picture is read with here \(2,000\); scale it down"):
        video.read_image(tmp_path / "large.png")
