"""Small files that others wrote, read within bounds: a regular file, no larger than its kind ever is, text that is text, JSON that is an object.

Weights have a reader of their own (checkpoint/files.py), and so have clips and pictures (media/).
"""

import json
import os
import stat
from pathlib import Path

from .errors import CheckpointError, OpenSoraError

MAX_TEXT_BYTES = 64 << 20  # tokenizer.json of a large vocabulary has 20 MB; nothing else comes near
_DEVICE = "a device"
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: _DEVICE, stat.S_IFBLK: _DEVICE}


def kind_of(path: Path) -> str | None:
    """What a path is if it is no regular file: "a folder", "a device", "a pipe"; None of a file and of what is not there.

    A device or a pipe may never end, so that it must not be opened to find out.
    """
    try:
        return _KINDS.get(stat.S_IFMT(path.stat().st_mode))
    except (OSError, ValueError):  # a NUL in it
        return None


def is_file(path: Path) -> bool:
    """Whether a regular file is there; no name that a file cannot have, too long or with a NUL, is one."""
    return os.path.isfile(path)


def read_text(path: Path, limit: int = MAX_TEXT_BYTES) -> str:
    """The text of a file in UTF-8. Raises an OpenSoraError for anything else, and an OSError where it is not there or cannot be read."""
    if kind := kind_of(path):
        raise OpenSoraError(f"{path.name} is {kind}; give a file.")
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OpenSoraError(f"{path.name} has more than {limit:,} bytes, which no such file has; give another.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise OpenSoraError(f"{path.name} is not UTF-8 text (line {line}); save the file in UTF-8.") from error
    if "\0" in text:
        raise OpenSoraError(f"{path.name} is not UTF-8 text (it holds NUL characters); save the file in UTF-8.")
    return text


def read_json(path: Path, limit: int = MAX_TEXT_BYTES) -> dict:
    """The object that a JSON file holds. Raises a CheckpointError for anything else in it, and for a file that cannot be read."""
    try:
        return json_object(read_text(path, limit), path.name)
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read ({error.strerror}); check its path.") from error
    except CheckpointError:
        raise
    except OpenSoraError as error:
        raise CheckpointError(str(error)) from error


def json_object(text: str | bytes, name: str) -> dict:
    """The object that a text of JSON is. Raises a CheckpointError, which calls it `name`, for anything else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits
        raise CheckpointError(f"{name} is not readable JSON; download the file again.") from error
    if not isinstance(found, dict):
        what = f"{name} holds {type(found).__name__} where an object of names and values is expected"
        raise CheckpointError(f"{what}; download the file again.")
    return found
