"""What the moving preview costs a run: `python -m benchmarks.preview_cost` (needs a ComfyUI, whose own Python runs it).

Work of the processor's stands for sampling steps, with a clip offered after each as nodes/host/preview.py is offered it. Says how much of the time
pictures took by the preview's own clock. Ends with 1 where that is above the limit.
"""

import argparse
import asyncio
import importlib
import os
import sys
import time

from demo import comfy as installations

# Latents [C, T, h, w] of 129 frames, and of the built-in model's 17.
CLIPS = {"built-in model, 64 x 64": (16, 5, 8, 8), "256px, 336 x 192": (16, 33, 24, 42), "768px, 1024 x 576": (16, 33, 72, 128)}


def load_preview(installation):
    """nodes.host.preview inside the host, on the processor."""
    sys.path.insert(0, str(installation.root))
    import comfy.options

    comfy.options.enable_args_parsing(False)
    from comfy.cli_args import args

    args.cpu = True
    spec = importlib.util.spec_from_file_location(
        "pack", installations.PACK / "__init__.py", submodule_search_locations=[str(installations.PACK)]
    )
    sys.modules["pack"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["pack"])
    asyncio.run(sys.modules["pack"].comfy_entrypoint())
    return importlib.import_module("pack.nodes.host.preview")


def measure(preview, shape: tuple[int, ...], seconds: float) -> dict:
    """A run of so many seconds with a clip of this shape."""
    import torch

    sent, clip, weight = [], torch.randn(1, *shape), torch.randn(768, 768)
    one = preview.Preview((torch.randn(3, shape[0]) / 8, torch.zeros(3)), lambda picture, *_: sent.append(len(picture)))
    began, step = time.monotonic(), 0
    while time.monotonic() - began < seconds:
        x = weight
        for _ in range(12):  # a few hundredths of a second
            x = torch.nn.functional.normalize(x @ weight)
        step += 1
        one.offer(clip, step, 10**6)
    if one.at_work is not None:
        one.at_work.join()
    passed, count = time.monotonic() - began, max(1, len(sent))
    return {
        "pictures": len(sent),
        "bytes_each": round(sum(sent) / count),
        "seconds_each": round(one.spent / count, 4),
        "percent_of_the_time": round(100 * one.spent / passed, 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preview_cost", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=40.0, help="of each run (default: 40)")
    parser.add_argument("--out", help="JSON file (default: benchmarks/results/preview_cost_<device>.json)")
    arguments = parser.parse_args()
    installation = installations.find()
    if installation is None:
        print("No ComfyUI found; set COMFYUI_PATH to a checkout.", file=sys.stderr)
        return 2
    if os.path.realpath(sys.prefix) != os.path.realpath(installation.python.parent.parent):
        os.execv(installation.python, [str(installation.python), "-m", "benchmarks.preview_cost", *sys.argv[1:]])
    preview = load_preview(installation)
    from . import record

    clips = {name: measure(preview, shape, arguments.seconds) for name, shape in CLIPS.items()}
    for name, one in clips.items():
        print(f"{name}: {one['pictures']} pictures of {one['seconds_each']} s, {one['percent_of_the_time']} % of the time")
    limit = 100 * preview.SHARE
    print(record.write("preview_cost", {"limit_percent": limit, "clips": clips}, arguments.out).name)
    return int(any(one["percent_of_the_time"] > limit for one in clips.values()))


if __name__ == "__main__":
    sys.exit(main())
