"""Open-Sora 1.0 to 1.3 and their codecs: the STDiT models, which know frames that are given, half given or edited, scores and camera words."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from re import compile as pattern

import torch
from torch import Tensor

from ..codecs.causal import CausalConfig, CausalVideoVAE
from ..codecs.picture import KL_LAYOUTS, KLConfig, PictureVAE
from ..codecs.temporal import LAYOUTS, TemporalConfig, TwoStageVAE
from ..family import Clip, Family, Part
from ..geometry import Grid
from ..geometry.open_sora_1 import EVERY_FRAME, FIXED, PIECES, SHARED_PIECES
from ..networks.stdit.config import PICTURE_FPS, STDiTConfig
from ..networks.stdit.layers import example
from ..networks.stdit.stdit import STDiT, STDiT3
from ..sampling import ddpm
from ..sampling.given import Given, ImageCondition
from ..sampling.guidance import Guidance, ReferenceUse, temporal_ramp
from ..sampling.longer import LongRule
from ..sampling.masks import ALIGN, BesideNoise, Frames, place
from ..sampling.run import SamplingRecipe, Side
from ..sampling.schedule import Flow, Schedule, pieces, quarters, sized_schedule
from ..shapes import Layout
from ..text.clean import clean_caption
from ..text.prompt_1x import with_scores, with_words
from ..text.recipe import T5, Said, TextRecipe, Unread

SD_VAE = Part(
    kind="sd_vae_diffusers",
    title="the Stable Diffusion VAE",
    other="a Stable Diffusion VAE",
    place=f"as Open-Sora 1.0 and 1.1 use it (stabilityai/sd-vae-ft-ema), {Part.place}",
    keys=(
        "encoder.down_blocks.0.resnets.0.conv1.weight|encoder.down.0.block.0.conv1.weight",
        "decoder.conv_in.weight",
        "post_quant_conv.bias",
    ),
    config=KLConfig.of,
    released=KLConfig(),
    dtype="F32",
    repositories=("sd-vae-ft-ema",),
    build=PictureVAE,
    layouts=KL_LAYOUTS,
)
VAE_1_2 = Part(
    kind="open_sora_1_2_vae",
    title="the Open-Sora 1.2 VAE",
    other="an Open-Sora 1.2 VAE",
    keys=(
        "spatial_vae.module.encoder.conv_in.weight|encoder.conv_in.weight",
        "temporal_vae.encoder.block_res_blocks.0.0.norm1.weight|encoder.block_res_blocks.0.0.norm1.weight",
    ),
    config=TemporalConfig.of,
    released=TemporalConfig(),
    dtype="F32",
    repositories=("OpenSora-VAE-v1.2",),
    build=TwoStageVAE,
    layouts=LAYOUTS,
)
VAE_1_3 = Part(
    kind="open_sora_1_3_vae",
    title="the Open-Sora 1.3 VAE",
    other="an Open-Sora 1.3 VAE",
    keys=(
        "decoder.up.2.upsample.conv3d.conv1.conv.weight|decoder.up.3.upsample.conv3d.conv1.conv.weight",
        "encoder.down.0.block.0.conv1.conv.bias",
    ),
    config=CausalConfig.of,
    released=CausalConfig(),
    repositories=("OpenSora-VAE-v1.3",),
    build=CausalVideoVAE,
)


def _inputs(config: STDiTConfig, side: Side, given: Given, numbers: Mapping[str, float | str]) -> Side:
    """The text, what the video is to be, and what is given of it."""
    like = next(iter(side.values()))
    told = dict(side)
    if config.has_sizes:
        frames = numbers.get("num_frames", 1)
        sizes = [PICTURE_FPS if frames == 1 else numbers["fps"], frames, numbers.get("height", 512), numbers.get("width", 512)]
        told["sizes"] = torch.tensor([sizes], dtype=torch.float32, device=like.device).expand(len(like), -1)
    if given.edit is not None:
        told["edit"] = given.edit.to(like.device)
    if given.cond is not None:
        told["cond"] = given.cond
    return told


def _beside(condition: ImageCondition, x: Tensor, schedule: Schedule, dtype: torch.dtype) -> Given:
    """1.3's condition types; a mask strategy is as of 1.2."""
    return (BesideNoise if condition.edit is None else Frames)(Flow(-1), condition, x, schedule, dtype)


