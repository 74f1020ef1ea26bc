"""The video autoencoder of Open-Sora 1.2: SDXL's picture autoencoder, frame by frame, and a temporal one over its latents.

Frames are [B, 3, T, H, W] in -1..1, latents [B, 4, t, H / 8, W / 8] unscaled: 5 for each piece of 17 frames, 1 for a picture.
State-dict keys are those of the released file, which holds both; each may have a file of its own too.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..geometry import TIME_COMPRESSION
from ..geometry.open_sora_1 import PIECES
from ..ops import Seams
from ..shapes import AS_RELEASED, Layout, Shapes, bare_shapes, size
from .causal import LATENT_PIECE, PIECE, CausalConv3d
from .codec import Codec, Encoded, WidthsConfig, check_video, levels_of
from .hunyuan.layers import ResnetBlock
from .ladder import Chain, Layers, brought, joined
from .picture import FRAMES, KL_LAYOUTS, KL_SCALE, KLConfig, PictureVAE

NORM_EPS = 1e-5
SHIFT, SPREAD = (-0.10, 0.34, 0.27, 0.98), (3.85, 2.32, 2.33, 3.06)
HALVES_TIME = (1, 2)  # the encoder's levels after which there are half as many frames
SPATIAL, TEMPORAL = "spatial_vae.module.", "temporal_vae."
_OF_TEMPORAL = re.compile(r"((en|de)coder\.)?((block_res_|res_|conv_)blocks|norm1|\w+\.conv)\.")  # in a file of its own


@dataclass(frozen=True)
class TemporalConfig(WidthsConfig):
    """Sizes of the temporal autoencoder, whose levels are of time; spatial: of the picture autoencoder."""

    grid: ClassVar = PIECES
    scale: ClassVar = tuple(1 / spread for spread in SPREAD)
    shift: ClassVar = SHIFT
    latent_channels: int = 4
    widths: tuple[int, ...] = (128, 256, 256, 512)
    layers: int = 4
    spatial: KLConfig = KLConfig()

    @classmethod
    def of(cls, shapes: Shapes) -> "TemporalConfig":
        """Sizes from a file's shapes without prefix. Raises a CheckpointError where one is missing."""
        temporal, spatial = (bare_shapes(shapes, prefix) or shapes for prefix in (TEMPORAL, SPATIAL))
        levels = levels_of(temporal, "encoder.block_res_blocks.", "", "norm2.bias")
        return cls(size(temporal, "post_quant_conv.conv.bias"), *levels, spatial=KLConfig.of(spatial))


@dataclass(frozen=True)
class TwoStages(Encoded):
    """Moments of the picture autoencoder [B, 2C, T, h, w]; the temporal one encodes their mean, or a sample, piece by piece.

    Samples draw as upstream does: for a few pictures at a time, then for each piece.
    stage: the second: unscaled latents of pictures [B, C, up to 17, h, w] -> moments.
    """

    stage: Callable[[Tensor], Tensor] = None

    def mode(self) -> Tensor:
        return self._through(super().mode(), Encoded.mode)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        draw = partial(Encoded.sample, generator=generator)
        parts = self.values.transpose(1, 2).flatten(0, 1).split(FRAMES)
        pictures = torch.cat([draw(Encoded(part)) for part in parts]).unflatten(0, (len(self.values), -1)).transpose(1, 2)
        return self._through(pictures, draw)

    def _through(self, pictures: Tensor, finish: Callable[[Encoded], Tensor]) -> Tensor:
        return torch.cat([finish(Encoded(self.stage(piece).to(pictures))) for piece in pictures.split(PIECE, dim=2)], dim=2)


