"""The reference's numbers where small terms count (tests/golden/make_quiet.py): epsilons, roundings, an autoencoder's shift."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from opensora_core.checkpoint.load import load_decoder, load_transformer
from opensora_core.geometry import ASPECT_RATIOS, CAUSAL, RESOLUTIONS, resolution_size
from opensora_core.sampling import schedule
from opensora_core.sampling.guidance import Guidance
from opensora_core.sampling.run import Conditions, SamplingRecipe, TextCondition, sample

INPUTS = ("x", "timestep", "context", "y", "cond")
QUIET = 2.0**-10


@pytest.fixture
def scaled(golden_path, tmp_path):
    """A golden weights file with the tensors whose name contains one of some words scaled by 2**-10."""

    def write(name, words):
        state = load_file(golden_path / f"{name}.safetensors")
        changed = {key: tensor * QUIET if any(word in key for word in words) else tensor for key, tensor in state.items()}
        if name == "flux_vae_weights":  # the golden keeps the decoder alone; by this a Flux autoencoder is known
            changed["encoder.down.0.block.0.conv1.weight"] = torch.zeros(1, dtype=torch.bfloat16)
        save_file(changed, tmp_path / "scaled.safetensors")
        return tmp_path / "scaled.safetensors"

    return write


def predict(model, case):
    with torch.no_grad():
        return model(**{name: case[name] for name in INPUTS}, transformer_options={})


@pytest.mark.parametrize(
    "name, words", [("quiet_embedders", ("img_in.", "txt_in.", "cond_in.")), ("quiet_queries", ("q_proj.", "k_proj."))]
)
def test_norms_have_the_references_epsilon(golden, scaled, relative_error, name, words):
    # 1e-5 in place of 1e-6 in a LayerNorm, or in the norms of q and k, is off by 0.1 and more.
    case, _ = golden(name)
    model = load_transformer(scaled("transformer_weights", words), torch.float32)
    assert relative_error(predict(model, case), case["output"]) < 2e-5


def test_the_timestep_is_rounded_to_the_networks_type(golden, golden_path, relative_error):
    case, _ = golden("bfloat16")
    model = load_transformer(golden_path / "transformer_weights.safetensors", torch.bfloat16)
    given = {**case, "timestep": case["timestep"]}
    assert relative_error(predict(model, given).float(), case["output"].float()) < 0.02
    elsewhere = {**case, "timestep": torch.tensor([1.0])}  # what 0.9979 is near, and is not rounded to
    assert relative_error(predict(model, elsewhere).float(), case["output"].float()) > 0.05


class Factor(torch.nn.Module):
    """A network of one multiplication: latents * factor * timestep."""

    dtype, config = torch.bfloat16, None

    def forward(self, x, timestep, factor, cond=None):
        return x * factor.reshape(-1, 1, 1, 1, 1) * timestep.to(x.dtype).reshape(-1, 1, 1, 1, 1)


def test_latents_in_bfloat16_are_rounded_where_the_reference_rounds_them(golden):
    case, _ = golden("bfloat16_run")
    positive, negative, _ = case["factors"].split(1)
    way = schedule.Schedule(case["sigmas"], case["sigmas"][:-1])
    recipe = SamplingRecipe(inputs=lambda config, side, given, numbers: side)
    told = Conditions(TextCondition({"factor": positive}, {"factor": negative}))
    assert torch.equal(sample(recipe, Factor(), case["noise"], way, Guidance(), told), case["latents"])


def test_quiet_latents_show_the_picture_autoencoders_shift_and_epsilon(golden, scaled, relative_error):
    case, _ = golden("flux_quiet")

    def decoded(words):
        decoder = load_decoder(scaled("flux_vae_weights", words), torch.float32)
        return decoder.decode(decoder.config.latents.to_codec(case["latents"]))

    with torch.no_grad():
        # A shift of 0.1160 in place of 0.1159 is off by 3e-4, an epsilon of 1e-5 in place of 1e-6 by more than 0.1.
        assert relative_error(decoded(()), case["shifted"]) < 1e-5
        assert relative_error(decoded(("decoder.conv_in.",)), case["quiet"]) < 2e-5


@pytest.mark.parametrize("steps", [10, 30, 50])
def test_every_schedule_begins_at_one_and_ends_at_zero_exactly(steps):
    sizes = {resolution_size(resolution, ratio) for resolution in RESOLUTIONS for ratio in ASPECT_RATIOS}
    shapes = {(1, 16, CAUSAL.latent_frames(frames), height // 8, width // 8) for height, width in sizes for frames in range(1, 130, 4)}
    assert len(shapes) > 2000
    for shape in shapes:
        points = schedule.sigmas(steps, schedule.latent_flow_shift(shape))
        assert points[0] == 1 and points[-1] == 0 and (points.diff() < 0).all(), shape
        assert torch.isfinite(torch.logit(points[1:-1])).all()
