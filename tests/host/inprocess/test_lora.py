"""LoRA files on the MODEL: each key form gives the merged weights' result, and a file that does not fit says so."""

import json

import pytest
import torch
from safetensors.torch import save_file

LAYERS = {"double_blocks.0.img_attn.q_proj": (96, 96), "double_blocks.1.txt_mlp.2": (96, 384), "single_blocks.2.v_mlp": (480, 96), "img_in": (96, 64)}  # fmt: skip
RANK, ALPHA, STRENGTH = 4, 8.0, 0.6


@pytest.fixture(scope="module")
def pairs():
    generator = torch.Generator().manual_seed(0)
    return {
        layer: (torch.randn(RANK, columns, generator=generator) * 0.3, torch.randn(rows, RANK, generator=generator) * 0.3)
        for layer, (rows, columns) in LAYERS.items()
    }


@pytest.fixture
def write(base):
    def save(name, tensors, metadata=None):
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, base / "models/loras" / name, metadata)
        return name

    return save


def named(pairs, stem, down, up, alpha=None, join="."):
    tensors = {}
    for layer, (a, b) in pairs.items():
        key = stem + layer.replace(".", join)
        tensors |= {key + down: a, key + up: b}
        if alpha is not None:
            tensors[key + ".alpha"] = torch.tensor(alpha)
    return tensors


FORMS = {
    "peft": lambda p: (named(p, "base_model.model.", ".lora_A.weight", ".lora_B.weight"), 1.0),
    "peft with adapter name": lambda p: (named(p, "base_model.model.", ".lora_A.default.weight", ".lora_B.default.weight"), 1.0),
    "kohya": lambda p: (named(p, "lora_unet_", ".lora_down.weight", ".lora_up.weight", ALPHA, "_"), ALPHA / RANK),
    "diffusers": lambda p: (named(p, "transformer.", ".lora_A.weight", ".lora_B.weight"), 1.0),
    "comfy": lambda p: (named(p, "diffusion_model.", ".lora_down.weight", ".lora_up.weight", ALPHA), ALPHA / RANK),
    "bare": lambda p: (named(p, "", ".lora_A.weight", ".lora_B.weight"), 1.0),
}


def forward(patcher):
    import comfy.model_management

    generator = torch.Generator().manual_seed(1)
    x, cond, context, pooled = (
        torch.randn(shape, generator=generator) for shape in ((1, 16, 2, 4, 4), (1, 17, 2, 4, 4), (1, 6, 64), (1, 64))
    )
    comfy.model_management.load_models_gpu([patcher])
    with torch.inference_mode():
        denoised = patcher.model.apply_model(x, torch.tensor([0.5]), c_concat=cond, c_crossattn=context, y=pooled, transformer_options={})
    return denoised


@pytest.mark.parametrize("form", FORMS)
def test_every_key_form(form, pairs, write, weights, run_node, relative_error):
    import comfy.sd

    tensors, scale = FORMS[form](pairs)
    name = write(f"{form}.safetensors", tensors)
    merged = {key: tensor.float() for key, tensor in weights.items()}
    for layer, (a, b) in pairs.items():
        merged[f"{layer}.weight"] = merged[f"{layer}.weight"] + STRENGTH * scale * (b @ a)
    expected = forward(comfy.sd.load_diffusion_model_state_dict(merged))
    (model,) = run_node("UNETLoader", unet_name="Open_Sora_v2.safetensors", weight_dtype="default")
    before = forward(model)
    (patched,) = run_node("OpenSoraLoraLoader", model=model, lora_name=name, strength=STRENGTH)
    assert relative_error(forward(patched), expected) < 2e-5
    assert torch.equal(forward(model), before), "the MODEL that was given is not changed"
    assert relative_error(before, expected) > 0.01


def test_alpha_from_the_files_own_metadata(pairs, write, run_node, model, relative_error):
    tensors = FORMS["peft"](pairs)[0]
    plain = write("no_alpha.safetensors", tensors)
    with_alpha = write("alpha.safetensors", tensors, {"lora_alpha": str(2 * RANK)})
    (twice,) = run_node("OpenSoraLoraLoader", model=model, lora_name=plain, strength=2.0)
    (once,) = run_node("OpenSoraLoraLoader", model=model, lora_name=with_alpha, strength=1.0)
    assert relative_error(forward(once), forward(twice)) < 2e-5


def test_two_loras_add_up(pairs, write, run_node, model, relative_error):
    name = write("half.safetensors", FORMS["peft"](pairs)[0])
    (half,) = run_node("OpenSoraLoraLoader", model=model, lora_name=name, strength=0.5)
    (both,) = run_node("OpenSoraLoraLoader", model=half, lora_name=name, strength=0.5)
    (whole,) = run_node("OpenSoraLoraLoader", model=model, lora_name=name, strength=1.0)
    assert relative_error(forward(both), forward(whole)) < 2e-5


