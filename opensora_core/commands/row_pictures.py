"""`generate --csv --t2i2v`: the picture that a row's video begins with, drawn by Flux and kept beside the video for the next try."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import OpenSoraError
from ..media.video import IMAGE_SUFFIX, save_video, unused_path
from ..pipeline import OpenSoraPipeline
from ..run.picture import PictureRequest
from ..run.request import EncodedPrompt
from ..text.prompt import file_name_part
from .ledger import Ledger, keys
from .options import CallSettings
from .pictures import check_drawn, picture_request
from .progress import BatchBars
from .rows import Row

_OF_THE_PICTURE = ("image_seed", "image_prompt")  # columns


@dataclass(frozen=True)
class RowPicture:
    """A picture to draw for one or more rows.

    Attributes:
        row: the first that asks for it. prompt: read as it is.
        asked: all that it depends on, in JSON's terms; a seed that was not given is None. key: what it is known by.
    """

    row: Row
    prompt: str
    request: PictureRequest
    seed: int
    asked: dict[str, Any]
    key: str = ""

    @property
    def file_name(self) -> str:
        """0003_a-red-kite_picture.png, beside the video of the row."""
        return f"{self.row.number:04d}_{file_name_part(self.prompt)}_picture{IMAGE_SUFFIX}"


def row_picture(pipe: OpenSoraPipeline, args: argparse.Namespace, row: Row, settings: CallSettings) -> RowPicture | None:
    """What Flux is to draw for a row, checked; None where the row has a picture of its own, or none is wanted.

    Args:
        args: the command line with what the row says in place of what it said.

    Raises:
        OpenSoraError: a video that cannot begin with a picture, or cells that contradict each other.
    """
    if not args.t2i2v:
        return None
    if args.ref is not None:
        given = [column for column in _OF_THE_PICTURE if column in row.cells]
        if given:
            raise OpenSoraError(f"{given[0]} is of a picture that Flux draws, and the row has an image of its own; leave one of them out.")
        return None
    request = picture_request(args, settings)
    check_drawn(pipe, args.prompt, settings)
    seed = settings.seed if args.image_seed is None else args.image_seed
    prompt = args.image_prompt or args.prompt
    asked = {"prompt": prompt, "seed": args.seed if args.image_seed is None else args.image_seed, **vars(request)}
    return RowPicture(row, prompt, request, seed, asked)


def known_by(picture: RowPicture, files: dict[str, Any], video_key: str) -> str:
    """A picture's key: with a seed of its own it is the same for every row that asks for it, without one it is the row's alone.

    Args:
        files: the models, in JSON's terms. video_key: of the row's video.
    """
    return keys([{"picture": picture.asked, "model": files, "row": video_key if picture.asked["seed"] is None else None}])[0]


class RowPictures:
    """The pictures of a batch, in its folder."""

    def __init__(self, pipe: OpenSoraPipeline, folder: Path, ledger: Ledger):
        self._pipe, self._folder, self._ledger = pipe, folder, ledger

    def path(self, picture: RowPicture) -> Path | None:
        """Its file, once it is drawn."""
        return self._ledger.finished(picture.key)

    def missing(self, pictures: Sequence[RowPicture | None]) -> list[RowPicture]:
        """Those that are not drawn yet, each once."""
        return list({one.key: one for one in reversed(pictures) if one is not None and self.path(one) is None}.values())[::-1]

    def draw(self, pictures: Sequence[RowPicture], texts: Sequence[EncodedPrompt], bars: BatchBars) -> None:
        """Draw them, Flux read once for all, and write each to the folder.

        Raises:
            OpenSoraError, OSError: as the pipeline and the disk do.
        """
        title = f"picture{'s' if len(pictures) > 1 else ''} of {', '.join(one.row.name for one in pictures)}, by Flux"
        asked = [(text, one.request, one.seed) for text, one in zip(texts, pictures, strict=True)]
        with bars.stages(title) as stages:
            drawn = self._pipe.paint(asked, stages.progress)
        for one, picture in zip(pictures, drawn, strict=True):
            path = save_video(picture, unused_path(self._folder / one.file_name))
            self._ledger.add(one.key, path, one.row.number, one.seed, one.asked)
