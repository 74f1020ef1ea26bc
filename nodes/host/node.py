"""What every node of this pack has in common: its texts are those of locales/en/nodeDefs.json, and its inputs are checked by the node
itself, against its own schema, before it does anything.

The host checks what stands in a prompt, but not what comes over a wire, nor the limits of an input that a node's `validate_inputs` asks
for; and it lets NaN through. So each limit holds here once more. An input with a default may be left out of a prompt.
"""

import functools
import inspect
import json
import logging
import math
import numbers
from collections.abc import Callable
from pathlib import Path
from typing import Any

from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker

from ...opensora_core.errors import OpenSoraError, cure_first
from . import notice

_TEXTS = Path(__file__).parents[2] / "locales" / "en" / "nodeDefs.json"
_SHOWN = 60  # characters of a value in a sentence
_LONGEST_NUMBER = 40  # digits
_LEAST = {"budget_gib": 0}  # where less than a widget offers is possible
_NO_AMOUNT = "is not an amount of memory"
_NOT_FINITE = {"shift": "is not a positive, finite number", "budget_gib": _NO_AMOUNT, "keep_gib": _NO_AMOUNT}
_OUT_OF_RANGE = {"steps": "makes no video; use {0} to {1}"}  # where there are better words
_OUT_OF_RANGE |= dict.fromkeys(("budget_gib", "keep_gib"), f"{_NO_AMOUNT} that is possible; use {{0}} to {{1}} GiB")


class Node(io.ComfyNode):
    """A node whose inputs are checked. Its class declares `takes`, its inputs, a function in the place of one that lists files.

    Keywords of the class: category; outputs, kinds by the names that people see, as `_output` reads them; hidden, names of io.Hidden; and io.Schema's flags.
    `execute` is given every input, with the schema's default for what was left out, None for an optional wire. `fingerprint_inputs` takes
    the inputs that name files: the host looks at all values itself. `validate_inputs` takes constants (None: not known yet) by the names of inputs
    that have a rule beyond their limits, each with None as default, and returns {input: what is wrong with it, or ""}.
    """

    def __init_subclass__(cls, category: str = "", outputs: dict | None = None, hidden: tuple[str, ...] = ("unique_id",), **flags: bool):
        super().__init_subclass__()
        if not category:  # a copy of a node: the host makes one for every call
            return
        cls.declared = {"node_id": cls.__name__, "category": f"Open-Sora/{category}", **flags}
        cls.gives, cls.asks = outputs, hidden
        for name, wrapped in (("execute", _executed), ("validate_inputs", _validated), ("fingerprint_inputs", _fingerprinted)):
            if name in vars(cls):
                setattr(cls, name, classmethod(wrapped(vars(cls)[name].__func__)))

    @classmethod
    def inputs(cls) -> list[io.Input]:
        """Its inputs, with the files that are there now."""
        return [one() if callable(one) else one for one in cls.takes]

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What the class declares, with its texts: name, description, search words and tooltips."""
        told = texts()[cls.declared["node_id"]]
        inputs, outputs = cls.inputs(), [_output(name, kind) for name, kind in cls.gives.items()]
        for name, item in [*((item.id, item) for item in inputs), *enumerate(outputs)]:
            item.tooltip = told["outputs" if isinstance(item, io.Output) else "inputs"][str(name)]["tooltip"]
        words = {name: told[name] for name in ("display_name", "description", "search_aliases")}
        return io.Schema(inputs=inputs, outputs=outputs, hidden=[getattr(io.Hidden, name) for name in cls.asks], **words, **cls.declared)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict]:
        """What the host asks of a prompt: an input with a default may be left out. What people see (GET_NODE_INFO_V1) is as declared."""
        found = super().INPUT_TYPES()
        required = found.get("required", {})
        left_out = {
            name: required.pop(name) for name, entry in [*required.items()] if len(entry) > 1 and entry[1].get("default") is not None
        }
        return {**found, "required": required, "optional": {**left_out, **found.get("optional", {})}}

    @classmethod
    def show(cls, line: str, level: int = logging.WARNING) -> None:
        """Show a line on this node, see notice.py."""
        notice.show(line, cls.hidden.unique_id, level)

    @classmethod
    def reported(cls, report: str) -> io.NodeOutput:
        """A report as output, kept in the history and shown on the node."""
        cls.show(report, notice.INFO)
        return io.NodeOutput(report, ui=ui.PreviewText(report))


@functools.cache
def texts() -> dict:
    """Names, descriptions and tooltips by node, in the order in which a video is made."""
    return json.loads(_TEXTS.read_text(encoding="utf-8"))


def _output(name: str, kind) -> io.Output:
    """An output of a type; of many of a type, [type]; or of one of several words, a tuple of them."""
    if isinstance(kind, tuple):
        return io.Combo.Output(display_name=name, options=list(kind))
    if isinstance(kind, list):
        return kind[0].Output(display_name=name, is_output_list=True)
    return kind.Output(display_name=name)


def gathered(**makers: Callable | tuple[str, ...]) -> Callable:
    """An `execute` of which some arguments are made of several inputs: of those that a maker's own parameters name, or a dictionary of them."""
    parts = {name: maker if isinstance(maker, tuple) else tuple(inspect.signature(maker).parameters) for name, maker in makers.items()}

    def of(own: Callable) -> Callable:
        def execute(cls, **given):
            taken = {name: {part: given.pop(part) for part in parts[name] if part in given} for name in makers}
            made = {name: taken[name] if isinstance(maker, tuple) else maker(**taken[name]) for name, maker in makers.items()}
            return own(cls, **given, **made)

        names = [name for name in inspect.signature(own).parameters if name not in makers]
        every = [*names, *(part for several in parts.values() for part in several)]
        execute.__signature__ = inspect.Signature([inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in every])
        return execute

    return of


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
        return f"Give a {'whole ' * is_whole}number: {item.id}={shown(value)} is none."
    if isinstance(value, float) and not math.isfinite(value):
        return f"{item.id}={value} {_NOT_FINITE.get(item.id, 'is not a finite number')}; use {item.min} to {item.max}."
    if not _LEAST.get(item.id, item.min) <= value <= item.max:
        wrong = _OUT_OF_RANGE.get(item.id, "is out of range; use {0} to {1}").format(item.min, item.max)
        return f"{item.id}={shown(value)} {wrong}."
    return ""


