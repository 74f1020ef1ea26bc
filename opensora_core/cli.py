"""The command line: what may be asked, and with which exit code it ends. The options stand in commands/options.py, the work in commands/.

Exit codes: 0 done, 1 some videos failed, 2 bad arguments or files, 130 interrupted.
"""

import argparse
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from . import __version__
from .commands import options as asked
from .commands.options import INTERRUPTED, REFUSED, SOME_FAILED
from .errors import OpenSoraError, OutOfMemory, readable
from .memory.limits import limits
from .names import shown

_ENDS = "Exit codes: 0 done, 1 some videos failed, 2 bad arguments or files, 130 interrupted. Paths of what is made go to standard output, the rest to standard error."
LEAST_BYTES = 800 << 20  # of main memory that libraries take before anything is done
NO_ROOM = (
    "Give this process more memory (ulimit -v, a container's memory), or close other programs: there is not enough for it to begin, the libraries "
    "alone take about 800 MB."
)
_COMMANDS = {
    "generate": (asked.GenerateOptions, "make videos"),
    "benchmark": (asked.BenchmarkOptions, "measure time and memory"),
    "calibrate": (asked.CalibrateOptions, "find the best steps for --speed"),
    "evaluate": (asked.EvaluateOptions, "count how many prompts come out right"),
    "inspect": (asked.InspectOptions, "say what a weights file is"),
    "quantize": (asked.QuantizeOptions, "write a transformer file in 8 bits"),
    "colours": (asked.ColoursOptions, "fit the colours of previews for a VAE"),
}
_USAGE = {
    "generate": """%(prog)s --prompt TEXT [options]

  %(prog)s --prompt "a red circle moving right on a blue background" --out circle.mp4
  %(prog)s --model Open-Sora-v2 --prompt "Raining, sea" --resolution 256px --num-frames 5s --out rain.mp4
  %(prog)s --model Open-Sora-v2 --ref first.png --prompt "The waves roll in" --out waves.mp4"""
}
# What the guides of Open-Sora 1 ask for and is asked for otherwise here.
_ELSEWHERE = {
    "--llm-refine": "with --refine-prompt and --refine-model DIR a model of your own writes the long prompt",
    "--flash-attn": "attention is chosen by --attention; leave this flag out",
    "--layernorm-kernel": "it chooses a library of upstream's; leave it out",
}


class Parser(argparse.ArgumentParser):
    """argparse, with one sentence in place of the usage text when it refuses."""

    def error(self, message):
        message += "".join(f"; {name}: {advice}" for name, advice in _ELSEWHERE.items() if f" {name}" in message)
        self.exit(REFUSED, f"error: {readable(message)} (see {self.prog} --help)\n")


@contextmanager
def at_a_terminal() -> Iterator[None]:
    """Let names of any bytes be written, and Ctrl-C end what it meets even where Python swallows it: what forks run (the encoder is forked) cannot
    raise, and says so to a hook."""
    for stream, errors in ((sys.stdout, "surrogateescape"), (sys.stderr, "backslashreplace")):  # names of any bytes are names
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)
    usual = sys.unraisablehook

    def again(unraisable) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            usual(unraisable)
            return
        # Not from in here, which cannot raise either.
        timer = threading.Timer(0.05, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
        timer.daemon = True
        timer.start()

    if hasattr(signal, "pthread_kill"):
        sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = usual


@at_a_terminal()
def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code. `--help` and refused arguments raise SystemExit, as argparse does."""
    sentence, code = NO_ROOM, REFUSED
    try:
        args = build_parser().parse_args(arguments)
        options = asked.taken(args.options, args)
        if getattr(options, "gpus", 1) != 1 and "RANK" not in os.environ:
            from .commands import gpus

            return gpus.run(options, main, sys.argv[1:] if arguments is None else arguments)
        return run(args.command, options)
    except OpenSoraError as error:
        sentence, code = str(error), SOME_FAILED if isinstance(error, OutOfMemory) else REFUSED
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == __package__.split(".")[0]:
            raise
        sentence = f"Run `pip install .` in Open-Sora's folder, which brings what is needed: the library {error.name} is not installed here"
    except BrokenPipeError:
        # Whoever read the paths of finished videos is gone (`| head`); closing the pipe at the end would complain once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sentence, code = "standard output is closed", SOME_FAILED
    except (MemoryError, ImportError) as error:  # a library that does not fit is one that cannot be imported
        if isinstance(error, ImportError) and not any(words in str(error) for words in ("failed to map", "annot allocate memory")):
            raise
    except OSError as error:
        if error.errno != errno.ENOMEM:
            if error.filename is None:
                raise
            sentence = f"{shown(error.filename)}: {error.strerror}"
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return INTERRUPTED
    sys.stderr.write(f"error: {sentence}\n")
    return code


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command; `run(args.command, taken(args.options, args))` runs the chosen one."""
    parser = Parser(
        prog="python -m opensora_core",
        description="Open-Sora and CogVideoX: text and pictures to video, without ComfyUI. COMMAND --help lists what a command can be asked.",
        epilog=f'To begin: %(prog)s generate --prompt "a red circle moving right on a blue background" makes a video with the built-in model. {_ENDS}',
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"opensora_core {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", dest="command")
    for name, (options, summary) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=options.__doc__, epilog=_ENDS, allow_abbrev=False)
        command.set_defaults(options=options)
        command.usage = _USAGE.get(name)
        asked.add_options(command, options)
        if options is asked.EvaluateOptions:
            asked.add_against(command)
    return parser


def run(command: str, options) -> int:
    """Run a command; they are imported only now: `--help` answers without torch."""
    if any(limit.free < LEAST_BYTES for limit in limits()):  # libraries that run out while they begin end the process themselves
        raise OpenSoraError(NO_ROOM)
    from .commands import benchmark, calibrate, colours, generate, inspect, quantize
    from .evaluation import command as evaluate

    modules = {"benchmark": benchmark, "calibrate": calibrate, "colours": colours, "evaluate": evaluate, "generate": generate}
    return (modules | {"inspect": inspect, "quantize": quantize})[command].run(options)
