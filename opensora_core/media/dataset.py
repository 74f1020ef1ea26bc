"""Folders of clips with captions, as the guides of this field lay them out, and the pieces of them that a LoRA learns from.

A caption stands in a text file beside its clip (kite.mp4, kite.txt), or in a table of the folder: a CSV with the columns path and text (or
caption), and, if wanted, num_frames, as the guides of Open-Sora have it.
"""

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..errors import OpenSoraError
from ..readers import is_file, read_text
from .video import is_video, read_clip

_CAPTION = ("text", "caption", "prompt")
_ENDLESS = 2**31


@dataclass(frozen=True)
class Piece:
    """A clip and what it shows, or one scene of it: `length` frames from `first` on, at the rate that is asked for."""

    path: Path
    caption: str
    first: int = 0
    length: int = _ENDLESS

    def scenes(self, fps: float) -> list["Piece"]:
        """The scenes of a clip as PySceneDetect, which may have to be installed, finds them."""
        try:
            from scenedetect import ContentDetector, VideoOpenFailure, detect

            found = detect(str(self.path), ContentDetector())
        except ImportError as error:
            raise OpenSoraError("Install PySceneDetect (pip install scenedetect), or switch cut_scenes off: it is not here.") from error
        except VideoOpenFailure as error:
            raise OpenSoraError(f"{self.path.name} cannot be read by PySceneDetect; take it away, or switch cut_scenes off.") from error
        spans = [[round(time.get_seconds() * fps) for time in scene] for scene in found] or [(0, _ENDLESS)]
        return [replace(self, first=first, length=min(end, self.length) - first) for first, end in spans if first < self.length]

    def read(self, count: int, fps: float) -> torch.Tensor | None:
        """[count, H, W, 3] uint8: the first frames at `fps`; None where there are fewer."""
        frames = read_clip(self.path, count, from_end=False, fps=fps, skip=self.first) if self.length >= count else ()
        return frames if len(frames) == count else None


def captioned_clips(folder: Path) -> list[Piece]:
    """The clips of a folder, each whole: by its table where it has one, else by name."""
    tables = sorted(folder.glob("*.csv"))
    if len(tables) > 1:
        raise OpenSoraError(f"{folder.name} holds {len(tables)} tables ({', '.join(table.name for table in tables)}); leave one.")
    clips = list(_of_table(tables[0]) if tables else _beside(folder))
    if not clips:
        raise OpenSoraError(f"{folder.name} holds no clip; put videos into it, each with its caption in a text file of the same name.")
    return clips


def _beside(folder: Path) -> Iterator[Piece]:
    for path in sorted(path for path in folder.iterdir() if path.is_file() and is_video(path)):
        text = path.with_suffix(".txt")
        if not text.is_file():
            raise OpenSoraError(f"{path.name} has no caption; write what it shows into {text.name}.")
        yield Piece(path, _caption(read_text(text), text.name))


def _of_table(table: Path) -> Iterator[Piece]:
    reader = csv.DictReader(io.StringIO(read_text(table), newline=""), restval="", strict=True)
    try:
        rows = [(f"{table.name}, line {reader.line_num}", row) for row in reader]
    except csv.Error as error:
        raise OpenSoraError(f"{table.name} is no table that can be read ({error}); save it as CSV again.") from error
    columns = rows[0][1] if rows else ()
    named = next((name for name in _CAPTION if name in columns), None)
    if named is None or "path" not in columns:
        raise OpenSoraError(f"{table.name} is no table of clips; name the columns path and text in its first line, and clips below.")
    for where, row in rows:
        name, count = row["path"].strip(), row.get("num_frames", "").strip()
        path = table.parent / name
        if not is_file(path) or table.parent.resolve() not in path.resolve().parents:
            raise OpenSoraError(f"{where}: path={name[:60]!r} is no file of the folder; name a clip in {table.parent.name}.")
        if count and not (count.isascii() and count.isdigit() and len(count) < 10 and int(count)):
            raise OpenSoraError(f"{where}: num_frames={count[:20]!r} is no number of frames; write one such as 33, or leave it empty.")
        if any(cell.strip() for cell in row.get(None, ())):  # else a caption ends at its comma
            raise OpenSoraError(f"{where} has more cells than columns; put a caption that holds a comma in double quotes.")
        yield Piece(path.resolve(), _caption(row[named], where), length=int(count or _ENDLESS))


def _caption(text: str, where: str) -> str:
    if not text.strip():
        raise OpenSoraError(f"{where} holds no caption; write what the clip shows.")
    return " ".join(text.split())
