"""What becomes of a prompt of Open-Sora 1.0 to 1.3 before it is cleaned (clean.py) and read: settings, parts for loops, sentences.

In the order of the scripts: settings come off the end of the whole prompt, parts are split, sentences are added to each, then each is cleaned.
"""

import json
import re

from ..errors import OpenSoraError

SCORE_RANGE = (0, 10)
MOTION_RANGE = (0, 100)
CAMERA_MOTIONS = ("pan right", "pan left", "tilt up", "tilt down", "zoom in", "zoom out", "static")
_SETTINGS = ("reference_path", "mask_strategy")
# Below a score: its word in 1.3; above the last: the one after it.
_AESTHETIC = ((4, "terrible"), (4.5, "very poor"), (5, "poor"), (5.5, "fair"), (6, "good"), (6.5, "very good"), (None, "excellent"))
_MOTION = ((0.5, "very low"), (2, "low"), (5, "fair"), (10, "high"), (20, "very high"), (None, "extremely high"))
_LOOPS = "write |0| first text |2| text from loop 2 on"


class MotionScore(float):
    """A motion score as it is written: a number, or one of 1.3's words, which is the least number that is called so. Other text: a ValueError."""

    def __new__(cls, text: str | float):
        words = [word for _, word in _MOTION]
        return super().__new__(cls, (0.1, *(below for below, _ in _MOTION[:-1]))[words.index(text)] if text in words else text)


def with_scores(prompt: str, aesthetic: float | None = None, motion: float | None = None, camera: str | None = None) -> str:
    """A prompt with 1.2's sentences, but for those it has: "a cat" -> "a cat aesthetic score: 6.5. motion score: 3.0. camera motion: pan left."

    Raises an OpenSoraError for a score that is no number or out of range.
    Source: hpcaitech/Open-Sora@v1.2.0 opensora/utils/inference_utils.py, append_score_to_prompts.
    """
    values = (_number("aesthetic score", aesthetic, SCORE_RANGE), _number("motion score", motion, MOTION_RANGE))
    for name, value in zip(("aesthetic score:", "motion score:"), values, strict=True):
        prompt = _with(prompt, name, None if value is None else f"{name} {value:.1f}.")
    return _with(prompt, "camera motion:", camera and f"camera motion: {camera}.")


def with_words(prompt: str, aesthetic: float | str | None = None, motion: float | str | None = None, camera: str | None = None) -> str:
    """A prompt with 1.3's sentences, but for those it has: "a cat" -> "a cat The aesthetic score is excellent." A word passes as it is.

    Raises an OpenSoraError for a score that is out of range.
    Source: hpcaitech/Open-Sora@v1.3 opensora/utils/inference_utils.py, append_score_to_prompts.
    """
    aesthetic, motion = _word("aesthetic score", aesthetic, _AESTHETIC, SCORE_RANGE), _word("motion score", motion, _MOTION, MOTION_RANGE)
    prompt = _with(prompt, "aesthetic score is", aesthetic and f"The aesthetic score is {aesthetic}.")
    prompt = _with(prompt, "motion strength is", motion and f"The motion strength is {motion}.")
    return _with(prompt, "camera motion:", camera and f"camera motion: {camera}.")


def split_settings(prompt: str) -> tuple[str, dict[str, str]]:
    """A prompt without the {"reference_path": ..., "mask_strategy": ...} at its end, and that; it may be there once."""
    text, *rest = re.split(r"(?=\{)", prompt)
    if not rest:
        return text, {}
    try:
        settings = json.loads("".join(rest))
    except (ValueError, RecursionError) as error:
        raise OpenSoraError(
            f"From {rest[0][:40]!r} on the prompt is not a JSON record of {' and '.join(_SETTINGS)}; write it as one."
        ) from error
    wrong = [key for key in settings if key not in _SETTINGS] if isinstance(settings, dict) else [rest[0][:40]]
    if wrong:
        raise OpenSoraError(f"{wrong[0][:40]!r} at the end of the prompt is not known; use {' or '.join(_SETTINGS)}.")
    for name, value in settings.items():
        if not isinstance(value, str):
            raise OpenSoraError(f"{name} at the end of the prompt is {value!r}; write it as text in double quotes.")
    return text, settings


def split_parts(prompt: str) -> list[tuple[int, str]]:
    """(first loop, text) of the parts of "|0| a day |2| a night"; the whole from loop 0 where a prompt has no parts."""
    if not prompt.startswith("|0|"):
        return [(0, prompt)]
    pieces = prompt.split("|")[1:]
    if len(pieces) % 2:
        raise OpenSoraError(f"The part {pieces[-1]!r} of the prompt has no text; {_LOOPS}.")
    parts = []
    for start, text in zip(pieces[::2], pieces[1::2], strict=True):
        if not re.fullmatch(r"\s*[0-9]{1,6}\s*", start) or (parts and int(start) <= parts[-1][0]):
            raise OpenSoraError(f"|{start}| in the prompt is not a loop after the one before it; {_LOOPS}.")
        parts.append((int(start), text.strip()))
    return parts


def text_of_loop(parts: list[tuple[int, str]], loop: int) -> str:
    """The text that is valid in a loop, from 0."""
    return [text for start, text in parts if start <= loop][-1]


def _with(prompt: str, mark: str, sentence: str | None) -> str:
    return f"{prompt} {sentence}" if sentence and mark not in prompt else prompt


def _number(name: str, value: float | str | None, limits: tuple[int, int]) -> float | None:
    if value is None:
        return None
    low, high = limits
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not low <= number <= high:
        raise OpenSoraError(f"{name}={value} is not a number from {low} to {high}; give a score in that range.")
    return number


def _word(name: str, value: float | str | None, words, limits: tuple[int, int]) -> str | None:
    try:
        float(value or 0)
    except ValueError:
        return str(value)
    number = _number(name, value, limits)
    return None if number is None else next(word for below, word in words if below is None or number < below)
