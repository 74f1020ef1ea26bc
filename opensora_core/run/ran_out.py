"""What is done when a device's memory runs out: the same work again with one block of its network there at a time, and the sentence if that fails too."""

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ..choices import AUTO, BUDGET, EVERYTHING, LOW_MEMORY, RESIDENT
from ..memory.component import Component, Placement
from ..memory.device import ran_out, unless_out_of_memory
from .request import GenerationRequest

logger = logging.getLogger(__name__)

T = TypeVar("T")


def with_less(
    component: Component, placement: Placement, work: Callable[[Any], T], beside_bytes: int, words: tuple[str, str]
) -> tuple[T | None, list[str]]:
    """(what `work` makes of a network, lines a person should see); None where memory ran out in every way that the offload mode permits.

    Say so with the failed work's tensors gone, as they are when this returns.
    work: gives its result; it begins anew where memory runs out, and keeps no name for the network, which would keep the weights.
    beside_bytes: see Component.at_work. words: what is done, and the network's name: ("sampling", "the transformer").
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
    return made, notes


def sampling_ran_out(request: GenerationRequest, placement: Placement) -> str:
    """What to say of a run that failed for good. Call it with the failed run's tensors gone."""
    clips = f"{request.num_videos} videos of " if request.num_videos > 1 else ""
    tried = " with one block of the transformer on the device at a time" if placement.mode in (AUTO, BUDGET) else ""
    work = f"Sampling {clips}{request.num_frames} frames of {request.height}x{request.width} (height x width){tried}"
    fewer = "make fewer frames, fewer videos at a time" if clips else "make fewer frames"
    return ran_out(work, placement.device, f"{fewer} or a smaller size, {_change(placement)}")


def encoding_ran_out(placement: Placement) -> str:
    return ran_out("Encoding the prompt", placement.device, f"use T5 in 8 bits (an fp8 file or precision fp8_e4m3fn), {_change(placement)}")


def reference_ran_out(shape: tuple[int, ...], device: torch.device) -> str:
    """What to say where pictures [T, H, W, 3] could not be encoded."""
    frames, height, width = shape[:3]
    return ran_out(
        f"Encoding {frames} given {'frames' if frames > 1 else 'frame'} of {height}x{width} (height x width)",
        device,
        "use smaller tiles (vae.enable_tiling), a smaller size, or close other programs that use the memory",
    )


def decoding_ran_out(size: str, policy: str, device: torch.device) -> str:
    """What to say where finished latents could not be decoded. size: "129 frames of 192x336 (height x width)"."""
    smaller = "smaller tiles (vae.enable_tiling)"
    change = smaller if policy == LOW_MEMORY else f"policy low_memory or {smaller}"
    return ran_out(f"Decoding {size} with policy {policy}", device, f"decode the finished latents, which are kept, with {change}")


def drawing_ran_out(height: int, width: int, device: torch.device) -> str:
    what = f"Drawing a picture of {height}x{width} (height x width)"
    return ran_out(what, device, "use --offload minimal, a quantised --precision or a smaller picture")


def _change(placement: Placement) -> str:
    if placement.device.type == "cpu":
        return "compute in bf16 (--dtype bf16), or close other programs"
    if placement.mode == EVERYTHING:
        return "or let weights leave the device (enable_offload(), --offload auto)"
    if placement.mode == RESIDENT:
        return "or use offload auto instead of resident"
    return "take attention in slices (enable_attention_slicing(), --attention sliced), or close other programs that use the device"
