"""The causal 3D VAE of Open-Sora 2.0 (the HunyuanVideo VAE), from its released configuration or any of its shape.

Frames are [B, 3, T, H, W] in -1..1, latents [B, 16, (T - 1) / 4 + 1, H / 8, W / 8] as the file's own decoder takes
them: unscaled (the transformer works on LATENT_SCALE times these). GroupNorm statistics span the whole clip, so a
clip's first latent is not the latent of its first frame alone; decoding and encoding are exact for clips.
State-dict keys are those of the released file.
"""

import torch
from torch import Tensor, nn

from ...errors import OpenSoraError
from ...ops import TorchOperations
from ..codec import CodecModule, Encoded, check_video
from . import memory
from .config import STEPS, VAEConfig
from .layers import NORM_EPS, CausalConv3d, Downsample, MidBlock, ResnetBlock, Upsample, norm_silu_conv


class DownBlock(nn.Module):
    """Residual blocks of one resolution, then the step to the next. Holds names; `Encoder` runs the layers."""

    def __init__(self, in_channels, out_channels, groups, num_layers, step, **factory):
        super().__init__()
        self.resnets = _resnets(in_channels, out_channels, groups, num_layers, factory)
        self.downsamplers = nn.ModuleList([Downsample(out_channels, step, **factory)] if step else [])


class UpBlock(nn.Module):
    """Residual blocks of one resolution, then the step to the next. Holds names; `Decoder` runs the layers."""

    def __init__(self, in_channels, out_channels, groups, num_layers, step, **factory):
        super().__init__()
        self.resnets = _resnets(in_channels, out_channels, groups, num_layers, factory)
        self.upsamplers = nn.ModuleList([Upsample(out_channels, step, **factory)] if step else [])


def _resnets(in_channels: int, out_channels: int, groups: int, num_layers: int, factory: dict) -> nn.ModuleList:
    inputs = [in_channels] + [out_channels] * (num_layers - 1)
    return nn.ModuleList([ResnetBlock(width, out_channels, groups, **factory) for width in inputs])


class Encoder(nn.Module):
    """Frames [B, 3, T, H, W] to 2 * latent_channels values per latent position, before `quant_conv`."""

    def __init__(self, config: VAEConfig, **factory):
        super().__init__()
        widths, groups = config.widths, config.norm_groups
        self.conv_in = CausalConv3d(config.in_channels, widths[0], **factory)
        inputs = (widths[0], *widths[:-1])
        self.down_blocks = nn.ModuleList(
            [
                DownBlock(width_in, width, groups, config.layers, step, **factory)
                for width_in, width, step in zip(inputs, widths, (*STEPS, None), strict=True)
            ]
        )
        self.mid_block = MidBlock(widths[-1], groups, **factory)
        self.conv_norm_out = factory["operations"].GroupNorm(
            groups, widths[-1], eps=NORM_EPS, dtype=factory["dtype"], device=factory["device"]
        )
        self.conv_out = CausalConv3d(widths[-1], 2 * config.latent_channels, **factory)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        # Layer by layer: a caller that waits for a block keeps the block's input alive, at full size here.
        for block in self.down_blocks:
            for layer in (*block.resnets, *block.downsamplers):
                x = layer(x)
        x = self.mid_block(x)
        return norm_silu_conv(self.conv_norm_out, self.conv_out, x)


