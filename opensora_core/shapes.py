"""A model's tensors by name and shape, before any is read: sizes from them, and how a file's names and cuts become a module's."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]
Manifest = dict[str, tuple[int, ...]]  # every tensor of a model, by name

_LARGEST_SIZE = 1 << 20  # of one dimension; far above any model's


def bare_shapes(shapes: Shapes, prefix: str) -> Manifest:
    """The tensors under `prefix`, without it."""
    return {key[len(prefix) :]: tuple(shape) for key, shape in shapes.items() if key.startswith(prefix)}


def dim(shapes: Shapes, key: str, axis: int, default: int) -> int:
    """One dimension of a tensor, or the default where the tensor or that dimension is missing."""
    shape = shapes.get(key, ())
    return shape[axis] if axis < len(shape) else default


def size(shapes: Shapes, key: str, axis: int = 0) -> int:
    """One dimension of a tensor that must be there, and be a size of a model."""
    found = dim(shapes, key, axis, 0)
    if not 1 <= found <= _LARGEST_SIZE:
        what = f"has shape {list(shapes[key])}" if key in shapes else "is missing"
        raise CheckpointError(f"The tensor {key}, from which the model's size is read, {what}; download the file again.")
    return found


def count(shapes: Shapes, stem: str) -> int:
    """How many blocks follow `stem` ("double_blocks."): one more than the highest index; 0 where there is none.

    A gap is left for the comparison of keys to name. Raises a CheckpointError for an index that a file of so few tensors cannot have.
    """
    indices = {key[len(stem) :].split(".", 1)[0] for key in shapes if key.startswith(stem)}
    highest = max((index.zfill(20) for index in indices if index.isdecimal()), default="")
    if len(highest) > 20 or (highest and int(highest) >= len(shapes)):
        raise CheckpointError(
            f"The file holds {len(shapes)} tensors, one of which begins {stem}{highest.lstrip('0')[:20]}; download it again."
        )
    return int(highest) + 1 if highest else 0


def manifest_of(module) -> Manifest:
    """Shape of every tensor of a module, which may be on meta."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


class EqualBlocks:
    """Sizes of a network of `depth` equal blocks, with hidden_size and head_dim."""

    def with_blocks(self, most: int):
        """These sizes with at most so many blocks."""
        return replace(self, depth=min(most, self.depth))

    def words(self) -> str:
        """For people: "hidden 1152, 16 heads of 72, 28 blocks"."""
        return f"hidden {self.hidden_size}, {self.hidden_size // self.head_dim} heads of {self.head_dim}, {self.depth} blocks"


@dataclass(frozen=True)
class Layout:
    """How a file keeps what a module holds. Attributes are functions, which do nothing where the file is as the module is.

    Attributes:
        mark: a key that only files of this layout have; "" where no other layout's is there.
        words: for people, after the model's title: " in the fused Flux layout".
        file_name: a parameter's name in a file, from its name in the module; a file's name stays.
        convert: (a file's key without prefix, its tensor, config) -> (name in the module, tensor) pairs. Exact: parts are moved, never
            computed; a tensor on meta is fine.
        manifest: every tensor of a file, from every parameter of the module.
        is_recut: whether convert cuts or reorders tensors, so that quantised ones cannot be taken as they are.
    """

    mark: str = ""
    words: str = ""
    file_name: Callable[[str], str] = lambda name: name
    convert: Callable[[str, Any, Any], list[tuple[str, Any]]] = lambda key, tensor, config: [(key, tensor)]
    manifest: Callable[[Manifest], Manifest] = dict
    is_recut: bool = False


AS_RELEASED = Layout()


def renamed(pairs: Sequence[tuple[str, str]], mark: str, words: str = "", dropped: str = "no such tensor") -> Layout:
    """A layout in which only names differ. pairs: parts of keys, (a file's, the module's). dropped: how tensors begin that no module holds."""

    def module_name(key: str) -> str:
        for theirs, ours in pairs:
            key = key.replace(theirs, ours)
        return key

    def file_name(name: str) -> str:
        for theirs, ours in pairs:
            name = name.replace(ours, theirs)
        return name

    return Layout(
        mark=mark,
        words=words,
        file_name=file_name,
        convert=lambda key, tensor, config: [] if key.startswith(dropped) else [(module_name(key), tensor)],
        manifest=lambda manifest: {file_name(name): shape for name, shape in manifest.items()},
    )
