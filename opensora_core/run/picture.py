"""The picture that a video begins with, drawn by Flux.1 from its own files as the reference draws it: one pass a step, no negative prompt.

Both networks are given up as soon as the last picture is drawn, so that nothing of Flux is in memory when the video's transformer is read.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.load import check_keys, load_transformer, open_model
from ..choices import AUTO, BUDGET, dtype_word
from ..codecs.picture import load_decoder, open_decoder
from ..errors import CheckpointError, OpenSoraError, OutOfMemory
from ..families.flux import GUIDANCE, RESOLUTION, num_steps, picture_shift, schedule_name
from ..family import NetworkSizes
from ..geometry import CAUSAL, SPACE_COMPRESSION, training_size
from ..memory.component import Component, Habits, Placement
from ..memory.device import ran_out, unless_out_of_memory
from ..memory.estimate import with_margin
from ..memory.footprint import forward_peak
from ..memory.loaded import SHARED, own_structure
from ..sampling.process import Flow
from ..sampling.run import run
from ..sampling.schedule import flow_schedule
from ..sampling.solvers import MAX_SEED, euler, noise

logger = logging.getLogger(__name__)

MAX_STEPS = 1000
StepProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class PictureRequest:
    """A picture to draw, checked.

    Attributes:
        height, width: pixels, multiples of 16.
        steps: 0 = what the model was made for: 50 for dev, 4 for schnell.
        guidance: of dev, which is distilled from it; schnell has none.
        schedule: auto, open-sora or flux; see schedule.py.
    """

    height: int
    width: int
    steps: int = 0
    guidance: float = GUIDANCE
    schedule: str = AUTO

    def __post_init__(self):
        CAUSAL.check_size(self.height, self.width)
        num_steps(self.steps, True)
        schedule_name(self.schedule, True)
        if self.steps > MAX_STEPS:
            raise OpenSoraError(f"image_steps={self.steps} is more than can be asked for; use at most {MAX_STEPS}.")
        if not 0 <= self.guidance <= 100:  # also NaN
            raise OpenSoraError(f"flux_guidance={self.guidance} is not from 0 to 100; the reference uses {GUIDANCE}.")

    @classmethod
    def for_ratio(cls, aspect_ratio: str, resolution: str = RESOLUTION, **settings) -> "PictureRequest":
        """Of the size that the reference draws for a video's aspect ratio, whatever the video's own size."""
        return cls(*training_size(resolution, aspect_ratio), **settings)


@dataclass(frozen=True)
class PictureText:
    """An encoded prompt, undecorated: T5 hidden states [1, L, 4096] and CLIP's pooled output [1, 768]."""

    context: Tensor
    y: Tensor


@dataclass(frozen=True)
class Picture:
    """One picture to draw: what it shows, how, and from which noise."""

    text: PictureText
    request: PictureRequest
    seed: int


