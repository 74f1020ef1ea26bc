"""The empty clip that a video is made in: its size, length and number."""

from comfy_api.latest import io

from ..opensora_core import geometry
from ..opensora_core.choices import AUTO
from ..opensora_core.errors import OpenSoraError
from ..opensora_core.families.table import DEFAULT, FAMILIES
from .host import clips, inputs
from .host.families import family_of, require_open_sora
from .host.node import Node, gathered
from .host.vae import CODECS_KEY

CUSTOM = "custom"
GRID = geometry.HIGH_COMPRESSION
HIGH = next(family for family in FAMILIES if family.grid == GRID)
OFFERED = ("256px", "768px", CUSTOM)  # what the released model was trained at
FPS = 24.0  # the rate that the released model was trained to show
_MOST_FRAMES = geometry.LARGEST["num_frames"]

_GRIDS = dict.fromkeys(family.grid for family in FAMILIES if family.slot == DEFAULT.slot)
SIZES = tuple(dict.fromkeys(name for grid in _GRIDS for name in grid.size_names))
RATIOS = tuple(dict.fromkeys(name for grid in _GRIDS for name in grid.ratios))

_CLIP = ("resolution", "aspect_ratio", "num_frames", "width", "height", "batch_size", "length")
_GIVES = {"latent": io.Latent, "width": io.Int, "height": io.Int, "fps": io.Float}


def _empty(channels: int, grid: geometry.Grid, asked: dict) -> io.NodeOutput:
    """What the nodes of Open-Sora 2.0 give for what they are asked (_CLIP)."""
    frames = grid.latent_frames(inputs.frames_of(asked["length"], asked["num_frames"], grid))
    height, width = asked["height"], asked["width"]
    if asked["resolution"] != CUSTOM:
        height, width = grid.named_size(asked["resolution"], asked["aspect_ratio"])
    return io.NodeOutput(clips.empty((asked["batch_size"], channels, frames, *grid.latent_size(height, width)), grid), width, height, FPS)


def _checked(grid: geometry.Grid) -> classmethod:
    """The `validate_inputs` of a clip; its size is asked about where it is used."""

    def validate_inputs(cls, resolution=None, num_frames=None, width=None, height=None, length=None):
        of_size = inputs.size_problems(height, width, grid) if resolution == CUSTOM else {}
        return inputs.length_problems(length, num_frames, grid) | of_size

    return classmethod(validate_inputs)


class OpenSoraEmptyLatentVideo(Node, category="latents", outputs=_GIVES, hidden=()):
    validate_inputs = _checked(geometry.CAUSAL)

    takes = [
        inputs.choice("resolution", OFFERED),
        *inputs.of("aspect_ratio"),
        io.Int.Input("num_frames", default=129, min=1, max=_MOST_FRAMES, step=4),
        *inputs.sides(336, 192),
        *inputs.of("batch_size"),
        *inputs.of("image", optional=True),
        *inputs.of("length"),
    ]

    @classmethod
    @gathered(asked=_CLIP)
    def execute(cls, image, asked) -> io.NodeOutput:
        if image is not None:
            asked["aspect_ratio"] = _shape_of(image, asked["resolution"])
        return _empty(DEFAULT.released.in_channels, geometry.CAUSAL, asked)


def _shape_of(image, resolution: str) -> str:
    """The aspect ratio that an IMAGE sets."""
    if resolution == CUSTOM:
        raise OpenSoraError(
            f"An image chooses between the shapes of {' and '.join(OFFERED[:-1])}; with resolution {CUSTOM}, width and height say the shape: "
            "disconnect image, or choose one of those."
        )
    if image.ndim != 4 or 0 in image.shape:
        raise OpenSoraError(f"Give an IMAGE [pictures, height, width, 3], with at least one picture: image is {list(image.shape)}.")
    return geometry.nearest_aspect_ratio(*image.shape[1:3])


class OpenSoraEmptyLatentHighCompression(Node, category="latents", outputs=_GIVES, hidden=()):
    validate_inputs = _checked(GRID)

    takes = [
        inputs.choice("resolution", OFFERED, default="768px"),
        *inputs.of("aspect_ratio"),
        io.Int.Input("num_frames", default=GRID.default_frames, min=GRID.frames.shortest_clip, max=_MOST_FRAMES // 4 * 4, step=4),
        *inputs.sides(1024, 576, GRID),
        *inputs.of("batch_size"),
        *inputs.of("model", optional=True),
        *inputs.of("length"),
    ]

    @classmethod
    @gathered(asked=_CLIP)
    def execute(cls, model, asked) -> io.NodeOutput:
        config = HIGH.released if model is None else require_open_sora(model)
        if config.grid != GRID:
            raise OpenSoraError(
                "This MODEL is Open-Sora 2.0, not its high-compression variant; make its clip with Open-Sora Empty Latent Video."
            )
        return _empty(config.in_channels, GRID, asked)


_COUNTED = {"latent": io.Latent, "width": io.Int, "height": io.Int, "frames": io.Int, "fps": io.Float}


class OpenSoraEmptyLatent(Node, category="latents", outputs=_COUNTED, hidden=()):
    takes = [
        *inputs.of("model"),
        inputs.choice("size", (AUTO, *SIZES, CUSTOM)),
        inputs.choice("aspect_ratio", RATIOS),
        io.String.Input("length", default=""),
        io.Int.Input("width", default=426, min=8, max=geometry.LARGEST["width"]),
        io.Int.Input("height", default=240, min=8, max=geometry.LARGEST["height"]),
        *inputs.of("batch_size"),
    ]

    @classmethod
    def execute(cls, model, size, aspect_ratio, length, width, height, batch_size) -> io.NodeOutput:
        config, usual, grid = require_open_sora(model), family_of(model).usual, family_of(model).grid
        if size == AUTO:
            height, width = usual.height, usual.width
        elif size != CUSTOM:
            if size not in grid.size_names:
                raise OpenSoraError(f"size={size!r} is not one of this model's; use one of {', '.join(grid.size_names)}.")
            height, width = grid.named_size(size, aspect_ratio)
        frames = inputs.frames_of(length, usual.num_frames, grid, usual.fps)
        latent = clips.empty((batch_size, config.in_channels, grid.latent_frames(frames), *grid.latent_size(height, width)), grid)
        return io.NodeOutput(latent | {CODECS_KEY: family_of(model).codecs}, width, height, frames, float(usual.fps))
