"""Guidance inside the host's sampling loop: equal to the core's solver, counted, restored, and open to the host's hooks."""

import itertools

import pytest
import torch
from in_core import run_in_core

SHAPE = (1, 16, 3, 6, 8)


@pytest.fixture(scope="module")
def core(pack, base):
    return pack("opensora_core.checkpoint.load").load_transformer(base / "models/diffusion_models/Open_Sora_v2.safetensors", torch.float32)


@pytest.fixture(scope="module")
def count():
    """A copy of a MODEL that counts the transformer's rows: count(model) -> (model, rows)."""
    import comfy.patcher_extension

    def wrap(model):
        rows = []

        def counting(executor, x, *args, **kwargs):
            rows.append(x.shape[0])
            return executor(x, *args, **kwargs)

        model = model.clone()
        model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "count", counting)
        return model, rows

    return wrap


def with_picture(conditioning, shape=SHAPE, seed=5, frames=(0,)):
    """The same CONDITIONING with given latent frames, as Open-Sora Image to Video leaves them (raw VAE latents)."""
    latents, mask = torch.zeros(shape), torch.ones(shape[0], 1, *shape[2:])
    picture = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2
    for frame in frames:
        latents[:, :, frame], mask[:, :, frame] = picture[:, :, frame], 0
    return [[context, {**values, "concat_latent_image": latents, "concat_mask": mask}] for context, values in conditioning]


def sample_in_host(run_node, model, positive, negative, steps, shape=SHAPE, seed=3, sampler="euler", **guidance):
    """Scheduler and guider under SamplerCustomAdvanced: unscaled latents."""
    latent = {"samples": torch.zeros(shape)}
    model, sigmas = run_node("OpenSoraScheduler", model=model, latent=latent, steps=steps, shift=0.0)
    settings = {"text_guidance": 7.5, "image_guidance": 3.0, "text_oscillation": True, "image_oscillation": True, "temporal_ramp": True}
    (guider,) = run_node("OpenSoraGuider", model=model, positive=positive, negative=negative, **{**settings, **guidance})
    (noise,) = run_node("RandomNoise", noise_seed=seed)
    (euler,) = run_node("KSamplerSelect", sampler_name=sampler)
    return run_node("SamplerCustomAdvanced", noise=noise, guider=guider, sampler=euler, sigmas=sigmas, latent_image=latent)[0]["samples"]


def sample_in_core(pack, core, positive, negative, steps, shape=SHAPE, seed=3, **guidance):
    """The same run without the host: unscaled latents."""
    schedule = pack("opensora_core.sampling.schedule")
    conditioning, scale = pack("opensora_core.sampling.given"), pack("opensora_core.codecs.hunyuan.config").LATENT_SCALE
    names = {"text_guidance": "text", "image_guidance": "image"}
    settings = pack("opensora_core.sampling.guidance").Guidance(**{names.get(key, key): value for key, value in guidance.items()})
    values, condition = positive[0][1], None
    if "concat_mask" in values:
        condition = conditioning.ImageCondition(1 - values["concat_mask"], scale * values["concat_latent_image"])
    sigmas = schedule.sigmas(steps, schedule.latent_flow_shift(shape))
    return run_in_core(pack, core, (shape, seed), sigmas, settings, (positive[0], negative[0]), condition) / scale


GUIDANCE = [
    {},
    {"text_oscillation": False, "image_oscillation": False, "temporal_ramp": False},
    {"text_oscillation": False},
    {"image_guidance": 1.0},
    {"text_guidance": 1.0, "temporal_ramp": False},
]


@pytest.mark.parametrize("guidance", GUIDANCE, ids=str)
@pytest.mark.parametrize("frames", [(), (0,), (0, -1)], ids=["t2v", "first", "first and last"])
def test_a_run_equals_the_core(frames, guidance, run_node, model, core, pack, conditioning, relative_error):
    positive, negative = conditioning(1), conditioning(2)
    if frames:
        positive, negative = with_picture(positive, frames=frames), with_picture(negative, frames=frames)
    found = sample_in_host(run_node, model, positive, negative, 13, **guidance)
    assert relative_error(found, sample_in_core(pack, core, positive, negative, 13, **guidance)) < 5e-6


def test_every_setting_changes_the_video(run_node, model, conditioning):
    positive, negative = with_picture(conditioning(1)), with_picture(conditioning(2))
    found = [sample_in_host(run_node, model, positive, negative, 13, **guidance) for guidance in GUIDANCE]
    assert not any(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in itertools.combinations(found, 2))


