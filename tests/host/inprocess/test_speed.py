"""Speed inside the host: the library's plans and averaged guidance, with our sampler, with stock ones, and calibrated on a MODEL."""

import json

import pytest
import torch
from in_core import run_in_core

SHAPE = (1, 16, 3, 6, 8)
ROWS = {"balanced": (39, 49), "fast": (23, 29), "draft": (17, 21)}
GUIDANCE = {"text_guidance": 7.5, "image_guidance": 3.0}


@pytest.fixture(scope="module")
def core(pack, base):
    return pack("opensora_core.checkpoint.load").load_transformer(base / "models/diffusion_models/Open_Sora_v2.safetensors", torch.float32)


@pytest.fixture
def lines(pack, monkeypatch):
    """What nodes say."""
    said = []
    monkeypatch.setattr(pack("nodes.host.notice"), "show", lambda text, node_id, level=0: said.append(text))
    return said


def counted(model):
    """(a copy of a MODEL, the transformer's rows as they run)."""
    import comfy.patcher_extension

    rows = []

    def counting(executor, x, *args, **kwargs):
        rows.append(x.shape[0])
        return executor(x, *args, **kwargs)

    model = model.clone()
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "count", counting)
    return model, rows


def with_picture(conditioning, **values):
    latents, mask = torch.zeros(SHAPE), torch.ones(1, 1, *SHAPE[2:])
    latents[:, :, 0] = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))[:, :, 0] * 2
    mask[:, :, 0] = 0
    return [[context, {**said, "concat_latent_image": latents, "concat_mask": mask, **values}] for context, said in conditioning]


def pair(conditioning, is_given, **values):
    both = conditioning(1), conditioning(2)
    return tuple(with_picture(one, **values) for one in both) if is_given else both


def parts(run_node, model, both, scheduled, guided, sampler="euler", mask=None):
    """Scheduler and guider, of two speeds, under SamplerCustomAdvanced."""
    latent = {"samples": torch.zeros(SHAPE)} | ({} if mask is None else {"noise_mask": mask})
    model, sigmas = run_node("OpenSoraScheduler", model=model, latent=latent, steps=50, shift=0.0, speed=scheduled)
    (guider,) = run_node("OpenSoraGuider", model=model, positive=both[0], negative=both[1], **GUIDANCE, speed=guided)
    (noise,) = run_node("RandomNoise", noise_seed=3)
    (solver,) = run_node("KSamplerSelect", sampler_name=sampler)
    return run_node("SamplerCustomAdvanced", noise=noise, guider=guider, sampler=solver, sigmas=sigmas, latent_image=latent)[0]["samples"]


def whole(run_node, model, both, **settings):
    latent = {"samples": torch.zeros(SHAPE)}
    return run_node(
        "OpenSoraRectifiedFlowSampler",
        model=model,
        positive=both[0],
        negative=both[1],
        latent=latent,
        seed=3,
        steps=50,
        **GUIDANCE,
        **settings,
    )[0]["samples"]


@pytest.mark.parametrize("speed", ["exact", "draft"])
def test_the_hosts_fused_layers_serve_what_is_not_exact(speed, pack, model, conditioning, run_node, monkeypatch):
    kernels = pack("nodes.host.kernels")
    before = whole(run_node, model, pair(conditioning, True), speed=speed)
    made = []

    def layers(device, options):
        made.append(kernels.KitchenLayers())
        return made[-1]

    monkeypatch.setattr(kernels, "fused", layers)
    after = whole(run_node, model, pair(conditioning, True), speed=speed)
    if speed == "exact":
        assert not made and torch.equal(after, before)
        return
    error = (after - before).norm() / before.norm()
    assert len(made) == 1 and 0 < error < 2e-5  # of 21 evaluations, each to 1e-6


def test_where_the_plain_kernels_are_all_there_is_layers_are_not_fused(pack):
    assert pack("nodes.host.kernels").fused(torch.device("cpu"), {}) is None
    assert pack("nodes.host.kernels").fused(torch.device("cuda"), {}) is None  # this host has the plain backend alone


@pytest.mark.parametrize("speed", ROWS)
@pytest.mark.parametrize("is_given", [False, True], ids=["t2v", "i2v"])
def test_a_speed_is_the_librarys(speed, is_given, run_node, model, core, pack, conditioning, relative_error, lines):
    plan, schedule = pack("opensora_core.sampling.plan"), pack("opensora_core.sampling.schedule")
    both, scale = pair(conditioning, is_given), pack("opensora_core.codecs.hunyuan.config").LATENT_SCALE
    way = schedule.flow_schedule(50, schedule.latent_flow_shift(SHAPE))
    ours, guidance = plan.planned(pack("opensora_core.sampling.guidance").Guidance(), way, plan.StepPlan.uncalibrated(speed))
    values, condition = both[0][0][1], None
    if is_given:
        condition = pack("opensora_core.sampling.given").ImageCondition(1 - values["concat_mask"], scale * values["concat_latent_image"])
    expected = run_in_core(pack, core, (SHAPE, 3), ours.points, guidance, (both[0][0], both[1][0]), condition) / scale
    one, rows = counted(model)
    assert relative_error(whole(run_node, one, both, speed=speed), expected) < 1e-5
    assert sum(rows) == ROWS[speed][is_given]
    assert any(f"{150 - ROWS[speed][is_given]} passes saved" in line for line in lines)
    assert any("not calibrated for this model" in line for line in lines)
    assert relative_error(parts(run_node, model, both, speed, speed), expected) < 1e-5
    assert any(f"Speed {speed}: " in line and f"{ROWS[speed][is_given]} forwards, " in line and "of 150 saved" in line for line in lines)


