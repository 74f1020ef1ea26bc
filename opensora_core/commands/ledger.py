"""What a batch has finished in a folder, so that the same command goes on where it stopped."""

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from ..errors import OpenSoraError
from ..names import Claim, claim, complete_or_absent, one_at_a_time
from ..readers import read_json
from .frames import PATHS

NAME = "batch.json"
_FORMAT = 1
MOST_BYTES = 256 * 2**20  # of a record
_ABOUT = (
    "Videos that generate --csv has finished in this folder, and pictures that it drew for them. A row that is found here is skipped; delete its video "
    "to have it made anew."
)


@dataclass(frozen=True)
class Entry:
    """A finished video, or a picture that one begins with.

    file: its name in the folder. bytes: its size, by which a file that was replaced or cut off is seen. row: of the table, for people.
    seed: that it was made with. settings: all that was asked for, as `described` gives it.
    """

    file: str
    bytes: int
    row: int
    seed: int
    settings: dict[str, Any]

    def __post_init__(self):
        """Raise a ValueError for what no record holds: no numbers, or a way to a file elsewhere in place of its name."""
        is_possible = all(type(number) is int for number in (self.bytes, self.row, self.seed)) and isinstance(self.settings, dict)
        if not (is_possible and isinstance(self.file, str) and Path(self.file).name == self.file):
            raise ValueError("not what was written")


class Ledger:
    """The record of one folder: a JSON file that is whole at every moment.

    is_written: False where videos are made anew each time: nothing is read or written.
    """

    def __init__(self, folder: Path, is_written: bool = True):
        self._folder, self._path, self._is_written = folder, folder / NAME, is_written
        self._entries = self._read() if is_written else {}

    def finished(self, key: str) -> Path | None:
        """The video that was made for `key`, if it is still there as it was written."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        path = self._folder / entry.file
        return path if path.is_file() and path.stat().st_size == entry.bytes else None

    def read_again(self) -> None:
        """Take over what other processes have recorded since."""
        self._entries = self._read()

    def claim(self, key: str) -> Claim | None:
        """The right to make what `key` stands for; None while another process that is alive has it."""
        return claim(self._folder / f"{key}.row")

    def seed(self, key: str) -> int:
        """The seed that is recorded with `key`, which is finished."""
        return self._entries[key].seed

    def add(self, key: str, path: Path, row: int, seed: int, settings: dict[str, Any]) -> None:
        """Record a finished video of the folder. What another run recorded meanwhile is kept."""
        entry = Entry(path.name, path.stat().st_size, row, seed, settings)
        if not self._is_written:
            self._entries[key] = entry
            return
        with one_at_a_time(self._path):
            self._entries = self._read() | {key: entry}
            record = {"about": _ABOUT, "format": _FORMAT, "videos": {key: asdict(entry) for key, entry in self._entries.items()}}
            with complete_or_absent(self._path) as partial:
                partial.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def _read(self) -> dict[str, Entry]:
        if not self._path.exists():
            return {}
        try:
            record = read_json(self._path, MOST_BYTES)
            version = record["format"]
            entries = {key: Entry(**entry) for key, entry in record["videos"].items()} if version == _FORMAT else {}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise OpenSoraError(f"{self._path} is not the record of a batch, or damaged; move it away, or give another --out.") from error
        if version != _FORMAT:
            raise OpenSoraError(f"{self._path} was written by another version of this program; give --out another folder.")
        return entries


def described(arguments: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments in JSON's terms, so that equal ones make equal videos: files that are read by name and content, not by place."""
    found = dict(arguments)
    for name, value in arguments.items():
        if name in PATHS and value is not None:
            found[name] = {"file": Path(value).name, "sha256": hashlib.sha256(Path(value).read_bytes()).hexdigest()}
        elif is_dataclass(value):  # what differs from its default, so that an option that comes with a later version changes no key
            found[name] = {one.name: getattr(value, one.name) for one in fields(value) if getattr(value, one.name) != one.default}
    return found


def key_of(settings: dict[str, Any], before: Counter[str]) -> str:
    """What a video is known by: its settings, and how many before it are the same. before: counts them, this one too."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
    before[digest] += 1
    return f"{digest}-{before[digest]}"
