"""`evaluate`: prompts of the world of moving shapes to videos, read by plain computer vision; a table and a JSON report."""

import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from .. import __version__
from ..choices import BALANCED, EXACT
from ..commands.model import pipeline, with_usual
from ..commands.options import DONE, EVALUATION_PARTS, PARTS, EvaluateOptions
from ..commands.output import check_count, check_writable, report_path, say, write_report
from ..commands.progress import Bar
from ..errors import OpenSoraError
from ..media.video import to_uint8
from ..pipeline import OpenSoraPipeline
from ..run.files import ModelFiles
from ..sampling.plan import RELEASED_STEPS
from ..sampling.solvers import MAX_SEED
from ..text.prompt import decorate
from . import prompts, score
from .clips import DEGREES, Clip, Job, check, degraded, make, quantised, round_trip
from .prompts import HELD_OUT, SEEN, Case
from .score import Line
from .verdict import ATTRIBUTES, Verdict, judge
from .world import FPS, TAUGHT

NUM_NEGATIVE, NUM_EVERY_PASS = 32, 8  # clips of these two probes, at most
_SEEN, _HELD_OUT = "text to video, seen", "text to video, held out"
_TAUGHT, _REDIRECTED = "text to video, a colour that was taught", "image to video, redirected"
# Title of a set of cases -> the parts that need it, and what draws it, of a count and a seed.
_SETS = {
    _SEEN: ({"t2v"}, partial(prompts.text_cases, SEEN)),
    _HELD_OUT: ({"t2v", "guidance"}, partial(prompts.text_cases, HELD_OUT)),
    _REDIRECTED: ({"i2v"}, prompts.redirected_cases),
    "last frame": ({"last"}, partial(prompts.closing_cases, "last")),
    "first and last frame": ({"loop"}, partial(prompts.closing_cases, "both")),
}


@dataclass(frozen=True)
class Questions:
    """What an evaluation asks for, the same for every model that is judged. colour: of world.TAUGHT, in place of the parts; "" for none."""

    parts: tuple[str, ...]
    count: int
    seed: int
    colour: str = ""

    def cases(self) -> dict[str, list[Case]]:
        """The cases of every part that is asked for, by the part's title."""
        if self.colour:
            known = prompts.text_cases(HELD_OUT, self.count, self.seed)
            return {_TAUGHT: prompts.taught_cases(self.colour, self.count, self.seed), _HELD_OUT: known}
        return {title: drawn(self.count, self.seed) for title, (parts, drawn) in _SETS.items() if parts & {*self.parts}}

    def jobs(self) -> list[Job]:
        """Every video that is needed."""
        cases = self.cases()
        jobs = [Job(case) for some in cases.values() for case in some]
        if "guidance" in self.parts:
            jobs += [Job(case, text_guidance=1.0) for case in cases[_HELD_OUT]]
            jobs += [job for case in cases[_HELD_OUT][:NUM_NEGATIVE] for job in negative_jobs(case)]
            jobs += [job for pair in self.every_pass_pairs() for job in pair]
        return jobs

    def every_pass_pairs(self) -> list[tuple[Job, Job]]:
        """(as always, with every guidance pass), of text to video and of image to video."""
        some = min(self.count, NUM_EVERY_PASS)
        cases = prompts.text_cases(HELD_OUT, some, self.seed) + prompts.redirected_cases(some, self.seed)
        return [(Job(case), Job(case, every_pass=True)) for case in cases]


@dataclass(frozen=True)
class Run:
    """One model and its settings, judged. label: of its table. settings: for the report. lines: of the table. clips: by job. seconds: of everything."""

    label: str
    settings: dict
    lines: list[Line]
    clips: dict[Job, Clip]
    seconds: float