class Deal(CausalConv3d):
    """A convolution to twice the channels, which are dealt out to twice the frames: channel 2c + i is channel c of frame 2t + i."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).unflatten(1, (-1, 2)).transpose(2, 3).flatten(2, 3)


class Encoder(Chain):
    def __init__(self, config: TemporalConfig, seams: Seams, layers: Layers):
        super().__init__()
        widths = config.widths
        self.add("conv_in", layers.conv(config.latent_channels, widths[0]))
        for level, width in enumerate(widths):
            self.add_blocks(f"block_res_blocks.{level}", (widths[max(0, level - 1)], width), config.layers, layers)
            if level in HALVES_TIME:
                self.add(f"conv_blocks.{level}", CausalConv3d(seams.conv3d(width, width, 3, (2, 1, 1)), lead=1))
        self.add_blocks("res_blocks", (widths[-1], widths[-1]), config.layers, layers)
        self.add("norm1", layers.norm(widths[-1]))
        self.add("conv2", CausalConv3d(seams.conv3d(widths[-1], 2 * config.latent_channels, 1)))


class Decoder(Chain):
    def __init__(self, config: TemporalConfig, seams: Seams, layers: Layers):
        super().__init__()
        widths = config.widths
        self.add("conv1", CausalConv3d(seams.conv3d(config.latent_channels, widths[-1])))
        self.add_blocks("res_blocks", (widths[-1], widths[-1]), config.layers, layers)
        for level in reversed(range(len(widths))):
            self.add_blocks(f"block_res_blocks.{level}", ((*widths, widths[-1])[level + 1], widths[level]), config.layers, layers)
            if level - 1 in HALVES_TIME:
                self.add(f"conv_blocks.{level - 1}", Deal(seams.conv3d(widths[level], 2 * widths[level])))
        self.add("norm1", layers.norm(widths[0]))
        self.add("conv_out", CausalConv3d(seams.conv3d(widths[0], config.latent_channels)))


class TemporalVAE(nn.Module):
    """Latents of pictures and latents of clips, both ways, of one piece."""

    def __init__(self, config: TemporalConfig, seams: Seams):
        super().__init__()
        norm = partial(seams.group_norm, eps=NORM_EPS)
        layers = Layers(lambda *sizes: CausalConv3d(seams.conv3d(*sizes, bias=False)), norm, "conv3", block=ResnetBlock)
        self.encoder, self.decoder = Encoder(config, seams, layers), Decoder(config, seams, layers)
        self.quant_conv = CausalConv3d(seams.conv3d(2 * config.latent_channels, 2 * config.latent_channels, 1))
        self.post_quant_conv = CausalConv3d(seams.conv3d(config.latent_channels, config.latent_channels, 1))

    def encode(self, x: Tensor) -> Tensor:
        """[B, C, T, h, w] -> moments [B, 2C, ceil(T / 4), h, w]; zeros stand before the first frame where T is no multiple."""
        return self.quant_conv(self.encoder(F.pad(x, (0, 0, 0, 0, -x.shape[2] % TIME_COMPRESSION, 0))))

    def decode(self, z: Tensor, num_frames: int) -> Tensor:
        return self.decoder(self.post_quant_conv(z))[:, :, -num_frames:]


class TwoStageVAE(Codec):
    """Clips and latents, both ways."""

    can_park = True

    def add_parts(self, config: TemporalConfig, seams: Seams) -> None:
        self.spatial_vae = nn.Module()
        self.spatial_vae.module = PictureVAE(config.spatial, seams.operations, seams.dtype, seams.device)
        self.temporal_vae = TemporalVAE(config, seams)
        # In the file, and the same in all; what is computed with stands above.
        for name, values in (("scale", SPREAD), ("shift", SHIFT)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1, 1))

    def _encode_clip(self, pixels: Tensor) -> TwoStages:
        return TwoStages(self.spatial_vae.module.encode(pixels).values, stage=self._second_stage)

    def _second_stage(self, pictures: Tensor) -> Tensor:
        return self.temporal_vae.encode(brought(pictures, self.device).to(self.dtype) * KL_SCALE)

    def decode(self, latents: Tensor, home: torch.device | None = None, num_frames: int | None = None) -> Tensor:
        """As Codec.decode. num_frames: where a clip is no multiple of 17 frames and its last latent stands for fewer than 4; None = as many as there can be."""
        check_video(latents, self.config.latent_channels, "latents")
        length = num_frames or self.config.grid.pixel_frames(latents.shape[2])

        def decoded(index: int, z: Tensor) -> Tensor:
            pictures = self.temporal_vae.decode(brought(z, self.device), min(PIECE, length - PIECE * index))
            return self.spatial_vae.module.decode(pictures / KL_SCALE, home)

        return joined((decoded(*each) for each in enumerate(latents.split(LATENT_PIECE, dim=2))), length, home)


def _in_two(pictures: Layout) -> Layout:
    """The temporal autoencoder in a file of its own, and the picture autoencoder in one of its layouts, read together."""

    def convert(key: str, tensor: Tensor, config: TemporalConfig) -> list[tuple[str, Tensor]]:
        if _OF_TEMPORAL.match(name := _alone(key)):
            return [(f"{TEMPORAL}{name}", tensor)]
        names = pictures.convert(key, tensor, config.spatial) if key not in ("scale", "shift") else []
        return [(f"{SPATIAL}{name}", tensor) for name, tensor in names]

    return Layout(
        mark=pictures.mark or "encoder.conv_in.weight",
        words=" in two files",
        file_name=_alone,
        convert=convert,
        manifest=lambda manifest: bare_shapes(manifest, TEMPORAL) | pictures.manifest(bare_shapes(manifest, SPATIAL)),
    )


def _alone(name: str) -> str:
    return name.removeprefix(TEMPORAL)


LAYOUTS = (*map(_in_two, KL_LAYOUTS), AS_RELEASED)
