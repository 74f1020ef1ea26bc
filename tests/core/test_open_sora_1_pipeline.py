"""Open-Sora 1.0 to 1.3 as a person uses them: folders as published, whole runs against the reference's, what is given, what is refused."""

from functools import partial

import numpy
import pytest
import torch
from PIL import Image

from opensora_core import cli
from opensora_core.checkpoint.detect import identify
from opensora_core.choices import AUTO
from opensora_core.codecs.picture import OLD_DIFFUSERS
from opensora_core.errors import CheckpointError, OpenSoraError
from opensora_core.families import open_sora_1, table
from opensora_core.memory.estimate import Memory, Request, Settings
from opensora_core.memory.footprint import ModelSizes, TextSizes
from opensora_core.memory.preflight import preflight
from opensora_core.memory.residency import GIB
from opensora_core.pipeline import OpenSoraPipeline
from opensora_core.run import calibrate, clip as walks
from opensora_core.run.files import ModelFiles
from opensora_core.run.request import EncodedPrompt, SamplingOptions
from opensora_core.sampling import masks, plan, run as sampling, solvers
from opensora_core.sampling.given import ImageCondition
from opensora_core.sampling.run import TextCondition
from opensora_core.sampling.schedule import pieces, quarters, sized_schedule
from tests.golden import open_sora_1_cases as cases, open_sora_1_files as files

VERSIONS = ("1.0", "1.1", "1.2", "1.3")
ROWS = {row.title.split()[2]: row for row in open_sora_1.FAMILIES}
MEASURES = {"1.2": pieces, "1.3": quarters}
SIZE = {"height": 40, "width": 56}
PICTURE = numpy.linspace(0, 255, 40 * 56 * 3).reshape(40, 56, 3).astype(numpy.uint8)
LENGTHS = {"1.0": 3, "1.1": 8, "1.2": 34, "1.3": 33}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = {}

    def of(version, is_golden=False):
        if (version, is_golden) not in made:
            place = tmp_path_factory.mktemp("open_sora_1") / f"{version}{is_golden}"
            made[version, is_golden] = files.write(place, version, is_golden)
        return made[version, is_golden]

    return of


@pytest.fixture(scope="module")
def pipe(folder):
    made = {}

    def of(version, is_golden=False):
        if (version, is_golden) not in made:
            made[version, is_golden] = one = OpenSoraPipeline.from_pretrained(folder(version, is_golden))
            one.keep_loaded = one.keep_encoded = True
        return made[version, is_golden]

    return of


def short(version, **more):
    size = {"height": 64, "width": 64} if version == "1.0" else SIZE
    return {**size, "num_frames": LENGTHS[version], "num_inference_steps": 2, "seed": 3, **more}


@pytest.mark.parametrize("version", VERSIONS)
def test_a_folder_of_the_guides_repositories_is_known(folder, version):
    model = OpenSoraPipeline.from_pretrained(folder(version))
    assert model.files.family is ROWS[version] and model.files.clip is None
    model.check_files()


@pytest.mark.parametrize("row", (*open_sora_1.FAMILIES, *open_sora_1.CODECS), ids=lambda row: row.kind)
def test_released_files_are_known_by_their_tensors(row):
    found = identify(row.manifest(row.released))
    assert (found.kind, found.title, found.config) == (row.kind, row.title, row.released)
    if row is open_sora_1.SD_VAE:
        older = identify(row.manifest(row.released, OLD_DIFFUSERS))
        assert older.kind == row.kind and older.layout is OLD_DIFFUSERS


def test_a_part_that_is_missing_is_named(tmp_path):
    (tmp_path / "hpcai-tech" / "OpenSora-STDiT-v3").mkdir(parents=True)
    with pytest.raises(OpenSoraError, match="holds OpenSora-STDiT-v3 and lacks OpenSora-VAE-v1.2 and t5-v1_1-xxl"):
        ModelFiles.in_folder(tmp_path)


def test_a_model_with_another_version_s_vae_is_one_sentence(folder):
    one, other = ModelFiles.in_folder(folder("1.2")), ModelFiles.in_folder(folder("1.3"))
    model = OpenSoraPipeline.from_files(dit=one.dit, vae=other.vae, t5=one.t5)
    with pytest.raises(CheckpointError, match="is the Open-Sora 1.3 VAE and .* works on the latents of the Open-Sora 1.2 VAE"):
        model.check_files()


# ------------------------------------------------------------------ whole runs