def run(options: EvaluateOptions) -> int:
    """Judge a model, and another one on the same prompts and noise if one is named; tables go to standard output."""
    asked = _asked(options)
    out = None if options.out is None else report_path("--out", options.out)
    first, others = options, []  # the run as asked, and what each of those that are compared with it has otherwise
    if asked.colour:
        first, others = replace(options, lora=None, lora_strength=1.0), [{"lora": options.lora, "lora_strength": options.lora_strength}]
    elif options.against:
        others = [options.against | {"speed": speed} for speed in options.against.get("speed", ())] or [options.against]
    named = [("without the LoRA" if asked.colour else "", first)]
    named += [(_words(one), second_run(replace(options, against=one))) for one in others]
    variants = [(label, variant, pipeline(variant)) for label, variant in named]
    variants = [(label, with_usual(variant, pipe.files.usual), pipe) for label, variant, pipe in variants]
    for job in asked.jobs()[:1]:
        for _, variant, pipe in variants:
            check(pipe, variant, job)
    if out is not None:
        check_writable(out.parent, out.name)
    runs = [_judge(pipe, variant, asked, label) for label, variant, pipe in variants]
    compared = [line for other in runs[1:] for line in (taught_lines if asked.colour else compare)([runs[0], other], asked)]
    sys.stdout.write("\n\n".join(_told(runs, compared)) + "\n")
    if asked.colour:
        sys.stdout.write(_lesson_learned(compared))
    if out is not None:
        write_report(out, _report(asked, runs, compared))
    return DONE


def negative_jobs(case: Case) -> tuple[Job, Job]:
    """(nothing asked for, nothing asked for and the case's own prompt to be avoided).

    What the world's prompts name is all there is in it, and a model draws one colour or another, never one in between. So a negative
    prompt is seen at work where the prompt leaves everything open. It is worded as prompts are when they are encoded.
    """
    return Job(case, is_unprompted=True), Job(case, is_unprompted=True, negative_prompt=decorate(case.prompt, FPS, case.motion_score))


def part_lines(title: str, clips: list[Clip], pipe: OpenSoraPipeline) -> list[Line]:
    """The figures of the clips of one part, which `title` names."""
    verdicts = [clip.verdict for clip in clips]
    if title in (_SEEN, _HELD_OUT, _TAUGHT):
        return score.verdict_lines(title, verdicts, score.TEXT_TO_VIDEO if title == _HELD_OUT else {})
    if title == _REDIRECTED:
        keeps = [verdict.right["colour"] and verdict.right["shape"] for verdict in verdicts]
        # The given latent is put back after sampling, so this figure is the VAE's; it shows that the picture was used.
        found = [score.psnr(clip.frames[0], _picture(clip.job.case, 0)) for clip in clips]
        return [
            *score.shares(title, verdicts, ("direction",), score.REDIRECTED),
            score.share_line(title, "keeps colour and shape", keeps, score.REDIRECTED["keeps colour and shape"]),
            *score.shares(title, verdicts, ("background", "steady")),
            Line(title, "first frame to its picture", score.mean(found), "dB"),
        ]
    lines, first = score.shares(title, verdicts, ("direction", "colour", "shape", "steady")), clips[0].job.case
    scenes = Bar([clip.job.case.picture_scene for clip in clips], desc=f"VAE, {title}", unit="clip")
    perfect = [round_trip(pipe, scene.render(), first.picture_ends) for scene in scenes]
    for frame, index in _ends(first):
        pictures = [_picture(clip.job.case, index) for clip in clips]
        found = [score.psnr(clip.frames[index], picture) for clip, picture in zip(clips, pictures, strict=True)]
        alone = [score.psnr(round_trip(pipe, torch.from_numpy(picture)[None])[0], picture) for picture in pictures]
        placed = [score.psnr(clip[index], picture) for clip, picture in zip(perfect, pictures, strict=True)]
        lines += score.meeting_lines(title, frame, found, placed, alone)
    return lines


def vae_lines(asked: Questions, pipe: OpenSoraPipeline) -> list[Line]:
    """Fresh clips through the VAE and back."""
    title, psnrs, verdicts = "VAE, fresh clips", [], []
    for scene in Bar(prompts.fresh_scenes(asked.count, asked.seed), desc=title, unit="clip"):
        clip = quantised(scene.render())
        found = round_trip(pipe, clip)
        psnrs.append(score.psnr(found, to_uint8(clip)))
        verdicts.append(judge(found, scene.combination, scene.motion_score))
    return [
        Line(title, "PSNR, mean", score.mean(psnrs), "dB").at_least(score.VAE_PSNR),
        Line(title, "PSNR, worst clip", min(psnrs), "dB"),
        score.share_line(title, "shape readable", [verdict.right["shape"] for verdict in verdicts], score.VAE_READABLE),
        *score.shares(title, verdicts, ("all four", "steady")),
    ]


