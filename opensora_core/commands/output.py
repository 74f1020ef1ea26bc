"""What commands write and say: a line for a person, a folder that can be written in, a report."""

import errno
import json
import sys
from pathlib import Path

from tqdm import tqdm

from ..errors import OpenSoraError
from ..names import check_name, claim_unused, complete_or_absent, hidden, shown, sweep

MOST_VIDEOS = 10_000  # of one command line


def say(line: str) -> None:
    """A line for the person at the terminal, above any bars; results alone go to standard output."""
    tqdm.write(line, file=sys.stderr)


def check_count(flag: str, count: int, least: int = 1, most: int = MOST_VIDEOS) -> None:
    """Raise an OpenSoraError for fewer or more of something than a command can make of it."""
    if count < least:
        raise OpenSoraError(f"{flag} {count} makes nothing; use at least {least}.")
    if count > most:
        raise OpenSoraError(f"{flag} {count} is more than can be asked for at once; use at most {most}.")


def check_writable(folder: Path, name: str = "") -> None:
    """Make a folder to write in, and take away what killed runs left there unfinished.

    name: of the file that will be written, if it is known: its numbered and unfinished forms must be possible too.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = hidden(folder / f"{Path(name).stem}_9999")
        probe.touch()
        probe.unlink()
        sweep(folder)
    except OSError as error:
        other = "a shorter name" if error.errno == errno.ENAMETOOLONG else "another folder"
        raise OpenSoraError(f"Nothing can be written to {shown(folder / name)} ({error.strerror}); choose {other}.") from error


def report_path(flag: str, given: str) -> Path:
    """Where a JSON report goes. Raises an OpenSoraError for a folder."""
    path = check_name(given, flag)
    if path.is_dir():
        raise OpenSoraError(f"{flag} {path} is a folder; give the report's file name.")
    return path


def write_report(path: Path, report: dict) -> None:
    """Write JSON, whole or not at all, under `path` or the first numbered name of it that is free, and say that to standard output."""
    with claim_unused(path) as claimed, complete_or_absent(claimed.path) as partial:
        partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"{claimed.path}\n")
