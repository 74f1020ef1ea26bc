"""`quantize`: write a transformer file in 8 bits, in ComfyUI's own format, and say what that changed."""

import argparse
import sys

from tqdm import tqdm

from ..checkpoint.quantize import quantize
from ..cli import DONE


def run(args: argparse.Namespace) -> int:
    """Write the file; the report goes to standard output, progress to standard error."""
    with tqdm(desc=args.format, unit="tensor", file=sys.stderr, dynamic_ncols=True, delay=0.5) as bar:

        def progress(done: int, total: int, key: str) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = quantize(args.source, args.target, args.format, args.layers.split(","), progress)
    lines = [f"{error.relative_rms:.3%}  {error.layer}" for error in report.errors] if args.all_layers else []
    sys.stdout.write("\n".join([report.text(), *lines]) + "\n")
    return DONE
