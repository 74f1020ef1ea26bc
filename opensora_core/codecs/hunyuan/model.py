"""The causal 3D VAE of Open-Sora 2.0 (the HunyuanVideo VAE), from its released configuration or any of its shape.

Frames are [B, 3, T, H, W] in -1..1, latents [B, 16, (T - 1) / 4 + 1, H / 8, W / 8] as the file's own decoder takes
them: unscaled (the transformer works on LATENT_SCALE times these). GroupNorm statistics span the whole clip, so a
clip's first latent is not the latent of its first frame alone; decoding and encoding are exact for clips.
State-dict keys are those of the released file.
"""

import torch
from torch import Tensor, nn

from ...errors import OpenSoraError
from ...ops import Seams
from .. import ladder
from ..codec import Codec, Encoded
from ..ladder import DIFFUSERS, Layers
from . import memory
from .config import STEPS, VAEConfig
from .layers import CausalConv3d, Downsample, FrameCausalAttention, ResnetBlock, Upsample, norm_silu_conv


class Half(ladder.Half):
    def forward(self, x: Tensor, home: torch.device | None = None) -> Tensor:
        """With a home, every clip after the decoder's middle is parked there, the frames too; only parts come to x's device."""
        device = None if home is None else x.device
        *layers, norm, conv = self.parts()
        for path, layer in zip(self.order, layers, strict=False):
            if not path.startswith("up_blocks"):
                x = layer(x)
                continue
            x = x if home is None else x.to(home)
            x = layer(x, device)
        return norm_silu_conv(norm, conv, x, device)


class CausalVAE(Codec):
    """The whole VAE, one tile or one untiled clip per call; tiling.py splits larger ones.

    Args: as of Codec. Four widths: the layout has three steps between four resolutions; an OpenSoraError for others.
    """

    can_park = True
    decode_bytes = staticmethod(memory.decode_bytes)
    encode_bytes = staticmethod(memory.encode_bytes)
    straight_from = staticmethod(memory.straight_from)

    def add_parts(self, config: VAEConfig, seams: Seams) -> None:
        widths, groups, channels = config.widths, config.norm_groups, config.latent_channels
        if len(widths) != len(STEPS) + 1:
            raise OpenSoraError(f"widths={widths} has {len(widths)} widths; give {len(STEPS) + 1}, as this VAE layout has.")
        if groups < 1 or any(width % groups for width in widths):
            raise OpenSoraError(f"widths={widths} cannot be split into {groups} groups each; use multiples of the narrowest width.")
        seams = seams._replace(groups=groups)

        def conv(*sizes) -> CausalConv3d:
            return CausalConv3d(seams.conv3d(*sizes))

        def step(width: int, level: int, is_down: bool) -> nn.Module:
            if is_down:
                return Downsample(conv(width, width, 3, STEPS[level]))
            return Upsample(conv(width, width), STEPS[-1 - level][0] == 2)

        layers = Layers(conv, seams.group_norm, DIFFUSERS.shortcut, seams.linear, step, ResnetBlock, FrameCausalAttention)
        self.encoder, self.decoder = (Half(config, is_decoder, layers, DIFFUSERS) for is_decoder in (False, True))
        self.quant_conv = seams.conv3d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = seams.conv3d(channels, channels, 1)

    def _encode_clip(self, pixels: Tensor) -> Encoded:
        self.config.grid.frames.check(pixels.shape[2])
        self.config.grid.check_size(*pixels.shape[3:], multiple=self.config.grid.space)
        return Encoded(self.quant_conv(self.encoder(pixels)))

    def _decode_clip(self, latents: Tensor, home: torch.device | None) -> Tensor:
        return self.decoder(self.post_quant_conv(latents), home)
