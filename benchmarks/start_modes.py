"""Ways to begin a video, measured on the built-in model: a picture and a direction, a first and a last picture, and going on.

    python -m benchmarks.start_modes [--model DIR|small] [--count N] [--num-steps N] [--context-frames N] [--out FILE]

The clips are of the world that the model was trained on (opensora_core/evaluation), read by the same plain vision as `evaluate`
reads them. "The VAE's own" is what a perfect transformer would give. Ends with 0 whether or not what must hold does; the table says it.
"""

import argparse
import sys
from dataclasses import replace

import numpy
import torch

from benchmarks import record
from opensora_core.commands.options import JudgeOptions
from opensora_core.evaluation import prompts, score
from opensora_core.evaluation.clips import Clip, Job, arguments as arguments_of, make, round_trip
from opensora_core.evaluation.prompts import Case
from opensora_core.evaluation.score import Line
from opensora_core.evaluation.vision import read
from opensora_core.evaluation.world import BACKGROUNDS, NUM_FRAMES, SIZE, Combination, Scene
from opensora_core.media.video import to_uint8
from opensora_core.pipeline import OpenSoraPipeline

SEGMENTS = 2
SLOW = 2  # the motion score of clips that go on: a faster object would have left the picture at the end
NEIGHBOURS = 6  # frame differences before a joint and after it that it is compared with
DIRECTION_AT_LEAST = 0.8


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.start_modes", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="small", help="a model folder, or the built-in model (default small)")
    parser.add_argument("--count", type=int, default=96, help="clips of each way (default 96, as evaluate)")
    parser.add_argument("--num-steps", type=int, default=40, help="(default 40)")
    parser.add_argument("--context-frames", type=int, help="that a segment is given (default: a quarter of it)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", help="a JSON report")
    args = parser.parse_args()
    pipe = OpenSoraPipeline.from_pretrained(args.model).to(args.device)
    how = JudgeOptions(num_steps=args.num_steps)
    lines = [
        *first_picture(pipe, how, args.count),
        *both_ends(pipe, how, args.count),
        *going_on(pipe, how, args.count, args.context_frames),
    ]
    print(score.table(lines))
    if args.out:
        settings = {"model": args.model, "count": args.count, "num_steps": args.num_steps, "context_frames": args.context_frames}
        print(record.write("start_modes", {"settings": settings, "lines": [line.as_json() for line in lines]}, args.out))
    return 0


def first_picture(pipe: OpenSoraPipeline, how: JudgeOptions, count: int) -> list[Line]:
    """A picture of a green square, and a prompt that sends it left: it begins with the picture and moves left."""
    title = "a picture of a green square, moving left"
    clips = list(make(pipe, how, [Job(case) for case in green_squares(count)], title).values())
    verdicts = [clip.verdict for clip in clips]
    moved = [_way(clip) for clip in clips]
    lines = [
        score.share_line(title, "direction", [verdict.right["direction"] for verdict in verdicts], DIRECTION_AT_LEAST),
        score.share_line(title, "stays a green square", [verdict.right["colour"] and verdict.right["shape"] for verdict in verdicts]),
        Line(title, "way to the left, asked", score.mean([_asked_way(clip.job.case) for clip in clips]), "px"),
        Line(title, "way to the left, measured", score.mean(moved), "px"),
    ]
    return lines + _meets(pipe, title, clips, "first")


def green_squares(count: int) -> list[Case]:
    """Green squares in the middle of every background, of every size and speed; nothing in the picture says where they go."""
    backgrounds = [name for name in BACKGROUNDS if name != "green"]
    cases = []
    for index in range(count):
        asked = Combination("square", "green", backgrounds[index % len(backgrounds)], "left")
        motion_score, radius = 3 + index % 3, 10.0 + index % 4
        scene = Scene(asked, motion_score, radius, (SIZE / 2, SIZE / 2), asked.prompt())
        cases.append(Case(asked, motion_score, asked.prompt(), 1000 + index, scene, "first"))
    return cases


def both_ends(pipe: OpenSoraPipeline, how: JudgeOptions, count: int) -> list[Line]:
    """A first and a last picture: the video begins with the one and ends with the other."""
    title = "a first and a last picture"
    clips = list(make(pipe, how, [Job(case) for case in prompts.closing_cases("both", count, 0)], title).values())
    lines = [score.share_line(title, "direction", [clip.verdict.right["direction"] for clip in clips])]
    return lines + _meets(pipe, title, clips, "first", "last")


