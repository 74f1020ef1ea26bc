"""The VAE nodes inside a host: the core's function through our VAE, stock nodes and a stock VAE, and what happens when memory runs out."""

import copy
import gc
import re
import shutil
import weakref

import comfy.memory_management
import comfy.model_management
import comfy.sd
import comfy.utils
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

WIDE = (128, 128, 128, 128)  # the host's GroupNorm has 32 groups: the core has as many at this width


@pytest.fixture(scope="module")
def vae_module(pack):
    return pack("nodes.host.vae")


@pytest.fixture(scope="module")
def clips(pack):
    return pack("nodes.host.clips")


@pytest.fixture(scope="module")
def path(base):
    return base / "models" / "vae" / "hunyuan_vae.safetensors"


@pytest.fixture(scope="module")
def ours(run_node):
    return run_node("OpenSoraVAELoader", vae_name="hunyuan_vae.safetensors")[0]


@pytest.fixture(scope="module")
def core(pack, path):
    """The library's own VAE from the same file."""
    return pack("opensora_core.checkpoint.load").load_vae(path, torch.float32)


@pytest.fixture(scope="module")
def wide(pack, tmp_path_factory):
    """(core VAE, file, stock VAE) of one set of weights, as wide as the host's own VAE class can hold."""
    weights = random_weights(pack, pack("opensora_core.codecs.hunyuan.config").VAEConfig(16, WIDE, 1))
    path = tmp_path_factory.mktemp("vae") / "wide.safetensors"
    save_file(weights, path)
    return pack("opensora_core.checkpoint.load").load_vae(path, torch.float32), path, stock_vae(weights)


def random_weights(pack, config):
    generator = torch.Generator().manual_seed(5)
    weights = {}
    for name, shape in pack("opensora_core.families.table").codec_of(config).manifest(config).items():
        values = torch.randn(shape, generator=generator)
        norm = len(shape) == 1 and "norm" in name and name.endswith("weight")
        weights[name] = 1 + 0.05 * values if norm else values * (0.02 if len(shape) == 1 else 1.4 / values[0].numel() ** 0.5)
    return weights


def stock_vae(weights):
    """What VAELoader builds from these keys, through the host's own override of its sizes."""
    sizes = {"ch": 128, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "in_channels": 3, "out_ch": 3, "z_channels": 16, "double_z": True}
    layout = {"resolution": 256, "attn_resolutions": [], "dropout": 0.0, "conv3d": True, "time_compress": 4}
    vae = comfy.sd.VAE(sd=dict(weights), config={"params": {"ddconfig": {**sizes, **layout}, "embed_dim": 16}})
    vae.latent_dim, vae.latent_channels = 3, 16
    return vae


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def reference(pack):
    """The library's tiled function of a VAE: reference(vae).decode(latents, tiling) -> [B, T, H, W, 3] in 0..1, .encode(frames, tiling)."""
    tiling = pack("opensora_core.codecs.tiling")

    class Reference:
        def __init__(self, vae):
            self.vae = vae

        @torch.inference_mode()
        def decode(self, latents, tiles):
            return ((tiling.tiled_decode(self.vae.decode, latents, tiles) + 1) / 2).clamp(0, 1).movedim(1, -1)

        @torch.inference_mode()
        def encode(self, frames, tiles):
            pixels = (frames * 2 - 1).movedim(-1, 0)[None]
            return tiling.tiled_encode(self.vae.encode, pixels, tiles).mode()

    return Reference


@pytest.fixture
def tiles(pack):
    return pack("opensora_core.geometry").Tiling


def decode_node(run_node, vae, latents, **inputs):
    defaults = {"tile_size": 256, "overlap": 0.25, "temporal_tile": 0, "policy": "auto"}
    return run_node("OpenSoraTiledVAEDecode", vae=vae, latent={"samples": latents}, **{**defaults, **inputs})[0]


# Our VAE: the library's function, from every node


