"""LoRA files in their common forms: the exact merge, restoring it, ComfyUI's keys, and clear refusals."""

import json
import logging

import pytest
import torch
from safetensors.torch import save_file

from opensora_core.checkpoint.load import load_transformer
from opensora_core.checkpoint.lora import comfy_keys, merge_lora, parse_lora, read_lora
from opensora_core.errors import CheckpointError

LAYERS = ("double_blocks.0.img_attn.q_proj", "double_blocks.1.txt_mlp.2", "single_blocks.2.v_mlp", "final_layer.adaLN_modulation.1")
RANK = 4

FORMS = {
    "peft": ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight", None),
    "peft_adapter_name": ("base_model.model.{}.lora_A.default.weight", "base_model.model.{}.lora_B.default.weight", None),
    "wrapped": ("base_model.model.module.{}.lora_A.weight", "base_model.model.module.{}.lora_B.weight", None),
    "kohya": ("lora_unet_{_}.lora_down.weight", "lora_unet_{_}.lora_up.weight", "lora_unet_{_}.alpha"),
    "comfy": ("diffusion_model.{}.lora_down.weight", "diffusion_model.{}.lora_up.weight", "diffusion_model.{}.alpha"),
    "diffusers": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight", None),
    "old_diffusers": ("transformer.{}.lora.down.weight", "transformer.{}.lora.up.weight", None),
    "bare": ("{}.lora_A.weight", "{}.lora_B.weight", None),
}


@pytest.fixture
def model(golden_path):
    return load_transformer(golden_path / "transformer_weights.safetensors", torch.float32)


