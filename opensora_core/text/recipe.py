"""How a model reads prompts: with which encoders, in how many tokens, and what it is told besides a person's own words."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import Enum

from ..choices import AUTO, ENCODED, ZERO
from ..errors import OpenSoraError

T5, CLIP = "T5", "CLIP"


class Unread(Enum):
    """What stands in a negative prompt's place, and no encoder reads."""

    ZEROS = "zeros"
    NULL_CAPTION = "the null caption that the model's own file holds"


@dataclass(frozen=True)
class Said:
    """What is said to a model about the video, beside the prompt itself; 0, "" or None = nothing.

    fps: frames per second, 1-120. motion_score: how much moves, on the model's own scale: 2.0's is 1 (still) to 15 (wild), 1.2's and 1.3's 0 to 100.
    aesthetic_score: how good it looks, 0 to 10, or a word of 1.3's. camera_motion: such as "pan left".
    """

    fps: int | None = None
    motion_score: float | None = None
    aesthetic_score: float | str | None = None
    camera_motion: str | None = None


@dataclass(frozen=True)
class TextRecipe:
    """From a prompt to what a model's network reads of it.

    encoders: T5, or T5 and CLIP, whose pooled features stand for the whole text. length: tokens that T5 reads, padded or cut.
    has_mask: whether padding is hidden, from T5 itself and from the network; without a mask it is attended like words.
    words: (prompt, what is said) -> the text that is encoded. negative: the negative prompt where a person gives none, or what stands in its place.
    clean: what becomes of a negative prompt before it is encoded. usual: what is said where a person says nothing of it.
    """

    encoders: tuple[str, ...]
    length: int
    has_mask: bool
    words: Callable[[str, Said], str]
    negative: str | Unread
    clean: Callable[[str], str] = lambda negative_prompt: negative_prompt
    usual: Said = Said()

    def said(self, **said: float | str | None) -> Said:
        """What is said to this model; its usual value stands where None is given."""
        return Said(**{one.name: getattr(self.usual, one.name) if said.get(one.name) is None else said[one.name] for one in fields(Said)})

    def against(self, negative_prompt: str, unconditional: str = AUTO) -> str | Unread:
        """What the unconditional pass reads. unconditional: of choices.UNCONDITIONALS; with zero there can be no negative prompt."""
        if unconditional == ZERO:
            if negative_prompt:
                raise OpenSoraError("With unconditional zero there is no negative prompt; leave it out, or use encoded.")
            return Unread.ZEROS
        return self.clean(negative_prompt) if negative_prompt or unconditional == ENCODED else self.negative
