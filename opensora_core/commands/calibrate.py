"""`calibrate`: find the best plans of a model for a size, a length and what is given, and write them where a speed looks for them."""

import sys
from dataclasses import replace

from ..errors import OpenSoraError
from ..names import check_name
from .frames import call_arguments
from .model import pipeline
from .options import DONE, CalibrateOptions
from .output import check_count, check_writable
from .progress import Bars
from .table import Row, cells_as_options, read_rows

_COLUMNS = ("prompt", "negative", "image", "end_image", "seed", "motion_score")


def run(options: CalibrateOptions) -> int:
    """Calibrate with the prompts that are given; the table of what was measured goes to standard output."""
    folder = check_name(options.out, "--out")
    check_count("--num-samples", options.num_samples)
    pipe = pipeline(options)
    asked = [options] if options.csv is None else [_of_row(options, row) for row in read_rows(options.csv)]
    asked = [replace(one, seed=index) if one.seed is None else one for index, one in enumerate(asked)]
    calls = [(one.prompt, one.seed + sample, call_arguments(one, pipe.files)) for one in asked for sample in range(options.num_samples)]
    requests = pipe.checked(calls)
    check_writable(folder)
    with Bars(f"{len(calls)} runs to measure on {pipe.device}; a calibration that is stopped goes on with the same command") as bars:
        found = pipe.calibrate(requests, folder, bars.progress)
    sys.stdout.write(found.report() + "\n")
    return DONE


def _of_row(options: CalibrateOptions, row: Row) -> CalibrateOptions:
    if row.num_extra:
        raise OpenSoraError(f"{row.name} has {row.num_extra} more cells than columns; put text that holds a comma in double quotes.")
    others = [column for column in row.cells if column not in _COLUMNS]
    if others or "prompt" not in row.cells:
        what = f"a {others[0]} of its own" if others else "no prompt"
        raise OpenSoraError(f"{row.name} has {what}; give columns of {', '.join(_COLUMNS)} alone, as all runs are of one size and length.")
    return replace(options, **cells_as_options(row, options))