@pytest.mark.parametrize(("frames", "rows"), [((), 80), ((0,), 110)], ids=["t2v", "i2v"])
def test_forwards_of_fifty_steps(frames, rows, run_node, model, count, conditioning):
    counted, seen = count(model)
    positive, negative = conditioning(1), conditioning(2)
    if frames:
        positive, negative = with_picture(positive), with_picture(negative)
    sample_in_host(run_node, counted, positive, negative, 50)
    assert sum(seen) == rows


def test_skipping_passes_changes_nothing_beyond_rounding(run_node, model, core, pack, conditioning, relative_error):
    # Three passes at every step, as the reference runs them, combined by its formula.
    solver, schedule = pack("opensora_core.sampling.solvers"), pack("opensora_core.sampling.schedule")
    scale = pack("opensora_core.codecs.hunyuan.config").LATENT_SCALE
    positive, negative = with_picture(conditioning(1)), with_picture(conditioning(2))
    values = positive[0][1]
    known, picture = 1 - values["concat_mask"], scale * values["concat_latent_image"]
    cond = torch.cat((known, known * picture), dim=1)
    steps = 14
    rows = [(positive[0], cond), (negative[0], cond), (negative[0], torch.zeros_like(cond))]

    way = schedule.flow_schedule(steps, schedule.latent_flow_shift(SHAPE))

    def velocity(x, step):
        c, u, u2 = (core(x, way.timesteps[step][None], context, v["pooled_output"], mask) for (context, v), mask in rows)
        text = 7.5 if step < 10 or step % 2 == 0 else 1.0
        image = 3.0 if step < 10 or step % 2 == 0 else 1.0
        if image > 1:
            ceiling = torch.linspace(image, 1.0, steps + 1)[step]
            image = torch.linspace(1.0, float(ceiling), SHAPE[2]).view(1, 1, -1, 1, 1)
        return u2 + image * (u - u2) + text * (c - u)

    with torch.inference_mode():
        expected = pack("opensora_core.sampling.run").run(
            velocity, solver.noise(SHAPE, 3), way, pack("opensora_core.sampling.schedule").Flow(), solver.euler
        )
    expected = torch.where(known.bool(), picture, expected) / scale
    assert relative_error(sample_in_host(run_node, model, positive, negative, steps), expected) < 5e-6


def test_a_batch_has_each_its_own_picture(run_node, model, conditioning, relative_error):
    shape = (2, *SHAPE[1:])
    positive, negative = with_picture(conditioning(1), shape), with_picture(conditioning(2), shape)
    found = sample_in_host(run_node, model, positive, negative, 3, shape)
    given = positive[0][1]["concat_latent_image"]
    assert torch.equal(found[:, :, 0], given[:, :, 0].to(found)), "reference frames are restored in every item of the batch"
    assert not torch.allclose(found[0, :, 1:], found[1, :, 1:])
    # The first video of a batch is the video of a batch of one.
    alone = [[context, {**v, "concat_latent_image": given[:1], "concat_mask": v["concat_mask"][:1]}] for context, v in positive]
    first = sample_in_host(run_node, model, alone, [[negative[0][0], {**alone[0][1], **conditioning(2)[0][1]}]], 3)
    assert relative_error(found[:1], first) < 5e-6


def test_one_picture_serves_a_batch(run_node, model, conditioning):
    shape = (2, *SHAPE[1:])
    positive, negative = with_picture(conditioning(1)), with_picture(conditioning(2))
    found = sample_in_host(run_node, model, positive, negative, 2, shape)
    given = positive[0][1]["concat_latent_image"][:, :, 0].expand(2, -1, -1, -1)
    assert torch.equal(found[:, :, 0], given.to(found))


def test_a_picture_on_the_positive_counts_for_the_negative(run_node, model, conditioning):
    positive, negative = with_picture(conditioning(1)), with_picture(conditioning(2))
    both = sample_in_host(run_node, model, positive, negative, 4)
    assert torch.equal(sample_in_host(run_node, model, positive, conditioning(2), 4), both)


