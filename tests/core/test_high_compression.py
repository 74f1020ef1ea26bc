"""The high-compression variant in the library: how it counts, what belongs together, and runs from the command line. Parity: test_parity_dc_ae.py."""

import shutil
from dataclasses import replace

import pytest
import torch

from opensora_core.checkpoint.load import load_transformer, load_vae
from opensora_core.checkpoint.quantize import quantize
from opensora_core.cli import main
from opensora_core.codecs.dc_ae import VIDEO_DC_AE, VideoDCAE, linear_attention
from opensora_core.codecs.hunyuan.config import HUNYUAN_VAE
from opensora_core.codecs.tiling import num_tiles, tiled_decode
from opensora_core.errors import CheckpointError, OpenSoraError
from opensora_core.geometry import CAUSAL, HIGH_COMPRESSION, WHOLE_CLIP, Tiling
from opensora_core.inspection.report import check
from opensora_core.memory.count import AllocationCounter
from opensora_core.memory.decode import Ladder, decode_bytes, encode_bytes
from opensora_core.memory.footprint import sizes_of_files
from opensora_core.networks.mmdit.config import OPEN_SORA_2, OPEN_SORA_2_DC_AE
from opensora_core.pipeline import OpenSoraPipeline
from opensora_core.run.files import ModelFiles, check_files
from opensora_core.sampling.schedule import latent_flow_shift


@pytest.fixture(scope="module")
def folder(golden_path, tiny_checkpoint, tmp_path_factory):
    """Laid out as the variant's hub repository, with the text encoders beside it."""
    path = tmp_path_factory.mktemp("high") / "Open-Sora-v2-Video-DC-AE"
    path.mkdir()
    shutil.copy(golden_path / "dc_ae_transformer_weights.safetensors", path / "Open_Sora_v2_Video_DC_AE.safetensors")
    shutil.copy(golden_path / "dc_ae_weights.safetensors", path / "F32T4C128_AE.safetensors")
    for part in ("google", "openai"):
        shutil.copytree(tiny_checkpoint / part, path / part)
    return path


@pytest.fixture(scope="module")
def vae(golden_path):
    return load_vae(golden_path / "dc_ae_weights.safetensors", torch.float32)


def test_grids_are_what_the_configurations_say():
    assert OPEN_SORA_2.grid == HUNYUAN_VAE.grid == CAUSAL and OPEN_SORA_2_DC_AE.grid == VIDEO_DC_AE.grid == HIGH_COMPRESSION
    assert (CAUSAL.size_multiple, HIGH_COMPRESSION.size_multiple) == (16, 32)
    assert [HIGH_COMPRESSION.latent_frames(n) for n in (1, 8, 12, 128)] == [1, 2, 3, 32]
    assert [HIGH_COMPRESSION.pixel_frames(n) for n in (1, 2, 3, 32)] == [1, 8, 12, 128]
    assert (CAUSAL.frames_for_seconds(4, 24), HIGH_COMPRESSION.frames_for_seconds(4, 24), HIGH_COMPRESSION.frames_for_seconds(0.1, 24)) == (
        97,
        96,
        8,
    )
    # 768px 16:9, 128 frames: the reference's shift and number of decoder calls.
    extent = (HIGH_COMPRESSION.latent_frames(128), *HIGH_COMPRESSION.latent_size(576, 1024))
    assert latent_flow_shift(extent, 1) == pytest.approx(6.599663, abs=1e-6)
    assert num_tiles(extent, VIDEO_DC_AE.cut(Tiling()), True, HIGH_COMPRESSION) == 108


@pytest.mark.parametrize(("frames", "near"), [(129, "128 or 132"), (4, "1 or 8"), (5, "1 or 8"), (0, "1 or 8"), (126, "124 or 128")])
def test_a_wrong_length_names_the_nearest(frames, near):
    with pytest.raises(OpenSoraError, match=f"Use {near}: num_frames={frames} .*multiple of 4"):
        HIGH_COMPRESSION.frames.check(frames)


