"""What the command line gives a video to begin or end with, and the shape that the video takes from it."""

import argparse
from typing import Any

from ..cli import ASPECT_OF_REFERENCE
from ..errors import OpenSoraError
from ..geometry import nearest_aspect_ratio
from ..media.video import is_video, media_size
from ..sampling.given import BACKWARDS, CONTEXTS, FITS, FORWARDS

PATHS = ("image", "last_image", "video")  # of a call's arguments, those that are paths of files


def reference_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of a pipeline call that --cond-type, --ref, --ref-end and --strength stand for; what is not used is left out.

    Raises:
        OpenSoraError: arguments that contradict each other.
    """
    mode = args.cond_type or ("v2v_head" if args.ref and is_video(args.ref) else None)
    strength = {} if args.strength == 1 else {"image_strength": args.strength}
    if mode is not None and mode.startswith("v2v"):
        if args.ref_end or not args.ref:
            raise OpenSoraError(f"--cond-type {mode} takes a clip, --ref clip.mp4, and no --ref-end.")
        direction = FORWARDS if "head" in mode else BACKWARDS
        context = CONTEXTS[mode.endswith("easy")]
        return {"image": None, "last_image": None, "video": args.ref, "direction": direction, "context": context, **strength}
    image, last_image = _pictures(args.ref, args.ref_end, mode)
    if strength and not (image or last_image):
        raise OpenSoraError(f"--strength {args.strength} needs something to hold to: --ref or --ref-end.")
    if args.fit != FITS[0] and not (image or last_image or getattr(args, "csv", None)):
        raise OpenSoraError(f"--fit {args.fit} needs something to fit: --ref or --ref-end.")
    return {"image": image, "last_image": last_image, **strength}


def aspect_ratio(args: argparse.Namespace) -> str | None:
    """The ratio's name, or None for the default; --aspect-ratio image is the one nearest to what is given.

    Raises:
        OpenSoraError: nothing is given to take it from, or it cannot be read.
    """
    if args.aspect_ratio != ASPECT_OF_REFERENCE:
        return args.aspect_ratio
    path = getattr(args, "ref", None) or getattr(args, "ref_end", None)
    if path is None and "ref" not in args:
        raise OpenSoraError(
            f"--aspect-ratio {ASPECT_OF_REFERENCE} takes the shape of what generate is given; name the ratio here, such as 16:9."
        )
    if path is None:
        raise OpenSoraError(f"--aspect-ratio {ASPECT_OF_REFERENCE} takes the shape of a picture or clip: give --ref or --ref-end too.")
    return nearest_aspect_ratio(*media_size(path))


def _pictures(ref: str | None, end: str | None, mode: str | None) -> tuple[str | None, str | None]:
    """(first, last). The reference reads i2v_tail's and i2v_loop's pictures from one list, so one --ref serves for both."""
    if mode is None:
        return ref, end
    if mode == "t2v" and (ref or end):
        raise OpenSoraError("--cond-type t2v uses no picture; leave out --ref and --ref-end, or choose an i2v type.")
    if mode != "t2v" and not (ref or end):
        raise OpenSoraError(f"--cond-type {mode} needs a picture: --ref{' or --ref-end' if mode == 'i2v_tail' else ''}.")
    if mode == "i2v_head" and (end or not ref):
        raise OpenSoraError("--cond-type i2v_head takes --ref alone; for a last frame too use i2v_loop.")
    if mode == "i2v_tail" and ref and end:
        raise OpenSoraError("--cond-type i2v_tail takes one picture, --ref-end; for a first frame too use i2v_loop.")
    if mode == "i2v_loop" and not ref:
        raise OpenSoraError("--cond-type i2v_loop needs --ref (and --ref-end, if it does not end where it began).")
    return {"t2v": (None, None), "i2v_head": (ref, None), "i2v_tail": (None, end or ref), "i2v_loop": (ref, end or ref)}[mode]
