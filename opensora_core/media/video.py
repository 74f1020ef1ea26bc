"""Clips as files: read for a reference, and frames written as an mp4 (or one as a PNG).

ffmpeg is given absolute paths, which can only be files, and reads no other file or address than the one it is given.
"""

import itertools
import logging
import math
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import numpy
import torch

from ..errors import OpenSoraError
from ..names import TOGETHER, complete_or_absent, hidden, shown
from ..readers import is_file
from .recipe import boxes
from .stills import read_image

logger = logging.getLogger(__name__)

# Upstream's quality. The matrix is converted and named, so that no player has to guess it from the height.
# Source: hpcaitech/Open-Sora@7ad6a96a opensora/datasets/utils.py, save_sample (H.264, crf 23).
_ENCODER = [
    *("-crf", "23", "-vf", "scale=out_color_matrix=bt709:out_range=tv"),
    *("-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709", "-color_range", "tv"),
    *("-movflags", "+faststart", "-f", "mp4"),
]
VIDEO_SUFFIX, IMAGE_SUFFIX, PROMPT_SUFFIX, _ = TOGETHER
VIDEO_SUFFIXES = (VIDEO_SUFFIX, ".mov", ".mkv", ".webm", ".avi", ".m4v", ".ts", ".m2ts", ".mpg", ".mpeg", ".flv", ".wmv", ".ogv", ".3gp")