def prompt_of(version, row):
    mask = torch.tensor(cases.TEXT_MASK)[row : row + 1]
    prompt = {"context": cases.random(cases.TEXT, 2)[row : row + 1], "attention_mask": mask}
    return EncodedPrompt("", TextCondition(prompt, {"attention_mask": mask}))


def as_recorded(monkeypatch, recipe, version, row, draws):
    """The recorded noise, and sizes in fp32."""
    extent = cases.RUNS[version][0]
    noise = cases.random((2, cases.NETWORKS[version]["in_channels"], *extent), 7)

    class Recorded:
        """Noise of both rows at every step, of which the reference draws for both passes in 1.0 and 1.1."""

        def __init__(self, seeds, use):
            pass

        def __call__(self, like):
            rows = torch.cat((noise, noise)) if version in ("1.0", "1.1") else noise
            return draws(rows)[row : row + 1]

    monkeypatch.setitem(recipe.__dict__, "noise", lambda *asked: noise[row : row + 1].clone())
    for module in (sampling, solvers):
        monkeypatch.setattr(module, "StepNoise", Recorded)
    if version in MEASURES:
        whole = partial(sized_schedule, measure=MEASURES[version], dtype=torch.float32)
        monkeypatch.setitem(recipe.__dict__, "schedule", lambda config, extent, steps, shift, size: whole(size, steps))
    return noise


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("name", ["1.0", "1.1", "1.1_masked", "1.2", "1.2_masked", "1.3", "1.3_given"])
def test_a_whole_run_gives_the_reference_s_numbers(pipe, recorded, relative_error, monkeypatch, name, row):
    version, model = name[:3], pipe(name[:3], is_golden=True)
    extent, (height, width), frames, steps, scale = cases.RUNS[version]
    noise = as_recorded(monkeypatch, ROWS[version].sampling, version, row, cases.Draws())
    given = None
    if name.endswith("masked"):
        edit = torch.tensor(cases.EDITS[version])[row : row + 1]
        given = ImageCondition((edit < 1).float()[:, None, :, None, None].expand(-1, 1, *extent), noise[row : row + 1], edit=edit)
    if name.endswith("given"):
        mask = torch.zeros(1, 1, *extent)
        mask[:, :, [0, 4]] = 1
        given = ImageCondition(mask, cases.random(noise.shape, 8)[row : row + 1])
    monkeypatch.setattr("opensora_core.run.clip.encode_references", lambda *asked: given)
    found = model(
        prompt_of(version, row), height=height, width=width, num_frames=frames, num_inference_steps=steps, seed=0, guidance_scale=scale,
        latents_only=True,
    )  # fmt: skip
    assert relative_error(found.latents, recorded[f"run.{name}"][row : row + 1]) < 2e-4


@pytest.fixture(scope="module")
def recorded(golden):
    return golden("open_sora_1")[0]


# ------------------------------------------------------------------ what a call can ask for


def test_what_is_said_is_the_version_s_own(pipe):
    said = SamplingOptions(aesthetic_score=7, motion_score=3, camera_motion="pan left")
    asked = [("A Cat <b>here</b>", "", SamplingOptions()), ("a cat", "Blurry & bad", said)]
    usual, told = pipe("1.2").encode_prompts(asked)
    assert usual.text == "a cat here aesthetic score: 6.5."
    assert told.text == "a cat aesthetic score: 7.0. motion score: 3.0. camera motion: pan left."
    assert set(usual.condition.negative) == {"attention_mask"} and set(told.condition.negative) == {"attention_mask", "context"}
    assert usual.condition.positive["context"].shape[1] == 300 and not usual.condition.positive["attention_mask"].all()
    assert [one.text for one in pipe("1.3").encode_prompts(asked)] == [
        "a cat here", "a cat the aesthetic score is excellent. the motion strength is fair. camera motion: pan left.",
    ]  # fmt: skip
    assert pipe("1.1").encode_prompts(asked)[1].text == "a cat"
    with pytest.raises(OpenSoraError, match="aesthetic score=11 is not a number from 0 to 10"):
        pipe("1.2")("a cat", **short("1.2"), options=SamplingOptions(aesthetic_score=11), check_only=True)


