"""The layers of the Video DC-AE: convolution, residual block, linear attention, resampling with a shortcut that moves pixels into channels.

Tensors are [B, C, T, H, W]. Convolutions are padded with zeros on all sides, in time on both: nothing here is causal. Attention
is linear in the number of positions and sees all of them. A clip of one frame is a picture: no step in time happens to it.
Parameter names are those of the released file, which is why some modules here only hold others.
Source of the formulas: hpcaitech/Open-Sora@7ad6a96a opensora/models/dc_ae/models/nn/ops.py.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

NORM_EPS = 1e-5
ATTENTION_EPS = 1e-15
HEAD_DIM = 32
EXPANSION = 4  # of the gated convolution
CONTEXT_KERNEL = 5  # of the second scale of attention


class ChannelNorm(nn.Module):
    """Root-mean-square normalisation over channels, in fp32, with weight and bias."""

    def __init__(self, channels: int, *, operations=None, dtype=None, device=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(channels, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(norm.square_().div_(x.shape[1]).add_(NORM_EPS))
        # The host may keep parameters elsewhere or in another type.
        weight, bias = (p.to(x.device, x.dtype).view(1, -1, 1, 1, 1) for p in (self.weight, self.bias))
        return (x * scale).to(x.dtype).mul_(weight).add_(bias)


class Conv(nn.Module):
    """A convolution that keeps the size (but for its stride), then a norm if it has one."""

    def __init__(self, in_channels, out_channels, kernel=3, *, stride=(1, 1, 1), groups=1, bias=True, norm=False, **factory):
        super().__init__()
        place = {"dtype": factory["dtype"], "device": factory["device"]}
        convolution = factory["operations"].Conv3d
        self.conv = convolution(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=bias, **place)
        self.norm = ChannelNorm(out_channels, **factory) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x if self.norm is None else self.norm(x)


class ResidualConv(nn.Module):
    """Two convolutions with SiLU between them, added to the input."""

    def __init__(self, channels: int, **factory):
        super().__init__()
        first, second = Conv(channels, channels, **factory), Conv(channels, channels, bias=False, norm=True, **factory)
        self.main = nn.ModuleDict({"conv1": first, "conv2": second})

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.main["conv1"](x), inplace=True)
        return self.main["conv2"](h).add_(x)


def linear_attention(qkv: Tensor) -> Tensor:
    """Attention with relu(q) . relu(k) as weights, normalised per query, over all positions of a clip.

    Args:
        qkv: [B, heads * 96, T, H, W]; every 96 channels are q, k and v of one head.

    Returns:
        [B, heads * 32, T, H, W].
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

    def __init__(self, channels: int, **factory):
        super().__init__()
        wide, heads = 3 * channels, channels // HEAD_DIM
        operations, place = factory["operations"], {"dtype": factory["dtype"], "device": factory["device"]}
        kernel = CONTEXT_KERNEL
        surroundings = [
            operations.Conv3d(wide, wide, kernel, padding=kernel // 2, groups=wide, bias=False, **place),
            operations.Conv3d(wide, wide, 1, groups=3 * heads, bias=False, **place),
        ]
        self.main = nn.ModuleDict(
            {
                "qkv": Conv(channels, wide, 1, bias=False, **factory),
                "aggreg": nn.ModuleList([nn.ModuleList(surroundings)]),
                "proj": Conv(2 * channels, channels, 1, bias=False, norm=True, **factory),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.main["qkv"](x)
        around, grouped = self.main["aggreg"][0]
        # Heads of the two scales never meet before `proj`.
        both = torch.cat((linear_attention(qkv), linear_attention(grouped(around(qkv)))), dim=1)
        return self.main["proj"](both).add_(x)


class GatedConv(nn.Module):
    """Widen, look around each position, gate one half of the channels by the other, narrow again. Added to the input."""

    def __init__(self, channels: int, **factory):
        super().__init__()
        wide = 2 * EXPANSION * channels
        self.main = nn.ModuleDict(
            {
                "inverted_conv": Conv(channels, wide, 1, **factory),
                "depth_conv": Conv(wide, wide, groups=wide, **factory),
                "point_conv": Conv(wide // 2, channels, 1, bias=False, norm=True, **factory),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.main["inverted_conv"](x), inplace=True)
        h, gate = self.main["depth_conv"](h).chunk(2, dim=1)
        h = h * F.silu(gate)
        return self.main["point_conv"](h).add_(x)


class AttentionBlock(nn.Module):
    """Linear attention, then a gated convolution."""

    def __init__(self, channels: int, **factory):
        super().__init__()
        self.context_module = LinearAttention(channels, **factory)
        self.local_module = GatedConv(channels, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.local_module(self.context_module(x))


def average_channels(x: Tensor, channels: int) -> Tensor:
    """The means of consecutive groups of channels, so many that `channels` are left."""
    return x.unflatten(1, (channels, -1)).mean(2)


def fold(x: Tensor, time: int) -> Tensor:
    """Every block of time x 2 x 2 positions into channels: [B, C, T, H, W] -> [B, 4 * time * C, T / time, H / 2, W / 2]."""
    return rearrange(x, "b c (t a) (h i) (w j) -> b (c a i j) t h w", a=time, i=2, j=2)


def unfold(x: Tensor, time: int) -> Tensor:
    """The inverse of fold."""
    return rearrange(x, "b (c a i j) t h w -> b c (t a) (h i) (w j)", a=time, i=2, j=2)


class Downsample(nn.Module):
    """A strided convolution, and as its shortcut the pixels folded into channels and averaged.

    Args:
        halves_time: whether four frames become two beside the halved sides; never for a clip of one frame.
    """

    def __init__(self, in_channels: int, out_channels: int, halves_time: bool, **factory):
        super().__init__()
        self.halves_time, self.out_channels = halves_time, out_channels
        self.main = Conv(in_channels, out_channels, stride=(1 + halves_time, 2, 2), **factory)

    def forward(self, x: Tensor) -> Tensor:
        time = 2 if self.halves_time and x.shape[2] > 1 else 1
        return self.main(x).add_(average_channels(fold(x, time), self.out_channels))


class Upsample(nn.Module):
    """Nearest-neighbour enlargement and a convolution, and as its shortcut channels repeated and unfolded into pixels."""

    def __init__(self, in_channels: int, out_channels: int, doubles_time: bool, **factory):
        super().__init__()
        self.doubles_time, self.out_channels = doubles_time, out_channels
        self.main = nn.ModuleDict({"conv": Conv(in_channels, out_channels, **factory)})

    def forward(self, x: Tensor) -> Tensor:
        time = 2 if self.doubles_time and x.shape[2] > 1 else 1
        large = self.main["conv"](F.interpolate(x, scale_factor=(time, 2, 2), mode="nearest"))
        repeats = 4 * time * self.out_channels // x.shape[1]
        return large.add_(unfold(x.repeat_interleave(repeats, dim=1), time))
