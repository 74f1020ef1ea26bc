"""Several videos as one: side by side, each with its number, to choose between them."""

import math

import torch
from torch import Tensor

from ..errors import OpenSoraError

GAP = 4  # pixels between videos; even, as the sides of an mp4 must be
_LABEL_SHARE = 8  # of the height of a video is its number high


def contact_sheet(videos: Tensor, columns: int = 0, labels: list[str] | None = None) -> Tensor:
    """Lay videos out in a grid, row by row: [T, rows * H + gaps, columns * W + gaps, 3]; places without a video are black.

    videos: [B, T, H, W, 3] in 0..1. columns: of the grid; 0 = as near to a square of videos as it can be.
    labels: one for each video, drawn into its upper left corner; None = none.
    """
    if videos.ndim != 5 or videos.shape[-1] != 3 or 0 in videos.shape:
        raise OpenSoraError(f"Videos for a contact sheet are [videos, frames, height, width, 3]; these are {list(videos.shape)}.")
    if columns < 0:
        raise OpenSoraError(f"columns={columns} cannot be; use 1 or more, or 0 to have it chosen.")
    if labels is not None and len(labels) != videos.shape[0]:
        raise OpenSoraError(f"{len(labels)} labels for {videos.shape[0]} videos.")
    number, frames, height, width, _ = videos.shape
    columns = min(columns or math.ceil(math.sqrt(number)), number)
    rows = -(-number // columns)
    sheet = videos.new_zeros(frames, rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3)
    for index, video in enumerate(videos):
        top, left = (index // columns) * (height + GAP), (index % columns) * (width + GAP)
        cell = sheet[:, top : top + height, left : left + width]
        cell.copy_(video)
        if labels is not None:
            _draw(cell, labels[index])
    return sheet


def _draw(cell: Tensor, label: str) -> None:
    """White on a dark box, the same in every frame of [T, H, W, 3], in place."""
    import numpy
    from PIL import Image, ImageDraw, ImageFont

    height, width = cell.shape[1:3]
    size = max(8, height // _LABEL_SHARE)
    font = ImageFont.load_default(size)
    left, top, right, bottom = (round(side) for side in ImageDraw.Draw(Image.new("L", (1, 1))).textbbox((0, 0), label, font=font))
    margin = max(2, size // 4)
    picture = Image.new("L", (right - left + 2 * margin, bottom - top + 2 * margin))
    ImageDraw.Draw(picture).text((margin - left, margin - top), label, fill=255, font=font)
    text = torch.from_numpy(numpy.array(picture)).to(cell) / 255
    text = text[:height, :width, None]
    corner = cell[:, : text.shape[0], : text.shape[1]]
    corner.copy_(text + (1 - text) * corner / 4)
