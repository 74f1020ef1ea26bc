"""The causal 3D VAE of all CogVideoX models, under the keys of the published diffusers layout.

Frames are [B, 3, T, H, W] in -1..1, latents [B, 16, (T - 1) / 4 + 1, H / 8, W / 8], unscaled. A clip goes through in chunks of 8 frames
or 2 latents, the first with what remains. A convolution sees the last two frames of the chunk before; group norms see their own chunk
alone, so the chunks are part of the function, and cutting them otherwise gives another picture.

Within a chunk everything is done a few frames at a time: normalised and enlarged copies never exist for a whole chunk, and the second
convolution of a residual block writes over its input. With a `home`, what must exist for a whole chunk is kept there, in main memory.
The result is the same to rounding.

Source: huggingface/diffusers@58eb52c0 models/autoencoders/autoencoder_kl_cogvideox.py, models/upsampling.py, models/downsampling.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import OpenSoraError
from ..geometry import CAUSAL, SPACE_COMPRESSION, FrameRule, Grid, Tiling
from ..ops import Seams
from ..shapes import AS_RELEASED, Shapes, renamed, size
from . import ladder
from .codec import Codec, Encoded, WidthsConfig, sizes_of
from .ladder import DIFFUSERS, LATENT_DIFFUSION, Layers, Resample, ResnetBlock, joined, park, renames

NAMES = replace(DIFFUSERS, middle=("mid_block.resnets.0", "", "mid_block.resnets.1"), norm_out="norm_out")
LEVELS = 4
TIME_STEPS = 2  # the first steps of the encoder, and of the decoder, change the number of frames
CHUNK_FRAMES, CHUNK_LATENTS = 8, 2
GRID = Grid(SPACE_COMPRESSION, 2, FrameRule("8k+1", step=8, lead=1, shortest_clip=9), 49)
# Elements worked on at once: on a CPU about what a cache holds, elsewhere enough to fill the device.
PART_ELEMENTS_CPU, PART_ELEMENTS = 2**22, 2**25

Part = Callable[[int, int], Tensor]  # (first frame, past the last) of a chunk -> those frames, on the device


@dataclass(frozen=True)
class CogVideoXVAEConfig(WidthsConfig):
    """Sizes. scale: model latents = scale * VAE latents: 0.7 for the 5B models, 1.15258426 for the 2B; the file is the same."""

    grid: ClassVar = GRID
    short_tile: ClassVar = 1024  # longer than any clip, which goes through in chunks as it is: tiles in time would save nothing
    scale: float = 0.7

    @classmethod
    def of(cls, shapes: Shapes) -> "CogVideoXVAEConfig":
        """Sizes from a file's shapes without prefix, in the published layout or SAT's. Raises a CheckpointError where they cannot be."""
        shapes = {name: shape for key, shape in shapes.items() for name, _ in SAT.convert(key, None, None)}
        return cls(size(shapes, "encoder.conv_out.conv.bias") // 2, **sizes_of(shapes))

    def cut(self, tiling: Tiling) -> Tiling:
        """See CodecConfig. A clip is taken whole; only smaller tiles than the usual ones are taken as asked for."""
        return replace(tiling, tile_size=0 if tiling.tile_size == Tiling.tile_size else tiling.tile_size, temporal_tile=0)


COGVIDEOX_VAE = CogVideoXVAEConfig(latent_channels=16, widths=(128, 256, 256, 512), layers=3)

SAT = renamed(renames(LATENT_DIFFUSION, NAMES), "encoder.down.0.block.0.conv1.conv.weight", " in SAT's layout", dropped="loss.")
LAYOUTS = (SAT, AS_RELEASED)


def chunks(length: int, size: int) -> list[tuple[int, int]]:
    """(first, past the last) of the pieces a clip is cut into: 13 latents in twos are 0-3, 3-5, ... 11-13."""
    rest = length % size
    starts = [0, *range(size + rest, length, size)]
    return list(zip(starts, [*starts[1:], length], strict=True))


class _Clip:
    """What is remembered of one clip while its chunks pass through a half of the codec.

    Attributes:
        device: where layers work. home: where whole chunks are kept between them: the device, or main memory.
        past: the last two frames that each convolution has read of the chunk before.
        latents: of the chunk, for the decoder's norms.
    """

    def __init__(self, device: torch.device, home: torch.device | None):
        self.device, self.home = device, home or device
        self.past: dict[nn.Module, Tensor] = {}

    def step(self, x: Tensor) -> int:
        """Frames of a chunk that are worked on at once."""
        limit = PART_ELEMENTS_CPU if self.device.type == "cpu" else PART_ELEMENTS
        return max(1, min(x.shape[2], limit * x.shape[2] // max(1, x.numel())))

    def part(self, x: Tensor) -> Part:
        """The frames of a chunk as they are."""
        return lambda start, stop: x[:, :, start:stop].to(self.device)

    def room(self, like: Tensor, frames: int) -> Tensor:
        """An empty tensor in which a chunk of this many frames is kept. like: any number of its frames."""
        return park(like, (*like.shape[:2], frames, *like.shape[3:]), self.home)


class CausalConv3d(nn.Module):
    """A convolution whose output frame t reads input frames t - 2 .. t."""

    def __init__(self, in_channels: int, out_channels: int, seams: Seams):
        super().__init__()
        self.conv = seams.conv3d(in_channels, out_channels, padding=(0, 1, 1))

    def forward(self, x: Tensor, clip: _Clip, prepare: Part | None = None, beside: Part | None = None, out: Tensor | None = None) -> Tensor:
        """Convolve a chunk. Before its first frame stand the last two of the chunk before, or its own first frame twice.

        Args:
            prepare: gives the frames that are convolved, of x's shape; without it x's own.
            beside: gives frames that are added to the output's.
            out: where the output goes; x itself may be given, as no frame is read again.
        """
        frames, step, prepare = x.shape[2], clip.step(x), prepare or clip.part(x)
        window = x.new_empty((*x.shape[:2], step + 2, *x.shape[3:]), device=clip.device)
        for start in range(0, frames, step):
            stop = min(start + step, frames)
            if start:
                window[:, :, :2] = window[:, :, -2:].clone()
            window = window[:, :, : 2 + stop - start]
            window[:, :, 2:] = prepare(start, stop)
            if not start:
                past = clip.past.pop(self, None)
                window[:, :, :2] = window[:, :, 2:3] if past is None else past
                del past
            result = self.conv(window)
            if beside is not None:
                result += beside(start, stop)
            out = clip.room(result, frames) if out is None else out
            out[:, :, start:stop] = result
            del result
        clip.past[self] = window[:, :, -2:].to(clip.home, copy=True)
        return out


class SpatialNorm(nn.Module):
    """A group norm, times and plus what two convolutions of the chunk's latents say of each place."""

    def __init__(self, norm: nn.Module, latent_channels: int, channels: int, seams: Seams):
        super().__init__()
        self.norm_layer = norm
        self.conv_y, self.conv_b = (nn.ModuleDict({"conv": seams.conv3d(latent_channels, channels, 1)}) for _ in range(2))


