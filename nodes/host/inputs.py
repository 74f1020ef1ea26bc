"""Inputs that several nodes have, so that each idea has one name and one range; and what is asked of them before a run.

A node's ids, names, defaults and order are frozen once they have landed: what is said here changes every node that uses it.
"""

from collections.abc import Callable, Sequence

from comfy_api.latest import io

from ...opensora_core import geometry
from ...opensora_core.choices import CURVES, DEFAULT_BUDGET_GIB, DTYPES, NOISE_DEVICES, POLICIES, SOLVERS, SPEEDS
from ...opensora_core.errors import OpenSoraError
from ...opensora_core.run.request import SamplingOptions
from ...opensora_core.sampling.guidance import Guidance
from ...opensora_core.sampling.solvers import MAX_SEED
from ...opensora_core.text.prompt import FPS_RANGE, MOTION_SCORE, MOTION_SCORE_RANGE


def choice(name: str, options: Sequence[str], default: str = "", **place) -> io.Combo.Input:
    """One of the options, by default the first."""
    return io.Combo.Input(name, options=list(options), default=default or options[0], **place)


def clip() -> list:
    """A clip to make, with its prompts and the VAE of what is given to it."""
    return [io.Conditioning.Input("positive"), io.Conditioning.Input("negative"), io.Vae.Input("vae"), io.Latent.Input("latent")]


def budget(**place) -> io.Float.Input:
    """GiB of weights on the device in the offload mode budget."""
    return io.Float.Input("budget_gib", default=DEFAULT_BUDGET_GIB, min=0.1, max=1024.0, step=0.5, **place)


def seed() -> io.Int.Input:
    """The seed of a run, which the host offers to change after each."""
    return io.Int.Input("seed", default=0, min=0, max=MAX_SEED, control_after_generate=True)


def steps() -> io.Int.Input:
    return io.Int.Input("steps", default=50, min=1, max=geometry.LARGEST["num_steps"])


def speed() -> io.Combo.Input:
    """How many of the released steps are computed."""
    return choice("speed", SPEEDS, optional=True)


def own_way() -> list:
    """What walks a run's steps, of the models that know several, and how text guidance goes over them."""
    return [choice("solver", SOLVERS, optional=True, advanced=True), choice("guidance_curve", CURVES, optional=True, advanced=True)]


def guidance(**place) -> list:
    """The scales of a run."""
    scale = {"min": 0.0, "max": 100.0, "step": 0.1, **place}
    return [
        io.Float.Input("text_guidance", default=Guidance.text, **scale),
        io.Float.Input("image_guidance", default=Guidance.image, **scale),
    ]


def oscillation() -> list:
    """Two switches: whether text and image guidance fall to 1 on every odd step."""
    return [
        io.Boolean.Input("text_oscillation", default=Guidance.text_oscillation, advanced=True),
        io.Boolean.Input("image_oscillation", default=Guidance.image_oscillation, advanced=True),
    ]


def shift() -> io.Float.Input:
    return io.Float.Input("shift", default=SamplingOptions.shift, min=0.0, max=100.0, step=0.01, advanced=True)


def exactness() -> list:
    """Where noise is drawn, and how latents are kept between steps."""
    return [choice("noise_device", NOISE_DEVICES, advanced=True), choice("latent_dtype", DTYPES, advanced=True)]


def decoration(**place) -> list:
    """What is said to the model behind a prompt: how much moves, and the frame rate."""
    return [
        io.Int.Input("motion_score", default=MOTION_SCORE, min=0, max=MOTION_SCORE_RANGE[1], **place),
        io.Int.Input("fps", default=SamplingOptions.fps, min=0, max=FPS_RANGE[1], **place),
    ]


def policy() -> io.Combo.Input:
    """How a clip is decoded where memory is short."""
    return choice("policy", POLICIES)


def batch_size() -> io.Int.Input:
    return io.Int.Input("batch_size", default=1, min=1, max=64)


def sides(width: int, height: int, grid: geometry.Grid = geometry.CAUSAL) -> list:
    """Width and height in pixels."""
    multiple = grid.size_multiple
    return [
        io.Int.Input(name, default=default, min=multiple, max=geometry.LARGEST[name], step=multiple)
        for name, default in (("width", width), ("height", height))
    ]


def length() -> io.String.Input:
    """How long a video is, in frames or in seconds; `frames_of` reads it."""
    return io.String.Input("length", default="", optional=True)


def frames_of(
    length: str | None, num_frames: int | None, grid: geometry.Grid = geometry.CAUSAL, fps: float = SamplingOptions.fps
) -> int | None:
    """The count of frames that a node is asked for: `length` where something is written there, else num_frames.

    Raises:
        OpenSoraError: what is written is no length, or one that the grid has not.
    """
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


def problems(**found: str) -> dict[str, str]:
    """What a node's validate_inputs answers: the sentences by their inputs."""
    return {name: sentence for name, sentence in found.items() if sentence}


def size_problems(height: int | None, width: int | None, grid: geometry.Grid) -> dict[str, str]:
    """`problems` of a size, under the side that is wrong."""
    sentence = problem(grid.check_size, height, width)
    return problems(**{"height" if problem(grid.check_size, height, grid.size_multiple) else "width": sentence})


def length_problems(length: str | None, num_frames: int | None, grid: geometry.Grid) -> dict[str, str]:
    """`problems` of a length: what is written holds before the count."""
    if length is not None and length.strip():
        return problems(length=problem(frames_of, length, 0, grid))
    return problems(num_frames=problem(grid.frames.check, num_frames))
