"""Numbers of the released 2.0 model at its real sizes, written out so that a person can check them against the paper or the code.

They come from hpcaitech/Open-Sora@7ad6a96a, run on a CPU in fp32; tests/golden holds the larger tables.
"""

import pytest
import torch

from opensora_core.codecs.codec import Encoded
from opensora_core.codecs.tiling import tiled_decode, tiled_encode
from opensora_core.geometry import CAUSAL, Tiling, resize_crop
from opensora_core.networks.mmdit.config import OPEN_SORA_2
from opensora_core.ops import pack, rotary_table, sinusoid
from opensora_core.sampling.guidance import PICTURES, Guidance, num_forwards, oscillate, temporal_ramp
from opensora_core.sampling.schedule import flow_shift, sigmas

# (tokens per latent frame, latent frames): alpha, sigmas at 0, 1, 2, 11, 25, 40, 48, 49 of 50 steps
SCHEDULES = {
    "256px 16:9, 129 frames": ((252, 33), 5.732595, (1, 0.996453, 0.992784, 0.953106, 0.851469, 0.589010, 0.192805, 0.104738)),
    "768px, 129 frames": ((2304, 33), 11.872096, (1, 0.998284, 0.996503, 0.976794, 0.922313, 0.747985, 0.330956, 0.195033)),
    "768px picture": ((2304, 1), 2.066667, (1, 0.990222, 0.980237, 0.879913, 0.673913, 0.340659, 0.079284, 0.040470)),
    "high-compression 768px, 128 frames": ((576, 32), 6.599663, (1, 0.996917, 0.993726, 0.959014, 0.868415, 0.622629, 0.215678, 0.118700)),
}


@pytest.mark.parametrize("shape, alpha, expected", SCHEDULES.values(), ids=SCHEDULES)
def test_schedule(shape, alpha, expected):
    assert flow_shift(*shape) == pytest.approx(alpha, abs=1e-6)
    found = sigmas(50, flow_shift(*shape))
    assert found[[0, 1, 2, 11, 25, 40, 48, 49]].tolist() == pytest.approx(expected, abs=1e-6)
    assert len(found) == 51
    assert found[-1] == 0


def test_timesteps_as_the_bf16_network_gets_them():
    fed = sigmas(50, flow_shift(252, 33))[:12].bfloat16().float().tolist()
    expected = [1, 0.996094, 0.992188, 0.988281, 0.984375, 0.980469, 0.976562, 0.972656, 0.96875, 0.964844, 0.957031, 0.953125]
    assert fed == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "t, expected",
    [
        (1.0, (0.562379, 0.789627, -0.839072, 0.994232, 0.826880, 0.613588, -0.544021, 0.107254)),
        (0.5, (-0.883849, 0.945946, 0.283662, 0.998557, -0.467772, 0.324325, -0.958924, 0.053705)),
        (0.25, (0.240988, 0.986394, -0.801144, 0.999639, -0.970528, 0.164399, 0.598472, 0.026862)),
        (4.0, (-0.729947, -0.877962, -0.666938, 0.909031, -0.683504, 0.478731, 0.745113, 0.416728)),  # Flux's guidance
    ],
)
def test_timestep_embedding(t, expected):
    """Cosines first; a frequency near 1 turns a thousand radians, so fp32 holds four to five digits there."""
    found = sinusoid(1000.0 * torch.tensor([t]))[0, [0, 1, 64, 127, 128, 129, 192, 255]]
    assert found.tolist() == pytest.approx(expected, abs=3e-4)


def test_rotary_angles():
    pairs = {0: 3, 1: 0.948683, 7: 9.48683e-4, 8: 5, 9: 3.59843, 35: 6.94748e-4, 36: 7, 37: 5.0378, 63: 9.72647e-4}
    cos, sin = rotary_table(torch.tensor([[3.0, 5.0, 7.0]]), OPEN_SORA_2.axes_dim)[:, 0, 0]
    angles = torch.tensor([pairs[j] for j in pairs], dtype=torch.float64)
    assert torch.allclose(cos[list(pairs)].double(), angles.cos(), atol=1e-5)
    assert torch.allclose(sin[list(pairs)].double(), angles.sin(), atol=1e-5)
    assert OPEN_SORA_2.axes_dim == (16, 56, 56)


def test_oscillation():
    assert [i for i in range(50) if oscillate(7.5, i) == 1.0] == list(range(11, 50, 2))
    assert [i for i in range(30) if oscillate(7.5, i) == 1.0] == list(range(11, 30, 2))
    assert {oscillate(7.5, i) for i in range(50)} == {7.5, 1.0}


