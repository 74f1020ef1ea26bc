"""What every benchmark writes beside its figures: the machine, the versions and the command."""

import json
import os
import platform
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> dict:
    """Hardware and versions, with no name or path of the machine."""
    facts = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpu": None,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {"gpu": properties.name, "gpu_gib": round(properties.total_memory / 2**30, 1), "cuda": torch.version.cuda}
    return facts


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def write(name: str, figures: dict, path: str | None = None) -> Path:
    """Write results/<name>_<device>.json (or `path`) and return where it is."""
    facts = machine()
    device = "cpu" if facts["gpu"] is None else facts["gpu"].lower().replace(" ", "-")
    target = Path(path) if path else RESULTS / f"{name}_{device}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    document = {"benchmark": name, "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"), "command": command, "machine": facts, **figures}
    target.write_text(json.dumps(document, indent=2) + "\n")
    return target
