"""A training run that a kill at any moment cannot spoil: state is written whole or not at all, and a step's data
depends on its number alone.

    run = Run(folder, "vae", {"model": model, "optimizer": optimizer})
    for step in run.steps(total):   # continues where the saved state stopped; saves on time and on SIGTERM
        ...
"""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from opensora_core.names import complete_or_absent

SAVE_EVERY_SECONDS = 120


class Run:
    """One stage of training.

    Args:
        folder: where states are kept.
        name: of the stage; its state is <folder>/<name>.pt.
        parts: objects with state_dict and load_state_dict, saved and restored together.
    """

    def __init__(self, folder: str | Path, name: str, parts: dict):
        self.path = Path(folder) / f"{name}.pt"
        self.parts = parts
        self.step = 0
        self.seconds = 0.0  # of training, over all sessions
        self._stop = False
        if self.path.exists():
            state = torch.load(self.path, weights_only=True, map_location="cpu")
            for key, part in parts.items():
                part.load_state_dict(state[key])
            self.step, self.seconds = state["step"], state["seconds"]

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        state = {key: part.state_dict() for key, part in self.parts.items()}
        with complete_or_absent(self.path) as partial:
            torch.save({**state, "step": self.step, "seconds": self.seconds}, partial)

    def steps(self, total: int) -> Iterator[int]:
        """Step numbers still to do. The state is saved at intervals, at the end, and when the process is told to stop."""
        previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        saved = last = time.monotonic()
        try:
            while self.step < total and not self._stop:
                yield self.step
                self.step += 1
                now = time.monotonic()
                self.seconds, last = self.seconds + now - last, now
                if now - saved > SAVE_EVERY_SECONDS:
                    self.save()
                    saved = time.monotonic()
            self.save()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        if self._stop:
            raise SystemExit(f"stopped at step {self.step} of {total}; the same command continues from here")

    def progress(self, total: int, **figures: float) -> None:
        """One line: where the run is, what it measures and when it will be done."""
        left = (total - self.step) * self.seconds / max(1, self.step)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        print(f"{self.path.stem} {self.step}/{total}  {shown}  {self.seconds / 60:.1f} min, {left / 60:.1f} to go", flush=True)

    def _on_signal(self, number, frame) -> None:
        self._stop = True


class Rows:
    """Tensors that are filled row by row, as a part of a run; one that is continued with more rows keeps those it has.

    Args:
        rows: by name, of equal length.
    """

    def __init__(self, rows: dict[str, Tensor]):
        self.rows = rows

    def __getitem__(self, name: str) -> Tensor:
        return self.rows[name]

    def state_dict(self) -> dict[str, Tensor]:
        return self.rows

    def load_state_dict(self, rows: dict[str, Tensor]) -> None:
        for name, kept in self.rows.items():
            count = min(len(kept), len(rows[name]))
            kept[:count] = rows[name][:count]


def learning_rate(step: int, total: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a cosine to a fiftieth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + torch.cos(torch.tensor(done * torch.pi)).item()))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
