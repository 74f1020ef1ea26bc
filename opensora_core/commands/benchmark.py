"""`benchmark`: seconds per stage and peak memory of whole runs, as a JSON report."""

import os
import platform
import statistics
import sys

import torch

from .. import __version__
from ..memory.limits import proc_fields
from ..pipeline import OpenSoraPipeline
from ..run.request import random_seed
from .frames import PATHS, call_arguments
from .model import pipeline
from .options import DONE, BenchmarkOptions
from .output import check_count, check_writable, report_path, say, write_report
from .progress import Bars


def run(options: BenchmarkOptions) -> int:
    """Run `--warmup-count` and then `--eval-count` times, write the report and its path."""
    check_count("--warmup-count", options.warmup_count, 0)
    check_count("--eval-count", options.eval_count)
    path = report_path("--benchmark-save-path", options.benchmark_save_path)
    pipe = pipeline(options)
    arguments = call_arguments(options, pipe.files) | {"seed": random_seed() if options.seed is None else options.seed}
    check_writable(path.parent, path.name)
    warmup = [_measure(pipe, options.prompt, arguments, f"warm-up {k + 1}") for k in range(options.warmup_count)]
    runs = [_measure(pipe, options.prompt, arguments, f"run {k + 1} of {options.eval_count}") for k in range(options.eval_count)]
    cpu = proc_fields("cpuinfo").get("model name") or platform.processor() or platform.machine()
    hardware = {"cpu": cpu, "cpu_cores": os.cpu_count(), "torch_threads": torch.get_num_threads()}
    if pipe.device.type == "cuda":
        properties = torch.cuda.get_device_properties(pipe.device)
        hardware |= {"device": properties.name, "device_memory_bytes": properties.total_memory}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda, "system": platform.platform()}
    report = {
        "opensora_core": __version__,
        "hardware": hardware,
        "versions": versions,
        "settings": _settings(options, pipe, arguments),
        "warmup": warmup,
        "runs": runs,
        "median_seconds": {stage: statistics.median(run["seconds"][stage] for run in runs) for stage in runs[0]["seconds"]},
        "peak_memory_bytes": max((run["peak_memory_bytes"] or 0 for run in runs), default=0) or None,
        "peak_memory_is": "allocated on the device" if pipe.device.type == "cuda" else "resident memory of the process since it began",
    }
    for stage, seconds in report["median_seconds"].items():
        say(f"{stage:>10}  {seconds:.3f} s")
    write_report(path, report)
    return DONE


def _measure(pipe: OpenSoraPipeline, prompt: str, arguments: dict, title: str) -> dict:
    on_cuda = pipe.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(pipe.device)
    steps = 0

    def count(step: int, *others) -> None:
        nonlocal steps
        steps = step
        bars.step(step, *others)

    with Bars(title) as bars:
        result = pipe(prompt, callback=count, progress=bars.progress, **arguments)
    seconds = result.seconds | {"per_step": result.seconds["sampling"] / steps, "total": sum(result.seconds.values())}
    return {
        "seconds": {stage: round(number, 6) for stage, number in seconds.items()},
        "forwards": result.forwards,
        "forwards_saved": result.forwards_saved,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(pipe.device) if on_cuda else _peak_resident_bytes(),
        "notes": result.notes,
    }


def _settings(options: BenchmarkOptions, pipe: OpenSoraPipeline, arguments: dict) -> dict:
    """What was run, without the paths of this machine."""
    names = ("precision", "offload", "budget_gib", "attention", "decode_policy", "warmup_count", "eval_count", "prompt")
    call = {name: value for name, value in arguments.items() if isinstance(value, (int, float, str))}
    given = {name: arguments.get(name) is not None for name in (*PATHS, "references")}
    chosen = {name: getattr(options, name) for name in names}
    return {**call, **given, **chosen, "dtype": str(pipe.dtype).removeprefix("torch."), "device": str(pipe.device)}


def _peak_resident_bytes() -> int | None:
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
