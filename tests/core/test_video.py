"""Pictures in, videos out: what a player and a person find in the files."""

import os
import shutil
import subprocess
import sys

import imageio_ffmpeg
import numpy
import pytest
import torch
from PIL import Image

from opensora_core.errors import OpenSoraError
from opensora_core.media import stills, video


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


def test_a_photo_is_turned_as_its_camera_says(tmp_path):
    pixels = numpy.zeros((4, 6, 3), numpy.uint8)
    pixels[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned a quarter clockwise: the top left corner goes to the top right
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
    image = stills.read_image(tmp_path / "photo.png")
    assert image.shape == (1, 6, 4, 3) and image.dtype == torch.float32
    assert image[0, 0, -1, 0] == 1 and image.sum() == 3


def test_transparency_is_one_sentence_unless_nothing_is_transparent_and_16_bit_grey_keeps_its_range(tmp_path):
    pixels = numpy.array([[[0, 255, 0, 254], [255, 0, 0, 255]]], numpy.uint8)
    Image.fromarray(pixels).save(tmp_path / "rgba.png")
    with pytest.raises(OpenSoraError, match="^Lay it on a background.*the image .*rgba.png is transparent in places"):
        stills.read_image(tmp_path / "rgba.png")
    pixels[..., 3] = 255
    Image.fromarray(pixels).save(tmp_path / "rgba.png")
    assert stills.read_image(tmp_path / "rgba.png")[0, 0].tolist() == [[0, 1, 0], [1, 0, 0]]
    Image.fromarray(numpy.array([[0, 32896, 65535]], numpy.uint16)).save(tmp_path / "grey.png")
    assert (stills.read_image(tmp_path / "grey.png")[0, 0, :, 0] * 255).round().tolist() == [0, 128, 255]
    palette = Image.fromarray(numpy.array([[0, 1]], numpy.uint8), mode="P")
    palette.putpalette([10, 20, 30, 0, 0, 255])
    palette.save(tmp_path / "palette.gif", transparency=0)
    with pytest.raises(OpenSoraError, match="palette.gif is transparent in places"):
        stills.read_image(tmp_path / "palette.gif")


def test_what_is_not_a_picture_is_said_in_one_sentence(tmp_path):
    (tmp_path / "notes.txt").write_text("not a picture")
    Image.fromarray(clip()[0]).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    for name, says in (("missing.png", "does not exist"), ("notes.txt", "not a picture"), ("cut.png", "damaged"), (".", "is a folder")):
        with pytest.raises(OpenSoraError, match=says) as caught:
            stills.read_image(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_picture_of_far_too_many_pixels_is_said_to_be_that(tmp_path, monkeypatch):
    Image.new("1", (64, 64)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(OpenSoraError, match=r"Scale it down.*large\.png has more pixels than a picture is read with here \(2,000\)"):
        stills.read_image(tmp_path / "large.png")


def test_a_small_file_of_very_many_pixels_is_read_in_bounded_memory(tmp_path):
    width = 9000
    Image.new("1", (width, 6000), 1).save(tmp_path / "wide.png")
    assert (tmp_path / "wide.png").stat().st_size < 30_000
    found = stills.read_image(tmp_path / "wide.png")
    assert found.shape == (1, 3000, width // 2, 3) and found.min() == 1
    Image.fromarray(numpy.full((6000, width), 65535, numpy.uint16)).save(tmp_path / "sixteen.png")
    found = stills.read_image(tmp_path / "sixteen.png")
    assert found.shape == (1, 3000, width // 2, 3) and found.min() == 1
    turned = Image.new("RGB", (7000, 5000), "red")
    exif = turned.getexif()
    exif[274] = 6
    for name in ("turned.jpg", "turned.png"):
        turned.save(tmp_path / name, exif=exif)
        assert stills.read_image(tmp_path / name).shape == (1, 3500, 2500, 3), name


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_picture_of_a_camera_is_read_as_it_is(tmp_path, suffix):
    pixels = numpy.random.default_rng(0).integers(0, 256, (40, 60, 3), numpy.uint8)
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}")
    expected = numpy.asarray(Image.open(tmp_path / f"a.{suffix}").convert("RGB")).astype(numpy.float32) / 255
    assert numpy.array_equal(stills.read_image(tmp_path / f"a.{suffix}")[0].numpy(), expected)


def test_numbers_of_an_unknown_range_are_refused_and_known_ones_read(tmp_path):
    ramp = numpy.linspace(0, 1, 64, dtype=numpy.float32).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "unit.tif")
    assert numpy.abs(stills.read_image(tmp_path / "unit.tif")[0, ..., 0].numpy() - ramp).max() <= 0.5 / 255 + 1e-6
    Image.fromarray(ramp * 200).save(tmp_path / "large.tif")
    with pytest.raises(OpenSoraError, match="floats that are not from 0 to 1"):
        stills.read_image(tmp_path / "large.tif")
    Image.fromarray((ramp * 1e6).astype(numpy.int32)).save(tmp_path / "integers.tif")
    with pytest.raises(OpenSoraError, match="more than 16 bits"):
        stills.read_image(tmp_path / "integers.tif")
    Image.fromarray((ramp * 65535).astype(numpy.uint16)).save(tmp_path / "sixteen.png")
    assert numpy.abs(stills.read_image(tmp_path / "sixteen.png")[0, ..., 0].numpy() - ramp).max() <= 0.5 / 255 + 1e-4


def test_of_an_animated_picture_the_first_frame_is_taken_and_said(tmp_path, caplog):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert stills.read_image(tmp_path / "moving.gif")[0, 0, 0].tolist() == [1, 0, 0]
    assert "moving.gif has 3 pictures; its first one is taken" in caplog.text


def encode(path, *settings, source="testsrc=size=96x64:rate=25:duration=0.4"):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", "-f", "lavfi", "-i", source, *settings, str(path)]
    subprocess.run(command, check=True)
    return path


@pytest.mark.parametrize("name", ["12:30.mp4", "-y.mp4", "%03d.mp4", "file:x.mp4", "concat:a.mp4", "a b'c.mp4"])
def test_a_name_that_ffmpeg_would_read_as_something_else_is_a_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    written = video.save_video(clip(), name)
    assert os.listdir(tmp_path) == [name] and str(written) == name
    assert video.read_clip(name, 2, from_end=True).shape == (2, 64, 96, 3)


@pytest.mark.parametrize(
    "text", ["ffconcat version 1.0\nfile {}\n", "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{}\n#EXT-X-ENDLIST\n"], ids=["concat", "hls"]
)
def test_a_list_of_files_that_is_named_as_a_video_opens_none_of_them(tmp_path, text):
    real = encode(tmp_path / "real.mp4")
    for name in ("list.mp4", "list.m3u8", "list.ffconcat"):
        (tmp_path / name).write_text(text.format(real))
        with pytest.raises(OpenSoraError, match="is not a video that can be read"):
            video.read_clip(tmp_path / name, 1, from_end=False)


@pytest.mark.parametrize(
    "transfer, level, expected", [("smpte2084", 147, 248), ("smpte2084", 100, 115), ("arib-std-b67", 190, 248), ("bt709", 147, 146)]
)
def test_high_dynamic_range_is_brought_to_standard_range(tmp_path, transfer, level, expected):
    # 203 nits, the reference white of both: 58 % of PQ and 75 % of HLG.
    space = "bt709" if transfer == "bt709" else "bt2020nc"
    primaries = "bt709" if transfer == "bt709" else "bt2020"
    grey = f"color=c=#{level:02x}{level:02x}{level:02x}:size=96x64:rate=25:duration=0.2,format=rgb24,scale=out_color_matrix={primaries}:out_range=tv"
    named = f"setparams=color_primaries={primaries}:color_trc={transfer}:colorspace={space}"
    path = encode(tmp_path / "clip.mp4", "-c:v", "libx264", "-crf", "5", source=f"{grey},format=yuv420p,{named}")
    assert abs(int(video.read_clip(path, 1, from_end=False).float().mean()) - expected) <= 2


def test_pixels_that_are_not_square_are_made_so(tmp_path):
    path = encode(tmp_path / "anamorphic.mp4", "-vf", "setsar=4/3", "-c:v", "libx264")
    assert video.media_size(path) == (64, 128)
    plain = encode(tmp_path / "plain.mp4", "-c:v", "libx264")
    reader = imageio_ffmpeg.read_frames(str(plain))
    next(reader)
    expected = numpy.frombuffer(next(reader), numpy.uint8).reshape(64, 96, 3)
    assert numpy.array_equal(video.read_clip(plain, 1, from_end=False)[0].numpy(), expected), "square ones keep every bit"


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "webm", "avi", "ts", "m2ts", "mpg", "flv", "wmv"])
def test_a_video_is_told_by_what_it_holds(tmp_path, suffix):
    path = encode(tmp_path / f"clip.{suffix}")
    other = path.rename(tmp_path / "clip.jpg")
    assert video.is_video(other) and video.read_clip(other, 1, from_end=False).shape == (1, 64, 96, 3)


def test_a_picture_is_no_video_whatever_it_is_called(tmp_path):
    for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        Image.new("RGB", (16, 16)).save(tmp_path / "picture.mp4", format=form)
        assert not video.is_video(tmp_path / "picture.mp4"), form
    assert video.is_video(tmp_path / "missing.mp4") and not video.is_video(tmp_path / "missing.png")


def test_the_encoders_own_reason_is_what_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "_ENCODER", ["-vf", "nosuchfilter", "-f", "mp4"])
    with pytest.raises(OSError, match="clip.mp4 could not be written: .*nosuchfilter"):
        video.save_video(clip(), tmp_path / "clip.mp4")
    assert not list(tmp_path.iterdir()) and "FFREPORT" not in os.environ


