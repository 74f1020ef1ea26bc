"""`generate`: a prompt, or a table of them, and pictures if given, to video files."""

from dataclasses import replace
from pathlib import Path

from ..errors import OpenSoraError
from ..media.video import IMAGE_SUFFIX, VIDEO_SUFFIX
from ..names import taken_by, unused_path
from ..pipeline import OpenSoraPipeline
from ..run.request import random_seed
from ..sampling.solvers import MAX_SEED
from . import table
from .extend import Longer
from .frames import call_arguments
from .jobs import Job, Jobs
from .ledger import Ledger
from .model import pipeline
from .options import DONE, SOME_FAILED, ExtendOptions, GenerateOptions, changed
from .output import check_writable, say
from .pictures import check_given, flux_files, picture_job
from .progress import Screen


def run(options: GenerateOptions) -> int:
    """Make `--num-samples` videos, or one for each row, each written as soon as it is done; paths go to standard output.

    A video that fails for want of memory or disk is named on standard error and the others still run.
    """
    extending = changed(options, ExtendOptions)
    if options.csv is not None and extending:
        raise OpenSoraError(f"{extending[0]} makes one prompt's video longer; it does not go with --csv.")
    if options.csv is not None:
        return table.run(options)
    if extending and options.extend is None:
        raise OpenSoraError(f"{extending[0]} goes with --extend N, the number of segments to add.")
    screen, target = Screen(), Target(options.out)
    jobs, pipe = _jobs(options, target, screen)
    with screen:
        making = Jobs(pipe, Ledger(target.folder, is_written=False), screen, is_one_request=True)
        making.run(jobs)
    if making.failed:
        say(f"{len(making.failed)} of {len(jobs)} videos failed")
    return SOME_FAILED if making.failed else DONE


class Target:
    """The file or the folder to write to. Raises an OpenSoraError for a file of another kind."""

    def __init__(self, out: str):
        self.path, self._is_told = Path(out).expanduser(), False
        self.is_folder = self.path.is_dir() or not self.path.suffix
        self.folder = self.path if self.is_folder else self.path.parent
        if not self.is_folder and self.path.suffix.lower() not in (VIDEO_SUFFIX, IMAGE_SUFFIX):
            raise OpenSoraError(
                f"--out {out} ends in {self.path.suffix}; give a folder, or a file ending in {VIDEO_SUFFIX} ({IMAGE_SUFFIX} for one frame)."
            )

    def free(self) -> Path:
        """A name that nothing has: the next video_0000.mp4 of a folder; clip.mp4, clip_1.mp4, ... of a file."""
        if not self.is_folder:
            path = unused_path(self.path)
            if path != self.path and not self._is_told:
                say(f"{taken_by(self.path).name} is there already; writing {path.name}")
            self._is_told = True
            return path
        number = 0
        while unused_path(path := self.folder / f"video_{number:04d}{VIDEO_SUFFIX}") != path:
            number += 1
        return path


def _jobs(options: GenerateOptions, target: Target, screen: Screen) -> tuple[list[Job], OpenSoraPipeline]:
    """(every video of the command, which differ by their seeds alone; the pipeline), checked before any weight is read."""
    count = options.num_samples
    if count < 1:
        raise OpenSoraError(f"--num-samples {count} makes nothing; use at least 1.")
    check_given(options)
    pipe = pipeline(options)
    arguments = call_arguments(options, pipe.files)
    seed = random_seed() if options.seed is None else options.seed
    if not 0 <= seed <= MAX_SEED - count + 1:
        raise OpenSoraError(f"--seed {seed} is out of range; use 0 to {MAX_SEED - count + 1}.")
    if target.path.suffix.lower() == IMAGE_SUFFIX and arguments["num_frames"] > 1:
        raise OpenSoraError(f"{arguments['num_frames']} frames do not fit in one picture; end --out in {VIDEO_SUFFIX}, or give a folder.")
    check_writable(target.folder, "" if target.is_folder else target.path.name)
    longer = Longer(options, arguments, pipe, screen) if options.extend is not None else None
    if options.t2i2v:
        pipe.load_flux(*flux_files(options))
    jobs = []
    for index in range(count):
        picture, name = None, f"video {index + 1}"
        if options.t2i2v:
            picture = picture_job(options, arguments, seed + index)
            of_seed = f"seed {picture.seed}"
            file = target.folder / f"picture_{of_seed.replace(' ', '_')}{IMAGE_SUFFIX}"
            picture = replace(picture, name=of_seed, key=of_seed, file=file)
        jobs.append(
            Job(
                name=f"{name} (seed {seed + index})",
                title=f"{name} of {count}",
                prompt=options.prompt,
                seed=seed + index,
                arguments=arguments,
                fps=options.fps,
                place=target.free,
                key=name,
                asked={"seed": seed + index},
                picture=picture,
                longer=longer,
            )
        )
    jobs[0].check(pipe)
    return jobs, pipe
