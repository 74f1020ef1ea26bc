"""What becomes of a prompt before a text encoder reads it. Pure Python: no torch, no tokenizer, no file."""

import numbers
import re
import unicodedata

from ..errors import OpenSoraError

T5_LENGTH = 512  # tokens, truncated and padded, attended without a mask
CLIP_LENGTH = 77

FPS_RANGE = (1, 120)
MOTION_SCORE_RANGE = (1, 15)
MOTION_SCORE = 4  # the released default

_ENDS_WITH_FPS = re.compile(r"\d+ FPS\.$")


def check_text(text: str, what: str = "The prompt") -> str:
    """Return a text if it is one that a text encoder can read: without a NUL, or half of a character (a lone surrogate), as of bytes that are no UTF-8."""
    bad = next((place for place, letter in enumerate(text) if letter == "\0" or "\ud800" <= letter <= "\udfff"), None)
    if bad is not None:
        raise OpenSoraError(f"{what} is not text: its character {bad + 1} is {ascii(text[bad])}; write it again.")
    return text


def decorate(prompt: str, fps: int | None = 24, motion_score: int | None = MOTION_SCORE) -> str:
    """A positive video prompt as Open-Sora 2.0 was used with it: "a cat" -> "a cat. 24 FPS. 4 motion score."

    Negative prompts, and the prompt of the picture that starts a text-to-image-to-video run, are encoded as they are.

    Args:
        prompt: stripped, and closed with a full stop if it has none.
        fps: frames per second of the video, 1-120. A prompt that ends with "<number> FPS." keeps its own. 0 or None = no sentence.
        motion_score: 1 (still) to 15 (wild); 4 is the released default. 0 or None = no sentence.

    Raises an OpenSoraError for a number outside its range, or not a whole one.
    Source: hpcaitech/Open-Sora@7ad6a96a opensora/utils/inference.py, add_fps_info_to_text, add_motion_score_to_text.
    """
    text = prompt.strip()
    if not text.endswith("."):
        text += "."
    if fps:
        fps = _whole("fps", fps, FPS_RANGE)
        if not _ENDS_WITH_FPS.search(text):
            text += f" {fps} FPS."
    if motion_score:
        text += f" {_whole('motion_score', motion_score, MOTION_SCORE_RANGE)} motion score."
    return text


def file_name_part(prompt: str, length: int = 40) -> str:
    """A prompt's first words for a file name, "a-red-kite": letters and digits of any script, no character that leads to another folder."""
    words = re.sub(r"[\W_]+", "-", unicodedata.normalize("NFC", prompt).lower()).strip("-")
    return words[:length].strip("-") or "video"


def _whole(name: str, value: int, limits: tuple[int, int]) -> int:
    low, high = limits
    wanted = f"a whole number from {low} to {high} (0 leaves the sentence out)"
    if not isinstance(value, numbers.Real):
        raise OpenSoraError(f"{name}={value!r} is not {wanted}; give such a number.")
    nearest = round(min(max(low, value), high))
    if value != nearest:
        raise OpenSoraError(f"{name}={value} is not {wanted}; use {nearest}, the nearest.")
    return nearest
