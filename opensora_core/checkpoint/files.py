"""Weight files on disk: what they hold without loading it, tensors one at a time, and what is wrong with them.

Reads safetensors and torch's own .pth and .bin (weights only). What a file is, is read from its first
bytes, not from its suffix.
"""

import difflib
import json
import math
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from ..names import shown
from ..readers import json_object, kind_of, read_json

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
SAFE_TORCH = (2, 10)  # up to 2.5 weights_only ran code (CVE-2025-32434), up to 2.9 it could be made to (CVE-2026-24747)
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")

_MOST_SHARDS = 1000
QUANTISED_NOTE = "_quantization_metadata"  # in a header: which layers are quantised, and how
_SHOWN = 200  # characters of what a library says, in a sentence
TORCH_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
TORCH_DTYPES = {name: dtype for dtype, name in TORCH_NAMES.items()}

# A network's file in its folder on the hub, in the order in which they are preferred; its shards have an index beside them.
_WHOLE = ("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.bin")
_INDEX = ".index.json"
SHARD = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})(\.\w+)")  # model-00001-of-00002.safetensors

_NOT_WEIGHTS = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the weights; fetch the file itself (git lfs pull, or download the file again)"),
    (b"<", "is a web page, not weights, such as a log-in or error page; download the file again"),
    (b"GGUF", "is a GGUF file, which ComfyUI's GGUF loaders read and this library does not; give the safetensors file"),
    (b"{", "is JSON text (a configuration or an index), not weights; give the weights file beside it"),
    (b"\0\0\0\0\0\0\0\0", "begins with zero bytes, as a download that did not finish; download the file again"),
)


