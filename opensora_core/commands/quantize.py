"""`quantize`: write a transformer file in 8 bits, in ComfyUI's own format, and say what that changed."""

import sys

from ..checkpoint.quantize import quantize
from .options import DONE, QuantizeOptions
from .progress import Bar


def run(options: QuantizeOptions) -> int:
    """Write the file; the report goes to standard output, progress to standard error."""
    with Bar(desc=options.format, unit="tensor", delay=0.5) as bar:
        groups = options.layers.split(",")
        report = quantize(options.source, options.target, options.format, groups, lambda done, total, key: bar.reach(done, total))
    lines = [f"{error:.3%}  {layer}" for layer, error in report.errors.items()] if options.all_layers else []
    sys.stdout.write("\n".join([report.text(), *lines]) + "\n")
    return DONE
