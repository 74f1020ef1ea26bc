"""Training of the small model: data that never shows what is held out, batches by step number, runs that a kill cannot spoil."""

import os
import random
import signal
from dataclasses import replace

import pytest
import torch
from torch import nn

from opensora_core.evaluation import world
from opensora_core.pipeline import OpenSoraPipeline
from training import data, decoder, samples, tokenizers, transformer, vae
from training.data import CLIP, LONG, Clips
from training.export import LatentStatistics
from training.muon import Muon, orthogonalise
from training.samples import Samples
from training.state import Rows, Run, set_learning_rate
from training.text import untrained


def toy(seed=0):
    torch.manual_seed(seed)
    model = nn.Linear(4, 4)
    return model, torch.optim.Adam(model.parameters(), lr=0.1)


def train(folder, total, until=None, by=lambda: None):
    model, optimizer = toy()
    run = Run(folder, "toy", {"model": model, "optimizer": optimizer})
    for step in run.steps(total):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x) - x.flip(-1)).square().mean().backward()
        optimizer.step()
        if step == until:
            by()
    return model.weight.detach().clone()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_run_that_is_told_to_stop_goes_on_where_it_was(tmp_path, number):
    whole = train(tmp_path / "whole", 12)
    with pytest.raises(SystemExit, match="step 6 of 12"):
        train(tmp_path / "parts", 12, until=5, by=lambda: os.kill(os.getpid(), number))
    assert torch.equal(train(tmp_path / "parts", 12), whole)


def test_run_killed_between_two_saves_repeats_the_same_steps(tmp_path):
    class Killed(BaseException):
        pass

    def kill():
        raise Killed

    whole = train(tmp_path / "whole", 12)
    train(tmp_path / "parts", 4)  # the last state on disk
    with pytest.raises(Killed):
        train(tmp_path / "parts", 12, until=9, by=kill)
    (tmp_path / "parts" / "toy.partial").write_bytes(b"half a state")
    assert torch.equal(train(tmp_path / "parts", 12), whole)


def test_rows_that_are_filled_outlive_a_stop_and_more_can_be_asked_for(tmp_path):
    for count in (3, 5):
        rows = Rows({"made": torch.zeros(count, 2)})
        run = Run(tmp_path, "rows", {"rows": rows})
        done = list(run.steps(count))
        for step in done:
            rows["made"][step] = step + 1
        run.save()
        assert rows["made"][:, 0].tolist() == list(range(1, count + 1))
    assert done == [3, 4]


def test_clips_show_seen_combinations_only_and_are_the_same_again():
    _, held_out = world.split()
    scenes = [data.scene(index) for index in range(300)]
    assert not {scene.combination for scene in scenes} & set(held_out)
    assert scenes == [data.scene(index) for index in range(300)]
    assert len({scene.combination for scene in scenes}) > 100
    assert all(f"{scene.motion_score} motion score." in data.text_of(scene) for scene in scenes)


def test_a_mistaken_caption_is_wrong_in_one_word_and_never_that_of_a_held_out_combination():
    seen, _ = world.split()
    for index in range(100):
        scene = data.scene(index)
        wrong = data.mistake(scene, random.Random(index))
        assert sum(vars(wrong.combination)[name] != value for name, value in vars(scene.combination).items()) == 1
        assert wrong.combination in seen
        assert replace(wrong, combination=scene.combination, caption=scene.caption) == scene
        assert wrong.combination.colour in wrong.caption and wrong.combination.background in wrong.caption


def test_captions_are_mistaken_as_often_as_said_from_the_step_that_is_said(sampler):
    def share(step):
        drawn = sampler.batch(step, 300)
        right = {tuple(sampler.t5_ids[row].tolist()) for row in [*sampler.rows, sampler.empty]}
        return sum(tuple(ids.tolist()) not in right for ids in drawn.t5_ids) / 300

    assert share(transformer.LATER - 1) == 0
    # Some mistaken captions are another clip's right one.
    assert 0.05 < share(transformer.LATER) < transformer.MISTAKEN


