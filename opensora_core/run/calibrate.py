"""Calibration: the best plans for a model, a size, a length and a mode, measured on some prompts, and the file that holds them.

For each prompt the released run is made once with every pass of every step recorded; what is kept of it are the costs of its intervals and
its finished latents. From the mean of the costs follow the plans, which are then run on the same noise. All of it is kept in a file beside
the plans after every run, so that a calibration goes on where it was stopped.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoint.files import open_tensors, read_header
from ..errors import CheckpointError, OpenSoraError
from ..families.table import family_of
from ..names import claim, complete_or_absent, sweep
from ..sampling.guidance import Guidance, ReferenceUse, num_forwards
from ..sampling.plan import POINTS, Averaged, Recorder, StepPlan, best_steps, interval_costs, mode_of, planned
from ..sampling.run import sample
from ..sampling.schedule import Schedule
from ..sampling.solvers import noise
from .given import encode_references
from .needs import beside_transformer
from .parts import Networks
from .plans import Subject, write
from .ran_out import sampling_ran_out, with_less
from .request import GenerationRequest
from .result import Watchers
from .sample import conditions as told_of, finished
from .text import encode

MEASURED_POINTS = (30, 20, 16, 12, 9, 7)  # of the plans that are measured; the speeds take those of their own number

# (index of the prompt, the way, guidance) -> finished latents [1, C, T, H, W] of its run.
Make = Callable[[int, Schedule, Guidance | Averaged], Tensor]


@dataclass(frozen=True)
class Calibrated:
    """What a calibration found. rows: plans with their mean errors, the forwards of each, the worst prompt's error of each. path: of their file."""

    rows: list[tuple[StepPlan, int, float]]
    released_forwards: int
    path: Path

    def report(self) -> str:
        """A table for a person."""
        names = {points: speed for speed, points in POINTS.items()}
        lines = [f"Distance to the exact run of {self.released_forwards} forwards, as a share of the latents' length (mean, worst prompt):"]
        for plan, forwards, worst in self.rows:
            speed = names.get(len(plan.steps), "")
            lines.append(f"{len(plan.steps):3} steps {forwards:4} forwards  {plan.error:.4f}  {worst:.4f}  {speed}".rstrip())
        return "\n".join([*lines, f"Written to {self.path}"])


@dataclass(frozen=True)
class Calibration:
    """The runs to calibrate with.

    whole: the released run's way. use: how the runs use what they are given. latent_frames: T of the latents. keys: what tells each prompt's run
    from the others'.
    """

    subject: Subject
    whole: Schedule
    guidance: Guidance
    use: ReferenceUse | None
    latent_frames: int
    keys: tuple[str, ...]

    def run(self, make: Make, folder: Path, progress: Callable[[int, int], None]) -> Calibrated:
        """Record, plan, measure, write. progress: (steps done, of all). Raises an OpenSoraError where another process calibrates the same."""
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        claimed = claim(folder / self.subject.file_name)
        if claimed is None:
            raise OpenSoraError(f"{self.subject.file_name} in {folder} is being calibrated by another process; wait for it.")
        with claimed:
            asked = [str(self.subject), str(self.guidance), self.whole.points.tolist(), self.keys]
            state = _State(folder / f".{self.subject.file_name}.unfinished", hashlib.sha256(json.dumps(asked).encode()).hexdigest())
            best = self._best(make, state, progress)
            rows = [(plan, self._forwards(planned(self.guidance, self.whole, plan)[1], len(plan.steps)), worst) for plan, worst in best]
            about = {"prompts": len(self.keys), "guidance": [self.guidance.text, self.guidance.image]}
            path = write(folder, self.subject, [row[:2] for row in rows], about)
            state.path.unlink(missing_ok=True)
        return Calibrated(rows, self._forwards(self.guidance, self.whole.num_steps), path)

    def _best(self, make: Make, state: "_State", progress: Callable[[int, int], None]) -> list[tuple[StepPlan, float]]:
        """The best plan of each number of points with its mean error, and its worst."""
        num_steps, prompts, done = self.whole.num_steps, range(len(self.keys)), 0
        points = [count for count in MEASURED_POINTS if count < num_steps]
        total = len(prompts) * (num_steps + sum(points) + sum(POINTS.values()))

        def recorded(index: int) -> dict[str, Tensor]:
            recorder = Recorder(**vars(self.guidance))
            latents = make(index, self.whole, recorder).float().cpu()
            costs = interval_costs(self.whole.points, recorder.steps, recorder.record, latents)
            return {f"costs.{index}": costs, f"latents.{index}": latents}

        def error(index: int, plan: StepPlan, name: str) -> dict[str, Tensor]:
            exact = state.kept[f"latents.{index}"]
            made = make(index, *planned(self.guidance, self.whole, plan)).float().cpu()
            return {name: ((made - exact).norm() / exact.norm()).reshape(1)}

        costs = []
        for index in prompts:
            costs.append(state.get(f"costs.{index}", partial(recorded, index)))
            progress(done := done + num_steps, total)
        mean_costs, best = torch.stack(costs).mean(dim=0), {}
        plans = [StepPlan(best_steps(mean_costs, count), num_steps) for count in points]
        for plan in dict.fromkeys([*plans, *(StepPlan.uncalibrated(speed, num_steps) for speed in POINTS)]):
            names = [f"error.{index}." + ".".join(map(str, plan.steps)) for index in prompts]
            errors = [float(state.get(name, partial(error, index, plan, name))) for index, name in enumerate(names)]
            measured = replace(plan, error=sum(errors) / len(errors)), max(errors)
            best[len(plan.steps)] = min(best.get(len(plan.steps), measured), measured, key=lambda one: one[0].error)
            progress(done := done + len(prompts) * len(plan.steps), total)
        if done < total:
            progress(total, total)
        return list(best.values())

    def _forwards(self, guidance: Guidance | Averaged, num_steps: int) -> int:
        return num_forwards(guidance, num_steps, self.latent_frames, self.use)


