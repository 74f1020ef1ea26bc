"""What the command line says of a video's frames: their size and number, and what they begin or end with."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from ..choices import BACKWARDS, EXACT, FITS, FORWARDS
from ..errors import OpenSoraError
from ..geometry import Grid, nearest_aspect_ratio
from ..media.video import is_video, media_size
from ..run.files import ModelFiles
from ..run.request import SamplingOptions
from ..sampling.given import CONTEXTS
from .model import with_usual
from .options import ASPECT_OF_REFERENCE, RunOptions, SizeOptions
from .output import say

PATHS = ("image", "last_image", "video")  # of a call's arguments, those that are paths of files


def call_arguments(options: RunOptions, files: ModelFiles) -> dict[str, Any]:
    """Keywords of a pipeline call, but for prompt, seed and callbacks. files: of the model that is asked. Their values are checked by the pipeline."""
    options = with_usual(options, files.usual)
    height, width, num_frames = video_size(options, files.usual.size, files.grid)
    return {
        "negative_prompt": options.negative_prompt,
        "height": height,
        "width": width,
        "num_frames": num_frames,
        "num_inference_steps": options.num_steps,
        "guidance_scale": options.guidance,
        "image_guidance_scale": options.guidance_img,
        **_references(options),
        **({} if options.speed == EXACT else {"speed": options.speed}),
        "options": SamplingOptions(
            **{one.name: getattr(options, one.name) for one in fields(SamplingOptions) if hasattr(options, one.name)}
        ),
    }


def video_size(options: SizeOptions, usual: tuple[int, int, int], grid: Grid) -> tuple[int, int, int]:
    """(height, width, frames) that are asked for; whether they are possible is checked where they are used.

    usual: of the model, where nothing else is asked for. grid: how the model counts frames and pixels.
    """
    if options.fps < 1:
        raise OpenSoraError(f"--fps {options.fps} is not a frame rate; use a number above 0, such as 24.")
    height, width, num_frames = usual
    named, sides = (options.resolution, options.aspect_ratio), options.image_size or (options.height, options.width)
    if options.image_size is not None and (options.height, options.width) != (None, None):
        raise OpenSoraError("Give either --image-size or --height and --width.")
    if None in sides and sides != (None, None):
        raise OpenSoraError("One of --width and --height is given; give both, or neither.")
    if sides != (None, None) and named != (None, None):
        raise OpenSoraError("Give either --resolution and --aspect-ratio, or --width and --height.")
    if sides != (None, None):
        height, width = sides
    elif named != (None, None):
        ratio = _aspect_ratio(options)
        height, width = grid.named_size(options.resolution or grid.size_names[0], ratio or grid.ratios[0])
        if grid.piece and ratio and options.aspect_order is None and height != width:
            other = "x".join(map(str, grid.named_size(options.resolution or grid.size_names[0], flipped(ratio))[::-1]))
            say(
                f"--aspect-ratio {ratio} is width:height here: {width}x{height}; with --aspect-order hw it is {other}, as the guides of Open-Sora 1 mean it"
            )
    return height, width, num_frames if options.num_frames is None else clip_length(options.num_frames, options.fps, grid)


def clip_length(text: str, fps: int, grid: Grid, is_told: bool = True) -> int:
    """Frames that "129" or "4s" asks for; seconds are rounded to the nearest count that the grid has. is_told: whether what they come to is said."""
    frames = grid.length(text, fps)
    if is_told and text.strip().endswith("s"):
        say(f"{text} at {fps} FPS: {frames} frames")
    return frames


def _aspect_ratio(options: SizeOptions) -> str | None:
    """The ratio's name, or None for the default; --aspect-ratio image is the one nearest to what is given."""
    if options.aspect_ratio != ASPECT_OF_REFERENCE:
        return flipped(options.aspect_ratio) if options.aspect_ratio and options.aspect_order == "hw" else options.aspect_ratio
    if not isinstance(options, RunOptions):
        raise OpenSoraError(
            f"--aspect-ratio {ASPECT_OF_REFERENCE} takes the shape of what generate is given; name the ratio here, such as 16:9."
        )
    path = options.ref or options.ref_end
    if path is None:
        raise OpenSoraError(f"--aspect-ratio {ASPECT_OF_REFERENCE} takes the shape of a picture or clip: give --ref or --ref-end too.")
    return nearest_aspect_ratio(*media_size(path))


