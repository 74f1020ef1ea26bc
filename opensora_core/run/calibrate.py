"""Calibration: the best plans for a model, a size, a length and a mode, measured on some prompts, and the file that holds them.

For each prompt the released run is made once with every pass of every step recorded; what is kept of it are the costs of its intervals and
its finished latents. From the mean of the costs follow the plans, which are then run on the same noise. All of it is kept in a file beside
the plans after every run, so that a calibration goes on where it was stopped.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from ..choices import DRAFT, EXACT
from ..errors import OpenSoraError
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
from .sample import conditions as told_of, finished, way as way_of
from .text import encode

MEASURED_POINTS = (30, 20, 16, 12, 9, 7)  # of the plans that are measured; the speeds take those of their own number

# (index of the prompt, the way, guidance) -> finished latents [1, C, T, H, W] of its run, fp32 on the CPU.
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
        rows = (
            f"{len(plan.steps):3} steps {forwards:4} forwards  {plan.error:.4f}  {worst:.4f}  {names.get(len(plan.steps), '')}".rstrip()
            for plan, forwards, worst in self.rows
        )
        first = f"Distance to the exact run of {self.released_forwards} forwards, as a share of the latents' length (mean, worst prompt):"
        return "\n".join([first, *rows, f"Written to {self.path}"])


@dataclass(frozen=True)
class Calibration:
    """The runs to calibrate with.

    whole: the released run's way. use: how the runs use what they are given. latent_frames: T of the latents. keys: what each
    prompt's run is asked to show: of lists, dictionaries, numbers, tensors and what says its values as text.
    """

    subject: Subject
    whole: Schedule
    guidance: Guidance
    use: ReferenceUse | None
    latent_frames: int
    keys: tuple[Any, ...]

    def run(self, make: Make, folder: Path, progress: Callable[[int, int], None]) -> Calibrated:
        """Record, plan, measure, write. progress: (steps done, of all). Raises an OpenSoraError where another process calibrates the same."""
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        claimed = claim(folder / self.subject.file_name)
        if claimed is None:
            raise OpenSoraError(f"{self.subject.file_name} in {folder} is being calibrated by another process; wait for it.")
        with claimed:
            asked = json.dumps([self.subject, vars(self.guidance), self.whole.points, self.keys], default=_told)
            state = _State(folder / f".{self.subject.file_name}.unfinished", sha256(asked.encode()).hexdigest())
            rows = self._rows(make, state, progress)
            path = write(folder, self.subject, rows, {"prompts": len(self.keys), "guidance": [self.guidance.text, self.guidance.image]})
            state.path.unlink(missing_ok=True)
        return Calibrated(rows, num_forwards(self.guidance, self.whole.num_steps, self.latent_frames, self.use), path)

    def _rows(self, make: Make, state: "_State", progress: Callable[[int, int], None]) -> list[tuple[StepPlan, int, float]]:
        """The best plan of each number of points, as Calibrated has it."""
        num_steps, prompts, best, done = self.whole.num_steps, range(len(self.keys)), {}, 0
        points = [count for count in MEASURED_POINTS if count < num_steps]
        usual = [StepPlan.uncalibrated(speed, num_steps) for speed in POINTS]
        total = len(prompts) * (num_steps + sum(points) + sum(len(plan.steps) for plan in usual))
        for index in prompts:
            if f"costs.{index}" not in state:
                recorder = Recorder(**vars(self.guidance))
                latents = make(index, self.whole, recorder)
                costs = interval_costs(self.whole.points, recorder.steps, recorder.record, latents)
                state.keep({f"costs.{index}": costs, f"latents.{index}": latents})
                del recorder  # and every pass of the run with it
            progress(done := done + num_steps, total)
        costs = torch.stack([state[f"costs.{index}"] for index in prompts]).mean(dim=0)
        for plan in [*(StepPlan(best_steps(costs, count), num_steps) for count in points), *usual]:
            way, guidance = planned(self.guidance, self.whole, plan)
            names = [f"error.{index}." + ".".join(map(str, plan.steps)) for index in prompts]
            for index, name in enumerate(names):
                if name not in state:
                    exact = state[f"latents.{index}"]
                    state.keep({name: ((make(index, way, guidance) - exact).norm() / exact.norm()).reshape(1)})
            errors = [float(state[name]) for name in names]
            forwards = num_forwards(guidance, way.num_steps, self.latent_frames, self.use)
            row = replace(plan, error=sum(errors) / len(errors)), forwards, max(errors)
            best[way.num_steps] = min(best.get(way.num_steps, row), row, key=lambda one: one[0].error)
            progress(done := done + len(prompts) * way.num_steps, total)
        return list(best.values())


def _told(value: Any) -> str:
    """What JSON has no word for, so that it is told from others; a function by its name, which another process has too."""
    if isinstance(value, Tensor):
        return sha256(value.cpu().float().numpy().tobytes()).hexdigest()
    return getattr(value, "__qualname__", str(value))


class _State(dict[str, Tensor]):
    """What is done of a calibration, in a file. fingerprint: of what is asked; another's file is begun anew."""

    def __init__(self, path: Path, fingerprint: str):
        self.path, mark = path, f"asked.{fingerprint}"
        try:
            kept = load(path.read_bytes()) if path.exists() else {}  # not mapped: the file is replaced while these are used
        except (SafetensorError, KeyError) as error:
            raise OpenSoraError(f"{path}, where a calibration goes on from, cannot be read; delete it to begin anew.") from error
        super().__init__(kept if mark in kept else {mark: torch.zeros(1)})

    def keep(self, tensors: dict[str, Tensor]) -> None:
        """Write some too."""
        self.update((name, tensor.contiguous()) for name, tensor in tensors.items())
        with complete_or_absent(self.path) as unfinished:
            unfinished.write_bytes(save(self))  # whose failures are OSErrors