@pytest.mark.parametrize(
    "inputs", [{}, {"tile_size": 64}, {"tile_size": 64, "overlap": 0.125, "temporal_tile": 8}, {"tile_size": 0}], ids=str
)
def test_decode_is_the_librarys(run_node, ours, core, reference, tiles, relative_error, inputs):
    latents = noise(2, 16, 3, 6, 10)
    expected = reference(core).decode(latents, tiles(**inputs))
    found = decode_node(run_node, ours, latents, **inputs)
    assert found.shape == (2 * 9, 48, 80, 3) and found.dtype == torch.float32 and found.device.type == "cpu"
    assert relative_error(found.reshape(expected.shape), expected) < 1e-5


def test_stock_nodes_are_the_librarys(run_node, ours, core, reference, tiles, relative_error):
    latents = noise(1, 16, 2, 34, 2)  # taller than one tile: 272 pixels
    (found,) = run_node("VAEDecode", samples={"samples": latents}, vae=ours)
    assert relative_error(found[None], reference(core).decode(latents, tiles())) < 1e-5
    latents = noise(1, 16, 3, 10, 6)
    tiled = {"tile_size": 64, "overlap": 16, "temporal_size": 8, "temporal_overlap": 4}
    (found,) = run_node("VAEDecodeTiled", samples={"samples": latents}, vae=ours, **tiled)
    assert relative_error(found[None], reference(core).decode(latents, tiles(64, 0.25, 8))) < 1e-5
    frames = torch.rand(5, 16, 272, 3, generator=torch.Generator().manual_seed(1))
    (found,) = run_node("VAEEncode", pixels=frames, vae=ours)
    assert relative_error(found["samples"], reference(core).encode(frames, tiles())) < 1e-5
    (found,) = run_node("VAEEncodeTiled", pixels=frames, vae=ours, **tiled)
    assert relative_error(found["samples"], reference(core).encode(frames, tiles(64, 0.25, 8))) < 1e-5


def test_encode_node(run_node, ours, core, reference, tiles, relative_error):
    frames = torch.rand(5, 64, 96, 4, generator=torch.Generator().manual_seed(1))  # with an alpha channel, which is left out
    inputs = {"vae": ours, "image": frames, "tile_size": 64, "overlap": 0.25}
    mode, again, one, same, other = (
        run_node("OpenSoraTiledVAEEncode", **inputs, posterior=posterior, seed=seed)[0]["samples"]
        for posterior, seed in (("mode", 0), ("mode", 1), ("sample", 1), ("sample", 1), ("sample", 2))
    )
    assert relative_error(mode, reference(core).encode(frames[..., :3], tiles(64))) < 1e-5
    assert torch.equal(mode, again) and torch.equal(one, same) and not torch.equal(one, other) and not torch.equal(one, mode)


def test_our_vae_has_every_attribute_of_a_stock_one(ours, wide):
    stock = wide[2]
    assert {name for name in vars(stock) if not hasattr(ours, name)} == set()
    for frames in (1, 5, 129):
        assert ours.downscale_ratio[0](frames) == (frames - 1) // 4 + 1
        assert ours.upscale_ratio[0](ours.downscale_ratio[0](frames)) == frames
    assert ours.temporal_compression_decode() == 4 and ours.spacial_compression_decode() == 8
    assert ours.get_sd().keys() == load_file_keys(ours)


def load_file_keys(vae):
    load, (path, _) = vae.patcher.cached_patcher_init
    return load_file(path).keys()


def test_memory_estimates_are_of_one_tile(ours):
    one = ours.memory_used_decode((1, 16, 33, 32, 32), torch.bfloat16)
    assert ours.memory_used_decode((4, 16, 33, 72, 128), torch.bfloat16) == one
    assert 1.9 * one < ours.memory_used_decode((1, 16, 33, 32, 32), torch.float32) < 2.1 * one
    assert ours.memory_used_decode((1, 16, 9, 32, 32), torch.bfloat16) < one
    assert ours.memory_used_encode((1, 3, 129, 576, 1024), torch.bfloat16) == ours.memory_used_encode((1, 3, 129, 256, 256), torch.bfloat16)


