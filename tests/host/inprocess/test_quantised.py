"""Files written by `quantize`, in the host's stock loader: read as quantised, computed as the library computes them, sampled, patched."""

import pytest
import torch

# Largest difference from the library's own result of the same file, as a share of the largest value. The host multiplies fp8 weights
# as the library does where the device has no fp8 units; int8 weights it multiplies as integers, tokens rounded to 8 bits.
TOLERANCE = {"fp8_e4m3fn": 1e-5, "int8": 0.03}
CHANGE = {"fp8_e4m3fn": 0.09, "int8": 0.04}  # from the file that was quantised


@pytest.fixture(scope="module", params=list(TOLERANCE))
def quantised(request, pack, base):
    """(format, file name) of a file that the library wrote into the host's models folder."""
    folder, name = base / "models/diffusion_models", f"quantised_{request.param}.safetensors"
    pack("opensora_core.checkpoint.quantize").quantize(folder / "Open_Sora_v2.safetensors", folder / name, request.param)
    return request.param, name


@pytest.fixture(scope="module")
def patcher(quantised, run_node):
    return run_node("UNETLoader", unet_name=quantised[1], weight_dtype="default")[0]


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(0)
    latents, cond = (torch.randn(1, channels, 3, 6, 8, generator=generator) for channels in (16, 17))
    return latents, cond, torch.randn(1, 12, 64, generator=generator), torch.randn(1, 64, generator=generator)


def host_forward(patcher, inputs):
    import comfy.model_management

    latents, cond, context, pooled = inputs
    comfy.model_management.load_models_gpu([patcher])
    sigma = torch.tensor([0.6])
    with torch.inference_mode():
        denoised = patcher.model.apply_model(latents, sigma, c_concat=cond, c_crossattn=context, y=pooled, transformer_options={})
    return (latents - denoised) / sigma


def library_forward(pack, path, inputs):
    latents, cond, context, pooled = inputs
    model = pack("opensora_core.checkpoint.load").load_transformer(path, torch.float32)
    with torch.inference_mode():
        return model(latents, torch.tensor([0.6]), context, pooled, cond)


def test_the_host_holds_the_layers_in_the_files_format(quantised, patcher, pack):
    import comfy.quant_ops

    formats = pack("opensora_core.checkpoint.formats")
    model = patcher.model.diffusion_model
    held = {name: module.quant_format for name, module in model.named_modules() if getattr(module, "quant_format", None)}
    shapes = pack("opensora_core.families.table").manifest(model.config)
    assert held == dict.fromkeys(pack("opensora_core.families.table").DEFAULT.layers_to_quantise(shapes), formats.HOST_NAMES[quantised[0]])
    weight = model.double_blocks[0].img_attn.q_proj.weight
    assert isinstance(weight, comfy.quant_ops.QuantizedTensor) and weight._qdata.element_size() == 1


def test_the_hosts_forward_is_the_librarys(quantised, patcher, inputs, pack, base, relative_error):
    name, file = quantised
    found = host_forward(patcher, inputs)
    assert relative_error(found, library_forward(pack, base / "models/diffusion_models" / file, inputs)) < TOLERANCE[name]
    original = library_forward(pack, base / "models/diffusion_models/Open_Sora_v2.safetensors", inputs)
    assert 1e-3 < relative_error(found, original) < CHANGE[name]


def test_our_loader_reads_it_too(quantised, patcher, inputs, run_node, relative_error):
    ours = run_node("OpenSoraModelLoader", model_name=quantised[1], precision="auto")[0]
    assert relative_error(host_forward(ours, inputs), host_forward(patcher, inputs)) < 1e-6


def test_it_samples(quantised, patcher, model, run_node, conditioning, relative_error):
    latent = run_node("EmptyHunyuanLatentVideo", width=64, height=48, length=5, batch_size=1)[0]

    def sample(model):
        settings = {"seed": 1, "steps": 3, "cfg": 2.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
        return run_node("KSampler", model=model, positive=conditioning(1), negative=conditioning(2), latent_image=latent, **settings)[0][
            "samples"
        ]

    assert 1e-4 < relative_error(sample(patcher), sample(model)) < 3 * CHANGE[quantised[0]]


def test_a_lora_changes_it(quantised, patcher, model, inputs, base, run_node, relative_error):
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(5)
    layers = ("double_blocks.0.img_attn.q_proj", "single_blocks.1.linear2")
    shapes = {layer: dict(model.model.diffusion_model.named_modules())[layer].weight.shape for layer in layers}
    lora = {}
    for layer, (rows, columns) in shapes.items():
        lora[f"diffusion_model.{layer}.lora_A.weight"] = 0.3 * torch.randn(4, columns, generator=generator)
        lora[f"diffusion_model.{layer}.lora_B.weight"] = 0.3 * torch.randn(rows, 4, generator=generator)
    save_file(lora, base / "models/loras/quantised_test.safetensors")

    def changed(model):
        return host_forward(
            run_node("LoraLoaderModelOnly", model=model, lora_name="quantised_test.safetensors", strength_model=1.0)[0], inputs
        )

    wanted = changed(model)
    assert relative_error(wanted, host_forward(model, inputs)) > 0.3
    assert relative_error(changed(patcher), wanted) < 2 * CHANGE[quantised[0]]


@pytest.mark.parametrize("form", list(TOLERANCE))
def test_a_file_of_every_layer_quantised_runs(form, inputs, run_node, pack, base, relative_error):
    folder, name = base / "models/diffusion_models", f"quantised_whole_{form}.safetensors"
    groups = pack("opensora_core.families.table").DEFAULT.groups
    pack("opensora_core.checkpoint.quantize").quantize(folder / "Open_Sora_v2.safetensors", folder / name, form, groups)
    patcher = run_node("UNETLoader", unet_name=name, weight_dtype="default")[0]
    # Outside attention and MLP the file asks the host not to round inputs.
    assert patcher.model.diffusion_model.double_blocks[0].img_mod.lin._full_precision_mm
    assert relative_error(host_forward(patcher, inputs), library_forward(pack, folder / name, inputs)) < TOLERANCE[form]
