"""Autoencoders of pictures, both halves, which take a clip frame by frame: Stable Diffusion's, SDXL's and Flux.1's.

Open-Sora 1.0 and 1.1 use the first as it is (sd-vae-ft-ema, under the key names of its diffusers folder), 1.2 the second below a temporal
autoencoder (temporal.py). Flux's has the key names of its released file (ae.safetensors); to draw, its decoder is enough: a file may hold
no more, and no more is read. Frames are [B, 3, T, H, W] in -1..1, latents [B, C, T, H / 8, W / 8] unscaled.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError, OpenSoraError
from ..geometry import CAUSAL
from ..geometry.open_sora_1 import EVERY_FRAME
from ..ops import TorchOperations
from ..shapes import AS_RELEASED, Manifest, Shapes, count, dim, renamed, size
from .codec import Encoded, check_video
from .ladder import (
    DIFFUSERS,
    GROUPS,
    LATENT_DIFFUSION,
    Chain,
    Half,
    InPieces,
    LadderConfig,
    Layers,
    Names,
    Resample,
    Seams,
    brought,
    renames,
)

KL_SCALE = 0.18215  # of Stable Diffusion's latents; 1.2 was trained with it on SDXL's too
SCALE, SHIFT = 0.3611, 0.1159  # of Flux's
FRAMES = 4  # taken at a time


@dataclass(frozen=True)
class KLConfig(LadderConfig):
    """Sizes of Stable Diffusion's and SDXL's."""

    grid: ClassVar = EVERY_FRAME
    scale: ClassVar = KL_SCALE
    latent_channels: int = 4
    widths: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2
    has_encoder: ClassVar[bool] = True
    names: ClassVar[Names] = DIFFUSERS

    @classmethod
    def of(cls, shapes: Shapes) -> "KLConfig":
        """Sizes from a file's shapes without prefix, by either naming. Raises a CheckpointError where one is missing."""
        names = next((names for names in (DIFFUSERS, LATENT_DIFFUSION) if count(shapes, f"encoder.{names.levels[0]}.")), DIFFUSERS)
        stem = f"encoder.{names.levels[0]}."
        widths = tuple(size(shapes, f"{stem}{level}.{names.blocks}.0.conv1.bias") for level in range(count(shapes, stem)))
        return cls(size(shapes, "post_quant_conv.bias"), widths, count(shapes, f"{stem}0.{names.blocks}."))


@dataclass(frozen=True)
class PictureConfig(LadderConfig):
    """Sizes of Flux's. has_encoder: whether that half is there."""

    grid: ClassVar = CAUSAL
    scale: ClassVar = SCALE
    shift: ClassVar = SHIFT
    latent_channels: int = 16
    widths: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2
    has_encoder: bool = True
    names: ClassVar[Names] = LATENT_DIFFUSION

    @classmethod
    def of(cls, shapes: Shapes) -> "PictureConfig | None":
        """Sizes from a file's shapes without prefix; None where it is Stable Diffusion's, whose keys are the same and more.

        Raises:
            CheckpointError: the sizes cannot be read, or are no such autoencoder's.
        """
        if "quant_conv.weight" in shapes:
            return None
        levels, layers = count(shapes, "decoder.up."), count(shapes, "decoder.up.0.block.")
        widths = tuple(size(shapes, f"decoder.up.{level}.block.0.conv2.bias") for level in range(levels))
        channels = dim(shapes, "decoder.conv_in.weight", 1, 0)
        if (
            len(widths) != len(FLUX_AE.widths)
            or channels != FLUX_AE.latent_channels
            or not layers
            or any(width % GROUPS for width in widths)
        ):
            raise CheckpointError(
                f"{channels} latent channels ({FLUX_AE.latent_channels} expected) and widths {list(widths)} (four multiples of {GROUPS} expected)."
            )
        return cls(channels, widths, layers - 1, has_encoder="encoder.conv_in.weight" in shapes)


FLUX_AE = PictureConfig()


