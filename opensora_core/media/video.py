"""Files at the two ends: a picture or a clip read for a reference, and frames written as an mp4 (or one as a PNG)."""

import math
import struct
from collections import deque
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy
import torch

from ..errors import OpenSoraError, complete_or_absent

# The reference's quality. The matrix is converted and named, so that no player has to guess it from the height.
# Source: hpcaitech/Open-Sora@7ad6a96a opensora/datasets/utils.py, save_sample (H.264, crf 23).
_ENCODER = [
    *("-crf", "23", "-vf", "scale=out_color_matrix=bt709:out_range=tv"),
    *("-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709", "-color_range", "tv"),
    *("-movflags", "+faststart", "-f", "mp4"),
]
VIDEO_SUFFIX, IMAGE_SUFFIX, PROMPT_SUFFIX = ".mp4", ".png", ".txt"
_TAKEN = (VIDEO_SUFFIX, IMAGE_SUFFIX, PROMPT_SUFFIX, ".latent")  # a long video's latents may outlive it
VIDEO_SUFFIXES = (VIDEO_SUFFIX, ".mov", ".mkv", ".webm", ".avi", ".m4v")


def to_uint8(frames) -> numpy.ndarray:
    """Frames as 8-bit RGB.

    Args:
        frames: [T, H, W, 3] uint8, or float in 0..1 of any precision (values outside are clamped); a tensor,
            an array, or a sequence of [H, W, 3] frames.

    Returns:
        [T, H, W, 3] uint8. The product and the rounding are fp32: in bf16 only 193 of the 256 levels can occur.

    Raises:
        OpenSoraError: another shape, another kind of number, or values that are not numbers.
    """
    if isinstance(frames, Sequence) and len(frames):
        frames = torch.stack([torch.as_tensor(frame) for frame in frames])
    frames = torch.as_tensor(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise OpenSoraError(f"Frames are [frames, height, width, 3]; these are {list(frames.shape)}.")
    if frames.dtype != torch.uint8:
        if not frames.is_floating_point():
            raise OpenSoraError(f"Frames are uint8 or float in 0..1; these are {frames.dtype}.")
        frames = frames.float()
        if not torch.isfinite(frames).all():
            raise OpenSoraError("The frames hold values that are not numbers (NaN or infinite).")
        frames = (frames.clamp(0, 1) * 255).round().to(torch.uint8)
    return frames.cpu().numpy()


def save_video(frames, path, fps: float = 24, *, prompt: str | None = None) -> Path:
    """Write frames as an H.264 mp4 (yuv420p, crf 23, index in front); a single frame as a PNG.

    The file appears under its name only when it is complete.

    Args:
        frames: see to_uint8. Sides must be even for an mp4.
        path: where to write, ending in .mp4 or .png; replaced if it exists. Folders are made.
        prompt: the prompt as it was encoded, written beside the video as .txt.

    Returns:
        The file written: `path`, with the suffix .png if there is one frame.

    Raises:
        OpenSoraError: frames, size, frame rate or name that no mp4 can have, or no imageio-ffmpeg.
        OSError: the file cannot be written.
    """
    pixels = to_uint8(frames)
    path = Path(path)
    _check_video(pixels, path, fps)
    path.parent.mkdir(parents=True, exist_ok=True)
    if len(pixels) == 1:
        path = path.with_suffix(IMAGE_SUFFIX)
        _write_png(pixels[0], path)
    else:
        _write_mp4(pixels, path, fps)
    if prompt is not None:
        with complete_or_absent(path.with_suffix(PROMPT_SUFFIX)) as partial:
            partial.write_text(prompt + "\n", encoding="utf-8")
    return path


def read_image(path) -> torch.Tensor:
    """Read a picture as it is meant to be seen: turned by its EXIF orientation.

    Returns:
        [1, H, W, 3] fp32 in 0..1 on the CPU.

    Raises:
        OpenSoraError: no such file, a file that is not a picture, or one that is transparent in places.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise OpenSoraError(f"The image {path} {what}; give a picture such as a PNG or JPEG file.")
    try:
        with Image.open(path) as opened:
            picture = rgb_array(ImageOps.exif_transpose(opened), f"The image {path}")
    except OpenSoraError:  # a ValueError, but not Pillow's
        raise
    except Image.DecompressionBombError as error:
        raise OpenSoraError(
            f"{path} has more pixels than a picture is read with here ({2 * Image.MAX_IMAGE_PIXELS:,}); scale it down."
        ) from error
    except UnidentifiedImageError as error:
        raise OpenSoraError(f"{path} is not a picture that can be read; give a PNG or JPEG file.") from error
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for broken data of a known format
        raise OpenSoraError(f"The image {path} is damaged and cannot be read ({error}).") from error
    return torch.from_numpy(picture.astype(numpy.float32) / 255).unsqueeze(0)


def is_video(path) -> bool:
    """Whether a file's name says that it is a video."""
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


def media_size(path) -> tuple[int, int]:
    """(height, width) of a picture, or of a video's frames, as read_image and read_clip give them.

    Raises:
        OpenSoraError: no such file, or neither of the two.
    """
    return tuple((read_clip(path, 1, from_end=False) if is_video(path) else read_image(path)).shape[1:3])


def read_clip(path, count: int, *, from_end: bool) -> torch.Tensor:
    """Read the first or the last `count` frames of a video at its own frame rate; no more than those are kept.

    Returns:
        [count, H, W, 3] uint8 on the CPU; fewer where the video has fewer.

    Raises:
        OpenSoraError: no such file, a file that is not a video or is damaged, or no imageio-ffmpeg.
    """
    try:
        from imageio_ffmpeg import read_frames
    except ImportError as error:
        raise OpenSoraError("Reading a video needs imageio-ffmpeg: pip install imageio-ffmpeg.") from error
    path = Path(path)
    if not path.is_file():
        raise OpenSoraError(f"The clip {path} does not exist; give a video such as an mp4 file.")
    kept: deque[bytes] = deque(maxlen=count)
    try:
        # Every frame once, as the file has them: by default ffmpeg repeats and drops some to even out the rate.
        with closing(read_frames(str(path), output_params=["-fps_mode", "passthrough"])) as reader:
            width, height = next(reader)["size"]
            for frame in reader:
                kept.append(frame)
                if len(kept) == count and not from_end:
                    break
    except (OSError, RuntimeError, KeyError, StopIteration, AssertionError) as error:  # what the reader raises for what is no video
        raise OpenSoraError(f"{path} is not a video that can be read; give an mp4 file, or another that ffmpeg knows.") from error
    if not kept:
        raise OpenSoraError(f"The clip {path} has no frame that can be read; give an mp4 file, or another that ffmpeg knows.")
    pixels = numpy.frombuffer(b"".join(kept), numpy.uint8).reshape(len(kept), height, width, 3)
    return torch.from_numpy(pixels.copy())


def rgb_array(picture, name: str) -> numpy.ndarray:
    """[H, W, 3] uint8 of a PIL image of any mode.

    Args:
        name: for messages.

    Raises:
        OpenSoraError: it is transparent in places.
    """
    if picture.mode.startswith("I") or picture.mode == "F":  # 16-bit greys: Pillow's own conversion clips them to white
        grey = numpy.asarray(picture).astype(numpy.float32)
        grey = (grey / (65535 if picture.mode.startswith("I") else 1)).clip(0, 1)
        return numpy.repeat((grey * 255).round().astype(numpy.uint8)[:, :, None], 3, axis=2)
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        if picture.getextrema()[3][0] < 255:
            raise OpenSoraError(
                f"{name} is transparent in places, which no frame of a video is; lay it on a background of your choice and save it without alpha channel."
            )
    return numpy.asarray(picture.convert("RGB"))


def numbered(path: Path, number: int) -> Path:
    """clip.mp4 -> clip.mp4, clip_1.mp4, clip_2.mp4, ..."""
    return path if number == 0 else path.with_stem(f"{path.stem}_{number}")


def taken_by(path: Path) -> Path | None:
    """The video, picture, prompt or latents that have a file's name, if any: a run writes more than one of them."""
    return next((file for suffix in (path.suffix, *_TAKEN) if (file := path.with_suffix(suffix)).exists()), None)


def unused_path(path) -> Path:
    """`path`, or the first numbered one of it that is not taken."""
    path = Path(path)
    number = 0
    while taken_by(numbered(path, number)):
        number += 1
    return numbered(path, number)


def _check_video(pixels: numpy.ndarray, path: Path, fps: float) -> None:
    if not (math.isfinite(fps) and 0 < fps <= 1000):
        raise OpenSoraError(f"fps={fps} is not a frame rate; use a number above 0, such as 24.")
    if path.suffix.lower() not in (VIDEO_SUFFIX, IMAGE_SUFFIX):
        raise OpenSoraError(f"{path.name} does not say what to write; end it in {VIDEO_SUFFIX} (or {IMAGE_SUFFIX} for a single frame).")
    frames, height, width, _ = pixels.shape
    if frames == 1:
        return
    if path.suffix.lower() == IMAGE_SUFFIX:
        raise OpenSoraError(f"{frames} frames do not fit in one picture; end {path.name} in {VIDEO_SUFFIX}.")
    if height % 2 or width % 2:
        raise OpenSoraError(f"An H.264 video has even sides; {height}x{width} (height x width) does not.")


def _write_png(pixels: numpy.ndarray, path: Path) -> None:
    from PIL import Image

    with complete_or_absent(path) as partial:
        Image.fromarray(pixels).save(partial, format="PNG")


def _write_mp4(pixels: numpy.ndarray, path: Path, fps: float) -> None:
    try:
        from imageio_ffmpeg import write_frames
    except ImportError as error:
        raise OpenSoraError("Writing an mp4 needs imageio-ffmpeg: pip install imageio-ffmpeg.") from error
    _, height, width, _ = pixels.shape
    with complete_or_absent(path) as partial:
        writer = write_frames(
            str(partial),
            (width, height),
            fps=fps,
            codec="libx264",
            quality=None,  # crf is named below
            macro_block_size=1,
            ffmpeg_log_level="error",
            output_params=list(_ENCODER),
        )
        try:
            writer.send(None)
            for frame in pixels:
                writer.send(numpy.ascontiguousarray(frame))
        except (OSError, RuntimeError) as error:
            raise OSError(f"{path} could not be written: ffmpeg stopped early ({str(error).splitlines()[0]}).") from error
        finally:
            writer.close()
        # The writer does not tell how the encoder ended (a full disk, say); a finished mp4 has its index.
        if not _has_index(partial):
            raise OSError(f"{path} could not be written: ffmpeg did not finish the file; is the disk full?")


def _has_index(path: Path) -> bool:
    """Whether an mp4's top level holds the `moov` box that the encoder writes last, and every box is whole."""
    if not path.is_file():
        return False
    end, found, offset = path.stat().st_size, False, 0
    with path.open("rb") as file:
        while offset < end:
            file.seek(offset)
            header = file.read(16)
            if len(header) < 8:
                return False
            size, kind = struct.unpack(">I4s", header[:8])
            if size == 1 and len(header) == 16:
                (size,) = struct.unpack(">Q", header[8:])
            if size < 8:
                return False
            found, offset = found or kind == b"moov", offset + size
    return found and offset == end
