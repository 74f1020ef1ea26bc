"""Pictures as files: read as they are meant to be seen, in memory that the file's size on disk does not decide."""

import logging
from pathlib import Path

import numpy
import torch

from ..errors import OpenSoraError
from ..names import shown
from ..readers import is_file, kind_of

logger = logging.getLogger(__name__)

# The largest picture that is kept as it is: past that it is reduced by a whole number on reading, before anything is converted.
KEPT_PIXELS = 32_000_000


def read_image(path) -> torch.Tensor:
    """Read a picture as it is meant to be seen: turned by its EXIF orientation; of an animated one the first frame, which is said.

    Returns [1, H, W, 3] fp32 in 0..1 on the CPU; of more than 32 million pixels, reduced to no more. Raises an OpenSoraError for what is no
    picture, has too many pixels, numbers of an unknown range, or is transparent in places.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    path = Path(path)
    if not is_file(path):
        kind = kind_of(path)
        what = "is a folder" if kind == "a folder" else "is no plain file" if kind else "does not exist"
        raise OpenSoraError(f"The image {shown(path)} {what}; give a picture such as a PNG or JPEG file.")
    try:
        with Image.open(path) as opened:
            if opened.width * opened.height > _most_pixels(Image):
                raise Image.DecompressionBombError
            if getattr(opened, "n_frames", 1) > 1:
                logger.warning("%s has %d pictures; its first one is taken.", shown(path), opened.n_frames)
            picture = rgb_array(ImageOps.exif_transpose(_bounded(opened)), f"The image {shown(path)}")
    except OpenSoraError:  # a ValueError, but not Pillow's
        raise
    except Image.DecompressionBombError as error:
        what = f"{shown(path)} has more pixels than a picture is read with here ({_most_pixels(Image):,})"
        raise OpenSoraError(f"{what}; scale it down.") from error
    except UnidentifiedImageError as error:
        raise OpenSoraError(f"{shown(path)} is not a picture that can be read; give a PNG or JPEG file.") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what Pillow raises for broken data of a known format
        raise OpenSoraError(f"The image {shown(path)} is damaged and cannot be read ({error}); save or download it again.") from error
    pixels = picture.astype(numpy.float32)
    pixels /= 255
    return torch.from_numpy(pixels).unsqueeze(0)


def rgb_array(picture, name: str) -> numpy.ndarray:
    """[H, W, 3] uint8 of a PIL image of any mode. name: for messages.

    Raises an OpenSoraError for one that is transparent in places, or holds numbers whose range it does not say.
    """
    if picture.mode.startswith("I") or picture.mode == "F":  # Pillow's own conversion clips them to white
        grey = numpy.asarray(picture).astype(numpy.float32)
        largest = 1 if picture.mode == "F" else 65535
        if not numpy.isfinite(grey).all() or grey.min() < 0 or grey.max() > largest:
            kind = "floats that are not from 0 to 1" if largest == 1 else "numbers of more than 16 bits"
            raise OpenSoraError(f"{name} holds {kind}, so that its white is not known; save it with 8 or 16 bits a channel.")
        return numpy.repeat((grey / largest * 255).round().astype(numpy.uint8)[:, :, None], 3, axis=2)
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        if picture.getextrema()[3][0] < 255:
            what = f"{name} is transparent in places, which no frame of a video is"
            raise OpenSoraError(f"{what}; lay it on a background, and save it without alpha channel.")
    return numpy.array(picture.convert("RGB"))


def _most_pixels(image_module) -> int:
    """The largest picture that is opened: Pillow's own limit, or the number it ships with where a host has taken the limit away."""
    return 2 * (image_module.MAX_IMAGE_PIXELS or 89_478_485)


def _bounded(opened):
    """The picture in its own mode, reduced by a whole number where it is very large, before anything is converted."""
    width, height = opened.size
    factor = next(number for number in range(1, 100) if width * height <= KEPT_PIXELS * number**2)
    if factor == 1:
        return opened
    opened.draft(opened.mode, (width // factor, height // factor))  # a JPEG is decoded smaller
    factor = max(1, factor * opened.size[0] // width)
    exif = opened.getexif()
    plain = {"1": "L", "P": "RGB", "I;16": "I", "I;16B": "I"}  # what Pillow reduces
    smaller = opened.convert(plain.get(opened.mode, opened.mode)).reduce(factor)
    smaller.info["exif"] = exif.tobytes()
    return smaller
