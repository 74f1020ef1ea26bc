"""Sizes, schedules, prompts, masks and picture fitting: the reference's own tables and numbers, entry by entry."""

import json

import pytest
import torch

from opensora_core.choices import COND_TYPES
from opensora_core.errors import OpenSoraError
from opensora_core.geometry import ASPECT_RATIOS, CAUSAL, RESOLUTIONS, Tiling, resize_crop, resolution_size, training_size
from opensora_core.ops import pack
from opensora_core.sampling.given import CONTEXTS, ImageCondition, fit_clip, fit_image, image_condition
from opensora_core.sampling.guidance import oscillate
from opensora_core.sampling.schedule import flow_shift, sigmas
from opensora_core.text.prompt import decorate


@pytest.fixture(scope="module")
def recorded(golden_path):
    return json.loads((golden_path / "geometry.json").read_text())


@pytest.fixture(scope="module")
def conditions(golden):
    return golden("conditions")[0]


def test_schedules(recorded):
    for case in recorded["schedules"]:
        alpha = case["flow_shift"] or flow_shift(case["tokens_per_frame"], case["latent_frames"])
        assert sigmas(case["num_steps"], alpha).tolist() == case["sigmas"], case["num_steps"]


@pytest.mark.parametrize("multiple", [16, 32])
@pytest.mark.parametrize("table, look_up", [("inference", resolution_size), ("training", training_size)])
def test_sizes(recorded, table, look_up, multiple):
    for resolution in RESOLUTIONS:
        expected = recorded["sizes"][f"{resolution} {table} {multiple}"]
        for ratio in ASPECT_RATIOS:
            if ratio in expected:
                assert list(look_up(resolution, ratio, multiple)) == expected[ratio], (resolution, ratio)
            else:  # the training table drops repeated sizes
                with pytest.raises(OpenSoraError):
                    look_up(resolution, ratio, multiple)
        assert set(expected) <= set(ASPECT_RATIOS)


def test_resize_crop(recorded):
    for source_h, source_w, target_h, target_w, *expected in recorded["resize_crop"]:
        assert list(resize_crop((source_h, source_w), (target_h, target_w))) == expected


def test_prompts(recorded):
    for text, fps, score, expected in recorded["prompts"]:
        assert decorate(text, fps, int(score) if score else None) == expected


def test_oscillation(recorded):
    for num_steps, expected in recorded["oscillation"].items():
        assert [oscillate(7.5, step) for step in range(int(num_steps))] == expected


def mask_of(cond_type, frames):
    """[T], 1 on the latent frames that a mode gives, as they are laid out for a run."""
    if cond_type == "t2v":
        return [0.0] * frames
    count = CAUSAL.latent_frames(CONTEXTS[cond_type.endswith("easy")]) if cond_type.startswith("v2v") else 1
    given = torch.zeros(1, 1, count, 1, 1)
    head, tail = (None if end in cond_type else given for end in ("tail", "head"))
    return image_condition((1, 1, frames, 1, 1), head, tail).mask[0, 0, :, 0, 0].tolist()


def test_masks(recorded):
    assert {cond_type for cond_type, _, _ in recorded["masks"]} == set(COND_TYPES)
    for cond_type, frames, expected in recorded["masks"]:
        given = sum(mask_of(cond_type, 33))
        if given and frames <= given:  # nothing left to make: the reference ignores the picture (one frame) or fills the clip
            with pytest.raises(OpenSoraError):
                mask_of(cond_type, frames)
        else:
            assert mask_of(cond_type, frames) == expected, (cond_type, frames)


@pytest.mark.parametrize("cond_type", COND_TYPES)
def test_packed_condition(conditions, cond_type):
    references, expected = conditions[f"{cond_type}.references"], conditions[f"{cond_type}.packed"]
    frames = expected.shape[1] // 2  # 1x2 tokens a frame
    shape = (1, 16, frames, *references.shape[-2:])
    if cond_type == "t2v":
        given = ImageCondition(torch.zeros(1, 1, *shape[2:]), torch.randn(shape))
    else:
        head = None if "tail" in cond_type else references
        tail = None if "head" in cond_type else references
        given = image_condition(shape, head, tail)
        assert given.mask[0, 0, :, 0, 0].tolist() == mask_of(cond_type, frames)
    assert torch.equal(pack(given.packed_input(), (1, 2, 2)), expected)


@pytest.mark.parametrize("size", [(24, 40), (48, 24), (52, 72)])
def test_picture_fit_is_exact(conditions, size):
    """Bicubic on 8-bit RGB, cut from the middle: every pixel equal."""
    found = fit_image(conditions["fit.source"][:1].float() / 255, *size)
    expected = conditions[f"fit.image.{size[0]}x{size[1]}"].permute(1, 2, 3, 0)  # [3, T, H, W] in -1..1
    assert ((found * 2 - 1) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("size", [(24, 40), (48, 24), (52, 72)])
def test_clip_fit_is_the_references(conditions, size):
    """Bilinear without antialiasing, cut from the middle by rounding down, not rounded to whole levels."""
    source = conditions["fit.source"]
    expected = conditions[f"fit.video.{size[0]}x{size[1]}"].permute(1, 2, 3, 0)
    for frames in (source, source.float() / 255):
        assert ((fit_clip(frames, *size) * 2 - 1) - expected).abs().max() < 1e-6
    assert ((fit_image(source.float() / 255, *size) * 2 - 1) - expected).abs().max() > 0.05  # a picture's fit is another


def test_released_tile_sizes():
    assert Tiling() == Tiling(tile_size=256, overlap=0.25, temporal_tile=0)
