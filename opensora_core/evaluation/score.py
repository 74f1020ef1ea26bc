"""From verdicts to figures: shares with confidence intervals, chance levels, and what must hold of the small model.

What must hold is said once, here, as the lines' requirements; a figure that has none is shown for information.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy

from ..choices import BALANCED, DRAFT, FAST
from .verdict import ATTRIBUTES, Verdict
from .world import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, combinations

Z = 1.959964  # of 95 %
_KINDS = {"colour": COLOURS, "background": BACKGROUNDS, "shape": SHAPES, "direction": DIRECTIONS, "all four": combinations()}
CHANCE = {name: 1 / len(kinds) for name, kinds in _KINDS.items()}
PSNR_CEILING = 100.0  # dB, for identical pictures, so that a mean exists
# The figures that the requirements speak of: at least so many prompts, exactly so many steps, the default guidance.
REQUIRED_PROMPTS, REQUIRED_STEPS, REQUIRED_GUIDANCE = 96, 40, (7.5, 3.0)
MEETS_WITHIN = 1.0  # dB below the VAE's own PSNR at which a frame still meets its picture
TEXT_TO_VIDEO = {"colour": 0.95, "background": 0.95, "shape": 0.85, "direction": 0.85, "all four": 0.75, "steady": 0.80}
SPEED_CORRELATION = 0.6
REDIRECTED = {"direction": 0.80, "keeps colour and shape": 0.85}
VAE_PSNR, VAE_READABLE = 30.0, 0.95
VISION = dict.fromkeys((*ATTRIBUTES, "all four", "steady"), 0.99)
# (speed, whether pictures are given) -> at least so many dB to the exact run of 50 steps in the mean, at most so many forwards.
SPEEDS = {
    (BALANCED, False): (52.0, 40), (FAST, False): (45.0, 24), (DRAFT, False): (41.0, 18),
    (BALANCED, True): (52.0, 50), (FAST, True): (45.0, 30), (DRAFT, True): (49.0, 26),
}  # fmt: skip
SAME_VIDEO = 45.0  # dB, worst clip: rounding moves single pixels by one level; another video would be below 30


@dataclass(frozen=True)
class Share:
    """A count out of a total."""

    right: int
    of: int

    @property
    def value(self) -> float:
        return self.right / self.of if self.of else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % confidence interval."""
        if not self.of:
            return 0.0, 1.0
        p, spread = self.value, Z * Z / self.of
        middle = (p + spread / 2) / (1 + spread)
        half = Z * math.sqrt(p * (1 - p) / self.of + spread / (4 * self.of)) / (1 + spread)
        return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class Line:
    """One figure of the table.

    part: of the evaluation, such as "text to video, held out". what: the figure's name. chance: what guessing gives, if that has a meaning.
    value: a share, a number (None: it could not be measured), with its unit and its interval if it has one.
    must: what must hold, in words; empty if nothing must. is_reached: whether it does; None where nothing must.
    """

    part: str
    what: str
    value: Share | float | None
    unit: str = ""
    interval: tuple[float, float] | None = None
    chance: float | None = None
    must: str = ""
    is_reached: bool | None = None

    def at_least(self, least: float, must: str = "") -> "Line":
        """The same line, of which this must hold. must: in words, where a number is not enough."""
        value = self.value.value if isinstance(self.value, Share) else self.value
        return replace(self, must=must or f"at least {least:g}", is_reached=value is not None and value >= least)

    def at_most(self, most: float) -> "Line":
        """The same line of a number, of which this must hold."""
        return replace(self, must=f"at most {most:g}", is_reached=self.value <= most)

    def as_json(self) -> dict:
        entry: dict = {"part": self.part, "what": self.what}
        if isinstance(self.value, Share):
            low, high = self.value.interval
            entry |= {"right": self.value.right, "of": self.value.of, "share": self.value.value, "interval": [low, high]}
        else:
            entry |= {"value": self.value, "unit": self.unit, "interval": list(self.interval) if self.interval else None}
        return entry | {"chance": self.chance, "must": self.must, "is_reached": self.is_reached}


def share_line(part: str, what: str, hits, at_least: float | None = None) -> Line:
    """A line of booleans, with what must hold if anything must."""
    line = Line(part, what, Share(sum(map(bool, hits)), len(hits)), chance=CHANCE.get(what))
    return line if at_least is None else line.at_least(at_least, f"at least {at_least:.0%}")


def shares(part: str, verdicts: list[Verdict], names: Sequence[str], required: dict[str, float] | None = None) -> list[Line]:
    """A line for each name: an attribute, "all four" or "steady". required: least shares by name."""
    hits = {name: [verdict.right[name] for verdict in verdicts] for name in ATTRIBUTES}
    hits |= {"all four": [verdict.is_right for verdict in verdicts], "steady": [verdict.reading.is_steady for verdict in verdicts]}
    return [share_line(part, name, hits[name], (required or {}).get(name)) for name in names]