@pytest.mark.parametrize("frames", [52, 76, 100])
def test_no_length_loses_frames(vae, frames):
    """One latent is left for the last tile: the reference gives three frames less."""
    latents = torch.randn(1, 8, frames // 4, 1, 1, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = tiled_decode(vae.decode, latents, VIDEO_DC_AE.cut(Tiling()), grid=HIGH_COMPRESSION)
    assert found.shape[2] == frames and found.isfinite().all()


def test_a_tile_as_large_as_the_clip_changes_nothing_and_no_overlap_loses_nothing(vae):
    latents = torch.randn(1, 8, 3, 2, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = vae.decode(latents)
        assert torch.equal(tiled_decode(vae.decode, latents, Tiling(256, 0.25, 32), grid=HIGH_COMPRESSION), whole)
        assert tiled_decode(vae.decode, latents, Tiling(64, 0.0, 8), grid=HIGH_COMPRESSION).shape == whole.shape


def test_a_whole_clip_past_the_codecs_own_tile_can_be_asked_for(vae):
    latents = torch.randn(1, 8, 10, 1, 1, generator=torch.Generator().manual_seed(0))  # 40 frames
    assert vae.config.cut(Tiling(temporal_tile=WHOLE_CLIP)).temporal_tile == WHOLE_CLIP and vae.config.cut(Tiling()).temporal_tile == 32
    with torch.no_grad():
        whole = vae.decode(latents)
        found = tiled_decode(vae.decode, latents, vae.config.cut(Tiling(temporal_tile=WHOLE_CLIP)), grid=HIGH_COMPRESSION)
        assert torch.equal(found, whole)
        assert not torch.equal(tiled_decode(vae.decode, latents, vae.config.cut(Tiling()), grid=HIGH_COMPRESSION), whole)
    first = next(Ladder(vae.config, tuple(latents.shape), 4, lambda: 2**40).attempts("auto", Tiling(temporal_tile=WHOLE_CLIP)))
    assert (first.tiling.temporal_tile, first.line) == (WHOLE_CLIP, None)
    shorter = next(Ladder(vae.config, tuple(latents.shape), 4, lambda: 1).attempts("auto", Tiling(temporal_tile=WHOLE_CLIP))).tiling
    assert shorter.temporal_tile == vae.config.short_tile


def test_the_pipelines_vae_takes_the_word(folder):
    vae = OpenSoraPipeline.from_pretrained(folder).vae
    vae.enable_tiling(temporal_tile=WHOLE_CLIP)
    assert vae.tiling == Tiling(256, 0.25, WHOLE_CLIP)
    vae.enable_tiling(128)
    assert vae.tiling == Tiling(128, 0.25, WHOLE_CLIP)
    with pytest.raises(OpenSoraError, match="temporal_tile=-2"):
        vae.enable_tiling(temporal_tile=-2)


def test_what_surely_fits_is_not_counted(monkeypatch):
    monkeypatch.setattr("opensora_core.memory.decode.codec_on_meta", lambda *asked: pytest.fail("a second module was built"))
    ladder = Ladder(VIDEO_DC_AE, (1, 128, 9, 3, 5), 4, lambda: 2**45)
    assert next(ladder.attempts("auto", Tiling())) == (Tiling(256, 0.25, 32), None)


@pytest.mark.parametrize("size", [(1, 2, 2), (2, 2, 3), (9, 1, 1)])
@pytest.mark.parametrize("dtype_bytes", [2, 4])
def test_the_bound_is_above_what_is_counted(vae, size, dtype_bytes):
    assert VideoDCAE.decode_bytes_at_most(vae.config, size, dtype_bytes) > decode_bytes(vae.config, size, dtype_bytes)


def test_the_future_is_seen(vae):
    """Not causal: another last frame gives another first latent."""
    pixels = torch.zeros(1, 3, 16, 32, 32)
    with torch.no_grad():
        before = vae.encode(pixels).values
        pixels[:, :, -1] = 1
        assert (vae.encode(pixels).values - before)[:, :, 0].abs().max() > 1e-4


def test_sums_over_a_clip_stay_numbers_in_half_precision():
    """32 x 24 x 24 positions of weight 100: more than fp16 holds."""
    qkv = torch.full((1, 96, 32, 24, 24), 10.0) + torch.randn(1, 96, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    expected = linear_attention(qkv)
    assert (linear_attention(qkv.half()).float() - expected).abs().max() < 1e-2 * expected.abs().max()


@pytest.mark.parametrize("size", [(2, 2, 3), (1, 2, 2)])
def test_the_estimate_is_what_is_allocated(vae, size):
    frames, height, width = HIGH_COMPRESSION.pixel_frames(size[0]), 32 * size[1], 32 * size[2]
    latents, pixels = torch.zeros(1, 8, *size), torch.zeros(1, 3, frames, height, width)
    for run, x, estimate in (
        (vae.decode, latents, decode_bytes(vae.config, size, 4)),
        (vae.encode, pixels, encode_bytes(vae.config, (frames, height, width), 4)),
    ):
        with torch.inference_mode(), AllocationCounter() as counter:
            run(x)
        assert 0.6 < counter.peak / estimate < 1.4  # padding and layout changes inside a convolution are the library's


def test_decode_policies_shorten_tiles():
    def choose(policy, free):
        return next(Ladder(VIDEO_DC_AE, (1, 128, 32, 18, 32), 2, lambda: free).attempts(policy, Tiling()))

    assert choose("exact", 0) == (Tiling(256, 0.25, 32), None)
    assert choose("auto", 2**34) == (Tiling(256, 0.25, 32), None)
    chosen, line = choose("low_memory", 0)
    assert chosen == Tiling(256, 0.25, 16) and "temporal tiles of 16 frames" in line
    assert choose("auto", 2**29)[0] == Tiling(128, 0.25, 16)


def test_parts_of_two_variants_are_refused(folder, tiny_checkpoint):
    mine, other = ModelFiles.in_folder(folder), ModelFiles.in_folder(tiny_checkpoint)
    assert mine.grid == HIGH_COMPRESSION and mine.usual.size == (576, 1024, 128) and other.grid == CAUSAL
    check_files(mine)
    for dit, vae, says in (
        (mine.dit, other.vae, "hunyuan_vae.* is the HunyuanVideo VAE"),
        (other.dit, mine.vae, "F32T4C128_AE.* is the Video DC-AE"),
    ):
        with pytest.raises(CheckpointError, match=f"Give the VAE.*{says} and .* works on the latents of"):
            check_files(ModelFiles(dit, vae, mine.t5, mine.clip))


def test_what_the_variant_cannot_is_refused_in_a_sentence(folder):
    pipe = OpenSoraPipeline.from_pretrained(folder)
    picture = torch.zeros(64, 64, 3)
    for settings, says in (
        ({"num_frames": 9}, "Use 8 or 12"),
        ({"height": 48}, "multiples of 32"),
        ({"num_frames": 1, "image": picture}, "Use at least 8 frames"),
        ({"num_frames": 8, "image": picture, "last_image": picture}, "Use at least 12 frames"),
        ({"num_frames": 64, "video": torch.zeros(33, 64, 64, 3)}, "goes on from no clip"),
    ):
        with pytest.raises(OpenSoraError, match=says):
            pipe("a cat", **{"height": 64, "width": 64, "num_frames": 8, **settings})
    with pytest.raises(OpenSoraError, match="goes on from no clip"):
        pipe.extend(torch.zeros(1, 8, 12, 2, 2), "a cat", num_frames=33, context_frames=5)


def test_the_command_line_makes_a_video_of_4k_frames(folder, tmp_path, capsys):
    small = ["--width", "64", "--height", "64", "--num-steps", "1", "--seed", "1", "--out", str(tmp_path / "clip.mp4")]
    assert main(["generate", "--model", str(folder), "--prompt", "a cat", "--num-frames", "0.5s", *small]) == 0
    said = capsys.readouterr()
    assert "0.5s at 24 FPS: 12 frames" in said.err and (tmp_path / "clip.mp4").stat().st_size > 0
    assert main(["generate", "--model", str(folder), "--prompt", "a cat", "--num-frames", "9", *small]) == 2
    assert "Use 8 or 12" in capsys.readouterr().err


def test_files_are_inspected_planned_and_quantised(folder, tmp_path, capsys):
    assert check(folder / "F32T4C128_AE.safetensors").passed
    assert main(["inspect", str(folder)]) == 0
    assert "This folder has every part of Open-Sora 2.0." in capsys.readouterr().out
    assert main(["inspect", str(folder), "--plan", "--gpu-gib", "8", "--ram-gib", "16", "--width", "64", "--height", "64"]) == 0
    assert "64x64 (width x height), 128 frames" in capsys.readouterr().out
    assert sizes_of_files(folder / "Open_Sora_v2_Video_DC_AE.safetensors").vae == replace(VIDEO_DC_AE, latent_channels=8)
    target = tmp_path / "fp8.safetensors"
    quantize(folder / "Open_Sora_v2_Video_DC_AE.safetensors", target, "fp8_e4m3fn")
    assert load_transformer(target).config == load_transformer(folder / "Open_Sora_v2_Video_DC_AE.safetensors").config
