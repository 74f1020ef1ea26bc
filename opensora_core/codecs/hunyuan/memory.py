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

Size = tuple[int, int, int]  # frames, height, width


def decode_bytes(config: VAEConfig, size: Size, dtype_bytes: int, parked: bool = False) -> int:
    """Peak of the activations of decoding one tile (or untiled clip) of this latent size, in bytes.

    Args:
        dtype_bytes: 2 for bf16 and fp16, 4 for fp32.
        parked: count only what is on the device when activations are parked in main memory.
    """
    activations = dtype_bytes * max(_Walk(config, dtype_bytes).decode(size, parked))
    return max(activations, _merging_bytes(config, dtype_bytes))


def encode_bytes(config: VAEConfig, size: Size, dtype_bytes: int) -> int:
    """Peak of the activations of encoding one tile (or untiled clip) of this size in frames and pixels, in bytes."""
    return dtype_bytes * max(_Walk(config, dtype_bytes).encode(size))


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

    def decode(self, size: Size, parked: bool) -> Iterator[int]:
        config, widths = self.config, self.config.widths[::-1]
        yield 2 * _elements(config.latent_channels, size)  # post_quant_conv
        yield self.conv(config.latent_channels, widths[0], size, size)
        yield from self.mid(widths[0], size)
        self.is_parked = parked
        width_in = widths[0]
        for width, step in zip(widths, (*STEPS, None), strict=True):
            for _ in range(config.layers + 1):
                yield self.resnet(width_in, width, size)
                width_in = width
            if step:
                yield self.upsample(width, size, step)
                size = _up(size, step)
        yield self.normed_conv(width_in, config.in_channels, size)

    def encode(self, size: Size) -> Iterator[int]:
        config, widths = self.config, self.config.widths
        yield self.conv(config.in_channels, widths[0], size, size)
        width_in = widths[0]
        for width, step in zip(widths, (*STEPS, None), strict=True):
            for _ in range(config.layers):
                yield self.resnet(width_in, width, size)
                width_in = width
            if step:
                smaller = tuple((side - 1) // factor + 1 for side, factor in zip(size, step, strict=True))
                yield self.conv(width, width, size, smaller)
                size = smaller
        yield from self.mid(width_in, size)
        yield self.normed_conv(width_in, 2 * config.latent_channels, size)

    def conv(self, width_in: int, width_out: int, size: Size, size_out: Size) -> int:
        both = _elements(width_in, size) + _elements(width_out, size_out)
        stride = -(-size[0] // size_out[0])
        step = max(1, _chunk(width_in, size) // stride)
        if step >= size_out[0]:
            return both + _padded(width_in, (size[0] + KERNEL - 1, *size[1:]))
        part = _elements(width_out, (step, *size_out[1:]))
        return both + part + _padded(width_in, ((step - 1) * stride + KERNEL, *size[1:]))

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
        frames = (min(size[0], step + KERNEL - 1), *size[1:])
        normalised = _elements(width_in, frames)
        copy = self.wide > 1 or self.is_parked
        convolved = normalised + _padded(width_in, (step + KERNEL - 1, *size[1:])) + _elements(width_out, (step, *size[1:]))
        return max(self.wide * group * (1 + copy), (self.wide + copy) * normalised, convolved)

    def resnet(self, width_in: int, width_out: int, size: Size) -> int:
        x, h = _elements(width_in, size), _elements(width_out, size)
        first = self.normed_conv(width_in, width_out, size)
        step = _chunk(width_out, size)
        if step >= size[0]:
            return max(first, x + self.conv(width_out, width_out, size, size))
        part, out = (_elements(width, (step, *size[1:])) for width in (width_in, width_out))
        shortcut = out if width_in != width_out else 0
        second = self.whole(x, h, shortcut) + self.normed_chunk(width_out, width_out, size, step)
        return max(first, second, part + out + shortcut)

    def mid(self, channels: int, size: Size) -> Iterator[int]:
        # The block's input waits in the caller while attention and the second residual block run.
        waiting = _elements(channels, size)
        yield self.resnet(channels, channels, size)
        yield waiting + 6 * _elements(channels, size)  # input, normalised tokens, q, k, v, output
        yield waiting + self.resnet(channels, channels, size)

    def upsample(self, channels: int, size: Size, step: Size) -> int:
        """Counts the merged kernels too; of a chunk its padded copy, one parity's window and one parity's result."""
        frames = min(size[0], _chunk(channels, size))
        padded = _padded(channels, (frames + 1 + (step[0] == 1), *size[1:]))
        part = 2 * padded + _elements(channels, (frames, *size[1:]))
        return self.whole(_elements(channels, size), _elements(channels, _up(size, step))) + part + _merged_taps(step) * channels**2

    def whole(self, *elements: int) -> int:
        """Bytes of the clips that are kept whole."""
        return 0 if self.is_parked else sum(elements)


def _elements(channels: int, size: Size) -> int:
    frames, height, width = size
    return channels * frames * height * width


def _padded(channels: int, size: Size) -> int:
    frames, height, width = size
    return channels * frames * (height + KERNEL - 1) * (width + KERNEL - 1)


def _merged_taps(step: Size) -> int:
    """Taps of all parities' kernels of layers.Upsample: 8 of 2x2x2, or 4 of 3x2x2."""
    return 64 if step[0] == 2 else 48


def _merging_bytes(config: VAEConfig, dtype_bytes: int) -> int:
    """While the widest kernels are merged, in fp32: the parameters if they are of another type, what is merged in time,
    in space and in one kernel on its way; and the finished kernels. It counts for very small tiles only."""
    taps = 4 * ((KERNEL**3 if dtype_bytes < 4 else 0) + 36 + 30) + dtype_bytes * _merged_taps((2, 2, 2))
    return taps * max(config.widths[1:]) ** 2


def _up(size: Size, step: Size) -> Size:
    frames = size[0] if step[0] == 1 else step[0] * size[0] - 1
    return frames, step[1] * size[1], step[2] * size[2]


def _chunk(channels: int, size: Size) -> int:
    """layers.chunk_frames on an accelerator."""
    return max(2, CHUNK_ELEMENTS * size[0] // _elements(channels, size))