class _State:
    """What is done of a calibration, in a file. fingerprint: of what is asked; another's file is begun anew."""

    def __init__(self, path: Path, fingerprint: str):
        self.path, mark = path, f"asked.{fingerprint}"
        self.kept: dict[str, Tensor] = {}
        if path.exists():
            try:
                header = read_header(path)
                with open_tensors(header) as get:
                    self.kept = {key: get(key).clone() for key in header.tensors}  # the file is replaced while these are used
            except CheckpointError as error:
                raise OpenSoraError(f"{path}, where a calibration goes on from, cannot be read; delete it to begin anew.") from error
        if mark not in self.kept:
            self.kept = {mark: torch.zeros(1)}

    def get(self, name: str, make: Callable[[], dict[str, Tensor]]) -> Tensor:
        """What is kept under a name; else it is made and kept, with what else is made of it."""
        if name not in self.kept:
            self.keep(make())
        return self.kept[name]

    def keep(self, tensors: dict[str, Tensor]) -> None:
        self.kept |= {name: tensor.contiguous() for name, tensor in tensors.items()}
        with complete_or_absent(self.path) as unfinished:
            save_file(self.kept, unfinished)


class Runs:
    """Runs that are asked for, encoded, of which the way and the guidance alone are still open. transformer: of the networks, in memory."""

    def __init__(self, networks: Networks, requests: Sequence[GenerationRequest], watchers: Watchers):
        self.networks, self.requests = networks, requests
        self.prompts = encode(networks, [request.asked for request in requests], watchers.stage("text"))
        self.conditions = [encode_references(networks, request, lambda done, total: None) for request in requests]

    def calibration(self, transformer: Any, keys: tuple[str, ...], shift: float = 0.0) -> Calibration:
        """To calibrate with these runs. keys: as Calibration has them. shift: 0 = the model's own for this size and length."""
        first, config = self.requests[0], transformer.config
        family, use = family_of(config), None if self.conditions[0] is None else self.conditions[0].use
        subject = Subject(self.networks.fingerprint, mode_of(use), (first.height, first.width), first.num_frames)
        shape = (1, config.in_channels, *first.latent_extent)
        whole = family.sampling.schedule(config, shape, family.usual.num_steps, shift)
        return Calibration(subject, whole, first.guidance, use, first.latent_extent[0], keys)

    def make(self, transformer: Any, index: int, schedule: Schedule, guidance: Guidance | Averaged) -> Tensor:
        """Finished latents [1, C, T, H, W] of one of them."""
        request, family, placement = self.requests[index], family_of(transformer.config), self.networks.placement
        start = noise((1, transformer.config.in_channels, *request.latent_extent), request.seed).to(placement.device)
        given = told_of(request, self.prompts[index].condition, self.conditions[index], family.usual.fps)
        return finished(sample(family.sampling, transformer, start, schedule, guidance, given, seeds=[request.seed]), placement.dtype)


@torch.inference_mode()
def calibrate(networks: Networks, requests: Sequence[GenerationRequest], folder: Path, watchers: Watchers) -> Calibrated:
    """Calibrate the plans of a model with the runs that are asked for, which differ by prompt, pictures and seed alone.

    Raises an OpenSoraError where they differ otherwise, an OutOfMemory where the device has no room in any way that the offload mode permits.
    """
    first, keys = requests[0], []
    alike = {name: {getattr(request, name) for request in requests} for name in ("height", "width", "num_frames", "guidance")}
    alike["mode"] = {mode_of(request.references.use if request.has_given else None) for request in requests}
    for name, values in alike.items():
        if len(values) > 1:
            found = ", ".join(sorted(map(str, values)))
            raise OpenSoraError(f"A plan is of one size, length and kind of run, and {name} is {found} here; give runs that are alike.")
    if first.options.shift or first.references.use.strength not in (0, 1):
        what = "A plan is calibrated with the model's own shift and a strength of 1, and used with others too"
        raise OpenSoraError(f"{what}; leave shift and strength out.")
    runs = Runs(networks, requests, watchers)
    for prompt, request in zip(runs.prompts, requests, strict=True):
        given = b"".join(value.cpu().float().numpy().tobytes() for value in request.references.given.values())
        keys.append(f"{prompt.text} {request.seed} {hashlib.sha256(given).hexdigest()}")

    def work(transformer) -> Calibrated:
        return runs.calibration(transformer, tuple(keys)).run(partial(runs.make, transformer), folder, watchers.stage("sampling"))

    beside_bytes = beside_transformer(networks, first)
    say = partial(sampling_ran_out, first, networks.placement)
    return with_less(networks.transformer, networks.placement, work, beside_bytes, ("calibrating", "the transformer"), say)[0]
