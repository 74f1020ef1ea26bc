"""Calibration in the host: the same recording, planning and measuring as the library's, over runs of our guider."""

import comfy.model_management
import comfy.utils
import torch
from torch import Tensor

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


def calibrate(model, pairs: list[tuple[list, list]], samples: Tensor, guidance: Guidance, seed: int, node_id: str | None) -> Calibrated:
    """Measure the best plans for clips of a LATENT's size and length, and write them into models/open_sora_plans.

    pairs: (positive, negative) of each run; run k is of seed + k.
    Raises OpenSoraError: runs that are not of one kind, or what a sampler refuses.
    """
    config = require_open_sora(model)
    shape, family = (1, *check_latent(samples, config)[1:]), family_of(config)
    references = [reference_of(positive) for positive, _ in pairs]
    uses = [None if reference is None else reference.use for reference in references]
    if len({use and (use.is_clip, use.strength) for use in uses}) > 1 or (uses[0] is not None and uses[0].strength != 1):
        raise OpenSoraError("A plan is of one kind of run: give every prompt a picture, or every one a clip, or none; with strength 1.")
    patched, _, _ = shifted(model, samples, family.usual.num_steps, 0.0)
    whole = family.sampling.schedule(config, shape, family.usual.num_steps, schedule.latent_flow_shift(shape, config.patch_size))
    keys = tuple(f"{seed + index} {_fingerprint(*run)}" for index, run in enumerate(zip(pairs, references, strict=True)))
    bar = comfy.utils.ProgressBar(1)

    def make(index: int, way: schedule.Schedule, guided) -> Tensor:
        guider = OpenSoraGuider(patched, *pairs[index], guidance, lambda line: notice.show(line, node_id))
        guider.guidance = guided  # as it is, whatever the model's row makes of it
        noise = solvers.noise(shape, seed + index)
        made = walk(family.sampling, guider, noise, samples[:1], way.points, lambda *_: None, seed + index)
        return model.model.process_latent_in(made)

    def progress(done: int, total: int) -> None:
        bar.update_absolute(done, total)
        notice.show(f"Calibrating: {done} of {total} steps", node_id, notice.INFO)

    trial = Calibration(subject(model, shape, uses[0]), whole, guidance, uses[0], shape[2], keys)
    with torch.inference_mode():
        return trial.run(make, paths.plan_folders()[0], progress)


def _fingerprint(pair: tuple[list, list], reference) -> str:
    """What tells one run's text and pictures from another's."""
    tensors = [context for side in pair for context, _ in side] + ([] if reference is None else [reference.latents])
    return " ".join(f"{tensor.double().sum().item():.12g}" for tensor in tensors)
