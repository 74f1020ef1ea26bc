"""The host's own nodes on our MODEL: each changes what it should, and nothing where it is neutral."""

import os

import pytest
import torch
from in_core import run_in_core

SHAPE = (1, 16, 3, 6, 8)
STEPS = 4


@pytest.fixture(scope="module")
def core(pack, base):
    return pack("opensora_core.checkpoint.load").load_transformer(base / "models/diffusion_models/Open_Sora_v2.safetensors", torch.float32)


@pytest.fixture(scope="module")
def sample(run_node, conditioning):
    """Our one-node sampler: sample(model) -> unscaled latents."""

    def run(model, positive=None, negative=None, shape=SHAPE, steps=STEPS, **changes):
        settings = {"seed": 3, "steps": steps, "text_guidance": 3.0, "image_guidance": 2.0, **changes}
        conds = {"positive": positive or conditioning(1), "negative": negative or conditioning(2)}
        return run_node("OpenSoraRectifiedFlowSampler", model=model, latent={"samples": torch.zeros(shape)}, **conds, **settings)[0][
            "samples"
        ]

    return run


@pytest.fixture(scope="module")
def plain(sample, model):
    return sample(model)


def with_picture(conditioning, shape=SHAPE):
    latents, mask = torch.zeros(shape), torch.ones(shape[0], 1, *shape[2:])
    latents[:, :, 0], mask[:, :, 0] = torch.randn(shape[0], shape[1], *shape[3:], generator=torch.Generator().manual_seed(5)), 0
    return [[context, {**values, "concat_latent_image": latents, "concat_mask": mask}] for context, values in conditioning]


