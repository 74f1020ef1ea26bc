"""Sampling: schedule, guidance algebra, pass counts, image conditions and the Euler run, on fakes that can disagree."""

from dataclasses import replace

import pytest
import torch

from opensora_core.errors import OpenSoraError
from opensora_core.sampling import given as conditioning, schedule, solvers as solver
from opensora_core.sampling.given import NOTHING
from opensora_core.sampling.guidance import PICTURES, Guidance, ReferenceUse, num_forwards, oscillate, temporal_ramp
from opensora_core.sampling.run import Conditions, SamplingRecipe, TextCondition, run, sample
from opensora_core.sampling.schedule import Flow

SHAPE = (2, 4, 5, 6, 8)


class CountingModel:
    """A non-linear stand-in for the transformer that tells prompts and references apart, and counts rows."""

    dtype = torch.float32
    config = None

    def __init__(self):
        self.rows = 0

    def __call__(self, x, timestep, context, y, cond=None):
        self.rows += x.shape[0]
        reference = 0.0 if cond is None else cond.mean(dim=1, keepdim=True) + cond.mean(dim=(1, 2, 3, 4), keepdim=True)
        text = context.mean(dim=(1, 2)) + y.mean(dim=1)
        return torch.tanh(x * 0.7 + reference + text.view(-1, 1, 1, 1, 1)) + timestep.view(-1, 1, 1, 1, 1) * 0.1


@pytest.fixture
def text():
    generator = torch.Generator().manual_seed(1)
    make = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731  one-off, three uses
    return TextCondition(*({"context": make(2, 3, 6), "y": make(2, 6)} for _ in range(2)))


@pytest.fixture
def condition():
    head = torch.randn(1, SHAPE[1], 1, *SHAPE[-2:], generator=torch.Generator().manual_seed(2))
    return conditioning.image_condition(SHAPE, head=head)


def sample_on(model, x, way, guidance, text, condition=None, on_step=None):
    return sample(SamplingRecipe(), model, x, way, guidance, Conditions(text, condition), on_step)


def naive_three_passes(model, x, sigmas, guidance, text, condition):
    """The rule as it is stated: three rows at every step, nothing skipped."""
    num_steps, frames = len(sigmas) - 1, x.shape[2]
    reference = torch.zeros(x.shape[0], x.shape[1] + 1, *x.shape[2:]) if condition is None else condition.packed_input()
    for i in range(num_steps):
        t = sigmas[i].expand(x.shape[0])
        c = model(x, t, **text.positive, cond=reference)
        u = model(x, t, **text.negative, cond=reference)
        u2 = model(x, t, **text.negative, cond=torch.zeros_like(reference))
        g_text = oscillate(guidance.text, i) if guidance.text_oscillation else guidance.text
        g_image = oscillate(guidance.image, i) if guidance.image_oscillation else guidance.image
        if g_image > 1 and guidance.temporal_ramp and condition is not None:
            g_image = temporal_ramp(g_image, i, num_steps, frames)
        x = x + (sigmas[i + 1] - sigmas[i]) * (u2 + g_image * (u - u2) + g_text * (c - u))
    return x if condition is None else conditioning.put_back(x, condition.mask, condition.latents)


@pytest.mark.parametrize("with_image", [False, True])
@pytest.mark.parametrize(
    "guidance",
    [
        Guidance(),
        Guidance(text_oscillation=False),
        Guidance(image_oscillation=False),
        Guidance(temporal_ramp=False),
        Guidance(text=1.0),
        Guidance(image=1.0),
        Guidance(text=1.0, image=1.0),
        Guidance(image=0.5, image_oscillation=False),
        Guidance(text=0.0),
    ],
)
def test_skipped_passes_change_nothing(guidance, with_image, text, condition):
    reference = condition if with_image else None
    way, x = schedule.flow_schedule(16, 3.0), solver.noise(SHAPE, 3)
    ours, naive = CountingModel(), CountingModel()
    result = sample_on(ours, x, way, guidance, text, reference)
    expected = naive_three_passes(naive, x, way.points, guidance, text, reference)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert ours.rows == SHAPE[0] * num_forwards(guidance, 16, SHAPE[2], PICTURES if with_image else None)
    assert naive.rows == SHAPE[0] * 48
    every = CountingModel()
    torch.testing.assert_close(
        sample_on(every, x, way, replace(guidance, every_pass=True), text, reference), expected, rtol=1e-5, atol=1e-5
    )
    assert every.rows == SHAPE[0] * 48


@pytest.mark.parametrize(("with_image", "rows"), [(False, 80), (True, 110)])
def test_forwards_of_fifty_default_steps(with_image, rows, text, condition):
    model, reports = CountingModel(), []
    way = schedule.flow_schedule(50, 5.7)
    sample_on(model, solver.noise(SHAPE, 0), way, Guidance(), text, condition if with_image else None, reports.append)
    assert model.rows == rows * SHAPE[0]
    assert [r.step for r in reports] == list(range(1, 51))
    assert (reports[-1].forwards_done, reports[-1].forwards_saved) == (rows, 150 - rows)


