"""Sizes, schedules, prompts, masks and picture fitting: the reference's own tables and numbers, entry by entry."""

import json

import pytest
import torch

from opensora_core.choices import COND_TYPES
from opensora_core.errors import OpenSoraError
from opensora_core.geometry import ASPECT_RATIOS, RESOLUTIONS, Tiling, resize_crop, resolution_size, training_size
from opensora_core.networks.mmdit.packing import pack
from opensora_core.sampling.given import ImageCondition, condition_mask, fit_clip, fit_image, image_condition
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


def test_masks(recorded):
    assert {cond_type for cond_type, _, _ in recorded["masks"]} == set(COND_TYPES)
    for cond_type, frames, expected in recorded["masks"]:
        given = sum(condition_mask(cond_type, 33).tolist())
        if given and frames <= given:  # nothing left to make: the reference ignores the picture (one frame) or fills the clip
            with pytest.raises(OpenSoraError):
                condition_mask(cond_type, frames)
        else:
            assert condition_mask(cond_type, frames).tolist() == expected, (cond_type, frames)


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
        assert given.mask[0, 0, :, 0, 0].tolist() == condition_mask(cond_type, frames).tolist()
    assert torch.equal(pack(given.packed_input(), 2), expected)


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
