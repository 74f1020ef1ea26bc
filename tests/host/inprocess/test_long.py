"""Going on from a video in the host: the core's numbers, one segment at a time, finished segments on disk whatever happens."""

import pytest
import torch
from in_core import run_in_core
from safetensors.torch import load_file

SHAPE = (1, 16, 5, 6, 8)  # 17 frames of 48x64


@pytest.fixture(scope="module")
def vae(run_node):
    return run_node("OpenSoraVAELoader", vae_name="hunyuan_vae.safetensors")[0]


@pytest.fixture(scope="module")
def video():
    """A finished video's LATENT, unscaled."""
    return {"samples": torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)) * 2}


@pytest.fixture
def go_on(run_node, model, conditioning, vae, video):
    """go_on(segments=2, ...) -> latent, images, file of Open-Sora Continue Video."""

    def run(**changes):
        inputs = {
            "model": model, "positive": conditioning(1), "negative": conditioning(2), "vae": vae, "latent": video, "segments": 2, "seed": 7,
            "steps": 2, "text_guidance": 7.5, "image_guidance": 3.0, "num_frames": 0, "context_frames": 0,
            "filename_prefix": "latents/long", "policy": "auto",
        }  # fmt: skip
        return run_node("OpenSoraContinueVideo", **{**inputs, **changes})

    return run


@pytest.fixture
def sampled(model):
    """A copy of the MODEL, and a list of the shapes of what its network is asked for."""
    import comfy.patcher_extension

    seen = []

    def listening(executor, x, *args, **kwargs):
        seen.append(tuple(x.shape))
        return executor(x, *args, **kwargs)

    copy = model.clone()
    copy.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "listen", listening)
    return copy, seen


@pytest.fixture
def stop_at(monkeypatch, pack):
    """stop_at(segment, error): the run of that segment, from 1, ends so."""
    run = pack("nodes.host.run")
    real = run.run

    def stop(segment, error):
        begun = []

        def runs(*arguments, **named):
            begun.append(1)
            if len(begun) == segment:
                raise error
            return real(*arguments, **named)

        monkeypatch.setattr(run, "run", runs)

    return stop


def kept_files(base):
    return sorted((base / "output" / "latents").glob("*.latent"))


def test_every_frame_is_there_once_and_the_given_ones_are_untouched(go_on, run_node, vae, video):
    latent, images, file = go_on()
    assert latent["samples"].shape == (1, 16, 5 + 3 + 3, 6, 8)
    assert torch.equal(latent["samples"][:, :, :5], video["samples"])
    assert images.shape == (17 + 12 + 12, 48, 64, 3)
    (alone,) = run_node("OpenSoraTiledVAEDecode", vae=vae, latent=video, tile_size=256, overlap=0.25, temporal_tile=0, policy="auto")
    assert torch.equal(images[:13], alone[:13])
    stored = load_file(file)
    assert torch.equal(stored["latent_tensor"], latent["samples"])


def test_the_hosts_load_latent_reads_the_file(go_on, run_node, base):
    latent, _, file = go_on(segments=1)
    name = file.rsplit("/", 1)[-1]
    (base / "input" / name).write_bytes(open(file, "rb").read())
    (loaded,) = run_node("LoadLatent", latent=name)
    assert torch.equal(loaded["samples"], latent["samples"])
    assert torch.equal(go_on(segments=1, latent=loaded, num_frames=17)[0]["samples"], go_on(segments=2)[0]["samples"])


def test_a_segment_is_the_cores(go_on, pack, base, conditioning, video, relative_error):
    core = pack("opensora_core.checkpoint.load").load_transformer(base / "models/diffusion_models/Open_Sora_v2.safetensors", torch.float32)
    long, schedule = (pack(f"opensora_core.{name}") for name in ("run.segments", "sampling.schedule"))
    image_condition = pack("opensora_core.sampling.given").image_condition
    guidance = pack("opensora_core.sampling.guidance")
    scale = pack("opensora_core.codecs.hunyuan.config").LATENT_SCALE
    rule, grid = pack("opensora_core.sampling.longer").LongRule(), pack("opensora_core.geometry").CAUSAL
    plan, (positive, negative) = rule.continuation(5, None, None, grid), (conditioning(1)[0], conditioning(2)[0])
    given = long.context_of(video["samples"] * scale, plan)
    condition = image_condition(SHAPE, head=given, use=guidance.ReferenceUse(is_clip=True))
    sigmas, noise = schedule.sigmas(2, schedule.latent_flow_shift(SHAPE, 2)), (SHAPE, long.segment_seed(7, 5))
    expected = run_in_core(pack, core, noise, sigmas, guidance.Guidance(), (positive, negative), condition) / scale
    found = go_on(segments=1)[0]["samples"]
    assert relative_error(found[:, :, 5:], expected[:, :, plan.context :]) < 1e-4