def differs(a, b):
    return torch.isfinite(a).all() and not torch.allclose(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("picture", [False, True], ids=["t2v", "i2v"])
def test_ksampler_is_plain_guidance(picture, run_node, model, core, pack, conditioning, relative_error):
    import comfy.samplers

    (shifted,) = run_node("ModelSamplingSD3", model=model, shift=5.0)
    positive, negative = conditioning(1), conditioning(2)
    if picture:
        positive, negative = with_picture(positive), with_picture(negative)
    latent = run_node("EmptyHunyuanLatentVideo", width=64, height=48, length=9, batch_size=1)[0]
    (found,) = run_node(
        "KSampler",
        model=shifted,
        seed=3,
        steps=5,
        cfg=4.0,
        sampler_name="euler",
        scheduler="simple",
        positive=positive,
        negative=negative,
        latent_image=latent,
        denoise=1.0,
    )
    scale = pack("opensora_core.codecs.hunyuan.config").LATENT_SCALE
    guidance = pack("opensora_core.sampling.guidance").Guidance(text=4.0, image=1.0, text_oscillation=False)
    sigmas = comfy.samplers.calculate_sigmas(shifted.get_model_object("model_sampling"), "simple", 5)
    values, condition = positive[0][1], None
    if picture:
        known = 1 - values["concat_mask"]
        condition = pack("opensora_core.sampling.given").ImageCondition(known, scale * values["concat_latent_image"])
    expected = run_in_core(pack, core, (SHAPE, 3), sigmas, guidance, (positive[0], negative[0]), condition) / scale
    if picture:  # KSampler does not put the reference frames back
        found["samples"], expected = found["samples"][:, :, 1:], expected[:, :, 1:]
    assert relative_error(found["samples"], expected) < 5e-5


def test_dual_cfg_guider_is_our_formula_without_oscillation(run_node, model, conditioning, relative_error):
    positive, negative, latent = with_picture(conditioning(1)), with_picture(conditioning(2)), {"samples": torch.zeros(SHAPE)}
    shifted, sigmas = run_node("OpenSoraScheduler", model=model, latent=latent, steps=5, shift=0.0)
    noise, sampler = run_node("RandomNoise", noise_seed=3)[0], run_node("KSamplerSelect", sampler_name="euler")[0]
    (dual,) = run_node(
        "DualCFGGuider",
        model=shifted,
        cond1=positive,
        cond2=negative,
        negative=conditioning(2),
        cfg_conds=7.5,
        cfg_cond2_negative=3.0,
        style="regular",
    )
    off = {"text_oscillation": False, "image_oscillation": False, "temporal_ramp": False}
    (ours,) = run_node("OpenSoraGuider", model=shifted, positive=positive, negative=negative, text_guidance=7.5, image_guidance=3.0, **off)
    found, expected = (
        run_node("SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas, latent_image=latent)[0]["samples"]
        for guider in (dual, ours)
    )
    assert relative_error(found[:, :, 1:], expected[:, :, 1:]) < 5e-5
    assert not torch.allclose(found[:, :, 0], expected[:, :, 0]), "only ours puts the reference frame back"


def test_basic_and_cfg_guider_run(run_node, model, conditioning):
    latent = {"samples": torch.zeros(SHAPE)}
    shifted, sigmas = run_node("OpenSoraScheduler", model=model, latent=latent, steps=3, shift=0.0)
    noise, sampler = run_node("RandomNoise", noise_seed=3)[0], run_node("KSamplerSelect", sampler_name="euler")[0]
    guiders = [
        run_node("BasicGuider", model=shifted, conditioning=conditioning(1))[0],
        run_node("CFGGuider", model=shifted, positive=conditioning(1), negative=conditioning(2), cfg=4.0)[0],
    ]
    first, second = (
        run_node("SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas, latent_image=latent)[0]["samples"]
        for guider in guiders
    )
    assert differs(first, second)


def test_stock_samplers_name_wrong_text_too(run_node, model, conditioning):
    latent = {"samples": torch.zeros(SHAPE)}
    inputs = {
        "model": model,
        "seed": 3,
        "steps": 2,
        "cfg": 4.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "latent_image": latent,
        "denoise": 1.0,
    }
    with pytest.raises(ValueError, match="not from T5-XXL: its text is 77 wide"):
        run_node("KSampler", positive=[[torch.zeros(1, 5, 77), {}]], negative=conditioning(2), **inputs)


def test_the_checkpoint_loader_reads_a_single_file(run_node, weights, base, sample, plain, relative_error):
    from safetensors.torch import save_file

    (base / "models/checkpoints").mkdir(exist_ok=True)
    save_file({f"model.diffusion_model.{key}": tensor for key, tensor in weights.items()}, base / "models/checkpoints/single.safetensors")
    found = run_node("CheckpointLoaderSimple", ckpt_name="single.safetensors")[0]
    assert relative_error(sample(found), plain) < 5e-5


def lora_file(base, name="stock.safetensors", prefix="diffusion_model.", layer="double_blocks.0.img_attn.q_proj"):
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(9)
    tensors = {
        f"{prefix}{layer}.lora_A.weight": torch.randn(4, 96, generator=generator),
        f"{prefix}{layer}.lora_B.weight": torch.randn(96, 4, generator=generator),
    }
    save_file(tensors, base / "models/loras" / name)
    return name, tensors


def test_lora_loader_model_only(run_node, model, base, sample, plain):
    name, _ = lora_file(base)
    (patched,) = run_node("LoraLoaderModelOnly", model=model, lora_name=name, strength_model=1.0)
    assert differs(sample(patched), plain)
    assert torch.equal(sample(model), plain), "the MODEL that was given is not changed"


def test_model_sampling_sd3(run_node, model, conditioning):
    latent = {"samples": torch.zeros(SHAPE)}
    inputs = {
        "seed": 3,
        "steps": 4,
        "cfg": 1.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "positive": conditioning(1),
        "negative": conditioning(2),
        "latent_image": latent,
        "denoise": 1.0,
    }
    found = [
        run_node("KSampler", model=run_node("ModelSamplingSD3", model=model, shift=shift)[0], **inputs)[0]["samples"]
        for shift in (1.0, 6.0)
    ]
    assert differs(*found)
    default = run_node("KSampler", model=model, **inputs)[0]["samples"]
    same = run_node("KSampler", model=run_node("ModelSamplingSD3", model=model, shift=5.73)[0], **inputs)[0]["samples"]
    assert torch.allclose(default, same, atol=1e-5)


def count_rows(model):
    import comfy.patcher_extension

    rows = []

    def counting(executor, x, *args, **kwargs):
        rows.append(tuple(x.shape))
        return executor(x, *args, **kwargs)

    model = model.clone()
    # Last of the wrappers, so that what a cache answers is not counted.
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "zz_count", counting)
    return model, rows


def test_easy_cache_skips_forwards(run_node, model, sample, conditioning):
    positive, negative = with_picture(conditioning(1)), with_picture(conditioning(2))
    everything = {"positive": positive, "negative": negative, "steps": 14}
    expected = sample(model, **everything)
    for threshold, is_same in ((0.0, True), (3.0, False)):
        (cached,) = run_node("EasyCache", model=model, reuse_threshold=threshold, start_percent=0.05, end_percent=0.95, verbose=False)
        counted, rows = count_rows(cached)
        found = sample(counted, **everything)
        assert torch.isfinite(found).all()
        assert torch.allclose(found, expected, atol=1e-4) == is_same
        assert (sum(shape[0] for shape in rows) == 12 * 3 + 2 * 1) == is_same


@pytest.mark.parametrize("picture", [False, True], ids=["t2v", "i2v"])
def test_context_windows(picture, run_node, model, sample, conditioning):
    shape = (1, 16, 7, 4, 4)
    positive, negative = conditioning(1), conditioning(2)
    if picture:
        positive, negative = with_picture(positive, shape), with_picture(negative, shape)
    settings = {
        "context_overlap": 1,
        "context_schedule": "standard_static",
        "context_stride": 1,
        "closed_loop": False,
        "fuse_method": "pyramid",
        "dim": 2,
        "freenoise": False,
        "cond_retain_index_list": "0" if picture else "",
        "split_conds_to_windows": False,
    }
    (windowed,) = run_node("ContextWindowsManual", model=model, context_length=3, **settings)
    counted, rows = count_rows(windowed)
    found = sample(counted, positive, negative, shape)
    assert differs(found, sample(model, positive, negative, shape))
    assert max(frames for _, _, frames, *_ in rows) <= 4, "three frames, and one that the host puts before a window as its cause"
    (whole,) = run_node("ContextWindowsManual", model=model, context_length=7, **settings)
    assert torch.allclose(sample(whole, positive, negative, shape), sample(model, positive, negative, shape), atol=1e-5)


def test_context_windows_never_cut_the_text(run_node, model, sample):
    # As many frames as the text is wide (64), so that only the name of a tensor tells them apart.
    shape = (1, 16, 64, 2, 2)
    (windowed,) = run_node(
        "ContextWindowsManual",
        model=model,
        context_length=40,
        context_overlap=4,
        context_schedule="standard_static",
        context_stride=1,
        closed_loop=False,
        fuse_method="flat",
        dim=2,
        freenoise=False,
    )
    assert torch.isfinite(sample(windowed, shape=shape, steps=1)).all()


def test_scale_rope(run_node, model, sample, plain):
    neutral = {f"{kind}_{axis}": float(kind == "scale") for kind in ("scale", "shift") for axis in "xyt"}
    assert torch.allclose(sample(run_node("ScaleROPE", model=model, **neutral)[0]), plain, atol=1e-5)
    for axis in "xyt":
        assert differs(sample(run_node("ScaleROPE", model=model, **{**neutral, f"scale_{axis}": 3.0})[0]), plain), axis


def test_skip_layer_guidance(run_node, model, sample, plain):
    settings = {"scale": 3.0, "start_percent": 0.0, "end_percent": 1.0, "rescaling_scale": 0.0}
    for layers in ({"double_layers": "0", "single_layers": ""}, {"double_layers": "", "single_layers": "1"}):
        assert differs(sample(run_node("SkipLayerGuidanceDiT", model=model, **layers, **settings)[0]), plain)
    none = run_node("SkipLayerGuidanceDiT", model=model, double_layers="", single_layers="", **settings)[0]
    assert torch.equal(sample(none), plain)


def test_normalized_attention_guidance(run_node, model, sample, plain):
    assert differs(sample(run_node("NAGuidance", model=model, nag_scale=5.0, nag_alpha=0.5, nag_tau=1.5)[0]), plain)
    assert (
        torch.allclose(sample(run_node("NAGuidance", model=model, nag_scale=5.0, nag_alpha=0.0, nag_tau=1.5)[0]), plain, atol=1e-3) is False
    ), "even neutral it gives the negative pass the positive's attention"


def test_rescale_cfg(run_node, model, sample, plain):
    assert differs(sample(run_node("RescaleCFG", model=model, multiplier=0.7)[0]), plain)


@pytest.mark.parametrize("block", [("double_block", 1), ("single_block", 2)])
def test_a_replaced_block(block, model, sample, plain):
    calls = []

    def same(args, extra):
        calls.append(sorted(args))
        return extra["original_block"](args)

    def skipped(args, extra):
        return args

    def patched(function):
        copy = model.clone()
        copy.set_model_patch_replace(function, "dit", *block)
        return copy

    assert torch.equal(sample(patched(same)), plain) and calls
    assert differs(sample(patched(skipped)), plain)


def test_attention_patches(model, sample, plain):
    seen = []

    def neutral(q, k, v, pe=None, attn_mask=None, extra_options=None):
        seen.append(
            (
                q.shape,
                extra_options["block_type"],
                extra_options["block_index"],
                extra_options["img_slice"],
                extra_options["cond_or_uncond"],
            )
        )
        return {"q": q, "k": k, "v": v, "pe": pe}

    def halved(q, k, v, pe=None, attn_mask=None, extra_options=None):
        return {"q": q * 0.2, "k": k, "v": v}

    for function, is_same in ((neutral, True), (halved, False)):
        copy = model.clone()
        copy.set_model_attn1_patch(function)
        assert torch.allclose(sample(copy), plain, atol=1e-5) == is_same
    shape, kind, index, img_slice, passes = seen[0]
    assert tuple(shape[1:]) == (3, 12 + 36, 32) and (kind, index, img_slice) == ("double", 0, [12, 48]) and set(passes) == {0, 1}
    assert {(kind, index) for _, kind, index, *_ in seen} == {("double", 0), ("double", 1), ("single", 0), ("single", 1), ("single", 2)}

    for factor, is_same in ((1.0, True), (0.5, False)):
        copy = model.clone()
        copy.set_model_attn1_output_patch(lambda out, extra, factor=factor: out * factor)
        assert torch.allclose(sample(copy), plain, atol=1e-5) == is_same


def test_post_input_patch(model, sample, plain):
    def moved(args):
        # Not one constant for all features, which the norms would take out again.
        return {**args, "img": args["img"] * torch.linspace(0, 2, args["img"].shape[-1])}

    for function, is_same in ((dict, True), (moved, False)):
        copy = model.clone()
        copy.set_model_patch(function, "post_input")
        assert torch.allclose(sample(copy), plain, atol=1e-5) == is_same


def test_another_attention_is_used(model, sample, plain):
    calls = []

    def override(attention, *args, **kwargs):
        calls.append(args[3])
        return attention(*args, **kwargs)

    copy = model.clone()
    copy.model_options["transformer_options"]["optimized_attention_override"] = override
    assert torch.equal(sample(copy), plain)
    assert set(calls) == {3} and len(calls) == 5 * STEPS


def test_layers_of_another_loader_are_used(run_node, weights, sample, plain, relative_error):
    # What GGUF-type loaders pass: an operations namespace of their own.
    import comfy.ops
    import comfy.sd

    made = []

    class Operations(comfy.ops.manual_cast):
        class Linear(comfy.ops.manual_cast.Linear):
            def __init__(self, *args, **kwargs):
                made.append(args)
                super().__init__(*args, **kwargs)

    tensors = {key: tensor.float() for key, tensor in weights.items()}
    found = comfy.sd.load_diffusion_model_state_dict(tensors, {"custom_operations": Operations})
    assert len(made) > 40
    assert relative_error(sample(found), plain) < 5e-5


class PictureVAE:
    """Stands in for a VAE in stock nodes that encode pictures: 16 latent channels, an eighth of the side."""

    def encode(self, pixels):
        frames = (pixels.shape[0] - 1) // 4 + 1
        return torch.randn(1, 16, frames, pixels.shape[1] // 8, pixels.shape[2] // 8, generator=torch.Generator().manual_seed(4))


def test_the_stock_hunyuan_image_node(run_node, model, conditioning, sample):
    picture = torch.rand(1, 48, 64, 3, generator=torch.Generator().manual_seed(0))
    positive, latent = run_node(
        "HunyuanImageToVideo",
        positive=conditioning(1),
        vae=PictureVAE(),
        width=64,
        height=48,
        length=9,
        batch_size=1,
        guidance_type="v1 (concat)",
        start_image=picture,
    )
    assert tuple(latent["samples"].shape) == SHAPE
    found = sample(model, positive)
    assert torch.equal(found[:, :, 0], PictureVAE().encode(picture)[:, :, 0].to(found))
    assert differs(found[:, :, 1:], sample(model)[:, :, 1:])


def test_the_stock_inpainting_node(run_node, model, conditioning, sample):
    pixels, mask = torch.rand(9, 48, 64, 3, generator=torch.Generator().manual_seed(0)), torch.ones(9, 48, 64)
    mask[:1] = 0
    positive, negative, _ = run_node(
        "InpaintModelConditioning",
        positive=conditioning(1),
        negative=conditioning(2),
        pixels=pixels,
        vae=PictureVAE(),
        mask=mask,
        noise_mask=False,
    )
    found = sample(model, positive, negative)
    assert torch.equal(found[:, :, 0], PictureVAE().encode(pixels)[:, :, 0].to(found))
    assert not torch.allclose(found[:, :, 1], PictureVAE().encode(pixels)[:, :, 1].to(found))


def test_a_prompt_over_part_of_the_picture(run_node, model, conditioning, sample, plain):
    (part,) = run_node(
        "ConditioningSetAreaPercentageVideo",
        conditioning=conditioning(7),
        width=0.5,
        height=1.0,
        temporal=1.0,
        x=0.0,
        y=0.0,
        z=0.0,
        strength=1.0,
    )
    (both,) = run_node("ConditioningCombine", conditioning_1=conditioning(1), conditioning_2=part)
    assert differs(sample(model, both), plain)


def test_prompts_of_unequal_length(model, conditioning, sample, core, pack, relative_error):
    # Joint attention sees every text token: they must not be repeated to a common length.
    positive, negative = conditioning(1, tokens=12), conditioning(2, tokens=8)
    found = sample(model, positive, negative, text_oscillation=False)
    schedule = pack("opensora_core.sampling.schedule")
    sigmas = schedule.sigmas(STEPS, schedule.latent_flow_shift(SHAPE))
    guidance = pack("opensora_core.sampling.guidance").Guidance(text=3.0, text_oscillation=False)
    scale = pack("opensora_core.codecs.hunyuan.config").LATENT_SCALE
    expected = run_in_core(pack, core, (SHAPE, 3), sigmas, guidance, (positive[0], negative[0])) / scale
    assert relative_error(found, expected) < 5e-5


def test_a_lora_on_one_prompt_only(run_node, model, base, sample, plain, conditioning):
    # The host's hooks: weights change between passes of one step.
    name, _ = lora_file(base, "hook.safetensors")
    (hooks,) = run_node("CreateHookLoraModelOnly", lora_name=name, strength_model=1.0)
    (positive,) = run_node("ConditioningSetProperties", cond_NEW=conditioning(1), strength=1.0, set_cond_area="default", hooks=hooks)
    found = sample(model, positive)
    assert differs(found, plain)
    (everywhere,) = run_node("LoraLoaderModelOnly", model=model, lora_name=name, strength_model=1.0)
    assert differs(found, sample(everywhere)), "the negative pass runs without it"


def test_a_copy_for_another_device(run_node, sample, plain, relative_error):
    (loaded,) = run_node("OpenSoraModelLoader", model_name="Open_Sora_v2.safetensors", precision="auto")
    copy = loaded.deepclone_multigpu(torch.device("cpu"))
    assert copy.model is not loaded.model
    assert relative_error(sample(copy), plain) < 5e-5


def test_torch_compile(run_node, model, sample):
    # The whole network is traced in one piece and once for all blocks and steps; inductor itself takes minutes on a CPU.
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    (compiled,) = run_node("TorchCompileModel", model=model, backend="eager")
    found = sample(compiled, steps=3, text_guidance=3.0)
    assert torch.allclose(found, sample(model, steps=3), rtol=1e-3, atol=1e-3)
    breaks = torch._dynamo.utils.counters["graph_break"]
    assert not breaks, "\n".join(breaks)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_torch_compile_compiles_nothing_in_a_second_run(run_node, model, sample):
    import torch._dynamo

    torch._dynamo.reset()
    (compiled,) = run_node("TorchCompileModel", model=model, backend="eager")
    counters, graphs = torch._dynamo.utils.counters, []
    for steps in (12, 12, 14):
        counters.clear()
        sample(compiled, steps=steps)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [2, 0, 0], "one for two passes together, one for a step that guidance leaves out"


@pytest.mark.slow
@pytest.mark.skipif("OPEN_SORA_TEST_SLOW" not in os.environ, reason="minutes of compilation; set OPEN_SORA_TEST_SLOW")
def test_torch_compile_with_inductor(run_node, model, sample):
    (compiled,) = run_node("TorchCompileModel", model=model, backend="inductor")
    assert torch.allclose(sample(compiled, steps=2), sample(model, steps=2), rtol=1e-3, atol=1e-3)
