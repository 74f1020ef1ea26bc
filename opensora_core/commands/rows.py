"""The table of `generate --csv`: one video for each row, and the sentence that names the row where it cannot be read."""

import argparse
import csv
import difflib
import io
from dataclasses import dataclass
from pathlib import Path

from ..cli import CSV_COLUMNS
from ..errors import OpenSoraError
from .options import clip_length, model_grid
from .pictures import check_given

_NUMBERS = ("seed", "width", "height", "motion_score", "image_seed")
_PICTURES = ("image", "end_image")
_NAMED, _SIDES = ("resolution", "aspect_ratio"), ("width", "height")


@dataclass(frozen=True)
class Row:
    """One video of the table.

    Attributes:
        number: from 1, the first row below the header; rows without any text are not counted.
        line: of the file, from 1, on which it begins.
        cells: column -> text, of those that hold any.
        num_extra: cells to the right of the last column.
    """

    number: int
    line: int
    cells: dict[str, str]
    num_extra: int = 0

    @property
    def name(self) -> str:
        """For messages."""
        return f"row {self.number} (line {self.line})"


def read_rows(path: str | Path) -> list[Row]:
    """Read a CSV: commas, double quotes around text that holds commas, quotes or lines, UTF-8; a header of names in CSV_COLUMNS.

    Raises:
        OpenSoraError: no such file, not a CSV, a header without `prompt` or with a name that is no column, or no row.
    """
    text = _text(Path(path).expanduser())
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    lines = _lines(reader, Path(path).name)
    header, rows = None, []
    for line, cells in lines:
        if not any(cell.strip() for cell in cells):
            continue
        if header is None:
            header = _header(cells, Path(path).name)
            continue
        values = {name: cell.strip() for name, cell in zip(header, cells, strict=False) if cell.strip()}
        if "" in values:
            raise OpenSoraError(f"{Path(path).name}, line {line}: {values['']!r} stands in a column without a name; {_expected()}")
        num_extra = sum(bool(cell.strip()) for cell in cells[len(header) :])
        rows.append(Row(len(rows) + 1, line, values, num_extra))
    if header is None or not rows:
        raise OpenSoraError(f"{Path(path).name} holds no row{'' if header else ' and no header'}; {_expected()}")
    return rows


def row_arguments(args: argparse.Namespace, row: Row, folder: Path) -> argparse.Namespace:
    """The command line with what a row says in place of what it said.

    Args:
        folder: where relative pictures are: beside the table.

    Raises:
        OpenSoraError: what is wrong with a cell, without the row's name.
    """
    if row.num_extra:
        raise OpenSoraError(
            f"{row.num_extra} more cells than the header has columns: text that holds a comma stands in double quotes, "
            'a quote inside it is written twice ("").'
        )
    if "prompt" not in row.cells:
        raise OpenSoraError("the prompt is empty.")
    said = {CSV_COLUMNS[column]: _value(column, text, folder) for column, text in row.cells.items()}
    # A size of the row replaces the command line's, in whichever of the two ways it was given there.
    for one, other in ((_NAMED, _SIDES), (_SIDES, _NAMED)):
        if any(name in said for name in one):
            said = dict.fromkeys(other, None) | said
    if "num_frames" in said:
        said["num_frames"] = str(clip_length(said["num_frames"], args.fps, model_grid(args)))
    given = argparse.Namespace(**{**vars(args), **said})
    if not given.t2i2v:
        check_given(given)
    return given


def _value(column: str, text: str, folder: Path) -> str | int:
    if column in _PICTURES:
        return str(folder / Path(text).expanduser())
    if column not in _NUMBERS:
        return text
    try:
        return int(text)
    except ValueError as error:
        raise OpenSoraError(f"{column} {text!r} is not a whole number.") from error


def _text(path: Path) -> str:
    if path.is_dir():
        raise OpenSoraError(f"--csv {path} is a folder; give a CSV file.")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise OpenSoraError(f"{path.name} is not UTF-8 text (line {line}); save it as CSV in UTF-8.") from error
    except OSError as error:
        raise OpenSoraError(f"--csv {path} cannot be read ({error.strerror}).") from error
    if "\0" in text:
        raise OpenSoraError(f"{path.name} is not UTF-8 text (it holds NUL characters); save it as CSV in UTF-8.")
    return text


def _lines(reader, name: str):
    """(line on which a row begins, its cells); a quote that breaks the table is named with the row that it broke in."""
    while True:
        line = reader.line_num + 1
        try:
            yield line, next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            what = "is longer than a cell can be" if "limit" in str(error) else "has a quote that does not fit"
            raise OpenSoraError(
                f"{name}: the row that begins on line {line} {what}. Text that holds a comma, a quote or a new line stands in double "
                'quotes, a quote inside it is written twice (""), and the closing quote ends the cell.'
            ) from error


def _header(cells: list[str], name: str) -> list[str]:
    columns = ["_".join(cell.lower().replace("-", " ").replace("_", " ").split()) for cell in cells]
    for given, column in zip(cells, columns, strict=True):
        if column and column not in CSV_COLUMNS:
            if len(columns) == 1 and (";" in column or "\t" in given):
                raise OpenSoraError(f"{name}: cells are separated by commas, and the header {given!r} has none; save it with commas.")
            near = difflib.get_close_matches(column, CSV_COLUMNS, n=1, cutoff=0.4)
            raise OpenSoraError(
                f"{name} has a column {given.strip()!r}; " + (f"did you mean {near[0]!r}? {_expected()}" if near else _expected())
            )
        if column and columns.count(column) > 1:
            raise OpenSoraError(f"{name} has two columns {column!r}; leave one.")
    if "prompt" not in columns:
        raise OpenSoraError(f"{name} has no column 'prompt'; {_expected()}")
    return columns


def _expected() -> str:
    return f"the first row names the columns, 'prompt' and any of {', '.join(name for name in CSV_COLUMNS if name != 'prompt')}."
