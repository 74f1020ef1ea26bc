"""The command line: what may be asked, and with which exit code it ends. The work is in commands/.

Exit codes: 0 done, 1 some videos failed, 2 bad arguments or files, 130 interrupted.
"""

import argparse
import os
import sys

from . import __version__
from .errors import OpenSoraError, OutOfMemory
from .geometry import ASPECT_RATIOS, RESOLUTIONS

DONE, SOME_FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130
COND_TYPES = ("t2v", "i2v_head", "i2v_tail", "i2v_loop", "v2v_head", "v2v_tail", "v2v_head_easy", "v2v_tail_easy")
ASPECT_OF_REFERENCE = "image"
_CHOICES = {
    "dtype": ("auto", "fp32", "bf16"),
    "attention": ("sdpa", "sliced"),
    "precision": ("auto", "fp32", "bf16", "fp8_e4m3fn", "int8", "nf4"),
    "offload": ("auto", "resident", "budget", "minimal"),
    "decode-policy": ("auto", "exact", "low_memory"),
}
_ENDS = "Exit codes: 0 done, 1 some videos failed, 2 bad arguments or files, 130 interrupted. Paths of what is made go to standard output, the rest to standard error."
# What inspect asks about a video, which without --plan nobody asked for.
_OF_A_PLAN = (
    "resolution", "aspect_ratio", "width", "height", "num_frames", "fps", "num_steps", "cond_type", "gpu_gib", "ram_gib", "device",
    "precision", "offload", "budget_gib", "decode_policy",
)  # fmt: skip
EVALUATION_PARTS = ("vision", "t2v", "i2v", "last", "loop", "vae", "guidance")
# What generate asks about a picture, which without --t2i2v nobody asked for.
_OF_A_PICTURE = ("flux", "flux_vae", "image_steps", "image_seed", "image_prompt", "image_resolution", "flux_guidance", "flux_schedule")
# Columns of a table of videos, and the option that each stands for.
CSV_COLUMNS = {
    "prompt": "prompt",
    "negative": "negative_prompt",
    "image": "ref",
    "end_image": "ref_end",
    "seed": "seed",
    "length": "num_frames",
    "resolution": "resolution",
    "aspect_ratio": "aspect_ratio",
    "width": "width",
    "height": "height",
    "motion_score": "motion_score",
    "image_prompt": "image_prompt",
    "image_seed": "image_seed",
}


