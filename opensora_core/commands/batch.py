"""`generate --csv`: a video for each row of a table, that goes on after a row that failed and where it was stopped."""

import argparse
import shutil
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ..cli import DONE, SOME_FAILED
from ..errors import DecodeOutOfMemory, OpenSoraError
from ..media.video import IMAGE_SUFFIX, VIDEO_SUFFIX, save_video, unused_path
from ..memory.loaded import identity
from ..pipeline import OpenSoraPipeline
from ..run.request import EncodedPrompt
from ..text.prompt import file_name_part
from .failures import failure, keep_latents
from .ledger import Ledger, described, keys
from .options import CallSettings, call_settings, check_writable, clip_length, model_grid, pipeline, say
from .pictures import flux_files
from .progress import BatchBars, NamedWarnings
from .references import PATHS
from .row_pictures import RowPicture, RowPictures, known_by, row_picture
from .rows import Row, read_rows, row_arguments

T = TypeVar("T")

# Prompts are encoded so many at a time: half a GiB of main memory, and the text encoders are read once for all of them.
ENCODED_TOGETHER = 32
# With pictures to draw, so many rows at a time: Flux is read once for them, and a stop in the middle loses no more than these pictures.
DRAWN_TOGETHER = 8
_LEAST_ROOM = 2**24  # bytes of disk below which no video is begun


@dataclass(frozen=True)
class Job:
    """A row that can be run.

    Attributes:
        settings: of the pipeline's call. fps: of the file.
        asked: all that was asked for, in JSON's terms; a seed that was not given is None. key: what it is known by.
        picture: that Flux draws for it, its first frame.
    """

    row: Row
    prompt: str
    settings: CallSettings
    fps: int
    asked: dict[str, Any]
    key: str = ""
    picture: RowPicture | None = None

    @property
    def file_name(self) -> str:
        """0003_a-red-kite.mp4, of the row and its prompt."""
        return f"{self.row.number:04d}_{file_name_part(self.prompt)}{VIDEO_SUFFIX}"

    def title(self, seed: int) -> str:
        size = self.settings.arguments
        return f"{self.row.name}: {size['num_frames']} frames of {size['width']}x{size['height']}, seed {seed}"


def run(args: argparse.Namespace) -> int:
    """Check every row, then make those that are not finished; paths of new videos go to standard output."""
    folder = _folder(args)
    rows, args = read_rows(args.csv), _with_frames(args)
    pipe = pipeline(args)
    pipe.check_files()
    if args.t2i2v:
        pipe.load_flux(*flux_files(args))
    jobs = _jobs(rows, args, pipe)
    check_writable(folder)
    batch = Batch(pipe, folder, Ledger(folder))
    return batch.run(jobs)


