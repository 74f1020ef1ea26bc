"""The command line: what may be asked, and with which exit code it ends. The options are in commands/options.py, the work in commands/.

Exit codes: 0 done, 1 some videos failed, 2 bad arguments or files, 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Callable

from . import __version__
from .commands import options as asked
from .commands.options import INTERRUPTED, REFUSED, SOME_FAILED, add_options, taken
from .errors import OpenSoraError, OutOfMemory

_ENDS = "Exit codes: 0 done, 1 some videos failed, 2 bad arguments or files, 130 interrupted. Paths of what is made go to standard output, the rest to standard error."
_MODEL = ("model", "--model, or the four parts of one")  # a group's title and what it says


class Parser(argparse.ArgumentParser):
    """argparse, with one sentence in place of the usage text when it refuses."""

    def error(self, message):
        self.exit(REFUSED, f"error: {message} (see {self.prog} --help)\n")


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code. `--help` and refused arguments raise SystemExit, as argparse does."""
    try:
        args = build_parser().parse_args(arguments)
        return args.run(taken(args.options, args))
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
    """The parser of every command; `args.run(taken(args.options, args))` runs the chosen one."""
    parser = Parser(
        prog="python -m opensora_core",
        description="Open-Sora 2.0: text and pictures to video, without ComfyUI. COMMAND --help lists what a command can be asked.",
        epilog=f'To begin: %(prog)s generate --prompt "a red circle moving right on a blue background" makes a video with the built-in model. {_ENDS}',
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"opensora_core {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Callable, options: type, summary: str, description: str, epilog: str | None = None) -> Parser:
        made = commands.add_parser(name, help=summary, description=description, epilog=epilog, allow_abbrev=False)
        made.set_defaults(run=run, options=options)
        return made

    about = "Make videos of a prompt, and of pictures or a clip if given; by default with the built-in model."
    _generate_options(command("generate", _generate, asked.GenerateOptions, "make videos", about, _ENDS))
    about = "Measure seconds per stage and peak memory; writes a JSON report, no video."
    _benchmark_options(command("benchmark", _benchmark, asked.BenchmarkOptions, "measure time and memory", about))
    about = (
        "Make videos of coloured shapes that move, read them by plain computer vision, print how many show what was asked. "
        "For the built-in model, or to compare two precisions, modes or files of it on the same prompts and noise."
    )
    _evaluate_options(command("evaluate", _evaluate, asked.EvaluateOptions, "count how many prompts come out right", about))
    about = "Say what a weights file is, its dtype and size, what is missing or extra; or, with --plan, what memory a video needs."
    _inspect_options(command("inspect", _inspect, asked.InspectOptions, "say what a weights file is", about))
    about = "Write a quantised copy of a transformer file, in ComfyUI's own format, in little memory; say what it changed."
    add_options(command("quantize", _quantize, asked.QuantizeOptions, "write a transformer file in 8 bits", about), asked.QuantizeOptions)
    return parser


def _generate_options(parser: Parser) -> None:
    own = asked.GenerateOptions
    add_options(parser, own, "num_samples", "out")
    add_options(parser.add_argument_group(*_MODEL), asked.ModelOptions)
    video = parser.add_argument_group("video")
    add_options(video.add_mutually_exclusive_group(required=True), own, "prompt", "csv")
    add_options(video, asked.VideoOptions)
    add_options(parser.add_argument_group("sampling"), asked.SamplerOptions)
    add_options(parser.add_argument_group("machine"), asked.MachineOptions)
    longer = "go on from the video (experimental); the latents so far are kept beside it as .latent"
    add_options(parser.add_argument_group("longer", longer), asked.ExtendOptions)
    about = "text to picture to video: Flux.1 draws the first frame, with the same T5 and CLIP"
    picture = parser.add_argument_group("picture", about)
    add_options(picture, own, "t2i2v")
    add_options(picture, asked.PictureOptions)


def _benchmark_options(parser: Parser) -> None:
    own = asked.BenchmarkOptions
    add_options(parser, own, "warmup_count", "eval_count", "benchmark_save_path")
    add_options(parser.add_argument_group(*_MODEL), asked.ModelOptions)
    video = parser.add_argument_group("video")
    add_options(video, own, "prompt")
    add_options(video, asked.VideoOptions)
    add_options(parser.add_argument_group("sampling"), asked.SamplerOptions)
    add_options(parser.add_argument_group("machine"), asked.MachineOptions)


def _evaluate_options(parser: Parser) -> None:
    add_options(parser.add_argument_group(*_MODEL), asked.ModelOptions)
    add_options(parser.add_argument_group("what is judged"), asked.JudgeOptions)
    add_options(parser.add_argument_group("machine"), asked.MachineOptions)
    against = "the same prompts and noise with one or more of these, and PSNR between the two runs"
    asked.add_against(parser.add_argument_group("second run", against))


def _inspect_options(parser: Parser) -> None:
    add_options(parser, asked.InspectOptions, "path", "check", "plan")
    add_options(parser.add_argument_group("plan", "what a video needs; all that follows goes with --plan"), asked.PlanOptions)


# Each command is imported when it runs: `--help` answers without torch.
def _generate(options: asked.GenerateOptions) -> int:
    from .commands.generate import run

    return run(options)


def _benchmark(options: asked.BenchmarkOptions) -> int:
    from .commands.benchmark import run

    return run(options)


def _evaluate(options: asked.EvaluateOptions) -> int:
    from .evaluation.command import run

    return run(options)


def _inspect(options: asked.InspectOptions) -> int:
    from .commands.inspect import run

    return run(options)


def _quantize(options: asked.QuantizeOptions) -> int:
    from .commands.quantize import run

    return run(options)