def test_a_part_of_a_run_leaves_its_noise(run_node, model, conditioning):
    # Split runs: the first part must not have clean frames put into it.
    latent = {"samples": torch.zeros(SHAPE)}
    model, sigmas = run_node("OpenSoraScheduler", model=model, latent=latent, steps=4, shift=0.0)
    positive = with_picture(conditioning(1))
    (guider,) = run_node("OpenSoraGuider", model=model, positive=positive, negative=conditioning(2), text_guidance=2.0, image_guidance=1.0)
    noise, sampler = run_node("RandomNoise", noise_seed=1)[0], run_node("KSamplerSelect", sampler_name="euler")[0]
    part = run_node("SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas[:3], latent_image=latent)
    assert not torch.allclose(part[0]["samples"][:, :, 0], positive[0][1]["concat_latent_image"][:, :, 0])


def test_a_guider_can_be_used_again(run_node, model, conditioning):
    # The host keeps GUIDER objects in its cache and runs them many times.
    latent = {"samples": torch.zeros(SHAPE)}
    model, sigmas = run_node("OpenSoraScheduler", model=model, latent=latent, steps=12, shift=0.0)
    positive, negative = with_picture(conditioning(1)), with_picture(conditioning(2))
    (guider,) = run_node("OpenSoraGuider", model=model, positive=positive, negative=negative, text_guidance=7.5, image_guidance=3.0)
    before = set(vars(guider))
    noise, sampler = run_node("RandomNoise", noise_seed=1)[0], run_node("KSamplerSelect", sampler_name="euler")[0]
    runs = [
        run_node("SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas, latent_image=latent)[0]["samples"]
        for _ in range(2)
    ]
    assert torch.equal(*runs)
    assert set(vars(guider)) == before


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "res_multistep"])
def test_other_solvers_find_their_step(sampler, run_node, model, conditioning):
    positive, negative = with_picture(conditioning(1)), with_picture(conditioning(2))
    found = sample_in_host(run_node, model, positive, negative, 12, sampler=sampler)
    assert torch.isfinite(found).all()


def test_the_step_of_a_sigma(pack):
    step_index = pack("nodes.host.guider").step_index
    sigmas = torch.tensor([1.0, 0.8, 0.5, 0.0])
    assert [step_index(torch.tensor([sigma]), sigmas)[0] for sigma in (1.0, 0.9, 0.8, 0.7999999, 0.6, 0.5, 0.2, 0.0)] == [
        0,
        0,
        1,
        1,
        1,
        2,
        2,
        2,
    ]
    assert step_index(torch.tensor([0.5]), sigmas)[1] == 3


def test_the_schedule_and_the_models_own_sampling_agree(run_node, model, pack):
    latent = {"samples": torch.zeros(1, 16, 33, 24, 42)}
    patched, sigmas = run_node("OpenSoraScheduler", model=model, latent=latent, steps=50, shift=0.0)
    alpha = pack("opensora_core.sampling.schedule").flow_shift(252, 33)
    assert alpha == pytest.approx(5.732595, abs=1e-6)
    sampling = patched.get_model_object("model_sampling")
    assert sampling.shift == pytest.approx(alpha)
    assert sampling.percent_to_sigma(0.5) == pytest.approx(float(sigmas[25]), rel=1e-6)
    assert torch.equal(sigmas, pack("opensora_core.sampling.schedule").sigmas(50, alpha))
    assert model.get_model_object("model_sampling").shift != pytest.approx(alpha), "the MODEL that was given is not changed"
    given, _ = run_node("OpenSoraScheduler", model=model, latent=latent, steps=50, shift=3.0)
    assert given.get_model_object("model_sampling").shift == 3.0


def test_hooks_of_other_packs_are_called(run_node, model, conditioning):
    seen = {"pre": [], "post": [], "cfg": []}

    def pre(args):
        seen["pre"].append(len(args["conds_out"]))
        return args["conds_out"]

    def post(args):
        seen["post"].append(args["cond_scale"])
        return args["denoised"] * 1.1

    hooked = model.clone()
    hooked.set_model_sampler_pre_cfg_function(pre)
    hooked.set_model_sampler_post_cfg_function(post)
    positive, negative = with_picture(conditioning(1)), with_picture(conditioning(2))
    plain = sample_in_host(run_node, model, positive, negative, 12)
    changed = sample_in_host(run_node, hooked, positive, negative, 12)
    # The post hook asks the host for the negative pass at every step (disable_cfg1_optimization is not set by it).
    assert seen["pre"] == [3] * 11 + [2] and seen["post"] == [7.5] * 11 + [1.0]
    assert not torch.allclose(plain, changed)


def test_a_hook_that_needs_the_negative_pass_gets_it(run_node, model, count, conditioning):
    counted, rows = count(model)
    counted.set_model_sampler_post_cfg_function(lambda args: args["denoised"], disable_cfg1_optimization=True)
    sample_in_host(run_node, counted, conditioning(1), conditioning(2), 12)
    assert sum(rows) == 24


