"""The empty clip that a video is made in: its size, length and number."""

from comfy_api.latest import io

from ..opensora_core import geometry
from ..opensora_core.errors import OpenSoraError
from ..opensora_core.families.table import DEFAULT, FAMILIES
from .host import clips, inputs
from .host.families import require_open_sora
from .host.node import Node, shown

CUSTOM = "custom"
GRID = geometry.HIGH_COMPRESSION
HIGH = next(family for family in FAMILIES if family.grid == GRID)
OFFERED = ("256px", "768px", CUSTOM)  # what the released model was trained at
FPS = 24.0  # the rate that the released model was trained to show
_ONLY_CUSTOM = " Only used when resolution is custom."


def _aspect_ratio_input() -> io.Combo.Input:
    return inputs.choice(
        "aspect_ratio",
        geometry.ASPECT_RATIOS,
        tooltip="Width : height of the picture. Not used when resolution is custom.",
    )


def _batch_size_input() -> io.Int.Input:
    return io.Int.Input(
        "batch_size", default=1, min=1, max=64, tooltip="Number of videos made at once; each has its own noise. 1 = one video."
    )


def _outputs(shape: str) -> list:
    return [
        io.Latent.Output(display_name="latent", tooltip=f"The empty clip, for a sampler: {shape}."),
        io.Int.Output(display_name="width", tooltip="Width of the video in pixels."),
        io.Int.Output(display_name="height", tooltip="Height of the video in pixels."),
        io.Float.Output(display_name="fps", tooltip="Frames per second to save the video at: 24, what the model was trained to show."),
    ]


def _clip_problems(
    resolution: str | None, length: tuple[str | None, int | None], size: tuple[int | None, int | None], grid: geometry.Grid
) -> dict[str, str]:
    """What is wrong with a clip; length: (length, num_frames); size: (height, width), asked about where they are used."""
    if resolution not in (None, *OFFERED):
        return {"resolution": f"resolution={shown(resolution)} is not one of {', '.join(OFFERED)}."}
    of_size = inputs.size_problems(*size, grid) if resolution == CUSTOM else {}
    return inputs.length_problems(*length, grid) | of_size


class OpenSoraEmptyLatentVideo(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OpenSoraEmptyLatentVideo",
            display_name="Open-Sora Empty Latent Video",
            category="Open-Sora/latents",
            description="An empty clip in one of the sizes Open-Sora 2.0 was made for, or in a size of your own.",
            search_aliases=[
                "open sora size",
                "open-sora resolution",
                "empty video latent",
                "aspect ratio",
                "seconds",
                "length",
                "duration",
                "text to video",
                "时长",
                "尺寸",
                "文生视频",
            ],
            inputs=[
                inputs.choice(
                    "resolution",
                    OFFERED,
                    tooltip="Area of the picture: 256px and 768px are the areas of squares with that side. custom uses width and height below.",
                ),
                _aspect_ratio_input(),
                io.Int.Input(
                    "num_frames",
                    default=129,
                    min=1,
                    max=geometry.LARGEST["num_frames"],
                    step=4,
                    tooltip="Length in frames, 4k+1 (1, 5, 9, … 129). 129 frames are 5.4 seconds at 24 FPS, the longest the model was trained on.",
                ),
                *inputs.sides(336, 192, more=_ONLY_CUSTOM),
                _batch_size_input(),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="A picture, or frames of a clip, whose shape the video takes: the nearest of the aspect ratios, in place of the one chosen "
                    "above. Its pixels are not used. Not with resolution custom.",
                ),
                inputs.length(),
            ],
            outputs=_outputs("[videos, 16, latent frames, height / 8, width / 8]"),
        )

    @classmethod
    def validate_inputs(cls, resolution=None, num_frames=None, width=None, height=None, length=None):
        return _clip_problems(resolution, (length, num_frames), (height, width), geometry.CAUSAL)

    @classmethod
    def execute(cls, resolution, aspect_ratio, num_frames, width, height, batch_size, image=None, length="") -> io.NodeOutput:
        num_frames = inputs.frames_of(length, num_frames)
        if image is not None:
            aspect_ratio = _shape_of(image, resolution)
        if resolution != CUSTOM:
            height, width = geometry.CAUSAL.named_size(resolution, aspect_ratio)
        shape = (
            batch_size,
            DEFAULT.released.in_channels,
            geometry.CAUSAL.latent_frames(num_frames),
            *geometry.CAUSAL.latent_size(height, width),
        )
        return io.NodeOutput(clips.empty(shape), width, height, FPS)


def _shape_of(image, resolution: str) -> str:
    """The aspect ratio that an IMAGE sets."""
    if resolution == CUSTOM:
        raise OpenSoraError(
            f"An image chooses between the shapes of {' and '.join(OFFERED[:-1])}; with resolution {CUSTOM}, width and height say the shape: "
            "disconnect image, or choose one of those."
        )
    if image.ndim != 4 or 0 in image.shape:
        raise OpenSoraError(f"image is {list(image.shape)}; an IMAGE is [pictures, height, width, 3], with at least one picture.")
    return geometry.nearest_aspect_ratio(*image.shape[1:3])


class OpenSoraEmptyLatentHighCompression(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OpenSoraEmptyLatentHighCompression",
            display_name="Open-Sora Empty Latent (High Compression)",
            category="Open-Sora/latents",
            description="An empty clip for the high-compression variant of Open-Sora 2.0, whose VAE is the Video DC-AE: 4k frames, sides multiples of 32.",
            search_aliases=["open sora dc-ae", "video dc-ae size", "high compression latent", "seconds", "length", "时长"],
            inputs=[
                inputs.choice(
                    "resolution",
                    OFFERED,
                    default="768px",
                    tooltip="Area of the picture: 768px, a square's of that side, is what this variant was released at. custom uses width and height.",
                ),
                _aspect_ratio_input(),
                io.Int.Input(
                    "num_frames",
                    default=GRID.default_frames,
                    min=GRID.frames.shortest_clip,
                    max=geometry.LARGEST["num_frames"] // 4 * 4,
                    step=4,
                    tooltip="Length in frames, a multiple of 4 (8, 12, … 128). 128 frames are 5.3 seconds at 24 FPS, what the variant was released at.",
                ),
                *inputs.sides(1024, 576, GRID, more=_ONLY_CUSTOM),
                _batch_size_input(),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The model the clip is for, if its latents have another number of channels than the released 128. Not needed otherwise.",
                ),
                inputs.length(),
            ],
            outputs=_outputs("[videos, 128, frames / 4, height / 32, width / 32]"),
        )

    @classmethod
    def validate_inputs(cls, resolution=None, num_frames=None, width=None, height=None, length=None):
        return _clip_problems(resolution, (length, num_frames), (height, width), GRID)

    @classmethod
    def execute(cls, resolution, aspect_ratio, num_frames, width, height, batch_size, model=None, length="") -> io.NodeOutput:
        num_frames = inputs.frames_of(length, num_frames, GRID)
        config = HIGH.released if model is None else require_open_sora(model)
        if config.grid != GRID:
            raise OpenSoraError(
                "This MODEL is Open-Sora 2.0, not its high-compression variant; make its clip with Open-Sora Empty Latent Video."
            )
        if resolution != CUSTOM:
            height, width = GRID.named_size(resolution, aspect_ratio)
        shape = (batch_size, config.in_channels, GRID.latent_frames(num_frames), *GRID.latent_size(height, width))
        return io.NodeOutput(clips.empty(shape, GRID), width, height, FPS)
