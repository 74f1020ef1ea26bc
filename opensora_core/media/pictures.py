"""What a person gives a video to begin or end with: pictures, a clip or latents, read and checked before any weight is."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor

from ..choices import BACKWARDS, FORWARDS
from ..errors import OpenSoraError
from ..geometry import CAUSAL, LARGEST, Grid
from ..sampling.given import CONTEXTS, check_clip_length, check_room, clip_cond_type, nearest_frames
from ..sampling.guidance import PICTURES, ReferenceUse
from ..sampling.masks import MaskGroup, parse_mask_strategy
from .stills import read_image, rgb_array
from .video import is_video, read_clip

LATENT_RANK = 5  # [B, C, T, H, W]: what tells latents from pictures


@dataclass(frozen=True)
class References:
    """What is given, checked as far as it can be without the video that it is for.

    first, last: a picture [1, H, W, 3] fp32 in 0..1 of any size, or latents [B or 1, C, 1, h, w], or None.
    clip: frames [33 or 65, H, W, 3] uint8 or fp32 in 0..1, or latents [B or 1, C, t, h, w], or None.
    Latents are in the transformer's scale, as `.latents` of a result.
    direction: forwards: the clip begins the video; backwards: it ends it. use: how a run uses them.
    several, groups: of a mask strategy (sampling/masks.py), whose references are frames [t, H, W, 3] each; loop: which clip of a longer video it is.
    """

    first: Tensor | None = None
    last: Tensor | None = None
    clip: Tensor | None = None
    direction: str = FORWARDS
    use: ReferenceUse = PICTURES
    several: tuple[Tensor, ...] = ()
    groups: tuple[MaskGroup, ...] = ()
    loop: int = 0

    @property
    def given(self) -> dict[str, Tensor]:
        """What is given, by the name of the argument that it came with."""
        named = {"image": self.first, "last_image": self.last, "video": self.clip}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def ends(self) -> tuple[Tensor | None, Tensor | None]:
        """What begins the video, and what ends it."""
        if self.clip is None:
            return self.first, self.last
        return (self.clip, self.last) if self.direction == FORWARDS else (self.first, self.clip)

    def check(self, num_videos: int, latent_extent: tuple[int, int, int], grid: Grid = CAUSAL) -> None:
        """Raise an OpenSoraError unless they fit so many videos of latent (T, H, W) and leave a frame to make."""
        if self.clip is not None and not self.use.is_whole:
            grid.check_goes_on("; give a picture, or use the Open-Sora 2.0 transformer")
        for name, tensor in self.given.items():
            if tensor.ndim == LATENT_RANK and tuple(tensor.shape[3:]) != latent_extent[1:]:
                found, wanted = (" x ".join(str(grid.space * side) for side in size) for size in (tensor.shape[3:], latent_extent[1:]))
                what = f"The latents of {name} are of {found} pixels (height x width), the video is {wanted}"
                raise OpenSoraError(f"{what}; make them of one size.")
            if tensor.ndim == LATENT_RANK and tensor.shape[0] not in (1, num_videos):
                what = f"{name} holds the latents of {len(tensor)} videos for a batch of {num_videos}"
                raise OpenSoraError(f"{what}; give 1 or {num_videos}.")
        if self.use.is_whole:
            return
        what = "the frames of the clip" if self.clip is not None else f"the picture{'s' * (len(self.given) > 1)} given"
        lengths = [one.shape[2] if one.ndim == LATENT_RANK else grid.latent_frames(len(one)) for one in self.given.values()]
        check_room(sum(lengths), latent_extent[0], what, grid)

    def check_channels(self, channels: int) -> None:
        """Raise an OpenSoraError unless latents given have as many channels as the model's."""
        for name, tensor in self.given.items():
            if tensor.ndim == LATENT_RANK and tensor.shape[1] != channels:
                what = f"The latents of {name} have {tensor.shape[1]} channels, this model's have {channels}"
                raise OpenSoraError(f"{what}; make them with this model's VAE.")


