"""Autoencoders of pictures, both halves, which take a clip frame by frame: Stable Diffusion's, SDXL's and Flux.1's.

Open-Sora 1.0 and 1.1 use the first as it is (sd-vae-ft-ema, under the key names of its diffusers folder), 1.2 the second below a temporal
autoencoder (temporal.py). Flux's has the key names of its released file (ae.safetensors); to draw, its decoder is enough: a file may hold
no more, and no more is read. Frames are [B, 3, T, H, W] in -1..1, latents [B, C, T, H / 8, W / 8] unscaled.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, OpenSoraError
from ..geometry import CAUSAL
from ..geometry.open_sora_1 import EVERY_FRAME
from ..ops import Seams
from ..shapes import AS_RELEASED, Manifest, Shapes, count, dim, renamed, size
from .codec import Codec, Encoded, WidthsConfig, levels_of
from .ladder import DIFFUSERS, LATENT_DIFFUSION, AttentionBlock, Half, Layers, Names, Resample, brought, joined, renames

GROUPS = 32  # of norms
KL_SCALE = 0.18215  # of Stable Diffusion's latents; 1.2 was trained with it on SDXL's too
SCALE, SHIFT = 0.3611, 0.1159  # of Flux's
FRAMES = 4  # taken at a time


@dataclass(frozen=True)
class KLConfig(WidthsConfig):
    """Sizes of Stable Diffusion's and SDXL's."""

    grid: ClassVar = EVERY_FRAME
    scale: ClassVar = KL_SCALE
    latent_channels: int = 4
    has_encoder: ClassVar[bool] = True
    names: ClassVar[Names] = DIFFUSERS

    @classmethod
    def of(cls, shapes: Shapes) -> "KLConfig":
        """Sizes from a file's shapes without prefix, by either naming. Raises a CheckpointError where one is missing."""
        names = LATENT_DIFFUSION if count(shapes, "encoder.down.") else DIFFUSERS
        levels = levels_of(shapes, f"encoder.{names.levels[0]}.", f"{names.blocks}.", "conv1.bias")
        return cls(size(shapes, "post_quant_conv.bias"), *levels)


@dataclass(frozen=True)
class PictureConfig(WidthsConfig):
    """Sizes of Flux's. has_encoder: whether that half is there."""

    grid: ClassVar = CAUSAL
    scale: ClassVar = SCALE
    shift: ClassVar = SHIFT
    latent_channels: int = 16
    has_encoder: bool = True
    names: ClassVar[Names] = LATENT_DIFFUSION

    @classmethod
    def of(cls, shapes: Shapes) -> "PictureConfig | None":
        """Sizes from a file's shapes without prefix; None where it is Stable Diffusion's, whose keys are the same and more.

        Raises a CheckpointError where they cannot be read, or are no such autoencoder's.
        """
        if "quant_conv.weight" in shapes:
            return None
        widths, layers = levels_of(shapes, "decoder.up.", "block.", "conv2.bias")
        channels, expected = dim(shapes, "decoder.conv_in.weight", 1, 0), FLUX_AE.latent_channels
        if len(widths) != 4 or channels != expected or not layers or any(width % GROUPS for width in widths):
            raise CheckpointError(
                f"{channels} latent channels ({expected} expected) and widths {list(widths)} (four multiples of {GROUPS} expected)."
            )
        return cls(channels, widths, layers - 1, has_encoder="encoder.conv_in.weight" in shapes)


FLUX_AE = PictureConfig()


class PictureVAE(Codec):
    """Pictures and latents, both ways where the encoder is there; a few at a time."""

    can_park = True

    def add_parts(self, config: KLConfig | PictureConfig, seams: Seams) -> None:
        is_kl, channels = isinstance(config, KLConfig), config.latent_channels
        layers = Layers(
            conv=seams.conv2d,
            norm=seams.group_norm,
            shortcut=config.names.shortcut,
            linear=seams.linear if is_kl else None,
            attention=AttentionBlock,
            step=lambda channels, level, is_down: Resample(channels, is_down, seams),
        )
        self.encoder = Half(config, False, layers, config.names) if config.has_encoder else None
        self.decoder = Half(config, True, layers, config.names)
        self.quant_conv = seams.conv2d(2 * channels, 2 * channels, 1) if is_kl else nn.Identity()
        self.post_quant_conv = seams.conv2d(channels, channels, 1) if is_kl else nn.Identity()

    def _encode_clip(self, pixels: Tensor) -> Encoded:
        if self.encoder is None:
            raise OpenSoraError("This autoencoder's file holds its decoder alone; give the whole one, ae.safetensors, to encode pictures.")
        return Encoded(by_frames(lambda frames: self.quant_conv(self.encoder(frames)), pixels, self.device))

    def _decode_clip(self, latents: Tensor, home: torch.device | None) -> Tensor:
        return by_frames(lambda z: self.decoder(self.post_quant_conv(z)), latents, self.device, home)


def by_frames(run, clip: Tensor, device: torch.device, home: torch.device | None = None) -> Tensor:
    """Give `run` a few frames [N, C, H, W] of a clip [B, C, T, H, W] at a time; the results as a clip, on `home` or the device."""
    flat = clip.transpose(1, 2).flatten(0, 1)
    parts = (run(brought(part, device)) for part in flat.split(FRAMES))
    return joined(parts, len(flat), home, axis=0).unflatten(0, (len(clip), -1)).transpose(1, 2)


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
