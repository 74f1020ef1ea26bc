"""What a video says of how it was made: text tags in an mp4's own boxes. Ours is the tag "comment"; ComfyUI writes "prompt" and "workflow".

Formulas: ISO/IEC 14496-12 (boxes), Apple's QuickTime File Format (moov/udta/meta/ilst, and keys of the namespace mdta).
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, OpenSoraError
from ..readers import json_object

PROGRAM = "opensora_core"
_LARGEST = 2**26  # bytes of an index that are read
_MOST_BOXES, _MOST_DEEP = 10_000, 8  # of a file; an mp4 has a few, five deep
_COMMENT = b"\xa9cmt"
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
        try:
            recipe = read(json_object(found.get(name, ""), name))
        except CheckpointError:
            continue
        if recipe:
            return recipe
    raise OpenSoraError(f"{path.name} does not say how it was made: it was not written by this program or ComfyUI, or anew by another.")


def tags(path: Path) -> dict[str, str]:
    """The text tags of an mp4 by their names. Raises an OpenSoraError for a file that is none."""
    index = b""
    for kind, offset, size in top_boxes(path):
        if kind == b"moov" and size <= _LARGEST:
            with path.open("rb") as file:
                file.seek(offset)
                index = file.read(size)
    if not index:
        raise OpenSoraError(f"{path.name} is not a whole mp4; give a video that this program or ComfyUI wrote.")
    return dict(_tags(index, [], 0))


def top_boxes(path: Path) -> Iterator[tuple[bytes, int, int]]:
    """(kind, first byte, bytes) of the boxes that an mp4 is made of, up to one that is not whole."""
    with path.open("rb") as file:
        end, offset = path.stat().st_size, 0
        for _ in range(_MOST_BOXES):
            file.seek(offset)
            if offset + 8 > end:
                return
            size, kind, head = _head(file.read(16), end - offset)
            if size < head or offset + size > end:
                return
            yield kind, offset, size
            offset += size


def _ours(recipe: dict) -> dict | None:
    parts = [recipe.get(name) for name in ("settings", "files", "versions")]
    is_ours = recipe.get("program") == PROGRAM and isinstance(recipe.get("prompt"), str) and type(recipe.get("seed")) is int
    is_whole = is_ours and all(isinstance(part, dict) for part in parts) and {PROGRAM, "torch"} <= set(parts[2])
    if is_whole and all(
        isinstance(one, dict) and type(one.get("name")) is str and type(one.get("bytes")) is int for one in parts[1].values()
    ):
        return recipe
    return None


def _comfyuis(graph: dict) -> dict | None:
    def is_node(value) -> bool:
        return isinstance(value, dict) and isinstance(value.get("class_type"), str) and isinstance(value.get("inputs", {}), dict)

    graph = {name: node for name, node in graph.items() if is_node(node)}
    return {"program": "ComfyUI", "prompt": graph} if graph else None


def _head(data: bytes, left: int) -> tuple[int, bytes, int]:
    """(size of a box, its kind, size of its head)."""
    size, kind = struct.unpack(">I4s", data[:8])
    if size == 1 and len(data) >= 16:
        return struct.unpack(">Q", data[8:16])[0], kind, 16
    return size or left, kind, 8


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    offset = 0
    while offset + 8 <= len(data):
        size, kind, head = _head(data[offset : offset + 16], len(data) - offset)
        if size < head:
            return
        yield kind, data[offset + head : offset + size]
        offset += size


def _tags(data: bytes, names: list[str], depth: int) -> Iterator[tuple[str, str]]:
    """names: those of the keys box that stands before the list, filled on the way."""
    if depth > _MOST_DEEP:
        return
    for kind, body in _boxes(data):
        if kind == b"meta" and body[4:8] != b"hdlr":
            body = body[4:]  # of an mp4: version and flags come first
        if kind == b"keys":
            names[:] = [name.decode("utf-8", "replace") for _, name in _boxes(body[8:])]
        elif kind in _HOLD_BOXES:
            yield from _tags(body, names, depth + 1)
        else:
            number = int.from_bytes(kind, "big")
            name = "comment" if kind == _COMMENT else names[number - 1] if 0 < number <= len(names) else ""
            values = [part[8:].decode("utf-8", "replace") for inner, part in _boxes(body) if inner == b"data"] if name else []
            yield from ((name, value) for value in values[:1])