def bytes_text(num_bytes: int) -> str:
    """23_783_000_000 -> "23.78 GB": decimal units, as download pages have them."""
    unit, name = next(((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB")) if num_bytes >= unit), (1e3, "kB"))
    return f"{num_bytes / unit:.2f} {name}"


class TensorInfo(NamedTuple):
    """Shape and dtype of a stored tensor, dtype in safetensors' words ("BF16"); `end` is where its bytes end in that format."""

    shape: tuple[int, ...]
    dtype: str
    end: int = 0

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What a weights file says about itself, without its data.

    format: "safetensors" or "torch". tensors: by key, in file order. metadata: the safetensors header's own strings; empty for torch files.
    num_bytes: size of the file. parts: of a network in several files, the header of each; the other attributes are then those of all together.
    """

    path: Path
    format: str
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str] = field(default_factory=dict)
    num_bytes: int = 0
    parts: tuple["Header", ...] = ()

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: info.shape for key, info in self.tensors.items()}

    @property
    def num_parameters(self) -> int:
        return sum(info.num_elements for info in self.tensors.values())

    @property
    def dtypes(self) -> dict[str, int]:
        """Stored elements by dtype, most first."""
        counts: Counter[str] = Counter()
        for info in self.tensors.values():
            counts[info.dtype] += info.num_elements
        return dict(counts.most_common())

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype to run in as stored: that of most elements; float8 has no arithmetic and becomes bfloat16."""
        name = next((name for name in self.dtypes if name in ("F64", "F32", "F16", "BF16") or name.startswith("F8")), "F32")
        return torch.bfloat16 if name.startswith("F8") else TORCH_DTYPES[name]


def read_header(path: str | Path) -> Header:
    """Names, shapes, dtypes and metadata of a weights file; its data is not read.

    Raises a CheckpointError for what is missing, a directory, empty, truncated, damaged or not weights at all.
    """
    path = Path(path)
    _check_exists(path)
    num_bytes = path.stat().st_size
    if num_bytes == 0:
        raise CheckpointError(f"{path.name} is empty (0 bytes), its download did not finish; download the file again.")
    with path.open("rb") as file:
        start = file.read(64)
    if start[8:9] != b"{":
        # Bytes 0-7 of a safetensors file are a length and may look like anything; byte 8 decides.
        for magic, sentence in _NOT_WEIGHTS:
            if start.lstrip().startswith(magic):
                raise CheckpointError(f"{path.name} {sentence}.")
        if start.startswith((b"PK\x03\x04", b"\x80\x02")):
            tensors = {key: value for key, value in _torch_state(path).items() if isinstance(value, Tensor)}
            tensors = {key: TensorInfo(tuple(one.shape), TORCH_NAMES.get(one.dtype, str(one.dtype))) for key, one in tensors.items()}
            return Header(path, "torch", tensors, {}, num_bytes)
    return _safetensors_header(path, num_bytes)


@dataclass(frozen=True)
class Halves:
    """The paths of a network's two halves, where one is expected."""

    first: Path
    second: Path

    @property
    def name(self) -> str:
        return f"{self.first.name} with {self.second.name}"

    def exists(self) -> bool:
        return self.first.exists() and self.second.exists()

    def is_file(self) -> bool:
        return False

    def __str__(self) -> str:
        return f"{self.first} with {self.second}"


def read_network(path: "str | Path | Halves") -> Header:
    """The header of a network: of its file, or of its shards or halves read as one file.

    path: a file; or of a network in several files their folder, their index (.index.json) or any one of them.
    """
    path = path if isinstance(path, Halves) else Path(path).expanduser()
    files = network_files(path)
    return as_one(path, [read_header(file) for file in files])


def network_files(path: str | Path | Halves) -> list[Path]:
    """The files of a network, arguments and errors as read_network's; a path that is none stays, for read_header to say what it is."""
    if isinstance(path, Halves):
        return [*network_files(path.first), *network_files(path.second)]
    path = Path(path)
    if not path.is_dir():
        if path.name.endswith(_INDEX) and path.is_file():
            return _shards(path)
        return _beside(path)
    for name in _WHOLE:
        if (path / name).is_file():
            return [path / name]
        if (index := path / f"{name}{_INDEX}").is_file():
            return _shards(index)
    indexes, weights = list(path.glob(f"*{_INDEX}")), find_weights(path)
    if len(indexes) == 1:
        return _shards(indexes[0])
    if len({SHARD.sub(r"\1\3\4", file.name) for file in weights}) == 1:
        return _beside(weights[0])
    inside = ", ".join(file.name for file in weights[:5]) or "no weights file"
    raise CheckpointError(f"{path} holds no weights; give {' or '.join(_WHOLE)}, whole or in shards. Inside it: {inside}.")


def _beside(path: Path) -> list[Path]:
    """A file, or all the shards where it is one of several."""
    match = SHARD.fullmatch(path.name)
    if match is None or not path.is_file() or int(match[3]) < 2:
        return [path]
    stem, number, total, suffix = match.groups()
    if (index := path.with_name(f"{stem}{suffix}{_INDEX}")).is_file():
        return _shards(index)
    if not 1 <= int(number) <= int(total) <= _MOST_SHARDS:
        raise CheckpointError(f"{path.name} cannot be part {int(number)} of {int(total)}; check its name.")
    files = [path.with_name(f"{stem}-{part:05d}-of-{total}{suffix}") for part in range(1, int(total) + 1)]
    if missing := [file.name for file in files if not file.is_file()]:
        lacking = f"and {len(missing)} of the others are not beside it, the first is {missing[0]}"
        raise CheckpointError(f"{path.name} is part {int(number)} of {int(total)}, {lacking}; download them too.")
    return files


def as_one(path: Path, parts: list[Header]) -> Header:
    """The headers of a network's files as one header, called as `path` is; a single one stays as it is."""
    if len(parts) == 1:
        return parts[0]
    tensors = {key: info for part in parts for key, info in part.tensors.items()}
    metadata = merged_metadata([part.metadata for part in parts], path.name)
    return Header(path, parts[0].format, tensors, metadata, sum(part.num_bytes for part in parts), tuple(parts))


def merged_metadata(parts: Sequence[Mapping[str, str] | None], name: str) -> dict[str, str]:
    """What the headers of a network's files say, together: of each key what the first says, of quantised layers what each says of its own.

    name: of the network, for the CheckpointError of a file that says in an unreadable way how its layers are quantised.
    """
    found = {key: text for part in reversed(parts) if part for key, text in part.items()}
    if notes := [json_object(part[QUANTISED_NOTE], name) for part in parts if part and QUANTISED_NOTE in part]:
        if not all(isinstance(note.get("layers"), dict) for note in notes):
            raise CheckpointError(f"The header of {name} says in an unreadable way how it is quantised; download the file again.")
        layers = {layer: form for note in notes for layer, form in note["layers"].items()}
        found[QUANTISED_NOTE] = json.dumps(notes[0] | {"layers": layers})
    return found


@contextmanager
def open_tensors(header: Header, is_mapped: bool = True) -> Iterator[Callable[[str], Tensor]]:
    """Give a function from key to tensor over all files of a network. Tensors are memory-mapped: nothing is read before it is used.

    is_mapped: False reads safetensors plainly and leaves nothing of a file in this process, of whose memory a map's pages would be part.
    """
    getters: dict[str, Callable[[str], Tensor]] = {}
    with ExitStack() as stack:
        for part in header.parts or (header,):
            if is_mapped or part.format == "torch":
                get = stack.enter_context(_mapped(part))
            else:
                get = partial(_read, stack.enter_context(part.path.open("rb")), part)
            getters |= dict.fromkeys(part.tensors, get)
        yield lambda key: getters[key](key)


@contextmanager
def _mapped(header: Header) -> Iterator[Callable[[str], Tensor]]:
    if header.format == "torch":
        yield _torch_state(header.path).__getitem__
        return
    try:
        with safe_open(header.path, framework="pt", device="cpu") as file:
            yield file.get_tensor
    except SafetensorError as error:
        why = str(error)[:_SHOWN]
        raise CheckpointError(f"{header.name} could not be read as safetensors ({why}); download the file again.") from error


def _read(file: BinaryIO, header: Header, key: str, is_last_row: bool = False) -> Tensor:
    """A tensor of safetensors, or its last slice along axis 0."""
    info = header.tensors[key]
    shape, dtype = info.shape[1:] if is_last_row else info.shape, TORCH_DTYPES[info.dtype]
    data = bytearray(math.prod(shape) * dtype.itemsize)
    file.seek(info.end - len(data))
    if file.readinto(data) < len(data):
        raise CheckpointError(f"{header.name} became shorter while it was read; download the file again.")
    return torch.frombuffer(data, dtype=dtype).reshape(shape)


def last_rows(header: Header, keys: list[str]) -> Iterator[tuple[str, Tensor]]:
    """The last slice along axis 0 of some stored tensors of known dtype, flat, reading nothing else of them."""
    for part in header.parts or (header,):
        own = [key for key in keys if key in part.tensors]
        if part.format == "torch":
            state = _torch_state(part.path)
            yield from ((key, state[key][-1].flatten()) for key in own)
            continue
        # Plain reads: touching a map makes the system read megabytes ahead of every tensor.
        with part.path.open("rb") as file:
            yield from ((key, _read(file, part, key, is_last_row=True).flatten()) for key in own)


def quantisation(header: Header) -> str | None:
    """Name of the quantised format of a file, or None for plain numbers (plain float8 included)."""
    if QUANTISED_NOTE in header.metadata:
        with suppress(ValueError, KeyError, TypeError, AttributeError):
            layers = json_object(header.metadata[QUANTISED_NOTE], "The note")["layers"].values()
            if formats := {str(layer.get("format")) for layer in layers}:
                return f"ComfyUI quantised layers ({', '.join(sorted(formats))})"
        return "ComfyUI quantised layers"
    for key in header.tensors:
        if key.endswith(".comfy_quant"):
            return "ComfyUI quantised layers"
        if key.endswith("scaled_fp8") or key.endswith(".scale_weight"):
            return "scaled float8"
        if key.endswith(".weight_scale"):
            return "quantised layers with weight_scale"
        if ".quant_state." in key or key.endswith((".absmax", ".SCB")):
            return "bitsandbytes"
        if key.endswith((".qweight", ".qzeros", ".wscales")):
            return "GPTQ, AWQ or SVDQuant"
    if any(key.endswith(".weight") and info.dtype in ("I8", "U8", "F4") for key, info in header.tensors.items()):
        return "integer weights without scales"
    return None


def find_weights(folder: Path) -> list[Path]:
    """Weight files directly inside a folder, by name."""
    return sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES and path.is_file())


def _check_exists(path: Path) -> None:
    if path.is_dir():
        inside = ", ".join(file.name for file in find_weights(path)) or "no weights file"
        raise CheckpointError(f"{shown(path)} is a folder; give a file. Inside it: {inside}.")
    if path.is_file():
        return
    if kind := kind_of(path):
        raise CheckpointError(f"{shown(path)} is {kind}; give a file.")
    beside = [file.name for file in find_weights(path.parent)] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.5)
    raise CheckpointError(f"Check the path: {shown(path)} does not exist." + (f" Did you mean {near[0]}?" if near else ""))


def _shards(index: Path) -> list[Path]:
    """The files that an index names, which lie beside it."""
    table = read_json(index).get("weight_map")
    names = sorted(set(table.values())) if isinstance(table, dict) and all(isinstance(name, str) for name in table.values()) else []
    if not names or any(Path(name).name != name or "\0" in name or "\\" in name for name in names):
        raise CheckpointError(f"The index {index.name} has no weight_map that names files beside it; download the file again.")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        lacking = f"lacks {len(missing)} of its {len(names)} weight files, the first: {missing[0]}"
        raise CheckpointError(f"{index.parent} {lacking}; download them too.")
    return [index.parent / name for name in names]


def _safetensors_header(path: Path, num_bytes: int) -> Header:
    with path.open("rb") as file:
        data = 8 + int.from_bytes(file.read(8), "little")  # where tensors begin
        if data > 8 + MAX_HEADER_BYTES or file.read(1) != b"{":
            raise CheckpointError(f"{path.name} is neither a safetensors nor a torch file; download the file again, or give another.")
        if data > num_bytes:
            raise CheckpointError(f"{path.name} is truncated inside its header ({num_bytes:,} bytes); download the file again.")
        file.seek(8)
        text = file.read(data - 8)
    try:
        entries = json.loads(text)
        metadata = {str(key): str(value) for key, value in (entries.pop("__metadata__", None) or {}).items()}
        tensors, spans = {}, {}
        for key, entry in entries.items():
            shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
            if any(type(number) is not int for number in (*shape, begin, end)):
                raise ValueError(f"{key} is not placed by whole numbers")
            tensors[key], spans[key] = TensorInfo(shape, str(entry["dtype"]), data + end), end - begin
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"The header of {path.name} is damaged; download the file again.") from error
    for key, info in tensors.items():
        dtype = TORCH_DTYPES.get(info.dtype)
        if dtype and spans[key] != info.num_elements * dtype.itemsize:
            what = f"{key} ({info.dtype} {list(info.shape)})"
            raise CheckpointError(f"The header of {path.name} contradicts itself at {what}; download the file again.")
    expected = max((info.end for info in tensors.values()), default=data)
    if num_bytes < expected:
        missing = f"{expected - num_bytes:,} of {expected:,} bytes are missing"
        raise CheckpointError(f"{path.name} is truncated: {missing}; download the file again.")
    if num_bytes > expected:
        raise CheckpointError(f"{path.name} has {num_bytes - expected:,} bytes more than its header describes; download the file again.")
    try:
        # Maps the file without promising memory for it; refuses gaps, overlaps and whatever else the format forbids.
        with safe_open(path, framework="numpy"):
            return Header(path, "safetensors", tensors, metadata, num_bytes)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"The header of {path.name} is damaged ({str(error)[:_SHOWN]}); download the file again.") from error


