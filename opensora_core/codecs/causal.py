"""The video autoencoder of Open-Sora 1.3: causal in time, in pieces of 17 frames that share one with the next.

Frames are [B, 3, T, H, W] in -1..1, latents [B, 16, t, H / 8, W / 8] unscaled: 5 for each piece, 1 for a picture. State-dict keys
are those of the released file.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..geometry.open_sora_1 import SHARED_PIECES
from ..ops import Seams, place_at
from ..shapes import Shapes, size
from .codec import Codec, Encoded, WidthsConfig, levels_of
from .hunyuan import layers as whole
from .ladder import LATENT_DIFFUSION, AttentionBlock, Half, Layers, Resample, brought, park
from .picture import by_frames

PIECE, LATENT_PIECE = 17, 5
UPSAMPLE_EPS = 1e-5
# What the released model's latents measure, channel by channel, over videos; hpcaitech/Open-Sora@v1.3 models/vae_v1_3/constants.py.
MEAN = (
    -0.190169, -0.044801, 0.020790, 0.018653, -0.011586, 0.001087, 0.083789, 0.089021, 0.009409, 0.080868, -0.072516, 0.050521,
    -0.020972, -0.122308, -0.003862, -0.023072,
)  # fmt: skip
STD = (
    0.949078, 0.959412, 0.944430, 0.910328, 0.959352, 0.843035, 0.888812, 0.929114, 0.972594, 0.891795, 0.863085, 0.827989,
    0.911430, 0.792284, 0.899141, 0.947351,
)  # fmt: skip


@dataclass(frozen=True)
class CausalConfig(WidthsConfig):
    grid: ClassVar = SHARED_PIECES
    scale: ClassVar = tuple(1 / std for std in STD)
    shift: ClassVar = MEAN
    latent_channels: int = 16

    @classmethod
    def of(cls, shapes: Shapes) -> "CausalConfig":
        """Sizes from a file's shapes without prefix. Raises a CheckpointError where one is missing."""
        return cls(size(shapes, "decoder.conv_in.conv.weight", 1), *levels_of(shapes, "encoder.down.", "block.", "conv1.conv.bias"))


class CausalConv3d(whole.CausalConv3d):
    """A convolution that sees no later frame: zeros before the first, and around the picture. Large inputs go a few frames at a time.

    conv: a plain one. lead: zeros before the first frame; None = as far as the kernel reaches back.
    """

    def __init__(self, conv: nn.Module, lead: int | None = None):
        super().__init__(conv)
        self.is_whole, self.lead = lead is not None, self.lead if lead is None else lead

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.padded(x, self.lead)) if self.is_whole else super().forward(x)

    def padded(self, x: Tensor, before: int) -> Tensor:
        return F.pad(x, (*[self.kernel_size // 2] * 4, before, 0))


class RowAttention(AttentionBlock):
    is_causal = True


class Upsample3d(nn.Module):
    """Nearest-neighbour enlargement by 2 in time, height and width, to which two convolutions are added, normalised after each."""

    def __init__(self, channels: int, seams: Seams):
        super().__init__()
        for number in (1, 2):
            place_at(self, f"conv3d.conv{number}", CausalConv3d(seams.conv3d(channels, channels)))
            place_at(self, f"conv3d.norm{number}", seams.group_norm(channels, UPSAMPLE_EPS))

    def forward(self, x: Tensor) -> Tensor:
        x, parts = F.interpolate(x, scale_factor=2.0, mode="nearest"), self.conv3d
        h = whole.norm_silu_conv(parts.norm1, parts.conv2, parts.conv1(x))
        h = parts.norm2(h)
        return F.silu(h.add_(x), inplace=not torch.is_grad_enabled()).add_(x)


class FrameResample(Resample):
    """The step in height and width alone."""

    def forward(self, x: Tensor) -> Tensor:
        return by_frames(super().forward, x, x.device)


def _step(channels: int, level: int, is_down: bool, seams: Seams) -> nn.Module:
    """The step after the largest level changes height and width alone, the others change time too."""
    if level == 0:
        return FrameResample(channels, is_down, seams)
    return whole.Downsample(CausalConv3d(seams.conv3d(channels, channels, 3, 2))) if is_down else Upsample3d(channels, seams)


class Decoder(Half):
    def __init__(self, config: CausalConfig, layers: Layers):
        super().__init__(config, True, layers, LATENT_DIFFUSION)
        self.conv_out = self.conv_out.conv  # under the files' name for it

    def last(self, norm: nn.Module, conv: nn.Module, x: Tensor) -> Tensor:
        # Three frames more come out than went in: they stand before the first.
        return whole.norm_silu_conv(norm, CausalConv3d(conv), x)[:, :, 3:]


class CausalVideoVAE(Codec):
    """Clips and latents, both ways."""

    can_park = True

    def add_parts(self, config: CausalConfig, seams: Seams) -> None:
        layers = Layers(
            conv=lambda *sizes: CausalConv3d(seams.conv3d(*sizes)),
            block=whole.ResnetBlock,
            norm=seams.group_norm,
            shortcut=LATENT_DIFFUSION.shortcut,
            attention=RowAttention,
            step=lambda *what: _step(*what, seams),
        )
        self.encoder, self.decoder = Half(config, False, layers, LATENT_DIFFUSION), Decoder(config, layers)

    def _encode_clip(self, pixels: Tensor) -> Encoded:
        starts = range(0, max(1, pixels.shape[2] - 1), PIECE - 1)
        return Encoded(torch.cat([self.encoder(brought(pixels[:, :, start : start + PIECE], self.device)) for start in starts], dim=2))

    def _decode_clip(self, latents: Tensor, home: torch.device | None) -> Tensor:
        """A frame that two pieces share is the mean of both."""
        length, out, end = self.config.grid.pixel_frames(latents.shape[2]), None, 0
        for part in latents.split(LATENT_PIECE, dim=2):
            piece = self.decoder(brought(part, self.device))
            if out is None:
                out = park(piece, (*piece.shape[:2], length, *piece.shape[3:]), home)
            else:
                out[:, :, end - 1] = 0.5 * (out[:, :, end - 1] + piece[:, :, 0].to(out.device))
                piece = piece[:, :, 1:]
            out[:, :, end : end + piece.shape[2]] = piece
            end += piece.shape[2]
        return out
