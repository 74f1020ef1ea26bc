"""Calibration in the host: the same recording, planning and measuring as the library's, over runs of our guider."""

import comfy.utils
import torch
from torch import Tensor

from ...opensora_core.choices import DRAFT
from ...opensora_core.errors import OpenSoraError
from ...opensora_core.families.table import family_of
from ...opensora_core.run.calibrate import Calibrated, Calibration
from ...opensora_core.sampling import schedule, solvers
from ...opensora_core.sampling.guidance import Guidance
from . import notice, paths
from .condition import reference_of
from .families import require_open_sora
from .guider import OpenSoraGuider, check_latent
from .run import shifted, subject, walk


@torch.inference_mode()
def calibrate(model, pairs: list[tuple[list, list]], samples: Tensor, guidance: Guidance, seed: int, node_id: str | None) -> Calibrated:
    """Measure the best plans for clips of a LATENT's size and length, and write them into models/open_sora_plans.

    pairs: (positive, negative) of each run; run k is of seed + k.
    Raises OpenSoraError: runs that are not of one kind, or what a sampler refuses.
    """
    config = require_open_sora(model)
    shape, family = (1, *check_latent(samples, config)[1:]), family_of(config)
    recipe, num_steps = family.sampling, family.usual.num_steps
    recipe.check_speed(DRAFT)
    uses = [reference and reference.use for reference in (reference_of(positive) for positive, _ in pairs)]
    if len({use and (use.is_clip, use.strength) for use in uses}) > 1 or (uses[0] is not None and uses[0].strength != 1):
        raise OpenSoraError("A plan is of one kind of run: give every prompt a picture, or every one a clip, or none; with strength 1.")
    patched, _, _ = shifted(model, samples, num_steps, 0.0)
    whole, guidance = recipe.way(config, shape, num_steps), recipe.guidance(guidance, recipe.solvers[0])
    bar = comfy.utils.ProgressBar(1)

    def make(index: int, way: schedule.Schedule, guided) -> Tensor:
        guider = OpenSoraGuider(patched, *pairs[index], guidance, lambda line: notice.show(line, node_id))
        guider.guidance = guided  # as it is: the model's row has made of it what it does
        made = walk(recipe, guider, solvers.noise(shape, seed + index), samples[:1], way.points, lambda *_: None, seed + index)
        return model.model.process_latent_in(made).float().cpu()

    def progress(done: int, total: int) -> None:
        bar.update_absolute(done, total)
        notice.show(f"Calibrating: {done} of {total} steps", node_id, notice.INFO)

    trial = Calibration(subject(model, shape, uses[0]), whole, guidance, uses[0], shape[2], tuple(enumerate(pairs, seed)))
    return trial.run(make, paths.plan_folders()[0], progress)