def normalised(norm: nn.Module, x: Tensor, clip: _Clip) -> Part:
    """silu(norm(...)) of a chunk's frames, by the statistics of the whole chunk.

    The latents' part is computed at their own size and laid over the larger frames: a 1x1x1 convolution of an enlarged tensor is the
    enlarged result. Frame by frame as nearest neighbours, but that the first of an odd number has the first latent to itself.
    """
    group_norm, wide = getattr(norm, "norm_layer", norm), torch.promote_types(x.dtype, torch.float32)
    means, scales = [], []
    for group in x.chunk(group_norm.num_groups, dim=1):
        variance, mean = torch.var_mean(group.to(clip.device, wide), (1, 2, 3, 4), correction=0, keepdim=True)
        means.append(mean.expand(-1, group.shape[1], -1, -1, -1))
        scales.append(torch.rsqrt(variance + group_norm.eps).expand(-1, group.shape[1], -1, -1, -1))
    # The host may keep parameters elsewhere or in another type.
    weight, bias = (p.to(clip.device, wide).view(1, -1, 1, 1, 1) for p in (group_norm.weight, group_norm.bias))
    scale = torch.cat(scales, 1) * weight
    shift = bias - torch.cat(means, 1) * scale
    z, frames = clip.latents if isinstance(norm, SpatialNorm) else None, x.shape[2]
    if z is not None:
        factor, offset = norm.conv_y["conv"](z)[..., :, None, :, None], norm.conv_b["conv"](z)[..., :, None, :, None]
        odd = int(frames > 1 and frames % 2)
        latent = [0] * odd + [odd + i * (z.shape[2] - odd) // (frames - odd) for i in range(frames - odd)]

    def prepare(start: int, stop: int) -> Tensor:
        part = (x[:, :, start:stop].to(clip.device) * scale).add_(shift)
        if z is not None:
            blocks = part.unflatten(4, (z.shape[4], -1)).unflatten(3, (z.shape[3], -1))
            for frame, index in enumerate(latent[start:stop]):
                blocks[:, :, frame].mul_(factor[:, :, index]).add_(offset[:, :, index])
        return F.silu(part, inplace=True)

    return prepare


class Block(ResnetBlock):
    def forward(self, x: Tensor, clip: _Clip) -> Tensor:
        own = clip.part(x)
        beside = (lambda start, stop: self.conv_shortcut(own(start, stop))) if self.shortcut else own
        h = self.conv1(x, clip, normalised(self.norm1, x, clip))
        return self.conv2(h, clip, normalised(self.norm2, h, clip), beside, out=h)


class Step(Resample):
    """The step from one resolution to the next, frame by frame.

    Down: means of two frames where time is halved, then every second pixel. Up: nearest neighbours, where time is doubled two frames of
    each, which are convolved once. Of an odd number of frames the first stands for itself.
    """

    def __init__(self, channels: int, level: int, is_down: bool, seams: Seams):
        super().__init__(channels, is_down, seams)
        self.changes_time = level < TIME_STEPS if is_down else level >= LEVELS - 1 - TIME_STEPS

    def forward(self, x: Tensor, clip: _Clip) -> Tensor:
        frames, out = x.shape[2], None
        odd = frames % 2
        few = (frames + odd) // 2 if self.changes_time and self.is_down else frames
        many = 2 * few - odd if self.changes_time else frames
        for index in range(few):
            one = slice(index, index + 1)
            pair = slice(max(0, 2 * index - odd), 2 * index + 2 - odd) if self.changes_time else one
            frame = x[:, :, pair if self.is_down else one].to(clip.device).mean(2)
            result = super().forward(frame)[:, :, None]
            out = clip.room(result, few if self.is_down else many) if out is None else out
            out[:, :, one if self.is_down else pair] = result
        return out


class Half(ladder.Half):
    """The encoder or the decoder, for a chunk of a clip."""

    def last(self, norm: nn.Module, conv: nn.Module, x: Tensor, clip: _Clip) -> Tensor:
        return conv(x, clip, normalised(norm, x, clip))


def _peak(is_decoder: bool, config: CogVideoXVAEConfig, size: tuple[int, int, int], dtype_bytes: int, parked: bool = False) -> int:
    """Bytes alive at most, which is where frames have full size: in the first chunk, which is the longest, when its last convolutions
    run, or later in the first block, whose input is the widest, when every convolution remembers the chunk before. As Codec.decode_bytes."""
    (length, height, width), widths, layers = GRID.decoded(size) if is_decoder else size, config.widths, config.layers + is_decoder
    area, wide = height * width, max(1, 4 // dtype_bytes)
    width_in, width_out = (widths[1], widths[0]) if is_decoder else (widths[0], widths[0])
    step = max(1, min(length, PART_ELEMENTS // (width_in * area)))
    group = wide * width_in // config.norm_groups
    # A window of what is convolved, and beside it either its new part, normalised in fp32, or the result with what is added to it.
    work = width_in * (step + 2) + max((wide + parked) * width_in * step, 2 * width_out * step)
    first = chunks(length, CHUNK_FRAMES)[0][1]
    if parked:
        return dtype_bytes * area * max(work, 2 * group * first)
    # The last two frames of every convolution's input: of each level, and of the wider ones that lead into it in the decoder.
    past = 2 * sum(2 * layers * width // 4**level for level, width in enumerate(widths)) + 2 * (width_in - width_out) + 2 * width_out
    chunk = width_in + width_out
    later = min(CHUNK_FRAMES, length - first)
    peak = max(chunk * first, 2 * width_out * first + past, (chunk * later + past) * (later > 0)) + max(work, group * first)
    return dtype_bytes * area * (peak + (config.in_channels * length if is_decoder else 0))


class CogVideoXVAE(Codec):
    """Clips and latents, both ways."""

    can_park = True
    decode_bytes, encode_bytes = (staticmethod(partial(_peak, is_decoder)) for is_decoder in (True, False))
    straight_from = staticmethod(lambda config, shape: 5)  # latent frames: the chunks that come later need no more

    def add_parts(self, config: CogVideoXVAEConfig, seams: Seams) -> None:
        seams = seams._replace(groups=config.norm_groups)
        layers = Layers(
            conv=lambda *sizes: seams.conv3d(*sizes) if sizes[2:] == (1,) else CausalConv3d(*sizes, seams),
            norm=seams.group_norm,
            shortcut=NAMES.shortcut,
            step=lambda *what: Step(*what, seams),
            block=Block,
        )
        self.encoder = Half(config, False, layers, NAMES)
        spatial = replace(layers, norm=lambda channels: SpatialNorm(seams.group_norm(channels), config.latent_channels, channels, seams))
        self.decoder = Half(config, True, spatial, NAMES)

    def _encode_clip(self, pixels: Tensor) -> Encoded:
        frames = CAUSAL.latent_frames(pixels.shape[2])
        GRID.check_size(*pixels.shape[3:], multiple=SPACE_COMPRESSION)
        return Encoded(_in_chunks(self.encoder, pixels, CHUNK_FRAMES, frames))

    def _decode_clip(self, latents: Tensor, home: torch.device | None) -> Tensor:
        frames = latents.shape[2]
        if frames % 2 == 0:
            raise OpenSoraError(
                f"Latents of {frames} frames are no CogVideoX clip, which has an odd number; give {frames - 1} or {frames + 1}."
            )
        return _in_chunks(self.decoder, latents, CHUNK_LATENTS, GRID.pixel_frames(frames), home)


def _in_chunks(half: Half, x: Tensor, size: int, frames: int, home: torch.device | None = None) -> Tensor:
    clip = _Clip(x.device, home)

    def run(start: int, stop: int) -> Tensor:
        clip.latents = x[:, :, start:stop]
        return half(clip.latents, clip)

    return joined((run(*chunk) for chunk in chunks(x.shape[2], size)), frames, clip.home)