def runs_of(networks: Networks, transformer: nn.Module, runs: list[tuple]) -> tuple[Calibration, Make]:
    """What to calibrate with, and what makes the runs. transformer: of the networks. runs: of each the request, encoded prompt and condition."""
    (first, _, condition), config, placement = runs[0], transformer.config, networks.placement
    family, use, shape = family_of(config), None if condition is None else condition.use, (1, config.in_channels, *first.latent_extent)

    def make(index: int, schedule: Schedule, guidance: Guidance | Averaged) -> Tensor:
        request, prompt, condition = runs[index]
        start = noise(shape, request.seed).to(placement.device)
        told = told_of(request, prompt.condition, condition, family.usual.fps)
        return finished(sample(family.sampling, transformer, start, schedule, guidance, told, seeds=[request.seed]), placement.dtype)

    keys = tuple((prompt.text, one.negative_prompt, one.options, one.seed, vars(one.references)) for one, prompt, _ in runs)
    subject = Subject.of(networks.fingerprint, config.grid, shape, use)
    released = replace(first, num_steps=family.usual.num_steps, speed=EXACT)
    whole, guidance, _ = way_of(networks, released, family.sampling, config, shape, use)
    return Calibration(subject, whole, guidance, use, shape[2], keys), make


@torch.inference_mode()
def calibrate(networks: Networks, requests: Sequence[GenerationRequest], folder: Path, watchers: Watchers) -> Calibrated:
    """Calibrate the plans of a model with the runs that are asked for, which differ by prompt, pictures and seed alone.

    Raises an OpenSoraError where they differ otherwise, an OutOfMemory where the device has no room in any way that the offload mode permits.
    """
    first = requests[0]
    networks.files.family.sampling.check_speed(DRAFT)
    kinds = [vars(request) | {"mode": mode_of(request.references.use if request.has_given else None)} for request in requests]
    for name in ("height", "width", "num_frames", "guidance", "mode"):
        if len(values := {kind[name] for kind in kinds}) > 1:
            found = ", ".join(sorted(map(str, values)))
            raise OpenSoraError(f"A plan is of one size, length and kind of run, and {name} is {found} here; give runs that are alike.")
    if first.options.shift or first.references.use.strength not in (0, 1):
        what = "A plan is calibrated with the model's own shift and a strength of 1, and used with others too"
        raise OpenSoraError(f"{what}; leave shift and strength out.")
    prompts = encode(networks, [request.asked for request in requests], watchers.stage("text"))
    conditions = [encode_references(networks, request, lambda done, total: None) for request in requests]

    def work(transformer) -> Calibrated:
        trial, make = runs_of(networks, transformer, list(zip(requests, prompts, conditions, strict=True)))
        return trial.run(make, folder, watchers.stage("sampling"))

    words, say = ("calibrating", "the transformer"), partial(sampling_ran_out, first, networks.placement)
    return with_less(networks.transformer, networks.placement, work, beside_transformer(networks, first), words, say)[0]
