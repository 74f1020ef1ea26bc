"""What a person reads when something is refused: one of our errors, under the product's name, wherever it is raised."""

import ast
from pathlib import Path

import pytest

from opensora_core import errors

ROOT = Path(__file__).resolve().parents[2]
OURS = {name for name, one in vars(errors).items() if name[0] != "_" and isinstance(one, type) and issubclass(one, errors.OpenSoraError)}
# Caught where they are raised, or what Python and torch have for the same; Failed is a SystemExit.
MAY_RAISE = {"AssertionError", "AttributeError", "Failed", "ImportError", "Image.DecompressionBombError", "OSError", "SystemExit", "ValueError",
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