def read_references(
    image=None,
    last_image=None,
    video=None,
    *,
    direction: str = FORWARDS,
    context: int = CONTEXTS[0],
    strength: float = 1.0,
    whole: int = 0,
    grid: Grid = CAUSAL,
) -> References:
    """Read what is given. Raises an OpenSoraError for what is none of these, a clip shorter than the context, or settings for nothing.

    Args:
        image, last_image: the first and the last frame: a path, a PIL image, [H, W, 3] uint8 or float in 0..1, or one frame's
            latents [B or 1, C, 1, h, w].
        video: the clip to go on from: a path, [T, H, W, 3] uint8 or float in 0..1, a sequence of [H, W, 3] frames or PIL images, or
            latents [B or 1, C, t, h, w]. It is given alone.
        direction: forwards: the video begins with the clip's last frames; backwards: it ends with the clip's first ones.
        context: how many frames of the clip: 33, or 65 (v2v_*_easy); of latents any 4k+1, such as 5 for two latent frames.
        strength: see guidance.ReferenceUse.
        grid: of the model; of a clip as many frames are taken as it can have that are nearest to the context.
        whole: frames of a clip that is made over: its first ones, whatever direction and context say; 0 = a clip is gone on from.
    """
    use = ReferenceUse(is_clip=video is not None, strength=strength, is_whole=bool(whole and video is not None))
    first, last = reference_image("image", image), reference_image("last_image", last_image)
    if video is None:
        if direction != FORWARDS:
            raise OpenSoraError(f"direction={direction!r} needs a video to go on from; give one.")
        if first is None and last is None and strength != 1:
            raise OpenSoraError(f"strength={strength} needs something to hold to; give an image, a last image or a video.")
        return References(first, last, use=use)
    if first is not None or last is not None:
        raise OpenSoraError("A video to go on from is given alone; leave out image and last_image, or the video.")
    if not whole and getattr(video, "ndim", 0) != LATENT_RANK:
        clip_cond_type(direction, context)  # raises for what has no mode
        context = grid.frames.nearest(context)
    clip = _reference_clip(video, BACKWARDS if whole else direction, whole or context, grid)
    return References(clip=clip, direction=FORWARDS if whole else direction, use=use)


def reference_image(name: str, image) -> Tensor | None:
    """A reference picture as [1, H, W, 3] fp32 in 0..1 on the CPU; latents [B or 1, C, 1, h, w] as they are.

    name: for messages. image: None, a path, a PIL image, a tensor or array [H, W, 3] or [1, H, W, 3], uint8 or float in 0..1, or latents.
    """
    if image is None:
        return None
    if isinstance(image, (str, Path)):
        if is_video(image):
            raise OpenSoraError(f"{image} is a video where a picture is wanted ({name}); give it as the video, to go on from a clip.")
        return read_image(image)
    if hasattr(image, "convert"):  # a PIL image, without importing PIL to ask
        image = rgb_array(image, name)
    if not isinstance(image, (Tensor, numpy.ndarray)):
        raise OpenSoraError(f"{name} is a path, a PIL image, an array or a tensor; this is a {type(image).__name__}.")
    image = torch.tensor(image) if isinstance(image, numpy.ndarray) else image.detach().cpu()
    if image.ndim == LATENT_RANK:
        return _latents(name, image, 1)
    if image.ndim == 3:
        image = image.unsqueeze(0)
    if image.ndim == 4 and image.shape[-1] == 4:
        raise OpenSoraError(f"{name} has an alpha channel; give its three colours, on a background of your choice.")
    if image.ndim != 4 or image.shape[0] != 1 or image.shape[-1] != 3 or 0 in image.shape:
        raise OpenSoraError(f"{name} is one picture, [height, width, 3] or [1, height, width, 3]; this one is {list(image.shape)}.")
    _check_values(name, image)
    return image.float() / 255 if image.dtype == torch.uint8 else image.float()


