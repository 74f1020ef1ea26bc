"""How a model reads prompts: with which encoders, in how many tokens, and what it is told besides a person's own words."""

from collections.abc import Callable
from dataclasses import dataclass

T5, CLIP = "T5", "CLIP"


@dataclass(frozen=True)
class Said:
    """What is said to a model about the video, beside the prompt itself; 0 or None = nothing.

    Attributes:
        fps: frames per second, 1-120.
        motion_score: 1 (still) to 15 (wild).
    """

    fps: int | None = None
    motion_score: int | None = None


@dataclass(frozen=True)
class TextRecipe:
    """From a prompt to what a model's network reads of it.

    Attributes:
        encoders: T5, or T5 and CLIP, whose pooled features stand for the whole text.
        length: tokens that T5 reads, padded or cut.
        has_mask: whether padding is hidden, from T5 itself and from the network; without a mask it is attended like words.
        words: (prompt, what is said) -> the text that is encoded.
        negative: the negative prompt where a person gives none; None = a null caption that the model's own file holds.
    """

    encoders: tuple[str, ...]
    length: int
    has_mask: bool
    words: Callable[[str, Said], str]
    negative: str | None
