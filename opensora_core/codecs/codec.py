"""What every codec offers, so that nobody outside this room asks which one it is: scale, grid, tiles, both halves, memory figures."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, OpenSoraError
from ..geometry import Grid, Tiling
from ..ops import Seams, TorchOperations
from ..shapes import Shapes, count, size

LOGVAR_RANGE = (-30.0, 20.0)


@dataclass(frozen=True)
class Latents:
    """The latents of a codec, and how a transformer that was trained on them sees them.

    Attributes:
        channels: of one latent position.
        scale, shift: model latents = scale * (codec latents - shift); one number, or one for each channel.
    """

    channels: int
    scale: float | tuple[float, ...] = 1.0
    shift: float | tuple[float, ...] = 0.0

    def to_model(self, latents: Tensor) -> Tensor:
        """Codec latents [B, C, ...] in the transformer's scale, in their own type."""
        return _wide(self.scale, latents) * (latents - _wide(self.shift, latents) if self.shift else latents)

    def words(self) -> str:
        """For people."""
        return "scaled channel by channel" if isinstance(self.scale, tuple) else f"scaled by {self.scale:g}"

    def to_codec(self, latents: Tensor) -> Tensor:
        """The inverse: what `Codec.decode` takes."""
        scaled = latents / _wide(self.scale, latents)
        return scaled + _wide(self.shift, latents) if self.shift else scaled


def _wide(value: float | tuple[float, ...], like: Tensor) -> float | Tensor:
    """A number as it is; one for each channel as a tensor that multiplies [B, C, ...]."""
    return like.new_tensor(value).view(1, -1, *[1] * (like.ndim - 2)) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class Encoded:
    """What a codec encodes a clip to.

    A codec whose sample is more than this (two stages, each with its own posterior) gives a subclass with its own mode and sample.

    Attributes:
        values: moments [B, 2C, t, h, w], means before log-variances, or (has_moments False) the latents [B, C, t, h, w] themselves.
            Tiles of it are blended.
    """

    values: Tensor
    has_moments: bool = True

    def to(self, *place) -> "Encoded":
        """The same on another device or in another type, as Tensor.to."""
        return replace(self, values=self.values.to(*place))

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, each [B, C, t, h, w], the latter within -30..20; of a codec with a posterior."""
        mean, logvar = self.values.chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def mode(self) -> Tensor:
        """The most likely latents [B, C, t, h, w], unscaled: the posterior's mean, or the latents where there is none."""
        return self.values.chunk(2, dim=1)[0] if self.has_moments else self.values

    def sample(self, generator: torch.Generator | Tensor | None = None) -> Tensor:
        """Latents [B, C, t, h, w] drawn from the posterior: mean + std * noise; the latents where there is none.

        generator: what the noise is drawn from, on its device (the values' without one), in the values' type; or the noise itself,
            of the latents' shape or one that is repeated to it. Raises an OpenSoraError for noise of another shape.
        """
        if not self.has_moments:
            return self.values
        mean, logvar = self.moments()
        if isinstance(generator, Tensor):
            if generator.ndim != mean.ndim or any(have not in (1, want) for have, want in zip(generator.shape, mean.shape, strict=True)):
                raise OpenSoraError(f"The posterior's noise has shape {list(generator.shape)}; its latents have {list(mean.shape)}.")
            return mean + torch.exp(0.5 * logvar) * generator.to(mean)
        source = generator.device if generator is not None else mean.device
        noise = torch.randn(mean.shape, generator=generator, device=source, dtype=mean.dtype).to(mean.device)
        return mean + torch.exp(0.5 * logvar) * noise


def check_video(x: Tensor, channels: int, name: str) -> None:
    """Raise an OpenSoraError unless x is [B, channels, T, H, W] and not empty. name: what it is, in the plural."""
    if x.ndim != 5 or x.shape[1] != channels or min(x.shape) < 1:
        raise OpenSoraError(f"{name} of shape {list(x.shape)} do not fit this VAE; expected [batch, {channels}, frames, height, width].")


@dataclass(frozen=True)
class CodecConfig:
    """Sizes of a codec, frozen and hashable: all that a plan needs to know of one.

    Attributes:
        latent_channels: of a latent position. in_channels, which every kind has as well: of a pixel, 3.
        widths: channels of each level, full size first.
        grid: how it counts frames and pixels. scale, shift: of its latents, see Latents.
        short_tile: frames of a temporal tile where memory is short; 0 of a codec that cuts clips in time for itself.
    """

    latent_channels: int
    widths: tuple[int, ...]
    grid: ClassVar[Grid]
    scale: ClassVar[float | tuple[float, ...]] = 1.0
    shift: ClassVar[float | tuple[float, ...]] = 0.0
    short_tile: ClassVar[int] = 0

    @property
    def latents(self) -> Latents:
        return Latents(self.latent_channels, self.scale, self.shift)

    def cut(self, tiling: Tiling) -> Tiling:
        """`tiling` with what it leaves to the codec (a temporal tile of 0) filled in; WHOLE_CLIP stays. Tiling() is how it was used.

        Here of a codec that cuts clips in time for itself: of the picture only smaller tiles than the usual ones are taken.
        """
        return replace(tiling, tile_size=0) if tiling.tile_size == Tiling.tile_size else tiling