def test_the_ramp_acts_and_spares_the_first_frame(text, condition):
    run = lambda g: sample_on(CountingModel(), solver.noise(SHAPE, 0), schedule.flow_schedule(1, 1.0), g, text, condition)  # noqa: E731
    plain = run(Guidance(image=1.0, temporal_ramp=False))
    ramped, flat = run(Guidance()), run(Guidance(temporal_ramp=False))
    assert not torch.allclose(ramped[:, :, 1:], flat[:, :, 1:])
    torch.testing.assert_close(ramped[:, :, 0], plain[:, :, 0])


def test_euler_is_exact_on_a_linear_path():
    data, start = torch.randn(SHAPE), torch.randn(SHAPE)
    result = run(lambda x, step: start - data, start, schedule.flow_schedule(7, 5.0), Flow(+1), solver.euler)
    torch.testing.assert_close(result, data, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_process_says_the_same_in_both_directions(sign):
    process, (clean, start) = Flow(sign), torch.randn(2, *SHAPE)
    x, velocity = process.noised(clean, start, 0.7), sign * (start - clean)
    torch.testing.assert_close(process.denoised(x, velocity, 0.7), clean)
    torch.testing.assert_close(process.prediction(x, clean, 0.7), velocity)
    torch.testing.assert_close(process.slope(x, velocity, 0.7), start - clean)
    assert torch.equal(process.noised(clean, start, 0.0), clean) and torch.equal(process.noised(clean, start, 1.0), start)


def test_what_is_given_is_asked_around_every_step_and_at_the_end():
    class Told(type(NOTHING)):
        def __init__(self):
            self.seen = []

        def before(self, x, step):
            self.seen.append(("before", step))
            return x + 1

        def after(self, x, step):
            self.seen.append(("after", step))
            return x * 2

        def finish(self, x):
            self.seen.append(("finish", None))
            return x - 5

    given, x = Told(), torch.zeros(SHAPE)
    result = run(lambda x, step: torch.zeros_like(x), x, schedule.flow_schedule(2, 1.0), Flow(), solver.euler, given)
    assert given.seen == [("before", 0), ("after", 0), ("before", 1), ("after", 1), ("finish", None)]
    assert torch.equal(result, x + 1)  # ((0 + 1) * 2 + 1) * 2 - 5


def loop_as_it_was(model, latents, sigmas, guidance, text, condition):
    """The guided run before process, solver and given frames had names of their own, with its arithmetic to the bit."""
    use = PICTURES if condition is None else condition.use
    cond = None if condition is None else condition.packed_input()
    steps = sigmas.tolist()
    for step in range(len(steps) - 1):
        now = guidance.at_step(step, len(steps) - 1, latents.shape[2], None if condition is None else use)
        timestep, read = sigmas[step].expand(latents.shape[0]), cond if now.reads_reference else None
        inputs = {"cond": (text.positive, read), "uncond": (text.negative, read), "uncond_image": (text.negative, None)}
        made = {}
        for name in now.passes:
            side, beside = inputs[name]
            made[name] = model(latents.float(), timestep, side["context"], side["y"], beside).to(latents.dtype)
        latents = latents + (steps[step + 1] - steps[step]) * now.combine(made)
    if condition is None or not use.is_restored:
        return latents
    return torch.where(condition.mask.bool(), condition.latents.to(latents), latents)


GIVEN = {
    "t2v": None,
    "i2v": ((1, 0), PICTURES),
    "i2v_loop": ((1, 1), PICTURES),
    "v2v": ((2, 0), ReferenceUse(is_clip=True)),
    "v2v_tail": ((0, 2), ReferenceUse(is_clip=True)),
    "strength": ((1, 0), ReferenceUse(strength=0.4)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", GIVEN)
def test_the_loop_is_what_it_was_to_the_bit(name, dtype, text):
    condition = None
    if GIVEN[name]:
        lengths, use = GIVEN[name]
        ends = [torch.randn(1, SHAPE[1], length, *SHAPE[-2:]) if length else None for length in lengths]
        condition = conditioning.image_condition(SHAPE, *ends, use)
    x, way = solver.noise(SHAPE, 4, dtype=dtype), schedule.flow_schedule(13, 5.7)
    expected = loop_as_it_was(CountingModel(), x, way.points, Guidance(), text, condition)
    found = sample_on(CountingModel(), x, way, Guidance(), text, condition)
    assert found.dtype == dtype and torch.equal(found, expected)


def test_batch_items_do_not_touch_each_other(text, condition):
    x, way = solver.noise(SHAPE, 5), schedule.flow_schedule(12, 2.0)
    both = sample_on(CountingModel(), x, way, Guidance(), text, condition)
    for i in range(2):
        one = TextCondition(*({name: part[i : i + 1] for name, part in side.items()} for side in (text.positive, text.negative)))
        own = conditioning.ImageCondition(condition.mask[i : i + 1], condition.latents[i : i + 1])
        alone = sample_on(CountingModel(), x[i : i + 1], way, Guidance(), one, own)
        torch.testing.assert_close(both[i : i + 1], alone)


def test_restoration_reaches_every_batch_item(text, condition):
    result = sample_on(CountingModel(), solver.noise(SHAPE, 5), schedule.flow_schedule(3, 2.0), Guidance(), text, condition)
    for i in range(SHAPE[0]):
        assert torch.equal(result[i, :, 0], condition.latents[0, :, 0])
        assert not torch.equal(result[i, :, 1], condition.latents[0, :, 1])


def test_a_callback_can_stop_the_run(text):
    def stop(report):
        if report.step == 3:
            raise KeyboardInterrupt

    model = CountingModel()
    with pytest.raises(KeyboardInterrupt):
        sample_on(model, solver.noise(SHAPE, 0), schedule.flow_schedule(50, 5.0), Guidance(), text, None, stop)
    assert model.rows == 3 * 2 * SHAPE[0]


def test_noise_is_the_seeds_alone():
    assert torch.equal(solver.noise(SHAPE, 0), solver.noise(SHAPE, 0))
    assert not torch.equal(solver.noise(SHAPE, 0), solver.noise(SHAPE, 1))
    with pytest.raises(OpenSoraError, match="seed=-1"):
        solver.noise(SHAPE, -1)


@pytest.mark.parametrize("steps", [0, -3])
def test_no_steps_is_an_error(steps):
    with pytest.raises(OpenSoraError, match=f"steps={steps}"):
        schedule.sigmas(steps, 3.0)


@pytest.mark.parametrize("shift", [float("nan"), float("inf"), -1.0, 0.0])
def test_a_bad_shift_is_an_error(shift):
    with pytest.raises(OpenSoraError, match="shift"):
        schedule.sigmas(10, shift)


@pytest.mark.parametrize("field", ["text", "image"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number_is_an_error(field, value):
    with pytest.raises(OpenSoraError, match=f"{field}_guidance"):
        Guidance(**{field: value})


class TestImageCondition:
    def test_needs_an_image(self):
        with pytest.raises(OpenSoraError, match="Give one: "):
            conditioning.image_condition(SHAPE)

    def test_first_and_last(self):
        head, tail = torch.full((1, 4, 1, 6, 8), 2.0), torch.full((2, 4, 1, 6, 8), 3.0)
        both = conditioning.image_condition(SHAPE, head, tail)
        assert both.mask[:, 0, :, 0, 0].tolist() == [[1, 0, 0, 0, 1]] * 2
        assert both.packed_input().shape == (2, 5, 5, 6, 8)
        assert (both.latents[:, :, 0] == 2).all() and (both.latents[:, :, -1] == 3).all() and (both.latents[:, :, 1:-1] == 0).all()

    @pytest.mark.parametrize("bad", [(1, 3, 1, 6, 8), (1, 4, 1, 6, 6), (3, 4, 1, 6, 8), (1, 4, 5, 6, 8)])
    def test_mismatch_is_an_error(self, bad):
        with pytest.raises(OpenSoraError):
            conditioning.image_condition(SHAPE, head=torch.zeros(bad))

    def test_an_image_needs_a_clip(self):
        with pytest.raises(OpenSoraError, match="at least 5 frames"):
            conditioning.image_condition((1, 4, 1, 6, 8), head=torch.zeros(1, 4, 1, 6, 8))


class TestFitImage:
    picture = torch.linspace(0, 1, 20 * 30 * 3).view(1, 20, 30, 3)

    @pytest.mark.parametrize("fit", conditioning.FITS)
    @pytest.mark.parametrize("size", [(32, 48), (16, 64), (64, 16)])
    def test_gives_the_size_asked_for(self, fit, size):
        out = conditioning.fit_image(self.picture, *size, fit)
        assert out.shape == (1, *size, 3) and out.min() >= 0 and out.max() <= 1

    def test_crop_of_the_right_size_is_the_picture(self):
        exact = (self.picture * 255).round() / 255
        torch.testing.assert_close(conditioning.fit_image(self.picture, 20, 30), exact)

    def test_pad_keeps_the_whole_picture_between_black(self):
        out = conditioning.fit_image(torch.ones(1, 10, 40, 3), 40, 40, "pad")
        assert (out[:, 15:25] == 1).all() and (out[:, :15] == 0).all() and (out[:, 25:] == 0).all()

    def test_wrong_rank(self):
        with pytest.raises(OpenSoraError, match="frames, height, width, 3"):
            conditioning.fit_image(torch.zeros(10, 40, 3), 16, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [2049, 2048 + 15, 2048 + 16, 3 * 1024, 3 * 1024 + 1, 4095])
def test_noise_in_pieces_is_the_same(count, dtype, monkeypatch):
    monkeypatch.setattr(solver, "_PIECE", 1024)
    pieces = []
    found = solver.noise((1, count), 7, dtype=dtype, on_piece=lambda: pieces.append(1))
    assert torch.equal(found, solver.noise((1, count), 7, dtype=dtype)) and len(pieces) > 1
