"""`benchmark`: seconds per stage and peak memory of whole runs, as a JSON report."""

import argparse
import json
import os
import platform
import statistics
import sys
from pathlib import Path

import torch

from .. import __version__
from ..cli import DONE
from ..errors import OpenSoraError, complete_or_absent
from ..pipeline import OpenSoraPipeline
from ..run.result import GenerationResult
from .options import CallSettings, call_settings, check_writable, pipeline, say
from .progress import Bars
from .references import PATHS


def run(args: argparse.Namespace) -> int:
    """Run `--warmup-count` and then `--eval-count` times, write the report and its path."""
    for name in ("warmup_count", "eval_count"):
        least = 1 if name == "eval_count" else 0
        if getattr(args, name) < least:
            raise OpenSoraError(f"--{name.replace('_', '-')} {getattr(args, name)} is too few; use at least {least}.")
    path = Path(args.benchmark_save_path).expanduser()
    if path.is_dir():
        raise OpenSoraError(f"--benchmark-save-path {path} is a folder; give the report's file name.")
    settings = call_settings(args)
    pipe = pipeline(args)
    check_writable(path.parent, path.name)
    warmup = [_measure(pipe, args.prompt, settings, f"warm-up {k + 1}") for k in range(args.warmup_count)]
    runs = [_measure(pipe, args.prompt, settings, f"run {k + 1} of {args.eval_count}") for k in range(args.eval_count)]
    report = {
        "opensora_core": __version__,
        "hardware": _hardware(pipe.device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "system": platform.platform(),
        },
        "settings": _settings(args, pipe, settings),
        "warmup": warmup,
        "runs": runs,
        "median_seconds": {stage: statistics.median(run["seconds"][stage] for run in runs) for stage in runs[0]["seconds"]},
        "peak_memory_bytes": max((run["peak_memory_bytes"] or 0 for run in runs), default=0) or None,
        "peak_memory_is": "allocated on the device" if pipe.device.type == "cuda" else "resident memory of the process since it began",
    }
    with complete_or_absent(path) as partial:
        partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for stage, seconds in report["median_seconds"].items():
        say(f"{stage:>10}  {seconds:.3f} s")
    sys.stdout.write(f"{path}\n")
    return DONE


def _measure(pipe: OpenSoraPipeline, prompt: str, settings: CallSettings, title: str) -> dict:
    on_cuda = pipe.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(pipe.device)
    with Bars(title) as bars:
        result = pipe(prompt, seed=settings.seed, callback=bars.step, progress=bars.progress, **settings.arguments)
    return {
        "seconds": _seconds(result, settings.arguments["num_inference_steps"]),
        "forwards": result.forwards,
        "forwards_saved": result.forwards_saved,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(pipe.device) if on_cuda else _peak_resident_bytes(),
        "notes": result.notes,
    }


def _seconds(result: GenerationResult, num_steps: int) -> dict[str, float]:
    stages = {stage: round(seconds, 6) for stage, seconds in result.seconds.items()}
    return {**stages, "per_step": round(result.seconds["sampling"] / num_steps, 6), "total": round(sum(result.seconds.values()), 6)}


def _settings(args: argparse.Namespace, pipe: OpenSoraPipeline, settings: CallSettings) -> dict:
    """What was run, without the paths of this machine."""
    names = ("precision", "offload", "budget_gib", "attention", "decode_policy", "warmup_count", "eval_count", "prompt")
    call = {name: value for name, value in settings.arguments.items() if isinstance(value, (int, float, str))}
    given = {name: settings.arguments.get(name) is not None for name in PATHS}
    chosen = {name: getattr(args, name) for name in names}
    return {**call, **given, **chosen, "seed": settings.seed, "dtype": str(pipe.dtype).removeprefix("torch."), "device": str(pipe.device)}


def _hardware(device: torch.device) -> dict:
    found = {"cpu": _cpu_name(), "cpu_cores": os.cpu_count(), "torch_threads": torch.get_num_threads()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"device": properties.name, "device_memory_bytes": properties.total_memory}
    return found


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _peak_resident_bytes() -> int | None:
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