def guidance_lines(asked: Questions, made: dict[Job, Clip]) -> list[Line]:
    """What guidance does to the held-out prompts."""
    title, held_out = "guidance", prompts.text_cases(HELD_OUT, asked.count, asked.seed)
    clips = [made[Job(case)] for case in held_out]
    default = [clip.verdict.is_right for clip in clips]
    at_one = [made[Job(case, text_guidance=1.0)].verdict.is_right for case in held_out]
    others = [prompts.wrong_combination(held_out, index) for index in range(len(held_out))]
    wrong = [Verdict(other, None, clip.reading).is_right for other, clip in zip(others, clips, strict=True)]
    pairs = [negative_jobs(case) for case in held_out[:NUM_NEGATIVE]]
    free, avoiding = ([hit for job in jobs for hit in made[job].verdict.right.values()] for jobs in zip(*pairs, strict=True))
    # Videos that must be the same but for rounding.
    worst = min(score.psnr(made[one].frames, made[every].frames) for one, every in asked.every_pass_pairs())
    return [
        score.share_line(title, "all four, as asked", default),
        score.lower_line(title, "all four, text guidance 1", at_one, default),
        score.lower_line(title, "all four, against another prompt", wrong, default),
        score.share_line(title, "attributes of a case, nothing prompted", free),
        score.lower_line(title, "the same, its prompt as the negative", avoiding, free),
        Line(title, "skipped passes against all three, worst", worst, "dB").at_least(score.SAME_VIDEO),
    ]


def compare(runs: list[Run], asked: Questions) -> list[Line]:
    """How far the clips of two runs are apart, part by part, and whether they are as often right."""
    one, other = runs
    speed, lines = other.settings["speed"], []
    second = f"speed {speed}" if speed != EXACT else "second"
    is_measured = (one.settings["speed"], one.settings["num_steps"]) == (EXACT, RELEASED_STEPS)
    for part, cases in asked.cases().items():
        title, pairs = f"first against {second}: {part}", [(one.clips[Job(case)], other.clips[Job(case)]) for case in cases]
        psnrs = [score.psnr(a.frames, b.frames) for a, b in pairs]
        near = Line(title, "PSNR, mean of the clips", score.mean(psnrs), "dB")
        least, most = (is_measured and score.SPEEDS.get((speed, bool(cases[0].picture_ends)))) or (None, None)
        lines += [near if least is None else near.at_least(least), Line(title, "PSNR, worst clip", min(psnrs), "dB")]
        if most is not None:
            lines.append(Line(title, "forwards", float(max(b.forwards for _, b in pairs))).at_most(most))
        right = [(a.verdict.is_right, b.verdict.is_right) for a, b in pairs]
        lines += [
            score.share_line(title, "right in both or in neither", [a == b for a, b in right]),
            score.share_line(title, "right in the first alone", [a and not b for a, b in right]),
            score.share_line(title, "right in the second alone", [b and not a for a, b in right]),
        ]
        if is_measured and speed != EXACT:
            lines.append(score.as_often_right_line(title, "all four, at the speed", *zip(*right, strict=True)))
        for frame, index in _ends(cases[0]) if is_measured else ():
            before, after = (
                [score.psnr(clip.frames[index], _picture(clip.job.case, index)) for clip in some] for some in zip(*pairs, strict=True)
            )
            lost = Line(title, f"{frame} frame to its picture, lost", score.mean(before) - score.mean(after), "dB")
            lines.append(lost.at_most(score.MEETS_WITHIN) if speed == BALANCED else lost)
    return lines