def test_room_is_made_for_the_callers_tiles(run_node, ours, monkeypatch):
    asked, load = [], comfy.model_management.load_models_gpu
    monkeypatch.setattr(
        comfy.model_management,
        "load_models_gpu",
        lambda models, memory_required=0, **rest: (asked.append(memory_required), load(models, **rest)),
    )

    def most(node, size, **inputs):
        asked.clear()
        run_node(node, vae=ours, tile_size=size, overlap=0, temporal_size=8, temporal_overlap=4, **inputs)
        return max(asked)

    clip = {"samples": {"samples": noise(1, 16, 2, 20, 20)}}
    assert most("VAEDecodeTiled", 160, **clip) > 3 * most("VAEDecodeTiled", 64, **clip)
    frames = {"pixels": torch.rand(1, 288, 288, 3)}
    assert most("VAEEncodeTiled", 288, **frames) > 1.2 * most("VAEEncodeTiled", 256, **frames)  # the host asks for 256 by itself


def test_clones_for_other_devices(ours):
    load, arguments = ours.patcher.cached_patcher_init
    fresh = load(*arguments, disable_dynamic=True)
    assert fresh.model is not ours.patcher.model
    selected = copy.copy(ours)  # what SelectVAEDevice does
    selected.patcher = ours.patcher.clone()
    selected.first_stage_model = fresh.model
    latents = noise(1, 16, 2, 4, 4)
    with torch.inference_mode():
        assert torch.equal(selected.decode(latents), ours.decode(latents))


def test_layers_without_weights_until_they_are_loaded(vae_module, ours, path, monkeypatch):
    """With dynamic memory the host's linear layers have no weights when the network is built."""
    state = comfy.utils.load_torch_file(str(path))
    with monkeypatch.context() as patch:
        patch.setattr(comfy.memory_management, "aimdo_enabled", True)
        lazy = vae_module._build(ours.config, state, torch.device("cpu"), False)
    latents = noise(1, 16, 2, 4, 4)
    with torch.inference_mode():
        assert torch.equal(lazy.decode(latents), ours.decode(latents))


# A stock VAE: exact in our call, as it was afterwards


def inside(vae):
    network = vae.first_stage_model
    return [(half.carried, half.mid.attn_1.optimized_attention) for half in (network.encoder, network.decoder)]


def test_a_stock_vae_is_exact_in_our_nodes_only(run_node, wide, reference, tiles, relative_error):
    core, _, stock = wide
    latents, before = noise(1, 16, 3, 4, 6), inside(stock)
    expected = reference(core).decode(latents, tiles())
    plain = run_node("VAEDecode", samples={"samples": latents}, vae=stock)[0]
    assert relative_error(plain[None], expected) > 1e-2  # the host's function is another one
    assert relative_error(decode_node(run_node, stock, latents)[None], expected) < 1e-5
    assert inside(stock) == before and before[0][0] is True
    assert torch.equal(run_node("VAEDecode", samples={"samples": latents}, vae=stock)[0], plain)
    frames = torch.rand(9, 32, 48, 3, generator=torch.Generator().manual_seed(1))
    encode = {"tile_size": 256, "overlap": 0.25, "posterior": "mode", "seed": 0}
    (found,) = run_node("OpenSoraTiledVAEEncode", vae=stock, image=frames, **encode)
    assert relative_error(found["samples"], reference(core).encode(frames, tiles())) < 1e-5
    assert inside(stock) == before


def test_a_file_of_the_released_sizes_through_both_loaders(run_node, base, pack, relative_error):
    if psutil.virtual_memory().available < 6 * 2**30:
        pytest.skip("less than 6 GiB of memory free: the released sizes did not run")
    file = base / "models" / "vae" / "released_sizes.safetensors"
    save_file(
        {name: tensor.bfloat16() for name, tensor in random_weights(pack, pack("opensora_core.codecs.hunyuan.config").HUNYUAN_VAE).items()},
        file,
    )
    try:
        (ours,), (stock,) = (run_node(loader, vae_name=file.name) for loader in ("OpenSoraVAELoader", "VAELoader"))
    finally:
        file.unlink()
    latents, frames = noise(1, 16, 3, 4, 4), torch.rand(9, 32, 32, 3, generator=torch.Generator().manual_seed(1))
    assert relative_error(decode_node(run_node, stock, latents), decode_node(run_node, ours, latents)) < 2e-5
    encode = {"image": frames, "tile_size": 256, "overlap": 0.25, "posterior": "mode", "seed": 0}
    found, expected = (run_node("OpenSoraTiledVAEEncode", vae=vae, **encode)[0]["samples"] for vae in (stock, ours))
    assert relative_error(found, expected) < 2e-5