def test_decoder_learns_on_latents_with_single_pictures_in_their_places():
    model = vae.CausalVAE(vae.CONFIG)
    vae.initialise(model)
    pixels, _ = decoder.batch(0, 1)
    plain, given = (decoder.latents_of(model, pixels, name, torch.Generator().manual_seed(0)) for name in ("nothing", "both"))
    assert torch.equal(plain[:, :, 1:-1], given[:, :, 1:-1])
    for at, frame in ((0, pixels[:, :, :1]), (-1, pixels[:, :, -1:])):
        with torch.no_grad():
            alone, _ = model.encode(frame).moments()
        assert torch.equal(given[:, :, at], alone[:, :, 0])
        assert not torch.equal(plain[:, :, at], alone[:, :, 0])
    assert {decoder.batch(step, 1)[1] for step in range(30)} == set(decoder.GIVEN)
    loss, _ = decoder.loss_of(model, 0, 1, "cpu")
    loss.backward()
    assert all(parameter.grad is None for parameter in model.encoder.parameters())
    assert all(parameter.grad is not None for parameter in model.decoder.parameters())


@pytest.fixture(scope="module")
def sampled():
    """Two scenes, sampled by the built-in model: one given its last picture, one both."""
    pipe = OpenSoraPipeline.from_pretrained("small").to("cpu")
    rows = [samples.sample(pipe, index) for index in range(2)]
    return Samples(**{name: torch.cat([row[name] for row in rows]) for name in rows[0]})


def test_sampled_clips_end_in_the_pictures_of_scenes_that_are_not_held_out(sampled):
    _, held_out = world.split()
    assert not {samples.scene(index).combination for index in range(300)} & set(held_out)
    assert sampled.has_first.tolist() == [False] * samples.SEEDS + [True] * samples.SEEDS
    assert not torch.equal(sampled.latents[0], sampled.latents[1]), "every seed samples a clip of its own"
    for index in range(2):
        clip = (samples.scene(index).render() * 255).round().to(torch.uint8)
        for row in range(index * samples.SEEDS, (index + 1) * samples.SEEDS):
            assert torch.equal(sampled.frames[row, -1], clip[-1])
            assert torch.equal(sampled.frames[row, 0], clip[0]) == (index == 1)
            # What is between is what the clip is decoded to: near the scene, and not the scene itself.
            between = (sampled.frames[row, 8].float() - clip[8].float()).square().mean().sqrt()
            assert 1 < between < 60


def test_decoder_learns_on_sampled_latents_from_the_step_that_is_said(sampled):
    latents, pixels = decoder.sampled_batch(sampled, 5, 2)
    again, other = decoder.sampled_batch(sampled, 5, 2), decoder.sampled_batch(sampled, 6, 2)
    assert torch.equal(latents, again[0]) and torch.equal(pixels, again[1]) and not torch.equal(latents, other[0])
    assert latents.shape == (2, 16, CLIP, 8, 8) and pixels.shape == (2, 3, world.NUM_FRAMES, world.SIZE, world.SIZE)
    assert any(torch.allclose((pixels[0].movedim(0, -1) + 1) * 127.5, clip.float(), atol=1e-3) for clip in sampled.frames)
    model = vae.initialise(vae.CausalVAE(vae.CONFIG))
    assert not any(map(decoder.is_sampled, range(decoder.SAMPLED_LATER)))
    later = range(decoder.ALONE_LATER, decoder.ALONE_LATER + 30)
    assert sum(map(decoder.is_sampled, later)) == 20
    assert {decoder.batch(step, 1)[1] for step in later} == {"nothing", "first"}, "a last picture: among sampled latents alone"
    odd = decoder.SAMPLED_LATER + 1 - decoder.SAMPLED_LATER % 2
    decoder.loss_of(model, decoder.SAMPLED_LATER - 1, 1, "cpu")
    decoder.loss_of(model, odd + 1, 1, "cpu")
    with pytest.raises(AttributeError):
        decoder.loss_of(model, odd, 1, "cpu")
    nothing = replace(sampled, latents=torch.full_like(sampled.latents, torch.nan))
    assert torch.isnan(decoder.loss_of(model, odd, 1, "cpu", nothing)[0]) and not torch.isnan(
        decoder.loss_of(model, odd + 1, 1, "cpu", nothing)[0]
    )


