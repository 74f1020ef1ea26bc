"""What is done when a device's memory runs out: the same work again with one block of its network there at a time, and the sentence if that fails too."""

import logging
from collections.abc import Callable
from typing import Any, TypeVar

from ..choices import AUTO, BUDGET, EVERYTHING, RESIDENT
from ..errors import OutOfMemory
from ..memory.component import Component, Placement
from ..memory.device import ran_out, unless_out_of_memory
from .request import GenerationRequest

logger = logging.getLogger(__name__)

T = TypeVar("T")


def with_less(
    component: Component, placement: Placement, work: Callable[[Any], T], beside_bytes: int, words: tuple[str, str], say: Callable[[], str]
) -> tuple[T, list[str]]:
    """(what `work` makes of a network, lines a person should see).

    work: gives its result; it begins anew where memory runs out, and keeps no name for the network, which would keep the weights.
    beside_bytes: see Component.at_work. words: what is done, and the network's name: ("sampling", "the transformer").
    say: gives the sentence of the OutOfMemory that is raised where memory ran out in every way that the offload mode permits; it is asked
    with the failed work's tensors gone.
    """

    def attempt(is_last_try: bool) -> T:
        with component.at_work(0 if is_last_try else beside_bytes, is_last_try) as network:
            return work(network)

    made, notes = unless_out_of_memory(lambda: attempt(False)), []
    if made is None and placement.mode in (AUTO, BUDGET):
        doing, name = words
        notes.append(f"The device ran out of memory while {doing}; it begins again with one block of {name} on the device at a time.")
        logger.warning("%s", notes[0])
        made = unless_out_of_memory(lambda: attempt(True))
    if made is None:
        raise OutOfMemory(say())
    return made, notes


def sampling_ran_out(request: GenerationRequest, placement: Placement) -> str:
    """What to say of a run that failed for good. Call it with the failed run's tensors gone."""
    clips = f"{request.num_videos} videos of " if request.num_videos > 1 else ""
    tried = " with one block of the transformer on the device at a time" if placement.mode in (AUTO, BUDGET) else ""
    work = f"Sampling {clips}{request.num_frames} frames of {request.height}x{request.width} (height x width){tried}"
    fewer = "make fewer frames, fewer videos at a time" if clips else "make fewer frames"
    return ran_out(work, placement.device, f"{fewer} or a smaller size, {change(placement)}")


def change(placement: Placement) -> str:
    """The end of an advice: what of the placement was not tried."""
    if placement.device.type == "cpu":
        return "compute in bf16 (--dtype bf16), or close other programs"
    if placement.mode == EVERYTHING:
        return "or let weights leave the device (enable_offload(), --offload auto)"
    if placement.mode == RESIDENT:
        return "or use offload auto instead of resident"
    return "take attention in slices (enable_attention_slicing(), --attention sliced), or close other programs that use the device"
