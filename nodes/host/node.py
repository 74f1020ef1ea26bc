"""What every node of this pack has in common: its texts are those of locales/en/nodeDefs.json, and its inputs are checked by the node
itself, against its own schema, before it does anything.

The host checks what stands in a prompt, but not what comes over a wire, nor the limits of an input that a node's `validate_inputs` asks
for; and it lets NaN through. So each limit holds here once more. An input with a default may be left out of a prompt.
"""

import functools
import inspect
import json
import math
import numbers
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from ...opensora_core.errors import OpenSoraError, cure_first

_TEXTS = Path(__file__).parents[2] / "locales" / "en" / "nodeDefs.json"
_SHOWN = 60  # characters of a value in a sentence
_LONGEST_NUMBER = 40  # digits
_LEAST = {"budget_gib": 0}  # where less than a widget offers is possible
_NO_AMOUNT = "is not an amount of memory"
_NOT_FINITE = {"shift": "is not a positive, finite number", "budget_gib": _NO_AMOUNT, "keep_gib": _NO_AMOUNT}
_OUT_OF_RANGE = {"steps": "makes no video; use {0} to {1}"}  # where there are better words
_OUT_OF_RANGE |= dict.fromkeys(("budget_gib", "keep_gib"), f"{_NO_AMOUNT} that is possible; use {{0}} to {{1}} GiB")


class Node(io.ComfyNode):
    """A node whose inputs are checked. Its `validate_inputs`, if it has one, takes constants (None: not known yet) by the names of inputs
    that have a rule beyond their limits, each with None as default, and returns {input: what is wrong with it}."""

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        for name, checked in _WRAPPERS.items():
            own = getattr(vars(cls).get(name), "__func__", None)  # the host copies a class with its methods for every call
            if own is not None and not hasattr(own, "__wrapped__") and not _takes_anything(own):
                setattr(cls, name, classmethod(checked(own)))

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict]:
        """What the host asks of a prompt: an input with a default may be left out. What people see (GET_NODE_INFO_V1) is as declared."""
        found = super().INPUT_TYPES()
        required = found.get("required", {})
        left_out = {name: entry for name, entry in required.items() if len(entry) > 1 and entry[1].get("default") is not None}
        kept = {name: entry for name, entry in required.items() if name not in left_out}
        return {**found, "required": kept, "optional": {**left_out, **found.get("optional", {})}}


def outputs(**kinds: type) -> list[io.Output]:
    """A node's outputs: their types by the names that people see."""
    return [kind.Output(display_name=name) for name, kind in kinds.items()]


@functools.cache
def _texts() -> dict:
    return json.loads(_TEXTS.read_text(encoding="utf-8"))


def _worded(own: Callable) -> Callable:
    """A schema with its texts: the node's name, description and search words, and the tooltips. What the schema says itself holds."""

    @functools.wraps(own)
    def define_schema(cls):
        schema = own(cls)
        texts = _texts().get(schema.node_id, {})
        schema.display_name = schema.display_name or texts.get("display_name")
        schema.description = schema.description or texts.get("description", "")
        schema.search_aliases = schema.search_aliases or texts.get("search_aliases", [])
        named = [(texts.get("inputs", {}).get(item.id, {}), item) for item in schema.inputs]
        named += [(texts.get("outputs", {}).get(str(place), {}), item) for place, item in enumerate(schema.outputs)]
        for text, item in named:
            item.tooltip = item.tooltip or text.get("tooltip")
        return schema

    return define_schema


def wrong_value(item: io.Input, value) -> str:
    """What is wrong with the value of an input by what the schema says of it, in a sentence; "" for nothing."""
    if isinstance(item, io.Int.Input | io.Float.Input):
        return _wrong_number(item, value)
    if isinstance(item, io.String.Input):
        return _wrong_text(item.id, value)
    # Names of files, which have no default, are looked for by whoever opens them, and say more.
    if isinstance(item, io.Combo.Input) and item.default is not None and value not in item.options:
        return f"{item.id}={shown(value)} is not known; use one of {', '.join(map(str, item.options))}."
    return ""


def shown(value) -> str:
    """A value as a sentence has it, cut where it is long."""
    if _is_endless(value):
        return f"a number of more than {_LONGEST_NUMBER} digits"  # Python itself refuses to write the longest
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _is_endless(value) -> bool:
    return isinstance(value, int) and abs(value) >= 10**_LONGEST_NUMBER


def _wrong_number(item, value) -> str:
    is_whole = isinstance(item, io.Int.Input)
    if not isinstance(value, numbers.Integral if is_whole else numbers.Real) or isinstance(value, bool):
        return f"{item.id}={shown(value)} is not a {'whole ' * is_whole}number."
    if isinstance(value, float) and not math.isfinite(value):
        return f"{item.id}={value} {_NOT_FINITE.get(item.id, 'is not a finite number')}; use {item.min} to {item.max}."
    if not _LEAST.get(item.id, item.min) <= value <= item.max:
        wrong = _OUT_OF_RANGE.get(item.id, "is out of range; use {0} to {1}").format(item.min, item.max)
        return f"{item.id}={shown(value)} {wrong}."
    return ""