def test_temporal_ramp():
    first = temporal_ramp(3.0, 0, 50, 33).flatten()
    assert first[[0, 1, 8, 16, 24, 32]].tolist() == pytest.approx([1, 1.0625, 1.5, 2, 2.5, 3])
    ceilings = [temporal_ramp(3.0, i, 50, 33).flatten()[-1].item() for i in (0, 1, 9, 10, 12, 48)]
    assert ceilings == pytest.approx([3.00, 2.96, 2.64, 2.60, 2.52, 1.08])


def test_forward_counts():
    """Of the 150 rows the reference runs in 50 steps, these are needed."""
    assert num_forwards(Guidance(), 50, 33, None) == 80
    assert num_forwards(Guidance(), 50, 33, PICTURES) == 110
    assert num_forwards(Guidance(text_oscillation=False), 50, 33, PICTURES) == 130
    assert num_forwards(Guidance(text_oscillation=False), 50, 33, None) == 100


def test_resize_crop():
    assert resize_crop((1080, 1920), (192, 336)) == (192, 341, 0, 2)
    assert resize_crop((720, 1280), (576, 1024)) == (576, 1024, 0, 0)
    assert resize_crop((512, 512), (192, 336)) == (336, 336, 72, 0)
    assert resize_crop((1000, 667), (768, 768)) == (1151, 768, 192, 0)


def test_packing_order():
    """Channel slowest, then patch row, then patch column."""
    c, h, w = torch.meshgrid(torch.arange(17), torch.arange(2), torch.arange(2), indexing="ij")
    block = (4 * c + 2 * h + w)[None, :, None].float()
    assert pack(block, (1, 2, 2)).flatten().tolist() == list(range(68))


def test_sizes_of_the_released_model():
    assert [CAUSAL.latent_frames(n) for n in (1, 5, 17, 33, 129)] == [1, 2, 5, 9, 33]
    assert CAUSAL.latent_size(192, 336) == (24, 42)
    assert CAUSAL.latent_size(576, 1024) == (72, 128)


def _decode_recording(starts):
    """A decoder of the VAE's shapes that notes where each tile began: latents carry their own coordinates."""

    def decode(latents):
        starts.append(tuple(latents[0, :, 0, 0, 0].int().tolist()))
        frames = 4 * latents.shape[2] - 3
        return latents.new_zeros(1, 3, frames, 8 * latents.shape[3], 8 * latents.shape[4])

    return decode


def _coordinates(*shape):
    return torch.stack(torch.meshgrid(*(torch.arange(n).float() for n in shape), indexing="ij"))[None]


@pytest.mark.parametrize(
    "height, width, rows, columns",
    [
        (24, 42, [0], [0, 24]),  # 256px 16:9
        (32, 32, [0], [0]),
        (72, 128, [0, 24, 48], [0, 24, 48, 72, 96, 120]),  # 768px 16:9: the last column is a sliver of 8
    ],
)
def test_tile_starts(height, width, rows, columns):
    starts = []
    found = tiled_decode(_decode_recording(starts), _coordinates(1, height, width), Tiling())
    assert sorted(starts) == sorted((0, y, x) for y in rows for x in columns)
    assert found.shape == (1, 3, 1, 8 * height, 8 * width)


@pytest.mark.parametrize("latents, frames, starts", [(16, 61, [0]), (17, 65, [0, 12]), (25, 97, [0, 12]), (33, 129, [0, 12, 24])])
def test_temporal_tiles(latents, frames, starts):
    """The reference also decodes a last tile of one latent (25 latents: at 24) and drops its only frame; here it is not decoded."""
    found = []
    decoded = tiled_decode(_decode_recording(found), _coordinates(latents, 2, 2), Tiling(temporal_tile=64))
    assert [start for start, _, _ in found] == starts
    assert decoded.shape[2] == frames


def test_encoding_tiles_of_a_256px_reference():
    """192x336 is wider than a tile: 256 pixels every 192, so a still has two, the second 144 wide."""
    widths = []

    def encode(pixels):
        widths.append(pixels.shape[-1])
        return Encoded(pixels.new_zeros(1, 32, 1, pixels.shape[-2] // 8, pixels.shape[-1] // 8))

    assert tiled_encode(encode, torch.zeros(1, 3, 1, 192, 336), Tiling()).values.shape == (1, 32, 1, 24, 42)
    assert widths == [256, 144]
