"""The parts of Open-Sora 1.0 to 1.3 against the reference at each tag: networks, autoencoders, names of every tensor."""

import json

import pytest
import torch

from opensora_core.codecs.causal import CausalConfig, CausalVideoVAE
from opensora_core.codecs.hunyuan import layers
from opensora_core.codecs.picture import OLD_DIFFUSERS, KLConfig, PictureVAE
from opensora_core.codecs.temporal import TemporalConfig, TwoStageVAE
from opensora_core.codecs.tiling import tiled_decode, tiled_encode
from opensora_core.geometry import WHOLE_CLIP, Tiling
from opensora_core.memory.decode import Ladder
from opensora_core.networks.stdit.config import STDiTConfig
from opensora_core.networks.stdit.layers import example, grid_positions, position_embedding, rotary_table, rotate
from opensora_core.networks.stdit.stdit import STDiT, STDiT3
from opensora_core.shapes import manifest_of
from tests.golden import open_sora_1_cases as cases

TOLERANCE = 2e-5
TILED_IN_TIME = Tiling(0, temporal_tile=8)
NETWORKS = {"1.0": STDiT, "1.1": STDiT, "1.2": STDiT3, "1.3": STDiT3}
CODECS = {"kl": (PictureVAE, KLConfig), "1.2": (TwoStageVAE, TemporalConfig), "1.3": (CausalVideoVAE, CausalConfig)}


@pytest.fixture(scope="module")
def recorded(golden):
    tensors, metadata = golden("open_sora_1")
    return tensors, metadata["info"]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def filled(build, config, shapes):
    """A module of our own with the weights that the reference had. shapes: the reference's, by name."""
    shapes = {name: shape for name, shape in shapes.items() if not name.startswith("pos_embed")}
    module = build(config.of(shapes)) if isinstance(config, type) else build(config)
    assert manifest_of(module) == {name: tuple(shape) for name, shape in shapes.items()}
    module.load_state_dict(cases.random_weights(shapes))
    return module


@pytest.fixture(scope="module")
def network(recorded):
    built = {}

    def get(version):
        if version not in built:
            shapes = {name: tuple(shape) for name, shape in recorded[1][version]["shapes"].items()}
            built[version] = filled(NETWORKS[version], STDiTConfig.of(shapes), shapes)
        return built[version]

    return get


def inputs(name, dtype=torch.float32):
    version, extent, size, frames, time, edit, given = cases.FORWARDS[name]
    shape = (2, cases.NETWORKS[version]["in_channels"], *extent)
    values = {"context": cases.random((2, 1, 8, 16), 2)[:, 0], "attention_mask": torch.tensor(cases.TEXT_MASK)}
    if version != "1.0":
        values["sizes"] = torch.tensor([[24.0 if frames > 1 else 120.0, frames, *size]] * 2)
    if edit:
        values["edit"] = torch.tensor(edit)
    if given:
        where = torch.zeros(2, 1, *extent)
        where[:, :, given] = 1
        values["cond"] = torch.cat((where, cases.random(shape, 3) * where), dim=1)
    return cases.random(shape, 1), torch.tensor([time, time]), values


@pytest.mark.parametrize("name", cases.FORWARDS)
def test_forward(recorded, network, relative_error, name):
    x, timestep, values = inputs(name)
    found = network(cases.FORWARDS[name][0])(x, timestep, **values)
    if x.shape[1] == 16:
        found = found[:, ::5]
    assert relative_error(found, recorded[0][f"forward.{name}"]) < TOLERANCE


def test_equal_text_lengths_go_in_one_piece(network):
    """One call of the attention gives what a call for each prompt gives."""
    x, timestep, values = inputs("1.2_odd")
    values["attention_mask"] = torch.tensor(cases.TEXT_MASK[:1] * 2)
    together = network("1.2")(x, timestep, **values)
    values = {name: value[:1] for name, value in values.items()}
    torch.testing.assert_close(network("1.2")(x[:1], timestep[:1], **values), together[:1], rtol=1e-4, atol=1e-5)


def test_a_frame_that_is_always_made_is_one_without_a_mask(network):
    x, timestep, values = inputs("1.2_picture")
    edit = torch.ones(2, 1)
    found = network("1.2")(x, torch.tensor([1000.5, 1000.5]), edit=edit, **values)
    torch.testing.assert_close(found, network("1.2")(x, torch.tensor([1000.5, 1000.5]), **values))


