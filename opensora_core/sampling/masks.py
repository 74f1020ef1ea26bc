"""Which frames of Open-Sora 1.1 to 1.3 are given, half given or made: the published mask strategies, and how they enter a run.

Latents are [C, T, H, W] here, of one video. An edit is 0 where a frame is kept, 1 where it is made, between where it is edited.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..errors import OpenSoraError
from .given import Given, ImageCondition
from .guidance import ReferenceUse
from .schedule import Process, Schedule

ALIGN = 5  # latent frames of a piece of 1.2, to which starts are moved


@dataclass(frozen=True)
class MaskGroup:
    """One group of a mask strategy: where frames of a reference go. Starts below 0 count from the end; all in latent frames."""

    loop: int = 0
    reference: int = 0
    reference_start: int = 0
    target_start: int = 0
    length: int = 1
    edit: float = 0.0


def parse_mask_strategy(text: str | None) -> list[MaskGroup]:
    """Groups of "loop,reference,reference start,target start,length,edit;...": what is left out at a group's end is 0,0,0,0,1,0."""
    return [_group(group) for group in text.split(";")] if text else []


def _group(text: str) -> MaskGroup:
    names, values = [field.name for field in fields(MaskGroup)], text.split(",")
    if len(values) > len(names):
        raise OpenSoraError(f"mask_strategy group {text!r} has {len(values)} fields; the most are 6; give {','.join(names)}.")
    read = {}
    for name, value in zip(names, values, strict=False):
        try:
            read[name] = float(value) if name == "edit" else int(value)
        except ValueError as error:
            kind = "a number from 0 to 1" if name == "edit" else "a whole number"
            raise OpenSoraError(f"mask_strategy group {text!r}: {name} is {value!r}; use {kind}.") from error
    group = MaskGroup(**read)
    for name, low in (("loop", 0), ("reference", 0), ("length", 1)):
        if getattr(group, name) < low:
            raise OpenSoraError(f"mask_strategy group {text!r}: {name} is {getattr(group, name)}; use {low} or more.")
    if not 0 <= group.edit <= 1:
        raise OpenSoraError(f"mask_strategy group {text!r}: edit is {group.edit}; use 0 (kept) to 1 (made).")
    return group


def place(
    noise: Tensor,
    groups: Sequence[MaskGroup],
    references: Sequence[Tensor],
    loop: int = 0,
    align: int | None = ALIGN,
    repeats_picture=False,
) -> tuple[Tensor, Tensor]:
    """Lay references [C, t, H, W] into a video's noise [C, T, H, W]: the latents, and the edit of every frame [T].

    align: what starts are moved to (1.2), or None (1.1, 1.3).
    repeats_picture: a reference of one frame fills the whole target length (1.1), and nothing else may be too short.
    Refuses a reference that is not there or has another size, or a start outside of either.
    """
    x, edit = noise.clone(), torch.ones(noise.shape[1], device=noise.device)
    for group in groups:
        if group.loop != loop:
            continue
        if group.reference >= len(references):
            raise OpenSoraError(
                f"mask_strategy names reference {group.reference}; {len(references)} are given, counted from 0; give more, or name one of them."
            )
        given = references[group.reference].to(x)
        if given.shape[2:] != x.shape[2:] or given.shape[0] != x.shape[0]:
            raise OpenSoraError(
                f"Reference {group.reference} is {list(given.shape)} in latents, the video {list(x.shape)}, and sizes must agree; give one of the video's size."
            )
        source, target = _start(group, "reference_start", given.shape[1], align), _start(group, "target_start", x.shape[1], align)
        length = min(group.length, x.shape[1] - target)
        if repeats_picture and given.shape[1] == 1:
            given, source = given.expand(-1, length, -1, -1), 0
        length = min(length, given.shape[1] - source)
        x[:, target : target + length] = given[:, source : source + length]
        edit[target : target + length] = group.edit
    return x, edit


def _start(group: MaskGroup, name: str, length: int, align: int | None) -> int:
    start = getattr(group, name)
    if not -length <= start < length:
        raise OpenSoraError(
            f"mask_strategy: {name} is {start}; use {-length} to {length - 1}: the {name.split('_')[0]} has {length} latent frames."
        )
    start = start % length
    if align is None:
        return start
    piece = start // align  # the nearest that is a whole one below `length`, else the one that it lies in
    return align * (piece + (start % align > align / 2 and piece < length // align - 1))


class Frames(Given):
    """Given frames of the rectified flow (1.2, 1.3): one is kept until the noise has fallen to its edit, then made from there on.

    process: of the model. x: noise. dtype: not made use of. `draw` is called once in every step.
    """

    use = ReferenceUse(is_held=True)

    def __init__(self, process: Process, condition: ImageCondition, x: Tensor, schedule: Schedule, dtype: torch.dtype):
        edit = 1 - condition.mask[:, 0, :, 0, 0] * condition.use.strength if condition.edit is None else condition.edit
        self.edit, self._schedule, self._process = edit.to(x.device), schedule, process
        self._placed = torch.where(condition.mask.to(x.device) > 0, condition.latents.to(x), x)
        self._was = self.edit >= 1

    def made(self, step: int) -> Tensor:
        """Which frames [B, T] a step's result is taken of."""
        return (self.edit * 1000 >= self._schedule.timesteps[step].to(self.edit)) | (self.edit >= 1)

    def begun(self, step: int) -> Tensor:
        """Which frames [B, T] are noised before a step, from which on they are made. It is asked once for every step, in their order."""
        was, self._was = self._was, self.made(step)
        return self._was & ~was

    def noised(self, x: Tensor, step: int) -> Tensor:
        return self._process.noised(x, self.draw(x).to(x), self._schedule.points[step].to(x))

    def before(self, x: Tensor, step: int) -> Tensor:
        self._kept = x = x if step else self._placed.to(x)
        return torch.where(self.begun(step)[:, None, :, None, None], self.noised(x, step), x)

    def after(self, x: Tensor, step: int) -> Tensor:
        return torch.where(self.made(step)[:, None, :, None, None], x, self._kept)


class BesideNoise(Given):
    """1.3's condition types: latents that the network reads beside the noise.

    process: of the model. x: noise. dtype: of the network.
    use: its strength counts: steps after it are as of a video of which nothing is given; and whether steps begin with the given frames.
    """

    def __init__(self, process: Process, condition: ImageCondition, x: Tensor, schedule: Schedule, dtype: torch.dtype):
        self._mask = condition.mask.to(x)
        self._latents, self._schedule, self._process = condition.latents.to(x) * self._mask, schedule, process
        self.use = ReferenceUse(strength=condition.use.strength, is_renoised=condition.use.is_renoised)
        self.cond = torch.cat((self._mask, self._latents), dim=1).to(dtype)

    @property
    def blank(self) -> Given:
        """The latents are zero; where they are is told all the same, as upstream's third pass has it."""
        blank = Given()
        blank.cond = torch.cat((self._mask, torch.zeros_like(self._latents)), dim=1)
        return blank

    def before(self, x: Tensor, step: int) -> Tensor:
        if not self.use.is_renoised or not self.is_read(step):
            return x
        noised = self._process.noised(self._latents.to(x), self.draw(x).to(x), self._schedule.points[step].to(x))
        return torch.where(self._mask.to(x.device).bool(), noised, x)
