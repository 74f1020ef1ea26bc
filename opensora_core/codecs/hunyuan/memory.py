"""How much memory the causal VAE needs: an estimate that follows the forward pass layer by layer.

It counts every activation alive at the same time; a test compares it with what the forward pass really allocates. Weights, the
tile's finished frames and the workspace of convolution libraries are not activations; who plans a decode leaves a margin for them.
"""

from collections.abc import Iterator

from ...geometry import TIME_COMPRESSION
from . import layers
from .config import HUNYUAN_VAE, STEPS, VAEConfig
from .layers import CHUNK_ELEMENTS, KERNEL

_STRAIGHT_CHUNKS = 3
MERGED_TAPS = {1: 48, 2: 64}  # of all parities' kernels of layers.Upsample, by its step in time: 4 of 3x2x2, or 8 of 2x2x2

Size = tuple[int, int, int]  # frames, height, width


def decode_bytes(config: VAEConfig, size: Size, dtype_bytes: int, parked: bool = False) -> int:
    """Peak of the activations of decoding one tile (or untiled clip) of this latent size, in bytes.

    dtype_bytes: 2 for bf16 and fp16, 4 for fp32. parked: count only what is on the device when activations are parked in main memory.
    """
    # While the widest kernels are merged, in fp32, there are the parameters if they are of another type, what is merged in time, in space
    # and in one kernel on its way; and the finished kernels. It counts for very small tiles only.
    taps = 4 * ((KERNEL**3 if dtype_bytes < 4 else 0) + 36 + 30) + dtype_bytes * MERGED_TAPS[2]
    return max(dtype_bytes * max(_Walk(config, dtype_bytes).layers(size, True, parked)), taps * max(config.widths[1:]) ** 2)


def encode_bytes(config: VAEConfig, size: Size, dtype_bytes: int) -> int:
    """Peak of the activations of encoding one tile (or untiled clip) of this size in frames and pixels, in bytes."""
    return dtype_bytes * max(_Walk(config, dtype_bytes).layers(size, False))


