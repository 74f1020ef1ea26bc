"""The VAE as a pipeline uses it: clips in and out, tiles inside, and what is tried when the device has no room for one."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from ..codecs.dc_ae.config import DCAEConfig
from ..codecs.dc_ae.model import VideoDCAE
from ..codecs.hunyuan.config import VAEConfig
from ..codecs.hunyuan.memory import PARKED_WORDS, POLICIES, choose_decode, park_decode
from ..codecs.hunyuan.model import CausalVAE
from ..codecs.tiling import Progress, check_tiling, posterior, tiled_decode, tiled_encode
from ..errors import check_choice
from ..geometry import Tiling
from .component import Component, Placement
from .device import free_bytes, unless_out_of_memory

logger = logging.getLogger(__name__)

# Where a decode's activations are parked.
_HOME = torch.device("cpu")


class VideoVAE:
    """Encodes and decodes clips.

    Attributes:
        tiling: sizes of the tiles; the defaults are the reference's.
        policy: how to decode: auto, exact or low_memory, see codecs/hunyuan/memory.py.
    """

    def __init__(self, component: Component, placement: Placement):
        self.tiling = Tiling()
        self._policy = POLICIES[0]
        self._component = component
        self._placement = placement

    @property
    def policy(self) -> str:
        return self._policy

    @policy.setter
    def policy(self, policy: str) -> None:
        check_choice("policy", policy, POLICIES)
        self._policy = policy

    def enable_tiling(self, tile_size: int = 256, tile_overlap: float = 0.25) -> None:
        """Choose the spatial tiles of encode and decode: pixels of a side, and the share of it that neighbours have in common.

        The defaults are what the released model was used with; other sizes give slightly other pictures.

        Raises:
            OpenSoraError: a size or an overlap that tiles cannot have.
        """
        self.tiling = check_tiling(Tiling(tile_size, tile_overlap, self.tiling.temporal_tile))

    def encode(self, images: Tensor, generators: list[torch.Generator | None], progress: Progress | None = None) -> Tensor:
        """Latents of a clip (a picture is one of one frame).

        Args:
            images: [T, H, W, 3] fp32 in 0..1.
            generators: one for each latent wanted: None for the posterior's mode, or what to sample it with.

        Returns:
            [len(generators), C, t, h, w] fp32 in the transformer's scale, on the device.
        """
        pixels = images.permute(3, 0, 1, 2).unsqueeze(0) * 2 - 1
        pixels = pixels.to(self._placement.device, self._placement.dtype)
        with self._component.at_work() as vae:
            config, tiling = vae.config, vae.config.in_tiles(self.tiling)
            if isinstance(config, DCAEConfig):  # without a posterior there is nothing to sample
                latents = tiled_encode(vae.encode, pixels, tiling, progress, grid=config.grid).float()
                return config.latent_scale * latents.expand(len(generators), -1, -1, -1, -1)
            moments = tiled_encode(vae.encode_moments, pixels, tiling, progress).float()
        return config.latent_scale * torch.cat([posterior(moments, generator is not None, generator) for generator in generators])

    @contextmanager
    def decoder(self, latent_shape: tuple[int, ...]) -> Iterator["ClipDecoder"]:
        """What decodes clips, or the parts of a long one, while the block lasts. latent_shape: [1, C, T, H, W], of the largest."""
        with self._component.at_work() as vae:
            yield ClipDecoder(vae, self._placement, self.policy, self.tiling, latent_shape)


class ClipDecoder:
    """Latents to pixels within what the device has.

    A tile that the device has no room for after all is tried again with activations in main memory, the policies auto and exact
    permitting it; then, with auto, in temporal tiles. What helped once stays.

    Attributes:
        notes: the lines to show where memory makes the decode other than exact; they are logged too.
    """

    def __init__(self, vae: CausalVAE | VideoDCAE, placement: Placement, policy: str, asked: Tiling, latent_shape: tuple[int, ...]):
        self.notes: list[str] = []
        self._vae, self._placement, self._policy = vae, placement, policy
        self._asked, self._shape = asked, latent_shape
        self._tiling = self._choose(policy)

    def __call__(self, latents: Tensor, progress: Progress | None = None) -> Tensor:
        """Pixels [1, 3, T, H, W], about -1..1, of latents [1, C, T, H, W] in the transformer's scale.

        Raises:
            whatever the device says where it has no room in any way that the policy permits.
        """
        placement = self._placement
        latents = (latents.to(placement.device).float() / self._vae.config.latent_scale).to(placement.dtype)
        while (frames := unless_out_of_memory(lambda: self._tiles(latents, progress))) is None:
            smaller = self._after(self._tiling)
            if smaller is None:
                return self._tiles(latents, progress)  # what it raises is for the caller
            self._tiling = smaller
        return frames

    def _tiles(self, latents: Tensor, progress: Progress | None) -> Tensor:
        decode = partial(self._vae.decode, home=_HOME) if self._tiling.parked else self._vae.decode
        return tiled_decode(decode, latents, self._tiling, progress, grid=self._vae.config.grid)

    def _choose(self, policy: str) -> Tiling:
        config, placement = self._vae.config, self._placement
        free = _free_for_tiles(self._shape, config, placement)
        tiling, note = choose_decode(policy, config, self._shape, self._asked, placement.dtype.itemsize, free, _ram_for_parking(placement))
        if note:
            self._tell(note)
        return tiling

    def _after(self, tiling: Tiling) -> Tiling | None:
        """What to try when this ran out of memory; None if there is nothing."""
        config, placement = self._vae.config, self._placement
        if self._policy == "low_memory" or tiling.temporal_tile != config.in_tiles(Tiling()).temporal_tile:
            return None
        parked = park_decode(config, self._shape, tiling, placement.dtype.itemsize, _ram_for_parking(placement))
        if parked is not None:
            self._tell(f"{PARKED_WORDS}: the device ran out of memory.")
            return parked
        if self._policy != "auto":
            return None
        shorter = self._choose("low_memory")
        return shorter if shorter.temporal_tile != tiling.temporal_tile else None  # a short clip has nothing to cut

    def _tell(self, note: str) -> None:
        logger.warning("%s", note)
        self.notes.append(note)


def _free_for_tiles(latent_shape: tuple[int, ...], config: VAEConfig | DCAEConfig, placement: Placement) -> int:
    """Bytes of the device that are free for a tile's activations once all finished frames are there."""
    free = free_bytes(placement.device)
    if free is None:
        return sys.maxsize  # unknown: try
    frames, height, width = latent_shape[-3:]
    grid = config.grid
    finished = config.in_channels * grid.pixel_frames(frames) * height * width * grid.space**2 * placement.dtype.itemsize
    return max(0, free - finished)


def _ram_for_parking(placement: Placement) -> int:
    """Main memory that a decode may park activations in."""
    return 0 if placement.device.type == "cpu" else free_bytes(_HOME) or 0