def _torch_state(path: Path) -> dict[str, Any]:
    """The named tensors of a torch file, and what else it names."""
    if tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) < SAFE_TORCH:
        needed = f"read with torch {'.'.join(map(str, SAFE_TORCH))} or newer, and this is {torch.__version__}"
        what = f"{path.name} is a torch file, in which code can hide; it is {needed}"
        raise CheckpointError(f"{what}. Update torch, or give the model as safetensors.")
    try:
        # torch's format before 1.6, no zip file, cannot be mapped.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch.load documents no exception types; each of them means the same to a person
        what = "cannot be read as a torch weights file, it is damaged or holds more than tensors"
        raise CheckpointError(f"{path.name} {what}; give the model as safetensors.") from error
    # Training tools wrap the weights: {"ema": ...}, {"state_dict": ...}; each is looked into once, since one may hold itself.
    seen: set[int] = set()
    while isinstance(state, dict) and id(state) not in seen and not any(isinstance(value, Tensor) for value in state.values()):
        seen.add(id(state))
        state = next((state[key] for key in ("ema", "state_dict", "model", "module") if isinstance(state.get(key), dict)), None)
    if not isinstance(state, dict) or not any(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
        raise CheckpointError(f"{path.name} is a torch file without named tensors; give a file of weights.")
    return {key: value for key, value in state.items() if isinstance(key, str)}
