"""Calibration: the best plans for a model, a size, a length and a mode, measured on some prompts, and the file that holds them.

For each prompt the released run is made once with every pass of every step recorded; what is kept of it are the costs of its intervals and
its finished latents. From the mean of the costs follow the plans, which are then run on the same noise. All of it is kept in a file beside
the plans after every run, so that a calibration goes on where it was stopped.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoint.files import open_tensors, read_header
from ..errors import CheckpointError, OpenSoraError, OutOfMemory
from ..families.table import family_of
from ..memory.component import Placement
from ..names import claim, complete_or_absent, sweep
from ..sampling.calibration import Recorder, best_steps, interval_costs
from ..sampling.guidance import Guidance, ReferenceUse, num_forwards
from ..sampling.plan import POINTS, Averaged, StepPlan, mode_of, planned
from ..sampling.run import sample
from ..sampling.schedule import Schedule
from ..sampling.solvers import noise
from .given import encode_references
from .parts import Networks
from .plans import Subject, write
from .ran_out import sampling_ran_out, with_less
from .request import GenerationRequest
from .result import Watchers
from .sample import conditions as told_of, finished
from .text import encode

MEASURED_POINTS = (30, 20, 16, 12, 9, 7)  # of the plans that are measured; the speeds take those of their own number

# (index of the prompt, the way, guidance) -> finished latents [1, C, T, H, W] of its run.
Make = Callable[[int, Schedule, Guidance | Averaged | Recorder], Tensor]


@dataclass(frozen=True)
class Calibrated:
    """What a calibration found: plans with their mean errors, the forwards of each, the worst prompt's error of each, and the file."""

    plans: list[StepPlan]
    forwards: list[int]
    worst: list[float]
    released_forwards: int
    path: Path

    def report(self) -> str:
        """A table for a person."""
        names = {points: speed for speed, points in POINTS.items()}
        lines = [f"Distance to the exact run of {self.released_forwards} forwards, as a share of the latents' length (mean, worst prompt):"]
        for plan, forwards, worst in zip(self.plans, self.forwards, self.worst, strict=True):
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
            return self._run(make, folder, progress)

    def _run(self, make: Make, folder: Path, progress: Callable[[int, int], None]) -> Calibrated:
        num_steps, state = self.whole.num_steps, _State(folder / f".{self.subject.file_name}.unfinished", self._fingerprint())
        points = [count for count in MEASURED_POINTS if count < num_steps]
        total, done = len(self.keys) * (num_steps + sum(points) + sum(POINTS.values())), 0
        for index in range(len(self.keys)):
            if f"costs.{index}" not in state.kept:
                recorder = Recorder(self.guidance)
                latents = make(index, self.whole, recorder).float().cpu()
                costs = interval_costs(self.whole.points, recorder.steps, recorder.record, latents)
                state.keep({f"costs.{index}": costs, f"latents.{index}": latents})
            progress(done := done + num_steps, total)
        costs = torch.stack([state.kept[f"costs.{index}"] for index in range(len(self.keys))]).mean(dim=0)
        candidates = [StepPlan(best_steps(costs, count), num_steps) for count in points]
        candidates += [StepPlan.uncalibrated(speed, num_steps) for speed in POINTS]
        errors = []
        for plan in dict.fromkeys(candidates):
            errors.append(self._errors(plan, make, state))
            progress(done := done + len(self.keys) * len(plan.steps), total)
        if done < total:
            progress(total, total)
        return self._written(list(dict.fromkeys(candidates)), errors, folder, state)

    def _errors(self, plan: StepPlan, make: Make, state: "_State") -> list[float]:
        """The distance of a plan's run from the exact run, for each prompt."""
        found, (schedule, guidance) = [], planned(self.guidance, self.whole, plan)
        for index in range(len(self.keys)):
            name = f"error.{index}." + ".".join(map(str, plan.steps))
            if name not in state.kept:
                exact = state.kept[f"latents.{index}"]
                error = (make(index, schedule, guidance).float().cpu() - exact).norm() / exact.norm()
                state.keep({name: error.reshape(1)})
            found.append(float(state.kept[name]))
        return found

    def _written(self, plans: list[StepPlan], errors: list[list[float]], folder: Path, state: "_State") -> Calibrated:
        """The best plan of each number of points, in a file."""
        best: dict[int, tuple[float, float, StepPlan]] = {}
        for plan, found in zip(plans, errors, strict=True):
            mean = sum(found) / len(found)
            best[len(plan.steps)] = min(best.get(len(plan.steps), (torch.inf,)), (mean, max(found), plan), key=lambda one: one[0])
        kept = [replace(plan, error=mean) for mean, _, plan in best.values()]
        forwards = [self._forwards(planned(self.guidance, self.whole, plan)[1], len(plan.steps)) for plan in kept]
        about = {"prompts": len(self.keys), "guidance": [self.guidance.text, self.guidance.image]}
        path = write(folder, self.subject, kept, forwards, about)
        state.path.unlink(missing_ok=True)
        released = self._forwards(self.guidance, self.whole.num_steps)
        return Calibrated(kept, forwards, [worst for _, worst, _ in best.values()], released, path)

    def _forwards(self, guidance: Guidance | Averaged, num_steps: int) -> int:
        return num_forwards(guidance, num_steps, self.latent_frames, self.use)

    def _fingerprint(self) -> str:
        asked = [str(self.subject), str(self.guidance), self.whole.points.tolist(), self.keys]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


