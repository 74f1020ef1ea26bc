"""The decoder of the Flux.1 picture autoencoder, under the key names of its released file (ae.safetensors).

Pictures are [B, 3, H, W] in about -1..1, latents [B, 16, H / 8, W / 8] in the transformer's scale. The encoder, which the file
holds too, is not needed to draw.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint.detect import Identity
from ..checkpoint.files import Header, quantisation
from ..checkpoint.load import compare, fill, open_model, working_dtype
from ..errors import CheckpointError
from ..ops import TorchOperations
from ..shapes import Manifest, bare_shapes, dim

GROUPS, NORM_EPS = 32, 1e-6  # of every group norm, whatever the widths
SCALE, SHIFT = 0.3611, 0.1159  # transformer latents = SCALE * (autoencoder latents - SHIFT)
DECODER = "decoder."


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes. widths: channels of each resolution, the largest picture first; layers: residual blocks of each in the decoder."""

    latent_channels: int = 16
    widths: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 3


class _Seams:
    """How layers are made: a namespace of layer classes (ops.py), a dtype and a device."""

    def __init__(self, operations, dtype, device):
        self._operations, self._place = operations, {"dtype": dtype, "device": device}

    def conv(self, in_channels: int, out_channels: int, kernel: int = 3) -> nn.Module:
        return self._operations.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, **self._place)

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


class Upsample(nn.Module):
    """Nearest-neighbour enlargement by 2, then a convolution."""

    def __init__(self, channels: int, seams: _Seams):
        super().__init__()
        self.conv = seams.conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class UpBlock(nn.Module):
    """Residual blocks of one resolution, then the step to the next larger one."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, has_step: bool, seams: _Seams):
        super().__init__()
        inputs = [in_channels] + [out_channels] * (layers - 1)
        self.block = nn.ModuleList([ResnetBlock(width, out_channels, seams) for width in inputs])
        self.upsample = Upsample(out_channels, seams) if has_step else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x if self.upsample is None else self.upsample(x)


class PictureDecoder(nn.Module):
    """From latents to pictures."""

    def __init__(self, config: DecoderConfig = DecoderConfig(), operations=TorchOperations, dtype=None, device=None):
        super().__init__()
        seams, widths = _Seams(operations, dtype, device), config.widths
        self.config = config
        self.conv_in = seams.conv(config.latent_channels, widths[-1])
        self.mid = MidBlock(widths[-1], seams)
        inputs = (*widths[1:], widths[-1])
        # `up` counts from the largest picture, which is reached last.
        self.up = nn.ModuleList(
            [
                UpBlock(width_in, width, config.layers, level > 0, seams)
                for level, (width_in, width) in enumerate(zip(inputs, widths, strict=True))
            ]
        )
        self.norm_out = seams.norm(widths[0])
        self.conv_out = seams.conv(widths[0], 3)

    def forward(self, latents: Tensor) -> Tensor:
        """[B, C, h, w] in the transformer's scale -> [B, 3, 8h, 8w], about -1..1."""
        x = self.mid(self.conv_in(latents / SCALE + SHIFT))
        for block in reversed(self.up):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


def decoder_manifest(config: DecoderConfig) -> Manifest:
    """Shape of every tensor of the decoder, without the file's "decoder."."""
    with torch.device("meta"):
        state = PictureDecoder(config).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def open_decoder(path: str | Path) -> tuple[Header, Identity, DecoderConfig]:
    """What `load_decoder` would read, from the header alone.

    Raises:
        CheckpointError: the file is something else, quantised, damaged or not whole.
    """
    header, identity = open_model(path, "flux_vae")
    if form := quantisation(header):
        raise CheckpointError(f"{header.name} is {identity.title}, quantised ({form}); give the bf16 or fp32 file.")
    identity = replace(identity, prefix=identity.prefix + DECODER)
    shapes = bare_shapes(header.shapes, identity.prefix)
    config = _config(shapes, header.name)
    result = compare(shapes, decoder_manifest(config))
    if not result.complete:
        raise CheckpointError(f"{header.name} is {identity.title} but its decoder is not whole; {result.sentence()}. Download it again.")
    return header, identity, config


def load_decoder(path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> PictureDecoder:
    """Read the decoder of a Flux autoencoder file; arguments, result and errors as checkpoint.load.load_transformer's."""
    header, identity, config = open_decoder(path)
    dtype = working_dtype(header, dtype)
    return fill(PictureDecoder(config, dtype=dtype, device="meta"), header, identity.convert, device)


def _config(shapes: Manifest, name: str) -> DecoderConfig:
    levels = len({key.split(".")[1] for key in shapes if key.startswith("up.")})
    layers = len({key.split(".")[3] for key in shapes if key.startswith("up.0.block.")})
    widths = tuple(dim(shapes, f"up.{level}.block.0.conv2.bias", 0, 0) for level in range(levels))
    channels = dim(shapes, "conv_in.weight", 1, 0)
    if (
        levels != len(DecoderConfig.widths)
        or not layers
        or channels != DecoderConfig.latent_channels
        or any(not w or w % GROUPS for w in widths)
    ):
        raise CheckpointError(
            f"{name} cannot be the Flux.1 picture autoencoder: {channels} latent channels (16 expected) and widths {list(widths)} "
            f"(four multiples of {GROUPS} expected)."
        )
    return DecoderConfig(channels, widths, layers)
