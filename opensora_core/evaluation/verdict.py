"""Whether a clip shows what was asked for, and a sentence that says so."""

from dataclasses import dataclass

from .vision import Reading, read
from .world import PIXELS_PER_SCORE, Combination

ATTRIBUTES = ("colour", "background", "shape", "direction")


@dataclass(frozen=True)
class Verdict:
    """A clip against what was asked.

    asked: the combination. motion_score: the score that was asked, or None if any would do. reading: what the clip shows, see vision.Reading.
    """

    asked: Combination
    motion_score: int | None
    reading: Reading

    @property
    def right(self) -> dict[str, bool]:
        """For each of colour, background, shape and direction, whether it is what was asked."""
        return {name: getattr(self.reading, name) == getattr(self.asked, name) for name in ATTRIBUTES}

    @property
    def is_right(self) -> bool:
        """Whether all four are right; speed and steadiness do not count here."""
        return all(self.right.values())

    @property
    def speed_error(self) -> float | None:
        """Measured minus asked speed in pixels per frame; None if no speed was asked or no object is seen."""
        if self.motion_score is None or self.reading.object_rgb is None:
            return None
        return self.reading.speed - self.motion_score * PIXELS_PER_SCORE

    def sentence(self) -> str:
        """For people: "shows a red circle moving right on blue: right", or what was asked, what is shown and what is wrong."""
        shown = describe(self.reading)
        note = f" (not steady: {', '.join(self.reading.faults)})" if self.reading.faults and self.reading.object_rgb else ""
        if self.is_right:
            return f"shows {shown}: right{note}"
        wrong = ", ".join(name for name, is_right in self.right.items() if not is_right)
        return f"asked for {describe(self.asked)}, shows {shown}: wrong {wrong}{note}"


def judge(frames, combination: Combination, motion_score: int | None = None) -> Verdict:
    """Read a clip and hold it against what was asked.

    frames: [T, H, W, 3] with T of at least 2, uint8 or float in 0..1; `result.frames[0]` of the pipeline as it is.
    motion_score: the motion score that was asked, or None.
    """
    return Verdict(combination, motion_score, read(frames))


def describe(shown: Reading | Combination) -> str:
    """What a clip shows, or what was asked for, in words: "a red circle moving right on blue"."""
    background = f" on {shown.background}" if shown.background else " on no clear background"
    if isinstance(shown, Reading) and shown.object_rgb is None:
        return f"no object{background}"
    colour, shape = shown.colour or "oddly coloured", shown.shape or "thing of no clear shape"
    motion = f" moving {shown.direction}" if shown.direction else " that goes nowhere in particular"
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}{motion}{background}"
