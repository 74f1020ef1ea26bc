"""`generate --csv`: a video for each row of a table, that goes on after a row that failed and where it was stopped."""

import csv
import difflib
import io
import os
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import OpenSoraError
from ..geometry import Grid
from ..media.video import IMAGE_SUFFIX, VIDEO_SUFFIX, check_can_be_written
from ..memory.loaded import stamp
from ..names import check_name, claim_unused, shown
from ..pipeline import OpenSoraPipeline
from ..readers import read_text
from ..run.files import ModelFiles
from ..run.request import random_seed
from ..text.prompt import file_name_part
from .frames import call_arguments, clip_length
from .guides import understood
from .jobs import Job, Jobs
from .ledger import Ledger, described, key_of
from .model import pipeline, with_usual
from .options import CSV_COLUMNS, DONE, SOME_FAILED, CalibrateOptions, GenerateOptions
from .output import check_writable, say
from .pictures import check_given, flux_files, picture_job
from .progress import Screen
from .refine import refined_jobs

_SHOWN = 60  # characters of a cell in a sentence
_NUMBERS = ("seed", "width", "height", "motion_score", "image_seed")
_FILES = ("image", "end_image")
_OF_A_PICTURE = ("image_seed", "image_prompt")
_NAMED, _SIDES = ("resolution", "aspect_ratio"), ("width", "height")
_EXPECTED = f"name the columns in the first row, 'prompt' and any of {', '.join(name for name in CSV_COLUMNS if name != 'prompt')}."
_QUOTED = 'put text that holds a comma, a quote or a new line in double quotes, with a quote inside it written twice ("").'


@dataclass(frozen=True)
class Row:
    """One video of the table.

    number: from 1, the first row below the header; rows without any text are not counted. line: of the file, on which the row begins.
    cells: column -> text, of those that hold any. num_extra: cells to the right of the last column.
    """

    number: int
    line: int
    cells: dict[str, str]
    num_extra: int = 0

    @property
    def name(self) -> str:
        return f"row {self.number} (line {self.line})"


def run(options: GenerateOptions) -> int:
    """Check every row, then make those that are not finished; paths of new videos go to standard output."""
    check_given(options)
    if options.num_samples != 1:
        raise OpenSoraError(f"--num-samples {options.num_samples} does not go with --csv; give the table a row for each video.")
    folder = check_name(options.out, "--out")
    if not folder.is_dir() and (folder.exists() or folder.suffix.lower() in (VIDEO_SUFFIX, IMAGE_SUFFIX)):
        raise OpenSoraError(f"--out {options.out} is one file; give a folder, as --csv makes several.")
    worker = _worker(options)
    rows = read_rows(options.csv)
    pipe = pipeline(options)
    options = with_usual(options, pipe.files.usual)
    pipe.check_files()
    if options.num_frames is not None:  # seconds are counted in frames, and said, once and not for each row
        options = replace(options, num_frames=str(clip_length(options.num_frames, options.fps, pipe.files.grid)))
    if options.t2i2v:
        pipe.load_flux(*flux_files(options))
    jobs = _jobs(rows, options, pipe, folder)
    check_writable(folder)
    largest = max((job.arguments for job in jobs), key=lambda size: size["num_frames"] * size["height"] * size["width"])
    shape = largest["num_frames"], largest["height"], largest["width"]
    check_can_be_written(folder / f"0000_{'x' * 40}{VIDEO_SUFFIX}", shape, options.fps)
    ledger = Ledger(folder)
    waiting = [job for job in jobs if ledger.finished(job.key) is None]
    if len(waiting) < len(jobs):
        say(f"{len(jobs) - len(waiting)} of {len(jobs)} rows are finished already in {folder}")
    if options.refine_prompt and waiting:
        waiting = refined_jobs(waiting, options, pipe)
    try:
        with Screen(len(jobs), len(jobs) - len(waiting)) as screen:
            making = Jobs(pipe, ledger, screen, is_one_request=False, is_shared=worker is not None)
            if worker is not None:  # its own rows, then those of the workers after it: all are tried, whoever is lost
                index, count = worker
                waiting = sorted(waiting, key=lambda job: ((job.number - 1 - index) % count, job.number))
            making.run(waiting)
    except KeyboardInterrupt:
        done = sum(ledger.finished(job.key) is not None for job in jobs)
        say(f"{done} of {len(jobs)} rows are finished; the same command goes on with the others")
        raise
    if not making.failed:
        return DONE
    say(f"{len(making.failed)} of {len(jobs)} rows failed; the same command tries them again:")
    for name, sentence in making.failed.items():
        say(f"  {name}: {sentence}")
    return SOME_FAILED


