"""A contact sheet: every video in its place, whole but for its number, and the same length as they are."""

import pytest
import torch

from opensora_core.errors import OpenSoraError
from opensora_core.media.contact_sheet import GAP, contact_sheet

VIDEOS = torch.rand(5, 3, 32, 48, 3, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("columns", "grid"), [(0, (2, 3)), (1, (5, 1)), (2, (3, 2)), (9, (1, 5))])
def test_videos_stand_in_a_grid(columns, grid):
    sheet = contact_sheet(VIDEOS, columns)
    rows, columns = grid
    assert sheet.shape == (3, rows * (32 + GAP) - GAP, columns * (48 + GAP) - GAP, 3)
    assert sheet.shape[1] % 2 == sheet.shape[2] % 2 == 0  # what an mp4 needs
    for index in range(5):
        top, left = index // columns * (32 + GAP), index % columns * (48 + GAP)
        assert torch.equal(sheet[:, top : top + 32, left : left + 48], VIDEOS[index])
    used = rows * columns * 32 * 48
    assert (sheet.sum(-1) == 0).sum() >= 3 * (sheet[0].numel() // 3 - used)


def test_each_video_has_its_number():
    plain, sheet = contact_sheet(VIDEOS), contact_sheet(VIDEOS, 0, [str(k) for k in range(5)])
    changed = (plain != sheet).any(-1).any(0)
    for index in range(5):
        top, left = index // 3 * (32 + GAP), index % 3 * (48 + GAP)
        corner = changed[top : top + 32, left : left + 48]
        assert corner[:6, :6].any() and not corner[20:].any() and not corner[:, 24:].any()
    assert sheet.max() > 0.9 and sheet.min() >= 0 and sheet.max() <= 1
    one, other = contact_sheet(VIDEOS[:1] * 0, 0, ["1"]), contact_sheet(VIDEOS[:1] * 0, 0, ["7"])
    assert not torch.equal(one, other) and all(torch.equal(frame, one[0]) for frame in one)
    both = contact_sheet(VIDEOS[:2] * 0, 2, ["1", "7"])
    assert torch.equal(both[:, :, :48], one) and torch.equal(both[:, :, -48:], other)


def test_what_is_no_sheet_gets_a_sentence():
    for arguments, words in (((VIDEOS[0],), "videos, frames"), ((VIDEOS, -1), "columns=-1"), ((VIDEOS, 0, ["a"]), "1 labels for 5 videos")):
        with pytest.raises(OpenSoraError, match=words):
            contact_sheet(*arguments)
