"""What a person reads when something is refused: one of our errors, under the product's name, wherever it is raised."""

import ast
from pathlib import Path

import pytest

from opensora_core import errors

ROOT = Path(__file__).resolve().parents[2]
OURS = {name for name, one in vars(errors).items() if name[0] != "_" and isinstance(one, type) and issubclass(one, errors.OpenSoraError)}
# Caught where they are raised, or what Python and torch have for the same.
MAY_RAISE = {"AssertionError", "AttributeError", "ImportError", "Image.DecompressionBombError", "OSError", "SystemExit", "ValueError",
             "torch.cuda.OutOfMemoryError"}  # fmt: skip
FILES = sorted(path for folder in ("opensora_core", "nodes") for path in (ROOT / folder).rglob("*.py"))


def raised(path: Path) -> set[str]:
    """The names of classes whose instances are raised where they are made."""
    found = (node.exc for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Raise))
    return {ast.unparse(one.func) for one in found if isinstance(one, ast.Call) and ast.unparse(one.func).split(".")[-1][0].isupper()}


@pytest.mark.parametrize("name", sorted(OURS))
def test_our_errors_read_as_the_product(name):
    one = getattr(errors, name)
    assert f"{one.__module__}.{one.__qualname__}" == f"Open-Sora.{name}"


def test_no_error_is_declared_elsewhere():
    classes = [node for path in FILES if path.name != "errors.py" for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
               if isinstance(node, ast.ClassDef)]  # fmt: skip
    assert not [one.name for one in classes if any(ast.unparse(base).endswith(("Error", "OutOfMemory", "Exception")) for base in one.bases)]


def test_nodes_raise_no_other_error_than_ours():
    assert OURS == {"OpenSoraError", "CheckpointError", "OutOfMemory", "DecodeOutOfMemory", "NotNumbers"}
    wrong = {path.relative_to(ROOT).as_posix(): extra for path in FILES if (extra := raised(path) - OURS - MAY_RAISE)}
    assert not wrong
    of_nodes = {path.name: found for path in FILES if "nodes" in path.relative_to(ROOT).parts and (found := raised(path) - OURS)}
    assert set().union(*of_nodes.values()) <= {"torch.cuda.OutOfMemoryError", "AttributeError"}, of_nodes


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("num_frames=32 is not 4k+1; use 29 or 33.", "Use 29 or 33: num_frames=32 is not 4k+1."),
        ("The header of a.bin is damaged; download the file again.", "Download the file again: the header of a.bin is damaged."),
        ("x is a folder; give a file. Inside it: a.bin.", "Give a file: x is a folder. Inside it: a.bin."),
        ("This CLIP holds Flux. Use another, or none.", "Use another, or none: this CLIP holds Flux."),
        ("a.csv, line 2: path='x' is none; name a clip.", "Name a clip. a.csv, line 2: path='x' is none."),
        ("It ran out of memory; 1 of 2 GiB are free: make less.", "Make less: It ran out of memory; 1 of 2 GiB are free."),
        ("Use 29 or 33: it holds two; use one.", "Use 29 or 33: it holds two; use one."),
        ("x is none; plans are looked for in one.", "x is none; plans are looked for in one."),
        ("a; use b.mp4 is none; give a video.", "a; use b.mp4 is none; give a video."),
        ("a='b; use c' is none; give 'd: use e'. It is short.", "Give 'd: use e'. a='b; use c' is none. It is short."),
        ("a's b is the c's; use d's.", "Use d's: a's b is the c's."),
        ("rows cannot be run:\nrow 1: it is none; use one.", "rows cannot be run:\nrow 1: it is none; use one."),
    ],
)  # fmt: skip
def test_a_sentence_begins_with_what_to_do(written, said):
    assert str(errors.OpenSoraError(written)) == said == errors.cure_first(said)


def words(node: ast.expr) -> str:
    """A text as our sources write it, with {} for what is filled in."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in parts)


def test_most_of_what_is_refused_begins_with_what_to_do():
    """The rest are refusals of a caller's own types and shapes, and sentences whose cure is filled in."""
    calls = [node.exc for path in FILES for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
             if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and ast.unparse(node.exc.func) in OURS]  # fmt: skip
    told = [call for call in calls if errors._BEGUN.match(errors.cure_first(words(call.args[0])))]
    assert len(told) > 0.75 * len(calls)