@pytest.mark.parametrize("version", ["1.1", "1.2", "1.3"])
def test_frames_that_are_given(pipe, version, monkeypatch):
    model, conditions = pipe(version), []
    monkeypatch.setattr("opensora_core.run.clip.sample_latents", lambda networks, request, prompt, condition, *others: (conditions.append(condition), []))  # fmt: skip
    asked = {**short(version), "latents_only": True}
    latents = model.latent_frames(LENGTHS[version])
    ends = model("a cat", image=PICTURE, last_image=PICTURE, image_strength=0.75, **asked) and conditions.pop()
    assert ends.mask[0, 0, :, 0, 0].nonzero().flatten().tolist() == [0, latents - 1] and ends.use.strength == 0.75
    if version != "1.1":
        longer = {**asked, "num_frames": 51 if version == "1.2" else 49}
        clip = model("a cat", video=numpy.stack([PICTURE] * 40), **longer) and conditions.pop()
        assert clip.mask[0, 0, :, 0, 0].sum() == 10
    strategy = (
        model("a cat", references=[PICTURE, numpy.stack([PICTURE] * 40)], mask_strategy="0;0,1,2,-1,1,0.4", **asked) and conditions.pop()
    )
    assert strategy.edit[0, 0] == 0 and strategy.edit.flatten().unique().tolist() == pytest.approx([0, 0.4, 1])


def test_a_strength_holds_frames_for_that_share_of_the_time():
    mask = torch.zeros(1, 1, 5, 2, 2)
    mask[:, :, 0] = 1
    x, schedule = torch.zeros(1, 4, 5, 2, 2), sized_schedule((17, 16, 16), 4, pieces)
    given = ROWS["1.2"].sampling.given(ImageCondition(mask, x, masks.ReferenceUse(strength=0.75)), x, schedule, torch.float32)
    assert given.edit.tolist() == [[0.25, 1, 1, 1, 1]] and given.use.is_held


@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_a_full_plan_is_exact_to_the_bit(pipe, version, monkeypatch):
    monkeypatch.setitem(plan._UNCALIBRATED, 20, tuple(range(50)))
    half = {"image": PICTURE, "image_strength": 0.5}
    for given in ({}, half, {**half, "options": SamplingOptions(sdedit=True)} if version == "1.3" else {"image": PICTURE}):
        asked = {**short(version, **given), "num_inference_steps": 30, "latents_only": True}
        found, exact = (pipe(version)("a cat", speed=speed, **asked) for speed in ("balanced", "exact"))
        assert torch.equal(found.latents, exact.latents) and found.forwards == exact.forwards


@pytest.mark.parametrize(("version", "forwards"), [("1.2", (24, 24)), ("1.3", (23, 29))])
def test_a_plan_joins_the_steps_of_a_rectified_flow(pipe, version, forwards):
    for given, count in zip(({}, {"image": PICTURE}), forwards, strict=True):
        result = pipe(version)("a cat", speed="fast", latents_only=True, **short(version, **given))
        assert result.forwards == count and result.forwards + result.forwards_saved == 90
        assert "fast: 12 of 30 steps, by a plan that was not calibrated" in result.notes[0]


def test_given_frames_begin_the_steps_that_read_them(pipe, monkeypatch):
    noised, read, real = [], [], masks.BesideNoise.before
    monkeypatch.setattr(masks.BesideNoise, "before", lambda self, x, step: noised.append((made := real(self, x, step)) is not x) or made)
    at_step = plan.Averaged.at_step
    monkeypatch.setattr(
        plan.Averaged, "at_step", lambda *asked: read.append(asked[1:2] + ((made := at_step(*asked)).reads_reference,)) or made
    )
    given = {"image": PICTURE, "image_strength": 0.3, "options": SamplingOptions(sdedit=True)}
    pipe("1.3")("a cat", speed="draft", latents_only=True, **short("1.3", **given))
    assert noised == [dict(read)[step] for step in range(9)] and noised[0] and not noised[-1]


