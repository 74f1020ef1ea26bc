"""What each command can be asked, every option said once: its flag, its default, its help. The parser's Namespace becomes one of these records.

A field is an option of the same name (num_frames is --num-frames) and of its own type; the class of a command says in its docstring what
the command does. cli.py builds the parser from them. Nothing heavy is imported, so that `--help` answers without torch.
"""

from argparse import ArgumentParser, Namespace
from dataclasses import Field, dataclass, field, fields
from inspect import get_annotations
from os.path import expanduser
from types import NoneType
from typing import Any, ClassVar, TypeVar, get_args, get_origin

from .. import choices
from ..errors import check_choice
from ..geometry import ASPECT_RATIOS, RESOLUTIONS
from ..text.prompt_1x import CAMERA_MOTIONS, MotionScore

DONE, SOME_FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130  # exit codes
ASPECT_OF_REFERENCE = "image"
ASPECT_ORDERS = ("wh", "hw")
EVALUATION_PARTS = ("vision", "t2v", "i2v", "last", "loop", "vae", "guidance")
# Columns of a table of videos, and the options that they stand for.
CSV_COLUMNS = {
    "prompt": "prompt", "negative": "negative_prompt", "image": "ref", "end_image": "ref_end", "seed": "seed", "length": "num_frames",
    "resolution": "resolution", "aspect_ratio": "aspect_ratio", "width": "width", "height": "height", "motion_score": "motion_score",
    "image_prompt": "image_prompt", "image_seed": "image_seed",
}  # fmt: skip
PATH_WORDS = ("PATH", "DIR", "DIR|small", "FILE", "IMAGE", "FILE;FILE")  # words for what is given, where that is a path
# What a second run of evaluate can have otherwise: --against-NAME.
PARTS = ("dit", "vae", "t5", "clip")
AGAINST = (
    "model", *PARTS, "lora", "lora_strength", "guidance", "guidance_img", "budget_gib", "num_steps", "dtype", "precision", "offload",
    "attention", "decode_policy", "speed",
)  # fmt: skip
_STEPS = "steps from noise to video"
_SPEED = (
    "exact: every step; balanced, fast, draft: a plan of 20, 12 or 9 of the released 50, and --num-steps is not read. Near exact by measurement "
    "on the built-in model; for another, calibrate says how near"
)

T = TypeVar("T")


def option(default: Any, values: str | tuple[str, ...] | None, text: str, kind: str = "flag", also: tuple[str, ...] = ()) -> Any:
    """A field of an options class.

    default: what holds where nobody says anything; ... where it must be said. values: a word for what is given, or all that can be given; None for
    a flag alone. text: its help; the default is added where the text does not speak of one. kind: flag: --name; place: given by its place on the
    line; source: one of these flags is given, and no other. also: other flags of the same, as the guides of Open-Sora 1 call it.
    """
    metadata = {"values": values, "help": text, "kind": kind, "also": also}
    return field(metadata=metadata) if default is ... else field(default=default, metadata=metadata)


def flag(name: str) -> str:
    """num_frames -> --num-frames."""
    return f"--{name.replace('_', '-')}"


def add_options(parser: ArgumentParser, options: type) -> None:
    """Give a parser the options of a class: its own, then a group for each class that it is made of."""
    left = {one.name: one for one in fields(options) if one.metadata}
    groups: dict[Any, Any] = {(): parser}
    for base in options.__mro__:
        for name in get_annotations(base):
            one = left.pop(name, None)
            if one is None:
                continue
            kind = one.metadata["kind"]
            title = kind if kind == "source" else () if base is options else base.GROUP
            if title not in groups:
                is_one_of = title == "source"
                groups[title] = parser.add_mutually_exclusive_group(required=True) if is_one_of else parser.add_argument_group(*title)
            if kind == "place":
                parser.add_argument(name, nargs="?" if one.default is None else None, metavar=one.metadata["values"], help=_help(one))
            else:
                groups[title].add_argument(flag(name), *one.metadata["also"], dest=name, default=one.default, help=_help(one), **_form(one))


