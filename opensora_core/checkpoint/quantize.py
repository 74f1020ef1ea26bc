"""Writes a quantised transformer file in ComfyUI's own format, one tensor at a time, so that any machine can make one.

The safetensors header is known before the first weight is read, so it is written first and each tensor after it in order: no more
than one tensor is in memory. The file carries another name until it is whole.
"""

import json
import math
import os
import shutil
import statistics
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch

from ..choices import FP8
from ..errors import CheckpointError, OpenSoraError
from ..family import QUANTISED_GROUPS
from ..names import claim, complete_or_absent, sweep
from .detect import Identity
from .files import QUANTISED_NOTE, TORCH_DTYPES, Header, bytes_text, open_tensors, quantisation
from .formats import HOST_NAMES
from .load import check_keys, open_model
from .quantised import Float8, Format, Int8, relative_error

FORMATS = {form.name: form for form in (Float8, Int8)}

_MARGIN_BYTES = 64 << 20  # what a disk should have left

Progress = Callable[[int, int, str], None]


class Report(NamedTuple):
    """What was written.

    source_bytes, target_bytes: sizes of the two files. errors: of every quantised layer, in file order, the RMS of the change as a share of
    the weight's RMS (see relative_error). kept: linear layers that stayed as they were.
    """

    target: Path
    format: str
    source_bytes: int
    target_bytes: int
    errors: dict[str, float]
    kept: list[str]

    def text(self, worst: int = 5) -> str:
        """A summary of a few lines, with the layers that changed most."""
        values = self.errors.values()
        lines = [
            f"{self.target.name}: {len(values)} layers in {self.format}, {len(self.kept)} linear layers kept, "
            f"{bytes_text(self.target_bytes)} (before: {bytes_text(self.source_bytes)})",
            f"relative RMS error of the weights: median {statistics.median(values):.2%}, largest {max(values):.2%}",
        ]
        largest = sorted(self.errors, key=self.errors.get, reverse=True)[:worst]
        return "\n".join([*lines, *(f"  {self.errors[layer]:.2%}  {layer}" for layer in largest)])


class _Entry(NamedTuple):
    """A tensor of the new file.

    source: its key in the old one, None for what is made from another tensor. layer: of a weight that is quantised, its layer.
    note: what ComfyUI is to read of that layer, JSON.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    source: str | None = None
    layer: str | None = None
    note: str = ""

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * TORCH_DTYPES[self.dtype].itemsize


def quantize(
    source: str | Path, target: str | Path, format: str = FP8, groups: Iterable[str] = QUANTISED_GROUPS, progress: Progress | None = None
) -> Report:
    """Write a quantised copy of an Open-Sora 2.0 transformer file. Tensors that are not quantised are copied bit for bit.

    Args:
        source: safetensors or .pth file in bf16, fp16 or fp32, in the released layout.
        target: a .safetensors file that does not exist yet, in a folder that does.
        format: fp8_e4m3fn or int8.
        groups: which layers, see family.py; the default set is the result of benchmarks/quantise_layers.py.
        progress: called after each tensor with tensors done, tensors in all, and the tensor's name.

    Raises an OpenSoraError for an unknown format or group, a target that exists or cannot be and too little disk, a CheckpointError for a source
    that is damaged, incomplete, quantised already or another model.
    """
    groups = tuple(groups)
    if format not in FORMATS:
        raise OpenSoraError(f"format={format!r} is not one that files are written in; use one of {', '.join(FORMATS)}.")
    target = _check_target(Path(target).expanduser())
    header, identity = _check_source(source)
    known, form = identity.family.groups, FORMATS[format]()
    if not groups or set(groups) - known.keys():
        raise OpenSoraError(f"groups={', '.join(groups) or 'none'}: give some of {', '.join(known)}.")
    entries = _entries(header, identity, form, groups)
    head = _head(entries, header, groups)
    num_bytes = len(head) + sum(entry.num_bytes for entry in entries)
    free = shutil.disk_usage(target.parent).free
    if free < num_bytes + _MARGIN_BYTES:
        has = f"{target.parent} has {bytes_text(free)} left"
        raise OpenSoraError(f"The file needs {bytes_text(num_bytes)} and {has}; make room, or write elsewhere.")
    with _whole_or_absent(target) as file:
        file.write(head)
        errors = _write(file, entries, header, form, progress)
    kept = [layer for layer in identity.family.layers_to_quantise(identity.manifest(), known) if layer not in errors]
    return Report(target, format, header.num_bytes, num_bytes, errors, kept)


def _check_target(target: Path) -> Path:
    if target.is_dir():
        raise OpenSoraError(f"{target} is a folder; give the new file's name too, such as {target / 'Open_Sora_v2_8bit.safetensors'}.")
    if target.suffix != ".safetensors":
        raise OpenSoraError(f"{target.name} should end in .safetensors; use {target.with_suffix('.safetensors').name}.")
    if not target.parent.is_dir():
        raise OpenSoraError(f"There is no folder {target.parent} to write {target.name} to; make it, or give another.")
    if target.exists():
        raise OpenSoraError(f"{target} exists and is not overwritten; give another name, or delete it first.")
    return target


def _check_source(source: str | Path) -> tuple[Header, Identity]:
    header, identity = open_model(Path(source).expanduser(), "transformer")
    is_plain_fp8 = any(name.startswith("F8") for name in header.dtypes)
    if form := quantisation(header) or ("float8 without scales" if is_plain_fp8 else None):
        raise CheckpointError(f"{header.name} is already quantised ({form}); quantise the bf16 or fp32 file.")
    if identity.layout.is_recut:
        raise CheckpointError(f"{header.name} is {identity.title}; quantise the file in the released layout (q_proj, k_proj, v_proj).")
    check_keys(header, identity)
    return header, identity


def _entries(header: Header, identity: Identity, form: Format, groups: tuple[str, ...]) -> list[_Entry]:
    """The new file's tensors in the old one's order; the model's only, under the released names."""
    manifest = identity.manifest()
    layers = frozenset(identity.family.layers_to_quantise(manifest, groups))
    stored = "F8_E4M3" if form.name == FP8 else "I8"
    entries = []
    for key, info in header.tensors.items():
        name = identity.layout.file_name(key.removeprefix(identity.prefix))
        if not key.startswith(identity.prefix) or name not in manifest:
            continue
        layer = name.removesuffix(".weight")
        if layer == name or layer not in layers:
            entries.append(_Entry(name, info.dtype, info.shape, key))
            continue
        weight, scale = form.shapes(*info.shape)
        note = {"format": HOST_NAMES[form.name]}
        if identity.family.group_of(layer) not in QUANTISED_GROUPS:
            note["full_precision_matrix_mult"] = True  # no input is to be rounded: there it costs most and gains no time
        text = json.dumps(note)
        entries += [
            _Entry(name, stored, weight, key, layer, text),
            _Entry(f"{layer}.weight_scale", "F32", scale),
            _Entry(f"{layer}.comfy_quant", "U8", (len(text),)),
        ]
    return entries


