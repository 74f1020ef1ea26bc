"""The training state that comes with the repository, so that training can go on from where the shipped files were made.

    python -m training.kept restore FOLDER     then, for instance: python -m training.data --folder FOLDER, and
                                               python -m training.transformer --folder FOLDER --steps 9000
    python -m training.kept save FOLDER        writes training/kept/ from the states of a folder

Floating-point numbers are kept in bfloat16, but for the VAE of the first stage, whose latents everything rests on. Encoded clips are
not kept: training.data makes them again.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

KEPT = Path(__file__).parent / "kept"
EXACT, HALVED = ("vae",), ("decoder", "transformer")
_OPTIMISERS = ("muon", "adam")


def pack(state: dict, is_exact: bool) -> dict:
    """A stage's state for the repository. An exact one is of a finished stage: its optimisers are left out."""
    if is_exact:
        return {name: part for name, part in state.items() if name not in _OPTIMISERS}
    return _cast(state, torch.float32, torch.bfloat16)


def unpack(state: dict) -> dict:
    """What the stage reads."""
    return _cast(state, torch.bfloat16, torch.float32)


def _cast(part, old: torch.dtype, new: torch.dtype):
    if isinstance(part, Tensor):
        return part.to(new) if part.dtype == old else part
    if isinstance(part, dict):
        return {key: _cast(value, old, new) for key, value in part.items()}
    return [_cast(value, old, new) for value in part] if isinstance(part, list) else part


def save(folder: Path, kept: Path = KEPT) -> None:
    kept.mkdir(parents=True, exist_ok=True)
    for name in (*EXACT, *HALVED):
        state = torch.load(folder / f"{name}.pt", weights_only=True, map_location="cpu")
        torch.save(pack(state, name in EXACT), kept / f"{name}.pt")
        (kept / f"{name}.pt").chmod(0o644)


def restore(folder: Path, kept: Path = KEPT) -> None:
    """Write the states as the stages read them; ends the program before it writes over one."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*EXACT, *HALVED):
        target = folder / f"{name}.pt"
        if target.exists():
            raise SystemExit(f"{target} is there already; give another folder, or delete it first.")
    for name in (*EXACT, *HALVED):
        torch.save(unpack(torch.load(kept / f"{name}.pt", weights_only=True, map_location="cpu")), folder / f"{name}.pt")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("save", "restore"))
    parser.add_argument("folder", type=Path)
    args = parser.parse_args(arguments)
    (save if args.action == "save" else restore)(args.folder)


if __name__ == "__main__":
    main()