def _wrong_text(name: str, value) -> str:
    if not isinstance(value, str):
        return f"Give a text: {name}={shown(value)} is none."
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


def _defaults(cls) -> dict[str, Any]:
    """What stands for an input that was left out, of those that may be."""
    found = {
        item.id: getattr(item, "default", None) for item in cls.inputs() if item.optional or getattr(item, "default", None) is not None
    }
    return {name: [default] for name, default in found.items()} if cls.declared.get("is_input_list") else found


def _executed(own: Callable) -> Callable:
    @functools.wraps(own)
    def execute(cls, **given):
        defaults = _defaults(cls)
        given = {name: value for name, value in given.items() if value is not None or name not in defaults}
        if wrong := _wrong_values(cls, given):
            raise OpenSoraError(" ".join(wrong.values()))
        return own(cls, **{**defaults, **given})

    return execute


def _fingerprinted(own: Callable) -> Callable:
    names = inspect.signature(own).parameters

    @functools.wraps(own)
    def fingerprint_inputs(cls, **given):
        return own(cls, **{name: value for name, value in given.items() if name in names})

    return fingerprint_inputs


def _validated(own: Callable) -> Callable:
    @functools.wraps(own)
    def validate_inputs(cls, **given):
        wrong = _wrong_values(cls, given)
        # A rule says more than a limit; it is not asked about numbers that cannot be written.
        ruled = own(cls, **{name: None if _is_endless(value) else value for name, value in given.items()})
        wrong |= {name: sentence for name, sentence in ruled.items() if sentence}
        return _Refusals(wrong, list(given)) if wrong else True

    validate_inputs.__signature__ = inspect.signature(own)  # by which the host knows what to ask for
    return validate_inputs


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
