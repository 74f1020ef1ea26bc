"""The empty clip that a video is made in: its size, length and number."""

from comfy_api.latest import io

from ..opensora_core import geometry
from ..opensora_core.config import HUNYUAN_VAE
from ..opensora_core.errors import OpenSoraError
from .host import clips

CUSTOM = "custom"
OFFERED = ("256px", "768px", CUSTOM)  # what the released model was trained at
FPS = 24.0  # the rate that the released model was trained to show


class OpenSoraEmptyLatentVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OpenSoraEmptyLatentVideo",
            display_name="Open-Sora Empty Latent Video",
            category="Open-Sora/latents",
            description="An empty clip in one of the sizes Open-Sora 2.0 was made for, or in a size of your own.",
            search_aliases=["open sora size", "open-sora resolution", "empty video latent", "aspect ratio"],
            inputs=[
                io.Combo.Input(
                    "resolution",
                    options=list(OFFERED),
                    default="256px",
                    tooltip="Area of the picture: 256px and 768px are the areas of squares with that side. custom uses width and height below.",
                ),
                io.Combo.Input(
                    "aspect_ratio",
                    options=list(geometry.ASPECT_RATIOS),
                    default=geometry.ASPECT_RATIOS[0],
                    tooltip="Width : height of the picture. Not used when resolution is custom.",
                ),
                io.Int.Input(
                    "num_frames",
                    default=129,
                    min=1,
                    max=geometry.LARGEST["num_frames"],
                    step=4,
                    tooltip="Length in frames, 4k+1 (1, 5, 9, … 129). 129 frames are 5.4 seconds at 24 FPS, the longest the model was trained on.",
                ),
                io.Int.Input(
                    "width",
                    default=336,
                    min=16,
                    max=geometry.LARGEST["width"],
                    step=16,
                    tooltip="Width in pixels, a multiple of 16. Only used when resolution is custom.",
                ),
                io.Int.Input(
                    "height",
                    default=192,
                    min=16,
                    max=geometry.LARGEST["height"],
                    step=16,
                    tooltip="Height in pixels, a multiple of 16. Only used when resolution is custom.",
                ),
                io.Int.Input(
                    "batch_size", default=1, min=1, max=64, tooltip="Number of videos made at once; each has its own noise. 1 = one video."
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="A picture, or frames of a clip, whose shape the video takes: the nearest of the aspect ratios, in place of the one chosen "
                    "above. Its pixels are not used. Not with resolution custom.",
                ),
            ],
            outputs=[
                io.Latent.Output(
                    display_name="latent", tooltip="The empty clip, for a sampler: [videos, 16, latent frames, height / 8, width / 8]."
                ),
                io.Int.Output(display_name="width", tooltip="Width of the video in pixels."),
                io.Int.Output(display_name="height", tooltip="Height of the video in pixels."),
                io.Float.Output(
                    display_name="fps", tooltip="Frames per second to save the video at: 24, what the model was trained to show."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, resolution, num_frames, width, height):
        # A value that comes over a wire is None here; execute checks it again. The host repeats the sentence for every name above.
        try:
            if resolution not in (None, *OFFERED):
                raise OpenSoraError(f"resolution={resolution!r} is not one of {', '.join(OFFERED)}.")
            if num_frames is not None:
                geometry.check_num_frames(num_frames)
            if resolution == CUSTOM and None not in (width, height):
                geometry.check_size(height, width)
        except OpenSoraError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, resolution, aspect_ratio, num_frames, width, height, batch_size, image=None) -> io.NodeOutput:
        if image is not None:
            aspect_ratio = _shape_of(image, resolution)
        if resolution != CUSTOM:
            height, width = geometry.resolution_size(resolution, aspect_ratio)
        shape = (batch_size, HUNYUAN_VAE.latent_channels, geometry.latent_frames(num_frames), *geometry.latent_size(height, width))
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