def test_a_finished_video_stands_when_what_lies_beside_it_fails(tmp_path, caplog):
    (tmp_path / "clip.txt").mkdir()
    path = video.save_video(clip(), tmp_path / "clip.mp4", prompt="a cat")
    assert read_back(path)[1].shape == clip().shape
    assert caplog.messages[0].startswith(f"{path} is finished; its prompt could not be written to clip.txt")


def test_what_the_end_of_a_run_needs_is_looked_for_at_its_beginning(tmp_path, monkeypatch):
    target, shape = tmp_path / "new" / "clip.mp4", (17, 64, 64)
    video.check_can_be_written(target, shape, 24)
    assert not list(target.parent.iterdir()), "the trial leaves nothing"
    monkeypatch.setattr(video.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    with pytest.raises(OpenSoraError, match="1 MB left on its disk and a video of 17 frames of 64x64"):
        video.check_can_be_written(target, shape, 24)
    monkeypatch.undo()
    with pytest.raises(OpenSoraError, match="Choose another name or folder"):
        video.check_can_be_written(tmp_path / ("x" * 300 + ".mp4"), shape, 24)
    (tmp_path / "file").touch()
    with pytest.raises(OpenSoraError, match="Choose another name or folder"):
        video.check_can_be_written(tmp_path / "file" / "clip.mp4", shape, 24)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nowhere/ffmpeg")
    for work in (lambda: video.check_can_be_written(target, shape, 24), lambda: video.save_video(clip(), target)):
        with pytest.raises(OpenSoraError, match="IMAGEIO_FFMPEG_EXE names /nowhere/ffmpeg, which is no program"):
            work()
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(OpenSoraError, match="pip install imageio-ffmpeg"):
        video.check_can_be_written(target, shape, 24)


def test_a_piece_of_a_clip_is_read_at_another_rate(tmp_path):
    """Every second frame from the fourth on; nothing before it is kept."""
    levels = torch.arange(24).view(-1, 1, 1, 1) * 8 + 20
    path = video.save_video(levels.expand(-1, 32, 32, 3).to(torch.uint8), tmp_path / "v.mp4", 24)
    found = video.read_clip(path, 3, from_end=False, fps=12, skip=4)
    assert found.shape == (3, 32, 32, 3)
    steps = found.float().mean((1, 2, 3)).diff()
    assert ((steps - 16).abs() < 4).all() and abs(float(found[0].float().mean()) - (20 + 8 * 8)) < 12