def test_strength_zero_is_the_model(pairs, write, run_node, model):
    name = write("zero.safetensors", FORMS["peft"](pairs)[0])
    assert run_node("OpenSoraLoraLoader", model=model, lora_name=name, strength=0.0)[0] is model


def test_on_an_8_bit_model(pairs, write, run_node, relative_error):
    (model,) = run_node("OpenSoraModelLoader", model_name="Open_Sora_v2.safetensors", precision="fp8_e4m3fn")
    before = forward(model)
    (patched,) = run_node("OpenSoraLoraLoader", model=model, lora_name=write("on8.safetensors", FORMS["peft"](pairs)[0]), strength=1.0)
    assert relative_error(forward(patched), before) > 0.01


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("flux", "no key matches.*LoRA for Flux"), ("text", "no key matches"), ("model", "Give a LoRA: "), ("half", "only one of its two matrices"),
        ("size", "trained for another model"), ("depth", "none of its 1 layers is in this model"), ("truncated", "truncated"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_gets_one_sentence(kind, words, pairs, write, weights, base, run_node, model, pack):
    a, b = pairs["double_blocks.0.img_attn.q_proj"]
    stem = "base_model.model.double_blocks.0.img_attn.q_proj"
    tensors = {
        "flux": {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": a, "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": b},
        "text": {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": a, "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": b},
        "model": weights,
        "half": {f"{stem}.lora_A.weight": a},
        "size": {f"{stem}.lora_A.weight": torch.zeros(4, 128), f"{stem}.lora_B.weight": torch.zeros(128, 4)},
        "depth": {f"{stem.replace('.0.', '.18.')}.lora_A.weight": a, f"{stem.replace('.0.', '.18.')}.lora_B.weight": b},
        "truncated": {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b},
    }[kind]  # fmt: skip
    name = write(f"wrong_{kind}.safetensors", tensors)
    if kind == "truncated":
        path = base / "models/loras" / name
        path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(pack("opensora_core.errors").CheckpointError, match=words) as caught:
        run_node("OpenSoraLoraLoader", model=model, lora_name=name, strength=1.0)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_strength_must_be_a_number(pairs, write, run_node, model):
    name = write("nan.safetensors", FORMS["peft"](pairs)[0])
    with pytest.raises(ValueError, match="strength=nan is not a finite number"):
        run_node("OpenSoraLoraLoader", model=model, lora_name=name, strength=float("nan"))


def test_a_replaced_file_is_read_again(pairs, write, pack):
    node = pack("nodes.loaders").OpenSoraLoraLoader
    name = write("stamp.safetensors", FORMS["peft"](pairs)[0])
    before = node.fingerprint_inputs(lora_name=name, strength=1.0)
    write(name, FORMS["kohya"](pairs)[0], {"note": json.dumps("longer")})
    assert node.fingerprint_inputs(lora_name=name, strength=1.0) != before


def other_forms():
    """Tensors of one layer by each other form, whose change is [96, 96] and a bias's [96]."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape):
        return torch.randn(shape, generator=generator) * 0.3

    return {
        "loha": {"hada_w1_a": draw(96, 4), "hada_w1_b": draw(4, 96), "hada_w2_a": draw(96, 4), "hada_w2_b": draw(4, 96), "alpha": torch.tensor(2.0)},
        "lokr": {"lokr_w1": draw(8, 8), "lokr_w2": draw(12, 12)},
        "diff": {"diff": draw(96, 96), "diff_b": draw(96)},
        "lora and diff_b": {"lora_down.weight": draw(4, 96), "lora_up.weight": draw(96, 4), "diff_b": draw(96)},
    }  # fmt: skip


@pytest.mark.parametrize("form", other_forms())
def test_other_forms_are_what_the_stock_loader_makes_of_them(form, write, run_node, model, relative_error):
    name = write(
        "other.safetensors", {f"diffusion_model.double_blocks.0.img_attn.q_proj.{part}": t for part, t in other_forms()[form].items()}
    )
    (ours,) = run_node("OpenSoraLoraLoader", model=model, lora_name=name, strength=STRENGTH)
    (stock,) = run_node("LoraLoaderModelOnly", model=model, lora_name=name, strength_model=STRENGTH)
    assert not torch.equal(forward(ours), forward(model))
    assert relative_error(forward(ours), forward(stock)) == 0


def test_nan_in_a_lora_is_refused_by_name(pairs, write, run_node, model, pack):
    tensors, _ = FORMS["peft"](pairs)
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    tensors["base_model.model.img_in.lora_A.weight"][0, 0] = torch.nan
    name = write("nan.safetensors", tensors)
    with pytest.raises(pack("opensora_core.errors").CheckpointError, match="nan.safetensors holds values that are not numbers.*img_in"):
        run_node("OpenSoraLoraLoader", model=model, lora_name=name, strength=1.0)
