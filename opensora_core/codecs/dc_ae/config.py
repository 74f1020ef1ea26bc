"""Sizes of the Video DC-AE, and those of the released one."""

from dataclasses import dataclass, replace

from ...errors import CheckpointError
from ...geometry import HIGH_COMPRESSION, Grid, Tiling
from ...shapes import Shapes, count, size
from ..codec import Latents


@dataclass(frozen=True)
class DCAEConfig:
    """The Video DC-AE of the high-compression variant: time x4, space x32, six stages, the last three with attention."""

    latent_channels: int
    widths: tuple[int, ...]
    encoder_depths: tuple[int, ...]
    decoder_depths: tuple[int, ...]
    in_channels: int = 3

    @classmethod
    def of(cls, shapes: Shapes) -> "DCAEConfig | None":
        """Sizes from a file's shapes without prefix; None for a DC-AE of pictures, whose convolutions are 2D.

        Which stages attend and which change time is the released model's.

        Raises:
            CheckpointError: a tensor the sizes are read from is missing or they contradict each other.
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
            raise CheckpointError(problem)
        return config

    def words(self) -> str:
        """For people: "widths 128/256/..., blocks 2 2 2 3 3 3 and 3 3 3 3 3 3, 128 latent channels"."""
        depths = (" ".join(map(str, depths)) for depths in (self.encoder_depths, self.decoder_depths))
        return f"widths {'/'.join(map(str, self.widths))}, blocks {' and '.join(depths)}, {self.latent_channels} latent channels"

    @property
    def grid(self) -> Grid:
        return HIGH_COMPRESSION

    @property
    def latents(self) -> Latents:
        """The transformer was trained on them as they are."""
        return Latents(self.latent_channels)

    @property
    def short_tile(self) -> int:
        return 16

    def cut(self, tiling: Tiling) -> Tiling:
        """See CodecConfig. Upstream takes 32 frames at a time."""
        return tiling if tiling.temporal_tile else replace(tiling, temporal_tile=32)

    def problem(self) -> str:
        """Why there can be no such autoencoder, in a sentence; "" if there can."""
        steps = list(zip(self.widths, self.widths[1:], strict=False))
        fits = (
            len(self.widths) == len(self.encoder_depths) == len(self.decoder_depths) == 6
            and min(self.widths) > 0
            and self.latent_channels > 0
            and self.widths[-1] % self.latent_channels == 0
            and all(width % 32 == 0 for width in self.widths[3:])
            and all(4 * one % other == 0 and 4 * other % one == 0 for one, other in steps)
        )
        if fits:
            return ""
        return (
            f"The widths of this DC-AE cannot be: {list(self.widths)} with {self.latent_channels} latent channels; expected six, the last three "
            "multiples of 32, each a quarter to four times the one before, the last a multiple of the latent channels."
        )


VIDEO_DC_AE = DCAEConfig(
    latent_channels=128,
    widths=(128, 256, 512, 512, 1024, 1024),
    encoder_depths=(2, 2, 2, 3, 3, 3),
    decoder_depths=(3, 3, 3, 3, 3, 3),
)