def _meets(pipe: OpenSoraPipeline, title: str, clips: list[Clip], *frames: str) -> list[Line]:
    """How near frames of clips are to the pictures that they were given."""
    lines = []
    for frame in frames:
        at = 0 if frame == "first" else -1
        true = [clip.job.case.picture_scene.render() for clip in clips]
        pictures = [to_uint8(frames[[at]])[0] for frames in true]
        found = [score.psnr(clip.frames[at], picture) for clip, picture in zip(clips, pictures, strict=True)]
        ends = clips[0].job.case.picture_ends
        placed = [score.psnr(round_trip(pipe, frames, ends)[at], picture) for frames, picture in zip(true, pictures, strict=True)]
        alone = [score.psnr(round_trip(pipe, torch.from_numpy(picture)[None])[0], picture) for picture in pictures]
        lines += score.meeting_lines(title, frame, found, placed, alone)
    return lines


def going_on(pipe: OpenSoraPipeline, how: JudgeOptions, count: int, context_frames: int | None) -> list[Line]:
    """A clip and what is added to it: at a joint, frames differ as they do around it, and the object goes on its way."""
    title = f"a clip and {SEGMENTS} segments more"
    cases = [replace(case, motion_score=SLOW) for case in prompts.text_cases(prompts.SEEN, count, 0)]
    differences, goes_on, steady = [], [], []
    joints = [NUM_FRAMES - 1]
    for case in cases:
        arguments = arguments_of(how, Job(case))
        first = pipe(case.prompt, **arguments)
        shared = {name: arguments[name] for name in ("num_inference_steps", "guidance_scale", "image_guidance_scale", "options")}
        result = pipe.extend(first, segments=SEGMENTS, context_frames=context_frames, **shared)
        frames = numpy.stack(result.frames[0])
        added = (len(frames) - NUM_FRAMES) // SEGMENTS
        joints = [NUM_FRAMES - 1 + added * index for index in range(SEGMENTS)]
        differences.append(numpy.abs(numpy.diff(frames.astype(float), axis=0)).mean(axis=(1, 2, 3)))
        before, after = read(first.frames[0]), read(frames[NUM_FRAMES - 1 :])
        goes_on.append(before.direction is not None and before.direction == after.direction)
        steady.append(read(frames).is_steady)
    return joint_lines(title, numpy.stack(differences), joints) + [
        score.share_line(title, "goes on in the same direction", goes_on),
        score.share_line(title, "one steady object to the end", steady),
    ]


def joint_lines(title: str, differences: numpy.ndarray, joints: list[int]) -> list[Line]:
    """Frame differences at joints beside those around them.

    Args:
        differences: [clips, frames - 1] mean absolute differences of successive frames, in 8-bit levels.
        joints: of them, those between the last frame of a clip and the first that was added.
    """
    lines = []
    inside, ratios = [], []
    for joint in joints:
        around = numpy.concatenate(
            (differences[:, max(0, joint - NEIGHBOURS) : joint], differences[:, joint + 1 : joint + 1 + NEIGHBOURS]), axis=1
        )
        at, low, high = differences[:, joint], around.min(axis=1), around.max(axis=1)
        inside += list((low <= at) & (at <= high))
        ratios += list(at / numpy.maximum(numpy.median(around, axis=1), 1e-6))
        mean_at, means = float(at.mean()), around.mean(axis=0)
        lines.append(
            Line(
                title,
                f"frame difference at frame {joint + 1}, mean",
                mean_at,
                "levels",
                must=f"{means.min():.2f} to {means.max():.2f}, as around it",
                is_reached=bool(means.min() <= mean_at <= means.max()),
            )
        )
    by_chance = 1 - 2 / (2 * NEIGHBOURS + 1)
    share = score.Share(sum(map(bool, inside)), len(inside))
    lines.append(Line(title, "joints within the range of their neighbours", share, chance=by_chance))
    lines.append(Line(title, "difference at a joint over its neighbours' median", float(numpy.median(ratios)), "times"))
    lines.append(Line(title, "the same, worst joint", float(max(ratios)), "times"))
    return lines


def _way(clip: Clip) -> float:
    centres = [centre for centre in clip.reading.centres if centre is not None]
    return centres[0][1] - centres[-1][1] if len(centres) > 1 else 0.0


def _asked_way(case: Case) -> float:
    return case.picture_scene.centre(0)[1] - case.picture_scene.centre(NUM_FRAMES - 1)[1]


if __name__ == "__main__":
    sys.exit(main())
