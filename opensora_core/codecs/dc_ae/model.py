"""The Video DC-AE, from its released configuration or any of its shape.

Frames are [B, 3, T, H, W] in -1..1, latents [B, 128, T / 4, H / 32, W / 32] as the transformer takes them: there is no scale.
There is no posterior either: a clip has one latent. T is 1 (a picture, one latent frame) or a multiple of 4; one latent frame
is decoded to one frame, n > 1 to 4n. A tile or untiled clip per call; codecs/tiling.py splits larger ones.
State-dict keys are those of the released file.
Source of the formulas: hpcaitech/Open-Sora@7ad6a96a opensora/models/dc_ae/models/dc_ae.py.
"""

import torch
from torch import Tensor, nn

from ...errors import OpenSoraError
from ...geometry import TIME_COMPRESSION
from ...ops import TorchOperations
from ..codec import CodecModule, Encoded, check_video
from .config import DCAEConfig
from .layers import AttentionBlock, ChannelNorm, Conv, Downsample, ResidualConv, Upsample, average_channels

FIRST_ATTENTION = 3  # the first of the stages whose blocks attend
TIME_STEPS = (3, 4)  # the stages that are left (entered, in the decoder) with a step in time as well


class Sequence(nn.Module):
    """Layers one after the other, under the released file's name for that."""

    def __init__(self, layers: list[nn.Module]):
        super().__init__()
        self.op_list = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.op_list:
            x = layer(x)
        return x


def _blocks(config: DCAEConfig, stage: int, depth: int, factory: dict) -> list[nn.Module]:
    block = AttentionBlock if stage >= FIRST_ATTENTION else ResidualConv
    return [block(config.widths[stage], **factory) for _ in range(depth)]


class Encoder(nn.Module):
    """Frames to latents: every stage its blocks, then the step to the next."""

    def __init__(self, config: DCAEConfig, **factory):
        super().__init__()
        widths = config.widths
        self.latent_channels = config.latent_channels
        self.project_in = Conv(config.in_channels, widths[0], **factory)
        self.stages = nn.ModuleList()
        for stage, (width, depth) in enumerate(zip(widths, config.encoder_depths, strict=True)):
            layers = _blocks(config, stage, depth, factory)
            if stage + 1 < len(widths):
                layers.append(Downsample(width, widths[stage + 1], stage in TIME_STEPS, **factory))
            self.stages.append(Sequence(layers))
        self.project_out = nn.ModuleDict({"main": Sequence([Conv(widths[-1], config.latent_channels, **factory)])})

    def forward(self, x: Tensor) -> Tensor:
        x = self.project_in(x)
        for stage in self.stages:
            x = stage(x)
        return self.project_out["main"](x).add_(average_channels(x, self.latent_channels))


class Decoder(nn.Module):
    """Latents to frames: every stage, from the last to the first, the step into it and then its blocks."""

    def __init__(self, config: DCAEConfig, **factory):
        super().__init__()
        widths = config.widths
        self.project_in = nn.ModuleDict({"main": Conv(config.latent_channels, widths[-1], **factory)})
        self.stages = nn.ModuleList()
        for stage, (width, depth) in enumerate(zip(widths, config.decoder_depths, strict=True)):
            layers = _blocks(config, stage, depth, factory)
            if stage + 1 < len(widths):
                layers.insert(0, Upsample(widths[stage + 1], width, stage in TIME_STEPS, **factory))
            self.stages.append(Sequence(layers))
        self.project_out = Sequence([ChannelNorm(widths[0], **factory), nn.ReLU(), Conv(widths[0], config.in_channels, **factory)])

    def forward(self, x: Tensor) -> Tensor:
        main = self.project_in["main"]
        x = main(x).add_(x.repeat_interleave(main.conv.out_channels // x.shape[1], dim=1))
        for stage in reversed(self.stages):
            x = stage(x)
        return self.project_out(x)


class VideoDCAE(CodecModule):
    """The whole autoencoder.

    Args:
        config: widths and depths of six stages.
        operations: namespace of Conv3d.
        dtype, device: of the parameters, which are left uninitialised.

    Raises:
        OpenSoraError: widths this layout cannot have.
    """

    @staticmethod
    def decode_bytes_at_most(config: DCAEConfig, size: tuple[int, int, int], dtype_bytes: int) -> int:
        """A bound of the peak of decoding latents of (frames, height, width): ten times the values of the largest stage."""
        frames, height, width = size
        pixels = TIME_COMPRESSION * frames * config.grid.space**2 * height * width
        return int(10 * dtype_bytes * pixels * max(channels / 4**stage for stage, channels in enumerate(config.widths)))

    def __init__(self, config: DCAEConfig, operations=TorchOperations, dtype: torch.dtype | None = None, device=None):
        super().__init__()
        if problem := config.problem():
            raise OpenSoraError(problem)
        self.config = config
        factory = {"operations": operations, "dtype": dtype, "device": device}
        self.encoder = Encoder(config, **factory)
        self.decoder = Decoder(config, **factory)

    def encode(self, pixels: Tensor) -> Encoded:
        """Latents of a clip; there is no posterior.

        Args:
            pixels: [B, 3, T, H, W], -1..1, `self.dtype`; T = 1 or a multiple of 4, sides multiples of 32.

        Returns:
            Values [B, latent_channels, T / 4 (1 for T = 1), H / 32, W / 32].

        Raises:
            OpenSoraError: another rank, channel count, frame count or size.
        """
        check_video(pixels, self.config.in_channels, "pixels")
        frames = pixels.shape[2]
        if frames > 1 and frames % TIME_COMPRESSION:
            raise OpenSoraError(f"{frames} frames cannot be encoded; the Video DC-AE takes 1 frame or a multiple of {TIME_COMPRESSION}.")
        self.config.grid.check_size(*pixels.shape[3:])
        return Encoded(self.encoder(pixels), has_moments=False)

    def decode(self, latents: Tensor, home: torch.device | None = None) -> Tensor:
        """Frames of a clip.

        Args:
            latents: [B, latent_channels, t, h, w], `self.dtype`.
            home: not made use of: attention needs a whole clip on the device.

        Returns:
            [B, 3, 4 * t (1 for t = 1), 32 * h, 32 * w], about -1..1, not clamped.

        Raises:
            OpenSoraError: another rank or channel count.
        """
        check_video(latents, self.config.latent_channels, "latents")
        return self.decoder(latents)