def _flow(measure, given, align: int | None) -> SamplingRecipe:
    return SamplingRecipe(
        process=Flow(-1),
        schedule=lambda config, extent, num_steps, shift=0.0, size=(1, 512, 512): sized_schedule(size, num_steps, measure, shift),
        reads_size=True,
        given=given,
        inputs=_inputs,
        guidance=_two_passes,
        use=lambda use: Frames.use,
        place=partial(place, align=align),
    )


def _two_passes(guidance: Guidance, solver: str) -> Guidance:
    """Guidance by the prompt alone, in full at every step."""
    return replace(guidance, image=1.0, text_oscillation=False, every_pass=False)


def _learned(dtype: torch.dtype) -> SamplingRecipe:
    return SamplingRecipe(
        process=ddpm.NoisePrediction(),
        schedule=partial(ddpm.respaced_schedule, dtype=dtype),
        solvers=("ddpm",),
        use=lambda use: Frames.use,
        given=ddpm.RespacedFrames,
        inputs=_inputs,
        guidance=lambda guidance, solver: replace(_two_passes(guidance, solver), channels=ddpm.GUIDED_CHANNELS),
    )


def _text(length: int, words=lambda prompt, said: prompt, usual: Said | None = None) -> TextRecipe:
    """Sentences are added to the prompt as it is, then all of it is cleaned."""
    return TextRecipe(
        (T5,), length, True, lambda prompt, said: clean_caption(words(prompt, said)), Unread.NULL_CAPTION, clean_caption, usual or Said()
    )


def _scores(with_them):
    return lambda prompt, said: with_them(prompt, said.aesthetic_score or None, said.motion_score or None, said.camera_motion or None)


_LINEARS = {
    "attention": pattern(r"(?:spatial_|temporal_)?blocks\.\d+\.(?:attn|attn_temp|cross_attn)\.(?:qkv|proj|q_linear|kv_linear)"),
    "mlp": pattern(r"(?:spatial_|temporal_)?blocks\.\d+\.mlp\.fc[12]"),
    "modulation": pattern(r"t_block(?:_temp)?\.1"),
    "embedders": pattern(r"(?:t|fps|fl|csize|ar)_embedder\.mlp\.[02]|y_embedder\.y_proj\.fc[12]"),
    "final_layer": pattern(r"final_layer\.linear"),
}
_HIDDEN = {"hidden_size": 1152, "head_dim": 72, "mlp_hidden_size": 4608, "depth": 28, "context_in_dim": 4096}
RELEASED_1_3 = STDiTConfig(16, 32, text_length=300, in_turn=True, window=8, **_HIDDEN)
RELEASED_1_2 = STDiTConfig(4, 8, text_length=300, in_turn=True, **_HIDDEN)
RELEASED_1_1 = STDiTConfig(4, 8, text_length=200, **_HIDDEN)
RELEASED_1_0 = STDiTConfig(4, 8, text_length=120, has_sizes=False, **_HIDDEN)
# Fixed positions, which are computed here.
_POSITIONS = ("pos_embed", "pos_embed_temporal")
WITH_POSITIONS = Layout(convert=lambda key, tensor, config: [] if key in _POSITIONS else [(key, tensor)])


def _row(version: str, keys: tuple[str, ...], released: STDiTConfig, build, codec: Part, grid: Grid, **own) -> Family:
    return Family(
        kind=f"open_sora_{version.replace('.', '_')}",
        title=f"the Open-Sora {version} transformer",
        other=f"an Open-Sora {version} transformer",
        keys=keys,
        config=STDiTConfig.of,
        released=released,
        dtype="F32",
        build=build,
        layouts=(WITH_POSITIONS,),
        groups=_LINEARS,
        example=example,
        codecs=(codec.kind,),
        grid=grid,
        is_straight=False,
        **own,
    )