@pytest.mark.parametrize(
    "problem", [RuntimeError("broken"), comfy.model_management.InterruptProcessingException()], ids=["error", "interrupt"]
)
def test_a_stock_vae_comes_back_whole_after_a_stop(run_node, wide, monkeypatch, problem):
    stock = wide[2]
    before = inside(stock)

    def stop(*_):
        assert inside(stock) != before
        raise problem

    monkeypatch.setattr(stock.first_stage_model.decoder, "forward", stop)
    with pytest.raises(type(problem)):
        decode_node(run_node, stock, noise(1, 16, 2, 4, 4))
    assert inside(stock) == before


def test_interrupting_between_tiles(run_node, ours):
    comfy.model_management.interrupt_current_processing(True)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            decode_node(run_node, ours, noise(1, 16, 2, 16, 16), tile_size=64)
    finally:
        comfy.model_management.interrupt_current_processing(False)


def test_progress_per_tile(run_node, ours, monkeypatch):
    seen = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, preview, node_id=None: seen.append((value, total)))
    monkeypatch.setattr(
        comfy.utils.ProgressBar, "update_absolute", lambda bar, value, total=None, preview=None: seen.append((value, total))
    )
    decode_node(run_node, ours, noise(2, 16, 2, 10, 10), tile_size=64)
    assert seen == [(done, 8) for done in range(1, 9)]


# Memory


@pytest.fixture
def out_of_memory(ours, monkeypatch):
    """Make decoding more than `limit` latent frames, or wider than `side`, run out of memory; returns the list of what was decoded."""
    decoded = []
    network = ours.first_stage_model
    plain = network.decode_tile

    def arrange(limit, side=1000):
        def decode(latents, home=None):
            if latents.shape[2] > limit or latents.shape[3] > side:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            decoded.append(tuple(latents.shape[2:]))
            return plain(latents)

        monkeypatch.setattr(network, "decode_tile", decode)
        return decoded

    return arrange


def test_out_of_memory_falls_back_once_and_says_so(run_node, ours, core, reference, tiles, out_of_memory, relative_error, caplog):
    latents = noise(1, 16, 18, 4, 4)
    decoded = out_of_memory(17)
    found = decode_node(run_node, ours, latents)
    assert {shape[0] for shape in decoded} <= {17, 6} and relative_error(
        found[None], reference(core).decode(latents, tiles(temporal_tile=64))
    ) < 1e-5
    [line] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "Ran out of memory" in line and "64 frames at a time" in line


@pytest.mark.parametrize("policy", ["auto", "exact"])
def test_out_of_memory_parks_activations_first(run_node, ours, core, reference, tiles, clips, relative_error, monkeypatch, caplog, policy):
    network, homes = ours.first_stage_model, []
    plain = network.decode_tile

    def decode(latents, home=None):
        homes.append(home)
        if home is None:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return plain(latents, home)

    monkeypatch.setattr(network, "decode_tile", decode)
    monkeypatch.setattr(clips, "ram_for_parking", lambda device: 2**40)
    latents = noise(1, 16, 18, 4, 4)
    found = decode_node(run_node, ours, latents, policy=policy)
    assert homes == [None, torch.device("cpu")] and relative_error(found[None], reference(core).decode(latents, tiles())) < 1e-5
    [line] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "decoded exactly, with activations in main memory: slower" in line


@pytest.fixture
def a_card(pack, monkeypatch):
    """As if the VAE computed on a device of its own, which the host counts `free` bytes of: a_card(free)."""

    def arrange(vae, free, ram=2**40):
        monkeypatch.setattr(pack("nodes.host.vae"), "ram_for_parking", lambda device: ram)
        monkeypatch.setattr(vae.patcher, "get_free_memory", lambda device: free)

    return arrange