def test_the_network_sees_one_segment_at_a_time(go_on, sampled):
    copy, seen = sampled
    go_on(model=copy, segments=3, steps=1)
    assert {shape[2:] for shape in seen} == {(5, 6, 8)}


def test_a_reference_of_the_first_clip_does_not_come_back(go_on, conditioning):
    picture = {"concat_latent_image": torch.ones(SHAPE), "concat_mask": torch.zeros(1, 1, *SHAPE[2:])}
    with_picture = [[context, {**values, **picture}] for context, values in conditioning(1)]
    assert torch.equal(go_on(positive=with_picture, segments=1)[0]["samples"], go_on(segments=1)[0]["samples"])


def test_a_batch_goes_on(go_on, video):
    latent, images, _ = go_on(latent={"samples": torch.cat((video["samples"], video["samples"].flip(2)))}, segments=1)
    assert latent["samples"].shape[:3] == (2, 16, 8) and images.shape[0] == 2 * 29


def test_finished_segments_are_on_disk_when_the_run_is_cancelled(go_on, stop_at, pack, base, monkeypatch):
    from comfy.model_management import InterruptProcessingException

    lines, before = [], kept_files(base)
    monkeypatch.setattr(pack("nodes.host.notice"), "show", lambda text, node_id, level=0: lines.append(text))
    stop_at(3, InterruptProcessingException())
    with pytest.raises(InterruptProcessingException):
        go_on(segments=4)
    (kept,) = set(kept_files(base)) - set(before)
    assert pack("opensora_core.media.latent_file").read_latents(kept).shape[2] == 5 + 2 * 3
    assert lines[-1] == f"The video with 2 finished segments is in output/latents/{kept.name}."


def test_a_sentence_about_a_failure_names_the_file(go_on, stop_at, pack):
    error = pack("opensora_core.errors").OpenSoraError
    stop_at(2, error("Memory ran out."))
    with pytest.raises(error, match=r"Memory ran out\. The video with 1 finished segment is in output/latents/long_\d+_\.latent"):
        go_on()


def test_without_room_on_the_disk_one_sentence_and_what_was_finished_stays(go_on, pack, base, monkeypatch):
    latent_file, error = pack("opensora_core.media.latent_file"), pack("opensora_core.errors").OpenSoraError
    before, real, calls = kept_files(base), latent_file.save_file, []

    def full(tensors, path, metadata):
        calls.append(1)
        if len(calls) == 2:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(tensors, path, metadata=metadata)

    monkeypatch.setattr(latent_file, "save_file", full)
    with pytest.raises(error, match="could not be written.*No space left.*1 finished segment is in"):
        go_on()
    (kept,) = set(kept_files(base)) - set(before)
    assert latent_file.read_latents(kept).shape[2] == 8
    assert not list(kept.parent.glob(".*partial*"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"filename_prefix": "../outside/long"}, "leads out of the output folder"),
        ({"filename_prefix": ""}, "leads out of the output folder"),
        ({"num_frames": 1}, "no room for what comes next"),
        ({"context_frames": 17}, "leaves nothing of a segment of 17"),
        ({"context_frames": 33, "num_frames": 129}, "more than this video of 17 has"),
        ({"prompts": "a cat"}, "Connect clip"),
        ({"prompts": "a\nb\nc"}, "3 prompts for 2 segment"),
        ({"latent": {"samples": torch.zeros(1, 4, 6, 8)}}, "this model denoises"),
        ({"latent": {"samples": torch.zeros(1, 16, 1, 6, 8)}}, "single frame"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_model_is_used(go_on, pack, monkeypatch, changes, words):
    monkeypatch.setattr(pack("nodes.host.run"), "run", lambda *arguments, **named: pytest.fail("sampled"))
    with pytest.raises(pack("opensora_core.errors").OpenSoraError, match=words):
        go_on(**changes)


def test_two_runs_at_once_get_names_of_their_own(pack, base):
    kept = pack("nodes.host.kept")
    with kept.OutputFile("latents/both") as first, kept.OutputFile("latents/both") as second:
        assert first.path != second.path
        for number, file in enumerate((first, second)):
            file.keep(torch.full(SHAPE, float(number)))
    assert load_file(first.path)["latent_tensor"].max() == 0 and load_file(second.path)["latent_tensor"].min() == 1
    assert not list((base / "output/latents").glob("*.claim"))


@pytest.mark.parametrize("name", ["con", "latents/nul.x", "http://somewhere/x"])
def test_names_that_no_file_has_are_refused(name, go_on, pack):
    with pytest.raises(pack("opensora_core.errors").OpenSoraError, match="device|address"):
        go_on(filename_prefix=name)
