"""Sizes, lengths and grids of Open-Sora 1.0 to 1.3, as data: what geometry/__init__.py is for 2.0. Pure integers.

Ratios are "width:height" here as everywhere; the guides of 1.x write height:width. Sources: hpcaitech/Open-Sora v1.1.0, v1.2.0 and v1.3,
opensora/datasets/aspect.py.
"""

from dataclasses import dataclass
from functools import lru_cache, partial

from ..errors import OpenSoraError
from . import FrameRule, Grid

_RATIOS = "8:3 21:9 25:12 2:1 17:9 50:27 16:9 8:5 3:2 4:3 1:1 3:4 2:3 9:16 9:17 1:2 27:50".split()
# Height x width of each of these ratios. The last is listed as 50 high and 27 wide, and made narrower.
_BY_RATIO = {
    "144p": "117x312 125x291 133x277 135x270 139x262 141x260 144x256 151x241 156x234 166x221 192x192 221x165 235x156 256x144 263x139 "
    "271x135 277x132",
    "240p": "196x522 210x490 222x462 226x452 232x438 236x436 240x426 252x404 262x393 276x368 320x320 370x278 392x262 426x240 440x232 "
    "452x226 462x222",
    "360p": "294x784 314x732 332x692 340x680 350x662 352x652 360x640 380x608 392x588 416x554 480x480 554x416 588x392 640x360 660x350 "
    "678x340 692x332",
    "480p": "392x1046 420x980 444x925 452x904 466x880 470x870 480x854 506x810 522x784 554x738 640x640 740x555 784x522 854x480 880x466 "
    "906x454 924x444",
    "720p": "588x1568 628x1466 666x1388 678x1356 698x1318 706x1306 720x1280 758x1212 784x1176 832x1110 960x960 1108x832 1176x784 1280x720 "
    "1320x698 1358x680 1386x666",
    "1080p": "882x2352 942x2198 998x2080 1018x2036 1048x1980 1058x1958 1080x1920 1138x1820 1176x1764 1248x1664 1440x1440 1662x1246 "
    "1764x1176 1920x1080 1980x1048 2036x1018 2078x998",
    "2k": "1176x3136 1256x2930 1330x2770 1358x2716 1398x2640 1412x2612 1440x2560 1518x2428 1568x2352 1662x2216 1920x1920 2218x1664 "
    "2352x1568 2560x1440 2638x1396 2716x1358 2772x1330",
    "4k": "1764x4704 1886x4400 1996x4158 2036x4072 2096x3960 2118x3918 2160x3840 2276x3642 2352x3528 2494x3326 2880x2880 3326x2494 "
    "3528x2352 3840x2160 3958x2096 4072x2036 4156x1994",
}  # fmt: skip
# Pictures of one area, at whatever ratio their sides have.
_AREA_256 = (
    "128x512 128x496 128x480 128x464 144x448 144x432 144x416 160x400 160x384 176x368 176x352 176x336 192x336 192x320 208x304 "
    "208x288 224x288 224x272 240x272 240x256 256x256 256x240 272x240 272x224 288x224 288x208 304x208 320x192 336x192 352x176 "
    "368x176 384x160 400x160 416x144 432x144 448x144 464x128 480x128 496x128 512x128"
)
_AREA_2880 = (
    "1408x5760 1408x5568 1408x5376 1408x5184 1600x4992 1600x4800 1600x4672 1792x4480 1792x4288 1920x4096 1920x3904 1920x3776 "
    "2112x3840 2112x3584 2304x3392 2304x3200 2496x3200 2496x3008 2688x3008 2688x2880 2880x2880 2880x2688 3008x2688 3008x2496 "
    "3200x2496 3200x2304 3392x2304 3584x2112 3840x2112 3904x1920 4096x1920 4288x1792 4480x1792 4672x1600 4800x1600 4992x1600 "
    "5184x1408 5376x1408 5568x1408 5760x1408"
)
_BY_AREA = {"256": (_AREA_256, 1), "512": (_AREA_256, 2), "1024": (_AREA_256, 4), "2048": (_AREA_256, 8), "2880": (_AREA_2880, 1)}

RESOLUTIONS = (*_BY_RATIO, *_BY_AREA)
RESOLUTIONS_1_1 = tuple(name for name in RESOLUTIONS if name not in ("2k", "2048", "2880"))
RESOLUTIONS_1_3 = (*RESOLUTIONS, *(f"{name}_16d" for name in RESOLUTIONS))  # _16d: sides cut to multiples of 16

# Frames of the lengths that the guides name, at 24 frames per second: pieces of 17 frames.
LENGTHS = {"2s": 51, "4s": 102, "8s": 204, "16s": 408, "32s": 816, "1x": 51, "2x": 102, "4x": 204, "8x": 408, "16x": 816}


