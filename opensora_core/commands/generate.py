"""`generate`: a prompt, and pictures if given, to video files."""

import argparse
import sys
from pathlib import Path

from ..cli import DONE, SOME_FAILED
from ..errors import DecodeOutOfMemory, OpenSoraError
from ..media.video import IMAGE_SUFFIX, VIDEO_SUFFIX, save_video, taken_by, unused_path
from ..sampling.solvers import MAX_SEED
from . import batch
from .extend import KeptFile, LongVideo
from .failures import failure, keep_latents
from .options import CallSettings, call_settings, check_writable, pipeline, say
from .pictures import Pictures, check_given
from .progress import Bars


def run(args: argparse.Namespace) -> int:
    """Make `--num-samples` videos, each written as soon as it is done; paths go to standard output.

    A video that fails for want of memory or disk is named on standard error and the others still run.
    """
    if args.csv is not None:
        return _table(args)
    target = _target(args.out)
    settings = _settings(args, target)
    pipe = pipeline(args)
    folder, name = (target, "") if _is_folder(target) else (target.parent, target.name)
    check_writable(folder, name)
    long = LongVideo(args, settings, pipe)
    pictures = Pictures(args, settings, pipe)
    prompt, written = pictures.draw(folder), []
    if prompt is None:
        return SOME_FAILED
    for index in range(args.num_samples):
        seed = settings.seed + index
        title = f"video {index + 1} of {args.num_samples}, seed {seed}, on {pipe.device} in {str(pipe.dtype).removeprefix('torch.')}"
        arguments, free = settings.arguments | pictures.first_frame(index), _free(target, written)
        kept = KeptFile(free, pipe.latent_scale)
        try:
            if long.is_wanted:
                with kept.named_if_stopped():
                    result = long.make(prompt, seed, arguments, kept)
            else:
                with Bars(title) as bars:
                    result = pipe(prompt, seed=seed, callback=bars.step, progress=bars.progress, **arguments)
            path = save_video(result.frames[0], free, args.fps, prompt=result.prompt.text)
        except DecodeOutOfMemory as error:
            where = kept.sentence or keep_latents(error, free, pipe.latent_scale)
            say(f"error: video {index + 1} (seed {seed}) failed: {error} {where}")
            continue
        except (OSError, MemoryError, RuntimeError) as error:
            sentence = failure(error)
            if sentence is None:
                raise
            say(" ".join(filter(None, [f"error: video {index + 1} (seed {seed}) failed: {sentence}", kept.sentence])))
            continue
        prompt = prompt if long.is_wanted else result.prompt  # encoded once for all
        written.append(path)
        sys.stdout.write(f"{path}\n")
        sys.stdout.flush()
    failed = args.num_samples - len(written)
    if failed:
        say(f"{failed} of {args.num_samples} videos failed")
    return SOME_FAILED if failed else DONE


def _table(args: argparse.Namespace) -> int:
    if args.extend is not None:
        raise OpenSoraError("--extend makes one prompt's video longer; it does not go with --csv.")
    check_given(args)
    return batch.run(args)


def _settings(args: argparse.Namespace, target: Path) -> CallSettings:
    """Of all videos of the command, whose numbers and file it can have."""
    if args.num_samples < 1:
        raise OpenSoraError(f"--num-samples {args.num_samples} makes nothing; use at least 1.")
    check_given(args)
    settings = call_settings(args)
    if not 0 <= settings.seed <= MAX_SEED - args.num_samples + 1:
        raise OpenSoraError(f"--seed {settings.seed} is out of range; use 0 to {MAX_SEED - args.num_samples + 1}.")
    if target.suffix.lower() == IMAGE_SUFFIX and settings.arguments["num_frames"] > 1:
        raise OpenSoraError(
            f"{settings.arguments['num_frames']} frames do not fit in one picture; end --out in {VIDEO_SUFFIX}, or give a folder."
        )
    return settings


def _target(out: str) -> Path:
    """The file or the folder to write to."""
    path = Path(out).expanduser()
    if path.is_dir() or not path.suffix or path.suffix.lower() in (VIDEO_SUFFIX, IMAGE_SUFFIX):
        return path
    raise OpenSoraError(
        f"--out {out} ends in {path.suffix}; give a folder, or a file ending in {VIDEO_SUFFIX} ({IMAGE_SUFFIX} for one frame)."
    )


def _is_folder(target: Path) -> bool:
    return target.is_dir() or not target.suffix


def _free(target: Path, written: list[Path]) -> Path:
    """A name that nothing has: the next video_0000.mp4 of a folder; clip.mp4, clip_1.mp4, ... of a file."""
    if not _is_folder(target):
        path = unused_path(target)
        if path != target and not written:
            say(f"{taken_by(target).name} is there already; writing {path.name}")
        return path
    number = 0
    while unused_path(path := target / f"video_{number:04d}{VIDEO_SUFFIX}") != path:
        number += 1
    return path
