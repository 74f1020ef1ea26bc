"""The MMDiT: layout, positions, independence, the host's hooks. Values against the reference: test_parity_transformer.py."""

import dataclasses

import pytest
import torch
from einops import rearrange

from opensora_core import ops
from opensora_core.errors import OpenSoraError
from opensora_core.networks.mmdit.config import FLUX_DEV, OPEN_SORA_2, OPEN_SORA_2_DC_AE, TransformerConfig
from opensora_core.networks.mmdit.layers import position_ids, rotate_half
from opensora_core.networks.mmdit.model import MMDiT
from opensora_core.ops import FUSED, TorchOperations, attention, pack, rotary_table, sliced_attention, unpack

TINY = TransformerConfig(4, 2, 64, 2, 128, 2, 2, 24, 12, cond_embed=True, guidance_embed=False)


def fill(module, scale=0.3):
    """Deterministic weights that depend on no random number generator."""
    for index, (name, parameter) in enumerate(module.named_parameters()):
        wave = torch.arange(parameter.numel(), dtype=torch.float32).mul_(0.37).add_(index).sin_()
        parameter.data = (wave * scale + (1.0 if "norm" in name else 0.0)).view_as(parameter).to(parameter.dtype)
    return module


@pytest.fixture(scope="module")
def model():
    return fill(MMDiT(TINY)).requires_grad_(False)


