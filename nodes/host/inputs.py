"""Inputs that several nodes have, so that each idea has one name, one range and one wording; and what is asked of them before a run.

A node's ids, names, defaults and order are frozen once they have landed: what is said here changes every node that uses it.
"""

from collections.abc import Callable, Sequence

from comfy_api.latest import io

from ...opensora_core import geometry
from ...opensora_core.choices import CURVES, DEFAULT_BUDGET_GIB, DTYPES, FITS, NOISE_DEVICES, POLICIES, SOLVERS, SPEEDS
from ...opensora_core.errors import OpenSoraError
from ...opensora_core.run.request import SamplingOptions
from ...opensora_core.sampling.guidance import Guidance
from ...opensora_core.sampling.solvers import MAX_SEED
from ...opensora_core.text.prompt import FPS_RANGE, MOTION_SCORE, MOTION_SCORE_RANGE

# The range of every guidance scale.
_SCALE = {"min": 0.0, "max": 100.0, "step": 0.1}


def choice(name: str, options: Sequence[str], tooltip: str, default: str = "", **place) -> io.Combo.Input:
    """One of the options, by default the first."""
    return io.Combo.Input(name, options=list(options), default=default or options[0], tooltip=tooltip, **place)


def budget(tooltip: str, **place) -> io.Float.Input:
    """GiB of weights on the device in the offload mode budget."""
    return io.Float.Input("budget_gib", default=DEFAULT_BUDGET_GIB, min=0.1, max=1024.0, step=0.5, tooltip=tooltip, **place)


def vae(tooltip: str = "The HunyuanVideo VAE, from Open-Sora Load VAE or Load VAE.") -> io.Vae.Input:
    return io.Vae.Input("vae", tooltip=tooltip)


def text_encoders() -> io.Clip.Input:
    return io.Clip.Input("clip", tooltip="T5-XXL and CLIP-L, from Open-Sora Load Text Encoders or from DualCLIPLoader with type flux.")


def seed(tooltip: str) -> io.Int.Input:
    """The seed of a run, which the host offers to change after each."""
    return io.Int.Input("seed", default=0, min=0, max=MAX_SEED, control_after_generate=True, tooltip=tooltip)


def steps(of: str = "Number of steps") -> io.Int.Input:
    return io.Int.Input("steps", default=50, min=1, max=geometry.LARGEST["num_steps"], tooltip=f"{of}. The released default is 50.")


def speed(of: str = "run") -> io.Combo.Input:
    """How many of the released steps are computed."""
    return choice(
        "speed",
        SPEEDS,
        optional=True,
        tooltip=f"exact = every step of the {of}. balanced, fast, draft = a plan of 20, 12 or 9 of the 50 released steps, each with the mean guidance of "
        "those it stands for; steps is then not read. Near exact by measurement on the built-in model; Open-Sora Calibrate says how near on yours.",
    )


def solver() -> io.Combo.Input:
    """What walks a run's steps, of the models that know several."""
    return choice(
        "solver",
        SOLVERS,
        optional=True,
        advanced=True,
        tooltip="auto = the model's own: euler of Open-Sora, ddim of CogVideoX 2B, dpm of CogVideoX 5B and 1.5; a CogVideoX takes ddim or dpm.",
    )


def guidance_curve() -> io.Combo.Input:
    """How text guidance goes over the steps."""
    return choice(
        "guidance_curve",
        CURVES,
        optional=True,
        advanced=True,
        tooltip="How text guidance goes over the steps. auto = released with solver dpm of CogVideoX, else constant. released = CogVideoX's dynamic "
        "guidance as published, which jumps; by index = the smooth ramp that its formula means, from 1 to 1 more than the scale.",
    )


def text_guidance(**place) -> io.Float.Input:
    return io.Float.Input(
        "text_guidance",
        default=Guidance.text,
        tooltip="How strongly the video follows the prompt against the negative prompt. 1 = neutral (the negative prompt is not used); the released "
        "default is 7.5.",
        **_SCALE,
        **place,
    )