@pytest.mark.parametrize("version", NETWORKS)
def test_full_size_names(recorded, version):
    expected = {key: entry for key, entry in recorded[1][version]["manifest"].items() if not key.startswith("pos_embed")}
    shapes = {}
    for key, (count, *shape) in expected.items():
        shapes |= {key.replace("*", str(place)): tuple(shape) for place in range(count)}
    config = STDiTConfig.of(shapes)
    assert (config.hidden_size, config.head_dim, config.depth) == (1152, 72, 28)
    assert cases.folded(manifest_of(NETWORKS[version](config, device="meta"))) == expected


def test_blocks_run_in_turn(network):
    ran, hooks = [], []
    for version in ("1.1", "1.2"):
        blocks = network(version).blocks()
        hooks += [block.register_forward_hook(lambda module, *_: ran.append(module)) for block in blocks]
        x, timestep, values = inputs(f"{version}_picture")
        network(version)(x, timestep, **values)
        assert ran == blocks
        ran.clear()
    for hook in hooks:
        hook.remove()


def test_bf16_tables_are_the_released_ones(recorded):
    """Frequencies are rounded with the network: places differ from fp32's by a tenth of their range, and were trained so."""
    rows, columns = grid_positions(45, 80, 1.9, "cpu")
    tables = {dtype: position_embedding(rows, columns, 48, dtype).bfloat16()[::37] for dtype in (torch.bfloat16, torch.float32)}
    assert torch.equal(tables[torch.bfloat16], recorded[0]["tables.position"])
    assert (tables[torch.bfloat16].float() - tables[torch.float32].float()).abs().max() > 0.02

    freqs = 1 / 10000 ** (torch.arange(0, 24, 2) / 24)
    eye = torch.eye(24)[::2, None].expand(12, 35, 24).unsqueeze(0).bfloat16()
    turned = {}
    for dtype in (torch.bfloat16, torch.float32):
        turned[dtype] = rotate(eye, rotary_table([torch.arange(35).to(dtype) / 1.9], freqs, dtype))[0]
    assert torch.equal(turned[torch.bfloat16], recorded[0]["tables.rope"])
    assert (turned[torch.bfloat16].float() - turned[torch.float32].float()).abs().max() > 0.02


def test_a_bf16_network_uses_them(network):
    assert network("1.3").table_dtype == torch.float32
    assert STDiT3(network("1.3").config, dtype=torch.float16, device="meta").table_dtype == torch.bfloat16


@pytest.fixture(scope="module")
def codec(recorded):
    built = {}

    def get(which):
        if which not in built:
            shapes = recorded[1]["1.2"]["kl_shapes"] if which == "kl" else recorded[1][which]["vae_shapes"]
            build, config = CODECS[which]
            built[which] = filled(build, config, {name: tuple(shape) for name, shape in shapes.items()})
        return built[which]

    return get


@pytest.mark.parametrize("name", [name for name in cases.CLIPS if name.startswith("1.")])
def test_clips(recorded, codec, relative_error, name):
    which, frames, height, width = cases.CLIPS[name]
    vae, expected = codec(which), recorded[0]
    encoded = vae.encode(cases.random((1, 3, frames, height, width), 4))
    torch.manual_seed(0)
    latents = vae.config.latents.to_model(encoded.sample())
    assert relative_error(latents, expected[f"vae.{name}.latents"]) < TOLERANCE
    given = vae.config.latents.to_codec(cases.random(latents.shape, 5))
    found = vae.decode(given, **({"num_frames": frames} if which == "1.2" else {}))[..., ::2, ::2]
    assert relative_error(found, expected[f"vae.{name}.pixels"]) < TOLERANCE