class FluxPainter:
    """Flux from its own files.

    Args:
        dit: the transformer's file, dev or schnell. vae: the picture autoencoder's.
        placement: where and how to compute; shared with a pipeline.
        precision: a quantised precision of its large layers, or None.

    Raises:
        CheckpointError: a file that is not there, is something else, or is not whole. No weight is read.
    """

    def __init__(self, dit: str | Path, vae: str | Path, placement: Placement, precision: str | None = None):
        self.dit, self.vae = Path(dit).expanduser(), Path(vae).expanduser()
        self.config = check_files(self.dit, self.vae)
        self._placement, self._precision = placement, precision
        options = {"precision": precision or "as stored"}
        read = partial(load_transformer, slot="flux", precision=precision)
        habits = Habits(is_main=True, is_kept=False)
        self._transformer = Component(partial(_read_shared, "flux", self.dit, options, read), placement, habits)
        self._decoder = Component(partial(_read_shared, "flux_vae", self.vae, {}, load_decoder), placement, Habits(is_kept=False))

    @torch.inference_mode()
    def paint(self, pictures: Sequence[Picture], progress: StepProgress | None = None) -> list[Tensor]:
        """Draw pictures; either network is read once for all of them.

        Args:
            progress: called with (steps done, steps of all pictures).

        Returns:
            [1, H, W, 3] uint8 on the CPU, one for each.

        Raises:
            OpenSoraError: a seed out of range, text of another width, or values that are not numbers.
        """
        for picture in pictures:
            check_seed("seed", picture.seed)
            check_text(picture.text, self.config)
        try:
            latents = self._draw(pictures, progress)
            self._transformer.release()
            with self._decoder.at_work() as decoder:
                dtype = decoder.conv_in.weight.dtype
                return [to_picture(decoder(one.to(self._placement.device, dtype))) for one in latents]
        finally:
            self.release()

    def release(self) -> None:
        """Give up both networks; the next picture reads them again."""
        self._transformer.release()
        self._decoder.release()

    def _draw(self, pictures: Sequence[Picture], progress: StepProgress | None) -> list[Tensor]:
        """Latents of every picture. Where memory runs out it begins again with one block at a time, if the mode leaves that open."""
        largest = max((picture.request for picture in pictures), key=lambda request: request.height * request.width)
        steps = [num_steps(picture.request.steps, self.config.guidance_embed) for picture in pictures]

        def report(index: int, step: int, _: int) -> None:
            if progress is not None:
                progress(sum(steps[:index]) + step, sum(steps))

        def draw_all(is_last_try: bool) -> list[Tensor]:
            # No name for the network may outlive this function: it would keep the weights.
            latents, beside = [], 0 if is_last_try else self._beside(largest)
            with self._transformer.at_work(beside, is_last_try) as transformer:
                for index, picture in enumerate(pictures):
                    start = self._noise(picture.request, picture.seed)
                    latents.append(draw(transformer, picture.text, picture.request, start, partial(report, index)))
            return latents

        latents = unless_out_of_memory(lambda: draw_all(False))
        if latents is None and self._placement.mode in (AUTO, BUDGET):
            logger.warning("The device ran out of memory while drawing; it begins again with one block of Flux on the device at a time.")
            latents = unless_out_of_memory(lambda: draw_all(True))
        if latents is None:
            self.release()
            what = f"Drawing a picture of {largest.height}x{largest.width} (height x width)"
            raise OutOfMemory(ran_out(what, self._placement.device, "use --offload minimal, a quantised --precision or a smaller picture"))
        return latents

    def _beside(self, request: PictureRequest) -> int:
        """Bytes that a forward needs beside the weights, where that decides how many of them stay on the device; else 0."""
        if self._placement.mode != AUTO or self._placement.device.type != "cuda":
            return 0
        precision = self._precision or dtype_word(self._placement.dtype)
        shape = (1, self.config.in_channels, 1, request.height // SPACE_COMPRESSION, request.width // SPACE_COMPRESSION)
        return with_margin(forward_peak(self.config, precision, shape))

    def _noise(self, request: PictureRequest, seed: int) -> Tensor:
        sides = (side // SPACE_COMPRESSION for side in (request.height, request.width))
        return noise((1, self.config.in_channels, 1, *sides), seed).to(self._placement.device)


def draw(
    transformer, text: PictureText, request: PictureRequest, start: Tensor, on_step: Callable[[int, int], None] | None = None
) -> Tensor:
    """From noise to a picture's latents, by Euler.

    Args:
        transformer: Flux's; its parameters' dtype is the dtype it is called in.
        start: [1, C, 1, h, w]; kept in its own dtype between steps.
        on_step: called with (steps done, steps).

    Returns:
        [1, C, h, w] fp32 on the CPU, in the transformer's scale.
    """
    config, device, dtype = transformer.config, start.device, transformer.dtype
    tokens = start.shape[-1] * start.shape[-2] // config.patch_size**2
    schedule = flow_schedule(
        num_steps(request.steps, config.guidance_embed), picture_shift(request.schedule, tokens, config.guidance_embed)
    )
    context, pooled = text.context.to(device, dtype), text.y.to(device, dtype)
    guidance = torch.tensor([request.guidance], device=device) if config.guidance_embed else None

    def velocity(x: Tensor, step: int) -> Tensor:
        return transformer(x.to(dtype), schedule.timesteps[step].to(device).expand(1), context, pooled, None, guidance).to(x.dtype)

    def report(step: int, x: Tensor) -> None:
        if on_step is not None:
            on_step(step, schedule.num_steps)

    latents = run(velocity, start, schedule, Flow(+1), euler, on_step=report)
    if not torch.isfinite(latents).all():
        raise OpenSoraError(f"Flux gave values that are not numbers (in {dtype}); try fp32, or check the file with inspect.")
    return latents[:, :, 0].float().cpu()


def to_picture(pixels: Tensor) -> Tensor:
    """A decoded picture [1, 3, H, W], about -1..1, as [1, H, W, 3] uint8: as from the file that the reference writes and reads back."""
    levels = (pixels.float().clamp(-1, 1) + 1) * 127.5
    return levels.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()


def check_files(dit: Path, vae: Path) -> NetworkSizes:
    """The sizes of a Flux transformer that can draw with this autoencoder, from the files' headers.

    Raises:
        CheckpointError: one of them is something else, not whole, or they do not belong together.
    """
    header, identity = open_model(dit, "flux")
    config = identity.config
    if "img_in.weight" in {key[len(identity.prefix) :] for key in header.shapes}:
        features = header.shapes[f"{identity.prefix}img_in.weight"][1]
        if features > config.packed_channels:
            raise CheckpointError(
                f"{header.name} is a Flux.1 transformer that also reads a picture ({features} features, not {config.packed_channels}), "
                "such as Fill, Canny or Depth; give flux1-dev or flux1-schnell."
            )
    check_keys(header, identity)
    _, _, decoder = open_decoder(vae)
    if decoder.latent_channels != config.in_channels:
        raise CheckpointError(
            f"{vae.name} has {decoder.latent_channels} latent channels and {header.name} works on {config.in_channels}; they are not of one model."
        )
    return config


def check_seed(name: str, seed: int) -> None:
    """Raise an OpenSoraError unless noise can be drawn from this seed."""
    if not 0 <= seed <= MAX_SEED:
        raise OpenSoraError(f"{name}={seed} is out of range; use 0 to {MAX_SEED}.")


def check_text(text: PictureText, config: NetworkSizes) -> None:
    """Raise a CheckpointError unless Flux reads text of this width."""
    found, wanted = (text.context.shape[-1], text.y.shape[-1]), (config.context_in_dim, config.vec_in_dim)
    if found != wanted:
        raise CheckpointError(
            f"The text encoders give {found[0]} and {found[1]} features and this Flux reads {wanted[0]} and {wanted[1]}; use its T5 and CLIP."
        )


def _read_shared(kind: str, path: Path, options: dict, read: Callable, dtype: torch.dtype, device: torch.device):
    known_by = {**options, "dtype": str(dtype).removeprefix("torch."), "device": str(device)}
    return own_structure(SHARED.get(kind, path, known_by, partial(read, path, dtype, device)))
