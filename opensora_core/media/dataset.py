"""Folders of clips with captions, as the guides of this field lay them out, and the pieces of them that a LoRA learns from.

A caption stands in a text file beside its clip (kite.mp4, kite.txt), or in a table of the folder: a CSV with the columns path and text (or
caption), and, if wanted, num_frames, as the guides of Open-Sora have it.
"""

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import OpenSoraError
from ..readers import read_text
from .video import is_video, read_clip

_CAPTION = ("text", "caption", "prompt")


@dataclass(frozen=True)
class CaptionedClip:
    """A clip and what it shows. num_frames: how many of its frames count, from the first; None for all."""

    path: Path
    caption: str
    num_frames: int | None = None


@dataclass(frozen=True)
class Piece:
    """What one sample is cut from: the frames of a clip from `first` on, at the rate that was asked for."""

    clip: CaptionedClip
    first: int
    length: int  # of the scene, in frames


def captioned_clips(folder: Path) -> list[CaptionedClip]:
    """The clips of a folder, by their table where it has one, else by name."""
    tables = sorted(folder.glob("*.csv"))
    if len(tables) > 1:
        raise OpenSoraError(f"{folder.name} holds {len(tables)} tables ({', '.join(table.name for table in tables)}); leave one.")
    clips = _of_table(tables[0]) if tables else _beside(folder)
    if not clips:
        raise OpenSoraError(f"{folder.name} holds no clip; put videos into it, each with its caption in a text file of the same name.")
    return clips


def pieces(clip: CaptionedClip, fps: float, cut_scenes: bool) -> list[Piece]:
    """The scenes of a clip, one if it is not to be cut; cutting needs PySceneDetect."""
    if not cut_scenes:
        return [Piece(clip, 0, clip.num_frames or _ENDLESS)]
    try:
        from scenedetect import ContentDetector, detect
    except ImportError as error:
        raise OpenSoraError("cut_scenes needs PySceneDetect: install it (pip install scenedetect), or switch cut_scenes off.") from error
    found = [(start.get_seconds(), end.get_seconds()) for start, end in detect(str(clip.path), ContentDetector())]
    spans = [(round(start * fps), round(end * fps)) for start, end in found] or [(0, _ENDLESS)]
    last = clip.num_frames or _ENDLESS
    return [Piece(clip, first, min(end, last) - first) for first, end in spans if first < last]


_ENDLESS = 2**31


def read_piece(piece: Piece, count: int, fps: float) -> torch.Tensor | None:
    """[count, H, W, 3] uint8: the first frames of a piece at `fps`; None where it has fewer."""
    if piece.length < count:
        return None
    frames = read_clip(piece.clip.path, count, from_end=False, fps=fps, skip=piece.first)
    return frames if len(frames) == count else None


def _beside(folder: Path) -> list[CaptionedClip]:
    clips = []
    for path in sorted(path for path in folder.iterdir() if path.is_file() and is_video(path)):
        text = path.with_suffix(".txt")
        if not text.is_file():
            raise OpenSoraError(f"{path.name} has no caption; write what it shows into {text.name}.")
        clips.append(CaptionedClip(path, _caption(read_text(text), text.name)))
    return clips


def _of_table(table: Path) -> list[CaptionedClip]:
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(table), newline=""), strict=True))
    except csv.Error as error:
        raise OpenSoraError(f"{table.name} is no table that can be read ({error}).") from error
    column = next((name for name in _CAPTION if rows and name in rows[0]), None)
    if column is None or "path" not in rows[0]:
        raise OpenSoraError(f"{table.name} is no table of clips: its first line names the columns path and text, and clips follow.")
    return [_of_row(table, line, row, column) for line, row in enumerate(rows, 2)]


def _of_row(table: Path, line: int, row: dict[str, str | None], column: str) -> CaptionedClip:
    where, name = f"{table.name}, line {line}", (row["path"] or "").strip()
    path = _inside(table.parent, name)
    if path is None:
        raise OpenSoraError(f"{where}: path={name[:60]!r} is no file of the folder; name a clip in {table.parent.name}.")
    count = (row.get("num_frames") or "").strip()
    if count and not (count.isascii() and count.isdigit() and 0 < len(count) < 10):
        raise OpenSoraError(f"{where}: num_frames={count[:20]!r} is no number of frames; write a number such as 33, or leave it empty.")
    return CaptionedClip(path, _caption(row[column] or "", where), int(count) if count else None)


def _inside(folder: Path, name: str) -> Path | None:
    """The file of a folder, or of one inside it, that a name means; None if there is none."""
    try:
        path = (folder / name).resolve()
        return path if name and folder.resolve() in path.parents and path.is_file() else None
    except (OSError, ValueError):  # a name that is too long, or holds NUL
        return None


def _caption(text: str, where: str) -> str:
    if not text.strip():
        raise OpenSoraError(f"{where} holds no caption; write what the clip shows.")
    return " ".join(text.split())
