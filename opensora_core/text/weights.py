"""The tensors of a text encoder, from a single file or from a folder in the hub's layout."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.files import Header, open_tensors, read_header
from ..errors import CheckpointError

# In the order in which they are preferred.
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")

_FLOATS = ("F64", "F32", "F16", "BF16")
_FP8 = ("F8_E4M3", "F8_E5M2")
_SCALES = ("scale_weight", "weight_scale")  # ComfyUI's older and newer name of the factor that an fp8 weight was divided by
_QUANT_NOTES = (*_SCALES, "scale_input", "input_scale", "comfy_quant")


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


def is_quantisation_note(key: str) -> bool:
    """Whether a tensor only says how another one was quantised."""
    return key.rpartition(".")[2] in (*_QUANT_NOTES, "scaled_fp8")


def is_fp8(headers: list[Header]) -> bool:
    return any(info.dtype in _FP8 for header in headers for info in header.tensors.values())


def check_formats(headers: list[Header]) -> None:
    """Raise a CheckpointError if weights are quantised in a way other than fp8."""
    for header in headers:
        for key, info in header.tensors.items():
            if key.endswith(".weight") and info.dtype not in _FLOATS + _FP8:
                raise CheckpointError(
                    f"{key} in {header.name} is stored as {info.dtype}: of quantised text encoders only fp8 ones are read here. "
                    "Give the fp16, bf16 or fp8 file."
                )


def cast_tensors(headers: list[Header], keys: set[str], dtype_of: Callable[[str], torch.dtype], device) -> Iterator[tuple[str, Tensor]]:
    """The tensors called `keys`, one at a time, in their dtype on `device`; fp8 is multiplied by its scale where it has one."""
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
