"""What a pipeline's networks need on a device, and what the device has: for choosing what streams.

Needs are read from the files' headers, capacity from the device itself; no weight is read.
"""

from functools import lru_cache

from ..choices import AUTO, BUDGET, QUANTISED, RESIDENT, dtype_word
from ..memory.component import Placement
from ..memory.device import free_bytes, total_bytes
from ..memory.estimate import with_margin
from ..memory.footprint import forward_peak, sampling_peak, sizes_of_files, text_peak, transformer_weights, vae_weights
from ..memory.loaded import FileStamp, stamp
from ..memory.residency import UnitBytes
from .files import ModelFiles
from .parts import Networks, PictureNetworks
from .request import GenerationRequest


def transformer_bytes(files: ModelFiles, placement: Placement, quantised: str | None) -> UnitBytes:
    """Bytes of the transformer's weights as they will be read; LoRAs beside quantised weights are not counted."""
    sizes = sizes_of_files(files.dit)
    return transformer_weights(sizes.transformer, _precision(placement, quantised, sizes.stored), sizes.stored, sizes.groups).sizes


def beside_transformer(networks: Networks, request: GenerationRequest) -> int:
    """Bytes that sampling needs beside the weights, where that decides how many of them stay on the device; else 0."""
    if not _decides(networks.placement):
        return 0
    sizes = sizes_of_files(networks.files.dit, t5=networks.files.t5)
    shape, precision = request.latent_shape(sizes.transformer.in_channels), _precision(networks.placement, networks.quantised, sizes.stored)
    return with_margin(sum(sampling_peak(sizes.transformer, precision, shape, request.has_given, sizes.text.length)))


def beside_t5(networks: Networks) -> int:
    """Bytes that encoding needs beside T5's weights, where that decides how many of them stay on the device; else 0."""
    if not _decides(networks.placement):
        return 0
    sizes = sizes_of_files(networks.files.dit, t5=networks.files.t5)
    return with_margin(text_peak(sizes.text, _precision(networks.placement, networks.quantised, sizes.stored_text)))


def beside_picture(networks: PictureNetworks, size: tuple[int, int]) -> int:
    """Bytes that drawing a picture of (height, width) needs beside Flux's weights; 0 where that decides nothing."""
    if not _decides(networks.placement):
        return 0
    config, precision = networks.config, networks.quantised or dtype_word(networks.placement.dtype)
    return with_margin(forward_peak(config, precision, (1, config.in_channels, 1, *config.grid.latent_size(*size))))


def vae_bytes(networks: Networks) -> int:
    """Bytes of the VAE's weights. Headers are read once, and again only if a file is replaced."""
    files = networks.files
    return _vae_bytes(files, dtype_word(networks.placement.dtype), stamp(files.dit), stamp(files.vae))


@lru_cache(maxsize=32)
def _vae_bytes(files: ModelFiles, precision: str, *stamps: FileStamp) -> int:
    return vae_weights(sizes_of_files(files.dit, vae=files.vae).vae, precision)


def _precision(placement: Placement, quantised: str | None, stored: str) -> str:
    return quantised or (stored if stored in QUANTISED else dtype_word(placement.dtype))


def _decides(placement: Placement) -> bool:
    return placement.mode == AUTO and placement.device.type == "cuda"


def weight_capacity(placement: Placement) -> int | None:
    """What weights can take on a device: what is free for those that stay, all of it for a budget; None where it is not known."""
    if placement.mode == BUDGET or placement.device.type == "cuda" and placement.mode != RESIDENT:
        return total_bytes(placement.device)
    # In main memory, pages of a mapped file need no room of their own.
    return free_bytes(placement.device) if placement.device.type == "cuda" else None