class AttentionBlock(Chain):
    """Single-head attention over all positions, added to the input. Its layers are linear ones, or convolutions of a single pixel."""

    def __init__(self, channels: int, seams: Seams, names: Names):
        super().__init__()
        norm, *layers = names.attention
        self.add(norm, seams.norm(channels))
        for path in layers:
            self.add(path, seams.linear(channels, channels) if names.is_linear else seams.conv(channels, channels, 1))
        self.is_linear = names.is_linear

    def forward(self, x: Tensor) -> Tensor:
        norm, *inputs, out = (self.get_submodule(path) for path in self.order)
        h = norm(x)
        q, k, v = (self._at(layer, h).flatten(2).transpose(1, 2).unsqueeze(1) for layer in inputs)
        h = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).reshape(x.shape)
        return x + self._at(out, h)

    def _at(self, layer: nn.Module, h: Tensor) -> Tensor:
        """A layer of every position of [N, C, h, w]."""
        return layer(h.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(h.shape) if self.is_linear else layer(h)


class PictureVAE(InPieces):
    """Pictures and latents, both ways where the encoder is there; a few at a time."""

    def __init__(
        self, config: KLConfig | PictureConfig = FLUX_AE, operations=TorchOperations, dtype: torch.dtype | None = None, device=None
    ):
        super().__init__()
        seams, names = Seams(operations, dtype, device), config.names
        self.config = config
        layers = Layers(
            conv=seams.conv,
            norm=seams.norm,
            shortcut=names.shortcut,
            attention=lambda channels: AttentionBlock(channels, seams, names),
            step=lambda channels, level, is_down: Resample(channels, is_down, seams),
        )
        self.encoder = Half(config, False, layers, names) if config.has_encoder else None
        self.decoder = Half(config, True, layers, names)
        self.quant_conv = self.post_quant_conv = nn.Identity()
        if isinstance(config, KLConfig):
            self.quant_conv = seams.conv(2 * config.latent_channels, 2 * config.latent_channels, 1)
            self.post_quant_conv = seams.conv(config.latent_channels, config.latent_channels, 1)

    def encode(self, pixels: Tensor) -> Encoded:
        """Mean and log-variance of the latents of a clip [B, 3, T, H, W] in -1..1, `self.dtype`.

        Raises:
            OpenSoraError: another shape, or a file that held the decoder alone.
        """
        if self.encoder is None:
            raise OpenSoraError("This autoencoder's file holds its decoder alone; pictures are encoded with the whole one, ae.safetensors.")
        check_video(pixels, self.config.in_channels, "pixels")
        return Encoded(by_frames(lambda frames: self.quant_conv(self.encoder(frames)), pixels, self.device))

    def decode(self, latents: Tensor, home: torch.device | None = None) -> Tensor:
        """Frames [B, 3, T, 8h, 8w], about -1..1, of unscaled latents [B, C, T, h, w]."""
        check_video(latents, self.config.latent_channels, "latents")
        return by_frames(lambda z: self.decoder(self.post_quant_conv(z)), latents, self.device, home)


def by_frames(run, clip: Tensor, device: torch.device, home: torch.device | None = None) -> Tensor:
    """Give `run` a few frames [N, C, H, W] of a clip [B, C, T, H, W] at a time; the results as a clip, on `home` or the device."""
    flat, out = clip.transpose(1, 2).flatten(0, 1), None
    for start in range(0, len(flat), FRAMES):
        part = run(brought(flat[start : start + FRAMES], device))
        if out is None:
            out = torch.empty(len(flat), *part.shape[1:], dtype=part.dtype, device=home or part.device)
        out[start : start + FRAMES] = part
    return out.unflatten(0, (len(clip), -1)).transpose(1, 2)


# As ComfyUI has them. Their attention's layers are convolutions of a single pixel.
_PUBLISHED = renamed(
    renames(LATENT_DIFFUSION, DIFFUSERS), "encoder.down.0.block.0.conv1.weight", " under the key names of its first publication"
)


def _converted(key: str, tensor: Tensor, config: KLConfig) -> list[tuple[str, Tensor]]:
    ((name, tensor),) = _PUBLISHED.convert(key, tensor, config)
    return [(name, tensor.flatten(1) if ".to_" in name and tensor.ndim > 2 else tensor)]


def _manifest(manifest: Manifest) -> Manifest:
    return _PUBLISHED.manifest({name: (*shape, 1, 1) if ".to_" in name and len(shape) > 1 else shape for name, shape in manifest.items()})


PUBLISHED = replace(_PUBLISHED, convert=_converted, manifest=_manifest)
# sd-vae-ft-ema's among others, older than diffusers 0.17.
_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
OLD_DIFFUSERS = renamed(
    [(f".attentions.0{theirs}", f".attentions.0{ours}") for theirs, ours in _ATTENTION.items()],
    mark="encoder.mid_block.attentions.0.query.weight",
)
KL_LAYOUTS = (PUBLISHED, OLD_DIFFUSERS, AS_RELEASED)
