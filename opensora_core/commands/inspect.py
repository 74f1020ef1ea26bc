"""`inspect`: what a weights file or model folder is; with --check, whether it is what was released and runs; with --plan, what a video needs.

Of an mp4: how it was made. A file that is none of ours to use ends as a bad one does.
"""

import sys
from dataclasses import replace
from pathlib import Path

from ..checkpoint.detect import identify
from ..checkpoint.files import read_header
from ..choices import EXACT
from ..errors import OpenSoraError
from ..families.table import family_of
from ..inspection.report import check, report
from ..media.video import is_video
from ..memory.component import resolve_device
from ..memory.estimate import Memory, Request, Settings
from ..memory.footprint import ModelSizes, sizes_of_files
from ..memory.preflight import memory_of, preflight
from ..memory.residency import GIB
from ..run.files import SMALL, SMALL_CLIP, ModelFiles
from ..sampling.guidance import PICTURES, Guidance
from .frames import video_size
from .model import with_usual
from .options import DONE, REFUSED, InspectOptions, PlanOptions, changed, flag
from .recipe import as_command, describe

_GIVEN = {"t2v": (), "i2v_head": ("image",), "i2v_tail": ("last_image",), "i2v_loop": ("image", "last_image")}  # the others: a clip


def run(options: InspectOptions) -> int:
    """Write the report to standard output; a failed check, or a video that fits in no settings, ends as a bad file does."""
    if options.plan:
        return _preflight(options)
    given = changed(options, PlanOptions)
    if given:
        raise OpenSoraError(f"{given[0]} is about a video; add --plan.")
    if options.path is None:
        raise OpenSoraError("inspect needs a weights file or a model folder; give one (--plan alone works without).")
    path = Path(options.path).expanduser()
    path = SMALL if options.path == "small" and not path.exists() else path  # as for every command
    if path.is_file() and is_video(path):
        sys.stdout.write((as_command(path) if options.as_command else describe(path)) + "\n")
        return DONE
    if options.as_command:
        raise OpenSoraError("--as-command is about a video; give an mp4 of ours or ComfyUI's.")
    if not options.check:
        sys.stdout.write(report(path) + "\n")
        return DONE if path.is_dir() or identify(read_header(path).shapes).slot else REFUSED
    found = check(path)
    sys.stdout.write(found.text + "\n")
    return DONE if found.passed else REFUSED


def _preflight(options: InspectOptions) -> int:
    if options.check or options.as_command:
        raise OpenSoraError(f"--{'check' if options.check else 'as-command'} and --plan are two questions; ask one at a time.")
    model = _sizes(options.path)
    family = family_of(model.transformer)
    options = with_usual(options, family.usual)
    usual = SMALL_CLIP if options.path == "small" else family.usual.size
    height, width, num_frames = video_size(options, usual, model.transformer.grid)
    budget = {} if options.budget_gib is None else {"budget_gib": options.budget_gib}
    settings = Settings(options.precision, options.offload, decode_policy=options.decode_policy, **budget)
    family.sampling.check_speed(options.speed)
    how = family.sampling.guidance(Guidance(*family.usual.scales), family.sampling.solvers[0])
    given = _GIVEN.get(options.cond_type, ("video",)) or family.requires
    family.check_given(given, PICTURES)
    about = {"grid": model.transformer.grid, "has_given": bool(given), "settings": settings, "guidance": how, "speed": options.speed}
    num_steps = options.num_steps if options.speed == EXACT else family.usual.num_steps
    request = Request(height, width, num_frames, num_steps, **about)
    found = preflight(request, model, _memory(options))
    sys.stdout.write(found.report() + "\n")
    return DONE if found.recommended is not None else REFUSED


def _sizes(path: str | None) -> ModelSizes:
    if path is None:
        return ModelSizes()
    if path == "small" or Path(path).expanduser().is_dir():
        files = ModelFiles.in_folder(path)
        return sizes_of_files(files.dit, files.vae, files.t5, files.clip)
    return sizes_of_files(path)


def _memory(options: InspectOptions) -> Memory:
    for name in ("gpu_gib", "ram_gib"):
        given = getattr(options, name)
        if given is not None and not 0 < given < 1e6:
            raise OpenSoraError(f"{flag(name)} {given} is not an amount of memory in GiB; use a number above 0, such as 24.")
    here = memory_of("cpu" if options.gpu_gib is not None else resolve_device(options.device))
    if options.ram_gib is not None:
        ram = int(options.ram_gib * GIB)
        own = (ram, ram) if here.device == "cpu" else (here.free, here.total)
        here = replace(here, free=own[0], total=own[1], ram_free=ram, ram_total=ram)
    if options.gpu_gib is not None:
        card = int(options.gpu_gib * GIB)
        here = replace(here, device="cuda", name=f"a CUDA card with {options.gpu_gib:g} GiB", free=card, total=card)
    return here
