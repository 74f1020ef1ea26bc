"""The picture autoencoder of Stable Diffusion and SDXL, both halves, under the key names of its diffusers folder; clips frame by frame.

Open-Sora 1.0 and 1.1 use it as it is (sd-vae-ft-ema), 1.2 below a temporal autoencoder (temporal.py). Frames are [N, 3, H, W] in
-1..1, latents [N, 4, H / 8, W / 8].
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..geometry import Grid
from ..geometry_1x import EVERY_FRAME
from ..ops import TorchOperations
from ..shapes import Layout, Shapes, count, size
from .codec import Encoded, Latents, check_video
from .ladder import DIFFUSERS, Half, InPieces, LadderConfig, Layers, Resample, Seams

SCALE = 0.18215  # of Stable Diffusion's latents; 1.2 was trained with it on SDXL's too
FRAMES = 4  # taken at a time
# The attention's layers in files older than diffusers 0.17, and here.
_OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


@dataclass(frozen=True)
class KLConfig(LadderConfig):
    latent_channels: int = 4
    widths: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2

    @classmethod
    def of(cls, shapes: Shapes) -> "KLConfig":
        """Sizes from a file's shapes without prefix. Raises a CheckpointError where one is missing."""
        stem = "encoder.down_blocks."
        widths = tuple(size(shapes, f"{stem}{level}.resnets.0.conv1.bias") for level in range(count(shapes, stem)))
        return cls(size(shapes, "post_quant_conv.bias"), widths, count(shapes, f"{stem}0.resnets."))

    @property
    def latents(self) -> Latents:
        return Latents(self.latent_channels, SCALE)

    @property
    def grid(self) -> Grid:
        return EVERY_FRAME


class AttentionBlock(nn.Module):
    """Single-head attention over all positions, added to the input."""

    def __init__(self, channels: int, seams: Seams):
        super().__init__()
        self.group_norm = seams.norm(channels)
        self.to_q, self.to_k, self.to_v = (seams.linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([seams.linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x).flatten(2).transpose(1, 2)
        q, k, v = (layer(h).unsqueeze(1) for layer in (self.to_q, self.to_k, self.to_v))
        h = self.to_out[0](F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return x + h.transpose(1, 2).reshape(x.shape)


class AutoencoderKL(InPieces):
    """Pictures and latents, both ways; a few at a time."""

    def __init__(self, config: KLConfig = KLConfig(), operations=TorchOperations, dtype: torch.dtype | None = None, device=None):
        super().__init__()
        seams = Seams(operations, dtype, device)
        self.config = config
        layers = Layers(
            conv=seams.conv,
            norm=seams.norm,
            shortcut="conv_shortcut",
            attention=lambda channels: AttentionBlock(channels, seams),
            step=lambda channels, level, is_down: Resample(channels, is_down, seams),
        )
        self.encoder, self.decoder = (Half(config, is_decoder, layers, DIFFUSERS) for is_decoder in (False, True))
        self.quant_conv = seams.conv(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = seams.conv(config.latent_channels, config.latent_channels, 1)

    def encode(self, pixels: Tensor) -> Encoded:
        """Of a clip [B, 3, T, H, W] in -1..1, `self.dtype`."""
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
        part = run(flat[start : start + FRAMES].to(device))
        if out is None:
            out = torch.empty(len(flat), *part.shape[1:], dtype=part.dtype, device=home or part.device)
        out[start : start + FRAMES] = part
    return out.unflatten(0, (len(clip), -1)).transpose(1, 2)


def _renamed(key: str, names: list[tuple[str, str]]) -> str:
    for name, other in names:
        key = key.replace(f".attentions.0{name}", f".attentions.0{other}")
    return key


def _file_name(name: str) -> str:
    return _renamed(name, [(new, old) for old, new in _OLD_NAMES.items()])


# sd-vae-ft-ema's among others.
OLD_DIFFUSERS = Layout(
    mark="encoder.mid_block.attentions.0.query.weight",
    file_name=_file_name,
    convert=lambda key, tensor, config: [(_renamed(key, list(_OLD_NAMES.items())), tensor)],
    manifest=lambda manifest: {_file_name(name): shape for name, shape in manifest.items()},
)
