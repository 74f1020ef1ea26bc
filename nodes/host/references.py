"""What nodes are given to begin or end a video with, as IMAGE, VIDEO or LATENT: checked by name before anything is encoded."""

from collections.abc import Callable

import torch
from comfy_api.latest import Input, InputImpl
from torch import Tensor

from ...opensora_core import geometry
from ...opensora_core.choices import FORWARDS
from ...opensora_core.errors import OpenSoraError
from ...opensora_core.sampling.given import check_clip_length, nearest_frames

FPS = 24.0  # what the model was trained to show
_MARGIN_SECONDS = 1.0  # read besides the frames that are wanted: a file's rate is an average


def check_pictures(name: str, image: Tensor, videos: int) -> Tensor:
    """An IMAGE that gives every video of a batch its picture, as it is.

    image: [1 or videos, H, W, 3].
    Raises OpenSoraError: another rank, an alpha channel, nothing in it, values that are not numbers, or more pictures than are meant.
    """
    _check_image(name, image)
    if image.shape[0] not in (1, videos):
        if videos == 1:
            raise OpenSoraError(
                f"{name} holds {image.shape[0]} pictures for one video; give one (ImageFromBatch picks it), or go on from a clip with "
                "Open-Sora Video to Video."
            )
        raise OpenSoraError(f"{name} holds {image.shape[0]} pictures for a batch of {videos} videos; give 1 or {videos}.")
    _check_finite(name, image)
    return image


def check_latents(
    name: str, latent: dict, clip_shape: tuple[int, ...], frames: int | None = None, grid: geometry.Grid = geometry.CAUSAL
) -> Tensor:
    """A LATENT's samples [B or 1, C, t, h, w], if they can stand beside a clip of [B, C, T, H, W]; frames: how many they must be.

    Raises OpenSoraError: another rank, other channels, size, number of videos or of frames, or values that are not numbers.
    """
    samples = latent["samples"]
    shape = () if getattr(samples, "is_nested", False) else tuple(samples.shape)
    if len(shape) != 5 or 0 in shape:
        kind = "of a picture model, whose latents are others" if len(shape) == 4 else "no clip's"
        raise OpenSoraError(f"{name} is {list(shape)}, {kind}; encode the picture with Open-Sora Tiled VAE Encode.")
    if shape[1] != clip_shape[1]:
        raise OpenSoraError(f"{name} has {shape[1]} latent channels and the clip {clip_shape[1]}; encode it with the clip's VAE.")
    if shape[3:] != clip_shape[3:]:
        found, wanted = (f"{size[0] * grid.space}x{size[1] * grid.space}" for size in (shape[3:], clip_shape[3:]))
        raise OpenSoraError(
            f"{name} is of {found} pixels (height x width) and the clip {wanted}, and latents are not scaled; make them of one size."
        )
    if shape[0] not in (1, clip_shape[0]):
        raise OpenSoraError(f"{name} holds {shape[0]} videos for a batch of {clip_shape[0]}; give 1 or {clip_shape[0]}.")
    if frames is not None and shape[2] != frames:
        raise OpenSoraError(f"{name} holds {shape[2]} latent frames, a picture is one; use Open-Sora Video to Video to go on from a clip.")
    _check_finite(name, samples)
    return samples


def clip_frames(name: str, video, direction: str, context: int, report: Callable[[str], None]) -> Tensor:
    """The frames of a clip that the new video touches.

    video: IMAGE [T, H, W, 3] in 0..1, or the host's VIDEO, of whose file no more is read than is wanted. report: takes a line for people if
    a VIDEO plays at another rate than the model's.
    Returns [context, H, W, 3]. Raises OpenSoraError: a clip that is too short, or no clip.
    """
    if isinstance(video, Input.Video):
        rate = float(video.get_frame_rate())
        frames = _part_of_file(video, direction, context, rate)
        if abs(rate - FPS) > 0.5:
            report(
                f"{name} plays at {rate:.4g} FPS; its frames are taken as they are, one for each of the new video, which is meant for {FPS:.0f}."
            )
    else:
        frames = video
    _check_image(name, frames)
    check_clip_length(name, len(frames), context)
    frames = nearest_frames(frames, direction, context)
    _check_finite(name, frames)
    return frames


def _part_of_file(video, direction: str, context: int, rate: float) -> Tensor:
    """Frames of a VIDEO with at least the wanted ones at the wanted end, where it has as many."""
    # A VIDEO of frames would be encoded to be cut; one that is cut already would lose its end.
    if isinstance(video, InputImpl.VideoFromFile) and video.get_active_trim_window() == (0.0, 0.0) and rate > 0:
        wanted, length = context / rate + _MARGIN_SECONDS, video.get_duration()
        if wanted < length:
            window = {"start_time": length - wanted} if direction == FORWARDS else {"duration": wanted}
            part = video.as_trimmed(**window, strict_duration=False).get_components().images
            if len(part) >= context:
                return part
    return video.get_components().images


def _check_image(name: str, image) -> None:
    if not isinstance(image, Tensor) or image.ndim != 4 or 0 in image.shape or image.shape[-1] not in (3, 4):
        found = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise OpenSoraError(f"Give an IMAGE [pictures, height, width, 3], with at least one picture: {name} is {found}.")
    if image.shape[-1] == 4:
        raise OpenSoraError(
            f"{name} has an alpha channel, which is no part of a video: {list(image.shape)}; take its colours with Split Image with Alpha, "
            "and lay them on a background with ImageCompositeMasked."
        )


def _check_finite(name: str, values: Tensor) -> None:
    if not torch.isfinite(values).all():
        raise OpenSoraError(f"{name} holds values that are not numbers (NaN or infinite); look at what made it.")
