"""What the model plugged in is usually asked for: its numbers, and its empty clip."""

from comfy_api.latest import io

from ..opensora_core import geometry
from ..opensora_core.errors import OpenSoraError
from ..opensora_core.families.table import DEFAULT, FAMILIES
from ..opensora_core.geometry import Grid
from .host import clips, inputs, run
from .host.families import family_of, require_open_sora
from .host.node import Node
from .host.vae import CODECS_KEY

AUTO, CUSTOM = "auto", "custom"
_GRIDS = {family.grid: None for family in FAMILIES if family.slot == DEFAULT.slot}
SIZES = tuple(dict.fromkeys(name for grid in _GRIDS for name in grid.size_names))
RATIOS = tuple(dict.fromkeys(name for grid in _GRIDS for name in grid.ratios))


def frames_of(length: str, fps: float, usual: int, grid: Grid) -> int:
    """Frames of "129", "4s" or "", the usual length. Raises an OpenSoraError for what is none of these, or no clip's."""
    return grid.check_num_frames(grid.length(length, fps)) if length.strip() else usual


class OpenSoraDefaults(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OpenSoraDefaults",
            display_name="Open-Sora Defaults",
            category="Open-Sora/sampling",
            description="The numbers that the model plugged in was released with: steps, guidance, size, length and rate.",
            search_aliases=["open sora settings", "recommended settings", "steps", "cfg"],
            inputs=[io.Model.Input("model", tooltip="The model whose numbers are wanted.")],
            outputs=[
                io.Int.Output(display_name="steps", tooltip="Number of steps."),
                io.Float.Output(display_name="text_guidance", tooltip="Guidance by the prompt."),
                io.Float.Output(display_name="image_guidance", tooltip="Guidance by what is given; 1 where the model knows none."),
                io.Int.Output(display_name="width", tooltip="Width in pixels."),
                io.Int.Output(display_name="height", tooltip="Height in pixels."),
                io.Int.Output(display_name="frames", tooltip="Length in frames."),
                io.Float.Output(display_name="fps", tooltip="Frames per second."),
                io.Sampler.Output(
                    display_name="sampler",
                    tooltip="The model's own steps, for SamplerCustomAdvanced with Open-Sora Guider: given frames and learned variance of 1.x need them.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        usual, sampler = family_of(model).usual, run.own_sampler(family_of(model).sampling)
        text, image = (*usual.scales, 1.0)[:2]
        return io.NodeOutput(usual.num_steps, text, image, usual.width, usual.height, usual.num_frames, float(usual.fps), sampler)


class OpenSoraEmptyLatent(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OpenSoraEmptyLatent",
            display_name="Open-Sora Empty Latent",
            category="Open-Sora/latents",
            description="An empty clip for the model plugged in, in one of its own sizes and lengths.",
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
                io.Model.Input("model", tooltip="The model the clip is for; it says which sizes and lengths there are."),
                inputs.choice(
                    "size",
                    (AUTO, *SIZES, CUSTOM),
                    tooltip="auto = the model's usual size; a name that the model lacks is refused with a list of its own; custom = width and height below.",
                ),
                inputs.choice("aspect_ratio", RATIOS, tooltip="Width : height of the picture, with a named size."),
                io.String.Input(
                    "length", default="", tooltip="Frames, such as 51, or seconds, such as 4s; empty = the model's usual length."
                ),
                *(
                    io.Int.Input(
                        name, default=default, min=8, max=geometry.LARGEST[name], tooltip=f"{name.title()} in pixels, with size custom."
                    )
                    for name, default in (("width", 426), ("height", 240))
                ),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Number of videos made at once; each has its own noise."),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The empty clip, for a sampler."),
                io.Int.Output(display_name="width", tooltip="Width of the video in pixels."),
                io.Int.Output(display_name="height", tooltip="Height of the video in pixels."),
                io.Int.Output(display_name="frames", tooltip="Length of the video in frames."),
                io.Float.Output(display_name="fps", tooltip="Frames per second to save the video at."),
            ],
        )

    @classmethod
    def execute(cls, model, size, aspect_ratio, length, width, height, batch_size) -> io.NodeOutput:
        config, usual, grid = require_open_sora(model), family_of(model).usual, family_of(model).grid
        if size == AUTO:
            height, width = usual.height, usual.width
        elif size != CUSTOM:
            if size not in grid.size_names:
                raise OpenSoraError(f"size={size!r} is not one of this model's: {', '.join(grid.size_names)}.")
            height, width = grid.named_size(size, aspect_ratio)
        frames = frames_of(length, usual.fps, usual.num_frames, grid)
        shape = (batch_size, config.in_channels, grid.latent_frames(frames), *grid.latent_size(height, width))
        latent = clips.empty(shape, grid) | {CODECS_KEY: family_of(model).codecs}
        return io.NodeOutput(latent, width, height, frames, float(usual.fps))
