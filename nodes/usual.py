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
            category="Open-Sora/sampling",
            search_aliases=["open sora settings", "recommended settings", "steps", "cfg"],
            inputs=[io.Model.Input("model")],
            outputs=[
                io.Int.Output(display_name="steps"),
                io.Float.Output(display_name="text_guidance"),
                io.Float.Output(display_name="image_guidance"),
                io.Int.Output(display_name="width"),
                io.Int.Output(display_name="height"),
                io.Int.Output(display_name="frames"),
                io.Float.Output(display_name="fps"),
                io.Sampler.Output(display_name="sampler"),
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
            category="Open-Sora/latents",
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
                io.Model.Input("model"),
                inputs.choice("size", (AUTO, *SIZES, CUSTOM)),
                inputs.choice("aspect_ratio", RATIOS),
                io.String.Input("length", default=""),
                *(
                    io.Int.Input(name, default=default, min=8, max=geometry.LARGEST[name])
                    for name, default in (("width", 426), ("height", 240))
                ),
                inputs.batch_size(),
            ],
            outputs=[
                io.Latent.Output(display_name="latent"),
                io.Int.Output(display_name="width"),
                io.Int.Output(display_name="height"),
                io.Int.Output(display_name="frames"),
                io.Float.Output(display_name="fps"),
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
