"""The decode with activations in main memory: the same frames, little on the device, chosen where it is needed and said."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opensora_core.codecs import ladder
from opensora_core.codecs.dc_ae import VIDEO_DC_AE
from opensora_core.codecs.hunyuan import layers
from opensora_core.codecs.hunyuan.config import HUNYUAN_VAE
from opensora_core.codecs.hunyuan.model import CausalVAE
from opensora_core.geometry import Tiling
from opensora_core.memory import component as components
from opensora_core.memory.decode import GIB, Ladder, decode_bytes, tile_decode_bytes, walk
from tests.core.test_vae import TINY, AllocationPeak

HOME = torch.device("cpu")
SHAPE = (1, 16, 33, 24, 42)  # 256px, 16:9, 129 frames
# What may touch a parked clip: views of it, copies out of it and into it.
MOVES = ("slice", "split", "select", "view", "alias", "detach", "_unsafe_view", "new_empty", "clone", "copy_", "_to_copy", "empty_like")


class TwoMemories(TorchDispatchMode):
    """Main memory and a device, told apart on one: what `ladder.park` makes is in main memory, what `layers.bring` gives is not.

    Nothing but a move may read a parked clip, and none may be brought whole.
    """

    def __init__(self, monkeypatch):
        super().__init__()
        self.parked, self.kept, self.brought, self.is_begun = set(), [], 0, False
        monkeypatch.setattr(ladder, "park", self.park)
        monkeypatch.setattr(layers, "bring", self.bring)

    def begin(self, clip):
        """Everything from this clip on is parked, itself included."""
        self.is_begun = True
        self.keep(clip)

    def keep(self, clip):
        self.kept.append(clip)  # so that no other tensor gets its address
        self.parked.add(clip.untyped_storage()._cdata)
        return clip

    def park(self, like, shape, home):
        out = like.new_empty(shape, device=home)
        return self.keep(out) if self.is_begun else out

    def bring(self, part, device):
        if not self.is_begun:
            return part
        assert device is not None and part.nbytes < part.untyped_storage().nbytes(), "a clip is brought whole"
        self.brought += 1
        return part.clone()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        touched = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata in self.parked]
        name = func.overloadpacket.__name__
        assert not touched or name in MOVES, f"{name} works on a parked clip"
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    model = CausalVAE(TINY).requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.1) if parameter.ndim > 1 else parameter.uniform_(0.5, 1.5)
    return model


def small_chunks(monkeypatch, elements):
    monkeypatch.setattr(layers, "CHUNK_ELEMENTS_CPU", elements)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "chunk"), [((1, 3, 5), 2**9), ((4, 5, 3), 2**10), ((6, 7, 4), 2**13), ((3, 4, 4), 2**22)])
def test_a_parked_decode_is_the_decode_bit_for_bit(vae, monkeypatch, dtype, size, chunk):
    small_chunks(monkeypatch, chunk)
    model = vae.to(dtype)
    latents = torch.randn(2, TINY.latent_channels, *size, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = model.decode(latents)
    assert torch.equal(model.decode(latents, home=HOME), expected)
    model.to(torch.float32)


@pytest.mark.parametrize("size", [(4, 5, 3), (6, 7, 4)])
def test_a_parked_decode_is_the_whole_clip_decode(vae, monkeypatch, size):
    latents = torch.randn(1, TINY.latent_channels, *size, generator=torch.Generator().manual_seed(1))
    whole = vae.decode(latents)
    small_chunks(monkeypatch, 2**10)
    parked = vae.decode(latents, home=HOME)
    assert (parked - whole).abs().max() <= 1e-5 * whole.abs().max()


def test_the_device_works_on_parts_only(vae, monkeypatch):
    small_chunks(monkeypatch, 2**9)
    latents = torch.randn(1, TINY.latent_channels, 6, 4, 4, generator=torch.Generator().manual_seed(1))
    expected = vae.decode(latents)
    with TwoMemories(monkeypatch) as memories:
        hook = vae.decoder.get_submodule("mid_block.resnets.1").register_forward_hook(lambda module, args, out: memories.begin(out))
        frames = vae.decode(latents, home=HOME)
        hook.remove()
    assert torch.equal(frames, expected) and memories.brought > 100 and len(memories.parked) > 10


@pytest.mark.parametrize("home", [None, HOME])
def test_a_decode_in_chunks_finds_its_weights_when_they_come_from_main_memory(vae, monkeypatch, home):
    pytest.importorskip("accelerate")
    small_chunks(monkeypatch, 2**9)
    latents = torch.randn(1, TINY.latent_channels, 6, 4, 4, generator=torch.Generator().manual_seed(1))
    model = copy.deepcopy(vae)
    components._by_layers(model, torch.device("cpu"))
    assert torch.equal(model.decode(latents, home), vae.decode(latents))


class DevicePeak(AllocationPeak):
    """Bytes alive at the same time that are not parked; for the meta device, where nothing can be moved in earnest."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.parked, self.is_parking = [], False
        monkeypatch.setattr(ladder, "park", self.park)
        monkeypatch.setattr(layers, "bring", lambda part, device: part.clone())

    def park(self, like, shape, home):
        self.is_parking = True
        self.parked.append(like.new_empty(shape))
        self.is_parking = False
        return self.parked[-1]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.is_parking:
            return super().__torch_dispatch__(func, types, args, kwargs)
        out = func(*args, **(kwargs or {}))
        self.storages.add(id(out.untyped_storage()))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(9, 32, 32), (17, 32, 32), (33, 32, 32)])
