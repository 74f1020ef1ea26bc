"""What a video needs on this host's device before it is made, and settings for our nodes that fit."""

from dataclasses import replace
from pathlib import Path

import comfy.memory_management
import comfy.model_management
import torch

from ...opensora_core.choices import AUTO, NF4
from ...opensora_core.errors import OpenSoraError
from ...opensora_core.families.table import family_of
from ...opensora_core.family import Family
from ...opensora_core.geometry import CAUSAL, Grid
from ...opensora_core.memory.estimate import Memory, Request
from ...opensora_core.memory.footprint import ModelSizes, sizes_of_files, transformer_weights
from ...opensora_core.memory.preflight import Preflight, memory_of, preflight
from ...opensora_core.memory.residency import at_least
from ...opensora_core.run import files as model_files
from ...opensora_core.sampling.guidance import Guidance
from . import notice


def advise(request: Request, path: str, length: str = "") -> tuple[str, tuple[str, str, str], dict]:
    """Plan a video with a transformer file. length: in place of the request's frames, in frames or seconds of the model.

    Returns:
        A report for a person; the best precision, offload and decode policy; and for web/js {verdict, card in GiB, stages: [[name, GiB]]}.

    Raises:
        CheckpointError: the file is damaged or another model.
        OpenSoraError: nothing fits; says what is lacking and the nearest that does.
    """
    model = _sizes(Path(path))
    family = family_of(model.transformer)
    family.sampling.check_speed(request.speed)
    request, about = _in_its_frames(request, family, model.transformer.grid, length)
    guidance = family.sampling.guidance(Guidance(*family.usual.scales), family.sampling.solvers[0])
    request = replace(request, num_steps=family.usual.num_steps, guidance=guidance, has_given=bool(family.requires))
    found = preflight(request, model, host_memory())
    if found.recommended is None:
        asked = found.asked
        needs = ", ".join(f"{stage.name} {at_least(stage.num_bytes)}" for stage in asked.stages)
        does_not_fit = f"{found.request.words()} does not fit on {found.memory.name} (GiB needed: {needs})"
        raise OpenSoraError(f"{does_not_fit}: {' '.join(asked.problems)} {found.nearest}")
    precision, line = _loader_precision(found)
    fit = _fit(found)
    report = "\n".join(filter(None, [fit["verdict"], about, found.report(), _about_ram(found), line]))
    best = found.recommended.settings
    return report, (precision, best.offload, best.decode_policy), fit


def _fit(found: Preflight) -> dict:
    """What fits, in a line that comes first, and its stages against the card."""
    stages = [[stage.name, stage.num_bytes / 2**30] for stage in found.recommended.stages]
    card, (name, most) = found.memory.total / 2**30, max(stages, key=lambda stage: stage[1])
    is_asked = found.recommended is found.asked
    if notice.language().startswith("zh"):
        verdict = f"{'放得下' if is_asked else '换设置后放得下'}:{most:.1f} / {card:.0f} GiB,在 {name} 阶段"
    else:
        verdict = f"{'Fits' if is_asked else 'Fits with other settings'}: {most:.1f} of {card:.0f} GiB, in {name}"
    return {"verdict": verdict, "card": card, "stages": stages}


def grid_of(path: str) -> Grid:
    """What a plan for a transformer file is asked for in: the sizes and lengths of Open-Sora 1 where it is one, else those of 2.0.

    Raises:
        CheckpointError: another file, or none.
    """
    grid = _sizes(Path(path)).transformer.grid
    return grid if grid.piece else CAUSAL


def _sizes(path: Path) -> ModelSizes:
    """Sizes of the model with this transformer. The built-in model's other parts are known; other models' are taken as released."""
    if path.parent != model_files.SMALL:
        return sizes_of_files(path)
    files = model_files.ModelFiles.in_folder(path.parent)
    return sizes_of_files(files.dit, files.vae, files.t5, files.clip)


def _in_its_frames(request: Request, family: Family, grid: Grid, length: str) -> tuple[Request, str]:
    """The request in frames that the model has, where the node's input counts 4k+1; and a line that says so if they are others.

    length: what was asked for in the model's own frames or seconds, or "".
    """
    if length.strip():
        return replace(request, num_frames=grid.frames.check(grid.length(length, family.usual.fps)), grid=grid), ""
    asked = request.num_frames
    frames = asked if grid == request.grid or asked == 1 else grid.frames.nearest(asked - 1 + grid.frames.lead)
    whose = f"This model has clips of {grid.frames.words}" if grid.frames.lead else "The high-compression variant has clips of 4k"
    return replace(request, num_frames=frames, grid=grid), f"{whose} frames: planned for {frames}." if frames != asked else ""


def host_memory() -> Memory:
    """This machine's memory as the host can use it: what its loaded models take counts as free, it unloads them for others."""
    device = comfy.model_management.get_torch_device()
    memory = memory_of(torch.device(device.type, device.index))
    if memory.device == "cpu":
        return memory
    loaded = (entry.model for entry in comfy.model_management.current_loaded_models if entry.device == device)
    mine = sum(int(patcher.loaded_size()) for patcher in loaded if patcher is not None)
    free = memory.free + mine - int(comfy.model_management.extra_reserved_memory())
    return replace(memory, free=max(0, min(memory.total, free)))


def _about_ram(found: Preflight) -> str:
    """What the host takes of RAM where it does not use a file's own pages as weights, as the plan does."""
    model, precision = found.model, found.recommended.settings.precision
    weights = transformer_weights(model.transformer, precision, model.stored, model.groups)
    if found.memory.device == "cpu" or comfy.memory_management.aimdo_enabled or not weights.is_mapped:
        return ""  # it maps them, or they are counted already
    return (
        f"Without its dynamic VRAM, as it runs here, ComfyUI reads all {at_least(weights.sizes.total)} GiB of the transformer into RAM: "
        "so much more than is said above."
    )


def _loader_precision(found: Preflight) -> tuple[str, str]:
    """(precision for Open-Sora Load Model, a line for a person about it)."""
    wanted = found.recommended.settings.precision
    if wanted == found.model.stored or (found.recommended is found.asked and found.request.settings.precision == AUTO):
        return AUTO, ""  # as stored; a quantised file takes nothing else
    return wanted, f"{NF4} is experimental in ComfyUI: it needs the library bitsandbytes, and takes no LoRA." if wanted == NF4 else ""
