"""The contact sheet in the host: a decoded batch laid out, each video with the number that Get Latent From Batch takes."""

import pytest
import torch

VIDEOS = torch.rand(3, 2, 32, 48, 3, generator=torch.Generator().manual_seed(0))  # as a decode gives them: one video after the other
LATENT = {"samples": torch.zeros(3, 16, 1, 4, 6)}


def place(index: int, columns: int) -> tuple[slice, slice, slice]:
    top, left = index // columns * 36, index % columns * 52
    return slice(None), slice(top, top + 32), slice(left, left + 48)


@pytest.mark.parametrize(("columns", "expected"), [(0, 2), (3, 3), (1, 1)])
def test_every_video_is_whole_in_its_place(run_node, columns, expected):
    (sheet,) = run_node("OpenSoraContactSheet", images=VIDEOS.flatten(0, 1), latent=LATENT, columns=columns, numbers=False)
    for index, video in enumerate(VIDEOS):
        assert torch.equal(sheet[place(index, expected)], video)


def test_the_number_is_the_batch_index(run_node, pack):
    """Counted from 0."""
    (sheet,) = run_node("OpenSoraContactSheet", images=VIDEOS.flatten(0, 1), latent=LATENT, columns=3, numbers=True)
    alone = pack("opensora_core.media.contact_sheet").contact_sheet
    for index in range(3):
        assert torch.equal(sheet[place(index, 3)], alone(VIDEOS[index : index + 1], 0, [str(index)]))


def test_the_chosen_number_is_the_video_that_was_seen(run_node):
    latent = {"samples": torch.arange(3.0).reshape(3, 1, 1, 1, 1).expand(3, 16, 1, 4, 6)}
    (chosen,) = run_node("LatentFromBatch", samples=latent, batch_index=2, length=1)
    assert chosen["samples"].unique().tolist() == [2]


def test_frames_of_another_batch_get_a_sentence(run_node, pack):
    with pytest.raises(pack("opensora_core.errors").OpenSoraError, match="Connect the decode.*not the frames of 3 videos of one length"):
        run_node("OpenSoraContactSheet", images=VIDEOS.flatten(0, 1)[:5], latent=LATENT)