def _worker(options: GenerateOptions) -> tuple[int, int] | None:
    """(which worker this is, from 0; of how many), as --shard says or torchrun does; None where there is one alone."""
    ranks = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")]
    said = options.shard
    if said is None and all(rank.isdecimal() for rank in ranks) and int(ranks[1]) > 1:
        said = f"{int(ranks[0]) + 1}/{ranks[1]}"
    if said is None:
        return None
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", said)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise OpenSoraError(f"--shard {said} is no worker; use I/N, such as 1/8 for the first of eight.")
    if options.t2i2v:
        raise OpenSoraError("--shard does not go with --t2i2v: its pictures are drawn together; draw them first, and give them as images.")
    return int(match[1]) - 1, int(match[2])


def _jobs(rows: list[Row], options: GenerateOptions, pipe: OpenSoraPipeline, folder: Path) -> list[Job]:
    """A job for every row, checked; no weight is read. The error lists all rows that cannot be run."""
    # What makes the same settings another video: the files, by name and size, and how they compute.
    how = {name: getattr(options, name) for name in ("precision", "decode_policy", "lora_strength")}
    model = {"files": _files({**vars(pipe.files), "lora": options.lora}), "dtype": str(pipe.dtype).removeprefix("torch."), **how}
    if options.refine_prompt:
        model["refined"] = Path(options.refine_model).name
    flux = _files(dict(zip(("flux", "flux_vae"), flux_files(options), strict=True))) if options.t2i2v else {}
    jobs, wrong, before = [], [], Counter()
    for row in rows:
        try:
            said = understood(row_options(options, row, pipe.files.grid), pipe.files.family)
            if said.extend is not None:
                raise OpenSoraError("--loop makes one prompt's video longer; give it with --prompt.")
            job = _job(row, said, pipe.files, folder)
            job.check(pipe)
            asked = {"prompt": said.prompt, "seed": said.seed, **described(job.arguments), "model": model}
            if (picture := job.picture) is not None:
                asked["picture"] = picture.asked | {"model": flux}
            key = key_of(asked, before)
            if picture is not None:
                # With a seed of its own it is the same for every row that asks for it, without one it is the row's alone.
                drawn = {"picture": picture.asked, "model": model | {"flux": flux}, "row": key if picture.asked["seed"] is None else None}
                picture = replace(picture, key=key_of(drawn, Counter()))
            jobs.append(replace(job, asked=asked, key=key, picture=picture))
        except (OpenSoraError, OSError) as error:
            wrong.append(f"  {row.name}: {error}")
    if wrong:
        what = f"{len(wrong)} of {len(rows)} rows" if len(rows) > 1 else "the row"
        raise OpenSoraError("\n".join([f"Mend {what} of {Path(options.csv).name} that cannot be run; nothing was begun:", *wrong]))
    return jobs


def _job(row: Row, options: GenerateOptions, files: ModelFiles, folder: Path) -> Job:
    """A row's video, which has no key yet. options: what the row says in place of what the command line said."""
    arguments = call_arguments(options, files)
    seed, picture = random_seed() if options.seed is None else options.seed, None
    file = folder / f"{row.number:04d}_{file_name_part(options.prompt)}{VIDEO_SUFFIX}"  # 0003_a-red-kite.mp4
    if options.t2i2v and options.ref is None:
        picture = picture_job(options, arguments, seed)
        beside = folder / f"{row.number:04d}_{file_name_part(picture.prompt)}_picture{IMAGE_SUFFIX}"
        picture = replace(picture, name=row.name, number=row.number, file=beside)
    elif options.t2i2v and (given := [column for column in _OF_A_PICTURE if column in row.cells]):
        raise OpenSoraError(f"{given[0]} is of a picture that Flux draws, and the row has an image of its own; leave one of them out.")
    title = f"{row.name}: {arguments['num_frames']} frames of {arguments['width']}x{arguments['height']}"
    about = {"options": options, "seed": seed, "arguments": arguments, "number": row.number, "picture": picture}
    return Job(name=row.name, title=title, place=lambda: claim_unused(file), asked={"seed": options.seed}, **about)


def _files(paths: dict[str, Any]) -> dict[str, list[tuple[str, int]]]:
    """Names and sizes of the files that are given."""
    return {part: [(name, size) for name, size, _ in stamp(path).parts] for part, path in paths.items() if path is not None}