def _head(entries: list[_Entry], header: Header, groups: tuple[str, ...]) -> bytes:
    """Length and JSON of a safetensors header, padded to 8 bytes as the format's writers do."""
    layers = {entry.layer: json.loads(entry.note) for entry in entries if entry.layer}
    metadata = {
        **header.metadata,
        "format": "pt",
        QUANTISED_NOTE: json.dumps({"format_version": "1.0", "layers": layers}),
        "quantised_groups": ", ".join(groups),
    }
    table, end = {"__metadata__": metadata}, 0
    for entry in entries:
        begin, end = end, end + entry.num_bytes
        table[entry.key] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": (begin, end)}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write(file: BinaryIO, entries: list[_Entry], header: Header, form: Format, progress: Progress | None) -> dict[str, float]:
    errors, beside = {}, {}
    with open_tensors(header, is_mapped=False) as read:
        for done, entry in enumerate(entries, start=1):
            if entry.source is None:
                data = beside.pop(entry.key)
            elif entry.layer is None:
                data = read(entry.source)
            else:
                weight = read(entry.source)
                try:
                    data, scale = form.quantise(weight)
                except OpenSoraError as error:
                    raise CheckpointError(f"{error} It is {entry.source} of {header.name}.") from error
                errors[entry.layer] = relative_error(weight, form, data, scale)
                note = torch.frombuffer(bytearray(entry.note, "utf-8"), dtype=torch.uint8)
                beside = {f"{entry.layer}.weight_scale": scale, f"{entry.layer}.comfy_quant": note}
                del weight
            data = data.contiguous().reshape(-1).view(torch.uint8)
            assert data.numel() == entry.num_bytes, entry
            file.write(data.numpy())
            del data
            if progress:
                progress(done, len(entries), entry.key)
    return errors


@contextmanager
def _whole_or_absent(target: Path) -> Iterator[BinaryIO]:
    """A file to write, called `target` only once it is whole and on disk; what killed runs left is swept, an exception leaves nothing."""
    try:
        sweep(target.parent)
        if (claimed := claim(target)) is None:
            raise OpenSoraError(f"{target.name} is being written by another process; give another name, or wait for it.")
        with claimed, complete_or_absent(target) as part, part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if target.exists():
                raise OpenSoraError(f"{target} appeared meanwhile and is not overwritten; give another name.")
    except OSError as error:
        raise OpenSoraError(f"{target.name} could not be written ({error.strerror or error}); write elsewhere.") from error
