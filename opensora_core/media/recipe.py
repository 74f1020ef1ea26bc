"""What a video says of how it was made: text tags in an mp4's own boxes. Ours is the tag "comment"; ComfyUI writes "prompt" and "workflow".

Formulas: ISO/IEC 14496-12 (boxes), Apple's QuickTime File Format (moov/udta/meta/ilst, and keys of the namespace mdta).
"""

import json
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CheckpointError, OpenSoraError
from ..readers import json_object

PROGRAM = "opensora_core"
_LARGEST = 2**26  # bytes of an index that are read
_MOST_BOXES, _MOST_DEEP = 10_000, 8  # of a file; an mp4 has a few, five deep
_HOLD_BOXES = {b"moov", b"udta", b"meta", b"ilst"}


def as_tag(recipe: dict[str, Any]) -> str:
    """A recipe as the text of the tag "comment"."""
    return json.dumps({"program": PROGRAM, **recipe}, ensure_ascii=False)


def recipe_of(path: Path) -> dict[str, Any]:
    """What an mp4 says of how it was made: ours as it was given to `as_tag`; ComfyUI's as {"program": "ComfyUI", "prompt": the graph in API form}.

    Raises an OpenSoraError for what is no mp4, or says nothing.
    """
    found = tags(path)
    for name, read in (("comment", _ours), ("prompt", _comfyuis)):
        with suppress(CheckpointError):
            if recipe := read(json_object(found.get(name, ""), name)):
                return recipe
    raise OpenSoraError(f"{path.name} does not say how it was made; take a video as this program or ComfyUI wrote it, not written anew.")


def tags(path: Path) -> dict[str, str]:
    """The text tags of an mp4 by their names. Raises an OpenSoraError for a file that is none."""
    with path.open("rb") as file:
        for kind, begin, end in boxes(file, 0, path.stat().st_size):
            if kind == b"moov" and end - begin <= _LARGEST:
                return dict(_tags(file, begin, end, [], 0))
    raise OpenSoraError(f"{path.name} is not a whole mp4; give a video that this program or ComfyUI wrote.")


def _ours(recipe: dict) -> dict | None:
    settings, files, versions = (recipe.get(name) for name in ("settings", "files", "versions"))
    is_ours = recipe.get("program") == PROGRAM and isinstance(recipe.get("prompt"), str) and type(recipe.get("seed")) is int
    if not is_ours or not all(isinstance(part, dict) for part in (settings, files, versions)) or not {PROGRAM, "torch"} <= versions.keys():
        return None
    named = [isinstance(one, dict) and type(one.get("name")) is str and type(one.get("bytes")) is int for one in files.values()]
    return recipe if all(named) else None


def _comfyuis(graph: dict) -> dict | None:
    def is_node(value) -> bool:
        return isinstance(value, dict) and isinstance(value.get("class_type"), str) and isinstance(value.get("inputs", {}), dict)

    graph = {name: node for name, node in graph.items() if is_node(node)}
    return {"program": "ComfyUI", "prompt": graph} if graph else None


def boxes(file: BinaryIO, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(kind, first byte of what it holds, first byte behind it) of the boxes between two bytes of an mp4, up to one that is not whole."""
    for _ in range(_MOST_BOXES):
        file.seek(at)
        head = file.read(max(0, min(16, end - at)))
        if len(head) < 8:
            return
        (size, kind), begin = struct.unpack(">I4s", head[:8]), at + 8
        if size == 1 and len(head) == 16:
            size, begin = struct.unpack(">Q", head[8:])[0], at + 16
        behind = at + size if size else end
        if not begin <= behind <= end:
            return
        yield kind, begin, behind
        at = behind


def _tags(file: BinaryIO, at: int, end: int, names: list[str], depth: int) -> Iterator[tuple[str, str]]:
    """names: those of the keys box that stands before the list, filled on the way."""

    def text(begin: int, behind: int) -> str:
        file.seek(begin)
        return file.read(max(0, behind - begin)).decode("utf-8", "replace")

    for kind, begin, behind in boxes(file, at, end):
        if kind == b"meta" and text(begin + 4, begin + 8) != "hdlr":
            begin += 4  # of an mp4: version and flags come first
        if kind == b"keys":
            names[:] = [text(*name) for _, *name in boxes(file, begin + 8, behind)]
        elif kind in _HOLD_BOXES and depth < _MOST_DEEP:
            yield from _tags(file, begin, behind, names, depth + 1)
        else:
            number = int.from_bytes(kind, "big")
            name = "comment" if kind == b"\xa9cmt" else names[number - 1] if 0 < number <= len(names) else ""
            values = [text(first + 8, last) for inner, first, last in boxes(file, begin, behind) if inner == b"data"] if name else []
            yield from ((name, value) for value in values[:1])