def add_against(parser: ArgumentParser) -> None:
    """Give a parser the options of the second run of `evaluate`."""
    group = parser.add_argument_group("second run", "the same prompts and noise with one or more of these, and PSNR between the two runs")
    for one in fields(EvaluateOptions):
        if one.name in AGAINST:
            more, form = "", _form(one)
            if one.name == "speed":
                more, form = "; may be repeated, a run for each", {"action": "append", "choices": one.metadata["values"]}
            group.add_argument(flag(f"against_{one.name}"), help=f"in place of {flag(one.name)}{more}", **form)


def taken(options: type[T], args: Namespace) -> T:
    """The options of one command, of parsed arguments."""
    against = {name: value for name in AGAINST if (value := getattr(args, f"against_{name}", None)) is not None}
    return options(**{one.name: getattr(args, one.name) if one.metadata else against for one in fields(options)})


def changed(given: Any, options: type) -> list[str]:
    """The flags of a class that are not as they are where nobody asks for anything."""
    return [flag(one.name) for one in fields(options) if getattr(given, one.name) != one.default]


def _help(one: Field) -> str:
    text = one.metadata["help"]
    if "(default" in text or one.default == "" or not isinstance(one.default, (str, int, float)) or one.type is bool:
        return text
    return f"{text} (default {format(one.default, 'g' if isinstance(one.default, float) else '')})"


def _form(one: Field) -> dict[str, Any]:
    """What argparse reads a flag as."""
    if one.type is bool:
        return {"type": true_or_false, "metavar": one.metadata["values"]} if one.default else {"action": "store_true"}
    kind = next(kind for kind in get_args(one.type) or (one.type,) if kind is not NoneType)
    values = one.metadata["values"]
    kind = at_home if values in PATH_WORDS else kind
    form = {"choices": values} if isinstance(values, tuple) else {"metavar": values}
    if get_origin(kind) is tuple:
        return {"nargs": len(get_args(kind)), "type": get_args(kind)[0], "metavar": values}
    return {**form, "action": "append"} if get_origin(kind) is list else {**form, "type": kind}


def true_or_false(word: str) -> bool:
    """What the guides of Open-Sora 1 write behind a flag. The name is what argparse says of another word."""
    check_choice("a flag", word.lower(), ("true", "false"))
    return word.lower() == "true"


def at_home(paths: str) -> str:
    """Paths, with ; between them: ~ is the home folder, also where the shell leaves it as it is, in --ref=~/kite.png."""
    return ";".join(map(expanduser, paths.split(";")))