def _reference_clip(video, direction: str, context: int, grid: Grid) -> Tensor:
    """The part of a clip that the new video touches, as References.clip."""
    if isinstance(video, (Tensor, numpy.ndarray)) and video.ndim == LATENT_RANK:
        latents = _latents("video", torch.as_tensor(video).detach().cpu(), grid.latent_frames(context))
        return nearest_frames(latents.transpose(0, 2), direction, grid.latent_frames(context)).transpose(0, 2)
    if isinstance(video, (str, Path)):
        frames = read_clip(video, context, from_end=direction == FORWARDS)
        check_clip_length(f"The clip {video}", len(frames), context)
        return frames
    if isinstance(video, Sequence) and len(video):
        check_clip_length("video", len(video), context)
        frames = nearest_frames(video, direction, context)
        video = [rgb_array(frame, "A frame of video") if hasattr(frame, "convert") else frame for frame in frames]
        shapes = {tuple(getattr(frame, "shape", ())) for frame in video}
        if len(shapes) > 1:
            found = ", ".join(map(str, sorted(shapes)[:3]))
            raise OpenSoraError(f"The frames of video are of different sizes ({found}); scale them to one.")
        video = torch.stack([torch.tensor(frame) if isinstance(frame, numpy.ndarray) else torch.as_tensor(frame) for frame in video])
    if not isinstance(video, (Tensor, numpy.ndarray)):
        raise OpenSoraError(f"video is a path, frames or latents; this is a {type(video).__name__}.")
    video = torch.as_tensor(video).detach()
    if video.ndim != 4 or video.shape[-1] != 3 or 0 in video.shape:
        raise OpenSoraError(f"video is a clip, [frames, height, width, 3]; this one is {list(video.shape)}.")
    check_clip_length("video", len(video), context)
    frames = nearest_frames(video, direction, context).cpu()
    _check_values("video", frames)
    return frames


def _latents(name: str, latents: Tensor, at_least: int) -> Tensor:
    """Latents as they are, once they are seen to be that; a picture's are of one frame."""
    count, what = latents.shape[2], f"The latents of {name} hold {latents.shape[2]} latent frames"
    if 0 in latents.shape or not latents.is_floating_point() or not torch.isfinite(latents).all():
        what = f"The latents of {name} are {list(latents.shape)} {latents.dtype}"
        raise OpenSoraError(f"{what}; give finite numbers [videos, channels, frames, height, width].")
    if name != "video" and count != 1:
        raise OpenSoraError(f"{what}, a picture's one; give it as the video, to go on from a clip.")
    if count < at_least:
        raise OpenSoraError(f"{what}; context {4 * at_least - 3} takes {at_least}: use a smaller context.")
    return latents.float()


def _check_values(name: str, image: Tensor) -> None:
    if image.dtype == torch.uint8:
        return
    if not image.is_floating_point() or not torch.isfinite(image).all() or image.min() < 0 or image.max() > 1:
        raise OpenSoraError(f"{name} holds uint8, or floats from 0 to 1; this one is {image.dtype} with values outside that.")


def read_masked(references: Sequence, mask_strategy: str, grid: Grid) -> References:
    """What a mask strategy gives. Without one, the first frame of the first reference begins the video."""
    groups = tuple(parse_mask_strategy(mask_strategy or "0"))
    missing = [group.reference for group in groups if group.reference >= len(references)]
    if missing:
        what = f"mask_strategy names reference {missing[0]}; {len(references)} are given, counted from 0"
        raise OpenSoraError(f"Add one, or name another. {what}.")
    several = tuple(read_reference(place, given, grid) for place, given in enumerate(references))
    return References(use=ReferenceUse(is_held=True), several=several, groups=groups)


def read_reference(place: int, given, grid: Grid) -> Tensor:
    """One reference of a mask strategy as frames [t, H, W, 3], uint8 or fp32 in 0..1; a clip is cut to the longest count that clips can have.

    place: from 0, for messages. given: as an image or a video of read_references.
    """
    name = f"Reference {place}"
    if isinstance(given, (str, Path)) and not is_video(given):
        try:
            return read_image(given)
        except OpenSoraError as error:
            raise OpenSoraError(f"{name}: {error}") from error
    if not isinstance(given, (str, Path, Sequence)) and (hasattr(given, "convert") or getattr(given, "ndim", 0) == 3):
        return reference_image(name, given)
    frames = read_clip(given, LARGEST["num_frames"], from_end=False) if isinstance(given, (str, Path)) else torch.as_tensor(given)
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise OpenSoraError(f"{name} is neither a picture nor a clip, [frames, height, width, 3]: it is {list(frames.shape)}.")
    _check_values(name, frames)
    count = len(frames)
    while count > 1 and grid.frames.nearest(count) != count:
        count -= 1
    return frames[:count] if frames.dtype == torch.uint8 or count > 1 else frames[:count].float()
