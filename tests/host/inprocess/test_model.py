"""The MODEL inside the host: every way a file is loaded, what it is equal to, and what is refused."""

import json
import logging

import pytest
import torch
from safetensors.torch import save_file

LINEARS = (".q_proj.weight", ".k_proj.weight", ".v_proj.weight", ".proj.weight", ".v_mlp.weight", ".linear2.weight", "_mlp.0.weight", "_mlp.2.weight")  # fmt: skip
FP8_MAX = 448.0


@pytest.fixture(scope="module")
def inputs(pack):
    """x [1, 16 + 17, T, H, W], timestep [1] (sigma * 1000), context, pooled; and the same for the core."""
    generator = torch.Generator().manual_seed(0)
    latents, cond = (torch.randn(1, channels, 3, 6, 8, generator=generator) for channels in (16, 17))
    context, pooled = torch.randn(1, 12, 64, generator=generator), torch.randn(1, 64, generator=generator)
    return latents, cond, context, pooled


def host_forward(patcher, inputs):
    """The host's own call: BaseModel.apply_model gives denoised latents; velocity is recovered from it."""
    import comfy.model_management

    latents, cond, context, pooled = inputs
    comfy.model_management.load_models_gpu([patcher])
    sigma = torch.tensor([0.6])
    with torch.inference_mode():
        denoised = patcher.model.apply_model(latents, sigma, c_concat=cond, c_crossattn=context, y=pooled, transformer_options={})
    return (latents - denoised) / sigma


@pytest.fixture(scope="module")
def expected(pack, base, inputs):
    """The core's own prediction from the same file."""
    latents, cond, context, pooled = inputs
    core = pack("opensora_core.checkpoint.load").load_transformer(base / "models/diffusion_models/Open_Sora_v2.safetensors", torch.float32)
    with torch.inference_mode():
        return core(latents, torch.tensor([0.6]), context, pooled, cond)


@pytest.fixture(scope="module")
def write(base):
    """Write tensors into models/diffusion_models and return the file's name."""

    def save(name, tensors, metadata=None):
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, base / "models/diffusion_models" / name, metadata)
        return name

    return save


def is_block_linear(key):
    return "blocks." in key and key.endswith(LINEARS)


def scaled(weights):
    """(tensors, layers) with the blocks' linears as float8 under one scale each."""
    tensors, layers = {}, []
    for key, tensor in weights.items():
        if not is_block_linear(key):
            tensors[key] = tensor
            continue
        scale = tensor.float().abs().max() / FP8_MAX
        tensors[key] = (tensor.float() / scale).to(torch.float8_e4m3fn)
        tensors[key[: -len("weight")] + "weight_scale"] = scale
        layers.append(key[: -len(".weight")])
    return tensors, layers


def test_the_stock_loader_gives_the_model(model, pack):
    assert isinstance(model.model, pack("nodes.host.families").BesideModel)
    assert model.model.config.hidden_size == 96
    assert model.model.model_type.name == "FLOW"
    assert model.model.latent_format.scale_factor == pack("opensora_core.codecs.hunyuan.config").LATENT_SCALE


def test_a_forward_equals_the_core(model, inputs, expected, relative_error):
    assert relative_error(host_forward(model, inputs), expected) < 2e-5


def test_our_loader_gives_the_same(run_node, inputs, expected, relative_error):
    patcher = run_node("OpenSoraModelLoader", model_name="Open_Sora_v2.safetensors", precision="auto")[0]
    assert relative_error(host_forward(patcher, inputs), expected) < 2e-5


def bare(weights):
    return weights, None


def prefixed(weights):
    return {f"model.diffusion_model.{key}": tensor for key, tensor in weights.items()}, None


def trainer_prefixed(weights):
    return {f"module.{key}": tensor for key, tensor in weights.items()}, None


def fp32(weights):
    return {key: tensor.float() for key, tensor in weights.items()}, None


def renamed_norms(weights):
    return {key.replace("_norm.scale", "_norm.weight"): tensor for key, tensor in weights.items()}, None


def plain_fp8(weights):
    return {key: tensor.to(torch.float8_e4m3fn) if is_block_linear(key) else tensor for key, tensor in weights.items()}, None


def metadata_fp8(weights):
    tensors, layers = scaled(weights)
    return tensors, {"_quantization_metadata": json.dumps({"layers": {layer: {"format": "float8_e4m3fn"} for layer in layers}})}


def in_file_fp8(weights):
    tensors, layers = scaled(weights)
    mark = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    return tensors | {f"{layer}.comfy_quant": mark.clone() for layer in layers}, None