def test_pictures(recorded, codec, relative_error):
    _, frames, height, width = cases.CLIPS["kl_clip"]
    vae = codec("kl")
    clip = cases.random((frames, 3, height, width), 4).transpose(0, 1).unsqueeze(0)
    found = vae.encode(clip).values[0].transpose(0, 1)
    assert relative_error(found, recorded[0]["vae.kl_clip.moments"]) < TOLERANCE
    latents = cases.random((frames, 4, height // 8, width // 8), 5).transpose(0, 1).unsqueeze(0)
    assert relative_error(vae.decode(latents)[0].transpose(0, 1), recorded[0]["vae.kl_clip.pixels"]) < TOLERANCE


@pytest.mark.parametrize("which", CODECS)
def test_full_size_codec_names(recorded, which):
    found = manifest_of(CODECS[which][0](CODECS[which][1](), device="meta"))
    info = recorded[1]
    if which == "1.2":
        spatial = {f"spatial_vae.module.{name}": shape for name, shape in info["1.2"]["kl_manifest"].items()}
        expected = {**info["1.2"]["vae_manifest"], **spatial, "scale": [1, 4, 1, 1, 1], "shift": [1, 4, 1, 1, 1]}
    else:
        expected = info["1.2"]["kl_manifest"] if which == "kl" else info["1.3"]["vae_manifest"]
    assert found == {name: tuple(shape) for name, shape in expected.items()}
    assert CODECS[which][1].of(found) == CODECS[which][1]()


def test_files_of_older_diffusers_name_attention_otherwise():
    ours = manifest_of(PictureVAE(KLConfig(), device="meta"))
    theirs = OLD_DIFFUSERS.manifest(ours)
    assert OLD_DIFFUSERS.mark in theirs and OLD_DIFFUSERS.mark not in ours
    assert "decoder.mid_block.attentions.0.proj_attn.bias" in theirs
    assert dict(OLD_DIFFUSERS.convert(key, shape, None)[0] for key, shape in theirs.items()) == ours


@pytest.mark.parametrize("which", ["kl", "1.2", "1.3"])
def test_only_the_result_grows_with_the_length(codec, monkeypatch, which):
    """No layer sees more than a piece."""
    vae, longest = codec(which), []
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d | torch.nn.Conv2d):
            module.register_forward_hook(lambda _, given, __: longest.append(given[0].shape[2 if given[0].ndim == 5 else 0]))
    found = vae.decode(torch.zeros(1, vae.config.latents.channels, 20, 1, 1))
    assert found.shape[2] == vae.config.grid.pixel_frames(20)
    vae.encode(torch.zeros(1, 3, 68, 8, 8)).mode()
    assert max(longest) <= 23  # 17, padded


@pytest.mark.parametrize("which", ["1.2", "1.3"])
def test_large_clips_go_a_few_frames_at_a_time(codec, monkeypatch, which):
    vae, clip = codec(which), cases.random((1, 3, 17, 16, 16), 4)
    latents = vae.encode(clip).mode()
    frames = vae.decode(latents)
    monkeypatch.setattr(layers, "CHUNK_ELEMENTS_CPU", 1)
    torch.testing.assert_close(vae.encode(clip).mode(), latents, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vae.decode(latents), frames, rtol=1e-4, atol=1e-5)


def test_golden_says_where_it_is_from(golden):
    commits = json.loads(json.dumps(golden("open_sora_1")[1]["commits"]))
    assert commits["1.3"].startswith("b096aa3c") and commits["1.0"].startswith("c861b988")


@pytest.mark.parametrize("version", NETWORKS)
def test_an_example_runs_without_values(network, version):
    """Plans count a forward on the meta device; what comes out has the shape of a real one."""
    config = network(version).config
    frames = 5 if version in ("1.2", "1.3") else 3
    inputs = example(config, (2, config.in_channels, frames, 9, 4), 8, torch.float32, "meta")
    found = NETWORKS[version](config, device="meta")(**inputs)
    assert found.shape == (2, config.out_channels // (2 if config.in_turn else 1), frames, 9, 4)


@pytest.mark.parametrize("version", ["kl", "1.2", "1.3"])
def test_clips_that_a_codec_takes_in_pieces_are_not_cut_in_time(recorded, version):
    shapes = recorded[1]["1.2" if version == "kl" else version]["kl_shapes" if version == "kl" else "vae_shapes"]
    vae = filled(*CODECS[version], shapes)
    grid = vae.config.grid
    frames = {"kl": 16, "1.2": 34, "1.3": 33}[version]
    latents = torch.randn(1, vae.config.latent_channels, grid.latent_frames(frames), 2, 3, generator=torch.Generator().manual_seed(0))
    pixels = vae.decode(latents)
    assert pixels.shape[2] == frames
    assert torch.equal(tiled_decode(vae.decode, latents, TILED_IN_TIME, grid=grid), pixels)
    assert torch.equal(tiled_encode(vae.encode, pixels, TILED_IN_TIME, grid=grid).mode(), vae.encode(pixels).mode())
    asked = next(Ladder(vae.config, tuple(latents.shape), 4, lambda: 0).attempts("low_memory", Tiling(temporal_tile=WHOLE_CLIP)))
    assert "temporal" not in (asked.line or "")
