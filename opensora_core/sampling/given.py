"""What a video begins from: which latent frames are given, their latents, and how pictures and clips are fitted.

`Beside` is how they enter a run of Open-Sora 2.0: not held during sampling, but read by the network beside the noise (`cond_in`); pictures
replace the result once at the end, a clip's frames are made again with the rest (guidance.ReferenceUse).

Latents of any length can be given: `image_condition(shape, head=latents)` for the first latent frames of a clip,
`tail=` for the last ones, with `use=ReferenceUse(is_clip=True)` where they are a clip's. Latents that an earlier run made
go in as they are, with no trip through pixels:

    before = result.latents                       # [B, C, T, H, W], the transformer's scale
    image_condition(before.shape, head=before[:, :, -9:], use=ReferenceUse(is_clip=True))

The pipeline does the same: `pipe(prompt, video=before, context=33)`, where 33 frames are nine latent ones.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..choices import CROP, DIRECTIONS, FITS, FORWARDS
from ..errors import OpenSoraError, check_choice
from ..geometry import CAUSAL, Grid, resize_crop
from .guidance import PICTURES, ReferenceUse
from .schedule import Process, Schedule

CONTEXTS = (33, 65)  # frames of a clip that a video is made to go on from


@dataclass(frozen=True)
class ImageCondition:
    """Given latent frames.

    mask: [B, 1, T, H, W], 1 where a latent frame is given. use: how a run uses them.
    latents: [B, C, T, H, W] in the transformer's scale (LATENT_SCALE times the VAE's), zero elsewhere.
    edit: [B, T], how far each frame may be edited, 0 (kept) to 1 (made), for models that hold frames by degrees and are asked to;
    None = 0 where a frame is given, 1 elsewhere.
    """

    mask: Tensor
    latents: Tensor
    use: ReferenceUse = PICTURES
    edit: Tensor | None = None

    def packed_input(self) -> Tensor:
        """What `cond_in` reads, before packing: [B, C + 1, T, H, W], mask first."""
        return torch.cat((self.mask, self.mask * self.latents), dim=1)


class Given:
    """How what is given enters a run: here not at all. A family whose frames enter otherwise overrides what it needs (run.py calls it).

    use: how the run uses it; None where nothing is given. cond: what the network reads beside the noise, if it reads anything.
    edit: [B, T], how far each frame may be edited, if the network reads that.
    draw: (latents) -> noise of their shape, for those that noise what is given; a run sets it.
    is_read: (step) -> whether the network reads what is given at a step; a run sets it.
    """

    use: ReferenceUse | None = None
    cond: Tensor | None = None
    edit: Tensor | None = None
    draw: Callable[[Tensor], Tensor]
    is_read: Callable[[int], bool]

    @property
    def blank(self) -> "Given":
        """What enters the pass that is to know nothing of what is given."""
        return NOTHING

    def before(self, x: Tensor, step: int) -> Tensor:
        """The latents [B, C, T, H, W] that a step begins with."""
        return x

    def after(self, x: Tensor, step: int) -> Tensor:
        """The latents that a step ends with."""
        return x

    def finish(self, x: Tensor) -> Tensor:
        """The latents that the run ends with."""
        return x


NOTHING = Given()


class Beside(Given):
    """Given frames that the network reads beside the noise, and that replace the result's at the end where their use says so.

    x: the latents of the run. dtype: of the network.
    """

    def __init__(self, condition: ImageCondition, x: Tensor, schedule: Schedule, dtype: torch.dtype):
        self._condition, self.use = condition, condition.use
        self.cond = condition.packed_input().to(x.device, dtype)

    def finish(self, x: Tensor) -> Tensor:
        return put_back(x, self._condition.mask, self._condition.latents) if self.use.is_restored else x


class FirstFrame(Given):
    """A first picture that the network reads beside the noise, zeros in the other frames; nothing is put back at the end.

    x: the latents of the run, which may be longer than what the condition was laid out for. dtype: not made use of; `cond` is fp32.
    """

    def __init__(self, condition: ImageCondition, x: Tensor, schedule: Schedule, dtype: torch.dtype):
        self.use = condition.use
        behind = x.shape[2] - condition.latents.shape[2]
        self.cond = F.pad(condition.mask * condition.latents, (0, 0, 0, 0, 0, behind)).to(x.device, torch.float32)


class MadeOver(Given):
    """A whole clip that is made over: the run begins with it, under as much noise as there is at the first point of its schedule.

    process: of the model. x: noise; where it is longer than the clip, the clip's first frame stands before it too.
    """

    def __init__(self, process: Process, condition: ImageCondition, x: Tensor, schedule: Schedule, dtype: torch.dtype):
        clean = condition.latents.to(x)
        lead = x.shape[2] - clean.shape[2]
        clean = torch.cat((clean[:, :, :1].expand(-1, -1, lead, -1, -1), clean), dim=2)
        self._start = process.noised(clean, x, schedule.points[0].item())

    def before(self, x: Tensor, step: int) -> Tensor:
        return x if step else self._start


def put_back(x: Tensor, mask: Tensor, latents: Tensor) -> Tensor:
    """Latents [B, C, T, H, W] with the given ones where the mask [B, 1, T, H, W] is not 0, in every item of the batch."""
    return torch.where(mask.bool().to(x.device), latents.to(x), x)


def clip_cond_type(direction: str, context: int) -> str:
    """Upstream's name of a video-to-video mode: forwards is v2v_head, backwards v2v_tail, with 65 frames v2v_*_easy. Refuses what has no mode."""
    check_choice("direction", direction, DIRECTIONS)
    if context not in CONTEXTS:
        raise OpenSoraError(f"A clip is not gone on from by {context} of its frames; use {' or '.join(map(str, CONTEXTS))}.")
    return f"v2v_{'head' if direction == FORWARDS else 'tail'}{'_easy' if context == CONTEXTS[1] else ''}"


