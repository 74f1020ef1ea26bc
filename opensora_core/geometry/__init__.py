"""Arithmetic between frames, pixels, latents and tokens. Pure integers: no torch, no model, no file.

Sizes are always (height, width); `num_frames`, `height`, `width` are pixels and frames, latent sizes
say `latent_`. Aspect ratios are "width:height", as in Open-Sora 2.0.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import OpenSoraError

TIME_COMPRESSION = 4  # frames per latent frame, after the first
SPACE_COMPRESSION = 8  # pixels per latent pixel
PATCH_SIZE = 2  # latent pixels per token side; time is never patched
SIZE_MULTIPLE = SPACE_COMPRESSION * PATCH_SIZE

# The largest that may be asked for, on the nodes too: past it is a slip of the finger, which would run for days before memory ends it.
LARGEST = {"num_frames": 1025, "height": 8192, "width": 8192, "num_steps": 1000}

# Order of upstream's landscape list, then the flipped ones in the same order; 16:9 first for people.
_LANDSCAPE = ("2.39:1", "2:1", "16:9", "1.85:1", "9:16", "5:8", "3:2", "4:3", "1:1")
ASPECT_RATIOS = (
    "16:9", "9:16", "1:1", "4:3", "3:4", "3:2", "2:3", "8:5", "5:8", "1.85:1", "1:1.85", "2:1", "1:2", "2.39:1", "1:2.39",
)  # fmt: skip
RESOLUTIONS = ("256px", "360p", "480p", "512px", "720p", "768px", "1024px", "1080px", "1080p")


WHOLE_CLIP = -1  # of a temporal tile


@dataclass(frozen=True)
class Tiling:
    """Overlapping tiles. Sizes in pixels and frames; overlap as a share of a tile. A tile_size of 0 = not tiled in space.

    temporal_tile: 0 = as the codec was used by its makers (the whole clip at once, the Video DC-AE 32 frames); WHOLE_CLIP = not tiled.
    parked: decode with activations in main memory, parts of them at a time on the device (codecs/hunyuan/layers.py): the same frames.
    """

    tile_size: int = 256
    overlap: float = 0.25
    temporal_tile: int = 0
    parked: bool = False


def check_whole(name: str, value) -> None:
    """Raise an OpenSoraError unless a value is a whole number."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise OpenSoraError(f"{name}={value!r} is not one; give a whole number.")


def resolution_size(resolution: str, aspect_ratio: str, multiple: int = SIZE_MULTIPLE) -> tuple[int, int]:
    """(height, width) in pixels that Open-Sora 2.0 generates at for a named resolution and ratio; any other size is asked for by width and height.

    resolution: "256px" (a square's area) or "720p" (a 16:9 frame's area). aspect_ratio: "width:height", one of ASPECT_RATIOS.
    multiple: 16, or 32 for the high-compression autoencoder.
    Source: hpcaitech/Open-Sora@7ad6a96a opensora/datasets/aspect.py, training=False.
    """
    if resolution not in RESOLUTIONS:
        raise OpenSoraError(_unknown(resolution))
    return sized(_size_table(_num_pixels(resolution), multiple, nearest=False), aspect_ratio)