def homes_of(vae, monkeypatch, limit=None):
    """Where each tile's activations are from now on; `limit`: calls that are parked nowhere and run out of memory."""
    network, homes = vae.first_stage_model, []
    plain = network.decode_tile

    def decode(latents, home=None):
        homes.append(home)
        if home is None and limit is not None:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return plain(latents, home)

    monkeypatch.setattr(network, "decode_tile", decode)
    return homes


def test_a_stock_decode_parks_what_the_card_has_no_room_for(
    run_node, ours, core, reference, tiles, a_card, relative_error, monkeypatch, caplog, pack
):
    memory = pack("opensora_core.memory.decode")
    monkeypatch.setattr(pack("opensora_core.codecs.hunyuan.memory"), "CHUNK_ELEMENTS", 2**14)  # so that this clip has parts
    latents, cpu = noise(1, 16, 18, 4, 4), torch.device("cpu")
    expected = reference(core).decode(latents, tiles())
    needed = ours.memory_used_decode(tuple(latents.shape), torch.float32)
    least = int(memory.MARGIN * memory.decode_bytes(ours.config, tuple(latents.shape[2:]), 4, parked=True))
    assert least < needed
    asked = []
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda models, memory_required=0, **rest: asked.append(memory_required))
    homes = homes_of(ours, monkeypatch)
    for free, home in ((needed, None), (needed - 1, cpu), (least, cpu), (least - 1, None)):
        a_card(ours, free)
        (found,) = run_node("VAEDecode", samples={"samples": latents}, vae=ours)
        assert homes == [home] and relative_error(found[None], expected) < 1e-5
        homes.clear()
    assert asked == 4 * [needed]  # the host makes room for what is best, whatever it finds then
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(lines) == 2 and all("Clip decoded exactly, with activations in main memory: slower" in line for line in lines)
    a_card(ours, least, ram=0)
    run_node("VAEDecode", samples={"samples": latents}, vae=ours)
    assert homes == [None]


def test_a_stock_decode_that_runs_out_of_memory_parks_before_the_host_tiles_time(
    run_node, ours, core, reference, tiles, a_card, relative_error, monkeypatch, caplog
):
    latents = noise(1, 16, 18, 4, 4)
    a_card(ours, 2**40)
    homes = homes_of(ours, monkeypatch, limit=0)
    (found,) = run_node("VAEDecode", samples={"samples": latents}, vae=ours)
    assert homes == [None, torch.device("cpu")]
    assert relative_error(found[None], reference(core).decode(latents, tiles())) < 1e-5
    assert "the device ran out of memory" in caplog.text


def test_out_of_memory_in_a_stock_decode_tiles_time(run_node, ours, core, reference, tiles, out_of_memory, relative_error):
    latents = noise(1, 16, 18, 4, 4)
    out_of_memory(17)
    (found,) = run_node("VAEDecode", samples={"samples": latents}, vae=ours)
    assert relative_error(found[None], reference(core).decode(latents, tiles(temporal_tile=64))) < 1e-5


def test_out_of_memory_for_good_is_one_sentence(run_node, ours, out_of_memory, pack):
    error = pack("opensora_core.errors").OpenSoraError
    out_of_memory(0)
    with pytest.raises(error, match="Use policy auto or low_memory.*69 frames of 32x32.*ran out of memory"):
        decode_node(run_node, ours, noise(1, 16, 18, 4, 4), policy="exact")
    with pytest.raises(error, match="Use a smaller tile_size.*69 frames of 32x32.*ran out of memory"):
        decode_node(run_node, ours, noise(1, 16, 18, 4, 4), policy="low_memory")


def test_out_of_memory_in_temporal_tiles_makes_them_smaller(run_node, ours, core, reference, tiles, out_of_memory, relative_error, caplog):
    latents = noise(1, 16, 2, 16, 16)
    decoded = out_of_memory(2, side=12)
    found = decode_node(run_node, ours, latents, tile_size=128, temporal_tile=64)
    [line] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    size = max(shape[1] for shape in decoded) * 8
    assert f"tiles of {size} pixels" in line and size < 128
    assert relative_error(found[None], reference(core).decode(latents, tiles(size, temporal_tile=64))) < 1e-5


