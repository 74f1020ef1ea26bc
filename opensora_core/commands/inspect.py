"""`inspect`: what a weights file or model folder is; with --check, whether it is what was released and runs."""

import argparse
import sys

from ..checkpoint.inspect import check, report
from ..cli import DONE, REFUSED


def run(args: argparse.Namespace) -> int:
    """Write the report to standard output; a failed check ends as a bad file does."""
    if not args.check:
        sys.stdout.write(report(args.path) + "\n")
        return DONE
    found = check(args.path)
    sys.stdout.write(found.text + "\n")
    return DONE if found.passed else REFUSED
