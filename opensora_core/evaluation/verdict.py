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
        return f"asked for {_words(self.asked)}, shows {shown}: wrong {wrong}{note}"


def judge(frames, combination: Combination, motion_score: int | None = None) -> Verdict:
    """Read a clip and hold it against what was asked.

    frames: [T, H, W, 3] with T of at least 2, uint8 or float in 0..1; `result.frames[0]` of the pipeline as it is.
    motion_score: the motion score that was asked, or None.
    """
    return Verdict(combination, motion_score, read(frames))


def describe(reading: Reading) -> str:
    """What a clip shows, in words: "a red circle moving right on blue"."""
    background = f" on {reading.background}" if reading.background else " on no clear background"
    if reading.object_rgb is None:
        return f"no object{background}"
    colour, shape = reading.colour or "oddly coloured", reading.shape or "thing of no clear shape"
    motion = f" moving {reading.direction}" if reading.direction else " that goes nowhere in particular"
    return f"{_article(colour)} {colour} {shape}{motion}{background}"


def _words(asked: Combination) -> str:
    return f"{_article(asked.colour)} {asked.colour} {asked.shape} moving {asked.direction} on {asked.background}"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"
