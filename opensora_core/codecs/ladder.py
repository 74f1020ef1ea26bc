"""What autoencoders of residual blocks have in common: a convolution, levels of blocks with a step between them, a middle, and back.

Pictures (picture.py) and clips (hunyuan, causal.py, cogvideox.py) differ in the layers; published files differ in what they call them.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import Seams, place_at
from .codec import WidthsConfig


def norm_silu(norm: nn.Module, x: Tensor) -> Tensor:
    """The norm's fresh output is overwritten, unless gradients need it."""
    return F.silu(norm(x), inplace=not torch.is_grad_enabled())


class ResnetBlock(nn.Module):
    """Norm, SiLU, convolution, twice, added to the input (through a 1x1 convolution where the width changes)."""

    def __init__(self, in_channels: int, out_channels: int, layers: "Layers"):
        super().__init__()
        self.norm1, self.conv1 = layers.norm(in_channels), layers.conv(in_channels, out_channels)
        self.norm2, self.conv2 = layers.norm(out_channels), layers.conv(out_channels, out_channels)
        self.shortcut = layers.shortcut if in_channels != out_channels else ""
        if self.shortcut:
            self.add_module(self.shortcut, layers.conv(in_channels, out_channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(norm_silu(self.norm1, x))
        h = self.conv2(norm_silu(self.norm2, h))
        return h + (getattr(self, self.shortcut)(x) if self.shortcut else x)


class Resample(nn.Module):
    """A convolution that halves a picture, or one that follows its nearest-neighbour enlargement by 2."""

    def __init__(self, channels: int, is_down: bool, seams: Seams):
        super().__init__()
        self.is_down = is_down
        self.conv = seams.conv2d(channels, channels, stride=2 if is_down else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.is_down else F.interpolate(x, scale_factor=2.0, mode="nearest"))


@dataclass(frozen=True)
class Layers:
    """The kinds of layer of one autoencoder.

    Attributes:
        conv: (channels in, out, kernel 3 or 1). norm: (channels). linear: (features in, out), of attention whose layers are linear.
        shortcut: what files call the convolution beside a block whose width changes. block, attention: the classes of these.
        step: (channels, level, is_down), from a level to the next.
    """

    conv: Callable[..., nn.Module]
    norm: Callable[[int], nn.Module]
    shortcut: str
    linear: Callable[[int, int], nn.Module] | None = None
    step: Callable[[int, int, bool], nn.Module] | None = None
    block: type[ResnetBlock] = ResnetBlock
    attention: "type[AttentionBlock] | None" = None


@dataclass(frozen=True)
class Names:
    """What files call the parts.

    Attributes:
        steps: down and up. middle: its block, attention ("": it has none) and block. is_mirrored: levels of a decoder count back.
        attention: its norm, query, key, value and output. shortcut: beside a block.
    """

    levels: tuple[str, str]
    blocks: str
    steps: tuple[str, str]
    middle: tuple[str, str, str]
    norm_out: str
    is_mirrored: bool
    attention: tuple[str, str, str, str, str]
    shortcut: str


DIFFUSERS = Names(
    levels=("down_blocks", "up_blocks"),
    blocks="resnets",
    steps=("downsamplers.0", "upsamplers.0"),
    middle=("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
    norm_out="conv_norm_out",
    is_mirrored=False,
    attention=("group_norm", "to_q", "to_k", "to_v", "to_out.0"),
    shortcut="conv_shortcut",
)
LATENT_DIFFUSION = Names(
    levels=("down", "up"),
    blocks="block",
    steps=("downsample", "upsample"),
    middle=("mid.block_1", "mid.attn_1", "mid.block_2"),
    norm_out="norm_out",
    is_mirrored=True,
    attention=("norm", "q", "k", "v", "proj_out"),
    shortcut="nin_shortcut",
)


def renames(theirs: Names, ours: Names, levels: int = 4) -> list[tuple[str, str]]:
    """Parts of keys under two namings, for shapes.renamed."""
    pairs = [(f"{getattr(theirs, part)}.", f"{getattr(ours, part)}.") for part in ("shortcut", "norm_out")]
    pairs += [(f"{theirs.middle[place]}.", f"{ours.middle[place]}.") for place in (0, 2)]
    if ours.middle[1]:
        layers = zip(theirs.attention, ours.attention, strict=True)
        pairs += [(f"{theirs.middle[1]}.{their}.", f"{ours.middle[1]}.{our}.") for their, our in layers]
    for way, level in product((0, 1), range(levels)):
        place = levels - 1 - level if way and theirs.is_mirrored != ours.is_mirrored else level
        inside = (theirs.blocks, ours.blocks), (theirs.steps[way], ours.steps[way])
        pairs += [(f".{theirs.levels[way]}.{level}.{their}.", f".{ours.levels[way]}.{place}.{our}.") for their, our in inside]
    return pairs


def brought(x: Tensor, device: torch.device) -> Tensor:
    """x on a codec's device; as it is where that is meta, whose weights are brought in layer by layer (memory/component.py)."""
    return x if device.type == "meta" else x.to(device)


def park(like: Tensor, shape: tuple[int, ...], home: torch.device | None) -> Tensor:
    """Room for a whole clip where such clips are kept: at home, or where `like` is."""
    return like.new_empty(shape, device=home or like.device)


def joined(pieces: Iterable[Tensor], length: int, home: torch.device | None = None, axis: int = 2) -> Tensor:
    """A clip of so many frames, on `home` or where the pieces are, from pieces that follow one another along an axis, that of frames."""
    out, end = None, 0
    for piece in pieces:
        out = park(piece, (*piece.shape[:axis], length, *piece.shape[axis + 1 :]), home) if out is None else out
        out.narrow(axis, end, piece.shape[axis]).copy_(piece)
        end += piece.shape[axis]
        del piece  # before the next one is made
    return out


class Chain(nn.Module):
    """Layers under the files' names, which run one after another; the last two are a norm, SiLU and a convolution. order: as they run."""

    def __init__(self):
        super().__init__()
        self.order = []

    def add(self, path: str, layer: nn.Module):
        place_at(self, path, layer)
        self.order.append(path)

    def add_blocks(self, path: str, widths: tuple[int, int], depth: int, layers: Layers):
        """Add `depth` blocks, the first of which goes from one width to the other."""
        for index in range(depth):
            self.add(f"{path}.{index}", layers.block(widths[index > 0], widths[1], layers))

    def parts(self) -> list[nn.Module]:
        """The layers as they run."""
        return [self.get_submodule(path) for path in self.order]

    def forward(self, x: Tensor, *told) -> Tensor:
        """told: what every layer is given besides."""
        *layers, norm, conv = self.parts()
        for layer in layers:
            x = layer(x, *told)
        return self.last(norm, conv, x, *told)

    def last(self, norm: nn.Module, conv: nn.Module, x: Tensor) -> Tensor:
        return conv(norm_silu(norm, x))


class AttentionBlock(Chain):
    """Single-head attention over all positions, added to the input. Its layers are linear ones, or convolutions of a single pixel.

    is_causal: whether a position sees those before it and itself alone, frame by frame and row by row.
    """

    is_causal = False

    def __init__(self, channels: int, layers: Layers, names: Names):
        super().__init__()
        norm, *paths = names.attention
        self.add(norm, layers.norm(channels))
        for path in paths:
            self.add(path, layers.linear(channels, channels) if layers.linear else layers.conv(channels, channels, 1))
        self.is_linear = layers.linear is not None

    def forward(self, x: Tensor) -> Tensor:
        norm, *inputs, out = self.parts()
        h = norm(x)
        q, k, v = (self._at(layer, h).flatten(2).transpose(1, 2).unsqueeze(1) for layer in inputs)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal).squeeze(1).transpose(1, 2).reshape(x.shape)
        return x + self._at(out, h)

    def _at(self, layer: nn.Module, h: Tensor) -> Tensor:
        """A layer of every position of [N, C, ...]."""
        return layer(h.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(h.shape) if self.is_linear else layer(h)


class Half(Chain):
    """An encoder, down to twice the latent channels, or a decoder."""

    def __init__(self, config: WidthsConfig, is_decoder: bool, layers: Layers, names: Names):
        super().__init__()
        widths, steps = config.widths, range(len(config.widths) - 1)  # steps from the largest level
        first, last = config.in_channels, 2 * config.latent_channels
        if is_decoder:
            widths, steps, first, last = widths[::-1], steps[::-1], config.latent_channels, config.in_channels
        self.add("conv_in", layers.conv(first, widths[0]))
        if is_decoder:
            self._add_middle(widths[0], layers, names)
        for place, width in enumerate(widths):
            level = len(widths) - 1 - place if is_decoder and names.is_mirrored else place
            stem = f"{names.levels[is_decoder]}.{level}"
            self.add_blocks(f"{stem}.{names.blocks}", (widths[max(0, place - 1)], width), config.layers + is_decoder, layers)
            if place < len(steps):
                self.add(f"{stem}.{names.steps[is_decoder]}", layers.step(width, steps[place], not is_decoder))
        if not is_decoder:
            self._add_middle(widths[-1], layers, names)
        self.add(names.norm_out, layers.norm(widths[-1]))
        self.add("conv_out", layers.conv(widths[-1], last))

    def _add_middle(self, width: int, layers: Layers, names: Names):
        before, attention, after = names.middle
        self.add(before, layers.block(width, width, layers))
        if attention:
            self.add(attention, layers.attention(width, layers, names))
        self.add(after, layers.block(width, width, layers))
