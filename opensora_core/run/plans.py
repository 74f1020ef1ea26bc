"""Files of calibrated plans: one for each model, mode, size and length, found by what it is for."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import OpenSoraError
from ..geometry import Grid
from ..names import complete_or_absent
from ..readers import read_json
from ..sampling.guidance import ReferenceUse
from ..sampling.plan import POINTS, RELEASED_STEPS, StepPlan, mode_of

FORMAT = 1
_MOST_BYTES = 1 << 20  # of a file; those of the built-in model have 6 kB
_MOST = 1_000_000  # steps, frames or pixels that a file may speak of
_ROUNDING = 1e-3  # of a step


@dataclass(frozen=True)
class Subject:
    """What a plan is calibrated for. fingerprint: of the transformer, see fingerprint_of. mode: one of MODES. size: (height, width) in pixels."""

    fingerprint: str
    mode: str
    size: tuple[int, int]
    frames: int

    @classmethod
    def of(cls, fingerprint: str, grid: Grid, latent_shape: Sequence[int], use: ReferenceUse | None) -> "Subject":
        """What a run of latents [..., T, H, W] is, which uses what it is given so."""
        frames, *size = grid.decoded(latent_shape)
        return cls(fingerprint, mode_of(use), tuple(size), frames)

    @property
    def file_name(self) -> str:
        return f"{self.fingerprint[:12]}_{self.mode}_{self.size[1]}x{self.size[0]}_{self.frames}.json"


def find(speed: str, subject: Subject | None, folders: Iterable[Path], num_steps: int = RELEASED_STEPS) -> StepPlan:
    """The plan of a speed other than exact: the calibrated one of the first folder that has it, else the uncalibrated one.

    subject: None where no calibrated plan can hold, as with a shift of one's own. Raises an OpenSoraError for a file that `read` refuses.
    """
    for folder in folders if subject is not None else ():
        path = Path(folder) / subject.file_name
        for plan in read(path, subject) if path.is_file() else ():
            if len(plan.steps) == POINTS[speed] and plan.num_steps == num_steps:
                return plan
    return StepPlan.uncalibrated(speed, num_steps)


def read(path: Path, subject: Subject) -> list[StepPlan]:
    """The plans of a file. Raises an OpenSoraError if it is damaged, of another version, or not for the subject."""
    try:
        record = read_json(path, _MOST_BYTES)
        version = _number(record["format"], int)
        plans = [_plan(_number(record["steps"], int), **one) for one in record["plans"]] if version == FORMAT else []
        found = Subject(record["identity"], record["mode"], tuple(record["size"]), record["frames"])
    except (ValueError, TypeError, KeyError) as error:  # of ours too: a plan is calibrated, not downloaded
        raise OpenSoraError(f"{path.name} is no plan, or a damaged one; calibrate again, or take it out of {path.parent.name}.") from error
    if version != FORMAT:
        raise OpenSoraError(f"The plan {path.name} was written by another version of this program (format {version}); calibrate again.")
    if differing := [name for name, value in vars(subject).items() if value != vars(found)[name]]:
        raise OpenSoraError(f"The plan {path.name} is of another {' and '.join(differing)} than its name says; calibrate again.")
    return plans


def write(folder: Path, subject: Subject, plans: list[tuple[StepPlan, int, float]], about: dict) -> Path:
    """Write plans, each with its forwards and its worst error, where `find` looks for them. about: what else a person may want to know of them."""
    whole = {"format": FORMAT, "identity": subject.fingerprint, "mode": subject.mode, "size": subject.size, "frames": subject.frames}
    rows = [{"points": plan.points, "forwards": forwards, "error": plan.error} for plan, forwards, _ in plans]
    record = {**whole, "steps": plans[0][0].num_steps, **about, "plans": rows}
    path = folder / subject.file_name
    with complete_or_absent(path) as partial:
        partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def _plan(num_steps: int, points: list[float], forwards: int, error: float) -> StepPlan:
    steps = [(1 - _number(point)) * num_steps for point in points]
    if not steps or steps[-1] != num_steps or any(abs(step - round(step)) > _ROUNDING for step in steps):
        raise ValueError(points)
    return StepPlan(tuple(round(step) for step in steps[:-1]), num_steps, float(_number(error)))


def _number(value, *kinds: type) -> int | float:
    """A number of a file. Raises a ValueError for anything else, and for one that is of no use in a plan."""
    if type(value) not in (kinds or (int, float)) or not 0 <= value <= _MOST:  # NaN too
        raise ValueError(value)
    return value
