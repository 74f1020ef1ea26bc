"""Schedules, runs, masks, words and sizes of Open-Sora 1.0 to 1.3 against the reference at each tag."""

import pytest
import torch

from opensora_core.errors import OpenSoraError
from opensora_core.geometry.open_sora_1 import EVERY_FRAME, PIECES, SHARED_PIECES, named_size, size_table
from opensora_core.networks.stdit.config import STDiTConfig
from opensora_core.networks.stdit.stdit import STDiT, STDiT3
from opensora_core.sampling import ddpm, masks
from opensora_core.sampling.given import NOTHING, ImageCondition, image_condition
from opensora_core.sampling.guidance import Guidance, ReferenceUse, oscillate, tame, temporal_ramp
from opensora_core.sampling.run import run
from opensora_core.sampling.schedule import Flow, pieces, quarters, sized_schedule
from opensora_core.sampling.solvers import euler
from opensora_core.text.clean import clean_caption, fix_text, html_text
from opensora_core.text.prompt_1x import MotionScore, split_parts, split_settings, text_of_loop, with_scores, with_words
from tests.golden import open_sora_1_cases as cases

TOLERANCE = 2e-4
NETWORKS = {"1.0": STDiT, "1.1": STDiT, "1.2": STDiT3, "1.3": STDiT3}
FP32 = torch.float32
MEASURES = {"1.2": pieces, "1.3": quarters}


@pytest.fixture(scope="module")
def recorded(golden):
    tensors, metadata = golden("open_sora_1")
    return tensors, metadata["info"]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


# ------------------------------------------------------------------ schedules


@pytest.mark.parametrize("place", range(len(cases.SCHEDULES)))
def test_timesteps(recorded, relative_error, place):
    version, height, width, frames, steps, kind = cases.SCHEDULES[place]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[kind]
    found = sized_schedule((frames, height, width), steps, MEASURES[version], dtype=dtype)
    assert relative_error(found.timesteps, recorded[0][f"schedule.{place}"]) < 1e-6
    assert found.points[-1] == 0 and len(found.points) == steps + 1


@pytest.mark.parametrize(("version", "dtype"), [("1.0", torch.float64), ("1.1", torch.float32)])
@pytest.mark.parametrize("steps", [7, 100])
def test_respaced_tables(recorded, version, dtype, steps):
    table = ddpm.tables(steps, dtype)
    for name in ("timesteps", "betas", "clean", "least_log_variance", "mean_of_clean", "mean_of_noisy"):
        expected, found = recorded[0][f"ddpm.{version}.{steps}.{name}"].double(), getattr(table, name).double()
        assert (found - expected).abs().max() <= 2e-4 * expected.abs().max(), name
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-9, msg=name)


def test_one_step_is_a_table_too():
    assert ddpm.tables(1).timesteps.tolist() == [0]
    with pytest.raises(OpenSoraError, match="1 to 1000"):
        ddpm.respaced(1001)


# ------------------------------------------------------------------ whole runs


@pytest.fixture(scope="module")
def network(recorded):
    def get(version):
        shapes = recorded[1][version]["shapes"]
        shapes = {name: tuple(shape) for name, shape in shapes.items()}
        module = NETWORKS[version](STDiTConfig.of(shapes))
        module.load_state_dict(cases.random_weights({name: shape for name, shape in shapes.items() if not name.startswith("pos_embed")}))
        return module

    return get


def setting(version, model):
    """Noise, steps, guidance, and the named inputs with the prompt and without."""
    extent, size, frames, steps, scale = cases.RUNS[version]
    values = {"attention_mask": torch.tensor(cases.TEXT_MASK)}
    if version != "1.0":
        values["sizes"] = torch.tensor([[24.0, frames, *size]] * 2)
    null = model.null_caption.expand(2, -1, -1)
    noise = cases.random((2, cases.NETWORKS[version]["in_channels"], *extent), 7)
    return noise, steps, scale, {"context": cases.random(cases.TEXT, 2), **values}, {"context": null, **values}


def drawing(given, draw):
    given.draw, given.is_read = draw, lambda step: True
    return given


def flow_run(version, model, combine, given, make):
    noise, steps, scale, prompt, negative = setting(version, model)
    _, size, frames, _, _ = cases.RUNS[version]
    schedule = sized_schedule((frames, *size), steps, MEASURES[version], dtype=torch.float32)
    given = given(noise, schedule) if given else NOTHING

    def predict(x, step):
        timestep = schedule.timesteps[step].expand(2)
        passes = make(prompt, negative, given, timestep, x)
        return combine(passes, step, scale, steps)

    return run(predict, noise, schedule, Flow(-1), euler, given)