@dataclass(frozen=True)
class FrameRule:
    """Which counts of frames a clip can have, and how many latent frames they are. A codec that counts otherwise overrides the methods.

    Attributes:
        words: the counts, for a sentence: "4k+1".
        step: by how many frames they go up.
        lead: 1 where the first frame has a latent frame of its own, so that a tile in time begins with one too; else 0.
        shortest_clip: frames of the shortest clip that is no picture, which is 1 frame.
        longest: frames of the longest that the model can make; 0 = as long as memory takes.
        time: frames that a latent frame stands for, but for those at the ends of a clip or of its pieces.
    """

    words: str
    step: int
    lead: int
    shortest_clip: int
    longest: int = 0
    time: int = TIME_COMPRESSION

    def check(self, num_frames: int) -> int:
        """Return num_frames if a clip can have so many, else raise an OpenSoraError that names the nearest counts."""
        if self.longest and num_frames > self.longest:
            raise OpenSoraError(f"num_frames={num_frames} is longer than this model can make; use at most {self.longest}.")
        if num_frames == 1 or (num_frames >= self.shortest_clip and (num_frames - self.lead) % self.step == 0):
            return num_frames
        if num_frames < self.lead:
            raise OpenSoraError(f"num_frames={num_frames} is not a clip; use 1 frame or more.")
        below = num_frames - (num_frames - self.lead) % self.step
        near = (below, below + self.step) if below >= self._shortest else (1, self.shortest_clip)
        raise OpenSoraError(f"num_frames={num_frames} is not {self.words}; use {near[0]} or {near[1]}.")

    def latent_frames(self, num_frames: int) -> int:
        """Latent frames of a count that has been checked."""
        return self.lead - (self.lead - num_frames) // self.time

    def pixel_frames(self, latent_length: int) -> int:
        """Frames that latent frames decode to."""
        return self.lead + (latent_length - self.lead) * self.time if latent_length != 1 else 1

    def nearest(self, num_frames: float) -> int:
        """The nearest count that a clip can have; 1, a picture, only where clips grow from one frame."""
        near = max(self._shortest, round((num_frames - self.lead) / self.step) * self.step + self.lead)
        return min(near, self.longest or near)

    @property
    def _shortest(self) -> int:
        return 1 if self.lead else self.shortest_clip


