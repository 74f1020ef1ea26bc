"""A whole guided run, from recorded noise, embeddings and reference latents, ends where the reference's loop ends."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from opensora_core.checkpoint.load import load_transformer
from opensora_core.sampling.conditioning import image_condition
from opensora_core.sampling.guidance import Guidance
from opensora_core.sampling.schedule import latent_flow_shift, sigmas
from opensora_core.sampling.solver import TextCondition, noise, sample

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
    """The condition of a case: [1 or B, C, t, H, W] reference latents at the head, the tail, or (in that order) both."""
    if case["cond_type"] == "t2v":
        return None
    if case["cond_type"] == "i2v_loop":
        return image_condition(shape, head=references[:1], tail=references[1:])
    return image_condition(shape, **{"tail" if "tail" in case["cond_type"] else "head": references})


def run(model, recorded, name, guidance):
    case, start = CASES[name], recorded[f"{name}.noise"]
    batch = start.shape[0]
    context, y = recorded["context"], recorded["y"]
    text = TextCondition(context[:batch], y[:batch], context[-1:].expand(batch, -1, -1), y[-1:].expand(batch, -1))
    alpha = case["flow_shift"] or latent_flow_shift(start.shape)
    condition = given_frames(case, recorded.get(f"{name}.references"), start.shape)
    with torch.no_grad():
        return sample(model, start, sigmas(SETTINGS["num_steps"], alpha), guidance, text, condition)


def settings(case):
    # The reference has no ramp for video references, whatever the setting.
    ramp = case["temporal_ramp"] and case["cond_type"].startswith("i2v")
    return Guidance(SETTINGS["text"], SETTINGS["image"], case["text_oscillation"], case["image_oscillation"], ramp)


@pytest.mark.parametrize("name", CASES)
def test_run(model, recorded, relative_error, name):
    case, expected = CASES[name], recorded[f"{name}.latents"]
    found = run(model, recorded, name, settings(case))
    # The reference replaces given frames in the first batch item only, and not at all for video references.
    compared = slice(9, None) if name.startswith("v2v") else slice(None)
    assert relative_error(found[:1, :, compared], expected[:1, :, compared]) < TOLERANCE
    for item in range(1, len(found)):
        assert relative_error(found[item, :, 1:], expected[item, :, 1:]) < TOLERANCE


@pytest.mark.parametrize(
    "name, changed",
    [("head", "text_oscillation"), ("head_no_ramp", "image_oscillation"), ("head", "temporal_ramp"), ("tail", "temporal_ramp")],
)
def test_every_switch_shows(model, recorded, relative_error, name, changed):
    """The goldens would notice: 14 steps reach past the warm-up, and the ramp acts from the first."""
    case = CASES[name]
    found = run(model, recorded, name, settings({**case, changed: not case[changed]}))
    assert relative_error(found, recorded[f"{name}.latents"]) > 0.005


def test_schedule(recorded):
    for name, case in CASES.items():
        alpha = case["flow_shift"] or latent_flow_shift(recorded[f"{name}.noise"].shape)
        assert torch.equal(sigmas(SETTINGS["num_steps"], alpha), recorded[f"{name}.sigmas"]), name


def test_noise_is_the_reference_s_on_a_cpu(recorded):
    assert torch.equal(noise(recorded["loop.noise"].shape, 7), recorded["loop.noise"])
