"""A weights file as a model: strict, memory-mapped, one layout.

The module is built on the meta device and given the file's own tensors, so that an unconverted load costs
no memory beyond the pages that are read. Missing or mis-shaped tensors are an error, never a default.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, OpenSoraError
from ..family import Network
from ..ops import TorchOperations
from ..shapes import AS_RELEASED, Layout, Manifest, bare_shapes
from .detect import Identity, identify, require
from .files import Header, open_tensors, quantisation, read_network
from .formats import LayerFormat, is_note, stored_formats
from .quantised import QuantisedOperations, precision_format

logger = logging.getLogger(__name__)

# (key in a file, its tensor) -> (name in the module, tensor) of each that it becomes; none where it is not the model's.
Convert = Callable[[str, Tensor], list[tuple[str, Tensor]]]


@dataclass(frozen=True)
class Comparison:
    """A file's tensors against a manifest. `misshaped` maps a key to (found, expected)."""

    expected: int
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    misshaped: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]

    @property
    def complete(self) -> bool:
        return not self.missing and not self.misshaped

    @property
    def same(self) -> bool:
        return self.complete and not self.extra

    def whole(self, what: str, exact: bool = True) -> tuple[str, ...]:
        """What else the file holds, if all of its model is there; else a CheckpointError.

        what: "<file> is <title>". exact: whether shapes count too; a quantised weight may show half its columns.
        """
        if self.missing or (exact and self.misshaped):
            raise CheckpointError(f"{what} but not whole; {self.sentence()}. Download the file again.")
        return self.extra

    def sentence(self) -> str:
        """What differs, the first five keys each way."""
        shown = [f"{key} {list(found)}, expected {list(wanted)}" for key, (found, wanted) in self.misshaped.items()]
        groups = (("missing", self.missing), ("of another shape", shown), ("unexpected", self.extra))
        parts = [f"{len(keys)} {word} ({'; '.join(keys[:5])}{'; ...' if len(keys) > 5 else ''})" for word, keys in groups if keys]
        return f"of {self.expected} tensors: " + (", ".join(parts) or "all there")


def compare(found: Manifest, expected: Manifest, layout: Layout = AS_RELEASED) -> Comparison:
    """Compare the shapes of a file of some layout by name; it may call a tensor as the module does."""
    found = {layout.file_name(key): shape for key, shape in found.items()}
    misshaped = {key: (found[key], shape) for key, shape in expected.items() if key in found and tuple(found[key]) != tuple(shape)}
    missing = tuple(key for key in expected if key not in found)
    return Comparison(len(expected), missing, tuple(key for key in found if key not in expected), misshaped)


def load_transformer(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    slot: str = "transformer",
    precision: str | None = None,
) -> Network:
    """Read a transformer file. A file quantised in ComfyUI's fp8 or int8 format keeps its weights as they are stored.

    Args:
        path: safetensors or .pth file, in any layout that the model's row names; it is brought into the released one.
        dtype: of every weight that is not quantised; None keeps what most of the file is stored in (plain float8 becomes bfloat16).
        device: where the weights go; "cpu" leaves unconverted ones memory-mapped.
        slot: what it must fit, see detect.require: "flux" for the painter's.
        precision: fp8_e4m3fn, int8 or nf4 to quantise the large layers of a plain file as they are read, see checkpoint/quantised.py.
            int8 and nf4 are bitsandbytes'; an int8 file with precision int8 is multiplied by bitsandbytes too.

    Returns the model in inference mode, parameters without gradients. Raises a CheckpointError for a file that is damaged, incomplete, another model,
    or quantised in a way that is not read here, an OpenSoraError for a precision that the file or this machine cannot give.
    """
    header, identity = open_model(path, slot)
    formats = _formats(header, identity, precision)
    check_keys(header, identity)
    dtype = working_dtype(header, dtype)
    operations = QuantisedOperations if formats else TorchOperations
    model = identity.row.build(identity.config, operations, dtype=dtype, device="meta")
    for layer, layer_format in formats.items():
        model.get_submodule(layer).keep_in(layer_format.form)
    fill(model, header, identity.convert, device, formats)
    for layer in formats.keys() & set(identity.family.plain):
        model.get_submodule(layer).restore(dtype)
    return model