@dataclass(frozen=True)
class Grid:
    """How an autoencoder and the transformer on its latents count frames, pixels, latents and tokens.

    Attributes:
        space: pixels per latent pixel. patch: latent pixels per token side; patch_time: latent frames per token. A clip whose latent
            frames are no whole tokens is made with as many more in front, which are dropped when it is done (`lead_in`).
        frames: which counts of frames a clip can have, and how many latent frames they are.
        default_frames: length of a clip where none is asked for, the released configuration's.
        goes_on: whether a model of this grid can continue a clip.
        size_table: (resolution, aspect ratio, multiple) -> (height, width), the model's named sizes.
        piece: latent frames of a piece that the codec decodes by itself, so that its videos may be of any length; 0 = a clip is decoded whole.
        size_names, ratios: the resolutions and ratios that it knows, the usual ones first.
    """

    space: int
    patch: int
    frames: FrameRule
    default_frames: int
    goes_on: bool = True
    size_table: Callable[[str, str, int], tuple[int, int]] = resolution_size
    size_names: tuple[str, ...] = ("256px", *(name for name in RESOLUTIONS if name != "256px"))
    ratios: tuple[str, ...] = ASPECT_RATIOS
    patch_time: int = 1
    piece: int = 0

    def lead_in(self, latent_length: int) -> int:
        """Latent frames that are made in front of a clip and dropped."""
        return -latent_length % self.patch_time

    @property
    def size_multiple(self) -> int:
        """What the sides of a video are multiples of, in pixels."""
        return self.space * self.patch

    def check_goes_on(self, advice: str = "; use the Open-Sora 2.0 transformer") -> None:
        """Raise an OpenSoraError unless a model of this grid continues clips. advice: what to do instead, "; use ..."."""
        if not self.goes_on:
            raise OpenSoraError(f"The high-compression variant goes on from no clip: its training knows text and a first frame{advice}.")

    def latent_frames(self, num_frames: int) -> int:
        """Latent frames of a clip: CAUSAL 129 -> 33, HIGH_COMPRESSION 128 -> 32. Raises as FrameRule.check."""
        return self.frames.latent_frames(self.frames.check(num_frames))

    def pixel_frames(self, latent_length: int) -> int:
        """Frames that latent frames decode to: CAUSAL 33 -> 129, HIGH_COMPRESSION 32 -> 128."""
        return self.frames.pixel_frames(latent_length)

    def decoded(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """(frames, height, width) in pixels that latents [..., T, H, W] decode to."""
        frames, *sides = shape[-3:]
        return (self.pixel_frames(frames), *(self.space * side for side in sides))

    def frames_for_seconds(self, seconds: float, fps: float) -> int:
        """The count of frames nearest to a length in seconds, a positive, finite number: 4 s at 24 FPS -> 97, or 96."""
        if not (math.isfinite(seconds) and seconds > 0 and math.isfinite(fps) and fps > 0):
            raise OpenSoraError(f"A length of {seconds} s at {fps} FPS is not a clip; use positive numbers.")
        return self.frames.nearest(seconds * fps)

    def length(self, text: str, fps: float) -> int:
        """Frames that "129" or "4s" asks for; seconds are rounded to the nearest count that there is."""
        match = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]+)?) ?s", text.strip())
        if match:
            return self.frames_for_seconds(float(match[1]), fps)
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", text.strip()):
            raise OpenSoraError(f"The length {text[:40]!r} is no length; write a number of frames (129) or seconds (4s).")
        return int(text)

    def picture_size(self, height: int, width: int) -> tuple[int, int]:
        """The size that pictures are brought to for a video of this size."""
        return height, width

    def check_size(self, height: int, width: int, multiple: int = 0) -> tuple[int, int]:
        """Return (height, width) if a video can have it, else raise an OpenSoraError that names the nearest.

        multiple: what both sides must be a multiple of, in pixels; 0 = size_multiple. The codec alone needs only `space`.
        """
        multiple = multiple or self.size_multiple
        if height < multiple or width < multiple or height % multiple or width % multiple:
            near_h, near_w = (max(multiple, int(side / multiple + 0.5) * multiple) for side in (height, width))
            raise OpenSoraError(
                f"height={height}, width={width} are not both multiples of {multiple}; use {near_h}x{near_w} (height x width)."
            )
        return height, width

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Latent (height, width) of a frame. Raises as check_size."""
        self.check_size(height, width)
        return height // self.space, width // self.space

    def named_size(self, resolution: str, aspect_ratio: str) -> tuple[int, int]:
        """(height, width) in pixels of a named resolution and ratio. Raises an OpenSoraError where the table has none."""
        return self.size_table(resolution, aspect_ratio, self.size_multiple)


CAUSAL = Grid(SPACE_COMPRESSION, PATCH_SIZE, FrameRule("4k+1", step=4, lead=1, shortest_clip=5), 129)
# The variant with the Video DC-AE. 4 frames would be one latent frame, which is a picture and decoded to one frame: so 8 at least.
_FOURS = "a length of the high-compression variant, whose clips have a multiple of 4 frames (8, 12, ... 128), or 1"
HIGH_COMPRESSION = Grid(32, 1, FrameRule(_FOURS, step=4, lead=0, shortest_clip=8), 128, goes_on=False)


@dataclass(frozen=True)
class Workload:
    """The size, length, steps and number of the videos to make.

    height, width, num_frames: pixels and frames that the grid has: for Open-Sora 2.0 multiples of 16 and 4k+1.
    num_steps: from noise to video. num_videos: made at a time. grid: of the model.
    """

    height: int
    width: int
    num_frames: int = CAUSAL.default_frames
    num_steps: int = 50
    num_videos: int = 1
    grid: Grid = CAUSAL

    def __post_init__(self):
        for name in ("height", "width", "num_frames", "num_steps", "num_videos"):
            check_whole(name, getattr(self, name))
        for name, default in (("num_steps", 50), ("num_videos", 1)):
            if getattr(self, name) < 1:
                raise OpenSoraError(f"{name}={getattr(self, name)} makes no video; use at least 1 (the default is {default}).")
        self.grid.check_size(self.height, self.width)
        self.grid.frames.check(self.num_frames)
        for name, most in LARGEST.items():
            if getattr(self, name) > most:
                raise OpenSoraError(f"{name}={getattr(self, name)} is more than can be asked for; use at most {most}.")

    @property
    def latent_extent(self) -> tuple[int, int, int]:
        """(T, H, W) of a video's latent."""
        return (self.grid.latent_frames(self.num_frames), *self.grid.latent_size(self.height, self.width))

    def latent_shape(self, channels: int) -> tuple[int, int, int, int, int]:
        """[B, C, T, H, W] of the latents of all videos."""
        return (self.num_videos, channels, *self.latent_extent)


class ScaledCrop(NamedTuple):
    """Resize to (height, width), then cut the target size from (top, left)."""

    height: int
    width: int
    top: int
    left: int


