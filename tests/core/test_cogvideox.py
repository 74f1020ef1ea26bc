"""CogVideoX: networks, VAE, schedules and whole runs give diffusers' numbers; every published layout is read."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from opensora_core.codecs import cogvideox as codec
from opensora_core.codecs.tiling import tiled_decode
from opensora_core.errors import CheckpointError, OpenSoraError
from opensora_core.geometry import Tiling
from opensora_core.memory import decode as memory
from opensora_core.memory.count import AllocationCounter
from opensora_core.networks.cogvideox import config as configs, layout
from opensora_core.networks.cogvideox.model import CogVideoX, example, rotary_positions
from opensora_core.sampling import v_prediction as sampling
from opensora_core.sampling.guidance import Guidance
from opensora_core.sampling.run import run
from opensora_core.sampling.schedule import last_steps
from opensora_core.shapes import manifest_of
from tests.golden.formula import fill, numbers, sample

TOLERANCE = 2e-5  # fp32 rounding; the issue asks for 2e-4
GOLDEN = Path(__file__).resolve().parent.parent / "golden"
MANIFESTS = json.loads((GOLDEN / "cogvideox_manifests.json").read_text())
NAMES = tuple(MANIFESTS["transformers"])
BLOCK = "transformer_blocks.0."
SAT_TENSORS = {"2b": 556, "5b_i2v": 773, "1.5_5b_i2v": 776}


def metadata(name, key):
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return json.loads(file.metadata()[key])


CASES, SHAPES = metadata("cogvideox", "cases"), metadata("cogvideox", "shapes")
RUNS = metadata("cogvideox_runs", "cases")
TIMES, DRAWS = (metadata("cogvideox_schedules", key) for key in ("times", "draws"))


RELEASED = dict(
    zip(
        NAMES,
        (configs.COGVIDEOX_2B, configs.COGVIDEOX_5B, configs.COGVIDEOX_5B_I2V, configs.COGVIDEOX_1_5_5B, configs.COGVIDEOX_1_5_5B_I2V),
        strict=True,
    )
)


def small(name):
    return fill(CogVideoX(configs.CogVideoXConfig.of(SHAPES[name])))


@pytest.fixture(scope="module")
def vae():
    return fill(codec.CogVideoXVAE(codec.CogVideoXVAEConfig.of(metadata("cogvideox_vae", "shapes"))))


def released(name):
    """Every tensor of a released transformer, by key."""
    said = MANIFESTS["transformers"][name]
    blocks = {key.replace(BLOCK, f"transformer_blocks.{i}."): shape for i in range(said["blocks"]) for key, shape in said["block"].items()}
    return {key: tuple(shape) for key, shape in {**blocks, **said["others"]}.items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_released_transformer_has_the_published_tensors(name):
    manifest = released(name)
    assert configs.CogVideoXConfig.of(manifest) == RELEASED[name]
    model = CogVideoX(RELEASED[name], device="meta")
    assert manifest_of(model) == manifest
    inputs = example(RELEASED[name], (1, 16, 2, 60, 90), 226, torch.float32, "meta")
    assert model.to(torch.float32)(**inputs).shape == (1, 16, 2, 60, 90)


@pytest.mark.parametrize("name", NAMES)
def test_other_layouts_become_the_published_one(name):
    manifest = released(name)
    for each in (layout.SAT, layout.HOST):
        file = each.manifest(manifest)
        assert each.mark in file and layout.config_of(file) == RELEASED[name]
        assert len(file) == SAT_TENSORS.get(name, len(file)) or each is layout.HOST
        found = [pair for key, shape in file.items() for pair in each.convert(key, torch.empty(shape, device="meta"), None)]
        assert {key: tuple(tensor.shape) for key, tensor in found} == manifest


def test_rows_of_sat_files_go_where_they_belong():
    rows = torch.arange(24.0)
    (q, _), (k, key_rows), (v, _) = layout.convert("transformer.layers.7.attention.query_key_value.bias", rows)
    assert (q, k, v) == tuple(f"transformer_blocks.7.attn1.to_{part}.bias" for part in "qkv") and key_rows[0] == 8
    (first, one), (second, two) = layout.convert("mixins.adaln_layer.adaLN_modulations.3.1.weight", rows)
    assert (first, second) == tuple(f"transformer_blocks.3.norm{n}.linear.weight" for n in (1, 2))
    assert one.tolist() == [*range(6), *range(12, 18)] and two.tolist() == [*range(6, 12), *range(18, 24)]
    assert layout.convert("mixins.pos_embed.freqs_sin", rows) == []
    assert layout.convert("mixins.pos_embed.pos_embedding", rows)[0][0] == "patch_embed.pos_embedding"


@pytest.mark.parametrize("channels", [33, 48])
def test_models_of_other_projects_are_named(channels):
    shapes = {**released("5b"), "patch_embed.proj.weight": (3072, channels, 2, 2)}
    with pytest.raises(CheckpointError, match=f"{channels} input channels, as other projects' models have"):
        configs.CogVideoXConfig.of(shapes)


def test_the_released_vae_has_the_published_tensors():
    manifest = {key: tuple(shape) for key, shape in MANIFESTS["vae"].items()}
    assert codec.CogVideoXVAEConfig.of(manifest) == codec.COGVIDEOX_VAE
    assert manifest_of(codec.CogVideoXVAE(codec.COGVIDEOX_VAE, device="meta")) == manifest
    file = codec.SAT.manifest(manifest)
    assert (
        codec.SAT.mark in file
        and "decoder.up.3.block.0.conv1.conv.weight" in file
        and codec.CogVideoXVAEConfig.of(file) == codec.COGVIDEOX_VAE
    )
    assert {name: shape for key, shape in file.items() for name, _ in codec.SAT.convert(key, None, None)} == manifest
    assert file["decoder.up.3.block.0.conv1.conv.weight"] == manifest["decoder.up_blocks.0.resnets.0.conv1.conv.weight"]


@pytest.mark.parametrize("grid,height,width", [
    ((1, 30, 45), (0, 1, 29), (0, 1, 44)), ((1, 32, 48), (0, 0.9375, 29.0625), (0, 0.9375, 44.0625)),
    ((1, 48, 85), (2, 2.519947, 26.4375), (0, 0.529412, 44.470589)), ((1, 45, 30), (0, 0.666667, 29.333334), (12, 12.652874, 30.933332)),
])  # fmt: skip
def test_rotary_positions_of_the_1_0_models(grid, height, width):
    _, *sides = rotary_positions(configs.COGVIDEOX_5B, grid)
    for found, expected in zip(sides, (height, width), strict=True):
        assert [found[0].item(), found[1].item(), found[-1].item()] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("size,frames", [((3, 60, 90), 9), ((5, 60, 90), 17), ((5, 96, 170), 17)])
def test_what_a_decode_needs_is_known_without_it(size, frames):
    model = codec.CogVideoXVAE(codec.COGVIDEOX_VAE, dtype=torch.bfloat16, device="meta").requires_grad_(False)
    with torch.inference_mode(), AllocationCounter() as counter:
        assert model.decode(torch.empty(1, 16, *size, dtype=torch.bfloat16, device="meta")).shape[2] == frames
    assert counter.peak <= codec.CogVideoXVAE.decode_bytes(codec.COGVIDEOX_VAE, size, 2) < 1.2 * counter.peak


def test_a_decode_is_exact_then_parked_then_in_tiles(monkeypatch):
    monkeypatch.setattr(memory, "codec_of", lambda config: SimpleNamespace(build=codec.CogVideoXVAE))
    ways = []
    for free, ram in ((8, 64), (4, 64), (1, 64), (4, 4)):
        ladder = memory.Ladder(codec.COGVIDEOX_VAE, (1, 16, 13, 60, 90), 2, lambda free=free: free * 2**30, lambda ram=ram: ram * 2**30)
        ways.append(next(ladder.attempts("auto", Tiling())))
    assert [(way.tiling.tile_size, way.tiling.temporal_tile, way.tiling.parked) for way in ways] == [
        (0, 0, False),
        (0, 0, True),
        (224, 0, False),
        (240, 0, False),
    ]
    assert ways[0].line is None and "exactly, with activations in main memory" in ways[1].line
    for way in ways[2:]:
        assert "Decoding in spatial tiles of" in way.line and "differ slightly from an exact decode" in way.line
    assert all("whole pictures need 6.27 GiB" in way.line for way in ways[1:])
    assert "(1.14 GiB would do with 5.45 GiB of free main memory)" in ways[3].line and "would do" not in ways[2].line


def test_needs_of_the_released_sizes():
    needs = {size: codec.CogVideoXVAE.decode_bytes(codec.COGVIDEOX_VAE, size, 2) / 2**30 for size in ((13, 60, 90), (21, 96, 170))}
    parked = [codec.CogVideoXVAE.decode_bytes(codec.COGVIDEOX_VAE, size, 2, parked=True) / 2**30 for size in needs]
    assert [*needs.values(), *parked] == pytest.approx([5.5, 16.8, 1.0, 3.0], abs=0.3)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_one_prediction(golden, relative_error, case):
    said = CASES[case]
    model = small(said["network"])
    taken = 32 if model.config.takes_picture else 16
    x, context = numbers((1, taken, *said["size"]), f"{case}.x"), numbers((1, said["rows"], 24), f"{case}.context")
    noisy, cond = (x, None) if taken == 16 else x.chunk(2, dim=1)
    given = x.clone(), context.clone()
    found = model(noisy, torch.tensor([said["timestep"]]), context=context, cond=cond)
    assert found.shape == noisy.shape and torch.equal(given[0], x) and torch.equal(given[1], context)  # nothing given is written to
    assert relative_error(sample(found), golden("cogvideox")[0][case]) < TOLERANCE


@pytest.mark.parametrize("frames", [1, 5, 9, 49, 81])
@torch.no_grad()
def test_encode(vae, golden, relative_error, frames):
    found = vae.encode(numbers((1, 3, frames, 24, 16), f"encode.{frames}") / 2).values
    assert found.shape == (1, 32, (frames + 3) // 4, 3, 2)
    assert relative_error(sample(found), golden("cogvideox_vae")[0][f"encode.{frames}"]) < TOLERANCE


@pytest.mark.parametrize("frames", [1, 3, 13, 21, 41])
@torch.no_grad()
def test_decode(vae, golden, relative_error, frames):
    latents = numbers((1, 16, frames, 2, 3), f"decode.{frames}")
    found = vae.decode(latents)
    assert found.shape == (1, 3, 4 * frames - 3, 16, 24)
    assert relative_error(sample(found), golden("cogvideox_vae")[0][f"decode.{frames}"]) < TOLERANCE


@torch.no_grad()
def test_working_on_parts_and_parking_change_no_frame(vae, relative_error, monkeypatch):
    latents = numbers((2, 16, 5, 4, 3), "parts")
    whole = vae.decode(latents)
    assert torch.equal(vae.decode(latents, home=torch.device("cpu")), whole)
    assert relative_error(vae.decode(latents[1:]), whole[1:]) < TOLERANCE
    for elements in (1, 20_000):
        monkeypatch.setattr(codec, "PART_ELEMENTS_CPU", elements)
        assert relative_error(vae.decode(latents), whole) < TOLERANCE


@torch.no_grad()
def test_spatial_tiles_are_blended(vae):
    latents = numbers((1, 16, 3, 12, 10), "tiles")
    found = tiled_decode(vae.decode, latents, Tiling(tile_size=64), grid=vae.config.grid)
    assert found.shape == (1, 3, 9, 96, 80)
    assert torch.equal(found[..., :40, :40], vae.decode(latents[..., :8, :8])[..., :40, :40])


@pytest.mark.parametrize("shift", [1, 3])
def test_the_noise_of_every_timestep(golden, shift):
    found = sampling.training_angles(float(shift))
    assert torch.allclose(found.cos() ** 2, golden("cogvideox_schedules")[0][f"alphas.{shift}"], rtol=1e-9, atol=1e-15)
    assert found[-1] == torch.pi / 2


def walk(solver, schedule, steps):
    count = 0

    def draw(x):
        nonlocal count
        count += 1
        return numbers(x.shape, f"walk.{steps}.{count}")

    def predict(x, step):
        return torch.sin(3 * x + schedule.timesteps[step] / 100)

    solver = sampling.ddim if solver == "ddim" else sampling.DPM(draw)
    return run(predict, numbers((8,), "walk"), schedule, sampling.VPrediction(), solver), count


@pytest.mark.parametrize("shift", [1, 3])
@pytest.mark.parametrize("solver", ["ddim", "dpm"])
def test_solvers_equal_diffusers(golden, relative_error, solver, shift):
    expected = golden("cogvideox_schedules")[0][f"{solver}.{shift}"]
    for steps in range(10, 61):
        parity, own = (sampling.v_schedule(steps, float(shift), parity) for parity in (True, False))
        assert parity.timesteps.tolist() == TIMES[str(steps)] == own.timesteps.tolist()
        assert own.points[-1] == 0
        found, draws = walk(solver, parity, steps)
        assert relative_error(found, expected[steps - 10]) < TOLERANCE, steps
        assert solver == "ddim" or draws == DRAWS[str(steps)]
        if 1000 % steps == 0:
            assert torch.equal(walk(solver, own, steps)[0], found)


def test_every_count_ends_at_the_clean_picture():
    process, clean = sampling.VPrediction(), numbers((8,), "clean")
    for steps in (1, 2, 7, 48, 60, 999, 1000):
        schedule = sampling.v_schedule(steps, 1.0)

        def predict(x, step, points=schedule.points):
            return process.prediction(x, clean, points[step])

        for solver in (sampling.ddim, sampling.DPM(torch.randn_like)):
            found = run(predict, numbers((8,), "walk"), schedule, process, solver)
            assert torch.allclose(found, clean, atol=1e-5), steps
    with pytest.raises(OpenSoraError, match="steps=0 is not between 1 and 1000"):
        sampling.v_schedule(0, 1.0)


def test_the_process_is_its_own_inverse():
    process, (clean, noise) = sampling.VPrediction(), (numbers((8,), name) for name in ("clean", "noise"))
    for point in (0.1, 0.9, 1.5):
        x = process.noised(clean, noise, point)
        v = process.prediction(x, clean, point)
        assert torch.allclose(process.denoised(x, v, point), clean, atol=1e-5)
        assert torch.allclose(x + 1e-3 * process.slope(x, v, point), process.noised(clean, noise, point + 1e-3), atol=1e-5)


def test_dpm_draws_on_from_the_seed():
    drawn = sampling.dpm([5]).draw(torch.zeros(1, 2, 3, 4, 4))
    generator = torch.Generator().manual_seed(5)
    torch.randn((3, 2, 4, 4), generator=generator)
    assert torch.equal(drawn[0], torch.randn((3, 2, 4, 4), generator=generator).transpose(0, 1))


def test_dynamic_guidance_of_the_released_code_and_of_its_formula():
    schedule = sampling.v_schedule(50, 1.0)
    scales = {
        curve: [Guidance(6, 1, False, curve=curve).at_step(step, 50, 1, None, schedule.timesteps[step].item()).text for step in range(50)]
        for curve in ("auto", "constant", "released", "by index")
    }
    assert scales["auto"] == scales["constant"] == [6] * 50
    assert scales["released"][:10] == pytest.approx(
        [2.2915, 2.5435, 6.9744, 6.4204, 2.7881, 4.2719, 1.0376, 4.1704, 1.6180, 6.9831], abs=1e-4
    )
    assert [scales["by index"][step] for step in (20, 25, 34, 44, 49)] == pytest.approx([1.0016, 1.0144, 1.3076, 4.2610, 6.8644], abs=1e-4)


def test_a_video_made_over_keeps_the_last_steps():
    for parity in (True, False):
        schedule = last_steps(sampling.v_schedule(50, 1.0, parity), 0.8)
        assert schedule.num_steps == 40 and schedule.timesteps[0] == 799 and len(schedule.points) == 41
    for strength in (0, 1.2, 0.01):
        with pytest.raises(OpenSoraError, match="leaves none"):
            last_steps(sampling.v_schedule(50, 1.0), strength)


def test_a_lora_of_sat_and_of_kohya_has_pefts_names():
    sat = "model.diffusion_model.transformer.layers.11.attention."
    found = [layout.lora_key(f"{sat}query_key_value.matrix_{side}.{part}") for part in range(3) for side in "AB"]
    assert found == [f"transformer_blocks.11.attn1.to_{part}.lora_{side}.weight" for part in "qkv" for side in "AB"]
    assert layout.lora_key(f"{sat}dense.matrix_B.0") == "transformer_blocks.11.attn1.to_out.0.lora_B.weight"
    assert layout.lora_key("lora_unet__transformer_blocks_0_attn1_to_q.alpha") == "lora_unet_transformer_blocks_0_attn1_to_q.alpha"
    peft = "transformer.transformer_blocks.0.attn1.to_k.lora_A.weight"
    assert layout.lora_key(peft) == peft


@torch.no_grad()
def test_a_lora_without_a_scale_is_added_as_it_is(golden, relative_error):
    model, said = small("5b"), CASES["5b.1"]
    layers = {name: module for name, module in model.named_modules() if "attn1.to_" in name and hasattr(module, "weight")}
    for name, module in layers.items():
        down, up = (numbers(shape, f"{name}.{side}") / 4 for side, shape in (("A", (4, 48)), ("B", (48, 4))))
        module.weight += up @ down
    x, context = numbers((1, 16, *said["size"]), "5b.1.x"), numbers((1, said["rows"], 24), "5b.1.context")
    expected = golden("cogvideox")[0]
    v = sample(model(x, torch.tensor([said["timestep"]]), context))
    assert relative_error(v, expected["lora"]) < TOLERANCE < relative_error(v, expected["5b.1"])


@pytest.mark.parametrize("name", RUNS)
@torch.no_grad()
def test_a_whole_run(vae, golden, relative_error, name):
    said = RUNS[name]
    model, (height, width), frames = small(said["network"]), said["size"], (said["frames"] - 1) // 4 + 1
    padded = -frames % model.config.patch[0]
    x, count, cond = numbers((1, frames + padded, 16, height // 8, width // 8), f"{name}.noise").transpose(1, 2), 0, None

    def draw(like, is_clip=True):
        nonlocal count
        count += 1
        return (
            numbers(like.transpose(1, 2).shape, f"run.{name}.{count}").transpose(1, 2)
            if is_clip
            else numbers(like.shape, f"run.{name}.{count}")
        )

    if model.config.takes_picture:
        mean, logvar = vae.encode(numbers((1, 3, 1, height, width), f"{name}.image").clamp(-1, 1)).moments()
        cond = torch.zeros_like(x)
        cond[:, :, :1] = mean + torch.exp(0.5 * logvar) * draw(mean, is_clip=False)
        cond *= 1 / said["scale"] if name == "1.5_5b_i2v" else said["scale"]  # what diffusers does; ours is for the family to say
    prompt, negative = (numbers((1, 226, 24), f"{name}.{word}") for word in ("prompt", "negative"))
    schedule = sampling.v_schedule(said["steps"], said["shift"], parity=True)

    def predict(x, step):
        guidance = Guidance(6.0, 1.0, False, curve="released" if said["dynamic"] else "constant")
        scale = guidance.at_step(step, said["steps"], frames, None, schedule.timesteps[step].item()).text
        v, u = (model(x, schedule.timesteps[step].expand(1), context, cond) for context in (prompt, negative))
        return u + scale * (v - u)

    found = run(predict, x, schedule, sampling.VPrediction(), sampling.ddim if said["solver"] == "ddim" else sampling.DPM(draw))[
        :, :, padded:
    ]
    tensors = golden("cogvideox_runs")[0]
    assert count == said["draws"]
    assert relative_error(sample(found), tensors[f"{name}.latents"]) < 2e-4
    assert relative_error(sample(vae.decode(found[..., :6, :10] / said["scale"])), tensors[f"{name}.pixels"]) < 2e-4


def test_what_cannot_be_is_said():
    model = small("5b_i2v")
    latents, text, t = torch.zeros(1, 16, 3, 60, 90), torch.zeros(1, 226, 24), torch.tensor([500])
    for x, cond, words in (
        (latents, None, "makes a video from a picture"), (latents[..., :58, :], latents[..., :58, :], "up to 13 latent frames of 60x90"),
        (torch.zeros(1, 16, 3, 61, 90), latents, "multiples of 1, 2, 2"),
    ):  # fmt: skip
        with pytest.raises(OpenSoraError, match=words):
            model(x, t, text, cond)
    with pytest.raises(OpenSoraError, match="from text alone"):
        small("1.5_5b")(torch.zeros(1, 16, 2, 4, 4), t, text, torch.zeros(1, 16, 2, 4, 4))
    with pytest.raises(OpenSoraError, match="Give 1 or 3.*odd number"):
        codec.CogVideoXVAE(codec.COGVIDEOX_VAE, device="meta").decode(torch.empty(1, 16, 2, 4, 4, device="meta"))