def flipped(ratio: str) -> str:
    """ "16:9" -> "9:16"."""
    return ":".join(ratio.split(":")[::-1])


def _references(options: RunOptions) -> dict[str, Any]:
    """Arguments of a pipeline call that --cond-type, --ref, --ref-end and --strength stand for; what is not used is left out."""
    if options.mask_strategy is not None or options.reference_path is not None:
        if options.ref or options.ref_end or options.cond_type:
            raise OpenSoraError("--mask-strategy and --reference-path do not go with --ref, --ref-end and --cond-type; leave those out.")
        if not options.reference_path:
            raise OpenSoraError("--mask-strategy lays frames of pictures and clips; give --reference-path too.")
        paths = tuple(path.strip() for path in options.reference_path.split(";"))
        for path in paths:
            if not Path(path).is_file():
                raise OpenSoraError(f"--reference-path: {path!r} does not exist; choose another file.")
        return {"references": paths, "mask_strategy": options.mask_strategy or ""}
    mode = options.cond_type or ("v2v_head" if options.ref and is_video(options.ref) else None)
    strength = {} if options.strength == 1 else {"image_strength": options.strength}
    if mode is not None and mode.startswith("v2v"):
        if options.ref_end or not options.ref:
            raise OpenSoraError(f"--cond-type {mode} takes a clip, --ref clip.mp4, and no --ref-end; give that alone.")
        direction = FORWARDS if "head" in mode else BACKWARDS
        context = CONTEXTS[mode.endswith("easy")]
        return {"image": None, "last_image": None, "video": options.ref, "direction": direction, "context": context, **strength}
    image, last_image = _pictures(options.ref, options.ref_end, mode)
    if strength and not (image or last_image):
        raise OpenSoraError(f"--strength {options.strength} needs something to hold to; give --ref or --ref-end.")
    if options.fit != FITS[0] and not (image or last_image or getattr(options, "csv", None)):  # a table: some rows have pictures
        raise OpenSoraError(f"--fit {options.fit} needs something to fit; give --ref or --ref-end.")
    return {"image": image, "last_image": last_image, **strength}


def _pictures(ref: str | None, end: str | None, mode: str | None) -> tuple[str | None, str | None]:
    """(first, last). Upstream reads i2v_tail's and i2v_loop's pictures from one list, so one --ref serves for both."""
    if mode is None:
        return ref, end
    if mode == "t2v" and (ref or end):
        raise OpenSoraError("--cond-type t2v uses no picture; leave out --ref and --ref-end, or choose an i2v type.")
    if mode != "t2v" and not (ref or end):
        raise OpenSoraError(f"--cond-type {mode} needs a picture; give --ref{' or --ref-end' if mode == 'i2v_tail' else ''}.")
    if mode == "i2v_head" and (end or not ref):
        raise OpenSoraError("--cond-type i2v_head takes --ref alone; use i2v_loop for a last frame too.")
    if mode == "i2v_tail" and ref and end:
        raise OpenSoraError("--cond-type i2v_tail takes one picture, --ref-end; use i2v_loop for a first frame too.")
    if mode == "i2v_loop" and not ref:
        raise OpenSoraError("--cond-type i2v_loop needs --ref; give it (and --ref-end, if it does not end where it began).")
    return {"t2v": (None, None), "i2v_head": (ref, None), "i2v_tail": (None, end or ref), "i2v_loop": (ref, end or ref)}[mode]