def image_guidance(follows: str, more: str = "", **place) -> io.Float.Input:
    """follows: what follows what, for the tooltip."""
    tooltip = f"How strongly {follows}. 1 = neutral; the released default is 3.{more}"
    return io.Float.Input("image_guidance", default=Guidance.image, tooltip=tooltip, **_SCALE, **place)


def oscillation() -> list:
    """Two switches: whether text and image guidance fall to 1 on every odd step."""
    return [
        io.Boolean.Input(
            "text_oscillation",
            default=Guidance.text_oscillation,
            advanced=True,
            tooltip="On = the released way: from step 10, every odd step runs at text guidance 1, which is faster. Off = the full scale at every step.",
        ),
        io.Boolean.Input(
            "image_oscillation",
            default=Guidance.image_oscillation,
            advanced=True,
            tooltip="On = the released way: from step 10, every odd step runs at image guidance 1. Off = the full scale at every step.",
        ),
    ]


def shift(of: str = "clip") -> io.Float.Input:
    return io.Float.Input(
        "shift",
        default=SamplingOptions.shift,
        min=0.0,
        max=100.0,
        step=0.01,
        advanced=True,
        tooltip=f"How long the run stays near noise. 0 = from the {of}'s size and length, as released (5.73 at 256px, 11.87 at 768px, 129 frames); "
        "1 = equal steps.",
    )


def exactness(of: str = "clip") -> list:
    """Where noise is drawn, and how latents are kept between steps."""
    return [
        choice(
            "noise_device",
            NOISE_DEVICES,
            advanced=True,
            tooltip="Where noise is drawn. cpu = the same for a seed on every machine; gpu = as the reference does, with bf16 latents.",
        ),
        choice(
            "latent_dtype",
            DTYPES,
            advanced=True,
            tooltip=f"How the {of} is kept between steps. fp32 = exact; bf16 = rounded, as the reference does.",
        ),
    ]


def decoration(where: str = "the prompt", **place) -> list:
    """What is said to the model behind a prompt: how much moves, and the frame rate."""
    return [
        io.Int.Input(
            "motion_score",
            default=MOTION_SCORE,
            min=0,
            max=MOTION_SCORE_RANGE[1],
            tooltip=f"How much moves, said in {where}: 1 (almost still) to 15 (wild). 4 is the released default; 0 leaves the sentence out.",
            **place,
        ),
        io.Int.Input(
            "fps",
            default=SamplingOptions.fps,
            min=0,
            max=FPS_RANGE[1],
            tooltip=f"Frames per second, said in {where}. 24 is the released default; 0 leaves the sentence out. It does not change the video's length.",
            **place,
        ),
    ]


def fit(of: str, **place) -> io.Combo.Input:
    return choice(
        "fit",
        FITS,
        tooltip=f"How a {of} of another shape is fitted: crop = cover and cut the middle, as in training; pad = black bars; stretch.",
        **place,
    )


def policy(of: str = "clip", lead: str = "") -> io.Combo.Input:
    """How a clip is decoded where memory is short."""
    return choice(
        "policy",
        POLICIES,
        tooltip=f"{lead}auto = whole {of} in time, with its activations in RAM if the GPU has too little memory, else temporal tiles, and "
        "says so; exact = never temporal tiles; low_memory = temporal tiles at once.",
    )


def sides(width: int, height: int, grid: geometry.Grid = geometry.CAUSAL, of: str = "", more: str = "") -> list:
    """Width and height in pixels; of and more: for the tooltips."""
    multiple = grid.size_multiple
    return [
        io.Int.Input(
            name,
            default=default,
            min=multiple,
            max=geometry.LARGEST[name],
            step=multiple,
            tooltip=f"{name.title()}{of} in pixels, a multiple of {multiple}.{more}",
        )
        for name, default in (("width", width), ("height", height))
    ]


def length(of: str = "the video", unset: str = "num_frames") -> io.String.Input:
    """How long a video is, in frames or in seconds; `frames_of` reads it."""
    return io.String.Input(
        "length",
        default="",
        optional=True,
        tooltip=f"Length of {of} in seconds (5s, at 24 frames a second, to the nearest that there is) or in frames (129). Empty = {unset}.",
    )


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
    grid.check_num_frames(frames)
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
    return problems(num_frames=problem(grid.check_num_frames, num_frames))