def legacy_fp8(weights):
    tensors, layers = scaled(weights)
    old = {key.replace("weight_scale", "scale_weight"): tensor for key, tensor in tensors.items()}
    return old | {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, None


@pytest.mark.parametrize("loader", ["stock", "ours"])
@pytest.mark.parametrize(
    ("form", "tolerance"),
    [
        (bare, 2e-5), (prefixed, 2e-5), (fp32, 2e-5), (renamed_norms, 2e-5),
        (plain_fp8, 0.2), (metadata_fp8, 0.2), (in_file_fp8, 0.2), (legacy_fp8, 0.2),
    ],
)  # fmt: skip
def test_every_form_of_the_file(form, tolerance, loader, weights, write, run_node, inputs, expected, relative_error):
    name = write(f"{form.__name__}.safetensors", *form(weights))
    if loader == "stock":
        patcher = run_node("UNETLoader", unet_name=name, weight_dtype="default")[0]
    else:
        patcher = run_node("OpenSoraModelLoader", model_name=name, precision="auto")[0]
    assert type(patcher.model).__name__ == "OpenSora2Model"
    error = relative_error(host_forward(patcher, inputs), expected)
    assert error < tolerance
    assert tolerance < 0.1 or error > 1e-5, "an 8-bit file that computes the same numbers was not read as one"


def quantised_by_the_host(weights, form):
    """Tensors of a file whose block linears the host itself quantised, with the notes it reads. Skips where this machine cannot."""
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    mark = torch.tensor(list(json.dumps({"format": form}).encode()), dtype=torch.uint8)
    tensors = dict(weights)
    for key in filter(is_block_linear, weights):
        try:
            held = QuantizedTensor.from_float(weights[key].float(), QUANT_ALGOS[form]["comfy_tensor_layout"])
        except (RuntimeError, NotImplementedError, ValueError, TypeError, KeyError) as error:
            pytest.skip(f"this host cannot make {form} here: {error}")
        del tensors[key]
        tensors |= held.state_dict(key) | {key[: -len("weight")] + "comfy_quant": mark.clone()}
    return tensors


@pytest.mark.parametrize("loader", ["stock", "ours"])
@pytest.mark.parametrize("form", ["float8_e4m3fn", "float8_e5m2", "int8_tensorwise", "mxfp8", "nvfp4"])
def test_every_quantised_form_of_the_host(form, loader, weights, write, run_node, inputs, expected, relative_error):
    name = write(f"host_{form}.safetensors", quantised_by_the_host(weights, form))
    if loader == "stock":
        patcher = run_node("UNETLoader", unet_name=name, weight_dtype="default")[0]
    else:
        patcher = run_node("OpenSoraModelLoader", model_name=name, precision="auto")[0]
    assert 1e-5 < relative_error(host_forward(patcher, inputs), expected) < {"nvfp4": 0.5}.get(form, 0.3)


@pytest.mark.parametrize("form", ["fp8_e4m3fn", "int8"])
def test_files_that_the_library_quantised(form, base, pack, run_node, inputs, expected, relative_error):
    models = base / "models/diffusion_models"
    target = models / f"library_{form}.safetensors"
    pack("opensora_core.checkpoint.quantize").quantize(models / "Open_Sora_v2.safetensors", target, form)
    for node, arguments in (
        ("UNETLoader", {"unet_name": target.name, "weight_dtype": "default"}),
        ("OpenSoraModelLoader", {"model_name": target.name, "precision": "auto"}),
    ):
        assert 1e-5 < relative_error(host_forward(run_node(node, **arguments)[0], inputs), expected) < 0.1


def test_a_training_tools_prefix_loads_through_ours(weights, write, run_node, inputs, expected, relative_error):
    name = write("module.safetensors", *trainer_prefixed(weights))
    patcher = run_node("OpenSoraModelLoader", model_name=name, precision="auto")[0]
    assert relative_error(host_forward(patcher, inputs), expected) < 2e-5


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp8_e4m3fn", torch.float8_e4m3fn)])
def test_precision_is_how_weights_are_held(precision, dtype, run_node, inputs, expected, relative_error):
    patcher = run_node("OpenSoraModelLoader", model_name="Open_Sora_v2.safetensors", precision=precision)[0]
    network = patcher.model.diffusion_model
    held = network.double_blocks[0].img_attn.q_proj.weight
    assert getattr(held, "_qdata", held).dtype == dtype
    error = relative_error(host_forward(patcher, inputs), expected)
    assert error < {"fp32": 2e-5, "bf16": 0.02, "fp8_e4m3fn": 0.1}[precision]
    if precision == "fp8_e4m3fn":
        # A scale for each weight, and what is small and delicate is kept: nearer than the host's plain cast of everything.
        assert network.double_blocks[0].img_mod.lin.weight.dtype != dtype and network.img_in.bias.dtype != dtype
        plain = run_node("UNETLoader", unet_name="Open_Sora_v2.safetensors", weight_dtype="fp8_e4m3fn")[0]
        assert 1e-4 < error < 0.7 * relative_error(host_forward(plain, inputs), expected)


def test_8_bit_files_are_not_rounded_twice(weights, write, run_node, inputs, expected, relative_error):
    name = write("plain8.safetensors", *plain_fp8(weights))
    errors = [
        relative_error(host_forward(run_node("OpenSoraModelLoader", model_name=name, precision=precision)[0], inputs), expected)
        for precision in ("auto", "fp8_e4m3fn")
    ]
    assert errors[0] == errors[1]


def test_the_stock_loader_in_fp8(run_node, inputs, expected, relative_error):
    patcher = run_node("UNETLoader", unet_name="Open_Sora_v2.safetensors", weight_dtype="fp8_e4m3fn")[0]
    assert 1e-5 < relative_error(host_forward(patcher, inputs), expected) < 0.3


def test_a_fused_file_becomes_the_released_layout(write, run_node, pack, inputs, relative_error):
    layouts, config = pack("opensora_core.networks.mmdit.layout"), pack("opensora_core.networks.mmdit.config")
    sizes = {**config.OPEN_SORA_2.__dict__, "hidden_size": 96, "num_heads": 3, "mlp_hidden_size": 384, "depth": 1, "depth_single_blocks": 1}
    small = config.TransformerConfig(**{**sizes, "context_in_dim": 64, "vec_in_dim": 64})
    generator = torch.Generator().manual_seed(3)
    manifest = pack("opensora_core.families.table").manifest(small, layouts.FUSED)
    fused = {
        key: 1 + 0.1 * torch.randn(shape, generator=generator) if key.endswith(".scale") else 0.1 * torch.randn(shape, generator=generator)
        for key, shape in manifest.items()
    }
    name = write("fused.safetensors", fused)
    latents, cond, context, pooled = inputs
    core = pack("opensora_core.checkpoint.load").load_transformer(write_path(run_node, name), torch.float32)
    with torch.inference_mode():
        wanted = core(latents, torch.tensor([0.6]), context, pooled, cond)
    patcher = run_node("UNETLoader", unet_name=name, weight_dtype="default")[0]
    assert relative_error(host_forward(patcher, inputs), wanted) < 2e-5


def write_path(run_node, name):
    import folder_paths

    return folder_paths.get_full_path("diffusion_models", name)


def test_registration_can_be_repeated(pack):
    import comfy.supported_models

    module = pack("nodes.host.families")
    before = list(comfy.supported_models.models)
    module.register()
    module.register()
    assert comfy.supported_models.models == before
    assert before[0].__name__ == "OpenSora2" and [m.__name__ for m in before].count("OpenSora2") == 1


def test_a_flux_file_is_still_flux(weights, write, run_node):
    # What the host makes of Flux files must not change because this pack is installed.
    import comfy.model_detection

    flux = {key: tensor for key, tensor in weights.items() if not key.startswith("cond_in")}
    found = comfy.model_detection.model_config_from_unet(flux, "")
    assert type(found).__name__ == "FluxSchnell"


def damaged(weights, base, kind):
    """Write a wrong file of a kind and return its name."""
    path = base / "models/diffusion_models" / f"wrong_{kind}.safetensors"
    released = (base / "models/diffusion_models/Open_Sora_v2.safetensors").read_bytes()
    if kind == "truncated":
        path.write_bytes(released[:-1000])
    elif kind == "corrupt":
        path.write_bytes(released[:8] + b"{" + b"\xff" * 200 + released[209:])
    elif kind == "web page":
        path.write_bytes(b"<!DOCTYPE html><html></html>" * 10)
    elif kind == "vae":
        path.write_bytes((base / "models/vae/hunyuan_vae.safetensors").read_bytes())
    elif kind == "t5":
        path.write_bytes((base / "models/text_encoders/t5xxl.safetensors").read_bytes())
    elif kind == "flux":
        fused = {"guidance_in.in_layer.bias": torch.zeros(96), "double_blocks.0.img_attn.qkv.bias": torch.zeros(288)}
        save_file({key: tensor for key, tensor in (weights | fused).items() if not key.startswith("cond_in")}, path)
    elif kind == "missing":
        save_file({key: tensor for key, tensor in weights.items() if key != "single_blocks.1.linear2.bias"}, path)
    elif kind == "misshaped":
        save_file(weights | {"txt_in.bias": torch.zeros(95, dtype=torch.bfloat16)}, path)
    return path.name


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("truncated", "is truncated: 1,000 of"),
        ("corrupt", "is damaged|neither a safetensors"),
        ("web page", "is a web page, not weights"),
        ("vae", "Give the Open-Sora 2.0 transformer.*HunyuanVideo.*VAE"),
        ("t5", "Give the Open-Sora 2.0 transformer.*T5 encoder"),
        ("flux", "Flux.1 transformer"),
        ("missing", "not whole; .*single_blocks.1.linear2.bias"),
        ("misshaped", r"not whole; .*txt_in.bias \[95\], expected \[96\]"),
    ],
)
def test_a_wrong_file_gets_one_sentence(kind, words, weights, base, run_node, pack):
    name = damaged(weights, base, kind)
    with pytest.raises(pack("opensora_core.errors").CheckpointError, match=words) as caught:
        run_node("OpenSoraModelLoader", model_name=name, precision="auto")
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_the_stock_loader_says_so_too(weights, base, run_node):
    with pytest.raises(ValueError, match="single_blocks.1.linear2.bias"):
        run_node("UNETLoader", unet_name=damaged(weights, base, "missing"), weight_dtype="default")


