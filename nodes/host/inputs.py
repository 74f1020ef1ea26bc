"""Inputs that several nodes have, so that each idea has one name and one range; and what is asked of them before a run.

A node's ids, names, defaults and order are frozen once they have landed: what is said here changes every node that uses it.
"""

from collections.abc import Callable, Sequence
from functools import partial

from comfy_api.latest import io

from ...opensora_core import choices, geometry
from ...opensora_core.errors import OpenSoraError
from ...opensora_core.geometry import Tiling
from ...opensora_core.run.picture import GUIDANCE
from ...opensora_core.run.request import SamplingOptions
from ...opensora_core.sampling.guidance import Guidance
from ...opensora_core.sampling.solvers import MAX_SEED
from ...opensora_core.text.prompt import FPS_RANGE, MOTION_SCORE, MOTION_SCORE_RANGE
from . import paths

MODELS = "diffusion_models"  # folder of transformers


def choice(name: str, options: Sequence[str], default: str = "", **place) -> io.Combo.Input:
    """One of the options, by default the first."""
    return io.Combo.Input(name, options=list(options), default=default or options[0], **place)


_scale = partial(io.Float.Input, min=0.0, max=100.0, step=0.1)
_switch = partial(io.Boolean.Input, advanced=True)
_said = partial(io.String.Input, multiline=True, dynamic_prompts=True)
_INPUTS: dict[str, Callable] = {
    **dict.fromkeys(("model", "flux_model"), io.Model.Input),
    **dict.fromkeys(("vae", "flux_vae"), io.Vae.Input),
    **dict.fromkeys(("positive", "negative"), io.Conditioning.Input),
    "clip": io.Clip.Input,
    **dict.fromkeys(("latent", "start_latent", "end_latent"), io.Latent.Input),
    **dict.fromkeys(("image", "images", "start_image", "end_image"), io.Image.Input),
    "model_name": lambda name: files(name, lambda: paths.choices(MODELS, "transformer")),
    "precision": partial(choice, options=choices.PRECISIONS),
    "offload": partial(choice, options=choices.OFFLOADS),
    "budget_gib": partial(io.Float.Input, default=choices.DEFAULT_BUDGET_GIB, min=0.1, max=1024.0, step=0.5),
    "prompt": _said,
    "negative_prompt": partial(_said, default=""),
    "motion_score": partial(io.Int.Input, default=MOTION_SCORE, min=0, max=MOTION_SCORE_RANGE[1]),
    "fps": partial(io.Int.Input, default=SamplingOptions.fps, min=0, max=FPS_RANGE[1]),
    "aspect_ratio": partial(choice, options=geometry.ASPECT_RATIOS),
    "batch_size": partial(io.Int.Input, default=1, min=1, max=64),
    "length": partial(io.String.Input, default="", optional=True),  # in frames or in seconds; `frames_of` reads it
    "fit": partial(choice, options=choices.FITS),
    "strength": partial(io.Float.Input, default=1.0, min=0.0, max=1.0, step=0.05, optional=True, advanced=True),
    "seed": partial(io.Int.Input, default=0, min=0, max=MAX_SEED, control_after_generate=True),
    "steps": partial(io.Int.Input, default=50, min=1, max=geometry.LARGEST["num_steps"]),
    "flux_schedule": partial(choice, options=choices.PICTURE_SCHEDULES, advanced=True),
    "flux_guidance": partial(_scale, default=GUIDANCE, advanced=True),
    "text_guidance": partial(_scale, default=Guidance.text),
    "image_guidance": partial(_scale, default=Guidance.image),
    "text_oscillation": partial(_switch, default=Guidance.text_oscillation),
    "image_oscillation": partial(_switch, default=Guidance.image_oscillation),
    "temporal_ramp": partial(_switch, default=Guidance.temporal_ramp),
    "shift": partial(io.Float.Input, default=SamplingOptions.shift, min=0.0, max=100.0, step=0.01, advanced=True),
    "noise_device": partial(choice, options=choices.NOISE_DEVICES, advanced=True),
    "latent_dtype": partial(choice, options=choices.DTYPES, advanced=True),
    "speed": partial(choice, options=choices.SPEEDS, optional=True),
    "solver": partial(choice, options=choices.SOLVERS, optional=True, advanced=True),
    "guidance_curve": partial(choice, options=choices.CURVES, optional=True, advanced=True),
    "tile_size": partial(io.Int.Input, default=Tiling.tile_size, min=0, max=4096, step=32),
    "overlap": partial(io.Float.Input, default=Tiling.overlap, min=0.0, max=0.5, step=0.0625),
    "policy": partial(choice, options=choices.POLICIES),
}


def files(name: str, options: Callable[[], list[str]]) -> Callable[[], io.Combo.Input]:
    """One of the files, or folders, that are there when the host asks for the node's schema."""
    return lambda: io.Combo.Input(name, options=options())


def of(*names: str, **place: bool) -> list:
    """Inputs by their names, for a node's `takes`. place: optional or advanced, where they are not so everywhere."""
    return [_INPUTS[name](name, **place) for name in names]


def guidance_of(
    text_guidance, image_guidance, text_oscillation, image_oscillation, temporal_ramp=True, guidance_curve=choices.AUTO
) -> Guidance:
    """The guidance that a node's inputs say."""
    return Guidance(text_guidance, image_guidance, text_oscillation, image_oscillation, temporal_ramp, curve=guidance_curve)


def sides(width: int, height: int, grid: geometry.Grid = geometry.CAUSAL) -> list:
    """Width and height in pixels, of these defaults."""
    multiple, defaults = grid.size_multiple, {"width": width, "height": height}
    return [
        io.Int.Input(name, default=default, min=multiple, max=geometry.LARGEST[name], step=multiple) for name, default in defaults.items()
    ]


def frames_of(
    length: str | None, num_frames: int | None, grid: geometry.Grid = geometry.CAUSAL, fps: float = SamplingOptions.fps
) -> int | None:
    """How many frames a node is asked for: what `length` says, if anything, else num_frames. Raises an OpenSoraError for no length of the grid."""
    if not (length or "").strip():
        return num_frames
    frames = grid.length(length, fps)
    grid.frames.check(frames)
    return frames


def problem(check: Callable, *values) -> str:
    """The sentence with which a check refuses what inputs hold; "" where it does not, or where a value comes over a wire (None): the
    node checks it again when it runs."""
    try:
        if None not in values:
            check(*values)
    except OpenSoraError as error:
        return str(error)
    return ""


def size_problems(height: int | None, width: int | None, grid: geometry.Grid) -> dict[str, str]:
    """What is wrong with a size, under the side that is wrong."""
    side = "height" if problem(grid.check_size, height, grid.size_multiple) else "width"
    return {side: problem(grid.check_size, height, width)}


def length_problems(length: str | None, num_frames: int | None, grid: geometry.Grid) -> dict[str, str]:
    """What is wrong with a length: what is written holds before the count."""
    if (length or "").strip():
        return {"length": problem(frames_of, length, 0, grid)}
    return {"num_frames": problem(grid.frames.check, num_frames)}