@pytest.fixture
def pairs(model):
    """A and B for every layer, by its name."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    weights = {layer: model.get_submodule(layer).weight for layer in LAYERS}
    return {layer: (noise(RANK, weight.shape[1]), noise(weight.shape[0], RANK)) for layer, weight in weights.items()}


def written(pairs, form, alpha=None):
    down, up, alpha_key = FORMS[form]

    def name(pattern, layer):
        return pattern.replace("{_}", layer.replace(".", "_")).replace("{}", layer)

    state = {}
    for layer, (a, b) in pairs.items():
        state |= {name(down, layer): a, name(up, layer): b}
        if alpha_key and alpha is not None:
            state[name(alpha_key, layer)] = torch.tensor(float(alpha))
    return state


@pytest.mark.parametrize("form", FORMS)
def test_every_form_merges_by_the_formula(model, pairs, tmp_path, form):
    alpha = 2.0 if FORMS[form][2] else None
    save_file(written(pairs, form, alpha), tmp_path / "l.safetensors")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    merge_lora(model, tmp_path / "l.safetensors", strength=0.7)
    for name, parameter in model.named_parameters():
        layer = name.removesuffix(".weight")
        if layer in pairs:
            a, b = pairs[layer]
            expected = before[name] + 0.7 * ((alpha or RANK) / RANK) * (b @ a)
            torch.testing.assert_close(parameter, expected, rtol=1e-6, atol=1e-6)
            assert not torch.equal(parameter, before[name])
        else:
            assert torch.equal(parameter, before[name]), name


def test_restoring_is_bit_exact_and_keeps_dtype(golden_path, pairs, tmp_path):
    model = load_transformer(golden_path / "transformer_weights.safetensors")
    save_file(written(pairs, "peft"), tmp_path / "l.safetensors")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    first = merge_lora(model, tmp_path / "l.safetensors", 1.0)
    second = merge_lora(model, tmp_path / "l.safetensors", -0.3)
    assert model.get_submodule(LAYERS[0]).weight.dtype == torch.bfloat16
    assert not torch.equal(model.get_submodule(LAYERS[0]).weight, before[LAYERS[0] + ".weight"])
    second.restore()
    first.restore()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_strength_zero_changes_nothing(model, pairs, tmp_path):
    save_file(written(pairs, "peft"), tmp_path / "l.safetensors")
    before = model.get_submodule(LAYERS[0]).weight.clone()
    merge_lora(model, tmp_path / "l.safetensors", 0.0)
    assert torch.equal(model.get_submodule(LAYERS[0]).weight, before)
    with pytest.raises(CheckpointError, match="strength=nan"):
        merge_lora(model, tmp_path / "l.safetensors", float("nan"))


@pytest.mark.parametrize(
    ("config", "alphas"),
    [
        ({"lora_alpha": 8, "r": RANK}, {0: 8, 1: 8}),
        ({"lora_alpha": 8, "use_rslora": True}, {0: 16, 1: 16}),  # 8 / sqrt(4) = 16 / 4
        ({"lora_alpha": 8, "alpha_pattern": {"q_proj": 2}}, {0: 2, 1: 8}),
        ({}, {0: None, 1: None}),
    ],
)
@pytest.mark.parametrize("as_folder", [True, False])
def test_peft_folder_gives_alpha(pairs, tmp_path, config, alphas, as_folder):
    save_file(written(pairs, "peft"), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    layers = read_lora(tmp_path if as_folder else tmp_path / "adapter_model.safetensors")
    assert {index: layers[LAYERS[index]].alpha for index in alphas} == alphas


def test_alpha_from_metadata_and_its_own_tensor_wins(pairs, tmp_path):
    adapter = {"transformer.lora_alpha": 8, "transformer.r": RANK}
    save_file(written(pairs, "diffusers"), tmp_path / "d.safetensors", {"lora_adapter_metadata": json.dumps(adapter)})
    assert read_lora(tmp_path / "d.safetensors")[LAYERS[0]].alpha == 8
    save_file(written(pairs, "diffusers"), tmp_path / "p.safetensors", {"lora_alpha": "6"})
    assert read_lora(tmp_path / "p.safetensors")[LAYERS[0]].alpha == 6
    assert parse_lora(written(pairs, "kohya", 3), {"lora_alpha": 8})[LAYERS[0]].alpha == 3


@pytest.mark.parametrize("form", FORMS)
def test_comfy_keys(pairs, form):
    alpha = 2.0 if FORMS[form][2] else None
    renamed = comfy_keys(parse_lora(written(pairs, form, alpha)))
    expected = set(written(pairs, "comfy", alpha))
    assert set(renamed) == expected
    a, b = pairs[LAYERS[0]]
    assert renamed[f"diffusion_model.{LAYERS[0]}.lora_down.weight"] is a
    assert renamed[f"diffusion_model.{LAYERS[0]}.lora_up.weight"] is b


def test_comfy_keys_carry_the_adapters_alpha(pairs):
    renamed = comfy_keys(parse_lora(written(pairs, "peft"), {"lora_alpha": 8}))
    assert renamed[f"diffusion_model.{LAYERS[0]}.alpha"].item() == 8


def test_no_match_names_what_was_found_and_what_is_expected(tmp_path, model):
    layer = "lora_unet_double_blocks_0_img_attn_qkv"
    flux = {f"{layer}.lora_down.weight": torch.zeros(4, 96), f"{layer}.lora_up.weight": torch.zeros(288, 4)}
    save_file(flux, tmp_path / "flux.safetensors")
    with pytest.raises(
        CheckpointError, match=r"flux\.safetensors: no key matches.*Found: lora_unet_double.*Expected for instance.*LoRA for Flux"
    ):
        merge_lora(model, tmp_path / "flux.safetensors")
    other = {"unet.down.0.lora_A.weight": torch.zeros(4, 9), "unet.down.0.lora_B.weight": torch.zeros(9, 4)}
    with pytest.raises(CheckpointError, match="no key matches") as caught:
        parse_lora(other)
    assert "Flux" not in str(caught.value)


def test_a_file_that_is_no_lora_is_named(golden_path, model, tmp_path):
    with pytest.raises(CheckpointError, match=r"vae_weights\.safetensors is .*VAE.*, not a LoRA"):
        merge_lora(model, golden_path / "vae_weights.safetensors")
    with pytest.raises(CheckpointError, match="holds no LoRA"):
        read_lora(tmp_path)


def test_partial_matches_warn_and_apply(model, pairs, tmp_path, caplog):
    extra = {"single_blocks.99.q_proj": (torch.zeros(RANK, 96), torch.zeros(96, RANK))}
    state = written(pairs | extra, "peft")
    state |= {"lora_te1_x.lora_down.weight": torch.zeros(4, 4), "lora_te1_x.lora_up.weight": torch.zeros(4, 4)}
    save_file(state, tmp_path / "l.safetensors")
    with caplog.at_level(logging.WARNING):
        merged = merge_lora(model, tmp_path / "l.safetensors")
    assert set(merged.originals) == set(LAYERS)
    assert "lora_te1_x" in caplog.text and "single_blocks.99.q_proj" in caplog.text


def test_shapes_of_another_model_are_refused_before_anything_changes(model, pairs, tmp_path):
    pairs[LAYERS[-1]] = (torch.zeros(RANK, 3072), torch.zeros(6144, RANK))
    save_file(written(pairs, "peft"), tmp_path / "l.safetensors")
    before = model.get_submodule(LAYERS[0]).weight
    with pytest.raises(CheckpointError, match=r"trained for another model: final_layer.* \[6144, 3072\], this model's is \[192, 96\]"):
        merge_lora(model, tmp_path / "l.safetensors")
    assert model.get_submodule(LAYERS[0]).weight is before


def test_half_a_pair_and_dora_are_refused(pairs):
    state = written(pairs, "peft")
    del state["base_model.model.double_blocks.0.img_attn.q_proj.lora_B.weight"]
    with pytest.raises(CheckpointError, match="incomplete: .*q_proj"):
        parse_lora(state)
    dora = written(pairs, "peft") | {"base_model.model.double_blocks.0.img_attn.q_proj.lora_magnitude_vector": torch.ones(96)}
    with pytest.raises(CheckpointError, match="DoRA"):
        parse_lora(dora)


def test_quantised_weights_are_refused(model, pairs, tmp_path):
    save_file(written(pairs, "peft"), tmp_path / "l.safetensors")
    layer = model.get_submodule(LAYERS[0])
    layer.weight = torch.nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(CheckpointError, match="quantised weights"):
        merge_lora(model, tmp_path / "l.safetensors")
