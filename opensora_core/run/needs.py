"""What a pipeline's networks need on a device, and what the device has: for choosing what streams.

Needs are read from the files' headers, capacity from the device itself; no weight is read.
"""

from dataclasses import dataclass

from ..choices import AUTO, BUDGET, QUANTISED, RESIDENT, dtype_word
from ..family import NetworkSizes
from ..memory.component import Placement
from ..memory.device import free_bytes, total_bytes
from ..memory.estimate import with_margin
from ..memory.footprint import forward_peak, sampling_peak, sizes_of_files, text_peak, transformer_weights, vae_weights
from ..memory.residency import UnitBytes
from .files import ModelFiles
from .request import GenerationRequest


@dataclass(frozen=True)
class Needs:
    """Bytes of the networks of some files in a placement. quantised: the quantised precision asked for, if one was."""

    files: ModelFiles
    placement: Placement
    quantised: str | None

    def transformer_weights(self) -> UnitBytes:
        """Bytes of the transformer's weights as they will be read; LoRAs beside quantised weights are not counted."""
        sizes = sizes_of_files(self.files.dit)
        return transformer_weights(sizes.transformer, self._precision(sizes.stored), sizes.stored, sizes.groups).sizes

    def beside_transformer(self, request: GenerationRequest) -> int:
        """What sampling needs beside the weights, where that decides how many of them stay on the device; else 0."""
        if not _decides(self.placement):
            return 0
        sizes = sizes_of_files(self.files.dit, t5=self.files.t5)
        shape = request.latent_shape(sizes.transformer.in_channels)
        peak = sampling_peak(sizes.transformer, self._precision(sizes.stored), shape, request.has_given, sizes.text.length)
        return with_margin(sum(peak))

    def beside_t5(self) -> int:
        """What encoding needs beside T5's weights, where that decides how many of them stay on the device; else 0."""
        if not _decides(self.placement):
            return 0
        sizes = sizes_of_files(self.files.dit, t5=self.files.t5)
        return with_margin(text_peak(sizes.text, self._precision(sizes.stored_text)))

    def vae_weights(self) -> int:
        return vae_weights(sizes_of_files(self.files.dit, vae=self.files.vae).vae, dtype_word(self.placement.dtype))

    def _precision(self, stored: str) -> str:
        return self.quantised or (stored if stored in QUANTISED else dtype_word(self.placement.dtype))


def beside_picture(config: NetworkSizes, placement: Placement, quantised: str | None, size: tuple[int, int]) -> int:
    """Bytes that drawing a picture of (height, width) needs beside Flux's weights; 0 where that decides nothing."""
    if not _decides(placement):
        return 0
    shape = (1, config.in_channels, 1, *config.grid.latent_size(*size))
    return with_margin(forward_peak(config, quantised or dtype_word(placement.dtype), shape))


def _decides(placement: Placement) -> bool:
    return placement.mode == AUTO and placement.device.type == "cuda"


def weight_capacity(placement: Placement) -> int | None:
    """What weights can take on a device: what is free for those that stay, all of it for a budget; None where it is not known."""
    if placement.mode == BUDGET or placement.device.type == "cuda" and placement.mode != RESIDENT:
        return total_bytes(placement.device)
    # In main memory, pages of a mapped file need no room of their own.
    return free_bytes(placement.device) if placement.device.type == "cuda" else None