class _State:
    """What is done of a calibration, in a file. fingerprint: of what is asked; another's file is begun anew."""

    def __init__(self, path: Path, fingerprint: str):
        self.path, self._mark = path, f"asked.{fingerprint}"
        self.kept: dict[str, Tensor] = {}
        if path.exists():
            try:
                header = read_header(path)
                with open_tensors(header) as get:
                    self.kept = {key: get(key).clone() for key in header.tensors}  # the file is replaced while these are used
            except CheckpointError as error:
                raise OpenSoraError(f"{path}, where a calibration goes on from, cannot be read; delete it to begin anew.") from error
        if self._mark not in self.kept:
            self.kept = {self._mark: torch.zeros(1)}

    def keep(self, tensors: dict[str, Tensor]) -> None:
        self.kept |= {name: tensor.contiguous() for name, tensor in tensors.items()}
        with complete_or_absent(self.path) as partial:
            save_file(self.kept, partial)


@dataclass(frozen=True)
class Runs:
    """Runs that are asked for, of which the way and the guidance alone are still open.

    transformer: in memory. prompts, conditions: of each request, see `told`. placement: where the transformer computes.
    """

    transformer: Any
    requests: Sequence[GenerationRequest]
    prompts: list
    conditions: list
    placement: Placement

    @property
    def use(self) -> ReferenceUse | None:
        return None if self.conditions[0] is None else self.conditions[0].use

    def whole(self, shift: float = 0.0) -> Schedule:
        """The released run's way. shift: 0 = the model's own for this size and length."""
        config = self.transformer.config
        family = family_of(config)
        return family.sampling.schedule(config, self._shape, family.usual.num_steps, shift)

    def make(self, index: int, schedule: Schedule, guidance: Guidance | Averaged | Recorder) -> Tensor:
        """Finished latents [1, C, T, H, W] of one of them."""
        request, family = self.requests[index], family_of(self.transformer.config)
        start = noise(self._shape, request.seed).to(self.placement.device)
        given = told_of(request, self.prompts[index].condition, self.conditions[index], family.usual.fps)
        made = sample(family.sampling, self.transformer, start, schedule, guidance, given, seeds=[request.seed])
        return finished(made, self.placement.dtype)

    @property
    def _shape(self) -> tuple[int, ...]:
        return (1, self.transformer.config.in_channels, *self.requests[0].latent_extent)


def told(networks: Networks, requests: Sequence[GenerationRequest], watchers: Watchers) -> tuple[list, list]:
    """(prompts, given frames) of runs, encoded."""
    prompts = encode(networks, [request.asked for request in requests], watchers.stage("text"))
    return prompts, [encode_references(networks, request, lambda done, total: None) for request in requests]


@torch.inference_mode()
def calibrate(networks: Networks, requests: Sequence[GenerationRequest], folder: Path, watchers: Watchers) -> Calibrated:
    """Calibrate the plans of a model with the runs that are asked for, which differ by prompt, pictures and seed alone.

    Raises an OpenSoraError where they differ otherwise, an OutOfMemory where the device has no room in any way that the offload mode permits.
    """
    first, placement = requests[0], networks.placement
    _check_alike(requests)
    prompts, conditions = told(networks, requests, watchers)
    keys = tuple(f"{prompt.text} {request.seed} {_given(request)}" for prompt, request in zip(prompts, requests, strict=True))

    def work(transformer) -> Calibrated:
        runs = Runs(transformer, requests, prompts, conditions, placement)
        subject = Subject(networks.fingerprint, mode_of(runs.use), (first.height, first.width), first.num_frames)
        trial = Calibration(subject, runs.whole(), first.guidance, runs.use, first.latent_extent[0], keys)
        return trial.run(runs.make, folder, watchers.stage("sampling"))

    beside_bytes = networks.needs.beside_transformer(first)
    found, _ = with_less(networks.transformer, placement, work, beside_bytes, ("calibrating", "the transformer"))
    if found is None:
        raise OutOfMemory(sampling_ran_out(first, placement))
    return found


def _check_alike(requests: Sequence[GenerationRequest]) -> None:
    first = requests[0]
    alike = {name: {getattr(request, name) for request in requests} for name in ("height", "width", "num_frames", "guidance")}
    alike["mode"] = {mode_of(request.references.use if request.has_given else None) for request in requests}
    for name, values in alike.items():
        if len(values) > 1:
            raise OpenSoraError(f"A plan is of one size, length and kind of run; {name} is {', '.join(sorted(map(str, values)))} here.")
    if first.options.shift or first.references.use.strength not in (0, 1):
        raise OpenSoraError("A plan is calibrated with the model's own shift and a strength of 1; it is used with others too.")


def _given(request: GenerationRequest) -> str:
    """A text that differs where the references differ."""
    given = request.references.given.values()
    return hashlib.sha256(b"".join(value.cpu().float().numpy().tobytes() for value in given)).hexdigest()
