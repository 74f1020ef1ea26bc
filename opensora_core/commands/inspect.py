"""`inspect`: what a weights file or model folder is; with --check, whether it is what was released and runs; with --plan, what a video needs."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from ..cli import DONE, REFUSED
from ..errors import OpenSoraError
from ..inspection.report import check, report
from ..memory.component import resolve_device
from ..memory.estimate import Memory, Request, Settings
from ..memory.footprint import ModelSizes, sizes_of_files
from ..memory.plan import GIB
from ..memory.preflight import memory_of, preflight
from ..run.files import SMALL, ModelFiles
from .options import video_size


def run(args: argparse.Namespace) -> int:
    """Write the report to standard output; a failed check, or a video that fits in no settings, ends as a bad file does."""
    if args.plan:
        return _plan(args)
    given = [name for name, default in args.plan_defaults.items() if getattr(args, name) != default]
    if given:
        raise OpenSoraError(f"--{given[0].replace('_', '-')} is about a video; it goes with --plan.")
    if args.path is None:
        raise OpenSoraError("inspect needs a weights file or a model folder; only --plan works without one.")
    path = _path(args.path)
    if not args.check:
        sys.stdout.write(report(path) + "\n")
        return DONE
    found = check(path)
    sys.stdout.write(found.text + "\n")
    return DONE if found.passed else REFUSED


def _path(named: str) -> Path:
    """The file or folder that is meant: "small" is the built-in model here as it is for every command."""
    path = Path(named).expanduser()
    return SMALL if named == "small" and not path.exists() else path


def _plan(args: argparse.Namespace) -> int:
    if args.check:
        raise OpenSoraError("--check and --plan are two questions; ask one at a time.")
    height, width, num_frames = video_size(args)
    budget = {} if args.budget_gib is None else {"budget_gib": args.budget_gib}
    settings = Settings(args.precision, args.offload, decode_policy=args.decode_policy, **budget)
    model = _sizes(args.path)
    request = Request(height, width, num_frames, args.num_steps, args.cond_type != "t2v", settings, grid=model.transformer.grid)
    found = preflight(request, model, _memory(args))
    sys.stdout.write(found.report() + "\n")
    return DONE if found.recommended is not None else REFUSED


def _sizes(path: str | None) -> ModelSizes:
    if path is None:
        return ModelSizes()
    if path == "small" or Path(path).expanduser().is_dir():
        files = ModelFiles.in_folder(path)
        return sizes_of_files(files.dit, files.vae, files.t5, files.clip)
    return sizes_of_files(path)


def _memory(args: argparse.Namespace) -> Memory:
    for name in ("gpu_gib", "ram_gib"):
        given = getattr(args, name)
        if given is not None and not 0 < given < 1e6:
            raise OpenSoraError(f"--{name.replace('_', '-')} {given} is not an amount of memory in GiB.")
    here = memory_of("cpu" if args.gpu_gib is not None else resolve_device(args.device))
    if args.ram_gib is not None:
        ram = int(args.ram_gib * GIB)
        own = (ram, ram) if here.device == "cpu" else (here.free, here.total)
        here = replace(here, free=own[0], total=own[1], ram_free=ram, ram_total=ram)
    if args.gpu_gib is not None:
        card = int(args.gpu_gib * GIB)
        here = replace(here, device="cuda", name=f"a CUDA card with {args.gpu_gib:g} GiB", free=card, total=card)
    return here
