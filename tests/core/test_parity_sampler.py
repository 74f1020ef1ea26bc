"""A whole guided run, from recorded noise, embeddings and reference latents, ends where the reference's loop ends."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from opensora_core.checkpoint.load import load_transformer
from opensora_core.sampling.given import image_condition
from opensora_core.sampling.guidance import Guidance, ReferenceUse
from opensora_core.sampling.run import Conditions, SamplingRecipe, TextCondition, sample
from opensora_core.sampling.schedule import flow_schedule, latent_flow_shift, sigmas
from opensora_core.sampling.solvers import noise

TOLERANCE = 5e-5  # see test_parity_transformer.py; 5e-7 where the goldens were made
PATH = Path(__file__).resolve().parent.parent / "golden" / "sampler.safetensors"
with safe_open(PATH, "pt") as file:
    CASES = json.loads(file.metadata()["cases"])
    SETTINGS = json.loads(file.metadata()["settings"])


@pytest.fixture(scope="module")
def model(golden_path):
    return load_transformer(golden_path / "transformer_weights.safetensors", torch.float32)


@pytest.fixture(scope="module")
def recorded(golden):
    return golden("sampler")[0]


def given_frames(case, references, shape):
    """The condition of a case: [B, C, t, H, W] reference latents at the head, the tail, or (item by item in that order) both."""
    if case["cond_type"] == "t2v":
        return None
    use = ReferenceUse(is_clip=case["cond_type"].startswith("v2v"))
    if case["cond_type"] == "i2v_loop":
        return image_condition(shape, head=references[::2], tail=references[1::2], use=use)
    return image_condition(shape, **{"tail" if "tail" in case["cond_type"] else "head": references}, use=use)


def run(model, recorded, name, guidance):
    case, start = CASES[name], recorded[f"{name}.noise"]
    batch = start.shape[0]
    context, y = recorded["context"], recorded["y"]
    negative = {"context": context[-1:].expand(batch, -1, -1), "y": y[-1:].expand(batch, -1)}
    text = TextCondition({"context": context[:batch], "y": y[:batch]}, negative)
    alpha = case["flow_shift"] or latent_flow_shift(start.shape)
    condition = given_frames(case, recorded.get(f"{name}.references"), start.shape)
    with torch.no_grad():
        return sample(SamplingRecipe(), model, start, flow_schedule(SETTINGS["num_steps"], alpha), guidance, Conditions(text, condition))


def settings(case):
    return Guidance(SETTINGS["text"], SETTINGS["image"], case["text_oscillation"], case["image_oscillation"], case["temporal_ramp"])


@pytest.mark.parametrize("name", CASES)
def test_run(model, recorded, relative_error, name):
    case, expected = CASES[name], recorded[f"{name}.latents"]
    found = run(model, recorded, name, settings(case))
    assert relative_error(found[:1], expected[:1]) < TOLERANCE
    made = torch.ones(found.shape[2], dtype=torch.bool)
    if case["cond_type"].startswith("i2v"):  # the reference puts given frames back in the first batch item only
        made = given_frames(case, recorded[f"{name}.references"], found.shape).mask[0, 0, :, 0, 0] == 0
    for item in range(1, len(found)):
        assert relative_error(found[item][:, made], expected[item][:, made]) < TOLERANCE


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("_batch")])
def test_every_item_of_a_batch_keeps_its_own_frames(model, recorded, name):
    """The reference puts them back in the first item alone, and for clips in none; ours are the reference's first item throughout."""
    case, expected = CASES[name], recorded[f"{name}.latents"]
    condition = given_frames(case, recorded[f"{name}.references"], expected.shape)
    known = condition.mask[0, 0, :, 0, 0] == 1
    found, is_clip = run(model, recorded, name, settings(case)), condition.use.is_clip
    assert len(expected) == 2 and known.any()
    for item in range(2):
        given = condition.latents[item][:, known]
        assert torch.equal(found[item][:, known], given) == (not is_clip)
        assert torch.equal(expected[item][:, known], given) == (not is_clip and item == 0)


@pytest.mark.parametrize(
    "name, changed",
    [
        ("head", "text_oscillation"), ("head_no_ramp", "image_oscillation"), ("head", "temporal_ramp"), ("tail", "temporal_ramp"),
        ("v2v_head", "text_oscillation"), ("v2v_tail", "image_oscillation"),
    ],
)  # fmt: skip
def test_every_switch_shows(model, recorded, relative_error, name, changed):
    """The goldens would notice: 14 steps reach past the warm-up, and the ramp acts from the first."""
    case = CASES[name]
    found = run(model, recorded, name, settings({**case, changed: not case[changed]}))
    assert relative_error(found, recorded[f"{name}.latents"]) > 0.005


@pytest.mark.parametrize("name", ["v2v_head", "v2v_tail", "v2v_head_easy", "v2v_tail_easy"])
def test_the_goldens_see_that_a_clip_has_no_ramp(model, recorded, relative_error, name):
    """Recorded with the ramp switched on, which the reference has for pictures alone."""
    case, expected = CASES[name], recorded[f"{name}.latents"]
    made = given_frames(case, recorded[f"{name}.references"], expected.shape).mask[0, 0, :, 0, 0] == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CASES, name, {**case, "cond_type": case["cond_type"].replace("v2v", "i2v")})
        found = run(model, recorded, name, settings(case))
    assert case["temporal_ramp"] and relative_error(found[:, :, made], expected[:, :, made]) > 0.002


def test_schedule(recorded):
    for name, case in CASES.items():
        alpha = case["flow_shift"] or latent_flow_shift(recorded[f"{name}.noise"].shape)
        points, expected = sigmas(SETTINGS["num_steps"], alpha), recorded[f"{name}.sigmas"]
        # Ours begins at exactly 1; rounding leaves some of the reference's a unit in the last place beside it.
        assert torch.equal(points[1:], expected[1:]) and points[0] == 1 and abs(expected[0] - 1) < 2e-7, name


def test_noise_is_the_reference_s_on_a_cpu(recorded):
    assert torch.equal(noise(recorded["loop.noise"].shape, 7), recorded["loop.noise"])
