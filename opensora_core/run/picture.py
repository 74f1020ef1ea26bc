"""A picture that a video begins with: a clip of one frame, drawn by Flux.1 as upstream draws it, in one pass a step.

Both networks are given up as soon as the last picture is drawn, so that nothing of Flux is in memory when the video's transformer is read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..choices import AUTO
from ..codecs.codec import Codec
from ..errors import CheckpointError, OpenSoraError
from ..families.table import PAINTER
from ..geometry import CAUSAL, LARGEST, training_size
from ..memory.device import ran_out
from ..sampling.guidance import ONE_PASS
from ..sampling.run import Conditions, StepReport, sample
from ..sampling.solvers import MAX_SEED, noise
from .needs import beside_picture
from .parts import PictureNetworks
from .ran_out import with_less
from .request import EncodedPrompt
from .sample import finished

DRAWING, GUIDANCE = PAINTER.draws, PAINTER.usual.scales[0]


@dataclass(frozen=True)
class PictureRequest:
    """A picture to draw, checked. height, width: pixels, multiples of 16.

    steps: 0 = what the model was made for: 50 for dev, 4 for schnell. guidance: of dev, which is distilled from it; schnell has none.
    schedule: auto, open-sora or flux; see families/flux.py.
    """

    height: int
    width: int
    steps: int = 0
    guidance: float = GUIDANCE
    schedule: str = AUTO

    def __post_init__(self):
        CAUSAL.check_size(self.height, self.width)
        DRAWING.num_steps(self.steps, True)
        DRAWING.schedule_name(self.schedule, True)
        if self.steps > LARGEST["num_steps"]:
            raise OpenSoraError(f"image_steps={self.steps} is more than can be asked for; use at most {LARGEST['num_steps']}.")
        if not 0 <= self.guidance <= 100:  # also NaN
            raise OpenSoraError(f"flux_guidance={self.guidance} is not from 0 to 100; use {GUIDANCE}, as the reference does.")

    @classmethod
    def for_ratio(cls, aspect_ratio: str, resolution: str = DRAWING.resolution, **settings) -> "PictureRequest":
        """A request of the size that upstream draws for a video's aspect ratio, whatever the video's own size."""
        return cls(*training_size(resolution, aspect_ratio), **settings)


Asked = tuple[EncodedPrompt, PictureRequest, int]  # what a picture shows, how it is drawn, and the seed of its noise


@torch.inference_mode()
def paint(networks: PictureNetworks, pictures: Sequence[Asked], progress: Callable[[int, int], None] | None = None) -> list[Tensor]:
    """Draw pictures, [1, H, W, 3] uint8 on the CPU for each; either network is read once for all of them.

    pictures: prompts undecorated. progress: called with (steps done, steps of all pictures).
    Raises an OpenSoraError for a seed out of range, text of another width, memory that ran out, or values that are not numbers.
    """
    for prompt, _, seed in pictures:
        check_seed("seed", seed)
        check_text(*prompt.condition.positive.values(), networks.config, "use its T5 and CLIP")
    try:
        latents = _latents(networks, pictures, progress)
        networks.transformer.release()
        with networks.decoder.at_work() as decoder:
            return [_picture(decoder, one.to(networks.placement.device, decoder.dtype)) for one in latents]
    finally:
        networks.release()


def _latents(networks: PictureNetworks, pictures: Sequence[Asked], progress: Callable[[int, int], None] | None) -> list[Tensor]:
    """[1, C, h, w] of every picture."""
    placement, (_, largest, _) = networks.placement, max(pictures, key=lambda one: one[1].height * one[1].width)
    steps = [DRAWING.num_steps(request.steps, networks.config.guidance_embed) for _, request, _ in pictures]

    def report(index: int, now: StepReport) -> None:
        if progress is not None:
            progress(sum(steps[:index]) + now.step, sum(steps))

    def work(transformer) -> list[Tensor]:
        made = []
        for index, (prompt, request, seed) in enumerate(pictures):
            sides = networks.config.grid.latent_size(request.height, request.width)
            start = noise((1, networks.config.in_channels, 1, *sides), seed).to(placement.device)
            made.append(draw(transformer, prompt, request, start, partial(report, index)))
        return made

    def say() -> str:
        networks.release()
        what = f"Drawing a picture of {largest.height}x{largest.width} (height x width)"
        return ran_out(what, placement.device, "use --offload minimal, a quantised --precision or a smaller picture")

    beside_bytes = beside_picture(networks, (largest.height, largest.width))
    return with_less(networks.transformer, placement, work, beside_bytes, ("drawing", "Flux"), say)[0]


def draw(
    transformer, prompt: EncodedPrompt, request: PictureRequest, start: Tensor, on_step: Callable[[StepReport], None] | None = None
) -> Tensor:
    """From noise to a picture's latents, [1, C, h, w] fp32 on the CPU in the transformer's scale.

    transformer: an MMDiT without a condition embedding; its parameters' dtype is the dtype it is called in.
    start: [1, C, 1, h, w]; kept in its own dtype between steps.
    """
    config, recipe = transformer.config, PAINTER.sampling
    shift = DRAWING.shift(request.schedule, start.shape[-1] * start.shape[-2] // config.patch_size**2, config.guidance_embed)
    schedule = recipe.schedule(config, start.shape, DRAWING.num_steps(request.steps, config.guidance_embed), shift)
    told = Conditions(prompt.condition, numbers={"guidance": request.guidance})
    return finished(sample(recipe, transformer, start, schedule, ONE_PASS, told, on_step), transformer.dtype, "Flux")[:, :, 0]


def _picture(codec: Codec, latents: Tensor) -> Tensor:
    """[1, H, W, 3] uint8 on the CPU, as from the file that upstream writes and reads back, of latents [1, C, h, w] in the transformer's scale."""
    pixels = codec.decode(codec.config.latents.to_codec(latents)[:, :, None])[:, :, 0]
    levels = (pixels.float().clamp(-1, 1) + 1) * 127.5
    return levels.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()


def check_seed(name: str, seed: int) -> None:
    """Raise an OpenSoraError unless noise can be drawn from this seed."""
    if not 0 <= seed <= MAX_SEED:
        raise OpenSoraError(f"{name}={seed} is out of range; use 0 to {MAX_SEED}.")


def check_text(context: Tensor, pooled: Tensor | None, config, advice: str) -> None:
    """Raise a CheckpointError unless Flux reads text of this width. config: its context_in_dim and vec_in_dim."""
    found = (context.shape[-1], None if pooled is None else pooled.shape[-1])
    wanted = (config.context_in_dim, config.vec_in_dim)
    if found != wanted:
        raise CheckpointError(
            f"The text encoders give {found[0]} and {found[1]} features and this Flux reads {wanted[0]} and {wanted[1]}; {advice}."
        )
