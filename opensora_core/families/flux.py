"""How Flux's picture is drawn: how many steps, and how they are spaced.

Flux dev is distilled from guidance and asked for it in the network (`guidance_embed`); schnell has no such input and is made for 1 to 4 steps.
"""

import math

from ..errors import OpenSoraError, check_choice
from ..sampling.schedule import flow_shift

AUTO, OPEN_SORA, FLUX = "auto", "open-sora", "flux"
SCHEDULES = (AUTO, OPEN_SORA, FLUX)
GUIDANCE = 4.0  # the reference's, whatever the video's is
DEV_STEPS, SCHNELL_STEPS = 50, 4
RESOLUTION = "768px"  # the reference's, whatever the video's is

# Flux's own: the line through (256 tokens, 0.5) and (4096 tokens, 1.15) is the shift's logarithm.
_LOG_SLOPE = (1.15 - 0.5) / (4096 - 256)
_LOG_INTERCEPT = 0.5 - 256 * _LOG_SLOPE


def num_steps(asked: int, guidance_embed: bool) -> int:
    """Steps to take: those asked for, or for 0 what the model was made for: 50 for dev, 4 for schnell."""
    if asked < 0:
        raise OpenSoraError(f"image_steps={asked} draws nothing; use 1 or more, or 0 for what the model was made for.")
    return asked or (DEV_STEPS if guidance_embed else SCHNELL_STEPS)


def schedule_name(asked: str, guidance_embed: bool) -> str:
    """ "open-sora" or "flux"; auto is the reference's for dev, and schnell's own for schnell, which the reference never ran."""
    check_choice("flux_schedule", asked, SCHEDULES)
    return (OPEN_SORA if guidance_embed else FLUX) if asked == AUTO else asked


def picture_shift(asked: str, tokens: int, guidance_embed: bool) -> float:
    """The shift alpha of sampling/schedule.py's sigmas for a picture of `tokens` (its latent's area / 4).

    open-sora: as of a clip of one frame (768px: 2304 tokens -> 2.066667). flux: exp(mu) for dev, 1 (equal steps) for schnell.
    Source: hpcaitech/Open-Sora@7ad6a96a opensora/utils/sampling.py, get_schedule; black-forest-labs/flux sampling.py, get_schedule.
    """
    if schedule_name(asked, guidance_embed) == OPEN_SORA:
        return flow_shift(tokens, 1)
    return math.exp(_LOG_SLOPE * tokens + _LOG_INTERCEPT) if guidance_embed else 1.0
