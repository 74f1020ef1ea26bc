"""The Video DC-AE of Open-Sora 2.0's high-compression variant: downsampling with a shortcut that moves pixels into channels.

Frames are [B, 3, T, H, W] in -1..1, latents [B, 128, T / 4, H / 32, W / 32] as the transformer takes them: there is no scale.
There is no posterior either: a clip has one latent. T is 1 (a picture, one latent frame) or a multiple of 4; one latent frame
is decoded to one frame, n > 1 to 4n. A tile or untiled clip per call; codecs/tiling.py splits larger ones.

Convolutions are padded with zeros on all sides, in time on both: nothing here is causal. Attention is linear in the number of positions
and sees all of them. A clip of one frame is a picture: no step in time happens to it. Parameter names are those of the released file,
which is why some modules here only hold others.
Source of the formulas: hpcaitech/Open-Sora@7ad6a96a opensora/models/dc_ae/models/dc_ae.py and nn/ops.py.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..errors import CheckpointError, OpenSoraError
from ..geometry import HIGH_COMPRESSION, TIME_COMPRESSION, Tiling
from ..ops import Seams
from ..shapes import Shapes, count, size
from .codec import Codec, CodecConfig, Encoded

NORM_EPS = 1e-5
ATTENTION_EPS = 1e-15
HEAD_DIM = 32
EXPANSION = 4  # of the gated convolution
CONTEXT_KERNEL = 5  # of the second scale of attention
FIRST_ATTENTION = 3  # the first of the stages whose blocks attend
TIME_STEPS = (3, 4)  # the stages that are left (entered, in the decoder) with a step in time as well


@dataclass(frozen=True)
class DCAEConfig(CodecConfig):
    """Time x4, space x32, six stages, the last three with attention. The transformer was trained on the latents as they are."""

    grid: ClassVar = HIGH_COMPRESSION
    short_tile: ClassVar = 16
    encoder_depths: tuple[int, ...]
    decoder_depths: tuple[int, ...]
    in_channels: int = 3

    @classmethod
    def of(cls, shapes: Shapes) -> "DCAEConfig | None":
        """Sizes from a file's shapes without prefix; None for a DC-AE of pictures, whose convolutions are 2D.

        Which stages attend and which change time is the released model's. Raises a CheckpointError where a size is missing or cannot be.
        """
        if len(shapes["encoder.stages.0.op_list.0.main.conv1.conv.weight"]) != 5:
            return None
        stages = range(count(shapes, "encoder.stages."))
        # A stage of residual blocks, or of attention.
        blocks = ("main.conv2.norm.bias", "context_module.main.proj.norm.bias")
        keys = [[f"encoder.stages.{stage}.op_list.0.{block}" for block in blocks] for stage in stages]
        widths = tuple(size(shapes, attends if attends in shapes else residual) for residual, attends in keys)
        counts = [[count(shapes, f"{half}.stages.{stage}.op_list.") for stage in stages] for half in ("encoder", "decoder")]
        # But for the last stage, one of them is the step to the next.
        depths = (tuple(number - (stage < len(stages) - 1) for stage, number in zip(stages, half, strict=True)) for half in counts)
        config = cls(
            size(shapes, "encoder.project_out.main.op_list.0.conv.bias"), widths, *depths, size(shapes, "encoder.project_in.conv.weight", 1)
        )
        if problem := config.problem():
            raise CheckpointError(f"{problem} Download the file again.")
        return config

    def words(self) -> str:
        """For people: "widths 128/256/..., blocks 2 2 2 3 3 3 and 3 3 3 3 3 3, 128 latent channels"."""
        depths = (" ".join(map(str, depths)) for depths in (self.encoder_depths, self.decoder_depths))
        return f"widths {'/'.join(map(str, self.widths))}, blocks {' and '.join(depths)}, {self.latent_channels} latent channels"

    def cut(self, tiling: Tiling) -> Tiling:
        """See CodecConfig. Upstream takes 32 frames at a time."""
        return tiling if tiling.temporal_tile else replace(tiling, temporal_tile=32)

    def problem(self) -> str:
        """Why there can be no such autoencoder, in a sentence; "" if there can."""
        steps = list(zip(self.widths, self.widths[1:], strict=False))
        if (
            len(self.widths) == len(self.encoder_depths) == len(self.decoder_depths) == 6
            and min(self.widths) > 0
            and self.latent_channels > 0
            and self.widths[-1] % self.latent_channels == 0
            and all(width % 32 == 0 for width in self.widths[3:])
            and all(4 * one % other == 0 and 4 * other % one == 0 for one, other in steps)
        ):
            return ""
        return (
            f"The widths of this DC-AE cannot be: {list(self.widths)} with {self.latent_channels} latent channels; expected six, the last three "
            "multiples of 32, each a quarter to four times the one before, the last a multiple of the latent channels."
        )


VIDEO_DC_AE = DCAEConfig(128, (128, 256, 512, 512, 1024, 1024), encoder_depths=(2, 2, 2, 3, 3, 3), decoder_depths=(3,) * 6)


class ChannelNorm(nn.Module):
    """Root-mean-square normalisation over channels, in fp32, with weight and bias."""

    def __init__(self, channels: int, seams: Seams):
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.empty(channels, **seams.place)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(norm.square_().div_(x.shape[1]).add_(NORM_EPS))
        # The host may keep parameters elsewhere or in another type.
        weight, bias = (p.to(x.device, x.dtype).view(1, -1, 1, 1, 1) for p in (self.weight, self.bias))
        return (x * scale).to(x.dtype).mul_(weight).add_(bias)


class Conv(nn.Module):
    """A convolution that keeps the size (but for its stride), then a norm if it has one."""

    def __init__(self, in_channels: int, out_channels: int, seams: Seams, kernel=3, *, stride=1, groups=1, bias=True, norm=False):
        super().__init__()
        self.conv = seams.conv3d(in_channels, out_channels, kernel, stride, kernel // 2, groups, bias)
        self.norm = ChannelNorm(out_channels, seams) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x if self.norm is None else self.norm(x)


class ResidualConv(nn.Module):
    """Two convolutions with SiLU between them, added to the input."""

    def __init__(self, channels: int, seams: Seams):
        super().__init__()
        first, second = Conv(channels, channels, seams), Conv(channels, channels, seams, bias=False, norm=True)
        self.main = nn.ModuleDict({"conv1": first, "conv2": second})

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.main["conv1"](x), inplace=True)
        return self.main["conv2"](h).add_(x)


def linear_attention(qkv: Tensor) -> Tensor:
    """Attention with relu(q) . relu(k) as weights, normalised per query, over all positions of a clip: [B, heads * 32, T, H, W].

    qkv: [B, heads * 96, T, H, W]; every 96 channels are q, k and v of one head.
    """
    q, k, v = rearrange(qkv, "b (n three d) t h w -> three b n d (t h w)", three=3, d=HEAD_DIM)
    if qkv.dtype == torch.float16:
        q, k, v = q.float(), k.float(), v.float()  # sums over a clip leave its range
    q, k = F.relu(q), F.relu(k).transpose(-1, -2)
    # One row of ones beside v adds up the weights.
    summed = torch.matmul(F.pad(v, (0, 0, 0, 1), value=1.0), k)
    out = torch.matmul(summed, q).float()
    out = out[:, :, :-1] / (out[:, :, -1:] + ATTENTION_EPS)
    return out.flatten(1, 2).unflatten(-1, qkv.shape[2:]).to(qkv.dtype)


class LinearAttention(nn.Module):
    """Attention at two scales: of each position, and of its surroundings of 5x5x5. Added to the input."""

    def __init__(self, channels: int, seams: Seams):
        super().__init__()
        wide, heads = 3 * channels, channels // HEAD_DIM
        around = seams.conv3d(wide, wide, CONTEXT_KERNEL, padding=CONTEXT_KERNEL // 2, groups=wide, bias=False)
        grouped = seams.conv3d(wide, wide, 1, groups=3 * heads, bias=False)
        self.main = nn.ModuleDict(
            {
                "qkv": Conv(channels, wide, seams, 1, bias=False),
                "aggreg": nn.ModuleList([nn.Sequential(around, grouped)]),
                "proj": Conv(2 * channels, channels, seams, 1, bias=False, norm=True),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.main["qkv"](x)
        # Heads of the two scales never meet before `proj`.
        both = torch.cat((linear_attention(qkv), linear_attention(self.main["aggreg"][0](qkv))), dim=1)
        return self.main["proj"](both).add_(x)


class GatedConv(nn.Module):
    """Widen, look around each position, gate one half of the channels by the other, narrow again. Added to the input."""

    def __init__(self, channels: int, seams: Seams):
        super().__init__()
        wide = 2 * EXPANSION * channels
        self.main = nn.ModuleDict(
            {
                "inverted_conv": Conv(channels, wide, seams, 1),
                "depth_conv": Conv(wide, wide, seams, groups=wide),
                "point_conv": Conv(wide // 2, channels, seams, 1, bias=False, norm=True),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.main["inverted_conv"](x), inplace=True)
        h, gate = self.main["depth_conv"](h).chunk(2, dim=1)
        h = h * F.silu(gate)
        return self.main["point_conv"](h).add_(x)


class AttentionBlock(nn.Module):
    """Linear attention, then a gated convolution."""

    def __init__(self, channels: int, seams: Seams):
        super().__init__()
        self.context_module = LinearAttention(channels, seams)
        self.local_module = GatedConv(channels, seams)

    def forward(self, x: Tensor) -> Tensor:
        return self.local_module(self.context_module(x))


def average_channels(x: Tensor, channels: int) -> Tensor:
    """The means of consecutive groups of channels, so many that `channels` are left."""
    return x.unflatten(1, (channels, -1)).mean(2)


def fold(x: Tensor, time: int) -> Tensor:
    """Every block of time x 2 x 2 positions into channels: [B, C, T, H, W] -> [B, 4 * time * C, T / time, H / 2, W / 2]."""
    return rearrange(x, "b c (t a) (h i) (w j) -> b (c a i j) t h w", a=time, i=2, j=2)


class Downsample(nn.Module):
    """A strided convolution, and as its shortcut the pixels folded into channels and averaged.

    halves_time: whether four frames become two beside the halved sides; never for a clip of one frame.
    """

    def __init__(self, in_channels: int, out_channels: int, halves_time: bool, seams: Seams):
        super().__init__()
        self.halves_time, self.out_channels = halves_time, out_channels
        self.main = Conv(in_channels, out_channels, seams, stride=(1 + halves_time, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        time = 2 if self.halves_time and x.shape[2] > 1 else 1
        return self.main(x).add_(average_channels(fold(x, time), self.out_channels))


class Upsample(nn.Module):
    """Nearest-neighbour enlargement and a convolution, and as its shortcut channels repeated and unfolded into pixels."""

    def __init__(self, in_channels: int, out_channels: int, doubles_time: bool, seams: Seams):
        super().__init__()
        self.doubles_time, self.out_channels = doubles_time, out_channels
        self.main = nn.ModuleDict({"conv": Conv(in_channels, out_channels, seams)})

    def forward(self, x: Tensor) -> Tensor:
        time = 2 if self.doubles_time and x.shape[2] > 1 else 1
        large = self.main["conv"](F.interpolate(x, scale_factor=(time, 2, 2), mode="nearest"))
        repeats = 4 * time * self.out_channels // x.shape[1]
        return large.add_(rearrange(x.repeat_interleave(repeats, dim=1), "b (c a i j) t h w -> b c (t a) (h i) (w j)", a=time, i=2, j=2))


def _blocks(config: DCAEConfig, stage: int, depth: int, seams: Seams) -> list[nn.Module]:
    block = AttentionBlock if stage >= FIRST_ATTENTION else ResidualConv
    return [block(config.widths[stage], seams) for _ in range(depth)]


def _in_turn(layers: list[nn.Module]) -> nn.ModuleDict:
    """Layers one after the other, under the released file's name for that."""
    return nn.ModuleDict({"op_list": nn.Sequential(*layers)})