def test_estimate_is_what_is_allocated_on_the_device(monkeypatch, dtype, size):
    model = CausalVAE(HUNYUAN_VAE, device="meta", dtype=dtype).requires_grad_(False)
    latents = torch.empty(1, HUNYUAN_VAE.latent_channels, *size, device="meta", dtype=dtype)
    with DevicePeak(monkeypatch) as device:
        model.decode(latents, home=torch.device("meta"))
    estimate = decode_bytes(HUNYUAN_VAE, size, dtype.itemsize, parked=True)
    assert estimate == pytest.approx(device.peak, rel=0.15)
    assert device.peak < decode_bytes(HUNYUAN_VAE, size, dtype.itemsize) / 2


def choose(policy, free_gib, ram_gib, config=HUNYUAN_VAE, shape=SHAPE):
    ladder = Ladder(config, shape, 2, lambda: int(free_gib * GIB), lambda: int(ram_gib * GIB))
    return next(ladder.attempts(policy, Tiling()))


@pytest.mark.parametrize("policy", ["auto", "exact"])
def test_policy_parks_what_does_not_fit(policy):
    need = tile_decode_bytes(HUNYUAN_VAE, SHAPE, Tiling(), 2) / GIB
    ram = need
    assert choose(policy, 2 * need, 100) == (Tiling(), None)
    tiling, note = choose(policy, 0.5 * need, 1.01 * ram)
    assert tiling == replace(Tiling(), parked=True)
    assert "decoded exactly, with activations in main memory: slower" in note and f"{0.5 * need:.2f} GiB are free" in note
    assert tile_decode_bytes(HUNYUAN_VAE, SHAPE, tiling, 2) < 0.2 * need * GIB
    for free, memory in ((0.5 * need, 0.5 * ram), (0.5 * need, 0), (0.01, 100)):
        tiling, _ = choose(policy, free, memory)
        assert not tiling.parked and (tiling.temporal_tile == 64) == (policy == "auto")


def test_policy_parks_nothing_else():
    assert not choose("low_memory", 0.01, 100)[0].parked
    assert not choose("auto", 1, 100, VIDEO_DC_AE)[0].parked


def test_the_largest_clips_fit_the_promise():
    """768px, 129 frames, exactly, far within 12 GB of the device and 16 GB of main memory."""
    shape = (1, 16, 33, 72, 128)
    tiling, _ = choose("auto", 3, 14, shape=shape)
    assert tiling.parked and tiling.temporal_tile == 0


@pytest.mark.parametrize(
    ("config", "policy", "ways"),
    [
        (HUNYUAN_VAE, "auto", [(256, 0, False), (256, 0, True), (256, 64, False), (112, 64, False)]),
        (HUNYUAN_VAE, "exact", [(256, 0, False), (256, 0, True)]),
        (HUNYUAN_VAE, "low_memory", [(256, 64, False), (112, 64, False)]),
        (VIDEO_DC_AE, "auto", [(256, 32, False), (256, 16, False), (160, 16, False)]),
        (VIDEO_DC_AE, "exact", [(256, 32, False)]),
    ],
    ids=str,
)
def test_what_is_tried_in_turn_where_memory_runs_out(config, policy, ways):
    """Exactly, parked, in temporal tiles, in tiles of half the need: each with a line where it is not what was asked for."""
    shape = (1, config.latents.channels, 33, 24, 42)
    attempts = list(Ladder(config, shape, 2, lambda: 2**50, lambda: 2**50).attempts(policy, Tiling()))
    assert [(tiling.tile_size, tiling.temporal_tile, tiling.parked) for tiling, _ in attempts] == ways
    assert attempts[0].line is None or policy == "low_memory"
    assert all("ran out of memory" in line.lower() for _, line in attempts[1:])


def test_nothing_is_counted_that_decides_nothing(monkeypatch):
    def counted(*given):
        raise AssertionError("memory was counted")

    monkeypatch.setattr("opensora_core.memory.decode.counted_peak", counted)
    assert list(Ladder(VIDEO_DC_AE, (1, 128, 32, 18, 32), 2, counted, counted).attempts("exact", Tiling())) == [
        (Tiling(256, 0.25, 32), None)
    ]
    assert next(Ladder(HUNYUAN_VAE, SHAPE, 2, lambda: None).attempts("auto", Tiling())) == (Tiling(), None)


def test_what_helped_once_stays_for_the_next_part():
    told, tried = [], []
    result_of = walk(Ladder(HUNYUAN_VAE, SHAPE, 2, lambda: 2**50).attempts("auto", Tiling()), told.append)

    def run(tiling):
        tried.append(tiling.temporal_tile)
        if not tiling.temporal_tile:
            raise torch.cuda.OutOfMemoryError
        return tiling.temporal_tile

    assert (result_of(run), result_of(run), tried, len(told)) == (64, 64, [0, 64, 64], 1)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        result_of(lambda tiling: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError()))
