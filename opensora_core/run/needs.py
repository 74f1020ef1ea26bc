"""What a pipeline's networks need on a device, and what the device has: for choosing what streams, and the sentence when it was not enough.

Needs are read from the files' headers, capacity from the device itself; no weight is read.
"""

from dataclasses import dataclass

import torch

from ..memory.component import AUTO, BUDGET, EVERYTHING, RESIDENT, Placement
from ..memory.decode import MARGIN
from ..memory.device import free_bytes, ran_out, total_bytes
from ..memory.estimate import MATRIX_BYTES
from ..memory.footprint import QUANTISED, sampling_peak, sizes_of_files, text_peak, transformer_weights
from ..memory.plan import UnitBytes
from .files import ModelFiles
from .request import GenerationRequest


@dataclass(frozen=True)
class Needs:
    """Bytes of the networks of some files in a placement. quantised: the quantised precision asked for, if one was."""

    files: ModelFiles
    placement: Placement
    quantised: str | None

    def transformer_weights(self) -> UnitBytes:
        """As they will be once read; LoRAs beside quantised weights are not counted."""
        sizes = sizes_of_files(self.files.dit)
        return transformer_weights(sizes.transformer, self._precision(sizes.stored), sizes.stored, sizes.groups).sizes

    def beside_transformer(self, request: GenerationRequest) -> int:
        """What sampling needs beside the weights, where that decides how many of them stay on the device; else 0."""
        if not self._decides:
            return 0
        sizes = sizes_of_files(self.files.dit, t5=self.files.t5)
        shape = (request.num_videos, sizes.transformer.in_channels, *request.latent_extent)
        has_image = request.has_reference
        return self._with_margin(
            sum(sampling_peak(sizes.transformer, self._precision(sizes.stored), shape, has_image, sizes.text.t5_length))
        )

    def beside_t5(self) -> int:
        """As beside_transformer, of encoding."""
        if not self._decides:
            return 0
        sizes = sizes_of_files(t5=self.files.t5)
        return self._with_margin(text_peak(sizes.text, self._precision(sizes.stored_text)))

    @property
    def _decides(self) -> bool:
        return self.placement.mode == AUTO and self.placement.device.type == "cuda"

    def _precision(self, stored: str) -> str:
        if self.quantised or stored in QUANTISED:
            return self.quantised or stored
        return "fp32" if self.placement.dtype == torch.float32 else "bf16"

    @staticmethod
    def _with_margin(num_bytes: int) -> int:
        return int(MARGIN * num_bytes) + MATRIX_BYTES


def sampling_ran_out(request: GenerationRequest, placement: Placement) -> str:
    """What to say of a run that failed for good. Call it with the failed run's tensors gone."""
    clips = f"{request.num_videos} videos of " if request.num_videos > 1 else ""
    tried = " with one block of the transformer on the device at a time" if placement.mode in (AUTO, BUDGET) else ""
    work = f"Sampling {clips}{request.num_frames} frames of {request.height}x{request.width} (height x width){tried}"
    fewer = "make fewer frames, fewer videos at a time" if clips else "make fewer frames"
    return ran_out(work, placement.device, f"{fewer} or a smaller size, {_change(placement)}")


def encoding_ran_out(placement: Placement) -> str:
    """As sampling_ran_out, of the text encoders."""
    return ran_out(
        "Encoding the prompt", placement.device, f"use T5 in 8 bits (an fp8 file, or precision fp8_e4m3fn), {_change(placement)}"
    )


def reference_ran_out(shape: tuple[int, ...], device: torch.device) -> str:
    """As sampling_ran_out, of encoding pictures [T, H, W, 3]."""
    frames, height, width = shape[:3]
    return ran_out(
        f"Encoding {frames} given {'frames' if frames > 1 else 'frame'} of {height}x{width} (height x width)",
        device,
        "use smaller tiles (vae.enable_tiling), a smaller size, or close other programs that use the memory",
    )


def decoding_ran_out(size: str, policy: str, device: torch.device) -> str:
    """As sampling_ran_out, of the decode. size: "129 frames of 192x336 (height x width)"."""
    smaller = "smaller tiles (vae.enable_tiling)"
    change = smaller if policy == "low_memory" else f"policy low_memory or {smaller}"
    return ran_out(f"Decoding {size} with policy {policy}", device, f"the finished latents are kept; decode them with {change}")


def _change(placement: Placement) -> str:
    if placement.device.type == "cpu":
        return "compute in bf16 (--dtype bf16), or close other programs"
    if placement.mode == EVERYTHING:
        return "or let weights leave the device (enable_offload(), --offload auto)"
    if placement.mode == RESIDENT:
        return "or use offload auto instead of resident"
    return "take attention in slices (enable_attention_slicing(), --attention sliced), or close other programs that use the device"


def weight_capacity(placement: Placement) -> int | None:
    """What weights can take on a device: what is free for those that stay, all of it for a budget; None where it is not known."""
    if placement.mode == BUDGET or placement.device.type == "cuda" and placement.mode != RESIDENT:
        return total_bytes(placement.device)
    # In main memory, pages of a mapped file need no room of their own.
    return free_bytes(placement.device) if placement.device.type == "cuda" else None