def _wrong_text(name: str, value) -> str:
    if not isinstance(value, str):
        return f"{name}={shown(value)} is not text."
    for place, character in enumerate(value, 1):
        if character == "\0" or "\ud800" <= character <= "\udfff":
            what = "NUL" if character == "\0" else f"half of a surrogate pair, U+{ord(character):04X}"
            return f"{name} holds a character that is no text ({what}, character {place}); delete it."
    return ""


def _wrong_values(cls, given: dict[str, Any]) -> dict[str, str]:
    """{input: sentence} of what is wrong; None is what a wire will bring, or an optional input without one."""
    schema = cls.define_schema()
    items = {item.id: item for item in schema.inputs}
    if schema.is_input_list and all(isinstance(value, list) for value in given.values()):
        each = [(name, value) for name, values in given.items() for value in values]
    else:
        each = list(given.items())
    found = {name: wrong_value(items[name], value) for name, value in each if name in items and value is not None}
    return {name: cure_first(sentence) for name, sentence in found.items() if sentence}


def _with_defaults(cls, parameters: Iterable[inspect.Parameter], given: dict[str, Any]) -> dict[str, Any]:
    """What a function is given, with the schema's default for what was left out and has none in its signature."""
    lacking = [one.name for one in parameters if one.default is one.empty and one.name not in given]
    defaults = _defaults(cls) if lacking else {}
    return {**given, **{name: defaults[name] for name in lacking if name in defaults}}


def _defaults(cls) -> dict[str, Any]:
    found = {item.id: getattr(item, "default", None) for item in cls.define_schema().inputs}
    return {name: value for name, value in found.items() if value is not None}


def _completed(own: Callable) -> Callable:
    signature = inspect.signature(own)

    @functools.wraps(own)
    def completed(cls, *args, **given):
        given = {**_named(signature, cls, args), **given}
        return own(cls, **_with_defaults(cls, signature.parameters.values(), given))

    return completed


def _executed(own: Callable) -> Callable:
    completed = _completed(own)

    @functools.wraps(own)
    def execute(cls, *args, **given):
        given = {**_named(inspect.signature(own), cls, args), **given}
        given = {name: value for name, value in given.items() if value is not None or name not in _defaults(cls)}
        if wrong := _wrong_values(cls, given):
            raise OpenSoraError(" ".join(wrong.values()))
        return completed(cls, **given)

    return execute


def _validated(own: Callable) -> Callable:
    signature = inspect.signature(own)

    @functools.wraps(own)
    def validate_inputs(cls, *args, **given):
        given = {**_named(signature, cls, args), **given}
        wrong = _wrong_values(cls, given)
        # A rule says more than a limit; it is not asked about numbers that cannot be written.
        wrong |= own(cls, **{name: None if _is_endless(value) else value for name, value in given.items()})
        return _Refusals(wrong, list(given)) if wrong else True

    validate_inputs.__signature__ = signature  # by which the host knows what to ask for
    return validate_inputs


def _named(signature: inspect.Signature, cls, args: tuple) -> dict[str, Any]:
    return {name: value for name, value in signature.bind_partial(cls, *args).arguments.items() if name != "cls"}


def _takes_anything(own: Callable) -> bool:
    """Whether a method takes anything: that of a node that will not run (selftest.refusing)."""
    return [one.kind for one in inspect.signature(own).parameters.values()][1:] == [inspect.Parameter.VAR_KEYWORD]


_WRAPPERS = {"define_schema": _worded, "execute": _executed, "validate_inputs": _validated, "fingerprint_inputs": _completed}


class _Refusals(str):
    """What a node answers the host where something is wrong: to people, the first sentence.

    The host repeats an answer under every input that `validate_inputs` names, unless it is an ExecutionBlocker. It looks at each
    answer's class twice when it gathers answers, then once for every name, in the order in which they were given. So this is an
    ExecutionBlocker for the names that nothing is wrong with. (Counted in execution.py of ComfyUI 0.33; a test holds it. Where a host
    counts otherwise, the sentence stands under another input; and the node says it again when it runs.)
    """

    _BEFORE = 2

    def __new__(cls, wrong: dict[str, str], asked: list[str]):
        made = super().__new__(cls, next(iter(wrong.values())))
        made.sentences, made.looked_at = [*[""] * cls._BEFORE, *(wrong.get(name, "") for name in asked)], 0
        return made

    @property
    def __class__(self):
        self.looked_at += 1
        return _Refusals if self._now or self.looked_at > len(self.sentences) else ExecutionBlocker

    def __str__(self) -> str:
        return self._now or super().__str__()

    @property
    def _now(self) -> str:
        return "".join(self.sentences[self.looked_at - 1 : self.looked_at])