def inputs(batch=2, frames=3, height=4, width=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    make = lambda *size: torch.randn(*size, generator=g)  # noqa: E731
    return {
        "x": make(batch, 4, frames, height, width),
        "timestep": torch.rand(batch, generator=g),
        "context": make(batch, 5, 24),
        "y": make(batch, 12),
        "cond": make(batch, 5, frames, height, width),
    }


@pytest.mark.parametrize(
    ("config", "tensors", "parameters"),
    [(OPEN_SORA_2, 1082, 11_891_390_528), (OPEN_SORA_2_DC_AE, 1082, 11_891_971_200), (FLUX_DEV, None, 11_901_408_320)],
)
def test_released_sizes_on_meta(config, tensors, parameters):
    weights = MMDiT(config, device="meta").state_dict()
    assert tensors in (None, len(weights))  # Flux's file is fused, so only its parameter count is comparable
    assert sum(p.numel() for p in weights.values()) == parameters


def test_pack_and_unpack():
    block = torch.arange(17 * 4, dtype=torch.float32).view(1, 17, 1, 2, 2)  # 4 * c + 2 * ph + pw
    assert pack(block, (1, 2, 2)).flatten().tolist() == list(range(68))
    latents = torch.randn(2, 3, 4, 6, 10)
    assert torch.equal(unpack(pack(latents, (1, 2, 2)), (4, 6, 10), (1, 2, 2)), latents)
    tokens = pack(latents, (1, 2, 2)).view(2, 4, 3, 5, 12)
    assert torch.equal(tokens[1, 2, 1, 4], rearrange(latents[1, :, 2, 2:4, 8:10], "c h w -> (c h w)"))


def test_a_latent_that_cannot_be_patched():
    with pytest.raises(OpenSoraError, match="25x42"):
        pack(torch.zeros(1, 1, 1, 25, 42), (1, 2, 2))


def test_rotation_is_relative_and_leaves_text_alone():
    axes = (4, 14, 14)
    ids = position_ids(2, 3, 4, "cpu")
    q, k = torch.randn(2, 1, 24, 1, 32)
    dot = lambda shift: (rotate_half(q, rotary_table(ids + shift, axes)) * rotate_half(k, rotary_table(ids + shift, axes)).flip(1)).sum(-1)  # noqa: E731
    torch.testing.assert_close(dot(0), dot(torch.tensor([2.0, 5.0, 7.0])), rtol=1e-4, atol=1e-4)
    assert torch.equal(rotate_half(q, rotary_table(torch.zeros(24, 3), axes)), q)


def test_rotation_runs_in_fp32_whatever_the_dtype():
    pe = rotary_table(position_ids(2, 3, 4, "cpu"), (4, 14, 14))
    x = torch.randn(1, 24, 2, 32).bfloat16()
    assert torch.equal(rotate_half(x, pe), rotate_half(x.float(), pe).bfloat16())


def test_batch_items_do_not_touch_each_other(model):
    args = inputs()
    both = model(**args)
    for i in range(2):
        torch.testing.assert_close(model(**{k: v[i : i + 1] for k, v in args.items()})[0], both[i], rtol=1e-5, atol=1e-5)


def test_every_input_matters(model):
    args, base = inputs(), model(**inputs())
    for name in args:
        assert not torch.allclose(model(**{**args, name: args[name] * 0.5}), base), name


def test_no_condition_is_a_zero_condition(model):
    args = inputs()
    zero = model(**{**args, "cond": torch.zeros_like(args["cond"])})
    assert torch.equal(model(**{**args, "cond": None}), zero)


@pytest.mark.parametrize("patched", [False, True])
def test_without_gradients_memory_is_reused_and_values_are_the_same(model, patched):
    keep = lambda q, k, v, pe, attn_mask, extra_options: {"q": q, "k": k, "v": v}  # noqa: E731
    options = {"patches": {"attn1_patch": [keep]}} if patched else {}
    args = inputs()
    before = {name: value.clone() for name, value in args.items()}
    with torch.enable_grad():
        expected = model(**args, transformer_options=options)
    with torch.no_grad():
        assert torch.equal(model(**args, transformer_options=options), expected)
    assert all(torch.equal(args[name], value) for name, value in before.items())


def test_gradients_reach_every_weight():
    model = fill(MMDiT(TINY))
    model(**inputs()).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_long_sequences_rotate_in_chunks(monkeypatch):
    pe = rotary_table(position_ids(2, 3, 4, "cpu"), (4, 14, 14))
    x = torch.randn(2, 24, 2, 32)
    whole = rotate_half(x, pe)
    monkeypatch.setattr(ops, "CHUNK_ELEMENTS", 5 * 2 * 2 * 32)
    assert torch.equal(rotate_half(x, pe), whole)


class TwoPasses:
    """Fused layers, spelled out in fp64: what a kernel computes in one pass."""

    def __init__(self):
        self.calls = []

    def norm_modulate(self, norm, x, shift, scale):
        self.calls.append("modulate")
        wide = x.double()
        centred = wide - wide.mean(-1, keepdim=True)
        normal = centred * (centred.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
        return (normal * (1 + scale.double()) + shift.double()).to(x.dtype)

    def norm_rotate(self, norm, x, pe, start):
        self.calls.append("rotate")
        wide = x.double()
        normal = wide * (wide.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight.double()
        first, second = normal.chunk(2, -1)
        cos, sin = pe[:, start : start + x.shape[1]].double()
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def test_fused_layers_take_the_place_of_their_parts(model):
    fused = TwoPasses()
    options = {FUSED: fused}
    with torch.no_grad():
        expected = model(**inputs())
        error = (model(**inputs(), transformer_options=options) - expected).norm() / expected.norm()
    assert 0 < error < 1e-6
    assert fused.calls.count("modulate") == 2 * 4 + 2 and fused.calls.count("rotate") == 2 * 4 + 2 * 2


def test_fused_layers_keep_out_of_gradients_and_of_patches_that_look_before_rotation(model):
    fused, keep = TwoPasses(), lambda q, k, v, pe, attn_mask, extra_options: {}
    with torch.enable_grad():
        model(**inputs(), transformer_options={FUSED: fused})
    with torch.no_grad():
        model(**inputs(), transformer_options={FUSED: fused, "patches": {"attn1_patch": [keep]}})
    assert not fused.calls


def test_guidance_is_asked_for_by_a_distilled_model():
    model = fill(MMDiT(dataclasses.replace(TINY, cond_embed=False, guidance_embed=True))).requires_grad_(False)
    args = inputs()
    del args["cond"]
    with pytest.raises(OpenSoraError, match="guidance-distilled"):
        model(**args)
    assert not torch.allclose(model(**args, guidance=torch.tensor([4.0, 4.0])), model(**args, guidance=torch.tensor([1.0, 1.0])))


def test_sliced_attention_is_attention():
    q, k, v = torch.randn(3, 2, 4, 9, 8)
    torch.testing.assert_close(sliced_attention(1)(q, k, v, {}), attention(q, k, v, {}))
    torch.testing.assert_close(sliced_attention(3)(q, k, v, {}), attention(q, k, v, {}))


def test_an_impossible_configuration_is_an_error():
    with pytest.raises(OpenSoraError, match="head dimension"):
        MMDiT(dataclasses.replace(TINY, num_heads=3), device="meta")


class TestHooks:
    """The host's patch dictionaries, as its own models honour them."""

    def test_identity_patches_change_nothing_and_see_every_block(self, model):
        seen = []

        def double(args, extra):
            seen.append((args["transformer_options"]["block_type"], args["transformer_options"]["block_index"]))
            return extra["original_block"](args)

        def attn1(q, k, v, pe, attn_mask, extra_options):
            assert q.shape == (2, 2, 5 + 18, 32) and extra_options["img_slice"] == [5, 23]
            return {"q": q, "k": k, "v": v}

        blocks = {(f"{kind}_block", i): double for kind in ("double", "single") for i in range(2)}
        options = {
            "patches_replace": {"dit": blocks},
            "patches": {"attn1_patch": [attn1], "attn1_output_patch": [lambda out, extra: out], "post_input": [lambda args: args]},
        }
        assert torch.equal(model(**inputs(), transformer_options=options), model(**inputs()))
        assert seen == [("double", 0), ("double", 1), ("single", 0), ("single", 1)]
        assert "block_type" not in options  # the caller's dictionary is not written into

    @pytest.mark.parametrize("block", [("double_block", 1), ("single_block", 0)])
    def test_a_replaced_block_acts(self, model, block):
        skip = lambda args, extra: {k: args[k] for k in ("img", "txt") if k in args}  # noqa: E731
        options = {"patches_replace": {"dit": {block: skip}}}
        assert not torch.allclose(model(**inputs(), transformer_options=options), model(**inputs()))

    def test_attention_patches_act(self, model):
        for name, patch in (
            ("attn1_patch", lambda q, k, v, pe, attn_mask, extra_options: {"v": v * 0}),
            ("attn1_output_patch", lambda out, extra: out * 0),
        ):
            options = {"patches": {name: [patch]}}
            assert not torch.allclose(model(**inputs(), transformer_options=options), model(**inputs())), name

    def test_rope_options_move_positions(self, model):
        still = model(**inputs(), transformer_options={"rope_options": {"shift_t": 0.0, "scale_x": 1.0}})
        assert torch.equal(still, model(**inputs()))
        moved = model(**inputs(), transformer_options={"rope_options": {"scale_x": 0.5}})
        assert not torch.allclose(moved, still)


def test_layers_come_from_the_namespace_and_attention_from_the_seam():
    made, calls = [], []

    class Recording(TorchOperations):
        class Linear(TorchOperations.Linear):
            def __init__(self, *args, **kwargs):
                made.append(args)
                super().__init__(*args, **kwargs)

    def counted(q, k, v, options):
        calls.append(options["block_type"])
        return attention(q, k, v, options)

    model = fill(MMDiT(TINY, operations=Recording, attention=counted)).requires_grad_(False)
    model(**inputs())
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert len(made) == len(linears) and all(isinstance(m, Recording.Linear) for m in linears)
    assert calls == ["double", "double", "single", "single"]