def straight_from(config: VAEConfig, shape: tuple[int, ...]) -> int:
    """Latent frames from which on the peak of decoding tiles of this shape [B, C, T, H, W] grows by as much for each: a few chunks of
    the finest layers. What is alive is then whole clips, and temporaries of one group of channels or one chunk. Of the released sizes."""
    if config != HUNYUAN_VAE:
        return shape[2]
    finest = shape[0] * config.widths[0] * config.grid.space**2 * shape[3] * shape[4]
    return 1 + _STRAIGHT_CHUNKS * max(2, layers.CHUNK_ELEMENTS // finest) // TIME_COMPRESSION


class _Walk:
    """The layers of one pass in order; every method gives the elements alive at a layer's peak, its input and output included.

    Attributes:
        wide: fp32 values (normalisation is done in them) as a multiple of one element, 2 for bf16.
        is_parked: whether whole clips are in main memory by now, so that only parts of them count.
    """

    def __init__(self, config: VAEConfig, dtype_bytes: int):
        self.config = config
        self.wide = max(1, 4 // dtype_bytes)
        self.is_parked = False

    def layers(self, size: Size, is_decoder: bool, parked: bool = False) -> Iterator[int]:
        config = self.config
        widths, first, last = config.widths, config.in_channels, 2 * config.latent_channels
        if is_decoder:
            widths, first, last = widths[::-1], config.latent_channels, config.in_channels
            yield 2 * _elements(first, size)  # post_quant_conv
        width_in = widths[0]
        yield self.conv(first, width_in, size, size)
        if is_decoder:
            yield from self.mid(width_in, size)
        self.is_parked = parked
        for width, step in zip(widths, (*STEPS, None), strict=True):
            for _ in range(config.layers + is_decoder):
                yield self.resnet(width_in, width, size)
                width_in = width
            if step and is_decoder:
                yield self.upsample(width, size, step)
                size = _up(size, step)
            elif step:
                smaller = tuple((side - 1) // factor + 1 for side, factor in zip(size, step, strict=True))
                yield self.conv(width, width, size, smaller)
                size = smaller
        if not is_decoder:
            yield from self.mid(width_in, size)
        yield self.normed_conv(width_in, last, size)

    def conv(self, width_in: int, width_out: int, size: Size, size_out: Size) -> int:
        both = _elements(width_in, size) + _elements(width_out, size_out)
        stride = -(-size[0] // size_out[0])
        step = max(1, _chunk(width_in, size) // stride)
        if step >= size_out[0]:
            return both + _elements(width_in, size, size[0] + KERNEL - 1, padded=True)
        return both + _elements(width_out, size_out, step) + _elements(width_in, size, (step - 1) * stride + KERNEL, padded=True)

    def normed_conv(self, width_in: int, width_out: int, size: Size) -> int:
        x = _elements(width_in, size)
        step = _chunk(width_in, size)
        if step >= size[0]:
            return x + self.conv(width_in, width_out, size, size)
        return self.whole(x, _elements(width_out, size)) + self.normed_chunk(width_in, width_out, size, step)

    def normed_chunk(self, width_in: int, width_out: int, size: Size, step: int) -> int:
        """Beside input and output: the statistics' temporaries, or a chunk normalised, padded and convolved.

        What is normalised in another type, or comes from main memory, is there twice.
        """
        group = _elements(width_in, size) // self.config.norm_groups
        normalised = _elements(width_in, size, min(size[0], step + KERNEL - 1))
        copy = self.wide > 1 or self.is_parked
        convolved = normalised + _elements(width_in, size, step + KERNEL - 1, padded=True) + _elements(width_out, size, step)
        return max(self.wide * group * (1 + copy), (self.wide + copy) * normalised, convolved)

    def resnet(self, width_in: int, width_out: int, size: Size) -> int:
        x, h = _elements(width_in, size), _elements(width_out, size)
        first = self.normed_conv(width_in, width_out, size)
        step = _chunk(width_out, size)
        if step >= size[0]:
            return max(first, x + self.conv(width_out, width_out, size, size))
        part, out = (_elements(width, size, step) for width in (width_in, width_out))
        shortcut = out if width_in != width_out else 0
        second = self.whole(x, h, shortcut) + self.normed_chunk(width_out, width_out, size, step)
        return max(first, second, part + out + shortcut)

    def mid(self, channels: int, size: Size) -> Iterator[int]:
        # As if the first block's input were kept until the end, which leaves a margin at the narrowest resolution.
        x, resnet = _elements(channels, size), self.resnet(channels, channels, size)
        yield x + 6 * x  # input, normalised tokens, q, k, v, output
        yield x + resnet

    def upsample(self, channels: int, size: Size, step: Size) -> int:
        """Counts the merged kernels too; of a chunk its padded copy, one parity's window and one parity's result."""
        frames = min(size[0], _chunk(channels, size))
        part = 2 * _elements(channels, size, frames + 1 + (step[0] == 1), padded=True) + _elements(channels, size, frames)
        return self.whole(_elements(channels, size), _elements(channels, _up(size, step))) + part + MERGED_TAPS[step[0]] * channels**2

    def whole(self, *elements: int) -> int:
        """Bytes of the clips that are kept whole."""
        return 0 if self.is_parked else sum(elements)


def _elements(channels: int, size: Size, frames: int = 0, padded: bool = False) -> int:
    """Of a clip of this size, or of so many frames of it. padded: with one more pixel on every side."""
    length, height, width = size
    border = KERNEL - 1 if padded else 0
    return channels * (frames or length) * (height + border) * (width + border)


def _up(size: Size, step: Size) -> Size:
    frames = size[0] if step[0] == 1 else step[0] * size[0] - 1
    return frames, step[1] * size[1], step[2] * size[2]


def _chunk(channels: int, size: Size) -> int:
    """layers.chunk_frames on an accelerator."""
    return max(2, CHUNK_ELEMENTS * size[0] // _elements(channels, size))