def verdict_lines(part: str, verdicts: list[Verdict], required: dict[str, float]) -> list[Line]:
    """The four attributes, all together, steadiness and speed.

    required: least shares by name; the speeds' correlation is required where "all four" is.
    """
    lines = shares(part, verdicts, (*ATTRIBUTES, "all four", "steady"), required)
    asked = [verdict.motion_score for verdict in verdicts]
    found = correlation(asked, [verdict.reading.motion_score for verdict in verdicts])
    line = Line(part, "speed, asked and measured", found, "correlation", correlation_interval(found, len(verdicts)), 0.0)
    lines.append(line.at_least(SPEED_CORRELATION) if "all four" in required else line)
    errors = [abs(verdict.speed_error) for verdict in verdicts if verdict.speed_error is not None]
    lines.append(Line(part, "speed, mean error", sum(errors) / len(errors) if errors else None, "px/frame"))
    return lines


def meeting_lines(part: str, frame: str, found: list[float], in_place: list[float], alone: list[float]) -> list[Line]:
    """How near a generated frame, "first" or "last", is to the picture it was given, in dB, one entry for each clip.

    in_place: the VAE's own PSNR, that of the picture's latent decoded in its place in the true clip: what a perfect transformer would give.
    For a first frame that is what the picture alone gives. A last frame is one of four that its latent stands for, and loses more.
    alone: of the picture encoded and decoded by itself, for information.
    """
    least = mean(in_place) - MEETS_WITHIN
    must = f"at least {least:.1f} (the VAE's own, less {MEETS_WITHIN:g})"
    return [
        Line(part, f"{frame} frame to its picture", mean(found), "dB").at_least(least, must),
        Line(part, f"{frame} frame to its picture, worst clip", min(found), "dB"),
        Line(part, f"{frame} picture, the VAE's own", mean(in_place), "dB"),
        Line(part, f"{frame} picture, the VAE's on it alone", mean(alone), "dB"),
    ]


def lower_line(part: str, what: str, hits: list[bool], reference: list[bool]) -> Line:
    """A share that must be clearly lower than another: the difference's 95 % interval (Newcombe's, of Wilson's) is above zero."""
    share, other = Share(sum(hits), len(hits)), Share(sum(reference), len(reference))
    gap = other.value - share.value
    least = gap - math.hypot(other.value - other.interval[0], share.interval[1] - share.value)
    return Line(part, what, share, must=f"clearly below {other.value:.1%}", is_reached=least > 0)


def as_often_right_line(part: str, what: str, exact: list[bool], other: list[bool]) -> Line:
    """Whether all four attributes are right as often as in the exact run, to within one clip."""
    least = sum(exact) - 1
    return Line(part, what, Share(sum(other), len(other)), must=f"at least {least}", is_reached=sum(other) >= least)


def correlation(one, other) -> float | None:
    """Pearson's; None where either does not vary."""
    one, other = numpy.asarray(one, dtype=float), numpy.asarray(other, dtype=float)
    one, other = one - one.mean(), other - other.mean()
    size = math.sqrt((one @ one) * (other @ other))
    return float(one @ other) / size if size > 1e-12 else None


def correlation_interval(found: float | None, count: int) -> tuple[float, float] | None:
    """Fisher's 95 % confidence interval; None where there is none."""
    if found is None or count < 4:
        return None
    middle, half = math.atanh(max(-0.999999, min(0.999999, found))), Z / math.sqrt(count - 3)
    return math.tanh(middle - half), math.tanh(middle + half)


def psnr(frames, others) -> float:
    """Peak signal-to-noise ratio in dB of two arrays of uint8 of one shape, at most PSNR_CEILING (identical)."""
    difference = numpy.asarray(frames, dtype=numpy.float64) - numpy.asarray(others, dtype=numpy.float64)
    error = float((difference**2).mean()) / 255**2
    return min(PSNR_CEILING, -10 * math.log10(error)) if error > 0 else PSNR_CEILING


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


_HEADINGS = ("", "count", "value", "95% interval", "chance", "must be", "")


def table(lines: list[Line]) -> str:
    """The lines for a terminal: a heading for each part, then a row for each figure."""
    rows = [_HEADINGS, *map(_row, lines)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    rows = ["  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, "<>>>><<", widths, strict=True)).rstrip() for row in rows]
    text, part = rows[:1], None
    for line, row in zip(lines, rows[1:], strict=True):
        text += [row] if line.part == part else ["", line.part, row]
        part = line.part
    return "\n".join(text)


def _row(line: Line) -> tuple[str, ...]:
    value, interval, count, forms = line.value, line.interval, "", (".2f", ".0f")
    if isinstance(value, Share):
        value, interval, count, forms = value.value, value.interval, f"{value.right}/{value.of}", (".1%", ".1%")
    shown = ("none" if value is None else f"{value:{forms[0]}}") + {"dB": " dB", "px/frame": " px/frame"}.get(line.unit, "")
    between = "" if interval is None else " - ".join(f"{bound:{forms[0]}}" for bound in interval)
    chance = "" if line.chance is None else f"{line.chance:{forms[1]}}"
    reached = {None: "", True: "reached", False: "NOT reached"}[line.is_reached]
    return f"  {line.what}", count, shown, between, chance, line.must, reached
