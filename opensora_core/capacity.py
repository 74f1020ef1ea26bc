"""What a pipeline's networks need on a device and what it has, from headers and the device itself: for choosing what streams."""

from dataclasses import dataclass

import torch

from .components import AUTO, RESIDENT, Placement, free_bytes
from .estimate import MATRIX_BYTES
from .footprint import QUANTISED, sampling_peak, sizes_of_files, text_peak, transformer_weights
from .model_files import ModelFiles
from .offload.plan import UnitBytes
from .request import GenerationRequest
from .vae.memory import MARGIN


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


def weight_capacity(placement: Placement) -> int | None:
    """What weights can take on a device: what is free for those that stay, all of it for a budget; None where it is not known."""
    if placement.device.type != "cuda":
        return None
    if placement.mode == RESIDENT:
        return free_bytes(placement.device)
    return torch.cuda.get_device_properties(placement.device).total_memory