@lru_cache
def size_table(resolution: str) -> dict[str, tuple[int, int]]:
    """(height, width) by ratio: of a resolution with a p or k by name, of an area's by the sides' own quotient, width to height."""
    name, _, is_cut = resolution.partition("_16d")
    text, factor = (_BY_RATIO[name], 1) if name in _BY_RATIO else _BY_AREA[name]
    sizes = [tuple(int(side) * factor for side in pair.split("x")) for pair in text.split()]
    if "_16d" in resolution:
        sizes = [(height // 16 * 16, width // 16 * 16) for height, width in sizes]
    return dict(zip(_RATIOS if name in _BY_RATIO else text.split(), sizes, strict=True))


def named_size(resolutions: tuple[str, ...], resolution: str, aspect_ratio: str, multiple: int = 1) -> tuple[int, int]:
    """(height, width) in pixels of a named resolution and ratio.

    resolutions: the version's. aspect_ratio: "width:height"; of an area's sizes ("512") the nearest is taken.
    multiple: not made use of: any size can be made.
    """
    if resolution not in resolutions:
        raise OpenSoraError(f"resolution={resolution!r} is not known; use one of {', '.join(resolutions)}.")
    table = size_table(resolution)
    if aspect_ratio in table:
        return table[aspect_ratio]
    try:
        width, height = map(float, aspect_ratio.split(":"))
        quotient = width / height
    except (ValueError, ZeroDivisionError):
        quotient = 0.0
    if quotient <= 0 or resolution.removesuffix("_16d") in _BY_RATIO:
        raise OpenSoraError(f"aspect_ratio={aspect_ratio!r} is not known (width:height); use one of {', '.join(_RATIOS)}.")
    return min(table.values(), key=lambda size: abs(size[0] / size[1] - 1 / quotient))


@dataclass(frozen=True)
class Pieces(FrameRule):
    """Open-Sora 1.2: 5 latent frames for 17 frames, and one for every 4 begun after the last whole 17."""

    def latent_frames(self, num_frames: int) -> int:
        return num_frames // 17 * 5 - -(num_frames % 17) // 4

    def pixel_frames(self, latent_length: int) -> int:
        return latent_length // 5 * 17 + latent_length % 5 * 4 if latent_length != 1 else 1


@dataclass(frozen=True)
class SharedPieces(FrameRule):
    """Open-Sora 1.3: 5 latent frames for 17 frames, of which each piece's last is the next one's first."""

    def latent_frames(self, num_frames: int) -> int:
        return max(1, (num_frames - 1) // 16 * 5)

    def pixel_frames(self, latent_length: int) -> int:
        return 4 * latent_length - 4 * -(-latent_length // 5) + 1


@dataclass(frozen=True)
class AnySize(Grid):
    """Sides of any length: what is less than a latent pixel is dropped, or, with `rounds_up`, made one more."""

    rounds_up: bool = False

    @property
    def size_multiple(self) -> int:
        return 1

    def check_size(self, height: int, width: int, multiple: int = 0) -> tuple[int, int]:
        least = self.space * self.patch
        if min(height, width) < least:
            raise OpenSoraError(f"height={height}, width={width} is too small; use {least}x{least} (height x width) or more.")
        return height, width

    def length(self, text: str, fps: float) -> int:
        """Frames of a length as Grid.length reads it, or as the guides name it (2s, 4x): as many as whole pieces hold."""
        named = LENGTHS.get(text.strip()) if self.piece > 1 else None
        return super().length(text, fps) if named is None else self.pixel_frames(self.frames.latent_frames(named))

    def picture_size(self, height: int, width: int) -> tuple[int, int]:
        """1.3's encoder gives a side of 8k+1 pixels k latent ones, where a video of that size has k+1."""
        if not self.rounds_up:
            return height, width
        return tuple(side + 7 if side % self.space == 1 else side for side in (height, width))

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        self.check_size(height, width)
        add = self.space - 1 if self.rounds_up else 0
        return (height + add) // self.space, (width + add) // self.space


def _grid(frames: FrameRule, default_frames: int, names: tuple[str, ...], usual: tuple[str, ...], **own) -> AnySize:
    ordered = (*usual, *(name for name in names if name not in usual))
    return AnySize(8, 2, frames, default_frames, size_table=partial(named_size, names), size_names=ordered, ratios=_FOR_PEOPLE, **own)


_FOR_PEOPLE = ("16:9", *(ratio for ratio in _RATIOS if ratio != "16:9"))
_EACH = FrameRule("a count of frames", step=1, lead=0, shortest_clip=2, time=1)  # 1.0 and 1.1: a latent frame for each
# 1.0: the two sizes that it was trained at.
FIXED = _grid(_EACH, 16, ("256", "512"), ("512",), piece=1)
EVERY_FRAME = _grid(_EACH, 16, RESOLUTIONS_1_1, ("240p",), piece=1)
PIECES = _grid(Pieces("a multiple of 17, nor 1", step=17, lead=0, shortest_clip=17), 51, RESOLUTIONS, ("240p",), piece=5)
SHARED_PIECES = _grid(
    SharedPieces("16k+1", step=16, lead=1, shortest_clip=17), 113, RESOLUTIONS_1_3, ("720p", "360p"), piece=5, rounds_up=True
)
