"""The command line: what may be asked, and with which exit code it ends. The options stand in commands/options.py, the work in commands/.

Exit codes: 0 done, 1 some videos failed, 2 bad arguments or files, 130 interrupted.
"""

import argparse
import os
import sys

from . import __version__
from .commands import options as asked
from .commands.options import INTERRUPTED, REFUSED, SOME_FAILED
from .errors import OpenSoraError, OutOfMemory

_ENDS = "Exit codes: 0 done, 1 some videos failed, 2 bad arguments or files, 130 interrupted. Paths of what is made go to standard output, the rest to standard error."
_COMMANDS = {
    "generate": (asked.GenerateOptions, "make videos"),
    "benchmark": (asked.BenchmarkOptions, "measure time and memory"),
    "evaluate": (asked.EvaluateOptions, "count how many prompts come out right"),
    "inspect": (asked.InspectOptions, "say what a weights file is"),
    "quantize": (asked.QuantizeOptions, "write a transformer file in 8 bits"),
}


class Parser(argparse.ArgumentParser):
    """argparse, with one sentence in place of the usage text when it refuses."""

    def error(self, message):
        self.exit(REFUSED, f"error: {message} (see {self.prog} --help)\n")


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code. `--help` and refused arguments raise SystemExit, as argparse does."""
    try:
        args = build_parser().parse_args(arguments)
        return run(args.command, asked.taken(args.options, args))
    except OpenSoraError as error:
        sys.stderr.write(f"error: {error}\n")
        return SOME_FAILED if isinstance(error, OutOfMemory) else REFUSED
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == __package__.split(".")[0]:
            raise
        sys.stderr.write(
            f"error: the library {error.name} is not installed in this Python; `pip install .` in Open-Sora's folder brings all that is needed\n"
        )
        return REFUSED
    except BrokenPipeError:
        # Whoever read the paths of finished videos is gone (`| head`); closing the pipe at the end would complain once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.stderr.write("error: standard output is closed\n")
        return SOME_FAILED
    except OSError as error:
        if error.filename is None:
            raise
        sys.stderr.write(f"error: {error.filename}: {error.strerror}\n")
        return REFUSED
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command; `run(args.command, taken(args.options, args))` runs the chosen one."""
    parser = Parser(
        prog="python -m opensora_core",
        description="Open-Sora 2.0: text and pictures to video, without ComfyUI. COMMAND --help lists what a command can be asked.",
        epilog=f'To begin: %(prog)s generate --prompt "a red circle moving right on a blue background" makes a video with the built-in model. {_ENDS}',
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"opensora_core {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", dest="command")
    for name, (options, summary) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=options.__doc__, epilog=_ENDS, allow_abbrev=False)
        command.set_defaults(options=options)
        asked.add_options(command, options)
        if options is asked.EvaluateOptions:
            asked.add_against(command)
    return parser


def run(command: str, options) -> int:
    """Run a command, which is imported only now: `--help` answers without torch."""
    if command == "generate":
        from .commands import generate as module
    elif command == "benchmark":
        from .commands import benchmark as module
    elif command == "evaluate":
        from .evaluation import command as module
    elif command == "inspect":
        from .commands import inspect as module
    else:
        from .commands import quantize as module
    return module.run(options)
