"""What a video begins from: which latent frames are given, their latents, and how pictures are fitted.

Conditioned latents are not held during sampling: they enter the network beside the noise (`cond_in`) and
replace the result once at the end.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import OpenSoraError
from ..geometry import resize_crop

# Latent frames given at the head and at the tail of a clip, for a causal VAE.
# Source: hpcaitech/Open-Sora@7ad6a96a opensora/utils/inference.py, prepare_inference_condition.
_GIVEN_FRAMES = {
    "t2v": (0, 0),
    "i2v_head": (1, 0),
    "i2v_tail": (0, 1),
    "i2v_loop": (1, 1),
    "v2v_head": (9, 0),
    "v2v_tail": (0, 9),
    "v2v_head_easy": (17, 0),
    "v2v_tail_easy": (0, 17),
}
COND_TYPES = tuple(_GIVEN_FRAMES)
FITS = ("crop", "pad", "stretch")


@dataclass(frozen=True)
class ImageCondition:
    """Given latent frames.

    Attributes:
        mask: [B, 1, T, H, W], 1 where a latent frame is given.
        latents: [B, C, T, H, W] in the transformer's scale (LATENT_SCALE times the VAE's), zero elsewhere.
    """

    mask: Tensor
    latents: Tensor

    def packed_input(self) -> Tensor:
        """What `cond_in` reads, before packing: [B, C + 1, T, H, W], mask first."""
        return torch.cat((self.mask, self.mask * self.latents), dim=1)


def condition_mask(cond_type: str, latent_frames: int) -> Tensor:
    """[T] fp32, 1 on the latent frames that a mode gives.

    Raises:
        OpenSoraError: an unknown mode, or a clip too short to hold what is given and still make a frame.
    """
    if cond_type not in _GIVEN_FRAMES:
        raise OpenSoraError(f"cond_type={cond_type!r} is not known; use one of {', '.join(COND_TYPES)}.")
    head, tail = _GIVEN_FRAMES[cond_type]
    if head + tail and latent_frames < head + tail + 1:
        raise OpenSoraError(
            f"With {cond_type} the pictures given leave no frame of this clip to make ({head + tail} of {latent_frames} latent frames); "
            f"use at least {(head + tail) * 4 + 1} frames."
        )
    mask = torch.zeros(latent_frames)
    mask[:head] = 1
    mask[latent_frames - tail :] = 1
    return mask


def image_condition(latent_shape, head: Tensor | None = None, tail: Tensor | None = None) -> ImageCondition:
    """Lay reference latents into an otherwise empty clip.

    Args:
        latent_shape: [B, C, T, H, W] of the clip.
        head, tail: [B or 1, C, t, H, W] latents (transformer's scale) of its first and last frames.

    Raises:
        OpenSoraError: a reference that does not match the clip.
    """
    batch, channels, frames, height, width = latent_shape
    like = head if head is not None else tail
    if like is None:
        raise OpenSoraError("Image to video needs a first or a last frame; none was given.")
    mask = like.new_zeros(batch, 1, frames, height, width)
    latents = like.new_zeros(batch, channels, frames, height, width)
    for name, reference in (("first", head), ("last", tail)):
        if reference is None:
            continue
        if reference.ndim != 5 or reference.shape[1] != channels or reference.shape[-2:] != (height, width):
            raise OpenSoraError(
                f"The {name}-frame latent is {list(reference.shape)}, the clip {list(latent_shape)}; channels, height and width must agree."
            )
        if reference.shape[0] not in (1, batch):
            raise OpenSoraError(f"{reference.shape[0]} {name} frames for a batch of {batch} videos; give 1 or {batch}.")
        if reference.shape[2] >= frames:
            raise OpenSoraError(f"The {name} {reference.shape[2]} latent frame(s) fill a clip of {frames}; use a longer clip.")
        where = slice(0, reference.shape[2]) if name == "first" else slice(frames - reference.shape[2], frames)
        mask[:, :, where] = 1
        latents[:, :, where] = reference
    return ImageCondition(mask, latents)


def restore(latents: Tensor, condition: ImageCondition | None) -> Tensor:
    """Put the given latent frames back, in every batch item, after the last step."""
    if condition is None:
        return latents
    return torch.where(condition.mask.bool().to(latents.device), condition.latents.to(latents), latents)


def fit_image(frames: Tensor, height: int, width: int, fit: str = "crop") -> Tensor:
    """Bring pictures to the video's size.

    Args:
        frames: [T, H, W, 3] float in 0..1.
        fit: crop (scale to cover, cut the middle: the reference's rule, bicubic on 8-bit RGB through PIL, exactly),
            pad (scale to fit, black borders) or stretch.

    Returns:
        [T, height, width, 3] fp32 in 0..1 on the CPU, in steps of 1/255.
    Source: hpcaitech/Open-Sora@7ad6a96a opensora/datasets/utils.py, resize_crop_to_fill.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise OpenSoraError(f"An image batch is [frames, height, width, 3]; this one is {list(frames.shape)}.")
    if fit not in FITS:
        raise OpenSoraError(f"fit={fit!r} is not known; use one of {', '.join(FITS)}.")
    return torch.stack([_fit_one(frame, height, width, fit) for frame in frames])


def _fit_one(frame: Tensor, height: int, width: int, fit: str) -> Tensor:
    source = tuple(frame.shape[:2])
    if fit == "crop":
        scaled = resize_crop(source, (height, width))
        resized = _resize(frame, scaled.height, scaled.width)
        return resized[scaled.top : scaled.top + height, scaled.left : scaled.left + width]
    if fit == "stretch":
        return _resize(frame, height, width)
    ratio = min(height / source[0], width / source[1])
    inner_h, inner_w = (max(1, min(side, round(length * ratio))) for side, length in zip((height, width), source, strict=True))
    top, left = (height - inner_h) // 2, (width - inner_w) // 2
    return F.pad(_resize(frame, inner_h, inner_w), (0, 0, left, width - inner_w - left, top, height - inner_h - top))


def _resize(frame: Tensor, height: int, width: int) -> Tensor:
    import numpy
    from PIL import Image

    pixels = (frame.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(numpy.array(resized)).float() / 255
