"""What an evaluation asks for: fixed sets of cases, the same for a seed on every machine.

A larger set begins with the smaller one, so that a short run asks the first questions of a long one.
"""

import hashlib
import json
import random
from collections import Counter
from dataclasses import dataclass, replace

from torch import Tensor

from .world import CENTRE_SPREAD, DIRECTIONS, MOTION_SCORES, RADII, SIZE, Combination, Scene, caption, combinations, draw, split, taught

SEEN, HELD_OUT = "seen", "held out"


@dataclass(frozen=True)
class Case:
    """One video to ask for.

    asked: what it should show. motion_score: how fast. prompt: the wording, without frame rate and motion sentences. seed: of the noise.
    picture_scene: the ground truth whose frames are given as pictures; None for text to video. picture_ends: first, last or both; "" for text to video.
    """

    asked: Combination
    motion_score: int
    prompt: str
    seed: int
    picture_scene: Scene | None = None
    picture_ends: str = ""

    def pictures(self) -> tuple[Tensor | None, Tensor | None]:
        """(first, last) frame that is given, [64, 64, 3] fp32 in 0..1."""
        if self.picture_scene is None:
            return None, None
        clip = self.picture_scene.render()
        return clip[0] if self.picture_ends in ("first", "both") else None, clip[-1] if self.picture_ends in ("last", "both") else None


def text_cases(name: str, count: int, seed: int) -> list[Case]:
    """Prompts of SEEN or HELD_OUT combinations: every colour, shape, background, direction and score about equally often."""
    seen, held_out = split()
    return _cases(seen if name == SEEN else held_out, count, seed, f"text {name}")


def taught_cases(colour: str, count: int, seed: int) -> list[Case]:
    """Prompts of a colour of world.TAUGHT, in combinations that are held out."""
    return _cases(taught(colour)[1], count, seed, f"taught {colour}")


def redirected_cases(count: int, seed: int) -> list[Case]:
    """First frames with a prompt whose direction the picture does not suggest.

    The combination that the prompt names is held out: no such picture ever moved that way in training. The picture is the
    first frame of a clip that went another way. It begins near the middle, as most clips do whatever their direction, and what
    it is off the middle is towards where the prompt sends it, which in training hints at the opposite, if at anything.
    """
    rng = random.Random(f"{seed}/redirected")
    cases = []
    for case in _cases(split()[1], count, seed, "redirected"):
        other = rng.choice([name for name in DIRECTIONS if name != case.asked.direction])
        start = [SIZE / 2 + rng.uniform(-CENTRE_SPREAD, CENTRE_SPREAD) for _ in range(2)]
        for axis, step in enumerate(DIRECTIONS[case.asked.direction]):
            if step:
                start[axis] = SIZE / 2 + step * abs(start[axis] - SIZE / 2)
        scene = Scene(replace(case.asked, direction=other), case.motion_score, rng.uniform(*RADII), (start[0], start[1]), case.prompt)
        cases.append(replace(case, picture_scene=scene, picture_ends="first"))
    return cases


def closing_cases(ends: str, count: int, seed: int) -> list[Case]:
    """Last frames ("last"), or first and last ones ("both"), of ground-truth clips of held-out combinations, with their own prompts."""
    rng, cases = random.Random(f"{seed}/closing {ends}"), _cases(split()[1], count, seed, f"closing {ends}")
    scenes = [replace(draw(rng, [case.asked], anywhere=0.0), motion_score=case.motion_score) for case in cases]
    return [replace(case, picture_scene=scene, picture_ends=ends) for case, scene in zip(cases, scenes, strict=True)]


def fresh_scenes(count: int, seed: int) -> list[Scene]:
    """Clips that a VAE is judged on: any combination, half of them beginning anywhere."""
    rng, every = random.Random(f"{seed}/fresh"), combinations()
    return [draw(rng, every, anywhere=0.5) for _ in range(count)]


def wrong_combination(cases: list[Case], index: int) -> Combination:
    """What the nearest other case asks for that agrees with case `index` in nothing; if there is none, one is made up."""
    own = cases[index].asked
    for other in (*cases[index + 1 :], *cases[:index]):
        if differs_in_all(own, other.asked):
            return other.asked
    return next(other for other in combinations() if differs_in_all(own, other))


def differs_in_all(one: Combination, other: Combination) -> bool:
    return all(value != vars(other)[name] for name, value in vars(one).items())


def fingerprint(cases: list[Case]) -> str:
    """Twelve hexadecimal digits that tell one set of cases from another, for reports."""
    rows = [[case.prompt, case.motion_score, case.seed, case.picture_ends, repr(case.picture_scene)] for case in cases]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]


def _cases(among: list[Combination], count: int, seed: int, name: str) -> list[Case]:
    rng = random.Random(f"{seed}/{name}")
    order = _spread(among, rng)
    cases = []
    for index in range(count):
        place, lap = index % len(order), index // len(order)
        # Each lap begins at another score, so that a combination comes back at another speed.
        score = MOTION_SCORES[(place + lap) % len(MOTION_SCORES)]
        cases.append(Case(order[place], score, caption(rng, order[place]), seed + index))
    return cases


def _spread(among: list[Combination], rng: random.Random) -> list[Combination]:
    """All combinations, in an order that keeps every colour, shape, background and direction about equally frequent from the start."""
    left = list(among)
    rng.shuffle(left)
    counts: Counter[tuple[str, str]] = Counter()
    order = []
    while left:
        chosen = min(left, key=lambda combination: sum(counts[item] for item in vars(combination).items()))
        left.remove(chosen)
        counts.update(vars(chosen).items())
        order.append(chosen)
    return order