def test_perp_neg_finds_the_negative_pass_at_every_step(run_node, model, count, conditioning):
    """Where the empty prompt is the negative one, nothing of that is perpendicular to itself: plain guidance. With zeros in place of the
    negative pass, at the odd steps after the tenth, whose text scale is 1, all of it would be, and the video black."""
    negative = conditioning(2)
    (perp,) = run_node("PerpNeg", model=model, empty_conditioning=negative, neg_scale=1.0)
    found = sample_in_host(run_node, perp, conditioning(1), negative, 14)
    plain = sample_in_host(run_node, model, conditioning(1), negative, 14)
    assert (found - plain).abs().max() < 1e-3 * plain.abs().max()
    counted, rows = count(model)
    (perp,) = run_node("PerpNeg", model=counted, empty_conditioning=negative, neg_scale=1.0)
    sample_in_host(run_node, perp, conditioning(1), negative, 12)
    assert sum(rows) == 3 * 12


def test_a_replaced_cfg_function_is_used(run_node, model, conditioning):
    hooked = model.clone()
    hooked.set_model_sampler_cfg_function(lambda args: args["cond"])  # guidance switched off
    found = sample_in_host(run_node, hooked, conditioning(1), conditioning(2), 4)
    assert torch.allclose(found, sample_in_host(run_node, model, conditioning(1), conditioning(2), 4, text_guidance=1.0), atol=1e-4)


# The one-node sampler.

SAMPLER = {"seed": 3, "steps": 12, "text_guidance": 7.5, "image_guidance": 3.0}


def sample_in_one(run_node, model, positive, negative, shape=SHAPE, **changes):
    latent = {"samples": torch.zeros(shape)}
    inputs = {"model": model, "positive": positive, "negative": negative, "latent": latent, **SAMPLER, **changes}
    return run_node("OpenSoraRectifiedFlowSampler", **inputs)[0]["samples"]


def test_the_one_node_sampler_is_the_three(run_node, model, conditioning):
    positive, negative = with_picture(conditioning(1)), with_picture(conditioning(2))
    assert torch.equal(sample_in_one(run_node, model, positive, negative), sample_in_host(run_node, model, positive, negative, 12))


def test_bf16_latents_are_the_cores(run_node, model, core, pack, conditioning, relative_error):
    found = sample_in_one(run_node, model, conditioning(1), conditioning(2), latent_dtype="bf16", noise_device="gpu")
    schedule = pack("opensora_core.sampling.schedule")
    scale = pack("opensora_core.codecs.hunyuan.config").LATENT_SCALE
    sigmas, guidance = schedule.sigmas(12, schedule.latent_flow_shift(SHAPE)), pack("opensora_core.sampling.guidance").Guidance()
    entries = conditioning(1)[0], conditioning(2)[0]
    expected = run_in_core(pack, core, (SHAPE, 3), sigmas, guidance, entries, dtype=torch.bfloat16)
    in_bf16 = found * scale
    assert torch.allclose(in_bf16, in_bf16.bfloat16().float(), rtol=1e-6), "every value is one that bf16 holds"
    # bf16 keeps three digits; each of twelve steps may round the other way.
    assert relative_error(found, expected.float() / scale) < 0.03
    assert not torch.allclose(found, sample_in_one(run_node, model, conditioning(1), conditioning(2)), atol=1e-3)


