"""Previews: never two at once, within their share of a run, in the host's colours or grey."""

import io
import time
import types

import pytest
import torch
from PIL import Image


@pytest.fixture
def preview(pack):
    return pack("nodes.host.preview")


def finish(one):
    if one.at_work is not None:
        one.at_work.join()


def test_never_two_at_once_and_a_fiftieth_of_the_time_at_most(preview, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(preview.time, "monotonic", lambda: now[0])
    sent = []

    def send(picture, step, steps):
        now[0] += 0.5  # what a preview costs here
        sent.append(step)

    one = preview.Preview(None, send)
    for step in range(400):
        now[0] += 1.0
        one.offer(torch.randn(1, 16, 3, 4, 6), step, 400)
        finish(one)
        assert one.spent <= now[0] / 50 + 0.5
    assert sent[0] == 2 and len(sent) >= 12


def test_a_busy_thread_is_left_alone(preview):
    one = preview.Preview(None, lambda *_: time.sleep(0.2))
    one.began -= 1000
    one.offer(torch.randn(1, 16, 3, 4, 6), 1, 2)
    first = one.at_work
    one.offer(torch.randn(1, 16, 3, 4, 6), 2, 2)
    assert one.at_work is first
    finish(one)


def test_frames_move_and_unknown_latents_are_grey(preview):
    latents = torch.randn(1, 128, 5, 4, 6)
    frames = preview.frames_of(latents, None)
    assert frames.shape == (5, 4, 6, 3) and bool((frames[..., 0] == frames[..., 2]).all())
    with Image.open(io.BytesIO(preview.moving_picture(frames))) as picture:
        assert (picture.n_frames, picture.size) == (5, (256, 171))


def test_colours_are_the_hosts_but_for_the_built_in_model(preview):
    import comfy.latent_formats

    model = types.SimpleNamespace(model=types.SimpleNamespace(latent_format=comfy.latent_formats.HunyuanVideo()), cached_patcher_init=None)
    factors, bias = preview.colours(model)
    assert factors.shape == (3, 16) and bias.shape == (3,)
    model.cached_patcher_init = (None, (str(preview.model_files.SMALL / "Open_Sora_v2.safetensors"), {}))
    own, _ = preview.colours(model)
    assert own.shape == (3, 16) and not torch.equal(own, factors)


def test_what_the_host_says_nothing_of_has_no_colours(preview):
    form = types.SimpleNamespace(latent_rgb_factors=None)
    assert preview.colours(types.SimpleNamespace(model=types.SimpleNamespace(latent_format=form))) is None


def test_colours_that_were_fitted_are_those_of_the_models_own_vae(preview, base):
    import json

    form = types.SimpleNamespace(latent_rgb_factors=None, latent_channels=4)
    model = types.SimpleNamespace(
        model=types.SimpleNamespace(latent_format=form, family=types.SimpleNamespace(codecs=("mine",))), cached_patcher_init=None
    )
    kept = base / "models" / "vae" / "a.colours.json"
    for held, is_taken in (
        ({"codec": "mine", "factors": [[0.1, 0.2, 0.3]] * 4, "bias": [0, 0, 0]}, True),
        ({"codec": "another", "factors": [[0.1, 0.2, 0.3]] * 4, "bias": [0, 0, 0]}, False),
        ({"codec": "mine", "factors": [[0.1, 0.2, 0.3]] * 3, "bias": [0, 0, 0]}, False),
        ({"codec": "mine", "factors": "red"}, False),
        ({"codec": "mine", "factors": None, "bias": [0, 0, 0]}, False),
    ):
        kept.write_text(json.dumps(held))
        assert (preview.colours(model) is not None) == is_taken, held
    kept.write_text("{")
    assert preview.colours(model) is None
    kept.unlink()


def test_a_page_that_opens_anew_is_given_the_last_picture_of_the_node_that_runs_for_it(preview, monkeypatch):
    sent = []
    server = types.SimpleNamespace(last_node_id="14:6", client_id="one", send_sync=lambda *message: sent.append(message))
    monkeypatch.setattr(preview.PromptServer, "instance", server, raising=False)
    monkeypatch.setattr(preview.notice, "shown_on", lambda node: node)
    monkeypatch.setattr(preview, "pages", {"one"})
    preview._send(server, "14:6", image=b"picture", step=3, steps=9)
    assert preview.now("one") == {"preview": sent[0][1]}
    assert preview.now("another") == {}, "which would not hear of the end"
    server.last_node_id = None  # the run is over
    preview._send(server, "14:6", image=b"a picture that was late", step=4, steps=9)
    assert preview.now("one") == {} and len(sent) == 1
    server.last_node_id, server.client_id = "14:6", "a page without web/js"
    preview._send(server, "14:6", image=b"picture", step=4, steps=9)
    assert len(sent) == 1
