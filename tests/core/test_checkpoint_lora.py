"""LoRA files in their common forms: the exact merge, restoring it, ComfyUI's keys, and clear refusals."""

import json
import logging

import pytest
import torch
from safetensors.torch import save_file

from opensora_core.checkpoint.load import load_transformer
from opensora_core.checkpoint.lora import comfy_keys, fitting_layers, merge_lora, parse_lora, read_lora
from opensora_core.errors import CheckpointError
from opensora_core.families.table import FAMILIES

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


def test_merging_keeps_the_dtype(golden_path, pairs, tmp_path):
    model = load_transformer(golden_path / "transformer_weights.safetensors")
    save_file(written(pairs, "peft"), tmp_path / "l.safetensors")
    before = model.get_submodule(LAYERS[0]).weight.clone()
    merge_lora(model, tmp_path / "l.safetensors", 1.0)
    assert model.get_submodule(LAYERS[0]).weight.dtype == torch.bfloat16
    assert not torch.equal(model.get_submodule(LAYERS[0]).weight, before)


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
        CheckpointError,
        match=r"^Use a LoRA of .*flux\.safetensors: no key matches.*Found: lora_unet_double.*Expected for instance.*LoRA for Flux",
    ):
        merge_lora(model, tmp_path / "flux.safetensors")
    other = {"unet.down.0.lora_A.weight": torch.zeros(4, 9), "unet.down.0.lora_B.weight": torch.zeros(9, 4)}
    with pytest.raises(CheckpointError, match="no key matches") as caught:
        parse_lora(other)
    assert "Flux" not in str(caught.value)


def test_a_file_that_is_no_lora_is_named(golden_path, model, tmp_path):
    with pytest.raises(CheckpointError, match=r"Give a LoRA: .*vae_weights\.safetensors is .*VAE"):
        merge_lora(model, golden_path / "vae_weights.safetensors")
    with pytest.raises(CheckpointError, match="holds no LoRA"):
        read_lora(tmp_path)


def test_what_a_file_changes_of_text_encoders_is_named_and_the_rest_applied(model, pairs, tmp_path, caplog):
    state = written(pairs, "peft")
    state |= {"lora_te1_x.lora_down.weight": torch.zeros(4, 4), "lora_te1_x.lora_up.weight": torch.zeros(4, 4)}
    save_file(state, tmp_path / "l.safetensors")
    with caplog.at_level(logging.WARNING):
        matched = fitting_layers(model, tmp_path / "l.safetensors")
    assert set(matched) == set(LAYERS)
    assert "lora_te1_x" in caplog.text


def test_layers_beyond_the_models_blocks_are_refused(model, pairs, tmp_path):
    extra = {"single_blocks.37.q_proj": (torch.zeros(RANK, 96), torch.zeros(96, RANK))}
    save_file(written(pairs | extra, "peft"), tmp_path / "l.safetensors")
    with pytest.raises(
        CheckpointError, match=r"another model: 1 of its 5 layers are not in this one, the first is single_blocks\.37\.q_proj"
    ):
        merge_lora(model, tmp_path / "l.safetensors")


def test_a_file_of_other_layers_alone_is_refused(model, tmp_path):
    pair = {"single_blocks.37.q_proj": (torch.zeros(RANK, 96), torch.zeros(96, RANK))}
    save_file(written(pair, "peft"), tmp_path / "l.safetensors")
    with pytest.raises(CheckpointError, match=r"none of its 1 layers is in this model; the first is single_blocks\.37\.q_proj"):
        merge_lora(model, tmp_path / "l.safetensors")


def test_a_bias_that_the_model_lacks_is_refused(model, tmp_path):
    name = "double_blocks.0.img_attn.norm.query_norm"
    changes = {part: torch.zeros(*model.get_submodule(name).weight.shape) for part in ("diff", "diff_b")}
    save_file({f"diffusion_model.{name}.{part}": change for part, change in changes.items()}, tmp_path / "l.safetensors")
    with pytest.raises(CheckpointError, match=rf"another model: it changes the bias of {name}, which has none"):
        merge_lora(model, tmp_path / "l.safetensors")


def kohya_flux():
    """Every layer that trainers of Flux change, 304 of them, in kohya's names; 228 of them are 2.0's too."""
    double = [f"double_blocks_{block}_{part}" for block in range(19) for part in (
        "img_attn_qkv", "img_attn_proj", "img_mlp_0", "img_mlp_2", "img_mod_lin", "txt_attn_qkv", "txt_attn_proj", "txt_mlp_0", "txt_mlp_2", "txt_mod_lin",
    )]  # fmt: skip
    single = [f"single_blocks_{block}_{part}" for block in range(38) for part in ("linear1", "linear2", "modulation_lin")]
    return {
        f"lora_unet_{layer}.{half}.weight": torch.zeros(1, 1) for layer in double + single for half in ("lora_down", "lora_up")
    }  # fmt: skip


