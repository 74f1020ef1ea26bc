"""What a video says of how it was made: text tags in an mp4's own boxes. Ours is the tag "comment"; ComfyUI writes "prompt" and "workflow".

Formulas: ISO/IEC 14496-12 (boxes), Apple's QuickTime File Format (moov/udta/meta/ilst, and keys of the namespace mdta).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CheckpointError, OpenSoraError
from ..readers import json_object

PROGRAM = "opensora_core"
_LARGEST = 2**26  # bytes of an index that are read
_MOST_BOXES = 10_000  # of a file; an mp4 has a few


def as_tag(recipe: dict[str, Any]) -> str:
    """A recipe as the text of the tag "comment"."""
    return json.dumps({"program": PROGRAM, **recipe}, ensure_ascii=False)


def recipe_of(path: Path) -> dict[str, Any]:
    """What an mp4 says of how it was made: ours as it was given to `as_tag`; ComfyUI's as {"program": "ComfyUI", "prompt": the graph in API form}.

    Raises an OpenSoraError for what is no mp4, or says nothing.
    """
    found = tags(path)
    ours, graph = (_object(found.get(name, "")) for name in ("comment", "prompt"))
    is_whole = _has(ours, prompt=str, seed=int, settings=dict, files=dict, versions=dict) and {PROGRAM, "torch"} <= ours["versions"].keys()
    if is_whole and ours.get("program") == PROGRAM and all(_has(file, name=str, bytes=int) for file in ours["files"].values()):
        return ours
    if nodes := {name: node for name, node in graph.items() if _has(node, class_type=str, inputs=dict)}:
        return {"program": "ComfyUI", "prompt": nodes}
    raise OpenSoraError(f"{path.name} does not say how it was made; take a video as this program or ComfyUI wrote it, not written anew.")


def tags(path: Path) -> dict[str, str]:
    """The text tags of an mp4 by their names. Raises an OpenSoraError for a file that is none."""
    with path.open("rb") as file:
        for kind, begin, end in boxes(file, 0, path.stat().st_size):
            if kind == b"moov" and end - begin <= _LARGEST:
                return dict(_tags(file, begin, end, {b"\xa9cmt": "comment"}, (b"udta", b"meta", b"ilst")))
    raise OpenSoraError(f"{path.name} is not a whole mp4; give a video that this program or ComfyUI wrote.")


def boxes(file: BinaryIO, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(kind, first byte of what it holds, first byte behind it) of the boxes between two bytes of an mp4, up to one that is not whole."""
    for _ in range(_MOST_BOXES):
        file.seek(at)
        head = file.read(max(0, min(16, end - at)))
        size, begin = int.from_bytes(head[:4], "big"), at + 8
        if size == 1:
            size, begin = int.from_bytes(head[8:], "big"), at + 16
        behind = at + size if size else end
        if not begin <= behind <= end:
            return
        yield head[4:8], begin, behind
        at = behind


def _tags(file: BinaryIO, at: int, end: int, names: dict[bytes, str], path: tuple[bytes, ...]) -> Iterator[tuple[str, str]]:
    """path: boxes in which the tags lie, each in one before it. names: of tags by the kinds of their boxes, those of the keys box added on the way."""

    def text(begin: int, behind: int) -> str:
        file.seek(begin)
        return file.read(max(0, behind - begin)).decode("utf-8", "replace")

    for kind, begin, behind in boxes(file, at, end):
        if kind == b"meta" and text(begin + 4, begin + 8) != "hdlr":
            begin += 4  # of an mp4: version and flags come first
        if kind == b"keys":
            names |= {number.to_bytes(4, "big"): text(*name) for number, (_, *name) in enumerate(boxes(file, begin + 8, behind), 1)}
        elif kind in path:
            yield from _tags(file, begin, behind, names, path[path.index(kind) + 1 :])
        elif kind in names:
            values = [text(first + 8, last) for inner, first, last in boxes(file, begin, behind) if inner == b"data"]
            yield from ((names[kind], value) for value in values[:1])


def _object(text: str) -> dict:
    """The object that a text of JSON is; an empty one for anything else."""
    try:
        return json_object(text, "")
    except CheckpointError:
        return {}


def _has(value: Any, **kinds: type) -> bool:
    """Whether something that was read is an object with values of these kinds."""
    return isinstance(value, dict) and all(type(value.get(name)) is kind for name, kind in kinds.items())
