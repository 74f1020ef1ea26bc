"""The causal 3D VAE: counts, causality, tiles, memory, errors. Values against the reference: test_parity_vae.py."""

import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opensora_core.codecs.codec import Encoded
from opensora_core.codecs.hunyuan import layers
from opensora_core.codecs.hunyuan.config import HUNYUAN_VAE, VAEConfig
from opensora_core.codecs.hunyuan.model import CausalVAE
from opensora_core.codecs.tiling import check_tiling, num_tiles, tiled_decode, tiled_encode
from opensora_core.errors import OpenSoraError
from opensora_core.geometry import Tiling
from opensora_core.memory.decode import GIB, Ladder, decode_bytes, encode_bytes, tile_decode_bytes
from opensora_core.ops import TorchOperations

TINY = VAEConfig(latent_channels=4, widths=(8, 16, 16, 16), layers=1)
SMALL_TILES = Tiling(tile_size=64, overlap=0.25, temporal_tile=16)


@pytest.fixture(scope="module")
def vae():
    model = CausalVAE(TINY)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        spread = 0.1 if parameter.ndim == 1 else (2 / parameter[0].numel()) ** 0.5
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data = centre + spread * torch.randn(parameter.shape, generator=generator)
    return model.requires_grad_(False)


def noise(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(found, expected, tolerance=1e-5):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


# ---- structure -------------------------------------------------------------------------------------------------


def test_released_shape_on_meta():
    state = CausalVAE(HUNYUAN_VAE, device="meta", dtype=torch.bfloat16).state_dict()
    assert len(state) == 248
    assert sum(tensor.numel() for tensor in state.values()) == 246_478_803
    assert sum(tensor.numel() for name, tensor in state.items() if name.startswith("encoder.")) == 100_341_408
    assert sum(tensor.numel() for name, tensor in state.items() if name.startswith("decoder.")) == 146_136_067
    expected = {
        "encoder.conv_in.conv.weight": (128, 3, 3, 3, 3),
        "encoder.down_blocks.1.resnets.0.conv_shortcut.conv.weight": (256, 128, 1, 1, 1),
        "encoder.down_blocks.2.downsamplers.0.conv.conv.weight": (512, 512, 3, 3, 3),
        "encoder.mid_block.attentions.0.to_out.0.weight": (512, 512),
        "encoder.conv_out.conv.weight": (32, 512, 3, 3, 3),
        "quant_conv.weight": (32, 32, 1, 1, 1),
        "post_quant_conv.bias": (16,),
        "decoder.mid_block.attentions.0.group_norm.weight": (512,),
        "decoder.up_blocks.2.resnets.2.conv2.conv.weight": (256, 256, 3, 3, 3),
        "decoder.up_blocks.2.upsamplers.0.conv.conv.weight": (256, 256, 3, 3, 3),
        "decoder.up_blocks.3.resnets.0.conv_shortcut.conv.bias": (128,),
        "decoder.conv_norm_out.bias": (128,),
        "decoder.conv_out.conv.weight": (3, 128, 3, 3, 3),
    }
    assert {name: tuple(state[name].shape) for name in expected} == expected
    assert not [name for name in state if ".downsamplers." in name and ".down_blocks.3." in name]


def test_type_of_the_weights():
    model = CausalVAE(TINY, device="meta", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.device.type == "meta"


def test_every_layer_comes_from_operations():
    made = []

    class Counted(TorchOperations):
        class Linear(TorchOperations.Linear):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                made.append(self)

        class GroupNorm(TorchOperations.GroupNorm):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                made.append(self)

        class Conv3d(TorchOperations.Conv3d):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                made.append(self)

    model = CausalVAE(TINY, operations=Counted, device="meta")
    owned = {id(parameter) for module in made for parameter in module.parameters()}
    assert owned == {id(parameter) for parameter in model.parameters()}


@pytest.mark.parametrize(("frames", "latent_frames"), [(1, 1), (5, 2), (17, 5)])
def test_frames_and_latents(vae, frames, latent_frames):
    moments = vae.encode(noise(1, 3, frames, 16, 24)).values
    assert moments.shape == (1, 8, latent_frames, 2, 3)
    assert vae.decode(moments[:, :4]).shape == (1, 3, frames, 16, 24)


# ---- causality and independence --------------------------------------------------------------------------------


class _NoNorm(TorchOperations):
    class GroupNorm(TorchOperations.GroupNorm):
        def forward(self, x):
            return x * self.weight.view(1, -1, 1, 1, 1) + self.bias.view(1, -1, 1, 1, 1)


def test_only_norms_look_ahead(vae):
    """Without GroupNorm, whose statistics span the clip, the past of a clip does not depend on its future."""
    model = CausalVAE(TINY, operations=_NoNorm)
    model.load_state_dict({name: 0.5 * tensor for name, tensor in vae.state_dict().items()})
    latents = noise(1, 4, 4, 3, 4)
    other = latents.clone()
    other[:, :, 3] += 1.0
    with torch.no_grad():
        whole, changed = model.decode(latents), model.decode(other)
        close(changed[:, :, :9], whole[:, :, :9])
        assert not torch.allclose(changed[:, :, 9:], whole[:, :, 9:])
        frames = noise(1, 3, 9, 16, 24)
        close(model.encode(frames[:, :, :5]).values, model.encode(frames).values[:, :, :2])


def test_a_clip_is_not_its_first_frame(vae):
    frames = noise(1, 3, 5, 16, 16)
    alone = vae.encode(frames[:, :, :1]).values
    assert (vae.encode(frames).values[:, :, :1] - alone).abs().max() > 0.01 * alone.abs().max()


def test_batch_items_do_not_meet(vae):
    latents, frames = noise(2, 4, 2, 3, 4), noise(2, 3, 5, 16, 24)
    close(vae.decode(latents)[1:], vae.decode(latents[1:]))
    close(vae.encode(frames).values[1:], vae.encode(frames[1:]).values)


def test_attention_equals_the_dense_mask():
    q, k, v = (noise(2, 3, 5, 8, seed=seed) for seed in range(3))
    frame = torch.arange(3).repeat_interleave(5)
    dense = F.scaled_dot_product_attention(*(x.flatten(1, 2) for x in (q, k, v)), attn_mask=frame[:, None] >= frame)
    close(layers.frame_causal_attention(q, k, v), dense.unflatten(1, (3, 5)), 1e-6)


# ---- the two shortcuts of the layers give the plain result -------------------------------------------------------


@pytest.mark.parametrize("factors", [(1, 2, 2), (2, 2, 2)])
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_merged_upsampling_equals_enlarging(factors, frames):
    layer = layers.Upsample(layers.CausalConv3d(TorchOperations.Conv3d(4, 4, 3)), factors[0] == 2)
    for seed, parameter in enumerate(layer.parameters()):
        parameter.data = noise(*parameter.shape, seed=seed)
    x = noise(2, 4, frames, 3, 5)
    first = F.interpolate(x[:, :, :1], scale_factor=(1.0, 2.0, 2.0))
    rest = F.interpolate(x[:, :, 1:], scale_factor=tuple(map(float, factors))) if frames > 1 else first[:, :, :0]
    close(layer(x), layer.conv(torch.cat([first, rest], 2)))


def test_merged_upsampling_is_the_operations_convolution():
    """The host replaces how a Conv3d computes, against faulty libraries."""
    kernels = []

    class Watched(TorchOperations):
        class Conv3d(TorchOperations.Conv3d):
            def _conv_forward(self, x, weight, bias):
                kernels.append(tuple(weight.shape[2:]))
                return super()._conv_forward(x, weight, bias)

    layers.Upsample(layers.CausalConv3d(Watched.Conv3d(4, 4, 3, device="meta")), True)(torch.empty(1, 4, 2, 3, 3, device="meta"))
    assert kernels == [(2, 2, 2)] * 8


def test_merged_upsampling_in_half_precision():
    layer = layers.Upsample(layers.CausalConv3d(TorchOperations.Conv3d(8, 8, 3)), True)
    for seed, parameter in enumerate(layer.parameters()):
        parameter.data = noise(*parameter.shape, seed=seed) * 0.1
    x = noise(1, 8, 3, 4, 4)
    exact = layer(x.bfloat16().float())
    close(layer.to(torch.bfloat16)(x.bfloat16()).float(), exact, 0.02)


def test_chunks_do_not_show(vae, monkeypatch):
    latents, frames = noise(2, 4, 5, 3, 4), noise(1, 3, 13, 16, 24)
    pixels, moments = vae.decode(latents), vae.encode(frames).values
    monkeypatch.setattr(layers, "CHUNK_ELEMENTS_CPU", 1)
    assert layers.chunk_frames(frames) == 2
    close(vae.decode(latents), pixels)
    close(vae.encode(frames).values, moments)


def test_chunks_can_be_trained_through(vae, monkeypatch):
    latents, gradients = noise(1, 4, 4, 2, 3), []
    for limit in (layers.CHUNK_ELEMENTS_CPU, 1):
        monkeypatch.setattr(layers, "CHUNK_ELEMENTS_CPU", limit)
        z = latents.clone().requires_grad_()
        vae.decode(z).square().sum().backward()
        gradients.append(z.grad)
    close(gradients[1], gradients[0])


def test_inputs_are_not_written_to(vae):
    latents, frames = noise(1, 4, 5, 10, 10), noise(1, 3, 17, 80, 64)
    before = latents.clone(), frames.clone()
    tiled_decode(vae.decode, latents, SMALL_TILES)
    tiled_encode(vae.encode, frames, SMALL_TILES)
    assert torch.equal(latents, before[0]) and torch.equal(frames, before[1])


# ---- tiles -----------------------------------------------------------------------------------------------------


def enlarge(latents):
    """A stand-in for a decoder without statistics: every value repeated, so that tiles agree wherever they overlap."""
    rest = latents[:, :, 1:].repeat_interleave(4, 2)
    return torch.cat([latents[:, :, :1], rest], 2).repeat_interleave(8, 3).repeat_interleave(8, 4)


def shrink(pixels):
    return pixels[:, :, ::4, ::8, ::8].repeat(1, 2, 1, 1, 1)


class Recorder:
    def __init__(self, function):
        self.function, self.shapes = function, []

    def __call__(self, x):
        self.shapes.append(tuple(x.shape[2:]))
        return self.function(x)


@pytest.mark.parametrize(("size", "calls"), [((24, 42), 2), ((32, 32), 1), ((72, 128), 18)])
def test_calls_of_the_released_sizes(size, calls):
    decode, done = Recorder(enlarge), []
    latents = noise(1, 1, 2, *size)
    close(tiled_decode(decode, latents, Tiling(), lambda *counts: done.append(counts)), enlarge(latents), 1e-6)
    assert len(decode.shapes) == calls == num_tiles(latents.shape, Tiling(), latents=True)
    assert done == [(index + 1, calls) for index in range(calls)]
    pixels = (1, 3, 5, 8 * size[0], 8 * size[1])
    assert num_tiles(pixels, Tiling(), latents=False) == calls


def test_tile_starts_of_the_released_sizes():
    decode = Recorder(enlarge)
    ramp = torch.arange(128.0).expand(1, 1, 1, 8, 128)
    starts = []
    tiled_decode(lambda z: (starts.append(int(z[0, 0, 0, 0, 0])), decode(z))[1], ramp, Tiling())
    assert starts == [0, 24, 48, 72, 96, 120]
    assert [width for _, _, width in decode.shapes] == [32, 32, 32, 32, 32, 8]


@pytest.mark.parametrize(("latent_frames", "frames", "lengths"), [
    (16, 61, [16]), (17, 65, [17, 5]), (25, 97, [17, 13]), (33, 129, [17, 17, 9]),
])  # fmt: skip
def test_temporal_tiles(latent_frames, frames, lengths):
    decode, tiling = Recorder(enlarge), Tiling(temporal_tile=64)
    latents = noise(1, 1, latent_frames, 2, 2)
    pixels = tiled_decode(decode, latents, tiling)
    assert pixels.shape[2] == frames
    close(pixels, enlarge(latents), 1e-6)
    assert [length for length, _, _ in decode.shapes] == lengths
    encode = Recorder(shrink)
    close(tiled_encode(lambda x: Encoded(encode(x)), pixels, tiling).values, shrink(pixels), 1e-6)
    assert [length for length, _, _ in encode.shapes] == [4 * length - 3 for length in lengths]


@pytest.mark.parametrize("tiling", [
    SMALL_TILES, Tiling(80, 0.3, 24), Tiling(64, 0.0, 8), Tiling(96, 0.5, 32), Tiling(0, 0.25, 16), Tiling(112, 0.1, 0),
])  # fmt: skip
def test_any_tiling_covers_the_clip(tiling):
    latents = noise(1, 3, 9, 13, 22)
    pixels = enlarge(latents)
    done = []
    close(tiled_decode(enlarge, latents, tiling, lambda *counts: done.append(counts)), pixels, 1e-6)
    assert done[-1] == (len(done), len(done)) == (num_tiles(latents.shape, tiling, True),) * 2
    close(tiled_encode(lambda x: Encoded(shrink(x)), pixels, tiling).values, shrink(pixels), 1e-6)


def test_blending_is_linear_and_in_order():
    """Tiles of one value each, 0 to 3 in reading order: every ramp starts from what its neighbours became."""
    values = iter(range(4))

    def decode(z):
        return torch.full((1, 1, 1, 8 * z.shape[3], 8 * z.shape[4]), float(next(values)))

    pixels = tiled_decode(decode, torch.zeros(1, 1, 1, 10, 12), Tiling(64, 0.25))[0, 0, 0]  # starts 0 and 6 both ways, blends of 16 pixels
    ramp = torch.arange(16) / 16
    across = torch.cat([torch.zeros(48), ramp, torch.ones(32)])
    assert torch.allclose(pixels[0], across)
    assert torch.allclose(pixels[:, 0], 2 * torch.cat([torch.zeros(48), ramp, torch.ones(16)]))
    below = torch.cat([torch.full((48,), 2.0), 2 + ramp, torch.full((32,), 3.0)])
    assert torch.allclose(pixels[70], below)
    # Where four tiles meet, the lower right one fades in from above first, then from the left one as it was already blended.
    row, column = 5, 9
    above, left = 1.0 * column / 16, 2.0 * row / 16
    expected = left * (1 - column / 16) + (above * (1 - row / 16) + 3.0 * row / 16) * column / 16
    assert pixels[48 + row, 48 + column].item() == pytest.approx(expected)


def test_tiles_agree_far_from_seams(vae):
    """Where nothing is blended, a tiled result is the decode of that tile alone."""
    latents = noise(1, 4, 2, 6, 14)  # starts 0 | 0, 6, 12
    tiled = tiled_decode(vae.decode, latents, SMALL_TILES)
    assert torch.equal(tiled[..., :48], vae.decode(latents[..., :8])[..., :48])
    assert torch.equal(tiled[..., 64:96], vae.decode(latents[..., 6:])[..., 16:48])
    assert not torch.equal(tiled[..., 48:64], vae.decode(latents[..., :8])[..., 48:])


def test_one_tile_is_the_whole(vae):
    latents, frames = noise(1, 4, 4, 8, 8), noise(1, 3, 13, 64, 64)
    assert torch.equal(tiled_decode(vae.decode, latents, SMALL_TILES), vae.decode(latents))
    assert torch.equal(tiled_encode(vae.encode, frames, SMALL_TILES).values, vae.encode(frames).values)


def test_interrupting(vae):
    class Interrupted(Exception):
        pass

    decode = Recorder(enlarge)

    def stop(done, total):
        if done == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        tiled_decode(decode, noise(1, 1, 1, 8, 30), SMALL_TILES, stop)
    assert len(decode.shapes) == 2


# ---- posterior ---------------------------------------------------------------------------------------------------


def test_posterior():
    moments = 40 * noise(1, 8, 2, 3, 3)
    mean, logvar = Encoded(moments).moments()
    assert torch.equal(mean, moments[:, :4]) and logvar.min() == -30 and logvar.max() == 20
    assert torch.equal(Encoded(moments).mode(), mean)
    drawn = Encoded(moments).sample(torch.Generator().manual_seed(3))
    assert torch.equal(drawn, Encoded(moments).sample(torch.Generator().manual_seed(3)))
    assert not torch.equal(drawn, Encoded(moments).sample(torch.Generator().manual_seed(4)))
    expected = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    assert torch.equal(drawn, expected)


# ---- memory ------------------------------------------------------------------------------------------------------


class AllocationPeak(TorchDispatchMode):
    """Bytes of all tensor storages made inside and alive at the same time; works on meta tensors too."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.storages = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is None or id(storage) in given | self.storages:
                continue
            self.storages.add(id(storage))
            self.live += storage.nbytes()
            weakref.finalize(storage, self._forget, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def _forget(self, key, size):
        self.storages.discard(key)
        self.live -= size


@pytest.mark.parametrize(("config", "size"), [
    (TINY, (3, 8, 8)), (TINY, (9, 32, 32)), (HUNYUAN_VAE, (1, 8, 8)), (HUNYUAN_VAE, (5, 8, 12)), (HUNYUAN_VAE, (33, 32, 32)),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_estimates_are_what_is_allocated(config, size, dtype):
    model = CausalVAE(config, device="meta", dtype=dtype).requires_grad_(False)
    latents = torch.empty(1, config.latent_channels, *size, device="meta", dtype=dtype)
    with AllocationPeak() as decoding:
        pixels = model.decode(latents)
    with AllocationPeak() as encoding:
        model.encode(pixels)
    assert decode_bytes(config, size, dtype.itemsize) == pytest.approx(decoding.peak, rel=0.15)
    assert encode_bytes(config, tuple(pixels.shape[2:]), dtype.itemsize) == pytest.approx(encoding.peak, rel=0.15)


SHAPE = (1, 16, 33, 24, 42)  # 256px, 16:9, 129 frames


def choose(policy, free_gib, tiling=None, shape=SHAPE):
    return next(Ladder(HUNYUAN_VAE, shape, 2, lambda: int(free_gib * GIB)).attempts(policy, tiling or Tiling()))


def test_policy_exact_is_what_was_asked_for():
    assert choose("exact", 0.1) == (Tiling(), None)


def test_policy_low_memory_is_temporal_at_once():
    tiling, note = choose("low_memory", 1000)
    assert tiling == Tiling(temporal_tile=64) and "64 frames" in note and "129 frames" in note


def test_policy_auto():
    need = tile_decode_bytes(HUNYUAN_VAE, SHAPE, Tiling(), 2) / GIB
    assert choose("auto", 2 * need) == (Tiling(), None)
    tiling, note = choose("auto", 0.9 * need)
    assert tiling == Tiling(temporal_tile=64) and "64 frames" in note and f"{0.9 * need:.2f} GiB are free" in note
    tiling, note = choose("auto", 0.3 * need)
    assert tiling.temporal_tile == 64 and 64 <= tiling.tile_size < 256
    assert "64 frames" in note and f"{tiling.tile_size} pixels" in note and "may not fit" not in note
    check_tiling(tiling)
    assert tile_decode_bytes(HUNYUAN_VAE, SHAPE, tiling, 2) <= 0.3 * need * GIB
    tiling, note = choose("auto", 0)
    assert tiling == Tiling(64, 0.25, 64) and "may not fit" in note
    assert choose("auto", 0, tiling)[0] == tiling and "may not fit" in choose("auto", 0, tiling)[1]
    tiling, note = choose("auto", 0.5 * need, Tiling(0))
    assert 0 < tiling.tile_size <= 256 and f"{tiling.tile_size} pixels" in note


def test_policy_keeps_a_shorter_temporal_tile():
    tiling, note = choose("low_memory", 1000, Tiling(temporal_tile=32))
    assert (tiling, note) == (Tiling(temporal_tile=32), None)


def test_policy_of_a_short_clip():
    short = (1, 16, 5, 24, 42)
    assert choose("low_memory", 1000, shape=short) == (Tiling(), None)
    tiling, note = choose("auto", 0.4, shape=short)
    assert tiling.tile_size < 256 and "temporal" not in note and "pixels" in note


def test_estimate_is_of_the_largest_tile():
    def of(tiling, shape=SHAPE):
        return tile_decode_bytes(HUNYUAN_VAE, shape, tiling, 2)

    assert of(Tiling()) == decode_bytes(HUNYUAN_VAE, (33, 24, 32), 2)
    assert of(Tiling(0)) == decode_bytes(HUNYUAN_VAE, (33, 24, 42), 2)
    assert of(Tiling(temporal_tile=64)) == decode_bytes(HUNYUAN_VAE, (17, 24, 32), 2)
    assert of(Tiling(), (2, *SHAPE[1:])) == 2 * of(Tiling())


# ---- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tiling", "words"), [
    (Tiling(tile_size=200), "208"), (Tiling(tile_size=32), "64"), (Tiling(tile_size=-256), "64"),
    (Tiling(temporal_tile=30), "32"), (Tiling(temporal_tile=4), "8"),
    (Tiling(overlap=0.6), "0.25"), (Tiling(overlap=-0.1), "0.25"), (Tiling(overlap=float("nan")), "0.25"),
])  # fmt: skip
def test_impossible_tilings(tiling, words):
    for call in (lambda: tiled_decode(enlarge, noise(1, 1, 1, 4, 4), tiling), lambda: choose("exact", 1, tiling)):
        with pytest.raises(OpenSoraError, match=words):
            call()


@pytest.mark.parametrize(("call", "words"), [
    (lambda vae: vae.decode(noise(1, 16, 1, 4, 4)), r"\[1, 16, 1, 4, 4\].*4, frames"),
    (lambda vae: vae.decode(noise(4, 1, 4, 4)), "frames, height, width"),
    (lambda vae: vae.encode(noise(1, 4, 1, 16, 16)), r"\[batch, 3, frames"),
    (lambda vae: vae.encode(noise(1, 3, 4, 16, 16)), "Use 1 or 5"),
    (lambda vae: vae.encode(noise(1, 3, 1, 20, 16)), "24x16"),
    (lambda vae: tiled_encode(vae.encode, noise(1, 3, 6, 16, 16), Tiling()), "Use 5 or 9"),
    (lambda vae: tiled_encode(vae.encode, noise(3, 16, 16), Tiling()), "5 dimensions"),
    (lambda vae: tiled_decode(vae.decode, noise(4, 16, 16), Tiling()), "5 dimensions"),
    (lambda vae: choose("fast", 1), "auto, exact, low_memory"),
    (lambda vae: CausalVAE(replace(TINY, widths=(8, 16, 16)), device="meta"), "3 widths"),
    (lambda vae: CausalVAE(replace(TINY, widths=(8, 15, 16, 16)), device="meta"), "2 groups"),
])  # fmt: skip
def test_errors_name_the_way_out(vae, call, words):
    with pytest.raises(OpenSoraError, match=words):
        call(vae)
