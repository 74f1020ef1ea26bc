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
from ..ops import TorchOperations
from ..shapes import Shapes, count, size
from .codec import Encoded, check_video
from .hunyuan import layers as whole
from .ladder import LATENT_DIFFUSION, Half, InPieces, LadderConfig, Layers, Resample, ResnetBlock, Seams, brought
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
class CausalConfig(LadderConfig):
    grid: ClassVar = SHARED_PIECES
    scale: ClassVar = tuple(1 / std for std in STD)
    shift: ClassVar = MEAN
    latent_channels: int = 16
    widths: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2

    @classmethod
    def of(cls, shapes: Shapes) -> "CausalConfig":
        """Sizes from a file's shapes without prefix. Raises a CheckpointError where one is missing."""
        widths = tuple(size(shapes, f"encoder.down.{level}.block.0.conv1.conv.bias") for level in range(count(shapes, "encoder.down.")))
        return cls(size(shapes, "decoder.conv_in.conv.weight", 1), widths, count(shapes, "encoder.down.0.block."))


class CausalConv3d(whole.CausalConv3d):
    """A convolution that sees no later frame: zeros before the first, and around the picture. Large inputs go a few frames at a time.

    conv: a plain one. lead: zeros before the first frame; None = as far as the kernel reaches back.
    """

    def __init__(self, conv: nn.Module, lead: int | None = None):
        nn.Module.__init__(self)
        self.conv, self.kernel_size, self.time_stride = conv, conv.kernel_size[0], conv.stride[0]
        self.lead = self.kernel_size - 1 if lead is None else lead

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.lead == self.kernel_size - 1 else self.conv(_zeros(x, self.kernel_size, self.lead))

    def frames(self, x: Tensor, start: int, stop: int, prepare=None) -> Tensor:
        first = start * self.time_stride
        used = x[:, :, max(0, first - self.lead) : (stop - 1) * self.time_stride + 1]
        used = used if prepare is None else prepare(used)
        return self.conv(_zeros(used, self.kernel_size, max(0, self.lead - first)))


def _zeros(x: Tensor, kernel: int, lead: int) -> Tensor:
    return F.pad(x, (*[kernel // 2] * 4, lead, 0)) if kernel > 1 else x


class Block(ResnetBlock):
    """Large clips go a few frames at a time, and the second half overwrites the first."""

    forward = whole.ResnetBlock.forward

    def _shortcut(self, x: Tensor, start: int, stop: int, device: torch.device | None) -> Tensor:
        part = x[:, :, start:stop]
        return getattr(self, self.shortcut).frames(part, 0, stop - start) if self.shortcut else part


class AttentionBlock(nn.Module):
    """One head over all positions, frame by frame and row by row: each sees those before it and itself."""

    def __init__(self, channels: int, seams: Seams):
        super().__init__()
        self.norm = seams.norm(channels)
        self.q, self.k, self.v, self.proj_out = (CausalConv3d(seams.conv3d(channels, channels, 1)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2).unsqueeze(1) for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1).transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(h)


class Refine(nn.Module):
    """What follows an enlargement in time and space: two convolutions, normalised, added to the input."""

    def __init__(self, channels: int, seams: Seams):
        super().__init__()
        self.conv1, self.norm1 = CausalConv3d(seams.conv3d(channels, channels)), seams.norm(channels, UPSAMPLE_EPS)
        self.conv2, self.norm2 = CausalConv3d(seams.conv3d(channels, channels)), seams.norm(channels, UPSAMPLE_EPS)

    def forward(self, x: Tensor) -> Tensor:
        h = whole.norm_silu_conv(self.norm1, self.conv2, self.conv1(x))
        h = self.norm2(h)
        return F.silu(h.add_(x), inplace=not torch.is_grad_enabled())


class Upsample3d(nn.Module):
    """Nearest-neighbour enlargement by 2 in time, height and width."""

    def __init__(self, channels: int, seams: Seams):
        super().__init__()
        self.conv3d = Refine(channels, seams)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv3d(x).add_(x)


class Downsample3d(nn.Module):
    """The halving in time, height and width."""

    def __init__(self, channels: int, seams: Seams):
        super().__init__()
        self.conv = CausalConv3d(seams.conv3d(channels, channels, 3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class FrameResample(Resample):
    """The step in height and width alone."""

    def forward(self, x: Tensor) -> Tensor:
        return by_frames(super().forward, x, x.device)


def _step(channels: int, level: int, is_down: bool, seams: Seams) -> nn.Module:
    """The step after the largest level changes height and width alone, the others change time too."""
    if level == 0:
        return FrameResample(channels, is_down, seams)
    return Downsample3d(channels, seams) if is_down else Upsample3d(channels, seams)


class Decoder(Half):
    def __init__(self, config: CausalConfig, layers: Layers):
        super().__init__(config, True, layers, LATENT_DIFFUSION)
        self.conv_out = self.conv_out.conv  # under the files' name for it

    def last(self, norm: nn.Module, conv: nn.Module, x: Tensor) -> Tensor:
        # Three frames more come out than went in: they stand before the first.
        return whole.norm_silu_conv(norm, CausalConv3d(conv), x)[:, :, 3:]


class CausalVideoVAE(InPieces):
    """Clips and latents, both ways."""

    def __init__(self, config: CausalConfig = CausalConfig(), operations=TorchOperations, dtype: torch.dtype | None = None, device=None):
        super().__init__()
        seams = Seams(operations, dtype, device)
        self.config = config
        layers = Layers(
            conv=lambda *sizes: CausalConv3d(seams.conv3d(*sizes)),
            block=Block,
            norm=seams.norm,
            shortcut=LATENT_DIFFUSION.shortcut,
            attention=lambda channels: AttentionBlock(channels, seams),
            step=lambda *what: _step(*what, seams),
        )
        self.encoder, self.decoder = Half(config, False, layers, LATENT_DIFFUSION), Decoder(config, layers)

    def encode(self, pixels: Tensor) -> Encoded:
        """Encode a clip [B, 3, T, H, W] in -1..1, `self.dtype`."""
        check_video(pixels, self.config.in_channels, "pixels")
        starts = range(0, max(1, pixels.shape[2] - 1), PIECE - 1)
        return Encoded(torch.cat([self.encoder(brought(pixels[:, :, start : start + PIECE], self.device)) for start in starts], dim=2))

    def decode(self, latents: Tensor, home: torch.device | None = None) -> Tensor:
        """Frames [B, 3, T, 8h, 8w], about -1..1, of unscaled latents. A frame that two pieces share is the mean of both."""
        check_video(latents, self.config.latent_channels, "latents")
        length, out, end = self.config.grid.pixel_frames(latents.shape[2]), None, 0
        for start in range(0, latents.shape[2], LATENT_PIECE):
            piece = self.decoder(brought(latents[:, :, start : start + LATENT_PIECE], self.device))
            if out is None:
                shape = (*piece.shape[:2], length, *piece.shape[3:])
                out = torch.empty(shape, dtype=piece.dtype, device=home or piece.device)
            else:
                out[:, :, end - 1] = 0.5 * (out[:, :, end - 1] + piece[:, :, 0].to(out.device))
                piece = piece[:, :, 1:]
            out[:, :, end : end + piece.shape[2]] = piece
            end += piece.shape[2]
        return out
