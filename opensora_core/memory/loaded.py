"""The shared loaded-model cache: whoever names the same file with the same options gets the same weights.

A model is known by its file's path, size and modification time and by the options that change its weights. It is held
weakly: it lives exactly as long as someone uses it, so that a host's own unloading does what its users expect. Keeping
models loaded beyond that is opt-in, up to a limit, the least recently used given up first. A file that was replaced on disk is
another model: it is loaded anew, and what was kept of the old one is forgotten.

`SHARED` is the one cache of a process, `PROMPTS` the one of encoded prompts.
"""

import copy
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..checkpoint.files import Halves, network_files
from ..errors import CheckpointError, OpenSoraError
from .residency import GIB

T = TypeVar("T")

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".json")  # of a folder in the hub's layout


@dataclass(frozen=True)
class FileStamp:
    """A file or folder as it was when it was asked for. `parts`: (name, size in bytes, time of last change in ns) of every file."""

    path: str
    parts: tuple[tuple[str, int, int], ...]

    @property
    def name(self) -> str:
        return Path(self.path).name


def stamp(path: str | Path | Halves) -> FileStamp:
    """What a path is now. Links are followed; no file is opened. Raises a CheckpointError if nothing is there."""
    if isinstance(path, Halves):
        both = stamp(path.first), stamp(path.second)
        return FileStamp(" with ".join(one.path for one in both), both[0].parts + both[1].parts)
    resolved = Path(path).expanduser().resolve()
    try:
        if resolved.is_dir():
            files = sorted(file for file in resolved.iterdir() if file.suffix in _WEIGHT_SUFFIXES and file.is_file())
        else:
            files = [file.resolve() for file in network_files(Path(path).expanduser())]
        stats = [(file.name, file.stat()) for file in files]
    except OSError as error:
        raise CheckpointError(f"{path} cannot be found ({error.strerror}); check the path.") from error
    return FileStamp(str(resolved), tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))


@dataclass(frozen=True)
class Key:
    """What a loaded model is known by. `options`: sorted (name, value) of what changes its weights."""

    kind: str
    file: FileStamp
    options: tuple[tuple[str, Hashable], ...]


class Loaded(NamedTuple):
    """A line of the listing: what it is known by, bytes of its weights, and whether it is held here beyond its use elsewhere."""

    key: Key
    num_bytes: int
    is_kept: bool


def weight_bytes(network: Any) -> int:
    """Bytes of the weights of a module, or of an object whose `.model` is one; weights in one place count once."""
    module = network if isinstance(network, nn.Module) else network.model
    return sum(size for _, size in {(tensor.data_ptr(), tensor.nbytes) for tensor in (*module.parameters(), *module.buffers())})


class LoadedModels:
    """A cache of loaded models, safe to use from several threads.

    keep_limit_gib: how much may be kept loaded for calls that ask for it; 0 keeps nothing.
    """

    def __init__(self, keep_limit_gib: float = 0.0):
        self._lock = threading.RLock()
        self._models: weakref.WeakValueDictionary[Key, Any] = weakref.WeakValueDictionary()
        self._sizes: dict[Key, int] = {}  # bytes
        self._kept: OrderedDict[Key, Any] = OrderedDict()
        self._gates: weakref.WeakValueDictionary[Key, Any] = weakref.WeakValueDictionary()  # locks of keys that are being loaded
        self.keep_up_to(keep_limit_gib)

    @property
    def keep_limit_gib(self) -> float:
        """GiB that may be kept loaded."""
        return self._keep_limit / GIB

    def keep_up_to(self, gib: float, kinds: Iterable[str] = ()) -> None:
        """Set the limit; lowering it gives up the least recently used.

        What is loaded of `kinds` is kept from now on too, and given up before what was kept already.
        """
        if not gib >= 0 or gib == float("inf"):  # also NaN
            raise OpenSoraError(f"A limit of {gib} GiB for models kept loaded is not an amount of memory; use 0 (keeps none) or more.")
        wanted = frozenset(kinds)
        with self._lock:
            self._keep_limit = int(gib * GIB)
            for key, model in list(self._models.items()):
                if key.kind in wanted and key not in self._kept:
                    self._kept[key] = model
                    self._kept.move_to_end(key, last=False)
            self._trim()

    def get(
        self,
        kind: str,
        path: str | Path,
        options: Mapping[str, Hashable],
        load: Callable[[], T],
        size: Callable[[T], int] = weight_bytes,
        keep: bool = False,
    ) -> T:
        """The model that is loaded already, else load it.

        kind: "transformer", "vae", "t5", "clip" and the like: what the file is loaded as. options: whatever changes the weights: precision, dtype,
        device. load: makes the object to share: a module, or a host's patcher. It must allow weak references. Of several threads that ask at the
        same time one calls it and the others wait. If it raises, nothing is remembered.
        size: gives the bytes that the object counts for within the limit. keep: hold it within the limit when nobody else does.
        """
        key = Key(kind, stamp(path), tuple(sorted(options.items())))
        with self._lock:
            gate = self._gates.setdefault(key, threading.RLock())  # one thread at a time for a key; others' keys are not held up
        with gate:
            with self._lock:
                model = self._models.get(key)
            if model is None:
                model = load()
                # A file that changed while it was read belongs to neither stamp.
                if stamp(path) != key.file:
                    return model
            with self._lock:
                self._forget_replaced(key)
                self._models[key] = model
                self._sizes[key] = size(model)
                if keep or key in self._kept:
                    self._kept[key] = model
                    self._kept.move_to_end(key)
                    self._trim()
        return model

    def listing(self) -> list[Loaded]:
        """Everything that is loaded now."""
        with self._lock:
            return [Loaded(key, self._sizes[key], key in self._kept) for key in list(self._models)]

    def release(self) -> None:
        """Keep no longer what was kept. Whoever uses it still does."""
        with self._lock:
            self._kept.clear()

    def kept(self) -> list:
        """What is held beyond its use, the least recently used first."""
        with self._lock:
            return list(self._kept.values())

    def give_up_oldest(self) -> str | None:
        """Keep the least recently used no longer; its file's name, or None if nothing is kept."""
        with self._lock:
            return self._kept.popitem(last=False)[0].file.name if self._kept else None

    def _forget_replaced(self, key: Key) -> None:
        """Models of what this path was before: not kept, and not found again if the old file comes back."""
        for other in [*self._kept, *self._models.keys()]:
            if other.file.path == key.file.path and other.file != key.file:
                self._kept.pop(other, None)
                self._models.pop(other, None)
        for gone in self._sizes.keys() - set(self._models.keys()):
            del self._sizes[gone]

    def _trim(self) -> None:
        while sum(self._sizes[key] for key in self._kept) > self._keep_limit:
            self._kept.popitem(last=False)


