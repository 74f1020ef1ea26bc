"""The transformer gives the reference's numbers, in the released layout and in both fused ones."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from opensora_core.checkpoint.load import load_transformer

# Rounding alone gives 6e-7 where the goldens were made; one ulp in the timestep frequencies, at 1000 radians, gives 2e-5
# elsewhere. A wrong layout is off by more than 0.01 (test_goldens_tell_layouts_apart).
TOLERANCE = 5e-5
INPUTS = ("x", "timestep", "context", "y", "cond", "guidance")


def predict(model, case):
    with torch.no_grad():
        return model(**{name: case[name] for name in INPUTS if name in case}, transformer_options={})


@pytest.fixture
def subset(golden_path, tmp_path):
    """A fused file without one of its input layers, since the reference's Flux has no cond_in."""

    def write(without, change=lambda key, tensor: tensor):
        tensors = load_file(golden_path / "fused_weights.safetensors")
        kept = {k: change(k, v).contiguous() for k, v in tensors.items() if not k.startswith(without)}
        save_file(kept, tmp_path / "fused.safetensors")
        return tmp_path / "fused.safetensors"

    return write


def test_released_layout(golden, golden_path, relative_error):
    case, _ = golden("transformer")
    model = load_transformer(golden_path / "transformer_weights.safetensors", torch.float32)
    assert relative_error(predict(model, case), case["output"]) < TOLERANCE


def test_no_condition_is_a_condition_of_zeros(golden, golden_path):
    case, _ = golden("transformer")
    model = load_transformer(golden_path / "transformer_weights.safetensors", torch.float32)
    zeros = predict(model, {**case, "cond": torch.zeros_like(case["cond"])})
    assert torch.equal(predict(model, {**case, "cond": None}), zeros)


def test_fused_flux_with_guidance(golden, subset, relative_error):
    case, _ = golden("fused_guidance")
    model = load_transformer(subset("cond_in."), torch.float32, slot="flux")
    assert relative_error(predict(model, case), case["output"]) < TOLERANCE


def test_fused_with_condition(golden, subset, relative_error):
    case, _ = golden("fused_cond")
    model = load_transformer(subset("guidance_in."), torch.float32)
    assert relative_error(predict(model, case), case["output"]) < TOLERANCE


def _swap_pairs(key, tensor):
    """q and k norm scales in the other rotary layout: what is left if a conversion forgets them."""
    return tensor.reshape(2, -1).T.flatten() if key.endswith("_norm.scale") else tensor


def _swap_final_halves(key, tensor):
    """Scale before shift, as diffusers stores the last modulation."""
    return tensor.roll(tensor.shape[0] // 2, 0) if key.startswith("final_layer.adaLN") else tensor


def _swap_q_and_k(key, tensor):
    if ".qkv." not in key:
        return tensor
    q, k, v = tensor.chunk(3)
    return torch.cat((k, q, v))


def _mlp_before_values(key, tensor):
    return torch.cat((tensor[:128], tensor[192:], tensor[128:192])) if ".linear1." in key else tensor


@pytest.mark.parametrize("mistake", [_swap_pairs, _swap_final_halves, _swap_q_and_k, _mlp_before_values])
def test_goldens_tell_layouts_apart(golden, subset, relative_error, mistake):
    case, _ = golden("fused_cond")
    model = load_transformer(subset("guidance_in.", mistake), torch.float32)
    assert relative_error(predict(model, case), case["output"]) > 0.01


def test_rotary_pairs_matter(golden, golden_path, relative_error, monkeypatch):
    """The same weights under Flux's interleaved pairs are a different model."""
    case, _ = golden("transformer")
    model = load_transformer(golden_path / "transformer_weights.safetensors", torch.float32)

    def interleaved(x, pe):
        cos, sin = pe
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)

    monkeypatch.setattr("opensora_core.networks.mmdit.layers.rotate_half", interleaved)
    assert relative_error(predict(model, case), case["output"]) > 0.01