class Encoder(nn.Module):
    """Frames to latents: every stage its blocks, then the step to the next."""

    def __init__(self, config: DCAEConfig, seams: Seams):
        super().__init__()
        widths = config.widths
        self.project_in = Conv(config.in_channels, widths[0], seams)
        self.stages = nn.ModuleList()
        for stage, depth in enumerate(config.encoder_depths):
            steps = [Downsample(widths[stage], widths[stage + 1], stage in TIME_STEPS, seams)] if stage + 1 < len(widths) else []
            self.stages.append(_in_turn([*_blocks(config, stage, depth, seams), *steps]))
        self.project_out = nn.ModuleDict({"main": _in_turn([Conv(widths[-1], config.latent_channels, seams)])})

    def forward(self, x: Tensor) -> Tensor:
        x = self.project_in(x)
        for stage in self.stages:
            x = stage["op_list"](x)
        (out,) = self.project_out["main"]["op_list"]
        return out(x).add_(average_channels(x, out.conv.out_channels))


class Decoder(nn.Module):
    """Latents to frames: every stage, from the last to the first, the step into it and then its blocks."""

    def __init__(self, config: DCAEConfig, seams: Seams):
        super().__init__()
        widths = config.widths
        self.project_in = nn.ModuleDict({"main": Conv(config.latent_channels, widths[-1], seams)})
        self.stages = nn.ModuleList()
        for stage, depth in enumerate(config.decoder_depths):
            steps = [Upsample(widths[stage + 1], widths[stage], stage in TIME_STEPS, seams)] if stage + 1 < len(widths) else []
            self.stages.append(_in_turn([*steps, *_blocks(config, stage, depth, seams)]))
        self.project_out = _in_turn([ChannelNorm(widths[0], seams), nn.ReLU(), Conv(widths[0], config.in_channels, seams)])

    def forward(self, x: Tensor) -> Tensor:
        main = self.project_in["main"]
        x = main(x).add_(x.repeat_interleave(main.conv.out_channels // x.shape[1], dim=1))
        for stage in reversed(self.stages):
            x = stage["op_list"](x)
        return self.project_out["op_list"](x)


class VideoDCAE(Codec):
    """The whole autoencoder. A home is not made use of: attention needs a whole clip on the device."""

    @staticmethod
    def decode_bytes_at_most(config: DCAEConfig, size: tuple[int, int, int], dtype_bytes: int) -> int:
        """A bound of the peak of decoding latents of (frames, height, width): ten times the values of the largest stage."""
        frames, height, width = size
        pixels = TIME_COMPRESSION * frames * config.grid.space**2 * height * width
        return int(10 * dtype_bytes * pixels * max(channels / 4**stage for stage, channels in enumerate(config.widths)))

    def add_parts(self, config: DCAEConfig, seams: Seams) -> None:
        if problem := config.problem():
            raise OpenSoraError(problem)
        self.encoder, self.decoder = Encoder(config, seams), Decoder(config, seams)

    def _encode_clip(self, pixels: Tensor) -> Encoded:
        frames = pixels.shape[2]
        if frames > 1 and frames % TIME_COMPRESSION:
            raise OpenSoraError(f"{frames} frames cannot be encoded; give the Video DC-AE 1 frame or a multiple of {TIME_COMPRESSION}.")
        self.config.grid.check_size(*pixels.shape[3:])
        return Encoded(self.encoder(pixels), has_moments=False)

    def _decode_clip(self, latents: Tensor, home: torch.device | None) -> Tensor:
        return self.decoder(latents)
