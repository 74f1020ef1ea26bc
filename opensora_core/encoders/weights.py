"""The tensors of a text encoder, from a single file or from a folder in the hub's layout."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.files import Header, open_tensors, read_header
from ..checkpoint.formats import LayerFormat, stored_formats
from ..checkpoint.quantised import Float8, precision_format
from ..errors import CheckpointError

# In the order in which they are preferred.
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")

_FLOATS = ("F64", "F32", "F16", "BF16")
_FP8 = ("F8_E4M3", "F8_E5M2")
_SCALES = ("scale_weight", "weight_scale")  # ComfyUI's older and newer name of the factor that an fp8 weight was divided by


def read_headers(path: Path) -> list[Header]:
    """The header of a file, or of each shard of a hub folder; no weights are read.

    Raises:
        CheckpointError: nothing there, a shard is missing, or a file is damaged.
    """
    if not path.is_dir():
        return [read_header(path)]
    for whole, index in zip(_WHOLE, _INDEXES, strict=True):
        if (path / whole).is_file():
            return [read_header(path / whole)]
        if (path / index).is_file():
            return [read_header(file) for file in _shards(path / index)]
    raise CheckpointError(f"{path} holds no weights; {' or '.join(_WHOLE)} is expected, whole or in shards with their index.")


def check_formats(headers: list[Header]) -> None:
    """Raise a CheckpointError if weights are quantised in a way other than fp8 or ComfyUI's int8."""
    for header in headers:
        for key, info in header.tensors.items():
            is_int8 = info.dtype == "I8" and _scale_of(key, header)
            if key.endswith(".weight") and not is_int8 and info.dtype not in _FLOATS + _FP8:
                raise CheckpointError(
                    f"{key} in {header.name} is stored as {info.dtype}: of quantised text encoders only fp8 ones and ComfyUI's int8 ones "
                    "are read here. Give the fp16, bf16, fp8 or int8 file."
                )


def layer_formats(headers: list[Header], keys: Iterable[str], precision: str | None) -> dict[str, LayerFormat]:
    """How the weights of linear layers are kept, by key; those that are absent are cast to the compute dtype.

    Args:
        keys: in the files, of the linear layers' weights.
        precision: fp8_e4m3fn, int8 or nf4 for weights that are not stored in 8 bits already; None leaves those plain.

    Raises:
        CheckpointError: a quantised layer that cannot be read. OpenSoraError: bitsandbytes is needed and missing.
    """
    form = precision and precision_format(precision)
    formats: dict[str, LayerFormat] = {}
    for header in headers:
        stored = stored_formats(header)
        for key in header.tensors.keys() & set(keys):
            is_plain_fp8 = header.tensors[key].dtype == "F8_E4M3"
            found = stored.get(key.removesuffix(".weight")) or (LayerFormat(Float8(), True) if is_plain_fp8 else None)
            if found or form:
                formats[key] = found or LayerFormat(form, False)
    return formats


def kept_tensors(headers: list[Header], formats: dict[str, LayerFormat], device) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(key, bytes, scale) of the weights that are kept in a quantised format, one at a time, on `device`."""
    for header in headers:
        with open_tensors(header) as get:
            for key in header.tensors:
                if key in formats:
                    yield key, *formats[key].take(get(key), get, device)


def cast_tensors(headers: list[Header], keys: set[str], dtype_of: Callable[[str], torch.dtype], device) -> Iterator[tuple[str, Tensor]]:
    """The tensors called `keys`, one at a time, in their dtype on `device`; 8 bits are multiplied by their scale where they have one."""
    for header in headers:
        with open_tensors(header) as get:
            for key in header.tensors:
                if key not in keys:
                    continue
                tensor, scale = get(key), _scale_of(key, header)
                if scale is not None:
                    tensor = tensor.to(device, torch.float32) * get(scale).to(device, torch.float32)
                yield key, tensor.to(device, dtype_of(key))


def _scale_of(key: str, header: Header) -> str | None:
    layer, _, leaf = key.rpartition(".")
    names = (f"{layer}.{suffix}" for suffix in _SCALES)
    return next((name for name in names if leaf == "weight" and name in header.tensors), None)


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"The index {index} cannot be read: {error}") from error
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"{index.parent} lacks {len(missing)} of its {len(names)} weight files, the first: {missing[0]}.")
    return [index.parent / name for name in names]
