"""The layers of the causal 3D VAE: convolution, residual block, frame-causal attention, up- and downsampling.

Tensors are [B, C, T, H, W]: batch, channels, frames, height, width. Every convolution repeats its border values,
in time only on the past side. Parameter names are those of the released HunyuanVideo VAE file.

Large tensors are normalised and convolved a few frames at a time, with the statistics of the whole clip: a clip's
normalised copy, its padded copy and the library's own work buffers never exist at full size. The result is the same
to rounding, and on a CPU it is faster (measured by benchmarks/vae_decode.py).

Where a layer is given a `device`, its input may be parked on another, in main memory: parts of it are brought to the
device as they are needed, and the output is parked where the input is. Statistics are taken of one group of channels
at a time and parts are the same, so the same kernels see the same values: parking changes no result.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ladder
from ..ladder import AttentionBlock, joined

KERNEL = 3

# Elements of one chunk. On a CPU about what a cache holds and the allocator serves without fresh pages; elsewhere large
# enough to fill the device, and far below the 2**31 elements that kernels index.
CHUNK_ELEMENTS_CPU = 2**21
CHUNK_ELEMENTS = 2**26


def chunk_frames(x: Tensor, device: torch.device | None = None) -> int:
    """Frames of x [B, C, T, H, W] that one chunk on `device` (x's without one) holds, at least 2."""
    limit = CHUNK_ELEMENTS_CPU if (device or x.device).type == "cpu" else CHUNK_ELEMENTS
    return max(2, limit * x.shape[2] // max(1, x.numel()))


def bring(part: Tensor, device: torch.device | None) -> Tensor:
    """A part of a clip where it is worked on: where it is, without a device."""
    return part if device is None else part.to(device)


class CausalConv3d(nn.Module):
    """A convolution of kernel 1 or 3 whose output frame t reads input frames up to t * stride only. conv: a plain one."""

    def __init__(self, conv: nn.Module):
        super().__init__()
        self.conv, self.kernel_size, self.time_stride = conv, conv.kernel_size[0], conv.stride[0]
        self.lead = self.kernel_size - 1  # frames that it reads before the first

    def forward(self, x: Tensor) -> Tensor:
        num_frames = (x.shape[2] - 1) // self.time_stride + 1
        step = max(1, chunk_frames(x) // self.time_stride)
        if step >= num_frames:
            return self.frames(x, 0, num_frames)
        return _in_chunks(lambda start, stop: self.frames(x, start, stop), num_frames, step, x.device)

    def frames(self, x: Tensor, start: int, stop: int, prepare: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Output frames start .. stop - 1 of the clip x, each part of the input passed through `prepare` first."""
        first = start * self.time_stride
        used = x[:, :, max(0, first - self.lead) : (stop - 1) * self.time_stride + 1]
        used = used if prepare is None else prepare(used)
        return self.conv(used if self.kernel_size == 1 else self.padded(used, max(0, self.lead - first)))

    def padded(self, x: Tensor, before: int) -> Tensor:
        """x with one more pixel on every side and so many more frames before the first: border values are repeated."""
        return F.pad(x, (1, 1, 1, 1, before, 0), mode="replicate")


def _in_chunks(part_of: Callable[[int, int], Tensor], num_frames: int, step: int, home: torch.device) -> Tensor:
    """One tensor of `num_frames` frames, kept at home, from the parts that part_of(start, stop) gives."""
    return joined((part_of(start, min(start + step, num_frames)) for start in range(0, num_frames, step)), num_frames, home)


def norm_silu_conv(norm: nn.Module, conv: CausalConv3d, x: Tensor, device: torch.device | None = None) -> Tensor:
    """conv(silu(norm(x))), in chunks where x is larger than one. `conv` has stride 1."""
    step = chunk_frames(x, device)
    if step >= x.shape[2]:
        h = norm(bring(x, device))
        h = F.silu(h, inplace=True)
        h = conv(h)
        return h.to(x.device)
    prepare = _normaliser(norm, x, device)
    return _in_chunks(lambda start, stop: conv.frames(x, start, stop, prepare), x.shape[2], step, x.device)


def _normaliser(norm: nn.Module, x: Tensor, device: torch.device | None) -> Callable[[Tensor], Tensor]:
    """silu(norm(...)), on the device, for parts of x, with the statistics of all of x."""
    wide = torch.promote_types(x.dtype, torch.float32)
    means, scales = [], []
    for group in x.chunk(norm.num_groups, dim=1):
        group = bring(group, device).to(wide)
        mean = group.mean((1, 2, 3, 4), keepdim=True)
        variance = (group - mean).square_().mean((1, 2, 3, 4), keepdim=True)
        width = group.shape[1]
        means.append(mean.expand(-1, width, -1, -1, -1))
        scales.append(torch.rsqrt(variance + norm.eps).expand(-1, width, -1, -1, -1))
        del group  # before the next one is brought
    # The host may keep parameters elsewhere or in another type.
    weight, bias = (p.to(device or x.device, wide).view(1, -1, 1, 1, 1) for p in (norm.weight, norm.bias))
    scale = torch.cat(scales, 1) * weight
    shift = bias - torch.cat(means, 1) * scale
    return lambda part: F.silu((bring(part, device) * scale).add_(shift), inplace=True).to(x.dtype)


class ResnetBlock(ladder.ResnetBlock):
    """Large clips go a few frames at a time, and the second half overwrites the first."""

    def forward(self, x: Tensor, device: torch.device | None = None) -> Tensor:
        h = norm_silu_conv(self.norm1, self.conv1, x, device)
        step = chunk_frames(h, device)
        if step >= h.shape[2]:
            h = self.norm2(bring(h, device))  # one name for every temporary, so that each is freed as soon as the next exists
            h = F.silu(h, inplace=True)
            h = self.conv2(h)
            return h.add_(self._shortcut(x, 0, x.shape[2], device)).to(x.device)
        prepare = _normaliser(self.norm2, h, device)
        out = torch.empty_like(h) if h.requires_grad else h
        # From the last frame to the first: a convolution reads no later frame, so h can be overwritten as it is used up.
        for start in reversed(range(0, h.shape[2], step)):
            stop = min(start + step, h.shape[2])
            out[:, :, start:stop] = self.conv2.frames(h, start, stop, prepare).add_(self._shortcut(x, start, stop, device))
        return out

    def _shortcut(self, x: Tensor, start: int, stop: int, device: torch.device | None) -> Tensor:
        part = bring(x[:, :, start:stop], device)
        return getattr(self, self.shortcut).frames(part, 0, stop - start) if self.shortcut else part


def frame_causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Single-head attention in which a token sees every token of its own and of earlier frames.

    Frame by frame, queries of frame f against keys of frames 0 .. f, without a mask: equal to masking a
    (T * L)^2 matrix, without building one. q, k, v and the result: [B, T, L, C], L tokens per frame.
    """
    out = torch.empty_like(q)
    for frame in range(q.shape[1]):
        keys, values = (a[:, : frame + 1].flatten(1, 2).unsqueeze(1) for a in (k, v))
        out[:, frame] = F.scaled_dot_product_attention(q[:, frame].unsqueeze(1), keys, values).squeeze(1)
    return out


class FrameCausalAttention(AttentionBlock):
    """Each frame sees itself and its past."""

    def forward(self, x: Tensor) -> Tensor:
        norm, *inputs, out = self.parts()
        tokens = norm(x).flatten(3).permute(0, 2, 3, 1).contiguous()  # [B, T, H * W, C]
        h = out(frame_causal_attention(*(layer(tokens) for layer in inputs)))
        return h.permute(0, 3, 1, 2).reshape(x.shape) + x


class Downsample(nn.Module):
    """A strided causal convolution."""

    def __init__(self, conv: CausalConv3d):
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest-neighbour enlargement by 2 in space, and in time but for the first frame, then a causal convolution.

    The two are one step here. An enlarged clip holds each value several times, so for one parity of output
    positions the three taps along an axis meet only two different values; adding the taps that meet the same one
    gives a two-tap kernel on the small clip. Eight parities of 2x2x2 kernels (four of 3x2x2 where time is not
    enlarged) replace 3x3x3 on eight times the data: 3.4 (2.25) times fewer multiplications, nothing enlarged is
    ever stored, and the result is equal but for the rounding of the added taps.
    """

    def __init__(self, conv: CausalConv3d, doubles_time: bool):
        super().__init__()
        self.conv, self.doubles_time = conv, doubles_time

    def forward(self, x: Tensor, device: torch.device | None = None) -> Tensor:
        batch, _, frames, height, width = x.shape
        bias, kernels = self._kernels(x, device or x.device)
        convolve = self.conv.conv._conv_forward  # the layer's own, with other weights: the host's has cures for faulty libraries
        out_frames = 2 * frames - 1 if self.doubles_time else frames
        out = ladder.park(x, (batch, bias.shape[0], out_frames, 2 * height, 2 * width), x.device)
        step = chunk_frames(x, device)
        for start in range(0, frames, step):
            stop = min(start + step, frames)
            first = start - (1 if self.doubles_time else KERNEL - 1)
            padded = self.conv.padded(bring(x[:, :, max(0, first) : stop], device), max(0, -first))
            for (row, column), by_time in kernels.items():
                window = padded[..., row : row + height + 1, column : column + width + 1].contiguous()
                target = out[..., row::2, column::2]
                if not self.doubles_time:
                    target[:, :, start:stop] = convolve(window, by_time[0], bias)
                    continue
                # Source frame f gives output frames 2f and 2f - 1; frame 0, which is not doubled, only 0.
                target[:, :, 2 * start : 2 * stop - 1 : 2] = convolve(window, by_time[0], bias)
                odd = max(start, 1)
                if odd < stop:
                    target[:, :, 2 * odd - 1 : 2 * stop - 2 : 2] = convolve(window[:, :, odd - start :], by_time[1], bias)
        return out

    def _kernels(self, x: Tensor, device: torch.device) -> tuple[Tensor, dict[tuple[int, int], list[Tensor]]]:
        """The bias, and for each (row, column) parity its kernels, one or one per parity of time, on the device, in x's type."""
        conv = self.conv.conv
        # The host may keep parameters elsewhere or in another type; taps are added in at least fp32, then rounded once.
        weight = conv.weight.to(device, torch.promote_types(x.dtype, torch.float32))
        in_time = [_taps(weight, 2, parity) for parity in (0, 1)] if self.doubles_time else [weight]
        kernels = {(row, column): [_taps(_taps(w, 3, row), 4, column).to(x.dtype) for w in in_time] for row in (0, 1) for column in (0, 1)}
        return conv.bias.to(device, x.dtype), kernels


def _taps(weight: Tensor, axis: int, parity: int) -> Tensor:
    """Three taps along an axis as the two that outputs of one parity need on the clip before enlargement.

    In time the taps end at the output frame 2f or 2f - 1, in space they are centred on 2i or 2i + 1. Output 2f
    reads enlarged 2f - 2, 2f - 1, 2f = source f - 1, f, f and 2i reads 2i - 1, 2i, 2i + 1 = source i - 1, i, i;
    output 2f - 1 reads source f - 1, f - 1, f, and 2i + 1 reads source i, i, i + 1.
    """
    first, middle, last = weight.unbind(axis)
    pair = (first, middle + last) if parity == 0 else (first + middle, last)
    return torch.stack(pair, axis)