def test_out_of_memory_while_encoding(run_node, ours, core, reference, tiles, relative_error, monkeypatch, caplog, pack):
    frames = torch.rand(69, 16, 16, 3, generator=torch.Generator().manual_seed(1))
    inputs = {"vae": ours, "image": frames, "tile_size": 256, "overlap": 0.25, "posterior": "mode", "seed": 0}
    expected, plain = reference(core).encode(frames, tiles(temporal_tile=64)), ours.first_stage_model.encode_tile
    limit = 65

    def encode(pixels):
        if pixels.shape[2] > limit:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return plain(pixels)

    monkeypatch.setattr(ours.first_stage_model, "encode_tile", encode)
    (found,) = run_node("OpenSoraTiledVAEEncode", **inputs)
    assert relative_error(found["samples"], expected) < 1e-5
    [line] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "Ran out of memory encoding" in line and "64 frames at a time" in line
    limit = 0
    with pytest.raises(pack("opensora_core.errors").OpenSoraError, match="Use a smaller tile_size: encoding 69 frames of 16x16"):
        run_node("OpenSoraTiledVAEEncode", **inputs)


def test_policy_says_when_it_tiles_time(run_node, ours, core, reference, tiles, relative_error, caplog, monkeypatch):
    latents = noise(1, 16, 18, 4, 4)
    expected = reference(core).decode(latents, tiles(temporal_tile=64))
    found = decode_node(run_node, ours, latents, policy="low_memory")
    assert relative_error(found[None], expected) < 1e-5 and "temporal tiles of 64 frames" in caplog.text
    caplog.clear()
    decode_node(run_node, ours, latents)
    assert not caplog.records
    monkeypatch.setattr(type(ours.patcher), "get_free_memory", lambda patcher, device: 2_000_000)
    decode_node(run_node, ours, latents)
    assert "temporal tiles" in caplog.text
    caplog.clear()
    exact = decode_node(run_node, ours, latents, policy="exact")
    assert not caplog.records and relative_error(exact[None], reference(core).decode(latents, tiles())) < 1e-5


# What cannot be


def test_refusals(run_node, ours, pack):
    error = pack("opensora_core.errors").OpenSoraError
    pixel_space = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})
    for latents, vae, words in (
        (noise(1, 16, 4, 4), ours, r"This LATENT is \[1, 16, 4, 4\]; a video latent is"),
        (noise(1, 4, 2, 4, 4), ours, r"This LATENT is \[1, 4, 2, 4, 4\]"),
        (noise(1, 16, 2, 4, 4), pixel_space, r"Use Open-Sora Load VAE.*this VAE holds PixelspaceConversionVAE.*needs the HunyuanVideo VAE"),
    ):
        with pytest.raises(error, match=words):
            decode_node(run_node, vae, latents)
    with pytest.raises(error, match="This LATENT is"):
        run_node("VAEDecode", samples={"samples": noise(1, 16, 4, 4)}, vae=ours)
    encode = {"vae": ours, "tile_size": 256, "overlap": 0.25, "posterior": "mode", "seed": 0}
    for frames, words in (
        (torch.rand(6, 64, 64, 3), "Use 5 or 9.*num_frames=6 is not 4k\\+1"),
        (torch.rand(5, 72, 64, 3), "Use 80x64.*height=72, width=64 are not both multiples of 16"),
        (torch.rand(5, 64, 64), "Give a clip as an IMAGE batch"),
    ):
        with pytest.raises(error, match=words):
            run_node("OpenSoraTiledVAEEncode", image=frames, **encode)
    with pytest.raises(error, match="num_frames=6 is not 4k"):
        run_node("VAEEncode", pixels=torch.rand(6, 64, 64, 3), vae=ours)
    for inputs in ({"tile_size": 100}, {"temporal_tile": 10}, {"overlap": 0.7}, {"overlap": float("nan")}, {"policy": "best"}):
        with pytest.raises(error):
            decode_node(run_node, ours, noise(1, 16, 2, 4, 4), **inputs)


