"""Plain computer vision on one clip of the world: which object it shows, on what, where it goes, and whether it stays one object.

The background is the clip's median colour. What stands out from it is split into connected parts, the largest of which is the
object. Circles, squares and triangles are fitted to the object in every frame (centre and radius, by Gauss-Newton); the shape that
leaves least unexplained in the clip is its shape, and the fitted centres are its path. Pixels outside the frame do not exist for
the fit, so that an object partly outside is read as well as one in the middle.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import OpenSoraError
from .world import BACKGROUNDS, COLOURS, DIRECTIONS, PIXELS_PER_SCORE, SHAPES, TAUGHT, signed_distance

# Limits of what counts. Colours are RGB in 0..1, distances Euclidean; lengths are pixels.
COLOUR_LIMIT = 100 / 255  # a colour farther than this from every named one has no name
LEAST_CONTRAST = 30 / 255  # between object and background, to see an object at all
LEAST_AREA = 60  # pixels of an object that are in the frame; a whole one has 220 or more
SECOND_OBJECT = 0.12  # share of the object's area from which another part counts as a second object
LEAST_OVERLAP = 0.72  # intersection over union of object and fitted shape, mean of the clip, to name a shape
LEAST_FRAME_OVERLAP = 0.6  # the same in each frame of a steady clip
SAME_SHAPE = 0.85  # share of frames that alone show the clip's shape, in a steady clip
SIZE_CHANGE = 0.2  # how far a frame's radius may be off the clip's median, as a share of it
STRAIGHT = 2.0  # how far an object may be off its path at constant speed
STEP_CHANGE = 1.0  # how far a step between two frames may be off the mean step
LEAST_TRAVEL = 2.0  # distance from first to last frame, to have a direction
ASIDE = math.tan(math.radians(30))  # sideways motion as a share of motion along the axis; more is no direction of the world

_SOFTNESS = 0.7  # pixels: the fitted outline is sigmoid(-distance / softness), about the world's edge after a VAE's blur
_FIT_STEPS = 8
_CLOSE_ENOUGH = 0.01  # pixels
_NUDGE = 0.25  # pixels, of the fit's finite differences
_AREA_OF_RADIUS = {"circle": math.pi, "square": 3.24, "triangle": 2.2}  # area = this * radius ** 2


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a clip shows. None where nothing of the world is to be seen.

    colour, shape, background, direction: names as in world.py. speed: pixels per frame along the path.
    faults: why the clip is not one steady object, in words; empty if it is.
    object_rgb, background_rgb: measured, 0..1; object_rgb is None where no object is found.
    centres: (row, column) of the object in each frame, pixels; None where it is not found. radius: the object's, as world.Scene has it; 0 if there
    is none. overlap: of object and fitted shape, 0..1.
    """

    background: str | None
    background_rgb: tuple[float, ...]
    faults: tuple[str, ...]
    centres: tuple[tuple[float, float] | None, ...]
    colour: str | None = None
    shape: str | None = None
    direction: str | None = None
    speed: float = 0.0
    object_rgb: tuple[float, ...] | None = None
    radius: float = 0.0
    overlap: float = 0.0

    @property
    def is_steady(self) -> bool:
        """One object in every frame, of one colour, shape and size, on a smooth path."""
        return not self.faults

    @property
    def motion_score(self) -> float:
        return self.speed / PIXELS_PER_SCORE


class _Found(NamedTuple):
    """The object, frame by frame: visible [T] bool, mask [T, H, W] bool, colours [T, 3] (the median of its inner pixels), second [T] bool (another is there)."""

    visible: Tensor
    mask: Tensor
    colours: Tensor
    second: Tensor


class _Fit(NamedTuple):
    """Shapes fitted to the visible frames: [shapes, frames] each, centres [shapes, frames, 2]."""

    centres: Tensor
    radii: Tensor
    unexplained: Tensor
    overlap: Tensor


@torch.inference_mode()
def read(frames, taught: str = "") -> Reading:
    """Read one clip: [T, H, W, 3] with T of at least 2, uint8 or float in 0..1, a tensor, an array or a sequence of frames.

    taught: a colour of world.TAUGHT that the object may have besides those that the model knows.
    """
    clip, colours = as_clip(frames), COLOURS | ({taught: TAUGHT[taught]} if taught else {})
    background = clip.reshape(-1, 3).median(dim=0).values
    found = _find(clip, background)
    changes = (clip.flatten(1, 2).median(dim=1).values - background).norm(dim=1) > COLOUR_LIMIT / 2
    faults = ["the background changes"] if changes.any() else []
    nothing = {"background": name_of(background, BACKGROUNDS), "background_rgb": tuple(background.tolist())}
    if found.visible.sum() < 2:
        return Reading(faults=("no object", *faults), centres=(None,) * len(clip), **nothing)
    fit = _fit(clip, background, found)
    best = int(fit.unexplained.sum(dim=1).argmin())
    overlap = fit.overlap[best].mean().item()
    rgb = found.colours[found.visible].median(dim=0).values
    times = found.visible.nonzero()[:, 0].float()
    velocity, residuals = _line(times, fit.centres[best])
    places = iter(fit.centres[best].tolist())
    return Reading(
        colour=name_of(rgb, colours),
        shape=SHAPES[best] if overlap >= LEAST_OVERLAP else None,
        direction=_direction(velocity, len(clip)),
        speed=velocity.norm().item(),
        faults=(*_faults(found, fit, best, colours, (times, velocity, residuals)), *faults),
        object_rgb=tuple(rgb.tolist()),
        centres=tuple(tuple(next(places)) if seen else None for seen in found.visible.tolist()),
        radius=fit.radii[best].median().item(),
        overlap=overlap,
        **nothing,
    )