def test_exact_is_as_it_was(run_node, model, conditioning, lines):
    both = pair(conditioning, True)
    assert torch.equal(whole(run_node, model, both, speed="exact"), whole(run_node, model, both))
    assert not any("peed" in line for line in lines)


@pytest.mark.parametrize("is_given", [False, True], ids=["t2v", "i2v"])
def test_averaging_over_the_released_steps_is_exact(is_given, run_node, model, conditioning):
    both = pair(conditioning, is_given)
    exact, full = (parts(run_node, model, both, "exact", guided) for guided in ("exact", "balanced"))
    torch.testing.assert_close(exact, full, rtol=1e-5, atol=1e-5)


def test_two_speeds_are_told(run_node, model, conditioning, lines):
    parts(run_node, model, pair(conditioning, False), "draft", "fast")
    assert any("Scheduler is set to speed draft and the guider to fast" in line for line in lines)


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "res_multistep"])
def test_stock_samplers_and_schedulers_run_through_the_guider(sampler, run_node, model, conditioning):
    both, latent = pair(conditioning, True), {"samples": torch.zeros(SHAPE)}
    shifted, _ = run_node("OpenSoraScheduler", model=model, latent=latent, steps=50, shift=0.0)
    (sigmas,) = run_node("BasicScheduler", model=shifted, scheduler="simple", steps=8, denoise=1.0)
    (guider,) = run_node("OpenSoraGuider", model=shifted, positive=both[0], negative=both[1], **GUIDANCE, speed="fast")
    _, rest = run_node("SplitSigmas", sigmas=sigmas, step=3)
    for some in (sigmas, rest):  # also a run that begins in the middle, at a step that would hold
        (noise,) = run_node("RandomNoise", noise_seed=3)
        (solver,) = run_node("KSamplerSelect", sampler_name=sampler)
        made = run_node("SamplerCustomAdvanced", noise=noise, guider=guider, sampler=solver, sigmas=some, latent_image=latent)[0]["samples"]
        assert torch.isfinite(made).all()


def test_a_strength_and_a_mask_go_with_a_plan(run_node, model, conditioning, pack):
    use = pack("opensora_core.sampling.guidance").ReferenceUse(strength=0.4)
    one, rows = counted(model)
    whole(run_node, one, pair(conditioning, True, open_sora_use=use), speed="balanced")
    assert 39 < sum(rows) < 49  # the reference is read by the points in the first 0.4 of the time alone
    mask = torch.zeros(1, 1, *SHAPE[2:])
    mask[:, :, :, :3] = 1
    made = parts(run_node, model, pair(conditioning, False), "fast", "fast", mask=mask)
    assert made[:, :, :, 3:].abs().max() < 1e-5 < made[:, :, :, :3].abs().max()


def test_a_calibrated_plan_is_used(run_node, model, conditioning, base, pack, monkeypatch, lines):
    monkeypatch.setattr(pack("opensora_core.run.calibrate"), "MEASURED_POINTS", (12, 9))
    latent = {"samples": torch.zeros(SHAPE)}
    asked = {
        "model": [model],
        "positive": [conditioning(1), conditioning(3)],
        "negative": [conditioning(2)],
        "latent": [latent],
        "seed": [4],
    }
    (report,) = run_node("OpenSoraCalibrate", **asked, text_guidance=[7.5], image_guidance=[3.0])
    (file,) = (base / "models/open_sora_plans").iterdir()
    record = json.loads(file.read_text())
    assert record["mode"] == "t2v" and record["size"] == [48, 64] and record["frames"] == 9 and record["prompts"] == 2
    assert "Distance to the exact run of 80 forwards" in report and file.name in report
    whole(run_node, model, pair(conditioning, False), speed="draft")
    assert any("a plan calibrated for it" in line for line in lines)
    file.write_text("{")
    with pytest.raises(pack("opensora_core.errors").OpenSoraError, match="is no plan, or a damaged one"):
        whole(run_node, model, pair(conditioning, False), speed="draft")
    file.unlink()


def test_attention_is_the_hosts_own_override(run_node, pack, model, conditioning, lines):
    error = pack("opensora_core.errors").OpenSoraError
    named = {"model_name": "Open_Sora_v2.safetensors", "precision": "fp32"}
    (usual,), (chosen,) = (run_node("OpenSoraModelLoader", **named, attention=name) for name in ("auto", "sdpa"))
    assert "optimized_attention_override" not in usual.model_options.get("transformer_options", {})
    both = pair(conditioning, False)
    torch.testing.assert_close(
        whole(run_node, chosen, both, speed="draft"), whole(run_node, usual, both, speed="draft"), rtol=1e-5, atol=1e-5
    )
    for name, sentence in {
        "cudnn": "there is none here",
        "sage": "needs the library sageattention",
        "flash": "needs the library flash-attn",
    }.items():
        with pytest.raises(error, match=sentence):
            run_node("OpenSoraModelLoader", **named, attention=name)