@pytest.mark.parametrize("version", ["1.2", "1.3"])
@pytest.mark.parametrize("given", [{}, {"image": PICTURE}], ids=["t2v", "i2v"])
def test_a_calibrated_plan_is_as_far_from_exact_as_it_says(folder, version, given, tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "MEASURED_POINTS", (9,))
    model = OpenSoraPipeline.from_pretrained(folder(version))
    asked = {**short(version, **given), "num_inference_steps": 30}
    seed = asked.pop("seed")
    ((plan, *_),) = [row for row in model.calibrate(model.checked([("a cat", seed, asked)]), tmp_path).rows if len(row[0].steps) == 9]
    model.use_plans(tmp_path)
    near, exact = (model("a cat", seed=seed, speed=speed, latents_only=True, **asked) for speed in ("draft", "exact"))
    assert "a plan calibrated for it" in near.notes[0]
    assert ((near.latents - exact.latents).norm() / exact.latents.norm()).item() == pytest.approx(plan.error, rel=1e-5)


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_steps_of_learned_variance_are_not_joined(pipe, version, tmp_path):
    with pytest.raises(OpenSoraError, match="Use speed exact.*sampled by another process"):
        pipe(version)("a cat", speed="fast", **short(version))
    asked = {name: value for name, value in short(version).items() if name != "seed"}
    with pytest.raises(OpenSoraError, match="Use speed exact.*sampled by another process"):
        pipe(version).calibrate(pipe(version).checked([("a cat", 3, asked)]), tmp_path)


@pytest.mark.parametrize("version", VERSIONS)
def test_one_layer_at_a_time_makes_the_same_video(folder, pipe, version):
    model = OpenSoraPipeline.from_pretrained(folder(version)).enable_offload("minimal", device="cpu")
    arguments = {**short(version, num_inference_steps=1), **({} if version == "1.0" else {"image": PICTURE})}
    for found, expected in zip(model("a cat", **arguments).frames[0], pipe(version)("a cat", **arguments).frames[0], strict=True):
        assert (found == expected).all()


@pytest.mark.parametrize("version", ["1.1", "1.2", "1.3"])
def test_a_video_goes_on(pipe, version, monkeypatch):
    model = pipe(version)
    frames = LENGTHS[version]
    first = model("a cat", **short(version), latents_only=True)
    longer = model.extend(first, "a dog", num_inference_steps=1)
    plan = model.continuation(first.latents.shape[2])
    assert plan.context == (4 if version == "1.1" else 5)
    assert len(longer.frames[0]) == {"1.1": 2 * frames - 4, "1.2": 2 * frames - 17, "1.3": 49}[version]
    assert torch.equal(longer.latents[:, :, : first.latents.shape[2]], first.latents)


def test_loops_as_the_scripts_make_them(pipe):
    """1.3's later clips know nothing of what came before and lose their head; 1.2's are given a sample of what is encoded again."""
    how, scripts = {"num_inference_steps": 1, "seed": 3}, SamplingOptions(parity="scripts")
    model = pipe("1.3")
    first = model("a cat", **{**short("1.3"), **how}, latents_only=True)
    longer = model.extend(first, "a cat", **how, options=scripts)
    assert torch.equal(longer.latents[:, :, 10:], first.latents[:, :, 5:])
    assert not torch.equal(model.extend(first, "a cat", **how).latents[:, :, 10:], first.latents[:, :, 5:])
    model = pipe("1.2")
    first = model("a cat", **{**short("1.2"), **how}, latents_only=True)
    ours, theirs = (model.extend(first, "a cat", **how, options=options).latents for options in (SamplingOptions(), scripts))
    assert ours.shape == theirs.shape and not torch.equal(ours, theirs)
    assert torch.equal(model.extend(first, "a cat", **how, options=scripts).latents, theirs)


@pytest.fixture
def given(monkeypatch):
    """What each clip of a run was given: [(mask by latent frame, latents)], or None."""
    found = []
    sample = walks.sample_latents

    def kept(networks, request, prompt, condition, *others, **more):
        found.append(condition and (condition.mask[0, 0, :, 0, 0].tolist(), condition.latents))
        return sample(networks, request, prompt, condition, *others, **more)

    monkeypatch.setattr(walks, "sample_latents", kept)
    return found


@pytest.mark.parametrize("version", ["1.1", "1.2", "1.3"])
@pytest.mark.parametrize("cond_type", ["i2v_tail", "i2v_loop"])
def test_the_end_of_a_loop_is_of_its_last_clip(folder, tmp_path, given, version, cond_type):
    ends = loop_of(folder(version), tmp_path, "--cond-type", cond_type)
    assert cli.main(ends) == 0
    frames = len(given[-1][0])
    known = 4 if version == "1.1" else 5
    first = [1.0] + [0.0] * (frames - 1) if cond_type == "i2v_loop" else None
    head = [1.0] * known + [0.0] * (frames - known)
    assert [one and one[0] for one in given] == [first, head, head[:-1] + [1.0]]
    alone = OpenSoraPipeline.from_pretrained(folder(version)).vae.encode(torch.from_numpy(PICTURE)[None].float() / 255, [None])
    assert torch.allclose(given[-1][1][:, :, -1:], alone, atol=1e-5)