def test_long_clips_are_in_the_middle_half_way():
    long = [data.scene(index) for index in range(400) if data.is_long(index)]
    assert len(long) == 40
    for scene in long:
        assert all(abs(at - world.SIZE / 2) <= world.CENTRE_SPREAD + 1e-6 for at in scene.centre((data.LONG_FRAMES - 1) // 2))


@pytest.fixture(scope="module")
def clips():
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(40, 16, LONG, 8, 8, generator=generator).half()
    first, last = (torch.randn(40, 16, 8, 8, generator=generator).half() for _ in range(2))
    return Clips(whole, first, last, LatentStatistics(torch.zeros(16), torch.ones(16)))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    torch.manual_seed(0)
    return untrained(tokenizers.write(tmp_path_factory.mktemp("tokenizers")))


@pytest.fixture(scope="module")
def sampler(clips, text):
    return transformer.Sampler(clips, text, "cpu")


def test_a_batch_depends_on_its_step_alone(sampler):
    again, other = sampler.batch(3, 6), sampler.batch(4, 6)
    for name in ("latents", "cond", "t5_ids", "clip_ids"):
        assert torch.equal(getattr(sampler.batch(3, 6), name), getattr(again, name))
    assert not torch.equal(again.latents, other.latents)


def test_what_is_given_is_a_picture_alone_or_a_window_s_own_latents(sampler, clips):
    batch = sampler.batch(0, 400)
    kinds = set()
    for latents, cond in zip(batch.latents, batch.cond, strict=True):
        given = cond[0, :, 0, 0].bool()
        assert torch.equal(cond[1:, ~given], torch.zeros_like(cond[1:, ~given]))
        is_window = not any(torch.equal(latents, clip[:, :CLIP].float()) for clip in clips.whole)
        kinds.add((tuple(given.tolist()), is_window))
        if is_window:  # its first latent frame stands for four frames: it is always gone on from
            assert given[0] and not given[-1]
            assert torch.equal(cond[1:, given], latents[:, given])
        elif given.tolist() == [True, False, False, False, True]:
            assert any(torch.equal(cond[1:, 0], first.float()) for first in clips.first)
            assert any(torch.equal(cond[1:, -1], last.float()) for last in clips.last)
    assert ((False,) * CLIP, False) in kinds
    assert ((False,) * CLIP, True) not in kinds
    assert len({given for given, _ in kinds}) == 6  # nothing, first, last, both, two and three latents to go on from


def test_text_is_dropped_as_often_as_said(sampler):
    batch = sampler.batch(1, 600)
    empty = sampler.t5_ids[sampler.empty]
    share = (batch.t5_ids == empty).all(1).float().mean().item()
    assert share == pytest.approx(transformer.WITHOUT_TEXT, abs=0.04)


def test_networks_begin_at_zero_velocity_and_learn(sampler, text):
    networks = transformer.Networks(text)
    batch, generator = sampler.batch(0, 4), torch.Generator().manual_seed(0)
    with torch.no_grad():
        assert not networks.velocity(batch, batch.latents, torch.full((4,), 0.5)).any()
    optimizers = transformer.optimisers(networks, 0.02)
    losses = []
    for _ in range(12):
        loss = transformer.loss_of(networks, batch, generator)
        networks.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer, rate in optimizers:
            set_learning_rate(optimizer, rate)
            optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    # Every network takes part, the text encoders too.
    for name in ("t5.shared.weight", "clip."):
        assert any(parameter.grad is not None and parameter.grad.any() for key, parameter in networks.named_parameters() if name in key)


def test_vae_learns_from_crops_and_whole_clips():
    model = vae.initialise(vae.CausalVAE(vae.CONFIG))
    assert vae.batch(0, 2, whole=False).shape == (2, 3, vae.CROP_FRAMES, vae.CROP, vae.CROP)
    assert torch.equal(vae.batch(7, 2, whole=True), vae.batch(7, 2, whole=True))
    assert {vae.batch(step, 1, whole=True).shape[2] for step in range(20)} == {1, world.NUM_FRAMES}
    loss, figures = vae.loss_of(model, vae.batch(0, 1, whole=False), torch.Generator().manual_seed(0))
    loss.backward()
    assert figures["psnr"] > 5
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_muon_steps_are_orthogonal():
    for shape in ((16, 48), (48, 16), (8, 4, 3, 3, 3)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        values = torch.linalg.svdvals(orthogonalise(matrix.flatten(1)))
        assert values.min() > 0.5 and values.max() < 1.4
        parameter = nn.Parameter(torch.zeros(shape))
        parameter.grad = matrix
        Muon([parameter], lr=0.1).step()
        assert torch.linalg.matrix_norm(parameter.detach().flatten(1), ord=2) == pytest.approx(
            0.1 * max(1, shape[0] / matrix[0].numel()) ** 0.5, rel=0.4
        )


def test_rate_rises_holds_and_falls():
    rates = [transformer.learning_rate(step, 1000, 1.0) for step in range(1000)]
    assert rates[0] == pytest.approx(0.02) and rates[49] == rates[749] == 1.0
    assert rates[-1] == pytest.approx(0.024, abs=0.002)
    assert all(earlier >= later for earlier, later in zip(rates[50:], rates[51:], strict=False))