def as_clip(frames) -> Tensor:
    """A clip as [T, H, W, 3] fp32 in 0..1 on the CPU; see read()."""
    if isinstance(frames, (list, tuple)) and frames:
        frames = torch.stack([torch.as_tensor(frame) for frame in frames])
    clip = torch.as_tensor(frames).detach().cpu()
    if clip.ndim != 4 or clip.shape[-1] != 3 or len(clip) < 2 or 0 in clip.shape:
        raise OpenSoraError(f"A clip to read is [frames, height, width, 3] with two frames or more; this one is {list(clip.shape)}.")
    clip = clip.float() / 255 if clip.dtype == torch.uint8 else clip.float()
    if not torch.isfinite(clip).all():
        raise OpenSoraError("The clip holds values that are not numbers (NaN or infinite).")
    return clip.clamp(0, 1)


def name_of(rgb, palette: dict[str, tuple[int, int, int]]) -> str | None:
    """The name in `palette` (RGB of 0..255) that is nearest to a colour of 0..1; None if none is near."""
    rgb = torch.as_tensor(rgb, dtype=torch.float32)
    distances = {name: (rgb - torch.tensor(entry) / 255).norm().item() for name, entry in palette.items()}
    nearest = min(distances, key=distances.__getitem__)
    return nearest if distances[nearest] <= COLOUR_LIMIT else None


def _find(clip: Tensor, background: Tensor) -> _Found:
    # Averaged over 3x3: noise of single pixels makes no parts, and outlines stay where they are.
    smooth = F.avg_pool2d(clip.permute(0, 3, 1, 2).contiguous(), 3, stride=1, padding=1, count_include_pad=False)
    difference = (smooth - background[:, None, None]).square().sum(dim=1).sqrt()
    strongest = difference.flatten(1).topk(min(LEAST_AREA, difference[0].numel()), dim=1).values
    contrast = strongest.median(dim=1).values.median()
    parts, areas = _parts(difference > max(0.5 * contrast.item(), LEAST_CONTRAST / 2))
    area, largest = areas.max(dim=1)
    visible = (area >= LEAST_AREA) & (contrast >= LEAST_CONTRAST)
    mask = parts == largest[:, None, None]
    others = areas.scatter(1, largest[:, None], 0).max(dim=1).values
    second = others > SECOND_OBJECT * area
    # Inner pixels are two from the outline.
    inner = -F.max_pool2d(-F.pad(mask.float(), (2, 2, 2, 2), value=1.0), 5, stride=1) > 0
    chosen = [frame[part if part.sum() >= 10 else whole] for frame, whole, part in zip(clip, mask, inner, strict=True)]
    colours = torch.stack([pixels.median(dim=0).values if len(pixels) else clip.new_zeros(3) for pixels in chosen])
    return _Found(visible, mask & visible[:, None, None], colours, second)


def _parts(foreground: Tensor) -> tuple[Tensor, Tensor]:
    """Connected parts (8 neighbours) of [T, H, W]: labels [T, H, W], 0 for background, and [T, labels] areas (0 for background)."""
    frames, height, width = foreground.shape
    own = torch.arange(1, height * width + 1, dtype=torch.float32).view(1, height, width)
    labels = own * foreground
    while True:
        spread = F.max_pool2d(labels, 3, stride=1, padding=1) * foreground
        if torch.equal(spread, labels):
            break
        # A label names a pixel; what that pixel is labelled by now is as connected, and saves most of the steps.
        flat = spread.flatten(1)
        labels = F.pad(flat, (1, 0)).gather(1, flat.long()).view_as(spread)
    labels = labels.long()
    areas = torch.zeros(frames, height * width + 1, dtype=torch.long)
    areas.scatter_add_(1, labels.flatten(1), torch.ones_like(labels).flatten(1))
    areas[:, 0] = 0
    return labels, areas