def test_run_1_2(recorded, network, relative_error):
    model = network("1.2")
    plain = flow_run(
        "1.2", model, lambda p, _, scale, __: p[1] + scale * (p[0] - p[1]), None,
        lambda prompt, negative, _, t, x: (model(x, t, **prompt), model(x, t, **negative)),
    )  # fmt: skip
    assert relative_error(plain, recorded[0]["run.1.2"]) < TOLERANCE


def test_run_1_2_with_masks(recorded, network, relative_error):
    model, edit, draws = network("1.2"), torch.tensor(cases.EDITS["1.2"]), cases.Draws()
    found = flow_run(
        "1.2", model, lambda p, _, scale, __: p[1] + scale * (p[0] - p[1]),
        lambda noise, schedule: drawing(
            masks.Frames(Flow(-1), ImageCondition(torch.ones(1, 1, 1, 1, 1), noise, edit=edit), noise, schedule, FP32), lambda x: draws(noise)
        ),
        lambda prompt, negative, _, t, x: (model(x, t, edit=edit, **prompt), model(x, t, edit=edit, **negative)),
    )  # fmt: skip
    assert relative_error(found, recorded[0]["run.1.2_masked"]) < TOLERANCE


def test_run_1_3(recorded, network, relative_error):
    model = network("1.3")

    def combine(passes, step, scale, _):
        guided = passes[1] + oscillate(scale, step) * (passes[0] - passes[1])
        return tame(guided, passes[0])

    found = flow_run("1.3", model, combine, None, lambda prompt, negative, _, t, x: (model(x, t, **prompt), model(x, t, **negative)))
    assert relative_error(found, recorded[0]["run.1.3"]) < TOLERANCE


@pytest.mark.parametrize("name", ["1.3_given", "1.3_plain"])
def test_run_1_3_with_given_frames(recorded, network, relative_error, name):
    """As the guide's lines ask: with SDEdit and oscillating scales, and with neither."""
    model, draws, is_plain = network("1.3"), cases.Draws(), name == "1.3_plain"

    def given(noise, schedule):
        mask = torch.zeros(2, 1, *noise.shape[2:])
        mask[:, :, [0, 4]] = 1
        condition = ImageCondition(mask, cases.random(noise.shape, 8), ReferenceUse(is_renoised=not is_plain))
        return drawing(masks.BesideNoise(Flow(-1), condition, noise, schedule, FP32), lambda x: draws(noise))

    def passes(prompt, negative, given, t, x):
        without = torch.cat((given.cond[:, :1], torch.zeros_like(x)), dim=1)
        return model(x, t, cond=given.cond, **prompt), model(x, t, cond=given.cond, **negative), model(x, t, cond=without, **negative)

    def combine(passes, step, scale, steps):
        cond, uncond, neither = passes
        swing = (lambda scale, step: scale) if is_plain else oscillate
        image = swing(5.0, step)
        image = temporal_ramp(image, step, steps - 1, cond.shape[2]) if image > 1 else image
        return neither + image * (uncond - neither) + swing(scale, step) * (cond - uncond)

    found = flow_run("1.3", model, combine, given, passes)
    assert relative_error(found, recorded[0][f"run.{name}"]) < TOLERANCE


@pytest.mark.parametrize("name", ["1.0", "1.1", "1.1_masked"])
def test_run_of_learned_variance(recorded, network, relative_error, name):
    version = name[:3]
    model = network(version)
    noise, steps, scale, prompt, negative = setting(version, model)
    schedule, draws = ddpm.respaced_schedule(None, None, steps, dtype=FP32 if version == "1.1" else torch.float64), cases.Draws()
    table = schedule.table
    guidance = Guidance(scale, text_oscillation=False, channels=ddpm.GUIDED_CHANNELS)
    rows = torch.cat((noise, noise))  # the reference draws for both passes, and uses the first's
    given, more = NOTHING, {}
    if name == "1.1_masked":
        edit = torch.tensor(cases.EDITS["1.1"])
        condition = ImageCondition(torch.ones(1, 1, 1, 1, 1), noise, edit=edit)
        given = drawing(ddpm.RespacedFrames(condition, noise, schedule, FP32), lambda x: draws(rows)[:2])
        more = {"edit": ddpm.network_edit(edit, table)}
    x = noise
    for step in range(steps):
        place = steps - 1 - step
        x = given.before(x, step)
        timestep = table.timesteps[place].float().expand(2)
        predictions = {"cond": model(x, timestep, **prompt, **more), "uncond": model(x, timestep, **negative, **more)}
        prediction = guidance.at_step(step, steps, x.shape[2], None).combine(predictions)
        x = given.after(ddpm.ancestral_step(x, prediction, place, table, draws(rows)[:2]), step)
    assert relative_error(x, recorded[0][f"run.{name}"]) < TOLERANCE