def test_files_that_are_no_video_vae(run_node, base, path, pack):
    error, folder = pack("opensora_core.errors").CheckpointError, base / "models" / "vae"
    shutil.copy(base / "models" / "text_encoders" / "t5xxl.safetensors", folder / "t5.safetensors")
    save_file(
        {"encoder.down.0.block.0.conv1.weight": torch.zeros(4, 4, 3, 3), "decoder.conv_in.weight": torch.zeros(4, 16, 3, 3)},
        folder / "ae.safetensors",
    )
    weights = load_file(path)
    save_file({f"vae.{name}": tensor for name, tensor in weights.items()}, folder / "prefixed.safetensors")
    save_file({**weights, "another": torch.zeros(1)}, folder / "extra.safetensors")
    del weights["decoder.mid_block.attentions.0.to_q.weight"]
    save_file(weights, folder / "less.safetensors")
    (folder / "cut.safetensors").write_bytes(path.read_bytes()[:100_000])
    for name, words in (
        ("t5.safetensors", "Give the HunyuanVideo VAE.*t5.safetensors is a T5 encoder"),
        ("ae.safetensors", "Give the HunyuanVideo VAE.*ae.safetensors is the Flux.1 picture autoencoder"),
        ("less.safetensors", r"less.safetensors.*not whole.*1 missing \(decoder.mid_block.attentions.0.to_q.weight\)"),
        ("cut.safetensors", "cut.safetensors is truncated"),
        ("none.safetensors", "none.safetensors is not in models/vae"),
        ("../t5.safetensors", "is not inside models/vae"),
    ):
        with pytest.raises(error, match=words):
            run_node("OpenSoraVAELoader", vae_name=name)
        # Before anything runs, too: the host would only come to this node once the video is sampled.
        assert re.search(words, pack("nodes.decode").OpenSoraVAELoader.validate_inputs(vae_name=name))
    assert pack("nodes.decode").OpenSoraVAELoader.validate_inputs(vae_name=None) is True  # its name comes over a wire
    for name in ("prefixed.safetensors", "extra.safetensors"):
        assert pack("nodes.decode").OpenSoraVAELoader.validate_inputs(vae_name=name) is True
        assert run_node("OpenSoraVAELoader", vae_name=name)[0].config.latent_channels == 16


def test_a_vae_goes_when_nothing_holds_it(path, base, run_node):
    """Without the collector, whose turn comes when it comes: what is let go in the middle of a collection would wait for the next."""
    shutil.copy(path, base / "models" / "vae" / "lonely.safetensors")
    (vae,) = run_node("OpenSoraVAELoader", vae_name="lonely.safetensors")
    gone = weakref.ref(vae)
    gc.disable()
    try:
        del vae
        assert gone() is None
    finally:
        gc.enable()


def test_a_small_stand_in_decodes_drafts_of_our_latents(base, run_node):
    """TAEHV, which the host loads by the name that the latent format says: its loader, its decode and its preview take our latents."""
    import comfy.latent_formats
    import comfy.taesd.taehv
    import latent_preview

    network = comfy.taesd.taehv.TAEHV(latent_channels=16)
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.05)
    place = base / "models" / "vae_approx"
    place.mkdir(exist_ok=True)
    save_file({name: tensor.half() for name, tensor in network.state_dict().items()}, place / "taehv.safetensors")
    latent = run_node(
        "OpenSoraEmptyLatentVideo", resolution="custom", aspect_ratio="16:9", num_frames=9, width=64, height=48, batch_size=1
    )[0]
    latent = {**latent, "samples": torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(1))}
    (vae,) = run_node("VAELoader", vae_name="taehv.safetensors")
    (frames,) = run_node("VAEDecode", samples=latent, vae=vae)
    assert frames.shape == (9, 48, 64, 3) and torch.isfinite(frames).all()
    form = comfy.latent_formats.HunyuanVideo()
    previewer = latent_preview.get_previewer(torch.device("cpu"), form)
    assert previewer is None or previewer.decode_latent_to_preview(latent["samples"]).size
    with pytest.raises(Exception, match="holds TAEHV"):
        run_node("OpenSoraTiledVAEDecode", vae=vae, latent=latent, tile_size=256, overlap=0.25, temporal_tile=0, policy="auto")