class Batch:
    """The rows of one command, on their way."""

    def __init__(self, pipe: OpenSoraPipeline, folder: Path, ledger: Ledger):
        self._pipe, self._folder, self._ledger = pipe, folder, ledger
        self._pictures = RowPictures(pipe, folder, ledger)
        self._failed: dict[str, str] = {}

    def run(self, jobs: list[Job]) -> int:
        """Make what is not finished yet, and return the exit code."""
        waiting = [job for job in jobs if self._ledger.finished(job.key) is None]
        if len(waiting) < len(jobs):
            say(f"{len(jobs) - len(waiting)} of {len(jobs)} rows are finished already in {self._folder}")
        try:
            together = DRAWN_TOGETHER if any(job.picture for job in waiting) else ENCODED_TOGETHER
            with BatchBars(len(jobs), len(jobs) - len(waiting)) as bars, NamedWarnings(bars) as warnings:
                for first in range(0, len(waiting), together):
                    self._run_some(waiting[first : first + together], bars, warnings)
        except KeyboardInterrupt:
            done = sum(self._ledger.finished(job.key) is not None for job in jobs)
            say(f"{done} of {len(jobs)} rows are finished; the same command goes on with the others")
            raise
        if not self._failed:
            return DONE
        say(f"{len(self._failed)} of {len(jobs)} rows failed; the same command tries them again:")
        for name, sentence in self._failed.items():
            say(f"  {name}: {sentence}")
        return SOME_FAILED

    def _run_some(self, jobs: list[Job], bars: BatchBars, warnings: NamedWarnings) -> None:
        missing = self._pictures.missing([job.picture for job in jobs])
        encoded = self._try(jobs, bars, lambda: self._encode(jobs, missing, bars, warnings))
        if encoded is None:
            return
        warnings.name_at_work = ""
        self._draw(jobs, list(zip(missing, encoded[len(jobs) :], strict=True)), bars)
        for job, prompt in zip(jobs, encoded, strict=False):
            if job.row.name in self._failed:
                continue
            warnings.name_at_work = job.row.name
            path = self._try([job], bars, lambda job=job, prompt=prompt: self._video(job, prompt, bars))
            if path is not None:
                bars.finished(str(path))

    def _encode(self, jobs: list[Job], pictures: list[RowPicture], bars: BatchBars, warnings: NamedWarnings) -> list[EncodedPrompt]:
        """The prompts of videos, and behind them those of pictures, which are read as they are."""
        asked = [(job.prompt, job.settings.arguments["negative_prompt"], job.settings.arguments["options"]) for job in jobs]
        asked += [(picture.prompt, "", None) for picture in pictures]
        names = [job.row.name for job in jobs] + [f"{picture.row.name}, picture" for picture in pictures]
        with bars.stages(f"prompts of {len(jobs)} rows" if len(jobs) > 1 else "prompt of one row") as stages:

            def progress(stage: str, done: int, total: int) -> None:
                warnings.name_at_work = names[done] if done < total else ""
                stages.progress(stage, done, total)

            return self._pipe.encode_prompts(asked, progress)

    def _draw(self, jobs: list[Job], wanted: list[tuple[RowPicture, EncodedPrompt]], bars: BatchBars) -> None:
        """Draw pictures, Flux read once for all; where that fails, each alone, so that the failure is that of the rows it belongs to."""
        if len(wanted) > 1:
            try:
                self._pictures.draw(*zip(*wanted, strict=True), bars)
                return
            except (OpenSoraError, OSError, MemoryError, RuntimeError) as error:
                bars.say(f"drawing {len(wanted)} pictures together failed ({failure(error) or error}); each is drawn alone")
        for picture, text in wanted:
            if self._pictures.path(picture) is None:
                rows = [job for job in jobs if job.picture is not None and job.picture.key == picture.key]
                self._try(rows, bars, lambda picture=picture, text=text: self._pictures.draw([picture], [text], bars))

    def _video(self, job: Job, prompt: EncodedPrompt, bars: BatchBars) -> Path:
        if shutil.disk_usage(self._folder).free < _LEAST_ROOM:
            raise OSError(f"the disk of {self._folder} is full.")
        seed, arguments = job.settings.seed, job.settings.arguments
        if job.picture is not None:
            arguments = arguments | {"image": self._pictures.path(job.picture)}
            if job.asked["seed"] is None and job.picture.asked["seed"] is None:
                seed = self._ledger.seed(job.picture.key)  # a picture of an earlier try, and its video, have one seed
        with bars.stages(f"{job.title(seed)}, on {self._pipe.device} in {str(self._pipe.dtype).removeprefix('torch.')}") as stages:
            result = self._pipe(prompt, seed=seed, callback=stages.step, progress=stages.progress, **arguments)
        target = unused_path(self._folder / job.file_name)
        path = save_video(result.frames[0], target, job.fps, prompt=result.prompt.text)
        self._ledger.add(job.key, path, job.row.number, seed, job.asked)
        return path

    def _try(self, jobs: list[Job], bars: BatchBars, work: Callable[[], T]) -> T | None:
        """What `work` gives, or None where it failed: then these rows have, and the others go on."""
        try:
            return work()
        except DecodeOutOfMemory as error:
            where = keep_latents(error, unused_path(self._folder / jobs[0].file_name), self._pipe.latent_scale)
            sentence = f"{error} {where}"
        except OpenSoraError as error:
            sentence = str(error)
        except (OSError, MemoryError, RuntimeError) as error:
            sentence = failure(error)
            if sentence is None:  # a defect, which should show where
                bars.say(traceback.format_exc())
                sentence = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        for job in jobs:
            self._failed[job.row.name] = sentence
            bars.failed(f"error: {job.row.name} failed: {sentence}")
        return None


