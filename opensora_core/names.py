"""Names of files: which can be one, who has claimed one, and what a run that was killed left behind.

A name is claimed before the work that it is for. NAME.claim is created exclusively beside it, on a shared folder too; it says host,
process and time, is renewed every minute while its process lives, and is stale after ten. Whatever writes results uses it.
"""

import atexit
import json
import os
import platform
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path

from .errors import OpenSoraError

RENEWED_EVERY, STALE_AFTER = 60.0, 600.0  # seconds
_SHOWN = 120  # characters of a name in a sentence
_MOST_BYTES = 4096  # of a claim
# Suffixes of what one run writes beside each other: a video, its picture, its prompt, its latents. They are claimed as one.
TOGETHER = (".mp4", ".png", ".txt", ".latent")
_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(1, 10))}
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/?/")
_PARTIAL = re.compile(r"\..*\.([0-9a-f]{8})-(\d+)\.partial")


def shown(path: str | Path) -> str:
    """A path as a sentence has it: as it was given, or the name alone, cut, where that is long."""
    text = str(path).encode("utf-8", "replace").decode()
    if len(text) <= _SHOWN:
        return text
    name = Path(text).name
    return name if len(name) <= _SHOWN else f"{name[: _SHOWN // 2]}...{name[-_SHOWN // 4 :]} ({len(name)} characters)"


def check_name(path: str | Path, what: str) -> Path:
    """A path that can be written, on this system and where it may be copied to. what: for the sentence, such as "--out".

    Raises an OpenSoraError for an address, the name of a device, or characters that no file has in its name.
    """
    text = str(path)
    is_possible = False
    with suppress(UnicodeEncodeError):
        is_possible = "\0" not in text and os.fsencode(text)
    if not is_possible:
        raise OpenSoraError(f"{what} {text!r} cannot be the name of a file; use letters, digits, - and _.")
    if _ADDRESS.match(text):
        raise OpenSoraError(f"{what} {text[:_SHOWN]} is an address; give a file or a folder of this machine.")
    for part in Path(text).parts:
        if part.split(".")[0].strip().lower() in _DEVICES:
            raise OpenSoraError(f"{what} {part} is the name of a device on Windows, where the file could not be kept; choose another name.")
    return Path(text).expanduser()


def numbered(path: Path, number: int) -> Path:
    """clip.mp4 -> clip.mp4, clip_1.mp4, clip_2.mp4, ..."""
    return path if number == 0 else path.with_stem(f"{path.stem}_{number}")


def taken_by(path: Path) -> Path | None:
    """The video, picture, prompt or latents that have a file's name, if any: a run writes more than one of them."""
    suffixes = (path.suffix, *(TOGETHER if path.suffix.lower() in TOGETHER else ()))
    return next((file for suffix in suffixes if (file := path.with_suffix(suffix)).exists()), None)


@dataclass(frozen=True)
class Claim:
    """A name that nobody else writes to until it is released. A context manager.

    path: what was claimed. file: where it says so. text: what it says, in which no two claims agree.
    """

    path: Path
    file: Path
    text: bytes

    def release(self) -> None:
        """Give the name up; a claim that was taken over by somebody else stays."""
        _held.pop(self.file, None)
        self._if_ours(os.unlink)

    def renew(self) -> None:
        """Say that the name is still worked on, unless somebody else has taken it over."""
        self._if_ours(os.utime)

    def _if_ours(self, change: Callable[[Path], None]) -> None:
        with suppress(OSError):
            if self.file.read_bytes() == self.text:
                change(self.file)

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, *error) -> None:
        self.release()


def claim(path: Path) -> Claim | None:
    """Claim a name; None if somebody who is at work has it."""
    file = path.with_name(f"{path.stem if path.suffix.lower() in TOGETHER else path.name}.claim")
    about = {"host": platform.node(), "process": os.getpid(), "time": time.time(), "system": _SYSTEM, "token": uuid.uuid4().hex}
    made = Claim(path, file, json.dumps(about).encode())
    for _ in range(2):
        with suppress(FileExistsError):
            with file.open("xb", buffering=0) as opened:
                try:
                    opened.write(made.text)
                except OSError as error:  # a full disk: what is left empty would stand for a claim of nobody known
                    file.unlink()
                    raise OSError(error.errno, error.strerror, str(file)) from error
            _held[made.file] = made
            _begin_renewing()
            return made
        if not _cleared(file):
            return None
    return None