def taught_lines(runs: list[Run], asked: Questions) -> list[Line]:
    """Whether a colour was learned, and as many prompts of the known ones are right as before. runs: without the LoRA and with it."""
    lines = []
    for title, cases in asked.cases().items():
        before, after = ([run.clips[Job(case)].verdict.is_right for case in cases] for run in runs)
        now = score.share_line(title, "all four, with it", after, score.TEXT_TO_VIDEO["all four"])
        lines += [
            score.share_line(title, "all four, without the LoRA", before),
            now if title == _TAUGHT else score.as_often_right_line(title, "all four, with it", before, after),
        ]
    return lines


def _lesson_learned(lines: list[Line]) -> str:
    before, after, known_before, known_after = (f"{line.value.right} of {line.value.of}" for line in lines)
    learned, kept = lines[1].is_reached, lines[3].is_reached
    return (
        f"\nThe colour was {'learned' if learned else 'NOT learned'}: {after} prompts of it come out right, {before} without the LoRA.\n"
        f"{'Nothing' if kept else 'Something'} was lost: {known_after} prompts of the colours it knew come out right, {known_before} without the LoRA.\n"
    )


def _ends(case: Case) -> list[tuple[str, int]]:
    """The frames of a case's clips that are given, by name and index."""
    return [(name, index) for name, index in (("first", 0), ("last", -1)) if case.picture_ends in (name, "both")]


def _judge(pipe: OpenSoraPipeline, options: EvaluateOptions, asked: Questions, label: str) -> Run:
    begun, jobs = time.perf_counter(), asked.jobs()
    say(f"videos: {len(set(jobs))}, steps of each: {options.num_steps}, on {pipe.device}{f', {label}' if label else ''}")
    made = make(pipe, options, jobs, label or "evaluate") if jobs else {}
    lines: list[Line] = []
    if "vision" in asked.parts:  # the instrument itself: ground-truth clips, as they are and as a VAE might leave them
        verdicts = [
            judge(degraded(scene.render(), *degree, asked.seed), scene.combination, scene.motion_score)
            for scene in Bar(prompts.fresh_scenes(asked.count, asked.seed), desc="vision, true clips", unit="clip")
            for degree in DEGREES
        ]
        lines += score.verdict_lines("computer vision, ground truth", verdicts, score.VISION)
    for title, cases in asked.cases().items():
        if title != _HELD_OUT or "t2v" in asked.parts or asked.colour:  # guidance needs these clips too
            lines += part_lines(title, [made[Job(case)] for case in cases], pipe)
    if "vae" in asked.parts:
        lines += vae_lines(asked, pipe)
    if "guidance" in asked.parts:
        lines += guidance_lines(asked, made)
    return Run(label, _settings(options, pipe), lines, made, time.perf_counter() - begun)


def _told(runs: list[Run], compared: list[Line]) -> Iterator[str]:
    """A table of each run, and what it comes to; then a table of the comparison."""
    for run in runs:
        heading = f"== {run.label or 'as asked'} ==\n" if len(runs) > 1 else ""
        yield heading + score.table(run.lines)
        needed, settings = [line.is_reached for line in run.lines if line.is_reached is not None], run.settings
        if not needed:
            continue
        sentences = [f"{sum(needed)} of {len(needed)} requirements reached."]
        own = (settings["num_steps"], (settings["guidance"], settings["guidance_img"]))
        if settings["num_prompts"] < score.REQUIRED_PROMPTS or own != (score.REQUIRED_STEPS, score.REQUIRED_GUIDANCE):
            sentences.append(
                f"They are meant for {score.REQUIRED_PROMPTS} prompts or more, {score.REQUIRED_STEPS} steps and guidance 7.5 and 3; "
                f"these are {settings['num_prompts']}, {settings['num_steps']}, {settings['guidance']:g} and {settings['guidance_img']:g}."
            )
        held_out = [line.value for line in run.lines if (line.part, line.what) == (_HELD_OUT, "all four")]
        if held_out and held_out[0].interval[0] <= score.CHANCE["all four"]:
            sentences.append("Prompts come out right no more often than by chance: this model does not know the world of moving shapes.")
        yield "\n".join(sentences)
    if compared:
        yield score.table(compared)