def test_edits_are_counted_in_steps_of_fp32():
    edits = torch.tensor([0.53, 0.59, 0.29, 0.57, 0.58, 0.0, 1.0])
    assert ddpm.places_of(edits, 100).tolist() == [52, 58, 29, 57, 58, 0, 100]
    table = ddpm.tables(100, torch.float32)
    made = ddpm.network_edit(edits, table)[:, None] * 1000 >= table.timesteps[None]
    assert torch.equal(made, ddpm.places_of(edits, 100)[:, None] > torch.arange(100)[None])


# ------------------------------------------------------------------ masks


@pytest.mark.parametrize("version", ["1.1", "1.2", "1.3"])
def test_mask_strategies(recorded, version):
    strategies = cases.STRATEGIES_1_1 if version == "1.1" else cases.STRATEGIES
    align, repeats = masks.ALIGN if version == "1.2" else None, version == "1.1"
    for (text, lengths, loop), (latents, edits) in zip(strategies, recorded[1][version]["masks"], strict=True):
        groups, references = masks.parse_mask_strategy(text), cases.reference_latents(lengths)
        x, edit = masks.place(-torch.ones(1, 15, 1, 1), groups, references, loop, align, repeats)
        assert x.flatten().tolist() == latents, text
        assert edit.tolist() == edits, text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0,0,0,0,1,0,3", "7 fields; the most are 6"), ("0,a", "Use a whole number. mask_strategy group '0,a': reference is 'a'"), ("0;;1", "loop is ''"),
        ("0,0,0,0,1,x", "Use a number from 0 to 1. mask_strategy group '0,0,0,0,1,x': edit is 'x'"), ("0,0,0,0,1,1.5", "edit is 1.5"), ("-1", "loop is -1"),
        ("0,0,0,0,0", "length is 0"), ("0,-1", "reference is -1"), ("0,0,0,0,1,nan", "edit is nan"),
    ],
)  # fmt: skip
def test_a_wrong_group_is_one_sentence(text, words):
    with pytest.raises(OpenSoraError) as error:
        masks.parse_mask_strategy(text)
    assert words in str(error.value)


def test_a_group_that_does_not_fit_is_one_sentence():
    noise, picture = torch.zeros(1, 15, 1, 1), torch.ones(1, 1, 1, 1)
    for text, words in (
        ("0,1", "names reference 1; 1 are given"),
        ("0,0,3", "reference has 1 latent"),
        ("0,0,0,-16", "target has 15 latent"),
    ):
        with pytest.raises(OpenSoraError, match=words):
            masks.place(noise, masks.parse_mask_strategy(text), [picture])
    with pytest.raises(OpenSoraError, match="sizes must agree"):
        masks.place(noise, masks.parse_mask_strategy("0"), [torch.ones(1, 1, 2, 1)])


def test_a_strategy_of_the_scripts_loops_is_the_clip_before_as_a_head(recorded):
    groups, before = masks.parse_mask_strategy(recorded[1]["1.3"]["appended"]), torch.arange(15.0).view(1, 15, 1, 1)
    laid, edit = masks.place(torch.full_like(before, 99), groups, [before[:, :1], before], loop=1, align=None)
    ours = image_condition((1, 1, 15, 1, 1), before[None, :, -5:])
    assert torch.equal(ours.mask.flatten(), 1 - edit) and torch.equal(laid[:, :5], ours.latents[0, :, :5])


def test_condition_types(recorded):
    for (name, lengths), (latents, where) in zip(cases.COND_TYPES, recorded[1]["1.3"]["conds"], strict=True):
        references = [reference[None] for reference in cases.reference_latents(lengths)]
        head = {"v2v_head": references[0][:, :, :5], "i2v_tail": None}.get(name, references[0][:, :, :1])
        tail = {
            "i2v_tail": references[0][:, :, -1:],
            "i2v_loop": references[1][:, :, :1] if len(references) > 1 else references[0][:, :, -1:],
        }
        given = image_condition((1, 1, 15, 1, 1), head, tail.get(name))
        assert given.latents.flatten().tolist() == latents, name
        assert given.mask.flatten().nonzero().flatten().tolist() == where, name


# ------------------------------------------------------------------ words


@pytest.mark.parametrize(("version", "decorate"), [("1.2", with_scores), ("1.3", with_words)])
def test_scores(recorded, version, decorate):
    for said, expected in zip(cases.SAID, recorded[1][version]["scores"], strict=True):
        assert [decorate(prompt, *said) for prompt in cases.PROMPTS] == expected