def test_a_quantised_file_is_not_quantised_again(weights, write, run_node):
    name = write("again.safetensors", *metadata_fp8(weights))
    with pytest.raises(ValueError, match="already quantised"):
        run_node("OpenSoraModelLoader", model_name=name, precision="fp8_e4m3fn")


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "..\\outside.safetensors", "C:\\outside.safetensors", "gone.safetensors", ""]
)
def test_a_path_outside_or_absent_is_refused(name, base, run_node):
    (base / "models/outside.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="models/diffusion_models"):
        run_node("OpenSoraModelLoader", model_name=name, precision="auto")


def test_the_small_model_is_read_as_any_other(base, pack, run_node, monkeypatch, tmp_path, inputs, expected, relative_error):
    loader = pack("nodes.loaders").OpenSoraModelLoader
    monkeypatch.setattr(pack("opensora_core.run.files"), "SMALL", tmp_path)
    assert "small (built in)" in loader.INPUT_TYPES()["required"]["model_name"][1]["options"]
    with pytest.raises((ValueError, OSError)):
        run_node("OpenSoraModelLoader", model_name="small (built in)", precision="auto")
    (tmp_path / "Open_Sora_v2.safetensors").write_bytes((base / "models/diffusion_models/Open_Sora_v2.safetensors").read_bytes())
    patcher = run_node("OpenSoraModelLoader", model_name="small (built in)", precision="auto")[0]
    assert relative_error(host_forward(patcher, inputs), expected) < 2e-5


def test_a_replaced_file_is_loaded_again(base, weights, write, pack):
    node = pack("nodes.loaders").OpenSoraModelLoader
    name = write("replaced.safetensors", weights)
    before = node.fingerprint_inputs(model_name=name, precision="auto")
    assert node.fingerprint_inputs(model_name=name, precision="auto") == before
    write(name, {key: tensor.float() for key, tensor in weights.items()})
    assert node.fingerprint_inputs(model_name=name, precision="auto") != before


def test_saving_writes_the_released_names(model, weights, tmp_path):
    import comfy.sd
    from safetensors.torch import load_file

    comfy.sd.save_checkpoint(str(tmp_path / "saved.safetensors"), model)
    saved = load_file(tmp_path / "saved.safetensors")
    assert {key.removeprefix("model.diffusion_model.") for key in saved} == set(weights)


def test_a_copy_without_dynamic_memory_can_be_made(run_node, inputs, expected, relative_error):
    for node, inputs_of in (
        ("UNETLoader", {"unet_name": "Open_Sora_v2.safetensors", "weight_dtype": "default"}),
        ("OpenSoraModelLoader", {"model_name": "Open_Sora_v2.safetensors", "precision": "auto"}),
    ):
        patcher = run_node(node, **inputs_of)[0]
        loader, arguments = patcher.cached_patcher_init
        assert relative_error(host_forward(loader(*arguments, disable_dynamic=True), inputs), expected) < 2e-5


def test_dynamic_memory_builds_layers_without_weights(weights, inputs, expected, relative_error, pack, monkeypatch):
    # With it the host's layers are empty until the file is read; nothing of ours may ask them for a weight before.
    import comfy.memory_management
    import comfy.sd

    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)
    patcher = comfy.sd.load_diffusion_model_state_dict({key: tensor.float() for key, tensor in weights.items()})
    monkeypatch.undo()
    assert patcher.model.diffusion_model.dtype is not None
    assert not [name for name, parameter in patcher.model.diffusion_model.named_parameters() if parameter is None]
    assert relative_error(host_forward(patcher, inputs), expected) < 2e-5


def test_loading_says_nothing(run_node, caplog):
    with caplog.at_level(logging.WARNING):
        run_node("OpenSoraModelLoader", model_name="Open_Sora_v2.safetensors", precision="auto")
    assert not caplog.records


def test_the_host_estimates_memory(model):
    assert model.model.memory_required([1, 16, 33, 24, 42]) > 0