def _fit(clip: Tensor, background: Tensor, found: _Found) -> _Fit:
    colours = found.colours[found.visible]
    toward = colours - background
    opacity = ((clip[found.visible] - background) * toward[:, None, None]).sum(-1) / toward.square().sum(-1)[:, None, None]
    mask = found.mask[found.visible]
    near = F.max_pool2d(F.max_pool2d(mask.float(), (9, 1), stride=1, padding=(4, 0)), (1, 9), stride=1, padding=(0, 4))
    opacity = opacity.clamp(0, 1) * near  # what lies farther off is another object, counted elsewhere
    # Where no frame has anything near, there is nothing to fit; less than half of the picture is left of most clips.
    places = (near.amax(dim=axes).nonzero()[:, 0].tolist() for axes in ((0, 2), (0, 1)))
    rows, columns = (slice(each[0], each[-1] + 1) for each in places)
    window = slice(None), rows, columns
    origin = torch.tensor([rows.start, columns.start, 0.0])
    fits = [_fit_shape(shape, opacity[window], mask[window], origin) for shape in SHAPES]
    return _Fit(*(torch.stack(parts) for parts in zip(*fits, strict=True)))


def _fit_shape(shape: str, opacity: Tensor, mask: Tensor, origin: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(centres [T, 2], radii [T], unexplained [T], overlap [T]) of one shape in the frames of `opacity` [T, H, W].

    origin: (row, column, 0) of the first pixel in the whole picture.
    """
    frames, height, width = mask.shape
    rows, columns = (torch.arange(side, dtype=torch.float32) + 0.5 for side in (height, width))
    area = mask.sum(dim=(1, 2)).float()
    start = [(mask * rows[:, None]).sum(dim=(1, 2)) / area, (mask * columns).sum(dim=(1, 2)) / area]
    found = torch.stack([*start, (area / _AREA_OF_RADIUS[shape]).sqrt()], dim=1)  # [T, 3]: row, column, radius

    def drawn(at: Tensor) -> Tensor:
        at = at[:, :, None, None]
        return torch.sigmoid(-signed_distance(shape, rows[:, None] - at[:, 0], columns - at[:, 1], at[:, 2]) / _SOFTNESS)

    damping = torch.eye(3) * 1e-2
    for _ in range(_FIT_STEPS):
        now = drawn(found)
        slopes = torch.stack([drawn(found + _NUDGE * axis) - now for axis in torch.eye(3)], dim=1).flatten(2) / _NUDGE
        gradient = (slopes @ (opacity - now).flatten(1)[:, :, None])[:, :, 0]
        step = torch.linalg.solve(slopes @ slopes.transpose(1, 2) + damping, gradient)
        found = found + step.clamp(-3, 3)
        found[:, 2].clamp_(2, max(height, width))
        if step.abs().max() < _CLOSE_ENOUGH:
            break
    fitted = drawn(found)
    solid = fitted > 0.5
    overlap = (mask & solid).sum(dim=(1, 2)) / (mask | solid).sum(dim=(1, 2)).clamp(min=1)
    found = found + origin
    return found[:, :2], found[:, 2], (opacity - fitted).square().sum(dim=(1, 2)), overlap


def _line(times: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares: velocity (row, column) in pixels per frame, and distances [T] from the path at constant speed."""
    offsets, places = times - times.mean(), centres - centres.mean(dim=0)
    velocity = (offsets[:, None] * places).sum(dim=0) / offsets.square().sum()
    return velocity, (places - offsets[:, None] * velocity).norm(dim=1)


def _direction(velocity: Tensor, num_frames: int) -> str | None:
    if velocity.norm() * (num_frames - 1) < LEAST_TRAVEL:
        return None
    along = {name: (velocity * torch.tensor(step)).sum() for name, step in DIRECTIONS.items()}
    name = max(along, key=along.__getitem__)
    return name if velocity.abs().sum() - along[name] <= ASIDE * along[name] else None


def _faults(
    found: _Found, fit: _Fit, best: int, colours: dict[str, tuple[int, int, int]], path: tuple[Tensor, Tensor, Tensor]
) -> list[str]:
    """path: times [T] of the visible frames, velocity [2] and residuals [T], as _line gives them."""
    times, velocity, residuals = path
    names = {name_of(rgb, colours) for rgb in found.colours[found.visible]}
    radii = fit.radii[best]
    same = (fit.unexplained.argmin(dim=0) == best).float().mean()
    steps = fit.centres[best].diff(dim=0) / times.diff()[:, None]
    jumps = (steps - velocity).norm(dim=1).max() > STEP_CHANGE
    faults = {
        f"no object in {int((~found.visible).sum())} frames": not found.visible.all(),
        f"a second object in {int(found.second.sum())} frames": found.second.any(),
        "the colour changes": len(names) > 1,
        "the size changes": (radii / radii.median() - 1).abs().max() > SIZE_CHANGE,
        "the shape changes": same < SAME_SHAPE,
        "no clear shape": same >= SAME_SHAPE and fit.overlap[best].min() < LEAST_FRAME_OVERLAP,
        "it jumps": jumps or residuals.max() > STRAIGHT,
    }
    return [fault for fault, is_there in faults.items() if is_there]