def test_a_flux_lora_is_refused_by_name(tmp_path):
    with pytest.raises(CheckpointError, match=r"LoRA for Flux .*: 76 of its 304 layers are not in the Open-Sora 2.0 transformer"):
        parse_lora(kohya_flux())


@pytest.mark.parametrize(
    ("layer", "title"),
    [
        ("lora_unet_double_blocks_0_img_mlp_fc1", "HunyuanVideo"), ("diffusion_model.txt_in.individual_token_refiner.blocks.0.mlp.fc1", "HunyuanVideo"),
        ("lora_unet_blocks_3_self_attn_q", "Wan"), ("lora_unet_input_blocks_1_1_proj_in", "Stable Diffusion"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv", "Stable Diffusion 3"), ("transformer.transformer_blocks.0.attn2.to_q", "LTX-Video"),
        ("transformer.transformer_blocks.0.attn1.to_q", "CogVideoX"), ("transformer.single_transformer_blocks.0.attn.to_q", "Flux"),
        ("lora_unet_distilled_guidance_layer_layers_0_in_layer", "Chroma"), ("something.else", "another model"),
        ("base_model.model.spatial_blocks.0.mlp.fc1", "the Open-Sora 1.3 transformer"),
    ],
)  # fmt: skip
def test_layers_of_another_model_beside_ours_are_refused_by_its_name(pairs, layer, title):
    other = {f"{layer}.lora_down.weight": torch.zeros(4, 9), f"{layer}.lora_up.weight": torch.zeros(9, 4)}
    with pytest.raises(CheckpointError, match=f"is a LoRA for {title}.*1 of its 5 layers"):
        parse_lora(written(pairs, "peft") | other)


@pytest.mark.parametrize(
    "metadata",
    [
        {"modelspec.architecture": "flux-1-dev/lora"}, {"ss_base_model_version": "flux1"}, {"modelspec.architecture": "hunyuan-video/lora"},
        {"ss_base_model_version": "sdxl_base_v1-0"}, {"modelspec.architecture": "wan2.1/lora"},
    ],
)  # fmt: skip
def test_a_file_that_says_it_is_of_another_model_is_refused(pairs, tmp_path, metadata):
    save_file(written(pairs, "kohya"), tmp_path / "l.safetensors", metadata)
    with pytest.raises(CheckpointError, match=r"l\.safetensors is a LoRA for (Flux|HunyuanVideo|Stable Diffusion|Wan) \("):
        read_lora(tmp_path / "l.safetensors")
    save_file(written(pairs, "kohya"), tmp_path / "l.safetensors", {"modelspec.architecture": "open-sora-2/lora"})
    assert len(read_lora(tmp_path / "l.safetensors")) == len(LAYERS)


def test_a_file_that_says_it_is_of_this_model_is_not_refused(tmp_path):
    family = next(family for family in FAMILIES if family.title == "the CogVideoX 5B transformer")
    layer = next(key.removesuffix(".weight") for key in family.manifest(family.released) if "attn1.to_q.weight" in key)
    factors = {f"transformer.{layer}.lora_{half}.weight": torch.zeros(2, 2) for half in "AB"}
    save_file(factors, tmp_path / "l.safetensors", {"modelspec.architecture": "CogVideoX-5b/lora"})
    assert list(read_lora(tmp_path / "l.safetensors", family)) == [layer]


LAYER = "double_blocks.0.img_attn.q_proj"  # 96 x 96 in the golden model


def noise(*shape, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def other_forms():
    """(tensors of a file, change of LAYER's weight, change of its bias) of each form beside a plain pair, by the forms' own definitions."""
    down, up, mid, bias = noise(4, 96), noise(96, 4, seed=4), noise(4, 4, seed=5), noise(96, seed=6)
    pair = {"lora_down.weight": down, "lora_up.weight": up}
    a1, b1, a2, b2 = noise(96, 4), noise(4, 96, seed=4), noise(96, 4, seed=5), noise(4, 96, seed=6)
    w1, w2 = noise(8, 8), noise(12, 12, seed=4)
    w2_a, w2_b = noise(12, 2, seed=5), noise(2, 12, seed=6)
    full = noise(96, 96)
    two = torch.tensor(2.0)
    return {
        "diff_b": (pair | {"diff_b": bias}, up @ down, bias),
        "bias alone": ({"diff_b": bias}, None, bias),
        "mid": (pair | {"lora_mid.weight": mid, "alpha": two}, 2 / 4 * up @ mid @ down, None),
        "peft bias": ({"lora_A.weight": down, "lora_B.weight": up, "lora_B.bias": bias, "alpha": two}, 2 / 4 * up @ down, 2 / 4 * bias),
        "diff": ({"diff": full, "diff_b": bias}, full, bias),
        "loha": ({"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": two}, 2 / 4 * (a1 @ b1) * (a2 @ b2), None),
        "lokr": ({"lokr_w1": w1, "lokr_w2": w2, "alpha": two}, torch.kron(w1, w2), None),
        "lokr of factors": ({"lokr_w1": w1, "lokr_w2_a": w2_a, "lokr_w2_b": w2_b, "alpha": two}, 2 / 2 * torch.kron(w1, w2_a @ w2_b), None),
    }


@pytest.mark.parametrize("form", other_forms())
@pytest.mark.parametrize("stem", [f"diffusion_model.{LAYER}", f"lora_unet_{LAYER.replace('.', '_')}"])
def test_other_forms_are_applied(model, tmp_path, form, stem):
    tensors, weight, bias = other_forms()[form]
    save_file({f"{stem}.{part}": tensor for part, tensor in tensors.items()}, tmp_path / "l.safetensors")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    merge_lora(model, tmp_path / "l.safetensors", 0.7)
    for name, parameter in model.named_parameters():
        change = {f"{LAYER}.weight": weight, f"{LAYER}.bias": bias}.get(name)
        torch.testing.assert_close(parameter, before[name] if change is None else before[name] + 0.7 * change, rtol=1e-5, atol=1e-5)


def test_a_difference_of_a_norm_is_applied(model, tmp_path):
    name = "double_blocks.0.img_attn.norm.query_norm"
    change, before = noise(*model.get_submodule(name).weight.shape), model.get_submodule(name).weight.clone()
    save_file({f"diffusion_model.{name}.diff": change}, tmp_path / "l.safetensors")
    merge_lora(model, tmp_path / "l.safetensors", 0.5)
    torch.testing.assert_close(model.get_submodule(name).weight, before + 0.5 * change)


@pytest.mark.parametrize("form", ["diff_b", "loha", "lokr of factors", "diff", "mid"])
def test_other_forms_reach_comfyui_under_its_names(form):
    tensors = other_forms()[form][0]
    renamed = comfy_keys(parse_lora({f"lora_unet_{LAYER.replace('.', '_')}.{part}": tensor for part, tensor in tensors.items()}))
    assert set(renamed) == {f"diffusion_model.{LAYER}.{part}" for part in tensors if part != "lora_mid.weight"}


@pytest.mark.parametrize(
    "key", [f"{LAYER}.oft_blocks", f"{LAYER}.a1.weight", f"{LAYER}.set_weight", f"{LAYER}.hada_t1", f"base_model.model.{LAYER}.weight", "step"]
)  # fmt: skip
def test_a_key_that_is_not_read_is_refused_by_name_and_says_which_loader_does(pairs, key):
    with pytest.raises(CheckpointError, match=rf"1 tensors that are not read here.*{key}.*LoraLoaderModelOnly"):
        parse_lora(written(pairs, "peft") | {key: torch.ones(3)})


@pytest.mark.parametrize("key", ["oft_blocks", "hada_w1_a", "lokr_w1", "diff", "diff_b", "lora_magnitude_vector"])
def test_no_kind_of_lora_is_called_no_lora(tmp_path, key):
    save_file({f"diffusion_model.{LAYER}.{key}": torch.ones(96)}, tmp_path / "l.safetensors")
    try:
        read_lora(tmp_path / "l.safetensors")
    except CheckpointError as error:
        assert "Give a LoRA" not in str(error)


@pytest.mark.parametrize(
    "tensors",
    [
        {"lora_down.weight": torch.ones(4), "lora_up.weight": torch.ones(4)},
        {"lora_down.weight": torch.tensor(1.0), "lora_up.weight": torch.ones(96, 4)},
        {"lora_down.weight": torch.ones(0, 96), "lora_up.weight": torch.ones(96, 0), "alpha": torch.tensor(1.0)},
        {"lora_down.weight": torch.ones(4, 96), "lora_up.weight": torch.ones(96, 5)},
        {"lora_down.weight": torch.ones(4, 96), "lora_up.weight": torch.ones(96, 4), "alpha": torch.ones(2)},
        {"lora_down.weight": torch.ones(4, 96), "lora_up.weight": torch.ones(96, 4), "alpha": torch.tensor(float("nan"))},
        {"lora_down.weight": torch.ones(4, 96), "lora_up.weight": torch.ones(96, 4), "diff": torch.ones(96, 96)},
        {"hada_w1_a": torch.ones(96, 4), "hada_w1_b": torch.ones(4, 96)},
        {"lokr_w1": torch.ones(8, 8)},
        {"alpha": torch.tensor(4.0)},
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_each_other_are_one_sentence(tensors):
    with pytest.raises(CheckpointError, match=r"do not fit each other|says twice|no key matches") as caught:
        parse_lora({f"diffusion_model.{LAYER}.{part}": tensor for part, tensor in tensors.items()})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        '{"lora_alpha": "four"}', '{"lora_alpha": [4]}', '{"alpha_pattern": 4}', '{"alpha_pattern": {"q_proj": null}}', '{"lora_alpha": NaN}',
        "[]", "[" * 100_000, '{"lora_alpha": ' + "9" * 5000 + "}", "\ud800",
    ],
)  # fmt: skip
def test_settings_of_another_type_are_one_sentence(pairs, tmp_path, text):
    save_file(written(pairs, "peft"), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        read_lora(tmp_path)


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
    with pytest.raises(CheckpointError, match="q_proj has only one of its two matrices"):
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
