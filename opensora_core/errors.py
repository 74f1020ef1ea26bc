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
    "|load|look|make|merge|move|name|plan|press|put|quantise|release|save|say|scale|set|split|start|suspect|take|try|unset|update|use|wait|write"
)
_PARTED = re.compile(rf"[;:] (?=(?:{_DO})\b)|\. (?=(?:{_DO.title()})\b)")
_QUOTED = re.compile(r"""(?<!\w)'[^']*'(?!\w)|"[^"]*\"""")
_END = re.compile(r"(?:\.(?: [A-Z].*)?)?$")
_BEGUN = re.compile(rf"(?:{_DO.title()})\b")
_OPENING = re.compile(  # what needs no capital within a sentence
    r"\A(?:An?|Another|Decoding|Drawing|Encoding|How|Image|Latents|New|No|Nothing|One|References|Sampling|The|There|These|This|Weights|What|With)\b"
)


class OpenSoraError(ValueError):
    """A request that cannot be met as it was given: a size, a frame count, a scale, an image.

    latents: [B, C, T, H, W] fp32 on the CPU, in the transformer's scale: what is finished and not lost, for OpenSoraPipeline.decode; or None.
    """

    def __init__(self, message: str = "", latents=None):
        super().__init__(cure_first(readable(str(message))))
        self.latents = latents


def readable(sentence: str) -> str:
    """A sentence in which no word that was given is longer than a person reads."""
    return _ENDLESS.sub(lambda word: f"{word[0][:60]}...{word[0][-20:]}", sentence)


def cure_first(sentence: str) -> str:
    """A sentence "what failed; what to do." with what to do at its beginning; any other as it is.

    Names that were given may read as our words do: what is quoted is not looked into, and a sentence that could be parted in two places stays.
    """
    parted = list(_PARTED.finditer(_QUOTED.sub(lambda name: "-" * len(name[0]), sentence)))
    if _BEGUN.match(sentence) or "\n" in sentence or len(parted) != 1:
        return sentence
    failed, cure = sentence[: parted[0].start()], sentence[parted[0].end() :]
    end = _END.search(cure)
    cure, rest = f"{cure[0].upper()}{cure[1 : end.start()]}", end[0]
    if ": " in failed + cure:
        return f"{cure}. {failed}{rest}"
    return f"{cure}: {_OPENING.sub(lambda word: word[0].lower(), failed)}{rest}"


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise an OpenSoraError unless a value is one of the choices. name: of the setting, as the person who gave it knows it."""
    choices = tuple(choices)
    if value not in choices:
        raise OpenSoraError(f"{name}={value!r} is not known; use one of {', '.join(choices)}.")


class CheckpointError(OpenSoraError):
    """A file that cannot be read as the model it was given for: another model, truncated, keys missing."""


class OutOfMemory(OpenSoraError, MemoryError):
    """Memory ran out, whatever could be tried; says what was free and what to change."""


class DecodeOutOfMemory(OutOfMemory):
    """Memory ran out while finished latents were decoded."""


class NotNumbers(OpenSoraError):
    """Finished latents were decoded to values that are not numbers."""


# What a person reads before a sentence, where a program prints a class with its module: the product, not our folders.
for _error in (OpenSoraError, CheckpointError, OutOfMemory, DecodeOutOfMemory, NotNumbers):
    _error.__module__ = "Open-Sora"
