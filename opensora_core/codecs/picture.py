"""The Flux.1 picture autoencoder, under the key names of its released file (ae.safetensors).

Frames are [B, 3, T, H, W] in -1..1, latents [B, 16, T, H / 8, W / 8] unscaled; every frame is a picture of its own. To draw, the
decoder is enough: a file may hold no more, and no more is read.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError
from ..geometry import CAUSAL, Grid, Tiling
from ..ops import TorchOperations
from ..shapes import Shapes, count, dim, size
from .codec import Encoded, Latents, check_video

GROUPS, NORM_EPS = 32, 1e-6  # of every group norm, whatever the widths
SCALE, SHIFT = 0.3611, 0.1159


@dataclass(frozen=True)
class PictureConfig:
    """Sizes. widths: channels of each resolution, the largest picture first; layers: residual blocks of each in the decoder, one fewer in the
    encoder; has_encoder: whether that is there."""

    latent_channels: int = 16
    widths: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 3
    in_channels: int = 3
    short_tile: int = 0
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
        return cls(channels, widths, layers, has_encoder="encoder.conv_in.weight" in shapes)

    def words(self) -> str:
        """For people: "widths 128/256/512/512, 3 layers per block, 16 latent channels"."""
        return f"widths {'/'.join(map(str, self.widths))}, {self.layers} layers per block, {self.latent_channels} latent channels"

    @property
    def latents(self) -> Latents:
        return Latents(self.latent_channels, SCALE, SHIFT)

    @property
    def grid(self) -> Grid:
        return CAUSAL

    def cut(self, tiling: Tiling) -> Tiling:
        """See CodecConfig. Frames are independent, so only pictures are tiled."""
        return tiling


FLUX_AE = PictureConfig()


class _Seams:
    """How layers are made: a namespace of layer classes (ops.py), a dtype and a device."""

    def __init__(self, operations, dtype, device):
        self._operations, self._place = operations, {"dtype": dtype, "device": device}

    def conv(self, in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> nn.Module:
        padding = kernel // 2 if stride == 1 else 0
        return self._operations.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=padding, **self._place)

    def norm(self, channels: int) -> nn.Module:
        return self._operations.GroupNorm(GROUPS, channels, eps=NORM_EPS, **self._place)


class ResnetBlock(nn.Module):
    """Norm, SiLU, convolution, twice, added to the input (through a 1x1 convolution where the width changes)."""

    def __init__(self, in_channels: int, out_channels: int, seams: _Seams):
        super().__init__()
        self.norm1, self.conv1 = seams.norm(in_channels), seams.conv(in_channels, out_channels)
        self.norm2, self.conv2 = seams.norm(out_channels), seams.conv(out_channels, out_channels)
        self.nin_shortcut = seams.conv(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class AttentionBlock(nn.Module):
    """Single-head attention over all positions, added to the input."""

    def __init__(self, channels: int, seams: _Seams):
        super().__init__()
        self.norm = seams.norm(channels)
        self.q, self.k, self.v, self.proj_out = (seams.conv(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2).unsqueeze(1) for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(h)


class MidBlock(nn.Module):
    def __init__(self, channels: int, seams: _Seams):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, seams)
        self.attn_1 = AttentionBlock(channels, seams)
        self.block_2 = ResnetBlock(channels, channels, seams)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Resample(nn.Module):
    """A convolution that halves a picture, or one that follows its nearest-neighbour enlargement by 2."""

    def __init__(self, channels: int, is_down: bool, seams: _Seams):
        super().__init__()
        self.is_down = is_down
        self.conv = seams.conv(channels, channels, stride=2 if is_down else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.is_down else F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks of one resolution, then the step to the next: "downsample", "upsample" or none."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, step: str, seams: _Seams):
        super().__init__()
        inputs = [in_channels] + [out_channels] * (layers - 1)
        self.block = nn.ModuleList([ResnetBlock(width, out_channels, seams) for width in inputs])
        if step:
            self.add_module(step, Resample(out_channels, step == "downsample", seams))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        for step in list(self.children())[1:]:
            x = step(x)
        return x


class PictureEncoder(nn.Module):
    """Pictures [N, 3, H, W] to means and log-variances [N, 2 * latent_channels, H / 8, W / 8]."""

    def __init__(self, config: PictureConfig, seams: _Seams):
        super().__init__()
        widths = config.widths
        steps = ["downsample"] * (len(widths) - 1) + [""]
        self.conv_in = seams.conv(config.in_channels, widths[0])
        levels = zip((widths[0], *widths[:-1]), widths, steps, strict=True)
        self.down = nn.ModuleList([Level(width_in, width, config.layers - 1, step, seams) for width_in, width, step in levels])
        self.mid = MidBlock(widths[-1], seams)
        self.norm_out = seams.norm(widths[-1])
        self.conv_out = seams.conv(widths[-1], 2 * config.latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class PictureDecoder(nn.Module):
    """Latents [N, C, h, w] to pictures [N, 3, 8h, 8w]."""

    def __init__(self, config: PictureConfig, seams: _Seams):
        super().__init__()
        widths = config.widths
        steps = ["", *["upsample"] * (len(widths) - 1)]
        self.conv_in = seams.conv(config.latent_channels, widths[-1])
        self.mid = MidBlock(widths[-1], seams)
        # `up` counts from the largest picture, which is reached last.
        levels = zip((*widths[1:], widths[-1]), widths, steps, strict=True)
        self.up = nn.ModuleList([Level(width_in, width, config.layers, step, seams) for width_in, width, step in levels])
        self.norm_out = seams.norm(widths[0])
        self.conv_out = seams.conv(widths[0], config.in_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class PictureVAE(nn.Module):
    """Pictures and latents, both ways where the encoder is there."""

    can_park = False
    decode_bytes = encode_bytes = None

    def __init__(self, config: PictureConfig = FLUX_AE, operations=TorchOperations, dtype: torch.dtype | None = None, device=None):
        super().__init__()
        seams = _Seams(operations, dtype, device)
        self.config = config
        self.encoder = PictureEncoder(config, seams) if config.has_encoder else None
        self.decoder = PictureDecoder(config, seams)

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.decoder.conv_in.weight.device

    def encode(self, pixels: Tensor) -> Encoded:
        """Mean and log-variance of the latents of pictures [B, 3, T, H, W] in -1..1, sides multiples of 8."""
        check_video(pixels, self.config.in_channels, "pixels")
        return Encoded(_by_frames(self.encoder, pixels))

    def decode(self, latents: Tensor, home: torch.device | None = None) -> Tensor:
        """Pictures [B, 3, T, 8h, 8w], about -1..1, of unscaled latents [B, C, T, h, w]."""
        check_video(latents, self.config.latent_channels, "latents")
        return _by_frames(self.decoder, latents)


def _by_frames(half: nn.Module, clip: Tensor) -> Tensor:
    return half(clip.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(clip), -1)).transpose(1, 2)