def load_vae(path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", slot: str = "vae") -> nn.Module:
    """Read a VAE file, both halves; arguments, result and errors as load_transformer's. slot: "flux_vae" for a picture autoencoder's."""
    header, identity = open_codec(path, slot)
    check_keys(header, identity)
    dtype = working_dtype(header, dtype)
    return fill(identity.row.build(identity.config, TorchOperations, dtype, "meta"), header, identity.convert, device)


def open_codec(path: str | Path, slot: str) -> tuple[Header, Identity]:
    """Does what open_model does, and refuses a quantised file."""
    header, identity = open_model(path, slot)
    if form := quantisation(header):
        raise CheckpointError(f"{header.name} is {identity.title}, quantised ({form}), which no loader reads; give the bf16 or fp32 file.")
    return header, identity


def open_decoder(path: str | Path) -> tuple[Header, Identity]:
    """What load_decoder would read, from the header alone; the identity's config is of the decoder by itself."""
    header, identity = open_codec(path, "flux_vae")
    identity = replace(identity, config=replace(identity.config, has_encoder=False))
    compare(bare_shapes(header.shapes, identity.prefix), identity.manifest()).whole(f"{header.name} is {identity.title}")
    return header, identity


def load_decoder(path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> nn.Module:
    """Read the decoder of a picture autoencoder's file; arguments, result and errors as load_transformer's."""
    header, identity = open_decoder(path)
    model = identity.row.build(identity.config, TorchOperations, working_dtype(header, dtype), "meta")
    return fill(model, header, identity.convert, device)


def fill(
    model: nn.Module, header: Header, convert: Convert, device: torch.device | str, formats: Mapping[str, LayerFormat] | None = None
) -> nn.Module:
    """Give a model that was built on meta its parameters from a file, in the dtypes it was built in, reading only those that it has.

    convert: see Convert. formats: the quantised layers of the file, by name. A layer that was made to keep its weight in that format gets it as it
    is stored, any other gets the values it stands for. Raises a CheckpointError where the file lacks one of the parameters.
    """
    wanted, formats = dict(model.named_parameters()), formats or {}  # a tensor that stands under two names is wanted once
    state: dict[str, Tensor] = {}
    with open_tensors(header) as get:
        for key, info in header.tensors.items():
            names = [name for name, _ in convert(key, torch.empty(info.shape, device="meta"))]
            if is_note(key) or wanted.keys().isdisjoint(names):
                continue
            for name, tensor in convert(key, get(key)):
                layer_format = formats.get(name.removesuffix(".weight"))
                if layer_format and name.endswith(".weight"):
                    try:
                        weight, scale = layer_format.take(tensor, get, device)
                    except OpenSoraError as error:
                        raise CheckpointError(f"{error} It is of {name} in {header.name}.") from error
                    if f"{name}_scale" in wanted:
                        state |= {name: weight, f"{name}_scale": scale}
                        continue
                    tensor = layer_format.form.dequantise(weight, scale, tuple(tensor.shape), torch.float32)
                if name in wanted:
                    state[name] = tensor.to(device=device, dtype=wanted[name].dtype)
    if missing := sorted(wanted.keys() - state.keys()):
        what = f"{header.name} lacks {len(missing)} tensors of its model ({', '.join(missing[:5])})"
        raise CheckpointError(f"{what}; download the file again.")
    model.requires_grad_(False)
    model.load_state_dict(state, strict=False, assign=True)  # that every parameter is there was just seen
    return model.train(False)


def _formats(header: Header, identity: Identity, precision: str | None) -> dict[str, LayerFormat]:
    """How the quantised layers are kept; empty if none is."""
    stored = stored_formats(header, identity.prefix)
    if stored and identity.layout.is_recut:
        raise CheckpointError(f"{header.name} is {identity.title}, quantised, and not read so in that layout; give the bf16 or fp32 file.")
    if precision is None:
        return stored
    form = precision_format(precision)
    if not stored:
        layers = identity.family.layers_to_quantise(identity.row.manifest(identity.config))
        return {layer: LayerFormat(form, False) for layer in layers}
    if other := {layer_format.form.name for layer_format in stored.values()} - {precision}:
        what = f"{header.name} is already quantised ({', '.join(sorted(other))})"
        raise OpenSoraError(f"{what}; leave out precision, or give the bf16 file for {precision}.")
    return {layer: LayerFormat(form, True, found.scale_key) for layer, found in stored.items()}


def check_precision(path: str | Path, precision: str) -> None:
    """Raise an OpenSoraError where a transformer's file cannot be read in a quantised precision. No weight is read."""
    _formats(*open_model(path, "transformer"), precision)


def working_dtype(header: Header, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype a file's weights get: the one asked for, which must be one that layers compute in, else the file's own."""
    dtype = dtype or header.compute_dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise OpenSoraError(f"dtype={dtype} is not one that the layers compute in; use float32, bfloat16 or float16.")
    return dtype


def open_model(path: str | Path, slot: str) -> tuple[Header, Identity]:
    """A file's header and what it is, which must fit the slot; errors as read_header's and require's."""
    header = read_network(path)
    return header, require(identify(header.shapes), slot, header.name)


def check_keys(header: Header, identity: Identity) -> None:
    """Raise a CheckpointError unless every tensor of the model is there; what else the file holds is named in a warning."""
    found = {key: shape for key, shape in bare_shapes(header.shapes, identity.prefix).items() if not is_note(key)}
    extra = compare(found, identity.manifest(), identity.layout).whole(f"{header.name} is {identity.title}")
    extra = [key for key in extra if identity.convert(f"{identity.prefix}{key}", torch.empty(found[key], device="meta"))]
    if not extra:
        return
    other = identify({key: found[key] for key in extra if key in found})
    if other.kind != "unknown":
        raise CheckpointError(f"{header.name} is {identity.title} mixed with {other.title} ({len(extra)} tensors); give one model.")
    logger.warning("%s holds %d tensors that its model does not use: %s", header.name, len(extra), ", ".join(extra))