def check_clip_length(name: str, num_frames: int, context: int) -> None:
    """Raise an OpenSoraError, naming the input, unless a clip of so many frames has as many as the context takes."""
    if num_frames >= context:
        return
    advice = f"use context {CONTEXTS[0]}, or a longer clip" if context > CONTEXTS[0] <= num_frames else "use a longer clip"
    raise OpenSoraError(f"{name} has {num_frames} frame{'s' * (num_frames != 1)}; going on from it takes {context}: {advice}.")


def nearest_frames(frames, direction: str, count: int):
    """The `count` frames of a clip that the new video touches: its last ones forwards, its first ones backwards.

    frames: a sequence or a tensor, one frame for each entry of its first axis; at least `count` of them.
    """
    check_choice("direction", direction, DIRECTIONS)
    return frames[len(frames) - count :] if direction == FORWARDS else frames[:count]


def check_room(given: int, clip: int, what: str = "what is given", grid: Grid = CAUSAL) -> None:
    """Raise an OpenSoraError where `given` latent frames leave none of a video's `clip` to be made."""
    if given and clip <= given:
        raise OpenSoraError(
            f"A video of {grid.pixel_frames(clip)} frame{'s' * (clip != 1)} is all taken up by {what}; "
            f"use at least {grid.pixel_frames(given + 1)} frames."
        )


