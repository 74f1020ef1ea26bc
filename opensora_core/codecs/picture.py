"""The Flux.1 picture autoencoder, under the key names of its released file (ae.safetensors).

Frames are [B, 3, T, H, W] in -1..1, latents [B, 16, T, H / 8, W / 8] unscaled; every frame is a picture of its own. To draw, the
decoder is enough: a file may hold no more, and no more is read.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError, OpenSoraError
from ..geometry import CAUSAL, Grid
from ..ops import TorchOperations
from ..shapes import Shapes, count, dim, size
from .codec import Encoded, Latents, check_video
from .ladder import GROUPS, LATENT_DIFFUSION, Half, LadderConfig, Layers, Resample, Seams

SCALE, SHIFT = 0.3611, 0.1159


@dataclass(frozen=True)
class PictureConfig(LadderConfig):
    """Sizes. has_encoder: whether that half is there."""

    latent_channels: int = 16
    widths: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2
    has_encoder: bool = True

    @classmethod
    def of(cls, shapes: Shapes) -> "PictureConfig":
        """Sizes from a file's shapes without prefix.

        Raises:
            CheckpointError: the sizes cannot be read, or are no such autoencoder's.
        """
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

    @property
    def latents(self) -> Latents:
        return Latents(self.latent_channels, SCALE, SHIFT)

    @property
    def grid(self) -> Grid:
        return CAUSAL


FLUX_AE = PictureConfig()


class AttentionBlock(nn.Module):
    """Single-head attention over all positions, added to the input."""

    def __init__(self, channels: int, seams: Seams):
        super().__init__()
        self.norm = seams.norm(channels)
        self.q, self.k, self.v, self.proj_out = (seams.conv(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2).unsqueeze(1) for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(h)


class PictureVAE(nn.Module):
    """Pictures and latents, both ways where the encoder is there."""

    can_park = False
    decode_bytes = encode_bytes = None

    def __init__(self, config: PictureConfig = FLUX_AE, operations=TorchOperations, dtype: torch.dtype | None = None, device=None):
        super().__init__()
        seams = Seams(operations, dtype, device)
        self.config = config
        layers = Layers(
            conv=seams.conv,
            norm=seams.norm,
            shortcut="nin_shortcut",
            attention=lambda channels: AttentionBlock(channels, seams),
            step=lambda channels, level, is_down: Resample(channels, is_down, seams),
        )
        self.encoder = Half(config, False, layers, LATENT_DIFFUSION) if config.has_encoder else None
        self.decoder = Half(config, True, layers, LATENT_DIFFUSION)

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.decoder.conv_in.weight.device

    def encode(self, pixels: Tensor) -> Encoded:
        """Mean and log-variance of the latents of pictures [B, 3, T, H, W] in -1..1, sides multiples of 8.

        Raises:
            OpenSoraError: another shape, or a file that held the decoder alone.
        """
        if self.encoder is None:
            raise OpenSoraError("This autoencoder's file holds its decoder alone; pictures are encoded with the whole one, ae.safetensors.")
        check_video(pixels, self.config.in_channels, "pixels")
        return Encoded(_by_frames(self.encoder, pixels))

    def decode(self, latents: Tensor, home: torch.device | None = None) -> Tensor:
        """Pictures [B, 3, T, 8h, 8w], about -1..1, of unscaled latents [B, C, T, h, w]."""
        check_video(latents, self.config.latent_channels, "latents")
        return _by_frames(self.decoder, latents)


def _by_frames(half: nn.Module, clip: Tensor) -> Tensor:
    return half(clip.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(clip), -1)).transpose(1, 2)
