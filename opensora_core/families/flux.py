"""Flux.1, which draws the picture that a video begins with: what it is, how many steps it takes, and how they are spaced.

Flux dev is distilled from guidance and asked for it in the network (`guidance_embed`); schnell has no such input and is made for 1 to 4 steps.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from ..choices import AUTO, FLUX, OPEN_SORA, PICTURE_SCHEDULES
from ..codecs.picture import FLUX_AE, PictureConfig, PictureVAE
from ..errors import OpenSoraError, check_choice
from ..family import Clip, Drawing, Family, Part
from ..geometry import CAUSAL
from ..networks.mmdit.config import FLUX_DEV, TransformerConfig
from ..networks.mmdit.layout import FUSED, GROUPS, KEYS, UNFUSED
from ..networks.mmdit.model import MMDiT, example
from ..sampling.given import Given
from ..sampling.run import SamplingRecipe, Side
from ..sampling.schedule import Flow, flow_shift
from ..text.prompt import T5_LENGTH
from ..text.recipe import CLIP, T5, TextRecipe

GUIDANCE = 4.0  # upstream's, whatever the video's is
DEV_STEPS, SCHNELL_STEPS = 50, 4

# Flux's own: the line through (256 tokens, 0.5) and (4096 tokens, 1.15) is the shift's logarithm.
_LOG_SLOPE = (1.15 - 0.5) / (4096 - 256)
_LOG_INTERCEPT = 0.5 - 256 * _LOG_SLOPE


def _inputs(config: TransformerConfig, side: Side, given: Given, numbers: Mapping[str, float]) -> Side:
    """The text, and for dev the guidance it is distilled from, which is told to it in place of a second pass."""
    if not config.guidance_embed:
        return side
    return {**side, "guidance": torch.tensor([numbers["guidance"]], device=side["context"].device)}


def num_steps(asked: int, guidance_embed: bool) -> int:
    """Steps to take: those asked for, or for 0 what the model was made for: 50 for dev, 4 for schnell."""
    if asked < 0:
        raise OpenSoraError(f"image_steps={asked} draws nothing; use 1 or more, or 0 for what the model was made for.")
    return asked or (DEV_STEPS if guidance_embed else SCHNELL_STEPS)


def schedule_name(asked: str, guidance_embed: bool) -> str:
    """ "open-sora" or "flux"; auto is upstream's for dev, and schnell's own for schnell, which upstream never ran."""
    check_choice("flux_schedule", asked, PICTURE_SCHEDULES)
    return (OPEN_SORA if guidance_embed else FLUX) if asked == AUTO else asked


def picture_shift(asked: str, tokens: int, guidance_embed: bool) -> float:
    """The shift alpha of sampling/schedule.py's sigmas for a picture of `tokens` (its latent's area / 4).

    open-sora: as of a clip of one frame (768px: 2304 tokens -> 2.066667). flux: exp(mu) for dev, 1 (equal steps) for schnell.
    Source: hpcaitech/Open-Sora@7ad6a96a opensora/utils/sampling.py, get_schedule; black-forest-labs/flux sampling.py, get_schedule.
    """
    if schedule_name(asked, guidance_embed) == OPEN_SORA:
        return flow_shift(tokens, 1)
    return math.exp(_LOG_SLOPE * tokens + _LOG_INTERCEPT) if guidance_embed else 1.0


AUTOENCODER = Part(
    kind="flux_ae",
    title="the Flux.1 picture autoencoder",
    place="which turns Flux's latents into pictures (--flux-vae on the command line); Stable Diffusion 3's has the same shape",
    slot="flux_vae",
    keys=("encoder.down.0.block.0.conv1.weight", "decoder.conv_in.weight"),
    config=PictureConfig.of,
    released=FLUX_AE,
    dtype="F32",
    build=PictureVAE,
)

FLUX_1 = Family(
    kind="flux_1",
    title="a Flux.1 transformer (fused qkv, no cond_in)",
    place="which draws the picture that a video begins with: --flux on the command line, flux_model of Open-Sora Flux to Video",
    slot="flux",
    keys=(*KEYS, FUSED.mark),
    config=TransformerConfig.of,
    owns=lambda config: not config.cond_embed,
    released=FLUX_DEV,
    also_released=(replace(FLUX_DEV, guidance_embed=False),),  # schnell
    build=MMDiT,
    layouts=(FUSED,),
    groups=GROUPS,
    example=example,
    codecs=(AUTOENCODER.kind,),
    grid=CAUSAL,
    usual=Clip(height=576, width=1024, num_frames=1, fps=24, num_steps=DEV_STEPS, scales=(GUIDANCE,)),
    text=TextRecipe((T5, CLIP), T5_LENGTH, False, lambda prompt, said: prompt, ""),
    sampling=SamplingRecipe(process=Flow(+1), inputs=_inputs),
    draws=Drawing("768px", num_steps, schedule_name, picture_shift),
    plain=("img_in",),
)
# As fine-tuning to Open-Sora 2.0 begins from it.
FLUX_1_UNFUSED = replace(
    FLUX_1,
    kind="flux_1_unfused",
    title="a Flux.1 transformer in Open-Sora's key layout (unfused qkv, no cond_in)",
    place="which is the start of fine-tuning and was not trained for video",
    slot="",
    keys=KEYS,
    layouts=(UNFUSED,),
)