def claim_unused(path: Path, candidate: Callable[[int], Path] | None = None) -> Claim:
    """Claim `path`, or the first numbered one of it that neither a file nor anybody at work has.

    candidate: what to try instead, by its number from 0.
    """
    for number in count():
        wanted = numbered(path, number) if candidate is None else candidate(number)
        if taken_by(wanted):
            continue
        made = claim(wanted)
        # Between the look and the claim another may have finished and released it.
        if made is not None and not taken_by(wanted):
            return made
        if made is not None:
            made.release()


@contextmanager
def one_at_a_time(path: Path, patience: float = 60.0) -> Iterator[None]:
    """Let one process at a time read and replace a file. Raises an OSError if another has had it for `patience` seconds."""
    began, wait = time.monotonic(), 0.01
    while (made := claim(path)) is None:
        if time.monotonic() - began > patience:
            raise OSError(f"{shown(path)} is held by another process; if there is none, delete {path.name}.claim.")
        time.sleep(wait)
        wait = min(2 * wait, 0.5)
    with made:
        yield


def hidden(path: Path) -> Path:
    """A name beside `path` for what is not to stay, which `sweep` takes away if this process is killed; no loader lists its ending."""
    return path.with_name(f".{path.name}.{_SYSTEM}-{os.getpid()}.partial")


@contextmanager
def complete_or_absent(path: Path) -> Iterator[Path]:
    """A hidden name beside `path` that becomes `path` if the block succeeds and vanishes if it does not.

    An OSError that names no file, as of a disk that is full, names `path`.
    """
    partial = hidden(path.with_name(path.name[:80]))
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def sweep(folder: Path) -> list[Path]:
    """Delete unfinished files and claims in a folder whose process is gone; of other machines, files that nothing was written to for an hour.

    Returns what was deleted.
    """
    gone = []
    for file in [*folder.glob(".*.partial"), *folder.glob("*.claim")]:
        with suppress(OSError):
            if found := _PARTIAL.fullmatch(file.name):
                is_old = _time_there(folder) - file.stat().st_mtime > 6 * STALE_AFTER
                if is_old if found[1] != _SYSTEM else not _is_alive(int(found[2])):
                    file.unlink()
                    gone.append(file)
            elif file.suffix == ".claim" and _cleared(file):
                gone.append(file)
    return gone


def _system() -> str:
    """A word for what process numbers are counted in: a machine since it was started, and the container on it."""
    parts = [platform.node()]
    for place in (Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")):
        with suppress(OSError):
            parts.append(os.readlink(place) if place.is_symlink() else place.read_text().strip())
    return uuid.uuid5(uuid.NAMESPACE_OID, " ".join(parts)).hex[:8]


_SYSTEM = _system()
_held: dict[Path, Claim] = {}


@cache
def _begin_renewing() -> None:
    """From now on, say once a minute that what this process has claimed is still worked on."""

    def renew() -> None:
        while True:
            time.sleep(RENEWED_EVERY)
            for made in _held.copy().values():
                made.renew()

    threading.Thread(target=renew, name="open-sora-claims", daemon=True).start()


@atexit.register
def _release_all() -> None:
    own = f'"process": {os.getpid()},'.encode()  # a forked child has its parent's list
    for made in _held.copy().values():
        if own in made.text:
            made.release()


def _cleared(file: Path) -> bool:
    """Whether a claim is no more: it was released, or its process is gone and it is taken away here."""
    try:
        with file.open("rb") as opened:
            seen = opened.read(_MOST_BYTES)
        age = _time_there(file.parent) - file.stat().st_mtime
    except FileNotFoundError:
        return True
    is_gone = False
    if seen:  # else it is still being written, or its process was ended at that
        try:
            about = json.loads(seen)
            is_gone = about["system"] == _SYSTEM and not _is_alive(int(about["process"]))
        except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
            return False  # no claim but a file of somebody's own
    if not is_gone and age <= STALE_AFTER:
        return False
    grave = hidden(file.with_name(uuid.uuid4().hex))
    try:
        os.rename(file, grave)
    except FileNotFoundError:
        return True
    try:
        if grave.read_bytes() == seen:
            return True
        with suppress(OSError):
            os.link(grave, file)  # of somebody who took it over between the look and the rename
        return False
    finally:
        grave.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        if os.name == "posix":  # elsewhere asking would end it; its claim grows stale
            os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    return True


def _time_there(folder: Path) -> float:
    """Now by the clock that stamps a folder's files, which on a shared folder is another machine's."""
    probe = hidden(folder / uuid.uuid4().hex)
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)