def row_options(options: GenerateOptions, row: Row, grid: Grid) -> GenerateOptions:
    """The command line with what a row says in place of what it said. grid: how the model counts frames."""
    if row.num_extra:
        raise OpenSoraError(f"there are {row.num_extra} more cells than columns; {_QUOTED}")
    if "prompt" not in row.cells:
        raise OpenSoraError("the prompt is empty; write one.")
    said = cells_as_options(row, options)
    # A size of the row replaces the command line's, in whichever of the two ways it was given there.
    for one, other in ((_NAMED, _SIDES), (_SIDES, _NAMED)):
        if any(name in said for name in one):
            said = dict.fromkeys(other) | said
    if "num_frames" in said:
        said["num_frames"] = str(clip_length(said["num_frames"], options.fps, grid, is_told=False))
    given = replace(options, **said)
    if not given.t2i2v:
        check_given(given)
    return given


def cells_as_options(row: Row, options: GenerateOptions | CalibrateOptions) -> dict[str, str | int]:
    """What the cells of a row say, by the options that their columns stand for; relative pictures are beside the table."""
    said: dict[str, str | int] = {}
    for column, text in row.cells.items():
        said[CSV_COLUMNS[column]] = text
        if column in _FILES:
            said[CSV_COLUMNS[column]] = str(Path(options.csv).expanduser().parent / Path(text).expanduser())
        elif column in _NUMBERS:
            try:
                said[CSV_COLUMNS[column]] = int(text.encode("ascii"))  # digits of other scripts are numbers to Python
            except ValueError as error:
                raise OpenSoraError(f"{column} {text[:_SHOWN]!r} is not a whole number; write one.") from error
    return said


def read_rows(path: str | Path) -> list[Row]:
    """Read a CSV: commas, double quotes around text that holds commas, quotes or lines, UTF-8; a header of names in CSV_COLUMNS."""
    text, name, header, rows = _text(path, "--csv"), Path(path).name, None, []
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        line = reader.line_num + 1  # on which the row begins
        try:
            cells = next(reader, None)
        except csv.Error as error:
            what = "is longer than a cell can be" if "limit" in str(error) else "has a quote that does not fit"
            raise OpenSoraError(f"{name}: the row that begins on line {line} {what}; {_QUOTED}") from error
        if cells is None:
            break
        if not any(cell.strip() for cell in cells):
            continue
        if header is None:
            header = _header(cells, name)
            continue
        values = {column: cell.strip() for column, cell in zip(header, cells, strict=False) if cell.strip()}
        if "" in values:
            raise OpenSoraError(f"{name}, line {line}: {values[''][:_SHOWN]!r} stands in a column without a name; {_EXPECTED}")
        num_extra = sum(bool(cell.strip()) for cell in cells[len(header) :])
        rows.append(Row(len(rows) + 1, line, values, num_extra))
    if header is None or not rows:
        raise OpenSoraError(f"{name} holds no row{'' if header else ' and no header'}; {_EXPECTED}")
    return rows


def read_lines(path: str | Path) -> list[str]:
    """The prompts of a text file, one on each line."""
    lines = [line.strip() for line in _text(path, "--prompt-path").splitlines() if line.strip()]
    if not lines:
        raise OpenSoraError(f"{Path(path).name} holds no prompt; write one on each line.")
    return lines


def _text(path: str | Path, option: str) -> str:
    try:
        return read_text(Path(path).expanduser())
    except OpenSoraError:
        raise
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise OpenSoraError(f"{option} {shown(path)} cannot be read ({why}); give another file.") from error


def _header(cells: list[str], name: str) -> list[str]:
    columns = ["_".join(cell.lower().replace("-", " ").replace("_", " ").split()) for cell in cells]
    for given, column in zip(cells, columns, strict=True):
        if column and column not in CSV_COLUMNS:
            if len(columns) == 1 and (";" in column or "\t" in given):
                raise OpenSoraError(f"{name}: cells are separated by commas; the header {given[:_SHOWN]!r} has none: save it with commas.")
            near = [one for one, name in CSV_COLUMNS.items() if name == column] or difflib.get_close_matches(
                column, CSV_COLUMNS, n=1, cutoff=0.4
            )
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise OpenSoraError(f"{name} has a column {given.strip()[:_SHOWN]!r}{hint}; {_EXPECTED}")
        if column and columns.count(column) > 1:
            raise OpenSoraError(f"{name} has two columns {column!r}; leave one.")
    if "prompt" not in columns:
        raise OpenSoraError(f"{name} has no column 'prompt'; {_EXPECTED}")
    return columns