def test_loops_with_an_end_as_the_script_makes_them(folder, tmp_path, given, golden, capsys):
    """inference_i2v.py gives every later clip the end, and i2v_tail's never."""
    expected = golden("open_sora_1")[1]["info"]["1.3"]["cond_loops"]
    scripts = ("--parity", "scripts", "--num-frames", "49", "--condition-frame-length", "5")
    assert cli.main(loop_of(folder("1.3"), tmp_path, "--cond-type", "i2v_loop", *scripts)) == 0
    where = [place for place, is_given in enumerate(given[1][0]) if is_given]
    assert where == expected["i2v_loop"][1] and given[2][0] == given[1][0] and given[0][0] == [1.0] + 14 * [0.0]
    assert torch.equal(given[1][1][:, :, -1:], given[2][1][:, :, -1:])
    given.clear()
    assert cli.main(loop_of(folder("1.3"), tmp_path, "--cond-type", "i2v_head", *scripts)) == 0
    where = [place for place, is_given in enumerate(given[2][0]) if is_given]
    assert where == expected["i2v_head"][1]
    assert cli.main(loop_of(folder("1.3"), tmp_path, "--cond-type", "i2v_tail", *scripts)) == 2
    assert "With --parity scripts an end alone (i2v_tail) is given to no clip" in capsys.readouterr().err


def loop_of(folder, place, *more):
    """A command line of three loops that are given a picture for the end, and one for the beginning where they take it."""
    Image.fromarray(PICTURE).save(place / "b.png")
    Image.fromarray(PICTURE[::-1].copy()).save(place / "a.png")
    ref, end = ["--ref", str(place / "a.png")], ["--ref-end", str(place / "b.png")]
    pictures = {"i2v_head": ref, "i2v_tail": end, "i2v_loop": ref + end}[more[1]]
    frames = [] if "--num-frames" in more else ["--num-frames", str(LENGTHS[folder.name[:3]])]
    size = ["--image-size", "40", "56", "--num-sampling-steps", "1", "--seed", "1", *frames]
    return ["generate", "--model", str(folder), "--prompt", "a cat", "--loop", "3", *pictures, *size, *more, "--out", str(place / "v.mp4")]


@pytest.mark.parametrize(
    ("version", "asked", "words"),
    [
        ("1.2", {"num_frames": 50}, "Use 34 or 51.*num_frames=50 is not a multiple of 17, nor 1"),
        ("1.3", {"num_frames": 50}, "Use 49 or 65.*is not 16k\\+1"),
        ("1.2", {"references": [PICTURE], "mask_strategy": "0,1"}, "names reference 1; 1 are given"),
        ("1.2", {"references": [PICTURE], "mask_strategy": "0,a"}, "reference is 'a'"),
        ("1.2", {"references": [PICTURE], "image": PICTURE}, "given alone"),
        ("1.0", {"image": PICTURE}, "Leave out image.*makes videos of a prompt alone"),
        ("1.0", {"references": [PICTURE]}, "knows no mask strategies"),
        ("1.0", {"num_inference_steps": 1001}, "num_steps=1001|1 to 1000"),
        ("1.2", {"height": 8}, "is too small"),
    ],
)  # fmt: skip
def test_what_cannot_be_made_is_one_sentence(pipe, version, asked, words):
    with pytest.raises(OpenSoraError, match=words):
        pipe(version)("a cat", **{**short(version), **asked}, check_only=True)


@pytest.mark.parametrize(
    ("version", "size", "card"),
    [("1.2", (720, 1280, 408), 24), ("1.2", (240, 426, 102), 6), ("1.3", (720, 1280, 113), 24)],
)
def test_what_is_promised_fits_by_the_counted_plan(version, size, card):
    row = ROWS[version]
    model = ModelSizes(row.released, table.usual_codec(row.released), TextSizes(clip=None, length=300), stored="fp32", name=row.title)
    memory = Memory("cuda", "a card", card * GIB, card * GIB, 64 * GIB, 64 * GIB)
    guidance = row.sampling.guidance(SamplingOptions().guidance(7.0, 1.0), "euler")
    asked = Request(*size, 30, grid=row.grid, has_given=False, settings=Settings(AUTO, AUTO), guidance=guidance)
    assert preflight(asked, model, memory).recommended is not None