def _folder(args: argparse.Namespace) -> Path:
    longer = [name for name, value in vars(args).items() if name.startswith("extend") and value is not None]
    if longer:
        raise OpenSoraError(f"--{longer[0].replace('_', '-')} makes one prompt's video longer; it does not go with --csv.")
    if args.num_samples != 1:
        raise OpenSoraError(f"--num-samples {args.num_samples} does not go with --csv; give the table a row for each video.")
    folder = Path(args.out).expanduser()
    if not folder.is_dir() and (folder.exists() or folder.suffix.lower() in (VIDEO_SUFFIX, IMAGE_SUFFIX)):
        raise OpenSoraError(f"--out {args.out} is one file; --csv makes several, so give a folder.")
    return folder


def _with_frames(args: argparse.Namespace) -> argparse.Namespace:
    """The same with a length in seconds counted in frames, which is said once and not for each row."""
    if args.num_frames is None:
        return args
    frames = str(clip_length(args.num_frames, args.fps, model_grid(args)))
    if frames != args.num_frames:
        say(f"{args.num_frames} at {args.fps} FPS: {frames} frames")
    return argparse.Namespace(**{**vars(args), "num_frames": frames})


def _jobs(rows: list[Row], args: argparse.Namespace, pipe: OpenSoraPipeline) -> list[Job]:
    """Every row, checked; no weight is read.

    Raises:
        OpenSoraError: lists all rows that cannot be run.
    """
    model, jobs, wrong = _model(pipe, args), [], []
    flux = _files(dict(zip(("flux", "flux_vae"), flux_files(args), strict=True))) if args.t2i2v else {}
    for row in rows:
        try:
            given = row_arguments(args, row, Path(args.csv).expanduser().parent)
            settings = call_settings(given)
            pipe(given.prompt, seed=settings.seed, check_only=True, **settings.arguments)
            picture = row_picture(pipe, given, row, settings)
            asked = {"prompt": given.prompt, "seed": given.seed, **described(settings.arguments, PATHS), "model": model}
            if picture is not None:
                asked["picture"] = picture.asked | {"model": flux}
            jobs.append(Job(row, given.prompt, settings, given.fps, asked, picture=picture))
        except (OpenSoraError, OSError) as error:
            wrong.append(f"  {row.name}: {error}")
    if wrong:
        what = f"{len(wrong)} of {len(rows)} rows" if len(rows) > 1 else "The row"
        raise OpenSoraError("\n".join([f"{what} of {Path(args.csv).name} cannot be run; nothing was begun:", *wrong]))
    known = [replace(job, key=key) for job, key in zip(jobs, keys([job.asked for job in jobs]), strict=True)]
    return [
        job
        if job.picture is None
        else replace(job, picture=replace(job.picture, key=known_by(job.picture, model | {"flux": flux}, job.key)))
        for job in known
    ]


def _model(pipe: OpenSoraPipeline, args: argparse.Namespace) -> dict[str, Any]:
    """What makes the same settings another video: the files, by name and size, and how they compute."""
    files = _files({**vars(pipe.files), "lora": args.lora})
    how = {name: getattr(args, name) for name in ("precision", "decode_policy", "lora_strength")}
    return {"files": files, "dtype": str(pipe.dtype).removeprefix("torch."), **how}


def _files(paths: dict[str, Any]) -> dict[str, list[tuple[str, int]]]:
    """Names and sizes of the files that are given."""
    return {part: [(name, size) for name, size, _ in identity(path).parts] for part, path in paths.items() if path is not None}