class Decoder(nn.Module):
    """Latents after `post_quant_conv` to frames [B, 3, T, H, W]. One more residual block per level than the encoder."""

    def __init__(self, config: VAEConfig, **factory):
        super().__init__()
        widths, groups = config.widths[::-1], config.norm_groups
        self.conv_in = CausalConv3d(config.latent_channels, widths[0], **factory)
        self.mid_block = MidBlock(widths[0], groups, **factory)
        inputs = (widths[0], *widths[:-1])
        self.up_blocks = nn.ModuleList(
            [
                UpBlock(width_in, width, groups, config.layers + 1, step, **factory)
                for width_in, width, step in zip(inputs, widths, (*STEPS, None), strict=True)
            ]
        )
        self.conv_norm_out = factory["operations"].GroupNorm(
            groups, widths[-1], eps=NORM_EPS, dtype=factory["dtype"], device=factory["device"]
        )
        self.conv_out = CausalConv3d(widths[-1], config.in_channels, **factory)

    def forward(self, x: Tensor, home: torch.device | None = None) -> Tensor:
        """With a home, every clip after the middle block is parked there, the frames too; only parts come to x's device."""
        device = x.device if home is not None else None
        x = self.conv_in(x)
        x = self.mid_block(x)
        x = x if home is None else x.to(home)
        # Layer by layer: a caller that waits for a block keeps the block's input alive, twice the width of the rest.
        for block in self.up_blocks:
            for layer in (*block.resnets, *block.upsamplers):
                x = layer(x, device)
        return norm_silu_conv(self.conv_norm_out, self.conv_out, x, device)


class CausalVAE(CodecModule):
    """The whole VAE, one tile or one untiled clip per call; tiling.py splits larger ones.

    Args:
        config: widths and depths. Four widths: the layout has three steps between four resolutions.
        operations: namespace of Conv3d, GroupNorm and Linear.
        dtype, device: of the parameters, which are left uninitialised.

    Raises:
        OpenSoraError: widths this layout cannot have.
    """

    can_park = True
    decode_bytes = staticmethod(memory.decode_bytes)
    encode_bytes = staticmethod(memory.encode_bytes)
    straight_from = staticmethod(memory.straight_from)

    def __init__(self, config: VAEConfig, operations=TorchOperations, dtype: torch.dtype | None = None, device=None):
        super().__init__()
        _check_config(config)
        self.config = config
        factory = {"operations": operations, "dtype": dtype, "device": device}
        channels = config.latent_channels
        self.encoder = Encoder(config, **factory)
        self.decoder = Decoder(config, **factory)
        self.quant_conv = operations.Conv3d(2 * channels, 2 * channels, 1, dtype=dtype, device=device)
        self.post_quant_conv = operations.Conv3d(channels, channels, 1, dtype=dtype, device=device)

    def encode(self, pixels: Tensor) -> Encoded:
        """Mean and log-variance of the latents of a clip.

        Args:
            pixels: [B, 3, T, H, W], -1..1, `self.dtype`; T = 4k + 1, sides multiples of 8.

        Returns:
            Moments [B, 2 * latent_channels, (T - 1) / 4 + 1, H / 8, W / 8].

        Raises:
            OpenSoraError: another rank, channel count, frame count or size.
        """
        check_video(pixels, self.config.in_channels, "pixels")
        self.config.grid.check_num_frames(pixels.shape[2])
        self.config.grid.check_size(*pixels.shape[3:], multiple=self.config.grid.space)
        return Encoded(self.quant_conv(self.encoder(pixels)))

    def decode(self, latents: Tensor, home: torch.device | None = None) -> Tensor:
        """Frames of a clip.

        Args:
            latents: [B, latent_channels, t, h, w], unscaled, `self.dtype`.
            home: where activations larger than the middle block's are parked between layers, with parts of them only on
                the latents' device; None for all of them there. It makes no difference to the frames.

        Returns:
            [B, 3, 4 * (t - 1) + 1, 8 * h, 8 * w], about -1..1, not clamped; at home, if one is given.

        Raises:
            OpenSoraError: another rank or channel count.
        """
        check_video(latents, self.config.latent_channels, "latents")
        return self.decoder(self.post_quant_conv(latents), home)


def _check_config(config: VAEConfig) -> None:
    widths, groups = config.widths, config.norm_groups
    if len(widths) != len(STEPS) + 1:
        raise OpenSoraError(f"widths={widths} has {len(widths)} widths; this VAE layout has {len(STEPS) + 1}.")
    if groups < 1 or any(width % groups for width in widths):
        raise OpenSoraError(f"widths={widths} cannot be split into {groups} groups each; use multiples of the narrowest width.")