_V1 = ("HQ-16x512x512", "HQ-16x256x256", "16x256x256")
_IN_TURN, _EACH = "spatial_blocks.0.attn.qkv.weight", "blocks.0.attn_temp.qkv.weight"
OPEN_SORA_1_3 = _row(
    "1.3", (_IN_TURN, "x_embedder_cond.proj.weight"), RELEASED_1_3, STDiT3, VAE_1_3, SHARED_PIECES,
    owns=lambda config: config.in_turn and config.window > 0,
    usual=Clip(height=720, width=1280, num_frames=113, fps=24, num_steps=30, scales=(7.5, 5.0)),
    repositories=("OpenSora-STDiT-v4", "OpenSora-STDiT-v4-360p", "OpenSora-STDiT-v4-i2v"),
    text=_text(300, _scores(with_words)),
    sampling=replace(
        _flow(quarters, _beside, None),
        # Its image scale grows along time as 2.0's does, but is at 1 in the last step already.
        guidance=lambda guidance, solver: replace(guidance, tames=True, ramp=lambda scale, step, num_steps, latent_frames:
                                                  temporal_ramp(scale, step, num_steps - 1, latent_frames)),
        use=lambda use: use if use.is_held else ReferenceUse(strength=use.strength, is_renoised=use.is_renoised),
    ),
    longer=LongRule(has_scripts=True),
)  # fmt: skip
OPEN_SORA_1_2 = _row(
    "1.2", (_IN_TURN, "y_embedder.y_proj.fc1.weight"), RELEASED_1_2, STDiT3, VAE_1_2, PIECES,
    owns=lambda config: config.in_turn and not config.window,
    usual=Clip(height=240, width=426, num_frames=51, fps=24, num_steps=30, scales=(7.0,)),
    repositories=("OpenSora-STDiT-v3",),
    text=_text(300, _scores(with_scores), Said(aesthetic_score=6.5)),
    sampling=_flow(pieces, partial(Frames, Flow(-1)), ALIGN),
    longer=LongRule(re_encodes=True, has_scripts=True),
)  # fmt: skip
OPEN_SORA_1_1 = _row(
    "1.1", (_EACH, "t_block_temp.1.weight"), RELEASED_1_1, STDiT, SD_VAE, EVERY_FRAME,
    owns=lambda config: not config.in_turn and config.has_sizes,
    usual=Clip(height=240, width=426, num_frames=16, fps=8, num_steps=100, scales=(7.0,)),
    repositories=("OpenSora-STDiT-v2-stage3", "OpenSora-STDiT-v2-stage2"),
    text=_text(200),
    sampling=replace(_learned(torch.float32), place=partial(place, align=None, repeats_picture=True)),
    longer=LongRule(re_encodes=True, has_scripts=True),
)  # fmt: skip
OPEN_SORA_1_0 = _row(
    "1.0", (_EACH, "t_block.1.weight"), RELEASED_1_0, STDiT, SD_VAE, FIXED,
    owns=lambda config: not config.in_turn and not config.has_sizes,
    usual=Clip(height=512, width=512, num_frames=16, fps=8, num_steps=100, scales=(7.0,)),
    repositories=(*(f"OpenSora-v1-{name}.pth" for name in _V1), *(f"OpenSora-STDiT-v1-{name}" for name in _V1)),
    text=_text(120),
    sampling=_learned(torch.float64),
    takes=(),
)  # fmt: skip
FAMILIES = (OPEN_SORA_1_3, OPEN_SORA_1_2, OPEN_SORA_1_1, OPEN_SORA_1_0)
CODECS = (VAE_1_3, VAE_1_2, SD_VAE)