@dataclass(frozen=True)
class WidthsConfig(CodecConfig):
    """Sizes of a codec of levels of residual blocks. layers: blocks of each level in the encoder, whose decoder has one more."""

    widths: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2
    in_channels: int = 3

    def words(self) -> str:
        """For people: "widths 128/256/512/512, 2 layers per block, 16 latent channels"."""
        return f"widths {'/'.join(map(str, self.widths))}, {self.layers} layers per block, {self.latent_channels} latent channels"

    @property
    def norm_groups(self) -> int:
        """Groups of four channels at the narrowest width: 128 -> 32, the released value."""
        return min(self.widths) // 4


class Codec(nn.Module):
    """A module that turns clips into latents and back. Its kind makes the layers (`add_parts`, which raises an OpenSoraError for sizes that there
    cannot be), and encodes and decodes what has been checked (`_encode_clip`, `_decode_clip`).

    Args:
        config: sizes.
        operations: namespace of Conv2d, Conv3d, GroupNorm and Linear, see ops.py.
        dtype, device: of the parameters, which are left uninitialised, and of what is given to encode and decode.

    Attributes:
        can_park: whether decode makes use of a home.
        decode_bytes, encode_bytes: peak of one call's activations in bytes, result included: (config, size, dtype_bytes) -> int, size
            as frames, height, width of the latents or pixels; decode_bytes of a codec that can park also takes parked=True, for what is
            then on the device. None: memory/decode.py counts by running the module on the meta device.
        decode_bytes_at_most: where decode_bytes is None, a bound from above of the peak, (config, size, dtype_bytes), by which most decodes are
            known to fit without being counted; a codec may go without.
        straight_from: (config, shape of a tile) -> latent frames from which on the peak of a decode is a line; a codec may go without.
    """

    can_park: ClassVar[bool] = False
    decode_bytes: ClassVar[Callable[..., int] | None] = None
    encode_bytes: ClassVar[Callable[..., int] | None] = None

    def __init__(self, config: Any, operations=TorchOperations, dtype: torch.dtype | None = None, device=None):
        super().__init__()
        self.config = config
        self.add_parts(config, Seams(operations, dtype, device))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def encode(self, pixels: Tensor) -> Encoded:
        """Encode frames [B, 3, T, H, W] in -1..1: one tile, or a clip that is not tiled.

        Codecs that cut clips in time for themselves take them from any device, and their last piece may be shorter.
        Raises an OpenSoraError for another rank or channel count, and for frames or sides that the codec cannot have.
        """
        check_video(pixels, self.config.in_channels, "pixels")
        return self._encode_clip(pixels)

    def decode(self, latents: Tensor, home: torch.device | None = None) -> Tensor:
        """Frames [B, 3, T, H, W], about -1..1, not clamped, of unscaled latents [B, C, t, h, w].

        home: where activations may be parked between layers, and the frames are then left; the frames are the same.
        Raises an OpenSoraError for another rank or channel count.
        """
        check_video(latents, self.config.latent_channels, "latents")
        return self._decode_clip(latents, home)


def levels_of(shapes: Shapes, stem: str, blocks: str, leaf: str) -> tuple[tuple[int, ...], int]:
    """Channels of each level, and how many blocks the first has, from tensors {stem}{level}.{blocks}{block}.{leaf} by shape."""
    widths = tuple(size(shapes, f"{stem}{level}.{blocks}0.{leaf}") for level in range(count(shapes, stem)))
    return widths, count(shapes, f"{stem}0.{blocks}")


def sizes_of(shapes: Shapes) -> dict[str, Any]:
    """The sizes of a WidthsConfig of a 3D codec in the diffusers layout but for its latent channels, from shapes without prefix.

    Raises a CheckpointError where one is missing, and for widths that cannot be.
    """
    widths, layers = levels_of(shapes, "encoder.down_blocks.", "resnets.", "conv2.conv.bias")
    groups = min(widths, default=0) // 4
    if len(widths) != 4 or not groups or any(width % groups for width in widths):
        raise CheckpointError(
            f"The widths of this VAE cannot be: {list(widths)}; four multiples of a quarter of the narrowest are expected. Download the file again."
        )
    return {"widths": widths, "layers": layers, "in_channels": size(shapes, "encoder.conv_in.conv.weight", 1)}