# A flag on a line or two: what holds without it, what it takes, its help.
# fmt: off


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model: a folder, or the four files of one."""

    GROUP: ClassVar = ("model", "--model, or the four parts of one")
    model: str | None = option(None, "DIR|small", "a folder laid out as the hub repository is, or the built-in model (default small)")
    dit: str | None = option(None, "PATH", "the transformer's file", also=("--ckpt-path-dit", "--ckpt-path"))
    vae: str | None = option(None, "PATH", "the VAE's file", also=("--ckpt-path-vae3d", "--ckpt-path-vae"))
    t5: str | None = option(None, "PATH", "T5's file or folder", also=("--ckpt-path-t5",))
    ckpt_path_vae2d: str | None = option(None, "PATH",
        "as --vae, for Open-Sora 1.0 and 1.1; SDXL's, where --vae is the temporal half of 1.2's")
    clip: str | None = option(None, "PATH", "CLIP's file or folder, where the model reads it")
    tokenizers: str | None = option(None, "DIR", "where both tokenizers are (default: beside the encoders, else a ComfyUI's)")
    lora: str | None = option(None, "PATH", "a LoRA file or PEFT folder for the transformer")
    lora_strength: float = option(1.0, "X", "factor on the LoRA's change")


@dataclass(frozen=True, kw_only=True)
class SizeOptions:
    """How large and how long a video is."""

    GROUP: ClassVar = ("video",)
    resolution: str | None = option(None, "NAME", f"area of the picture: {', '.join(RESOLUTIONS)} (default 256px; the built-in model: 64x64)")
    aspect_ratio: str | None = option(None, "W:H",
        f"width to height: {', '.join(ASPECT_RATIOS)}, or {ASPECT_OF_REFERENCE}: the one nearest to generate's --ref (default 16:9)")
    width: int | None = option(None, "PX", "with --height, in place of --resolution and --aspect-ratio; a multiple of 16")
    height: int | None = option(None, "PX", "with --width; a multiple of 16")
    image_size: tuple[int, int] | None = option(None, ("H", "W"), "as --height and --width, in the order of the guides of Open-Sora 1")
    aspect_order: str | None = option(None, ASPECT_ORDERS,
        "wh: --aspect-ratio is width to height, hw: height to width, as in the guides of Open-Sora 1 (default wh)")
    num_frames: str | None = option(None, "N|Ns",
        "length: frames, 4k+1, or seconds such as 4s, to the nearest 4k+1 (default 129; the built-in model: 17)")
    fps: int | None = option(None, "N",
        "frames per second of the file, also said in the prompt where the model reads it (default 24, or the model's own)")


@dataclass(frozen=True, kw_only=True)
class SamplerOptions:
    """How a video is sampled."""

    GROUP: ClassVar = ("sampling",)
    num_steps: int | None = option(None, "N", f"{_STEPS} (default 50, or the model's own)", also=("--num-sampling-steps",))
    guidance: float | None = option(None, "X",
        "how strongly the video follows the prompt; 1 is neutral (default 7.5, or the model's own, 6 for CogVideoX)", also=("--cfg-scale",))
    guidance_img: float | None = option(None, "X",
        "how strongly the video follows the pictures or the clip it is given; 1 is neutral (default 3; CogVideoX reads none)",
        also=("--image-cfg-scale",))
    seed: int | None = option(None, "N",
        "what the noise is drawn from: the same seed, settings and machine give the same video (default: drawn, and shown)")
    speed: str = option(choices.SPEEDS[0], choices.SPEEDS, _SPEED)
    plans: str | None = option(None, "DIR", "where plans of one's own are, as calibrate wrote them")


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """Where the networks are, and what their weights take there."""

    GROUP: ClassVar = ("machine",)
    device: str = option(choices.AUTO, "DEVICE", "auto, cuda, cuda:1, mps, cpu")
    precision: str = option(choices.AUTO, choices.PRECISIONS,
        "what the large weights of transformer and T5 are held in (default auto: what is computed in; a quantised file as it is stored)")
    offload: str = option(choices.AUTO, choices.OFFLOADS,
        "how many weights are on the device while sampling. auto: all that fit; resident: all of the transformer, or refuse; budget: at most --budget-gib; "
        "minimal: one block")
    budget_gib: float | None = option(None, "N", "GiB of weights on the device, with --offload budget (default 8)")
    decode_policy: str = option(choices.AUTO, choices.POLICIES,
        "exact: the whole clip in time, with activations in main memory if the device has too little; low_memory: temporal tiles; auto: exact if that can be, "
        "and a line if not")


@dataclass(frozen=True, kw_only=True)
class MachineOptions(MemoryOptions):
    """What is computed where, and how."""

    dtype: str = option(choices.AUTO, (choices.AUTO, *choices.DTYPES), "what is computed in (default auto: bf16, on the CPU fp32)")
    attention: str = option(choices.ATTENTIONS[0], choices.ATTENTIONS,
        "how attention is computed. auto, sdpa: as torch chooses; sliced: one head at a time, slower and in less memory; cudnn, sage, flash: by these, on "
        "NVIDIA GPUs in bf16, where they are installed")
    compile: bool = option(False, None, "compile the transformer's blocks, which takes a minute for each size and then is faster")


@dataclass(frozen=True, kw_only=True)
class VideoOptions(SizeOptions):
    """What a video shows, but for its prompt."""

    negative_prompt: str = option("", "TEXT", "what to avoid; encoded as it is (default none)")
    motion_score: MotionScore | None = option(None, "N",
        "how much moves, 1 (still) to 15 (wild), said in the prompt; of Open-Sora 1.2 and 1.3 0 to 100, or a word of 1.3's (fair); 0 leaves it out "
        "(default 4; Open-Sora 1: left out)", also=("--flow",))
    aesthetic_score: str | None = option(None, "N",
        "how good it looks, 0 to 10 or 1.3's words (very good), said to Open-Sora 1.2 and 1.3; 0 leaves it out (default: the model's own, 6.5 for 1.2)", also=("--aes",))
    camera_motion: str | None = option(None, "TEXT", f"said to Open-Sora 1.2 and 1.3: {', '.join(CAMERA_MOTIONS)}")
    text_oscillation: bool = option(True, "True|False", "let --guidance rest at every other step after the tenth, where the model was released so (default True)",
        also=("--use-oscillation-guidance-for-text",))
    image_oscillation: bool = option(True, "True|False", "likewise --guidance-img (default True)", also=("--use-oscillation-guidance-for-image",))
    sdedit: bool = option(True, "True|False", "Open-Sora 1.3: every step begins with what is given at that step's noise (default True)", also=("--use-sdedit",))
    mask_strategy: str | None = option(None, "GROUPS",
        "of Open-Sora 1.1 to 1.3: where frames of --reference-path go, loop,reference,reference start,target start,length,edit;... in latent frames")
    reference_path: str | None = option(None, "FILE;FILE", "pictures and clips of --mask-strategy or --cond-type, with ; between them")
    cond_type: str | None = option(None, choices.COND_TYPES,
        "what is given: nothing but the prompt (t2v); the first frame (i2v_head), the last (i2v_tail), both (i2v_loop); or a clip, extended forwards (v2v_head)"
        " or backwards (v2v_tail) from 33 of its frames, from 65 with _easy: experimental (default: as --ref and --ref-end say)")
    ref: str | None = option(None, "FILE", "the first frame (the last, with --cond-type i2v_tail), or a clip: its last frames begin the video")
    ref_end: str | None = option(None, "IMAGE", "the last frame")
    strength: float = option(1.0, "X",
        "how closely the video holds to --ref and --ref-end, 0 to 1: the share of the steps, from the first, that see them (default 1, exactly)")
    solver: str = option(choices.AUTO, choices.SOLVERS,
        "how steps are taken: euler for Open-Sora; dpm or ddim for CogVideoX (default auto: what the model was released with)")
    guidance_curve: str = option(choices.AUTO, choices.CURVES,
        "how --guidance goes over the steps of CogVideoX: the same at all; as the released code computes it; or the ramp that its formula means (default auto: "
        "released with dpm, else constant)")
    condition_scale: str = option(choices.AUTO, choices.CONDITION_SCALES,
        "what CogVideoX's picture is multiplied by: 1.0 as the authors' code has it for 1.5, or as diffusers does (default auto: the model's own)")
    unconditional: str = option(choices.AUTO, choices.UNCONDITIONALS,
        "what the pass without the prompt reads: --negative-prompt, encoded, or nothing (default auto: encoded)")
    parity: str = option("", ("", choices.DIFFUSERS, choices.SCRIPTS),
        "diffusers: compute schedules and scales as diffusers does where it differs; scripts: make the --loop of Open-Sora 1.1 to 1.3 as the published scripts "
        "do (default: neither)")
    fit: str = option(choices.FITS[0], choices.FITS,
        "how a picture or clip of another shape is fitted (default crop: it covers the video, and the middle is cut out)")


@dataclass(frozen=True, kw_only=True)
class RunOptions(ModelOptions, VideoOptions, SamplerOptions, MachineOptions):
    """All that a video is made by, but for its prompt."""


@dataclass(frozen=True, kw_only=True)
class ExtendOptions:
    """What is added to a video."""

    GROUP: ClassVar = ("longer", "go on from the video (experimental); the latents so far are kept beside it as .latent")
    extend: int | None = option(None, "N", "how many segments to add")
    extend_prompt: list[str] | None = option(None, "TEXT",
        "what the next segment shows; may be repeated, the last holds for the rest (default: --prompt)")
    extend_frames: int | None = option(None, "N", "frames of a segment, 4k+1, those it is given included (default: as the video, at most 129)")
    extend_context: int | None = option(None, "N", "frames a segment is given, 4k+1 (default: a quarter of it, 33 of 129)")
    extend_from: str | None = option(None, "FILE", "a .latent file to go on from, in place of a first clip")


@dataclass(frozen=True, kw_only=True)
class PictureOptions:
    """How the picture that a video begins with is drawn."""

    GROUP: ClassVar = ("picture", "with --t2i2v: Flux.1 draws the first frame, with the same T5 and CLIP")
    flux: str | None = option(None, "FILE", "flux1-dev or flux1-schnell (default: flux1-dev.safetensors in --model)")
    flux_vae: str | None = option(None, "FILE", "Flux's autoencoder (default: flux1-dev-ae.safetensors in --model)")
    image_steps: int = option(0, "N", "steps of the picture; 0: 50 for dev, as released, and 4 for schnell")
    image_seed: int | None = option(None, "N", "draw one picture of this seed for all videos (default: a picture for each, of the video's seed)")
    image_prompt: str | None = option(None, "TEXT", "what the picture shows (default: --prompt)")
    image_resolution: str = option("768px", "NAME", "size the picture is drawn in, before it is scaled to the video")
    flux_guidance: float = option(4.0, "X", "how strongly Flux dev follows the prompt; schnell reads none")
    flux_schedule: str = option(choices.AUTO, choices.PICTURE_SCHEDULES,
        "how the picture's steps are spaced: as released with Open-Sora, or Flux's own (default auto: the former for dev, the latter for schnell)")


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(RunOptions, ExtendOptions, PictureOptions):
    """Make videos of a prompt, and of pictures or a clip if given; by default with the built-in model."""

    prompt: str | None = option(None, "TEXT", "what to show, in full sentences", "source")
    prompt_path: str | None = option(None, "FILE", "a prompt on each line of a text file, in place of --prompt: a video for each", "source")
    csv: str | None = option(None, "FILE",
        f"a video for each row, in place of --prompt: columns {', '.join(CSV_COLUMNS)}, all but the first as needed; an empty cell is what this command line "
        "says. Goes on where it stopped when it is given again", "source")
    decode: str | None = option(None, "FILE",
        "in place of --prompt, a .latent file that is finished, such as a run leaves where memory or disk ran out: its video", "source")
    shard: str | None = option(None, "I/N",
        "with --csv: this is worker I of N that share one table and one --out folder; each row is made once, and what a lost worker leaves is taken up by the "
        "others (default: under torchrun, its rank)")
    gpus: int = option(1, "N",
        "GPUs of this machine that make each video together; with --csv, each its own rows (for several machines: torchrun). With --device cpu, processes")
    num_samples: int = option(1, "N", "videos to make, with seed, seed + 1, ...", also=("--num-sample",))
    out: str = option("outputs", "PATH", "a folder, or a file ending in .mp4 (.png for a single frame); never overwritten, numbered instead")
    save_latents: bool = option(False, None, "also write the finished latents beside each video, as .latent, for --decode and --extend-from")
    sample_name: str | None = option(None, "NAME", "what files in the folder begin with (default video)")
    loop: int | None = option(None, "N",
        "clips that follow one another: one and N - 1 of --extend; a prompt may change with them: |0| text |2| text from clip 2 on")
    condition_frame_length: int | None = option(None, "N", "with --loop: latent frames that a clip is given of the one before (default 5; 1.1: 4)")
    t2i2v: bool = option(False, None, "draw the first frame; its picture is written beside the video")
    refine_prompt: bool = option(False, None,
        "have --refine-model make the prompt, in any language, the long description that the models were trained on, and propose a motion score")
    refine_model: str | None = option(None, "DIR", "a folder of a causal model of transformers, with its tokenizer; nothing is downloaded")


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions(RunOptions):
    """Measure seconds per stage and peak memory; writes a JSON report, no video."""

    prompt: str = option("raining, sea", "TEXT", "what to show")
    warmup_count: int = option(1, "N", "runs before the measured ones")
    eval_count: int = option(3, "N", "measured runs")
    benchmark_save_path: str = option("benchmark.json", "FILE", "the report; never overwritten, numbered instead")


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions(RunOptions):
    """Measure which steps of a run are best computed, for a model, a size, a length and what is given: plans for --speed, in a JSON file.

    About five times the work of exact videos of the same prompts; eight prompts are enough. It goes on where it was stopped.
    """

    prompt: str | None = option(None, "TEXT", "what to show", "source")
    csv: str | None = option(None, "FILE", "prompts, in place of --prompt: columns prompt, negative, image, end_image, seed", "source")
    num_samples: int = option(1, "N", "runs of each prompt, with seed, seed + 1, ...")
    out: str = option("open_sora_plans", "DIR", "where the file is written; give it to --plans, or use ComfyUI's models/open_sora_plans")


@dataclass(frozen=True, kw_only=True)
class JudgeOptions(SamplerOptions):
    """What an evaluation judges."""

    GROUP: ClassVar = ("what is judged",)
    parts: str = option(",".join(EVALUATION_PARTS), "NAMES",
        "vision (the judge itself, on true clips), t2v, i2v (first picture, redirected prompt), last (frame), loop (first and last frame), vae, guidance "
        "(default all)")
    colour: str = option("", "NAME",
        "in place of the parts: whether --lora taught the built-in model this colour (charcoal or lilac), which no prompt of its training names, and lost none "
        "that it knew: the same prompts without the LoRA and with it")
    num_prompts: int = option(96, "N", "videos of each kind")
    seed: int = option(0, "N", "prompts and noise are drawn from it")
    num_steps: int = option(40, "N", _STEPS)
    out: str | None = option(None, "FILE", "also write a JSON report, never overwritten: every figure and every clip's verdict")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ModelOptions, JudgeOptions, MachineOptions):
    """Make videos of coloured shapes that move, read them by plain computer vision, print how many show what was asked.
    For the built-in model, or to compare two precisions, modes or files of it on the same prompts and noise.
    """

    against: dict[str, Any] = field(default_factory=dict)  # what a second run has otherwise, by the names of AGAINST


@dataclass(frozen=True, kw_only=True)
class PlanOptions(MemoryOptions, SizeOptions):
    """The video that `inspect --plan` is about, and the machine."""

    GROUP: ClassVar = ("plan", "what a video needs; all that follows goes with --plan")
    num_steps: int | None = option(None, "N", f"{_STEPS} (default 50, or the model's own)")
    speed: str = option(choices.SPEEDS[0], choices.SPEEDS, _SPEED)
    cond_type: str = option(choices.COND_TYPES[0], choices.COND_TYPES, "what is given besides the prompt, as of generate")
    gpu_gib: float | None = option(None, "N", "plan for a CUDA card with this much free instead of this machine's")
    ram_gib: float | None = option(None, "N", "plan for this much free main memory instead of this machine's")


@dataclass(frozen=True, kw_only=True)
class InspectOptions(PlanOptions):
    """Say what a weights file is, its dtype and size, what is missing or extra; how a video was made; or, with --plan, what memory one needs."""

    path: str | None = option(None, "FILE_OR_DIR",
        "a weights file, a model folder, or an mp4 of ours or ComfyUI's (with --plan none: the released sizes)", "place")
    check: bool = option(False, None, "also compare every key, shape and dtype with the released model and run a part of it")
    plan: bool = option(False, None, "say what GPU memory, RAM and how many forwards a video needs, and settings that fit")
    as_command: bool = option(False, None, "of an mp4: print the line that makes it again")


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """Write a quantised copy of a transformer file, in ComfyUI's own format, in little memory; say what it changed."""

    source: str = option(..., "IN", "the transformer's bf16, fp16 or fp32 file", "place")
    target: str = option(..., "OUT", "the new .safetensors file; never overwritten", "place")
    format: str = option(choices.FILE_FORMATS[0], choices.FILE_FORMATS, "what the large layers are written in")
    layers: str = option("attention,mlp", "GROUPS", "which of them: attention, mlp, modulation (a smaller file, less exact), embedders, final_layer")
    all_layers: bool = option(False, None, "print the error of every layer, not of the worst five alone")


@dataclass(frozen=True, kw_only=True)
class ColoursOptions:
    """Fit the colours of previews for a VAE, in about a minute, and keep them beside it: ComfyUI's moving preview is grey until then."""

    vae: str = option(..., "VAE", "the VAE's file, such as ComfyUI/models/vae/F32T4C128_AE.safetensors", "place")
    out: str | None = option(None, "FILE", "where they are kept (default: beside the VAE, under its name with .colours.json)")
    device: str = option(choices.AUTO, "DEVICE", "auto, cuda, cuda:1, mps, cpu")