class EncodedPrompts:
    """Encoded prompts, kept in memory up to a limit (by default about thirty with their negatives), the least recently used given up first."""

    def __init__(self, limit_bytes: int = GIB // 4):
        self._lock = threading.RLock()
        self._kept: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self.limit_bytes = limit_bytes

    @property
    def num_bytes(self) -> int:
        with self._lock:
            return sum(size for _, size in self._kept.values())

    def __len__(self) -> int:
        return len(self._kept)

    def get(
        self,
        texts: Sequence[Hashable],
        encoders: Iterable[str | Path],
        options: Mapping[str, Hashable],
        encode: Callable[[list], Sequence[T]],
    ) -> list[T]:
        """What these encoders made of each text before, else what `encode` gives for it. Do not write into it.

        texts: each a text, or several that are encoded together. encoders: files or folders of the encoders.
        options: what else changes the encoding (precision, dtype, device).
        encode: the texts that are not kept -> tensors for each, or lists, tuples or dictionaries of them.
        """
        made_by = tuple(stamp(path) for path in encoders), tuple(sorted(options.items()))
        values = {}
        with self._lock:
            for text in texts:
                if (text, made_by) in self._kept:
                    self._kept.move_to_end((text, made_by))
                    values[text] = self._kept[text, made_by][0]
        missing = [text for text in dict.fromkeys(texts) if text not in values]
        for text, value in zip(missing, encode(missing) if missing else (), strict=True):
            values[text] = value
            size = sum(leaf.nbytes for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
            with self._lock:
                self._kept[text, made_by] = (value, size)
                while self._kept and self.num_bytes > self.limit_bytes:
                    self._kept.popitem(last=False)
        return [values[text] for text in texts]

    def clear(self) -> None:
        with self._lock:
            self._kept.clear()


SHARED = LoadedModels()
PROMPTS = EncodedPrompts()


def own_structure(network: T) -> T:
    """A network of one's own over the same weights: moving, streaming or replacing its tensors leaves the shared one as it is.

    network: a module, or an object whose `.model` is one. Its tensors are shared, not copied; nobody may write into them. The result keeps it
    alive, and with it its entry in a cache.
    """
    if isinstance(network, nn.Module):
        mine = _twin(network, {})
    else:
        mine = copy.copy(network)
        mine.model = _twin(network.model, {})
    mine.__dict__["_shared_source"] = network  # by the dictionary: a module would take it for a part of itself
    return mine


def _twin(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    if id(module) in made:
        return made[id(module)]
    twin = made[id(module)] = type(module).__new__(type(module))
    for name, value in module.__dict__.items():
        twin.__dict__[name] = copy.copy(value) if isinstance(value, (dict, list, set)) else value
    for name, part in module._modules.items():
        twin._modules[name] = None if part is None else _twin(part, made)
    return twin
