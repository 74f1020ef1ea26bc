"""`quantize`: write a transformer file in 8 bits, in ComfyUI's own format, and say what that changed."""

import sys

from tqdm import tqdm

from ..checkpoint.quantize import quantize
from .options import DONE, QuantizeOptions


def run(options: QuantizeOptions) -> int:
    """Write the file; the report goes to standard output, progress to standard error."""
    with tqdm(desc=options.format, unit="tensor", file=sys.stderr, dynamic_ncols=True, delay=0.5) as bar:

        def progress(done: int, total: int, key: str) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = quantize(options.source, options.target, options.format, options.layers.split(","), progress)
    lines = [f"{error:.3%}  {layer}" for layer, error in report.errors.items()] if options.all_layers else []
    sys.stdout.write("\n".join([report.text(), *lines]) + "\n")
    return DONE
