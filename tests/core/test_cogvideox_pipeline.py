"""CogVideoX as a person uses it: folders and files as published, whole runs, every setting, and what is refused."""

import numpy
import pytest
import torch
from safetensors.torch import save_file

from opensora_core.cli import main
from opensora_core.codecs import cogvideox as codec
from opensora_core.errors import CheckpointError, OpenSoraError
from opensora_core.families import table
from opensora_core.families.cogvideox import picture_factor
from opensora_core.memory.estimate import Memory, Request, Settings
from opensora_core.memory.footprint import ModelSizes, TextSizes
from opensora_core.memory.preflight import preflight
from opensora_core.memory.residency import GIB
from opensora_core.networks.cogvideox import layout
from opensora_core.pipeline import OpenSoraPipeline
from opensora_core.run.request import EncodedPrompt, SamplingOptions
from opensora_core.sampling import solvers, v_prediction
from opensora_core.sampling.guidance import Guidance
from opensora_core.sampling.run import TextCondition
from tests.golden import cogvideox_files as files
from tests.golden.formula import numbers, sample

NAMES = ("2b", "5b", "5b_i2v", "1.5_5b", "1.5_5b_i2v")
KINDS = dict(zip(NAMES, (row.kind for row in table.FAMILIES if row.kind.startswith("cogvideox")), strict=True))
RUNS = files.shapes("cogvideox_runs", "cases")
SIZE = {"height": 48, "width": 80}
SHORT = {**SIZE, "num_frames": 9, "num_inference_steps": 2, "seed": 3}
PICTURE = numpy.linspace(0, 255, 48 * 80 * 3).reshape(48, 80, 3).astype(numpy.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = {}

    def of(name):
        if name not in made:
            made[name] = files.write(tmp_path_factory.mktemp("cogvideox") / name, name)
        return made[name]

    return of


@pytest.fixture(scope="module")
def pipe(folder):
    made = {}

    def of(name):
        if name not in made:
            made[name] = OpenSoraPipeline.from_pretrained(folder(name))
            made[name].keep_loaded = made[name].keep_encoded = True
        return made[name]

    return of


def row(name):
    return next(row for row in table.FAMILIES if row.kind == KINDS[name])


@pytest.mark.parametrize("name", NAMES)
def test_a_published_folder_is_known_and_has_its_own_numbers(folder, name):
    pipe = OpenSoraPipeline.from_pretrained(folder(name))
    assert pipe.files.family is row(name) and pipe.files.clip is None
    pipe.check_files()
    usual = pipe.files.usual
    assert (usual.num_steps, usual.scales) == (50, (6.0,))
    wanted = (768, 1360, 81, 16) if name.startswith("1.5") else (480, 720, 49, 8)
    assert (usual.height, usual.width, usual.num_frames, usual.fps) == wanted
    assert pipe.latent_scale == (1.15258426 if name == "2b" else 0.7)


@pytest.mark.parametrize("name", ["2b", "5b", "5b_i2v", "1.5_5b_i2v"])
@torch.no_grad()
def test_a_whole_run_gives_diffusers_numbers(pipe, golden, relative_error, monkeypatch, name):
    said, count = RUNS[name], int(name == "5b_i2v")  # whose picture's posterior is the first draw
    (height, width), model = said["size"], pipe(said["network"])
    frames = (said["frames"] - 1) // 4 + 1
    padded = -frames % model.files.grid.patch_time

    def draw(like):
        nonlocal count
        count += 1
        return numbers(like.transpose(1, 2).shape, f"run.{name}.{count}").transpose(1, 2)

    start = numbers((1, frames + padded, 16, height // 8, width // 8), f"{name}.noise").transpose(1, 2)
    recipe = row(said["network"]).sampling
    monkeypatch.setitem(recipe.as_diffusers.__dict__, "noise", lambda *asked: start.clone())
    monkeypatch.setitem(solvers.SOLVERS, "dpm", lambda seeds, before: v_prediction.DPM(draw))
    given = {}
    if said["network"].endswith("i2v"):
        mean, logvar = files.vae().encode(numbers((1, 3, 1, height, width), f"{name}.image").clamp(-1, 1)).moments()
        given["image"] = said["scale"] * (mean + torch.exp(0.5 * logvar) * numbers(mean.shape, f"run.{name}.1"))
    sides = [{"context": numbers((1, 226, files.WIDTH), f"{name}.{word}")} for word in ("prompt", "negative")]
    curve = "released" if said["dynamic"] else "constant"
    options = SamplingOptions(solver=said["solver"], guidance_curve=curve, parity="diffusers")
    how = {"num_frames": said["frames"], "num_inference_steps": said["steps"], "options": options, "seed": 0}
    found = model(EncodedPrompt("", TextCondition(*sides)), height=height, width=width, **how, **given, latents_only=name == "5b_i2v")
    expected = golden("cogvideox_runs")[0]
    assert relative_error(sample(found.latents), expected[f"{name}.latents"]) < 2e-4
    if name == "5b_i2v":  # too large to be decoded for a test
        return
    assert len(found.frames[0]) == said["frames"] and found.frames[0][0].shape == (height, width, 3)
    pixels = model.decode(found.latents[..., :6, :10])[0]
    wanted = files.vae().decode(found.latents[..., :6, :10] / said["scale"]).permute(0, 2, 3, 4, 1)[0]
    assert numpy.abs(numpy.stack(pixels) / 127.5 - 1 - wanted.clamp(-1, 1).numpy()).max() < 0.01


def test_a_seed_means_what_it_means_to_diffusers(pipe, golden, relative_error):
    """From picture to latents with one stream of noise: the picture's posterior first, then the run's beginning, then DPM's steps."""
    said = files.shapes("cogvideox_seeded", "case")
    picture = (numbers((48, 80, 3), "seeded.image").clamp(-1, 1).add(1).mul(127.5).round()).to(torch.uint8).numpy()
    sides = [{"context": numbers((1, 226, files.WIDTH), f"seeded.{word}")} for word in ("prompt", "negative")]
    options = SamplingOptions(solver="dpm", guidance_curve="released", parity="diffusers")
    how = {**SIZE, "num_frames": said["frames"], "num_inference_steps": said["steps"], "seed": said["seed"], "image": picture}
    found = pipe(said["network"])(EncodedPrompt("", TextCondition(*sides)), **how, options=options, latents_only=True).latents
    assert relative_error(sample(found), golden("cogvideox_seeded")[0]["latents"]) < 2e-4


@pytest.mark.parametrize("name", ["2b", "5b"])
def test_what_a_call_can_ask_for(pipe, name):
    model = pipe(name)
    first = model("a red kite", **SHORT)
    assert (
        first.latents.shape == (1, 16, 3, 6, 10)
        and (first.forwards, first.forwards_saved) == (4, 0)
        and first.notes
        and "trained on 720x480" in first.notes[0]
    )
    again = model("a red kite", **{**SHORT, "seed": None}, generator=torch.Generator().manual_seed(3))
    assert torch.equal(first.latents, again.latents) and again.seeds == [3]
    own = row(name).sampling.solvers
    assert own == (("ddim", "dpm") if name == "2b" else ("dpm", "ddim"))
    made = {(): first.latents}
    for settings in ({"solver": own[1]}, {"guidance_curve": "by index"}, {"unconditional": "zero"}, {"shift": 2.0}):
        made[tuple(settings)] = model("a red kite", **SHORT, options=SamplingOptions(**settings)).latents
        assert torch.isfinite(made[tuple(settings)]).all()
    made["negative"] = model("a red kite", negative_prompt="raining", **SHORT).latents
    values = list(made.values())
    assert all(not torch.equal(one, other) for index, one in enumerate(values) for other in values[:index])
    curve = "constant" if name == "2b" else "released"
    assert torch.equal(model("a red kite", **SHORT, options=SamplingOptions(guidance_curve=curve)).latents, first.latents)


def test_a_scale_of_one_or_less_is_no_guidance_whatever_the_curve(pipe):
    one, less, more = (pipe("5b")("a red kite", **SHORT, guidance_scale=scale) for scale in (1.0, 0.5, 1.5))
    assert (one.forwards, less.forwards, more.forwards) == (2, 2, 4) and torch.equal(one.latents, less.latents)


def test_the_2b_runs_in_the_type_that_it_is_published_in(folder, pipe, relative_error):
    model = OpenSoraPipeline.from_pretrained(folder("2b"), torch_dtype=torch.float16).enable_model_cpu_offload("cpu")
    found, plain = (each("a red kite", **SHORT).latents for each in (model, pipe("2b")))
    assert model.dtype == torch.float16 and 1e-6 < relative_error(found, plain) < 1e-2
    with pytest.raises(OpenSoraError, match="float16 is not one the networks are run in"):
        OpenSoraPipeline.from_pretrained(folder("5b"), torch_dtype=torch.float16)


def test_a_batch_is_what_its_seeds_give_alone(pipe):
    model, steps = pipe("5b"), []
    both = model("a red kite", **SHORT, num_videos_per_prompt=2, callback=lambda *told: steps.append(told[:2]))
    alone = model("a red kite", **{**SHORT, "seed": 4})
    assert torch.allclose(both.latents[1], alone.latents[0], atol=1e-4) and both.seeds == [3, 4] and steps == [(1, 2), (2, 2)]


def test_a_clip_is_made_over(pipe):
    model = pipe("2b")
    clip = [PICTURE] * 9
    asked = {**SHORT, "num_inference_steps": 10, "video": clip}
    near, far = (model("a red kite", **asked, image_strength=strength) for strength in (0.9, 0.2))
    assert (near.forwards, far.forwards) == (2, 16)
    own = model._networks.video_vae.encode(torch.from_numpy(numpy.stack(clip)).float() / 255, [None])
    assert (near.latents - own).abs().mean() < (far.latents - own).abs().mean()
    for strength, words in ((1.0, "a strength below 1, such as the published 0.2"), (0.99, "leaves none")):
        with pytest.raises(OpenSoraError, match=words):
            model("a", **asked, image_strength=strength)
    with pytest.raises(OpenSoraError, match="Use a longer clip.*takes 9"):
        model("a", **{**asked, "video": clip[:5]}, image_strength=0.2)


def test_a_picture_model_follows_its_picture_and_goes_on_from_its_last_frame(pipe):
    model = pipe("1.5_5b_i2v")
    asked = {**SHORT, "num_frames": 17, "image": PICTURE}
    first = model("a red kite", **asked)
    assert first.latents.shape[2] == 5 and len(first.frames[0]) == 17
    other = model("a red kite", **asked, options=SamplingOptions(condition_scale="diffusers"))
    assert not torch.equal(first.latents, other.latents)
    told = []
    longer = model.extend(first, segments=2, num_inference_steps=1, on_segment=lambda done, latents: told.append(latents.shape[2]))
    assert told == [9, 13] and len(longer.frames[0]) == 49 and torch.equal(longer.latents[:, :, :5], first.latents)
    with pytest.raises(OpenSoraError, match="from the last frame alone"):
        model.extend(first, context_frames=5)
    with pytest.raises(OpenSoraError, match="goes on from no video"):
        pipe("1.5_5b").extend(first)


def test_what_a_picture_is_multiplied_by():
    first, second = row("5b_i2v").released, row("1.5_5b_i2v").released
    assert [picture_factor(first, word) for word in ("auto", "1.0", "diffusers")] == [0.7, 1.0, 0.7]
    assert [picture_factor(second, word) for word in ("auto", "1.0", "diffusers")] == [1.0, 1.0, pytest.approx(1 / 0.7)]


@pytest.mark.parametrize("name,asked,words", [
    ("2b", {"num_frames": 81}, "Use at most 49.*longer than this model can make"),
    ("2b", {"num_frames": 13}, "Use 9 or 17.*not 8k.1"),
    ("1.5_5b", {"num_frames": 57}, "Use 49 or 65.*not 16k.1"),
    ("2b", {"height": 50}, "not both multiples of 16"),
    ("2b", {"image": PICTURE}, "Leave out image.*makes videos of a prompt and video"),
    ("5b_i2v", {"height": 480, "width": 720}, "Give a picture.*makes videos of a picture"),
    ("5b_i2v", {"image": PICTURE}, "learned positions for 720x480 pixels .* alone; 80x48 cannot"),
    ("1.5_5b_i2v", {"image": PICTURE, "num_frames": 17, "last_image": PICTURE}, "Leave out last_image"),
    ("1.5_5b_i2v", {"image": PICTURE, "num_frames": 17, "image_strength": 0.5}, "sees its picture at every step"),
    ("2b", {"options": SamplingOptions(solver="euler")}, "Use ddim or dpm, or auto"),
    ("2b", {"num_inference_steps": 1001}, "Use at most 1000"),
    ("2b", {"generator": torch.Generator()}, "a seed and a generator are both given"),
    ("2b", {"negative_prompt": "rain", "options": SamplingOptions(unconditional="zero")}, "Leave it out.*no negative prompt"),
])  # fmt: skip
def test_what_cannot_be_is_said_before_any_weight_is_read(pipe, name, asked, words):
    with pytest.raises(OpenSoraError, match=words):
        pipe(name)("a", **{**SHORT, **asked})


def test_open_sora_is_not_sampled_with_dpm(tiny_checkpoint):
    with pytest.raises(OpenSoraError, match="Use euler, or auto"):
        OpenSoraPipeline.from_pretrained(tiny_checkpoint)("a", options=SamplingOptions(solver="dpm"))


@pytest.mark.parametrize("form", ["single", "sat", "host"])
def test_files_of_every_layout_make_the_same_video(folder, tmp_path, pipe, form):
    state, vae = files.network("1.5_5b").state_dict(), files.vae().state_dict()
    dit, codec_file = tmp_path / "dit.safetensors", folder("1.5_5b") / "vae"
    if form == "sat":
        dit, codec_file = tmp_path / "mp_rank_00_model_states.pt", tmp_path / "3d-vae.pt"
        torch.save(files.sat(state), dit)
        torch.save({"state_dict": {**files.in_layout(vae, codec.SAT), "loss.logvar": torch.zeros(())}}, codec_file)
    elif form == "host":
        save_file(files.in_layout(state, layout.HOST), dit)
    else:
        save_file(state, dit)
    text = folder("1.5_5b")
    model = OpenSoraPipeline.from_files(dit=dit, vae=codec_file, t5=text / "text_encoder", tokenizers=text / "tokenizer")
    asked = {**SHORT, "num_frames": 17}
    # Rounding differs with where a file's tensors begin in memory.
    assert torch.allclose(model("a red kite", **asked).latents, pipe("1.5_5b")("a red kite", **asked).latents, atol=1e-4)


def test_what_is_wrong_with_files_is_said(folder, tmp_path):
    import shutil

    broken = shutil.copytree(folder("5b"), tmp_path / "broken")
    next((broken / "transformer").glob("*00002-of*")).unlink()
    with pytest.raises(CheckpointError, match="lacks 1 of its 2 weight files"):
        OpenSoraPipeline.from_pretrained(broken)("a", **SHORT)
    state = files.network("1.5_5b").state_dict()
    state["patch_embed.proj.weight"] = torch.zeros(32, 48 * 8)
    save_file(state, tmp_path / "fun.safetensors")
    text = folder("5b")
    with pytest.raises(CheckpointError, match="48 input channels, as other projects' models have"):
        OpenSoraPipeline.from_files(dit=tmp_path / "fun.safetensors", vae=text / "vae", t5=text / "text_encoder")("a")


@pytest.mark.parametrize("form", ["peft", "sat", "kohya"])
def test_loras_of_every_form_change_the_model_alike(folder, tmp_path, form):
    layers = [f"transformer_blocks.{index}.attn1.to_{part}" for index in range(2) for part in "qkv"]
    pairs = {name: [numbers(shape, f"{name}.{side}") / 4 for side, shape in (("A", (4, 48)), ("B", (48, 4)))] for name in layers}
    made = {}
    for name, (down, up) in pairs.items():
        index, part = name.split(".")[1], name[-1]
        if form == "peft":
            made |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
        elif form == "sat":
            stem = f"model.diffusion_model.transformer.layers.{index}.attention.query_key_value.matrix_"
            made |= {f"{stem}A.{'qkv'.index(part)}": down, f"{stem}B.{'qkv'.index(part)}": up}
        else:
            stem = f"lora_unet__{name.replace('.', '_')}"
            made |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(4.0)}
    save_file({key: tensor.contiguous() for key, tensor in made.items()}, tmp_path / "lora.safetensors")
    model = OpenSoraPipeline.from_pretrained(folder("5b")).load_lora(tmp_path / "lora.safetensors", 0.5)
    with model._networks.transformer.at_work() as network:
        found = network.get_submodule(layers[0]).weight
    down, up = pairs[layers[0]]
    assert torch.allclose(found, files.network("5b").get_submodule(layers[0]).weight + 0.5 * up @ down, atol=1e-5)
    if form == "peft":
        with pytest.raises(CheckpointError, match="another model|no key matches|none of its"):
            OpenSoraPipeline.from_pretrained(folder("2b")).load_lora(tmp_path / "lora.safetensors")


@pytest.mark.parametrize("mode", ["auto", "minimal"])
def test_offload_and_quantised_weights(folder, pipe, mode, relative_error):
    plain = pipe("5b")("a red kite", **SHORT).latents
    model = OpenSoraPipeline.from_pretrained(folder("5b"))
    model = model.enable_model_cpu_offload("cpu") if mode == "auto" else model.enable_offload(mode, device="cpu")
    model.enable_attention_slicing()
    model.vae.enable_slicing()
    assert relative_error(model("a red kite", **SHORT).latents, plain) < 1e-4
    coarse = OpenSoraPipeline.from_pretrained(folder("5b"), precision="fp8_e4m3fn")("a red kite", **SHORT).latents
    assert 1e-4 < relative_error(coarse, plain) < 0.5


def test_tiles_are_said_aloud(pipe):
    model = OpenSoraPipeline(pipe("5b").files)
    latents = torch.randn(1, 16, 3, 40, 40)
    whole = model.decode(latents)[0][0]
    model.vae.enable_tiling()
    tiled = model.decode(latents)[0][0]
    assert whole.shape == tiled.shape and not numpy.array_equal(whole, tiled)
    model = OpenSoraPipeline(pipe("5b").files)
    model.vae.policy = "low_memory"
    told = []
    with model._networks.video_vae.decoder(tuple(latents.shape), told.append) as decode:
        decode(latents)
    assert "spatial tiles of 240 pixels" in told[0] and "differ slightly from an exact decode" in told[0]


def plan(name, settings, gib):
    family = row(name)
    usual, text = family.usual, TextSizes(clip=None, length=226)
    model = ModelSizes(family.released, table.usual_codec(family.released), text, stored=settings.precision, name=name)
    guidance = family.sampling.guidance(Guidance(6.0), "dpm")
    request = Request(
        usual.height,
        usual.width,
        usual.num_frames,
        50,
        grid=family.grid,
        has_given=bool(family.requires),
        settings=settings,
        guidance=guidance,
    )
    return preflight(request, model, Memory("cuda", "a card", gib * GIB, gib * GIB, 64 * GIB, 64 * GIB))


def test_plans_of_the_released_sizes():
    small = plan("2b", Settings("fp8_e4m3fn"), 6)
    assert small.asked.fits and small.request.forwards == 100, small.report()
    large = plan("1.5_5b", Settings("int8"), 12)
    assert large.asked.fits, large.report()
    for found, whole in ((small, "6.27"), (large, "19.16")):
        assert "decoded exactly, with activations in main memory: slower" in found.report() and f"need {whole} GiB" in found.report()


def test_the_command_line(folder, tmp_path, capsys):
    out = tmp_path / "clip.mp4"
    small = ["--height", "48", "--width", "80", "--num-frames", "9", "--num-steps", "2", "--seed", "1", "--device", "cpu"]
    words = ["--solver", "dpm", "--guidance-curve", "by index", "--unconditional", "zero", "--parity", "diffusers"]
    assert main(["generate", "--model", str(folder("2b")), "--prompt", "a red kite", "--out", str(out), *small, *words]) == 0
    assert out.exists()
    assert main(["inspect", str(folder("1.5_5b_i2v"))]) == 0
    text = capsys.readouterr().out
    assert "This folder has every part of CogVideoX 1.5-5B-I2V." in text
    main(["inspect", str(folder("1.5_5b_i2v") / "transformer")])
    assert "For CogVideoX 1.5-5B-I2V this folder lacks the video VAE, the T5 encoder." in capsys.readouterr().out
    assert "a CogVideoX transformer like 1.5-5B-I2V of other sizes" in text and "commercial use needs a registration" in text
    assert main(["generate", "--model", str(folder("2b")), "--prompt", "a", "--resolution", "768px", "--device", "cpu"]) == 2
    assert "Use 480p, or width and height: resolution='768px' is not known to this model" in capsys.readouterr().err
    assert main(["inspect", "--plan", str(folder("2b")), "--gpu-gib", "8"]) == 0
    assert "49 frames, 50 steps, text to video: 100 forwards" in capsys.readouterr().out