def image_condition(latent_shape, head: Tensor | None = None, tail: Tensor | None = None, use: ReferenceUse = PICTURES) -> ImageCondition:
    """Lay reference latents into an otherwise empty clip [B, C, T, H, W].

    head, tail: [B or 1, C, t, H, W] latents (transformer's scale) of its first and last frames, t of any length.
    use: how a run uses them; ReferenceUse(is_clip=True) for frames of a clip. Refuses a reference that does not match the clip.
    """
    batch, channels, frames, height, width = latent_shape
    like = head if head is not None else tail
    if like is None:
        raise OpenSoraError("Image to video needs a first or a last frame; give one.")
    mask = like.new_zeros(batch, 1, frames, height, width)
    latents = like.new_zeros(batch, channels, frames, height, width)
    given = sum(reference.shape[2] for reference in (head, tail) if reference is not None and reference.ndim == 5)
    if not use.is_whole:
        check_room(given, frames)
    for name, reference in (("first", head), ("last", tail)):
        if reference is None:
            continue
        if reference.ndim != 5 or reference.shape[1] != channels or reference.shape[-2:] != (height, width):
            raise OpenSoraError(
                f"The {name}-frame latent is {list(reference.shape)}, the clip {list(latent_shape)}; channels, height and width must agree."
            )
        if reference.shape[0] not in (1, batch):
            raise OpenSoraError(f"{reference.shape[0]} {name} frames for a batch of {batch} videos; give 1 or {batch}.")
        where = slice(0, reference.shape[2]) if name == "first" else slice(frames - reference.shape[2], frames)
        mask[:, :, where] = 1
        latents[:, :, where] = reference
    return ImageCondition(mask, latents, use)


def fit_image(frames: Tensor, height: int, width: int, fit: str = CROP) -> Tensor:
    """Bring pictures [T, H, W, 3], float in 0..1, to the video's size: fp32 in 0..1 on the CPU, in steps of 1/255.

    fit: crop (scale to cover, cut the middle: upstream's rule, bicubic on 8-bit RGB through PIL, exactly),
    pad (scale to fit, black borders) or stretch.
    Source: hpcaitech/Open-Sora@7ad6a96a opensora/datasets/utils.py, resize_crop_to_fill.
    """
    return _fitted(frames, (height, width), fit, _resize_picture)


def fit_clip(frames: Tensor, height: int, width: int, fit: str = CROP) -> Tensor:
    """Bring a clip [T, H, W, 3], uint8 or float in 0..1, to the video's size: fp32 in 0..1 on the CPU.

    As fit_image, but bilinear without antialiasing, and unrounded, as upstream does.
    Source: hpcaitech/Open-Sora@7ad6a96a opensora/datasets/video_transforms.py, resize_crop_to_fill.
    """
    return _fitted(frames, (height, width), fit, _resize_frame, down=True)


def _fitted(frames: Tensor, size: tuple[int, int], fit: str, resize: Callable[..., Tensor], down: bool = False) -> Tensor:
    """Frames [T, H, W, 3] at `size`. down: half a pixel too much on either side is cut by rounding down, not to even."""
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise OpenSoraError(f"An image batch is [frames, height, width, 3]; this one is {list(frames.shape)}.")
    check_choice("fit", fit, FITS)
    (height, width), source = size, tuple(frames.shape[1:3])
    if fit == CROP:
        scaled = resize_crop(source, size)
        top, left = ((scaled.height - height) // 2, (scaled.width - width) // 2) if down else (scaled.top, scaled.left)
        return torch.stack([resize(frame, scaled.height, scaled.width)[top : top + height, left : left + width] for frame in frames])
    if fit == "stretch":
        return torch.stack([resize(frame, height, width) for frame in frames])
    ratio = min(height / source[0], width / source[1])
    inner_h, inner_w = (max(1, min(side, round(length * ratio))) for side, length in zip(size, source, strict=True))
    top, left = (height - inner_h) // 2, (width - inner_w) // 2
    made = torch.stack([resize(frame, inner_h, inner_w) for frame in frames])
    return F.pad(made, (0, 0, left, width - inner_w - left, top, height - inner_h - top))


def _resize_frame(frame: Tensor, height: int, width: int) -> Tensor:
    values = frame.detach().cpu()
    values = values.float() / 255 if values.dtype == torch.uint8 else values.float().clamp(0, 1)
    pixels = values.permute(2, 0, 1).unsqueeze(0)
    return F.interpolate(pixels, size=(height, width), mode="bilinear", align_corners=False)[0].permute(1, 2, 0)


def _resize_picture(frame: Tensor, height: int, width: int) -> Tensor:
    import numpy
    from PIL import Image

    pixels = (frame.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(numpy.array(resized)).float() / 255
