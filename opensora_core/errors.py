"""The errors a person is meant to read.

Every message says what failed, what was given, what is expected and, where there is one, the nearest
valid value. Anything else that is raised is a defect of ours. It is written as it is found, "what failed; what to do.", and
said the other way round: "What to do: what failed."
"""

import re
from collections.abc import Iterable

_ENDLESS = re.compile(r"\S{400,}")
# What people are told to do begins with one of these.
_DO = (
    "add|ask|begin|calibrate|call|check|choose|close|connect|convert|decode|delete|disconnect|download|draw|encode|end|fetch|free|give|install|lay|leave"
    "|load|look|make|merge|move|name|plan|press|put|quantise|release|save|say|scale|set|split|start|take|try|unset|update|use|wait|write"
)
_TO_DO = re.compile(
    rf"(?P<failed>[^\n]+?)(?:[;:] (?=(?:{_DO})\b)|\. (?=(?:{_DO.title()})\b))(?P<cure>[^\n]+?)(?P<rest>\.(?: [A-Z][^\n]*)?)?"
)
_BEGUN = re.compile(rf"(?:{_DO.title()})\b")
# Words that need no capital within a sentence.
_OPENING = re.compile(
    r"(?:An?|Another|Decoding|Drawing|Encoding|How|Image|Latents|New|No|Nothing|One|References|Sampling|The|There|These|This|Weights|What|With)\b"
)


class OpenSoraError(ValueError):
    """A request that cannot be met as it was given: a size, a frame count, a scale, an image."""

    def __init__(self, message: str = ""):
        super().__init__(cure_first(readable(str(message))))


def readable(sentence: str) -> str:
    """A sentence in which no word that was given is longer than a person reads."""
    return _ENDLESS.sub(lambda word: f"{word[0][:60]}...{word[0][-20:]}", sentence)


def cure_first(sentence: str) -> str:
    """A sentence "what failed; what to do." with what to do at its beginning; any other as it is."""
    found = None if _BEGUN.match(sentence) else _TO_DO.fullmatch(sentence)
    if found is None:
        return sentence
    failed, cure, rest = found["failed"], found["cure"], found["rest"] or ""
    if ": " in failed + cure:
        return f"{cure[0].upper()}{cure[1:]}. {failed}{rest}"
    failed = _OPENING.sub(lambda word: word[0].lower(), failed, count=1) if _OPENING.match(failed) else failed
    return f"{cure[0].upper()}{cure[1:]}: {failed}{rest}"


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise an OpenSoraError unless a value is one of the choices. name: of the setting, as the person who gave it knows it."""
    choices = tuple(choices)
    if value not in choices:
        raise OpenSoraError(f"{name}={value!r} is not known; use one of {', '.join(choices)}.")


class CheckpointError(OpenSoraError):
    """A file that cannot be read as the model it was given for: another model, truncated, keys missing."""


class OutOfMemory(OpenSoraError, MemoryError):
    """Memory ran out, whatever could be tried; says what was free and what to change.

    latents: [B, C, T, H, W] fp32 on the CPU, in the transformer's scale: what is finished, for OpenSoraPipeline.decode; or None.
    """

    def __init__(self, message: str, latents=None):
        super().__init__(message)
        self.latents = latents


class DecodeOutOfMemory(OutOfMemory):
    """Memory ran out while finished latents were decoded; they are not lost."""


class NotNumbers(OpenSoraError):
    """Finished latents were decoded to values that are not numbers; they are not lost. latents: as OutOfMemory's."""

    def __init__(self, message: str, latents):
        super().__init__(message)
        self.latents = latents


# What a person reads before a sentence, where a program prints a class with its module: the product, not our folders.
for _error in (OpenSoraError, CheckpointError, OutOfMemory, DecodeOutOfMemory, NotNumbers):
    _error.__module__ = "Open-Sora"
