"""From parsed arguments to a pipeline and the settings of a call, as generate and benchmark share them."""

import argparse
import errno
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import OpenSoraError
from ..geometry import CAUSAL, Grid
from ..memory.component import PRECISIONS, resolve_device
from ..pipeline import OpenSoraPipeline
from ..run.files import HIGH_COMPRESSION_CLIP, SMALL_CLIP, USUAL_CLIP, ModelFiles, grid_of
from ..run.request import SamplingOptions, random_seed
from .references import aspect_ratio, reference_arguments

DEFAULT_BUDGET_GIB = 8.0
PARTS = ("dit", "vae", "t5", "clip")


@dataclass(frozen=True)
class CallSettings:
    """The arguments of one pipeline call, but for prompt, seed and callbacks; `arguments` is given as keywords."""

    seed: int
    arguments: dict[str, Any]


def call_settings(args: argparse.Namespace) -> CallSettings:
    """Read what is asked of a video.

    Raises:
        OpenSoraError: arguments that contradict each other. Their values are checked by the pipeline.
    """
    height, width, num_frames = video_size(args)
    arguments = {
        "negative_prompt": args.negative_prompt,
        "height": height,
        "width": width,
        "num_frames": num_frames,
        "num_inference_steps": args.num_steps,
        "guidance_scale": args.guidance,
        "image_guidance_scale": args.guidance_img,
        **reference_arguments(args),
        "options": SamplingOptions(fps=args.fps, motion_score=args.motion_score, fit=args.fit),
    }
    return CallSettings(random_seed() if args.seed is None else args.seed, arguments)


def video_size(args: argparse.Namespace) -> tuple[int, int, int]:
    """(height, width, frames) that are asked for; that they are possible is checked where they are used.

    Raises:
        OpenSoraError: arguments that contradict each other.
    """
    if args.fps < 1:
        raise OpenSoraError(f"--fps {args.fps} is not a frame rate; the default is 24.")
    grid = model_grid(args)
    height, width, num_frames = SMALL_CLIP if _is_small(args) else USUAL_CLIP if grid.is_causal else HIGH_COMPRESSION_CLIP
    if any(value is not None for value in (args.resolution, args.aspect_ratio, args.height, args.width)):
        height, width = _size(args, grid)
    return height, width, num_frames if args.num_frames is None else _num_frames(args.num_frames, args.fps, grid)


def model_grid(args: argparse.Namespace) -> Grid:
    """How the model that is meant counts frames and pixels; of files that cannot be read, which others will say, as the released one."""
    folder, dit = (args.path, None) if "path" in args else (args.model, args.dit)
    try:
        if dit is None and folder is not None and Path(folder).expanduser().is_file():
            dit = folder
        if dit is None and folder not in (None, "small"):
            dit = ModelFiles.in_folder(folder).dit
        return CAUSAL if dit is None else grid_of(Path(dit).expanduser())
    except OpenSoraError:
        return CAUSAL


def pipeline(args: argparse.Namespace) -> OpenSoraPipeline:
    """The pipeline that model and machine arguments ask for; no weight is read.

    Raises:
        OpenSoraError: files that are not there, a device that cannot be used, or a LoRA that is none.
    """
    device = resolve_device(args.device)
    torch_dtype: torch.dtype | None = PRECISIONS[args.dtype]
    parts = {part: getattr(args, part) for part in PARTS}
    missing = [f"--{part}" for part, path in parts.items() if path is None]
    if len(missing) == len(PARTS):
        made = OpenSoraPipeline.from_pretrained(
            args.model or "small", torch_dtype=torch_dtype, precision=args.precision, tokenizers=args.tokenizers
        )
    elif args.model is not None:
        raise OpenSoraError("Give either --model or the four parts --dit, --vae, --t5 and --clip, not both.")
    elif missing:
        raise OpenSoraError(f"A model of single files needs all four parts; {' and '.join(missing)} not given.")
    else:
        made = OpenSoraPipeline.from_files(**parts, tokenizers=args.tokenizers, torch_dtype=torch_dtype, precision=args.precision)
    if args.lora is None and args.lora_strength != 1:
        raise OpenSoraError(f"--lora-strength {args.lora_strength:g} is that of no LoRA; add --lora FILE.")
    budget_gib = args.budget_gib
    if budget_gib is None and args.offload == "budget":
        budget_gib = DEFAULT_BUDGET_GIB
    made.enable_offload(args.offload, budget_gib, device)
    made.vae.policy = args.decode_policy
    if args.attention == "sliced":
        made.enable_attention_slicing()
    if args.lora is not None:
        made.load_lora(args.lora, args.lora_strength)
    return made


def check_writable(folder: Path, name: str = "") -> None:
    """Make a folder to write in.

    Args:
        name: of the file that will be written, if it is known: its numbered and unfinished forms must be possible too.

    Raises:
        OpenSoraError: it cannot be made or written in.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{Path(name).stem}_9999.{id(folder)}.partial{Path(name).suffix}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        other = "a shorter name" if error.errno == errno.ENAMETOOLONG else "another folder"
        raise OpenSoraError(f"Nothing can be written to {folder / name} ({error.strerror}); choose {other}.") from error


def say(line: str) -> None:
    """A line for the person at the terminal; results alone go to standard output."""
    sys.stderr.write(line + "\n")


def clip_length(text: str, fps: int, grid: Grid = CAUSAL) -> int:
    """Frames that "129" or "4s" asks for; seconds are rounded to the nearest 4k+1, or what the grid has.

    Raises:
        OpenSoraError: neither of the two.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?s", text.strip())
    if match:
        return grid.frames_for_seconds(float(match[1]), fps)
    if not re.fullmatch(r"[+-]?\d+", text.strip()):
        raise OpenSoraError(f"The length {text!r} is neither a number of frames (129) nor seconds (4s).")
    return int(text)


def _num_frames(text: str, fps: int, grid: Grid) -> int:
    frames = clip_length(text, fps, grid)
    if text.strip().endswith("s"):
        say(f"{text} at {fps} FPS: {frames} frames")
    return frames


def _is_small(args: argparse.Namespace) -> bool:
    """Whether the built-in model is meant: by its name, or because none is named."""
    if "path" in args:  # of inspect, which without a path is about the released model
        return args.path == "small"
    return args.model in (None, "small") and all(getattr(args, part) is None for part in PARTS)


def _size(args: argparse.Namespace, grid: Grid) -> tuple[int, int]:
    named, sides = (args.resolution, args.aspect_ratio), (args.height, args.width)
    if sides == (None, None):
        return grid.named_size(args.resolution or "256px", aspect_ratio(args) or "16:9")
    if None in sides:
        raise OpenSoraError("--width and --height are given together, or not at all.")
    if named != (None, None):
        raise OpenSoraError("Give either --resolution and --aspect-ratio, or --width and --height.")
    return sides
