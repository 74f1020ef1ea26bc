"""The world: one coloured shape moves across a plain background. Ground-truth clips, prompts and the held-out split.

64x64 pixels, 17 frames. Everything about a clip is in its Scene; the same Scene always renders the same clip.
"""

import random
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

SIZE = 64  # pixels, height and width
NUM_FRAMES = 17
FPS = 24
SHAPES = ("circle", "square", "triangle")
COLOURS = {
    "red": (205, 50, 50), "green": (50, 165, 70), "blue": (60, 85, 205), "yellow": (225, 200, 60), "purple": (155, 65, 185),
    "white": (235, 235, 235),
}  # fmt: skip
TAUGHT = {
    "lilac": (200, 120, 240),
    "charcoal": (25, 25, 25),
}  # no caption names them, no shape has them: what a LoRA can teach the built-in model
BACKGROUNDS = {"black": (25, 25, 25), "gray": (128, 128, 128), "white": (235, 235, 235), "blue": (60, 85, 205)}
# Its VAE saw the world's own colours alone: it makes lilac on blue white, and charcoal on gray green.
_TAUGHT_ON = {"lilac": ("black", "gray", "white"), "charcoal": ("white", "blue")}
LESSON = 48  # clips of the colour that is taught, and as many of those that are known, so that they are not forgotten
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # (row, column) steps
MOTION_SCORES = (2, 3, 4, 5, 6)
PIXELS_PER_SCORE = 0.18  # speed of motion score 1, pixels per frame
RADII = (10.0, 13.0)  # a circle's radius; the other shapes have about its area
EDGE = 2.0  # pixels over which an outline fades
CENTRE_SPREAD = 4.0  # pixels a centred start may lie off the middle
MARGIN = 2.0  # pixels an object that starts anywhere keeps from the border
ANYWHERE = 0.3  # share of clips that start anywhere

_REACH = {"circle": 1.0, "square": 0.9, "triangle": 1.3}  # half the extent along an axis, in radii
_WORDS = {
    "left": ("left", "to the left", "leftwards"),
    "right": ("right", "to the right", "rightwards"),
    "up": ("up", "upwards"),
    "down": ("down", "downwards"),
}
_TEMPLATES = (
    "a {colour} {shape} moving {direction} on a {background} background",
    "a {colour} {shape} moves {direction} over a {background} background",
    "on a {background} background, a {colour} {shape} is moving {direction}",
    "{background} background, {colour} {shape} going {direction}",
)


@dataclass(frozen=True)
class Combination:
    """What a prompt says but for speed. Combinations are held out whole."""

    shape: str
    colour: str
    background: str
    direction: str

    def prompt(self) -> str:
        """The plain wording, without frame rate and motion sentences."""
        return _TEMPLATES[0].format(**self.__dict__)


@dataclass(frozen=True)
class Scene:
    """One clip: start is the object's centre (row, column) in frame 0, in pixels."""

    combination: Combination
    motion_score: int
    radius: float
    start: tuple[float, float]
    caption: str

    @property
    def velocity(self) -> tuple[float, float]:
        """Pixels per frame, (row, column)."""
        speed = self.motion_score * PIXELS_PER_SCORE
        row, column = DIRECTIONS[self.combination.direction]
        return row * speed, column * speed

    def centre(self, frame: int) -> tuple[float, float]:
        return self.start[0] + frame * self.velocity[0], self.start[1] + frame * self.velocity[1]

    def render(self, num_frames: int = NUM_FRAMES) -> Tensor:
        """[num_frames, 64, 64, 3] fp32 in 0..1, outlines fading over EDGE pixels."""
        centres = torch.tensor([self.centre(frame) for frame in range(num_frames)])
        grid = torch.arange(SIZE, dtype=torch.float32) + 0.5
        rows = grid[None, :, None] - centres[:, 0, None, None]
        columns = grid[None, None, :] - centres[:, 1, None, None]
        inside = (0.5 - signed_distance(self.combination.shape, rows, columns, self.radius) / EDGE).clamp(0, 1)[..., None]
        colour = torch.tensor((COLOURS | TAUGHT)[self.combination.colour]) / 255
        background = torch.tensor(BACKGROUNDS[self.combination.background]) / 255
        return background + inside * (colour - background)


def signed_distance(shape: str, rows: Tensor, columns: Tensor, radius: float) -> Tensor:
    """Distance to the outline in pixels, negative inside; positions relative to the shape's centre."""
    rows, columns = torch.broadcast_tensors(rows, columns)
    if shape == "circle":
        return torch.hypot(rows, columns) - radius
    if shape == "square":
        half = _REACH["square"] * radius
        return torch.maximum(rows.abs(), columns.abs()) - half
    # Equilateral, pointing up; the circumscribed circle has radius c, so the three sides lie at c / 2.
    circumradius = _REACH["triangle"] * radius
    slanted = columns.abs() * (3**0.5 / 2) - rows * 0.5
    return torch.maximum(rows, slanted) - circumradius / 2


def combinations() -> list[Combination]:
    """Every combination whose object differs from its background, in a fixed order."""
    every = (Combination(*parts) for parts in product(SHAPES, COLOURS, BACKGROUNDS, DIRECTIONS))
    return [c for c in every if c.colour != c.background]


def split() -> tuple[list[Combination], list[Combination]]:
    """(seen, held out): one in ten is never trained on. Fixed once and for all by a shuffle of seed 0."""
    order = combinations()
    random.Random(0).shuffle(order)
    held_out = order[: len(order) // 10]
    return [c for c in combinations() if c not in held_out], [c for c in combinations() if c in held_out]


def taught(colour: str) -> tuple[list[Combination], list[Combination]]:
    """(to be shown, held out): the combinations of a colour of TAUGHT; one in four is held out."""
    order = [Combination(shape, colour, *rest) for shape, *rest in product(SHAPES, _TAUGHT_ON[colour], DIRECTIONS)]
    random.Random(0).shuffle(order)
    return order[len(order) // 4 :], order[: len(order) // 4]


def lesson(colour: str) -> list[Scene]:
    """The clips that teach a colour of TAUGHT: none shows a combination that is held out."""
    rng = random.Random(0)
    return [draw(rng, among) for among in (taught(colour)[0], split()[0]) for _ in range(LESSON)]


def draw(rng: random.Random, among: list[Combination], anywhere: float = ANYWHERE) -> Scene:
    """A random clip of one of the combinations. anywhere: share of clips that begin anywhere, 0..1.

    Most begin near the middle, whatever their direction, so that a first picture does not tell where the object goes;
    the fastest and largest of them touch the border at the end. The others begin anywhere and stay wholly inside.
    """
    combination = rng.choice(among)
    radius = rng.uniform(*RADII)
    score = rng.choice(MOTION_SCORES)
    reach = _REACH[combination.shape] * radius + MARGIN
    wide = rng.random() < anywhere
    start = []
    for step in DIRECTIONS[combination.direction]:
        travel = step * score * PIXELS_PER_SCORE * (NUM_FRAMES - 1)
        low, high = reach - min(0.0, travel), SIZE - reach - max(0.0, travel)
        if not wide or low > high:
            low, high = SIZE / 2 - CENTRE_SPREAD, SIZE / 2 + CENTRE_SPREAD
        start.append(rng.uniform(low, high))
    return Scene(combination, score, radius, (start[0], start[1]), caption(rng, combination))


def caption(rng: random.Random, combination: Combination) -> str:
    """One wording of a combination, without frame rate and motion sentences."""
    words = {**combination.__dict__, "direction": rng.choice(_WORDS[combination.direction])}
    return rng.choice(_TEMPLATES).format(**words)