@pytest.mark.parametrize("latent_dtype", ["fp32", "bf16"])
def test_the_one_node_sampler_walks_as_the_host_does(latent_dtype, run_node, model, pack, conditioning):
    """To the bit: the host's Euler, and for bf16 the same with the latents rounded after each step."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[latent_dtype]

    def euler(model, x, sigmas, extra_args=None, callback=None, disable=None):
        x = x.to(dtype)
        for step in range(len(sigmas) - 1):
            wide = x.float()
            denoised = model(wide, sigmas[step] * wide.new_ones(wide.shape[0]), **extra_args)
            x = x + float(sigmas[step + 1] - sigmas[step]) * ((wide - denoised) / sigmas[step]).to(dtype)
        return x.float()

    positive, negative = with_picture(conditioning(1)), with_picture(conditioning(2))
    latent = {"samples": torch.zeros(SHAPE)}
    shifted, sigmas = run_node("OpenSoraScheduler", model=model, latent=latent, steps=12, shift=0.0)
    import comfy.samplers

    (guider,) = run_node("OpenSoraGuider", model=shifted, positive=positive, negative=negative, text_guidance=7.5, image_guidance=3.0)
    noise = pack("opensora_core.sampling.solvers").noise(SHAPE, 3, dtype=dtype)
    expected = guider.sample(noise, latent["samples"], comfy.samplers.KSAMPLER(euler), sigmas, seed=3)
    assert torch.equal(sample_in_one(run_node, model, positive, negative, latent_dtype=latent_dtype), expected)


def wrong(kind, model, conditioning):
    """Inputs of which one does not fit."""
    positive, negative, changes = conditioning(1), conditioning(2), {}
    if kind == "steps":
        changes = {"steps": 0}
    elif kind == "negative steps":
        changes = {"steps": -3}
    elif kind in ("text_guidance", "image_guidance"):
        changes = {kind: float("inf")}
    elif kind == "shift":
        changes = {"shift": float("nan")}
    elif kind == "negative shift":
        changes = {"shift": -1.0}
    elif kind == "seed":
        changes = {"seed": -1}
    elif kind == "noise_device":
        changes = {"noise_device": "tpu"}
    elif kind == "text width":
        positive = [[torch.zeros(1, 12, 63), positive[0][1]]]
    elif kind == "no pooled":
        negative = [[negative[0][0], {}]]
    elif kind == "pooled width":
        negative = [[negative[0][0], {"pooled_output": torch.zeros(1, 1280)}]]
    elif kind == "empty":
        positive = []
    elif kind == "channels":
        changes = {"shape": (1, 4, 3, 6, 8)}
    elif kind == "picture latent":
        changes = {"shape": (1, 16, 6, 8)}
    elif kind == "odd side":
        changes = {"shape": (1, 16, 3, 6, 7)}
    elif kind == "picture size":
        positive = with_picture(positive, (1, 16, 3, 6, 10))
    elif kind == "picture batch":
        positive, changes = with_picture(positive, (3, *SHAPE[1:])), {"shape": (2, *SHAPE[1:])}
    return positive, negative, changes


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("steps", "steps=0 makes no video"), ("negative steps", "steps=-3"),
        ("text_guidance", "text_guidance=inf is not a finite number"), ("image_guidance", "image_guidance=inf"),
        ("shift", "shift=nan"), ("negative shift", "shift=-1"), ("seed", "seed=-1 is out of range"), ("noise_device", "Use one of cpu, gpu"),
        ("text width", "positive conditioning is not from T5-XXL: its text is 63 wide"), ("no pooled", "negative conditioning lacks CLIP-L"),
        ("pooled width", "pooled output is 1280 wide"), ("empty", "positive conditioning is empty"),
        ("channels", r"\[1, 4, 3, 6, 8\].*16, latent frames"), ("picture latent", r"\[1, 16, 6, 8\]"), ("odd side", "multiples of 16: .*48x56 pixels"),
        ("picture size", "reference picture's latent is"), ("picture batch", "3 reference pictures for a batch of 2"),
    ],
)  # fmt: skip
def test_what_does_not_fit_gets_one_sentence_before_any_work(kind, words, run_node, model, count, conditioning, pack):
    counted, rows = count(model)
    positive, negative, changes = wrong(kind, model, conditioning)
    with pytest.raises(pack("opensora_core.errors").OpenSoraError, match=words) as caught:
        sample_in_one(run_node, counted, positive, negative, **changes)
    assert not rows and "\n" not in str(caught.value)


@pytest.mark.parametrize("node", ["OpenSoraScheduler", "OpenSoraGuider", "OpenSoraRectifiedFlowSampler", "OpenSoraLoraLoader"])
def test_another_model_is_named(node, run_node, conditioning, pack):
    class Flux:
        pass

    class Other:
        model = Flux()

    latent = {"samples": torch.zeros(SHAPE)}
    conds = {"positive": conditioning(1), "negative": conditioning(2)}
    inputs = {
        "OpenSoraScheduler": {"latent": latent, "steps": 4},
        "OpenSoraGuider": {**conds, "text_guidance": 1.0, "image_guidance": 1.0},
        "OpenSoraRectifiedFlowSampler": {**conds, "latent": latent, **SAMPLER},
        "OpenSoraLoraLoader": {"lora_name": "lora.safetensors", "strength": 1.0},
    }[node]
    if node == "OpenSoraLoraLoader":
        import folder_paths

        (open(f"{folder_paths.get_folder_paths('loras')[0]}/lora.safetensors", "wb")).close()
    with pytest.raises(pack("opensora_core.errors").OpenSoraError, match="this MODEL is Flux, not one of this pack's"):
        run_node(node, model=Other(), **inputs)