# Containers that a clip comes in. Playlists and descriptions of other files, which ffmpeg would follow, are not among them.
_CONTAINERS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg,gif,mpegvideo,h264,hevc,ivf"
_FIRST_BYTES = (
    (0, b"\x1a\x45\xdf\xa3", "matroska"), (0, b"FLV", "flv"), (0, b"OggS", "ogg"), (0, b"\x00\x00\x01\xba", "mpeg"),
    (0, b"\x00\x00\x01\xb3", "mpegvideo"), (0, b"\x30\x26\xb2\x75", "asf"), (8, b"AVI ", "avi"),
    *((4, box, "mov") for box in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")),
)  # fmt: skip
_PICTURE_STARTS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*")
_PICTURE_BRANDS = (b"WEBP", b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")
# High dynamic range, by the word that ffmpeg has for its transfer: brought to SDR with reference white (203 nits) just below white.
_HDR = {"smpte2084": "PQ", "arib-std-b67": "HLG"}
_TO_SDR = (
    "zscale=t=linear:npl=203,format=gbrpf32le,zscale=p=bt709,tonemap=tonemap=mobius:param=0.9:desat=0,"
    "zscale=t=bt709:m=bt709:r=tv,format=yuv444p"
)
_SQUARE = "scale=w=max(1\\,round(iw*sar)):h=ih,setsar=1"
# What the reader raises for what is no video.
_UNREADABLE = (OSError, RuntimeError, KeyError, IndexError, StopIteration, AssertionError)
_FAILED = " could not be written: "
_LEAST_ROOM = 2**24  # bytes of disk below which no video is begun


def to_uint8(frames) -> numpy.ndarray:
    """Frames as 8-bit RGB: [T, H, W, 3] uint8. The product and the rounding are fp32: in bf16 only 193 of the 256 levels can occur.

    frames: [T, H, W, 3] uint8, or float in 0..1 of any precision (values outside are clamped); a tensor, an array, or a sequence of [H, W, 3] frames.
    Raises an OpenSoraError for another shape, another kind of number, or values that are not numbers.
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
            raise OpenSoraError("The frames hold values that are not numbers (NaN or infinite); make them again.")
        frames = (frames.clamp(0, 1) * 255).round().to(torch.uint8)
    return frames.cpu().numpy()


def save_video(frames, path, fps: float = 24, *, prompt: str | None = None, comment: str = "") -> Path:
    """Write frames as an H.264 mp4 (yuv420p, crf 23, index in front); a single frame as a PNG.

    The file appears under its name only when it is complete; it is `path`, with the suffix .png if there is one frame. Raises an OpenSoraError
    for frames, size, frame rate or name that no mp4 can have, or no imageio-ffmpeg; an OSError with the encoder's own reason.

    Args:
        frames: see to_uint8. Sides must be even for an mp4.
        path: where to write, ending in .mp4 or .png; replaced if it exists. Folders are made.
        prompt: as it was encoded, written beside the video as .txt. Where that fails, the video stands all the same and a warning says so.
        comment: a text that the mp4 itself carries, such as how it was made (media/recipe.py).
    """
    pixels = to_uint8(frames)
    path = Path(path)
    _check_video(pixels.shape, path, fps)
    path.parent.mkdir(parents=True, exist_ok=True)
    if len(pixels) == 1:
        from PIL import Image

        path = path.with_suffix(IMAGE_SUFFIX)
        with complete_or_absent(path) as partial:
            Image.fromarray(pixels[0]).save(partial, format="PNG")
    else:
        _write_mp4(pixels, path, fps, comment)
    if prompt is not None and (problem := save_prompt(path, prompt)):
        logger.warning("%s", problem)
    return path


def save_prompt(video: Path, prompt: str) -> str:
    """Write a prompt beside its finished video, as .txt. Returns what failed, in a sentence that names the video first; "" if nothing did."""
    target = video.with_suffix(PROMPT_SUFFIX)
    try:
        with complete_or_absent(target) as partial:
            partial.write_text(prompt + "\n", encoding="utf-8", errors="replace")
    except OSError as error:
        return f"{video} is finished; its prompt could not be written to {target.name} beside it ({error.strerror or error})."
    return ""


def check_can_be_written(path: Path, frames_shape: tuple[int, int, int], fps: float) -> None:
    """See that a video will find what it needs at its end: an encoder that runs, a folder and a name to write, and room on the disk.

    path: the file, or another of its folder and of a name as long. frames_shape: frames, height, width.
    """
    shape = (*frames_shape, 3)
    _check_video(shape, path, fps)
    frames, height, width = frames_shape
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        needed = max(_LEAST_ROOM, frames * height * width // 4)  # two bits a pixel: several times what most videos take
        if free < needed:
            what = f"a video of {frames} frames of {height}x{width} (height x width) may take {needed / 1e6:.0f} MB"
            raise OpenSoraError(f"{path.parent} has {free / 1e6:.0f} MB left on its disk and {what}; make room, or choose another folder.")
        trial = hidden(path.with_name(f"{path.stem}_9999"))  # as long a name as a numbered one
        try:
            _write_mp4(numpy.zeros((2, 16, 16, 3), numpy.uint8), trial, fps)
        finally:
            trial.unlink(missing_ok=True)
    except OSError as error:
        why = error.strerror or str(error).partition(_FAILED)[2].rstrip(".") or error
        raise OpenSoraError(f"Nothing can be written to {shown(path)} ({why}); choose another name or folder.") from error


def is_video(path) -> bool:
    """Whether a file holds a video, by its first bytes; one that is not there, or cannot be told so, by its name."""
    path = Path(path)
    start = _first_bytes(path)
    is_picture = start.startswith(_PICTURE_STARTS) or start[8:12] in _PICTURE_BRANDS
    return not is_picture and (_container(start) is not None or path.suffix.lower() in VIDEO_SUFFIXES)


def _first_bytes(path: Path) -> bytes:
    if not is_file(path):
        return b""
    with suppress(OSError), path.open("rb") as file:
        return file.read(400)
    return b""


def _container(start: bytes) -> str | None:
    """What ffmpeg calls the container that begins so; None where it is none of the usual ones."""
    for at, word, name in _FIRST_BYTES:
        if start[at:].startswith(word):
            return name
    # Packets of an MPEG transport stream, of 188 bytes or, with times, 192: each begins with a G.
    if any(start[first : first + 1] == start[first + step : first + step + 1] == b"G" for first, step in ((0, 188), (4, 192))):
        return "mpegts"
    return None


def media_size(path) -> tuple[int, int]:
    """(height, width) of a picture, or of a video's frames, as read_image and read_clip give them."""
    return tuple((read_clip(path, 1, from_end=False) if is_video(path) else read_image(path)).shape[1:3])


def read_clip(path, count: int, *, from_end: bool, fps: float | None = None, skip: int = 0) -> torch.Tensor:
    """Read the first or the last `count` frames of a video at its own frame rate, or at `fps`; no more than those are kept.

    Pixels that are not square are made so, by the width; PQ and HLG are brought to standard range. skip: frames at the beginning that do not count.
    Returns [count, H, W, 3] uint8 on the CPU; fewer where the video has fewer. Raises an OpenSoraError for what is no video or is damaged.
    """
    path = Path(path)
    if not is_file(path):
        raise OpenSoraError(f"The clip {shown(path)} does not exist; give a video such as an mp4 file.")
    kept: deque[bytes] = deque(maxlen=count)
    try:
        with _reader(path, "" if fps is None else f"fps={fps:g},") as (size, reader):
            for frame in itertools.islice(reader, skip, None):
                kept.append(frame)
                if len(kept) == count and not from_end:
                    break
    except _UNREADABLE as error:
        raise OpenSoraError(f"{shown(path)} is not a video that can be read; give an mp4 file, or another that ffmpeg knows.") from error
    if not kept:
        raise OpenSoraError(f"The clip {shown(path)} has no frame that can be read; give an mp4 file, or another that ffmpeg knows.")
    width, height = size
    frames = numpy.frombuffer(b"".join(kept), numpy.uint8).reshape(len(kept), height, width, 3)
    return torch.from_numpy(frames.copy())


@contextmanager
def _reader(path: Path, rate: str = "") -> Iterator[tuple[tuple[int, int], Iterator[bytes]]]:
    """((width, height), the frames of a clip): square pixels of standard range. rate: a filter that gives them another one."""
    with _frames(path, rate + _SQUARE) as (about, reader):
        kind = next((_HDR[word] for word in _HDR if word in about["pix_fmt"]), None)
        if kind is None:
            yield about["size"], reader
            return
    with ExitStack() as stack:
        try:
            about, reader = stack.enter_context(_frames(path, f"{rate}{_TO_SDR},{_SQUARE}"))
        except (OSError, RuntimeError) as error:
            what = f"{shown(path)} is an HDR video ({kind}), which this ffmpeg, without zscale or tonemap, cannot bring to standard range"
            raise OpenSoraError(f"{what}; convert it to SDR (BT.709), or use the ffmpeg that comes with imageio-ffmpeg.") from error
        yield about["size"], reader


@contextmanager
def _frames(path: Path, filters: str) -> Iterator[tuple[dict, Iterator[bytes]]]:
    """What imageio-ffmpeg says of a file, and every frame once, as the file has them, whatever its rate is."""
    container = _container(_first_bytes(path))  # its name says nothing
    only_this = ["-protocol_whitelist", "file,pipe,fd", "-format_whitelist", _CONTAINERS, *(["-f", container] if container else [])]
    output = ["-fps_mode", "passthrough", "-vf", filters]
    log = logging.getLogger("imageio_ffmpeg")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns that frames are of another size than the file says: they are made so
    try:
        with closing(_ffmpeg("Reading a video").read_frames(os.path.abspath(path), input_params=only_this, output_params=output)) as reader:
            yield next(reader), reader
    finally:
        log.setLevel(level)


def _check_video(shape: Sequence[int], path: Path, fps: float) -> None:
    if not (math.isfinite(fps) and 0 < fps <= 1000):
        raise OpenSoraError(f"fps={fps} is not a frame rate; use a number above 0, such as 24.")
    if path.suffix.lower() not in (VIDEO_SUFFIX, IMAGE_SUFFIX):
        raise OpenSoraError(f"{shown(path.name)} does not say what to write; end it in {VIDEO_SUFFIX} ({IMAGE_SUFFIX} for one frame).")
    frames, height, width, _ = shape
    if frames == 1:
        return
    if path.suffix.lower() == IMAGE_SUFFIX:
        raise OpenSoraError(f"{frames} frames do not fit in one picture; end {shown(path.name)} in {VIDEO_SUFFIX}.")
    if height % 2 or width % 2:
        raise OpenSoraError(f"An mp4 of {height}x{width} (height x width) cannot be; choose even sides.")


def _write_mp4(pixels: numpy.ndarray, path: Path, fps: float, comment: str = "") -> None:
    ffmpeg = _ffmpeg("Writing an mp4")
    _, height, width, _ = pixels.shape
    with complete_or_absent(path) as partial, _reported() as reason:
        writer = ffmpeg.write_frames(
            os.path.abspath(partial),
            (width, height),
            fps=fps,
            codec="libx264",
            quality=None,  # crf is named below
            macro_block_size=1,
            ffmpeg_log_level="error",
            output_params=[*_ENCODER, *(("-metadata", f"comment={comment}") if comment else ())],
        )
        try:
            writer.send(None)
            for frame in pixels:
                writer.send(numpy.ascontiguousarray(frame))
        except (OSError, RuntimeError) as error:
            writer.close()
            raise OSError(f"{path}{_FAILED}{reason(str(error).splitlines()[0])}.") from error
        finally:
            writer.close()
        # The writer does not tell how the encoder ended (a full disk, say); a finished mp4 has its index.
        if not _has_index(partial):
            raise OSError(f"{path}{_FAILED}{reason('ffmpeg did not finish it; the disk is full, or this is no whole ffmpeg')}.")


def _ffmpeg(work: str):
    """The module imageio_ffmpeg, with an ffmpeg that is there."""
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise OpenSoraError(f"{work} needs imageio-ffmpeg; install it (pip install imageio-ffmpeg).") from error
    try:
        program = imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise OpenSoraError(f"{work} needs ffmpeg, and imageio-ffmpeg has none; install it, or name it in IMAGEIO_FFMPEG_EXE.") from error
    if shutil.which(program) is None:
        raise OpenSoraError(f"{work} needs ffmpeg, and IMAGEIO_FFMPEG_EXE names {program}, which is no program; unset it, or name one.")
    return imageio_ffmpeg


@contextmanager
def _reported() -> Iterator:
    """Let an ffmpeg that is started inside write its errors to a file of its own; gives (what else is known) -> its first reason.

    imageio-ffmpeg reads the errors of a reader and not those of a writer, which would go to whoever owns the terminal.
    """
    before = {name: text for name, text in os.environ.items() if name == "FFREPORT"}
    with tempfile.TemporaryDirectory(prefix="open-sora-") as folder:
        log = Path(folder) / "log"
        escaped = str(log).replace("\\", "\\\\").replace(":", "\\:")
        os.environ["FFREPORT"] = f"file={escaped}:level=16"

        def reason(otherwise: str) -> str:
            lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
            said = [line.partition("] ")[2] for line in lines if line.startswith("[")]  # the others repeat the command
            return (said or [otherwise])[0].rstrip(".?")

        try:
            yield reason
        finally:
            del os.environ["FFREPORT"]
            os.environ.update(before)


def _has_index(path: Path) -> bool:
    """Whether an mp4's top level holds the `moov` box that the encoder writes last, and every box is whole."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        found = list(boxes(file, 0, path.stat().st_size))
    return any(kind == b"moov" for kind, _, _ in found) and found[-1][2] == path.stat().st_size