def _report(asked: Questions, runs: list[Run], compared: list[Line]) -> dict:
    cases = asked.cases()
    return {
        "opensora_core": __version__,
        "torch": torch.__version__,
        "parts": list(asked.parts),
        "cases": {title: {"count": len(some), "fingerprint": prompts.fingerprint(some)} for title, some in cases.items()},
        "runs": [
            {
                "label": run.label or "as asked",
                "settings": run.settings,
                "seconds": round(run.seconds, 3),
                "figures": [line.as_json() for line in run.lines],
                "clips": {title: [_clip_entry(run.clips[Job(case)]) for case in some] for title, some in cases.items()},
            }
            for run in runs
        ],
        "compared": [line.as_json() for line in compared],
    }


def _clip_entry(clip: Clip) -> dict:
    case, reading = clip.job.case, clip.reading
    return {
        "prompt": case.prompt,
        "motion_score": case.motion_score,
        "seed": case.seed,
        "asked": asdict(case.asked),
        "shown": {name: getattr(reading, name) for name in ATTRIBUTES},
        "measured_motion_score": round(reading.motion_score, 3),
        "faults": list(reading.faults),
        "is_right": clip.verdict.is_right,
        "sentence": clip.verdict.sentence(),
    }


def _asked(options: EvaluateOptions) -> Questions:
    parts = tuple(dict.fromkeys(part.strip() for part in options.parts.split(",") if part.strip()))
    unknown = [part for part in parts if part not in EVALUATION_PARTS]
    if unknown or not parts:
        raise OpenSoraError(f"--parts {options.parts!r} names no part of an evaluation; use some of {','.join(EVALUATION_PARTS)}.")
    if options.colour and options.colour not in TAUGHT:
        raise OpenSoraError(f"--colour {options.colour!r} is none that can be taught; use {', '.join(TAUGHT)}.")
    if options.colour and (options.lora is None or options.against):
        raise OpenSoraError("--colour compares the model with and without a LoRA; add --lora FILE, and no --against.")
    check_count("--num-prompts", options.num_prompts)
    if not 0 <= options.seed <= MAX_SEED - options.num_prompts + 1:
        raise OpenSoraError(f"--seed {options.seed} is out of range; use 0 to {MAX_SEED - options.num_prompts + 1}.")
    parts = () if options.colour else tuple(part for part in EVALUATION_PARTS if part in parts)
    return Questions(parts, options.num_prompts, options.seed, options.colour)


def _words(others: dict) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {Path(str(value)).name}" for name, value in others.items())


def second_run(options: EvaluateOptions) -> EvaluateOptions:
    """The options of the second run: another model replaces all parts, another file one part of whatever the first has."""
    against, changed = options.against, {}
    if "model" in against:
        changed = dict.fromkeys(PARTS)
    elif against.keys() & set(PARTS) and not any(getattr(options, part) for part in PARTS):
        files = ModelFiles.in_folder(options.model or "small", options.tokenizers)
        paths = {part: getattr(files, part) for part in PARTS}  # a VAE of two halves is none, nor is a CLIP that no one reads
        changed = {"model": None} | {part: str(path) if isinstance(path, Path) else path for part, path in paths.items()}
    if "offload" in against:
        changed["budget_gib"] = None
    return replace(options, **{**changed, **against})


def _settings(options: EvaluateOptions, pipe: OpenSoraPipeline) -> dict:
    """What was run, without the paths of this machine."""
    names = ("num_prompts", "num_steps", "guidance", "guidance_img", "seed", "precision", "offload", "budget_gib", "attention", "speed")
    chosen = {name: getattr(options, name) for name in (*names, "decode_policy", "lora_strength")}
    files = {part: path and Path(str(path)).name for part, path in vars(pipe.files).items() if part in PARTS}
    lora = options.lora and Path(options.lora).name
    return {**chosen, "lora": lora, **files, "dtype": str(pipe.dtype).removeprefix("torch."), "device": str(pipe.device)}


def _picture(case: Case, index: int):
    """The first (0) or last (-1) frame that was given, uint8."""
    return to_uint8(case.picture_scene.render())[index]