def test_a_word_of_motion_is_a_number_that_is_called_so():
    for word in ("very low", "low", "fair", "high", "very high", "extremely high"):
        assert with_words("a", motion=MotionScore(word)) == f"a The motion strength is {word}."
    assert MotionScore("2.5") == 2.5
    with pytest.raises(ValueError, match="wild"):
        MotionScore("wild")


def test_words_of_one_own_pass():
    assert with_words("a", "sublime", "gentle") == "a The aesthetic score is sublime. The motion strength is gentle."
    with pytest.raises(OpenSoraError, match="aesthetic score=11 is not a number from 0 to 10"):
        with_words("a", 11)
    with pytest.raises(OpenSoraError, match="motion score=fast"):
        with_scores("a", motion="fast")


def test_parts_of_a_prompt(recorded):
    for prompt, expected in zip(cases.PARTS, recorded[1]["1.2"]["loops"], strict=True):
        assert [text_of_loop(split_parts(prompt), loop) for loop in range(5)] == expected
    for prompt in ("|0|a|x|b", "|0|a|2", "|0|a|0|b"):
        with pytest.raises(OpenSoraError, match="from loop 2 on"):
            split_parts(prompt)


def test_settings_at_the_end_of_a_prompt():
    text = 'a fox {"reference_path": "a.png;b.png", "mask_strategy": "0;0,1,0,-1,1"}'
    assert split_settings(text) == ("a fox ", {"reference_path": "a.png;b.png", "mask_strategy": "0;0,1,0,-1,1"})
    assert split_settings("a fox [x]") == ("a fox [x]", {})
    for prompt, words in (('a {"mask": 1}', "'mask' at the end"), ("a {b", "not a JSON record"), ("a {1} {2}", "not a JSON record")):
        with pytest.raises(OpenSoraError, match=words):
            split_settings(prompt)


def test_captions_are_cleaned_as_the_scripts_do(recorded):
    texts = cases.captions()
    expected = recorded[1]["1.2"]["captions"]
    assert len(set(texts)) > 290
    wrong = [(text, clean_caption(text), there) for text, there in zip(texts, expected, strict=True) if clean_caption(text) != there]
    assert not wrong, f"{len(wrong)}: {wrong[:5]}"


def test_markup_and_characters():
    assert html_text("<p>one</p> \n <script>two</script><b>three <!-- four --> five") == "one\nthree  five"
    assert fix_text("ﬁne ＡＢ　c \u201equoted\u201c\r\nend e\u0301") == 'fine AB c "quoted"\nend é'


# ------------------------------------------------------------------ sizes


@pytest.mark.parametrize("version", ["1.1", "1.2", "1.3"])
def test_sizes(recorded, version):
    for name, table in recorded[1][version]["sizes"].items():
        assert list(map(list, size_table(name).values())) == sorted(table.values(), key=lambda size: size[0] / size[1]), name
    grid = {"1.1": EVERY_FRAME, "1.2": PIECES, "1.3": SHARED_PIECES}[version]
    for name, sizes in recorded[1][version].get("named_sizes", {}).items():
        for ratio, size in sizes.items():
            if name[0].isdigit() and name.removesuffix("_16d")[-1] in "pk":
                assert list(grid.named_size(name, ":".join(ratio.split(":")[::-1]))) == size


def test_lengths(recorded):
    assert {name: PIECES.length(name, 24) for name in recorded[1]["1.2"]["lengths"]} == recorded[1]["1.2"]["lengths"]
    assert SHARED_PIECES.length("4s", 24) == 97 and PIECES.length("3s", 24) == 68
    assert [SHARED_PIECES.latent_frames(frames) for frames in (1, 49, 113)] == [1, 15, 35]
    assert SHARED_PIECES.pixel_frames(35) == 113 and PIECES.pixel_frames(15) == 51
    assert SHARED_PIECES.latent_size(240, 426) == (30, 54) and PIECES.latent_size(240, 426) == (30, 53)
    with pytest.raises(OpenSoraError, match="Use 34 or 51"):
        PIECES.frames.check(50)


def test_a_size_that_is_not_listed_is_one_sentence():
    assert named_size(("512",), "512", "1:1") == (512, 512)
    with pytest.raises(OpenSoraError, match="Use one of 144p.*resolution='2k' is not known"):
        EVERY_FRAME.named_size("2k", "16:9")
    with pytest.raises(OpenSoraError, match="width:height"):
        PIECES.named_size("720p", "7:5")
