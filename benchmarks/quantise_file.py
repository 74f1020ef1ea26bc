"""Quantising and loading a file of the released size: seconds, and how much memory of its own the process needs.

    python -m benchmarks.quantise_file [--format int8] [--folder DIR] [--out FILE]

The source has the released model's 11.9 billion parameters, of which the first double and the first single block are random numbers;
the rest is a hole, which costs no disk. What is written costs 15 GB in the folder until the run ends. Memory is Linux's RssAnon: pages
that cannot be given back, unlike those of a mapped file.
"""

import argparse
import json
import math
import struct
import sys
import tempfile
import time
from pathlib import Path

import torch

from opensora_core.checkpoint.load import load_transformer
from opensora_core.checkpoint.quantize import quantize
from opensora_core.choices import FILE_FORMATS
from opensora_core.families.table import manifest
from opensora_core.networks.mmdit.config import OPEN_SORA_2

from . import record

REAL = ("double_blocks.0.", "single_blocks.0.")


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def write_source(path: Path) -> int:
    """A bf16 file of the released shapes; returns its length."""
    header, end = {}, 0
    for key, shape in manifest(OPEN_SORA_2).items():
        begin, end = end, end + 2 * math.prod(shape)
        header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header).encode()
    generator = torch.Generator().manual_seed(0)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
        for key, entry in header.items():
            if key.startswith(REAL):
                file.seek(8 + len(text) + entry["data_offsets"][0])
                values = torch.randn(entry["shape"], generator=generator, dtype=torch.float32).mul_(0.02).to(torch.bfloat16)
                file.write(values.view(torch.int16).numpy())
    return 8 + len(text) + end


def run(format: str, folder: Path) -> dict:
    source, target = folder / "source.safetensors", folder / "quantised.safetensors"
    source_bytes = write_source(source)
    peak, begun, before = 0, time.perf_counter(), anonymous_bytes()

    def progress(done: int, total: int, key: str) -> None:
        nonlocal peak
        peak = max(peak, anonymous_bytes() - before)
        if done % 100 == 0:
            sys.stderr.write(f"{done}/{total} {time.perf_counter() - begun:.0f} s\n")

    report = quantize(source, target, format, progress=progress)
    seconds = time.perf_counter() - begun
    begun, before = time.perf_counter(), anonymous_bytes()
    model = load_transformer(target)
    loaded = {"seconds": round(time.perf_counter() - begun, 2), "anonymous_bytes": anonymous_bytes() - before}
    errors = [error for layer, error in report.errors.items() if layer.startswith(REAL)]
    return {
        "format": format,
        "parameters": sum(math.prod(shape) for shape in manifest(OPEN_SORA_2).values()),
        "source_bytes": source_bytes,
        "target_bytes": report.target_bytes,
        "layers_quantised": len(report.errors),
        "layers_kept": len(report.kept),
        "relative_rms_of_the_real_blocks": [round(min(errors), 5), round(max(errors), 5)],
        "quantise": {"seconds": round(seconds, 1), "peak_anonymous_bytes_after_a_tensor": peak, "largest_tensor_bytes": 2 * 3072 * 18432},
        "load": loaded,
        "held_bytes": sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--format", choices=FILE_FORMATS, default="int8")
    parser.add_argument("--folder", help="where there is room (default: the system's temporary folder)")
    parser.add_argument("--out")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        figures = run(args.format, Path(folder))
    sys.stdout.write(json.dumps(figures, indent=2) + "\n")
    sys.stdout.write(f"{record.write(f'quantise_file_{args.format}', figures, args.out)}\n")


if __name__ == "__main__":
    main()