def training_size(resolution: str, aspect_ratio: str, multiple: int = SIZE_MULTIPLE) -> tuple[int, int]:
    """(height, width) of the training buckets, which upstream also uses for the Flux picture.

    Source: hpcaitech/Open-Sora@7ad6a96a opensora/datasets/aspect.py, training=True. Ratios whose size
    repeats an earlier one do not exist in this table.
    """
    return sized(_size_table(_num_pixels(resolution), multiple, nearest=True), aspect_ratio)


def training_ratios(resolution: str, multiple: int = SIZE_MULTIPLE) -> tuple[str, ...]:
    """The aspect ratios that training_size knows of a resolution."""
    return tuple(_size_table(_num_pixels(resolution), multiple, nearest=True))


def nearest_aspect_ratio(height: int, width: int, names: Iterable[str] = ASPECT_RATIOS) -> str:
    """The one of the names, of ASPECT_RATIOS, closest to a picture of this size (by height / width)."""
    return min(names, key=lambda name: abs(height / width - 1 / _ratio(name)))


def resize_crop(source: tuple[int, int], target: tuple[int, int]) -> ScaledCrop:
    """How upstream fits a picture: scale to cover the target, then cut the middle.

    Python's round (half to even) is upstream's.
    Source: hpcaitech/Open-Sora@7ad6a96a opensora/datasets/utils.py, resize_crop_to_fill.
    """
    (h, w), (th, tw) = source, target
    ratio_h, ratio_w = th / h, tw / w
    if ratio_h > ratio_w:
        sh, sw = th, round(w * ratio_h)
        return ScaledCrop(sh, sw, 0, round((sw - tw) / 2.0))
    sh, sw = round(h * ratio_w), tw
    return ScaledCrop(sh, sw, round((sh - th) / 2.0), 0)


def _unknown(resolution: str) -> str:
    return f"resolution={resolution[:40]!r} is not known; use one of {', '.join(RESOLUTIONS)}, or a width and a height."


def _num_pixels(resolution: str) -> int:
    digits = resolution.removesuffix("px").removesuffix("p")
    if digits == resolution or not re.fullmatch(r"[0-9]{2,5}", digits) or int(digits) < 64:
        raise OpenSoraError(_unknown(resolution))
    side = int(digits)
    return side * side if resolution.endswith("px") else int(side * side / 9 * 16)


def _ratio(name: str) -> float:
    width, height = map(float, name.split(":"))
    return width / height


def _size_table(num_pixels: int, multiple: int, nearest: bool) -> dict[str, tuple[int, int]]:
    landscape: dict[str, tuple[int, int]] = {}
    flipped: dict[str, tuple[int, int]] = {}
    for name in _LANDSCAPE:
        width = int(math.sqrt(num_pixels * _ratio(name)) // multiple) * multiple
        height = int((num_pixels / width) // multiple) * multiple
        if nearest:
            height, width = _nearest_area(height, width, num_pixels, multiple)
            if (height, width) in landscape.values():
                continue
        landscape[name] = (height, width)
        flipped[":".join(reversed(name.split(":")))] = (width, height)
    # The flipped entries win: "16:9" is the transposed "9:16" (it differs from its own at 1080px).
    return landscape | flipped


def _nearest_area(height: int, width: int, num_pixels: int, multiple: int) -> tuple[int, int]:
    best, gap = (height, width), abs(height * width - num_pixels)
    # Each neighbour is a step from the floor size, not from the best so far.
    for h, w in ((height - multiple, width), (height + multiple, width), (height, width - multiple), (height, width + multiple)):
        if abs(h * w - num_pixels) < gap:
            best, gap = (h, w), abs(h * w - num_pixels)
    return best


def sized(table: Mapping[str, tuple[int, int]], aspect_ratio: str) -> tuple[int, int]:
    """The (height, width) of a ratio. Raises an OpenSoraError where the table has none."""
    if aspect_ratio not in table:
        raise OpenSoraError(f"aspect_ratio={aspect_ratio!r} is not known (width:height); use one of {', '.join(table)}.")
    return table[aspect_ratio]