class Parser(argparse.ArgumentParser):
    """argparse, with one sentence in place of the usage text when it refuses."""

    def error(self, message):
        self.exit(REFUSED, f"error: {message} (see {self.prog} --help)\n")


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code. `--help` and refused arguments raise SystemExit, as argparse does."""
    try:
        args = build_parser().parse_args(arguments)
        return args.run(args)
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
    """The parser of every command; `args.run(args)` runs the chosen one."""
    parser = Parser(
        prog="python -m opensora_core",
        description="Open-Sora 2.0: text and pictures to video, without ComfyUI. COMMAND --help lists what a command can be asked.",
        epilog=f'To begin: %(prog)s generate --prompt "a red circle moving right on a blue background" makes a video with the built-in model. {_ENDS}',
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"opensora_core {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    generate = commands.add_parser(
        "generate",
        help="make videos",
        description="Make videos of a prompt, and of pictures or a clip if given; by default with the built-in model.",
        epilog=_ENDS,
        allow_abbrev=False,
    )
    _add_model(generate)
    _add_video(generate, prompt=None)
    _add_sampling(generate)
    _add_machine(generate)
    generate.add_argument("--num-samples", type=int, default=1, metavar="N", help="videos to make, with seed, seed + 1, ... (default 1)")
    generate.add_argument(
        "--out",
        default="outputs",
        metavar="PATH",
        help="a folder, or a file ending in .mp4 (.png for a single frame); never overwritten, numbered instead (default outputs)",
    )
    _add_extend(generate)
    _add_flux(generate)
    generate.set_defaults(run=_generate)

    benchmark = commands.add_parser(
        "benchmark",
        help="measure time and memory",
        description="Measure seconds per stage and peak memory; writes a JSON report, no video.",
        allow_abbrev=False,
    )
    _add_model(benchmark)
    _add_video(benchmark, prompt="raining, sea")
    _add_sampling(benchmark)
    _add_machine(benchmark)
    benchmark.add_argument("--warmup-count", type=int, default=1, metavar="N", help="runs before the measured ones (default 1)")
    benchmark.add_argument("--eval-count", type=int, default=3, metavar="N", help="measured runs (default 3)")
    benchmark.add_argument("--benchmark-save-path", default="benchmark.json", metavar="FILE", help="the report (default benchmark.json)")
    benchmark.set_defaults(run=_benchmark)

    _add_evaluate(commands)
    _add_inspect(commands)
    _add_quantize(commands)
    return parser


def _add_flux(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("picture", "text to picture to video: Flux.1 draws the first frame, with the same T5 and CLIP")
    group.add_argument("--t2i2v", action="store_true", help="draw the first frame; its picture is written beside the video")
    group.add_argument("--flux", metavar="FILE", help="flux1-dev or flux1-schnell (default: flux1-dev.safetensors in --model)")
    group.add_argument("--flux-vae", metavar="FILE", help="Flux's autoencoder (default: flux1-dev-ae.safetensors in --model)")
    group.add_argument(
        "--image-steps",
        type=int,
        default=0,
        metavar="N",
        help="steps of the picture; 0: 50 for dev, as released, and 4 for schnell (default 0)",
    )
    group.add_argument(
        "--image-seed",
        type=int,
        metavar="N",
        help="draw one picture of this seed for all videos (default: a picture for each, of the video's seed)",
    )
    group.add_argument("--image-prompt", metavar="TEXT", help="what the picture shows (default: --prompt)")
    group.add_argument(
        "--image-resolution",
        default="768px",
        metavar="NAME",
        help="size the picture is drawn in, before it is scaled to the video (default 768px)",
    )
    group.add_argument(
        "--flux-guidance",
        type=float,
        default=4.0,
        metavar="X",
        help="how strongly Flux dev follows the prompt; schnell reads none (default 4)",
    )
    group.add_argument(
        "--flux-schedule",
        choices=("auto", "open-sora", "flux"),
        default="auto",
        help="how the picture's steps are spaced: as released with Open-Sora, or Flux's own (default auto: the former for dev, the latter for schnell)",
    )
    parser.set_defaults(picture_defaults={name: parser.get_default(name) for name in _OF_A_PICTURE})


def _add_evaluate(commands) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="count how many prompts come out right",
        description="Make videos of coloured shapes that move, read them by plain computer vision, print how many show what was asked. "
        "For the built-in model, or to compare two precisions, modes or files of it on the same prompts and noise.",
        allow_abbrev=False,
    )
    _add_model(evaluate)
    group = evaluate.add_argument_group("what is judged")
    group.add_argument(
        "--parts",
        default=",".join(EVALUATION_PARTS),
        metavar="NAMES",
        help="vision (the judge itself, on true clips), t2v, i2v (first picture, redirected prompt), last (frame), loop (first and last "
        "frame), vae, guidance (default all)",
    )
    group.add_argument("--num-prompts", type=int, default=96, metavar="N", help="videos of each kind (default 96)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="prompts and noise are drawn from it (default 0)")
    _add_steps(group, 40)
    _add_guidance(group)
    group.add_argument("--out", metavar="FILE", help="also write a JSON report: every figure and every clip's verdict")
    _add_machine(evaluate)
    _add_against(evaluate)
    evaluate.set_defaults(run=_evaluate)


def _add_against(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("second run", "the same prompts and noise with one or more of these, and PSNR between the two runs")
    group.add_argument("--against-model", metavar="DIR|small", help="another model's folder")
    for part in ("dit", "vae", "t5", "clip", "lora"):
        group.add_argument(f"--against-{part}", metavar="PATH", help=f"another file in place of --{part}'s")
    for name in ("lora-strength", "guidance", "guidance-img", "budget-gib"):
        group.add_argument(f"--against-{name}", type=float, metavar="X", help=f"in place of --{name}")
    group.add_argument("--against-num-steps", type=int, metavar="N", help="in place of --num-steps")
    for name in ("dtype", "precision", "offload", "attention", "decode-policy"):
        group.add_argument(f"--against-{name}", metavar="NAME", help=f"in place of --{name}", choices=_CHOICES[name])


def _add_inspect(commands) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="say what a weights file is",
        description="Say what a weights file is, its dtype and size, what is missing or extra; or, with --plan, what memory a video needs.",
        allow_abbrev=False,
    )
    inspect.add_argument(
        "path", nargs="?", metavar="FILE_OR_DIR", help="a weights file, or a model folder (with --plan none: the released sizes)"
    )
    inspect.add_argument(
        "--check", action="store_true", help="also compare every key, shape and dtype with the released model and run a part of it"
    )
    group = inspect.add_argument_group("plan", "what a video needs; all that follows goes with --plan")
    group.add_argument(
        "--plan", action="store_true", help="say what GPU memory, RAM and how many forwards a video needs, and settings that fit"
    )
    _add_size(group, has_reference=False)
    _add_steps(group, 50)
    group.add_argument(
        "--cond-type", choices=COND_TYPES, default="t2v", help="what is given besides the prompt, as of generate (default t2v)"
    )
    group.add_argument("--gpu-gib", type=float, metavar="N", help="plan for a CUDA card with this much free instead of this machine's")
    group.add_argument("--ram-gib", type=float, metavar="N", help="plan for this much free main memory instead of this machine's")
    group.add_argument("--device", default="auto", help="auto, cuda, cuda:1, mps, cpu (default auto)")
    _add_memory(group)
    inspect.set_defaults(run=_inspect, plan_defaults={name: inspect.get_default(name) for name in _OF_A_PLAN})


def _add_quantize(commands) -> None:
    quantize = commands.add_parser(
        "quantize",
        help="write a transformer file in 8 bits",
        description="Write a quantised copy of a transformer file, in ComfyUI's own format, in little memory; say what it changed.",
        allow_abbrev=False,
    )
    quantize.add_argument("source", metavar="IN", help="the transformer's bf16, fp16 or fp32 file")
    quantize.add_argument("target", metavar="OUT", help="the new .safetensors file; never overwritten")
    quantize.add_argument(
        "--format", choices=("fp8_e4m3fn", "int8"), default="fp8_e4m3fn", help="what the large layers are written in (default fp8_e4m3fn)"
    )
    quantize.add_argument(
        "--layers",
        default="attention,mlp",
        metavar="GROUPS",
        help="which of them: attention, mlp, modulation (a smaller file, less exact), embedders, final_layer (default attention,mlp)",
    )
    quantize.add_argument("--all-layers", action="store_true", help="print the error of every layer, not of the worst five alone")
    quantize.set_defaults(run=_quantize)


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model", "--model, or the four parts of one")
    group.add_argument(
        "--model", metavar="DIR|small", help="a folder laid out as the hub repository is, or the built-in model (default small)"
    )
    for part, what in (
        ("dit", "the transformer's file"),
        ("vae", "the VAE's file"),
        ("t5", "T5's file or folder"),
        ("clip", "CLIP's file or folder"),
    ):
        group.add_argument(f"--{part}", metavar="PATH", help=what)
    group.add_argument("--tokenizers", metavar="DIR", help="where both tokenizers are (default: beside the encoders, else a ComfyUI's)")
    group.add_argument("--lora", metavar="PATH", help="a LoRA file or PEFT folder for the transformer")
    group.add_argument("--lora-strength", type=float, default=1.0, metavar="X", help="factor on the LoRA's change (default 1)")


def _add_video(parser: argparse.ArgumentParser, prompt: str | None) -> None:
    group = parser.add_argument_group("video")
    if prompt is None:
        source = group.add_mutually_exclusive_group(required=True)
        source.add_argument("--prompt", metavar="TEXT", help="what to show, in full sentences")
        source.add_argument(
            "--csv",
            metavar="FILE",
            help=f"a video for each row, in place of --prompt: columns {', '.join(CSV_COLUMNS)}, all but the first as needed; "
            "an empty cell is what this command line says. Goes on where it stopped when it is given again",
        )
    else:
        group.add_argument("--prompt", metavar="TEXT", default=prompt, help=f"what to show (default {prompt!r})")
    group.add_argument("--negative-prompt", metavar="TEXT", default="", help="what to avoid; encoded as it is (default none)")
    _add_size(group)
    group.add_argument(
        "--motion-score",
        type=int,
        default=4,
        metavar="N",
        help="how much moves, 1 (still) to 15 (wild), said in the prompt; 0 leaves it out (default 4)",
    )
    group.add_argument(
        "--cond-type",
        choices=COND_TYPES,
        help="what is given: nothing but the prompt (t2v); the first frame (i2v_head), the last (i2v_tail), both (i2v_loop); or a clip, extended "
        "forwards (v2v_head) or backwards (v2v_tail) from 33 of its frames, from 65 with _easy: experimental (default: as --ref and --ref-end "
        "say)",
    )
    group.add_argument(
        "--ref", metavar="FILE", help="the first frame (the last, with --cond-type i2v_tail), or a clip: its last frames begin the video"
    )
    group.add_argument("--ref-end", metavar="IMAGE", help="the last frame")
    group.add_argument(
        "--strength",
        type=float,
        default=1.0,
        metavar="X",
        help="how closely the video holds to --ref and --ref-end, 0 to 1: the share of the steps, from the first, that see them (default 1, exactly)",
    )
    group.add_argument(
        "--fit",
        choices=("crop", "pad", "stretch"),
        default="crop",
        help="how a picture or clip of another shape is fitted (default crop: it covers the video, and the middle is cut out)",
    )


def _add_extend(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("longer", "go on from the video (experimental); the latents so far are kept beside it as .latent")
    group.add_argument("--extend", type=int, metavar="N", help="how many segments to add")
    group.add_argument(
        "--extend-prompt",
        action="append",
        metavar="TEXT",
        help="what the next segment shows; may be repeated, the last holds for the rest (default: --prompt)",
    )
    group.add_argument(
        "--extend-frames",
        type=int,
        metavar="N",
        help="frames of a segment, 4k+1, those it is given included (default: as the video, at most 129)",
    )
    group.add_argument(
        "--extend-context", type=int, metavar="N", help="frames a segment is given, 4k+1 (default: a quarter of it, 33 of 129)"
    )
    group.add_argument("--extend-from", metavar="FILE", help="a .latent file to go on from, in place of a first clip")


def _add_size(group, has_reference: bool = True) -> None:
    of_reference = f", or {ASPECT_OF_REFERENCE}: the one nearest to --ref" if has_reference else ""
    group.add_argument(
        "--resolution", metavar="NAME", help=f"area of the picture: {', '.join(RESOLUTIONS)} (default 256px; the built-in model: 64x64)"
    )
    group.add_argument(
        "--aspect-ratio",
        metavar="W:H",
        help=f"width to height: {', '.join(ASPECT_RATIOS)}{of_reference} (default 16:9)",
    )
    group.add_argument(
        "--width", type=int, metavar="PX", help="with --height, in place of --resolution and --aspect-ratio; a multiple of 16"
    )
    group.add_argument("--height", type=int, metavar="PX", help="with --width; a multiple of 16")
    group.add_argument(
        "--num-frames",
        metavar="N|Ns",
        help="length: frames, 4k+1, or seconds such as 4s, to the nearest 4k+1 (default 129; the built-in model: 17)",
    )
    group.add_argument(
        "--fps", type=int, default=24, metavar="N", help="frames per second of the file, also said in the prompt (default 24)"
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    _add_steps(group, 50)
    _add_guidance(group)
    group.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="what the noise is drawn from: the same seed, settings and machine give the same video (default: drawn, and shown)",
    )


def _add_steps(group, default: int) -> None:
    group.add_argument("--num-steps", type=int, default=default, metavar="N", help=f"steps from noise to video (default {default})")


def _add_guidance(group) -> None:
    group.add_argument(
        "--guidance", type=float, default=7.5, metavar="X", help="how strongly the video follows the prompt; 1 is neutral (default 7.5)"
    )
    group.add_argument(
        "--guidance-img",
        type=float,
        default=3.0,
        metavar="X",
        help="how strongly the video follows the pictures or the clip it is given; 1 is neutral (default 3)",
    )


def _add_machine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", help="auto, cuda, cuda:1, mps, cpu (default auto)")
    group.add_argument(
        "--dtype", choices=_CHOICES["dtype"], default="auto", help="what is computed in (default auto: bf16, on the CPU fp32)"
    )
    _add_memory(group)
    group.add_argument(
        "--attention",
        choices=_CHOICES["attention"],
        default="sdpa",
        help="sliced: one head at a time, slower and in less memory (default sdpa)",
    )


def _add_memory(group) -> None:
    group.add_argument(
        "--precision",
        choices=_CHOICES["precision"],
        default="auto",
        help="what the large weights of transformer and T5 are held in (default auto: what is computed in; a quantised file as it is stored)",
    )
    group.add_argument(
        "--offload",
        choices=_CHOICES["offload"],
        default="auto",
        help="how many weights are on the device while sampling. auto: all that fit; resident: all of the transformer, or refuse; budget: at most "
        "--budget-gib; minimal: one block (default auto)",
    )
    group.add_argument("--budget-gib", type=float, metavar="N", help="GiB of weights on the device, with --offload budget (default 8)")
    group.add_argument(
        "--decode-policy",
        choices=_CHOICES["decode-policy"],
        default="auto",
        help="exact: the whole clip in time, with activations in main memory if the device has too little; low_memory: temporal tiles; "
        "auto: exact if that can be, and a line if not (default auto)",
    )


# Each command is imported when it runs: `--help` answers without torch.
def _generate(args: argparse.Namespace) -> int:
    from .commands.generate import run

    return run(args)


def _benchmark(args: argparse.Namespace) -> int:
    from .commands.benchmark import run

    return run(args)


def _evaluate(args: argparse.Namespace) -> int:
    from .evaluation.command import run

    return run(args)


def _inspect(args: argparse.Namespace) -> int:
    from .commands.inspect import run

    return run(args)


def _quantize(args: argparse.Namespace) -> int:
    from .commands.quantize import run

    return run(args)
