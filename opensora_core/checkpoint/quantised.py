"""Layers that keep their weights in 8 or 4 bits: the formats, and the operations namespace that computes with them.

A quantised layer holds two tensors, `weight` (bytes) and `weight_scale`, as ordinary parameters, so that
whatever moves, streams or maps the weights of a module does so with these. By default the weight is brought back to the
input's dtype when the layer is called, and given up after it.
"""

import logging
import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import choices
from ..errors import OpenSoraError
from ..ops import TorchOperations

FP8_MAX = 448.0  # largest finite float8_e4m3fn
INT8_MAX = 127.0
NF4_BLOCK = 64  # weights under one scale

_CHUNK_ELEMENTS = 1 << 20  # brought to fp32 at a time while quantising
CHUNK_ROWS = 4096  # tokens multiplied in integers at a time


class Float8:
    """float8 e4m3 under one scale for the whole weight: ComfyUI's float8_e4m3fn."""

    name = choices.FP8
    bits = 8
    dtype = torch.float8_e4m3fn
    largest = FP8_MAX
    has_row_scales = False  # else one for the whole weight

    def shapes(self, out_features: int, in_features: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of `weight` and `weight_scale`."""
        return (out_features, in_features), ((out_features, 1) if self.has_row_scales else ())

    def quantise(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """[out, in] floats, which must be finite -> int8 bytes and fp32 scale."""
        maxima = _row_maxima(weight)
        scale = _scale(maxima if self.has_row_scales else maxima.max(), self.largest)
        stored = torch.empty(weight.shape, dtype=self.dtype, device=weight.device)
        for chunk, target, divisor in _chunks(weight, stored, scale.expand(len(weight), 1)):
            values = chunk.float() / divisor
            values = values if self.dtype.is_floating_point else values.round_()
            target.copy_(values.clamp_(-self.largest, self.largest))
        return stored.view(torch.int8), scale

    def dequantise(self, weight: Tensor, scale: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """What `quantise` made, as [out, in] of `dtype`."""
        return weight.view(self.dtype).to(dtype).mul_(scale.to(dtype))

    def linear(self, x: Tensor, layer: "QuantisedOperations.Linear") -> Tensor:
        """[..., in] -> [..., out], in the dtype of x."""
        weight = self.dequantise(layer.weight, layer.weight_scale, (layer.out_features, layer.in_features), x.dtype)
        return F.linear(x, weight, layer.bias)


class Float8E5M2(Float8):
    """float8 e5m2, a wider range and half the precision: read where a file has it, never chosen."""

    name, dtype, largest = "fp8_e5m2", torch.float8_e5m2, 57344.0


class Int8(Float8):
    """int8, symmetric, one scale for each output: ComfyUI's int8_tensorwise with a column of scales."""

    name, dtype, largest, has_row_scales = choices.INT8, torch.int8, INT8_MAX, True


class Int8Matmul(Int8):
    """The weights of Int8, multiplied as integers by bitsandbytes: every token is rounded to 8 bits under its own scale."""

    def __init__(self, functional=None):
        self._functional = functional or bitsandbytes_functional(self.name)

    def linear(self, x: Tensor, layer: "QuantisedOperations.Linear") -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = torch.empty(len(rows), layer.out_features, dtype=x.dtype, device=x.device)
        weight_scale = layer.weight_scale.reshape(1, -1)
        for chunk, target in zip(rows.split(CHUNK_ROWS), out.split(CHUNK_ROWS), strict=True):
            scale = (chunk.abs().amax(dim=-1, keepdim=True).float() / INT8_MAX).clamp_min_(torch.finfo(torch.float32).tiny)
            integers = (chunk.float() / scale).round_().to(torch.int8)
            products = self._functional.int8_linear_matmul(integers, layer.weight).float()
            products.mul_(scale).mul_(weight_scale)
            target.copy_(products if layer.bias is None else products.add_(layer.bias))
        return out.reshape(*x.shape[:-1], layer.out_features)


class NF4(Float8):
    """Four-bit normal floats of bitsandbytes, one fp32 scale for 64 weights. Methods as Float8's."""

    name = choices.NF4
    bits = 4

    def __init__(self, functional=None):
        self._functional = functional or bitsandbytes_functional(self.name)

    def shapes(self, out_features: int, in_features: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        elements = out_features * in_features
        return (-(-elements // 2), 1), (-(-elements // NF4_BLOCK),)

    def quantise(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        _row_maxima(weight)  # refuses what is not finite
        stored, state = self._functional.quantize_4bit(
            weight.contiguous(), blocksize=NF4_BLOCK, quant_type="nf4", compress_statistics=False
        )
        return stored.view(torch.int8), state.absmax.float()

    def dequantise(self, weight: Tensor, scale: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        # As one row: on a CPU, rows of no whole number of blocks come out wrong (bitsandbytes 0.50).
        state = self._functional.QuantState(scale, torch.Size((1, math.prod(shape))), None, NF4_BLOCK, "nf4", dtype)
        return self._functional.dequantize_4bit(weight.view(torch.uint8), state).view(shape)


Format = Float8  # what every format offers
FORMS = {form.name: form for form in (Float8, Int8Matmul, NF4)}


def precision_format(precision: str) -> Format:
    """The format that a quantised precision keeps weights in. Raises an OpenSoraError for another one, and where bitsandbytes is needed and missing."""
    if precision not in FORMS:
        raise OpenSoraError(f"precision={precision!r} is not a quantised one; use one of {', '.join(FORMS)}.")
    return FORMS[precision]()


def bitsandbytes_functional(precision: str):
    """The module bitsandbytes.functional. Raises an OpenSoraError if it is not installed, or does not work here."""
    try:
        with _nothing_fetched():
            import bitsandbytes.functional
    except (ImportError, OSError, RuntimeError) as error:  # a build for another CUDA fails while loading its library
        what = f"precision {precision!r} computes with the bitsandbytes library, which cannot be loaded here ({error})"
        cure = "install the library (pip install bitsandbytes), or use fp8_e4m3fn, bf16 or fp32, which do without it"
        raise OpenSoraError(f"{what}; {cure}.") from error
    return bitsandbytes.functional


@contextmanager
def _nothing_fetched() -> Iterator[None]:
    """Let bitsandbytes be imported without the package `kernels`, through which it would download code for some processors."""
    package, logger = sys.modules.get("kernels"), logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    sys.modules["kernels"] = None
    logger.setLevel(logging.ERROR)  # it recommends installing that package
    try:
        yield
    finally:
        logger.setLevel(level)
        del sys.modules["kernels"]
        if package is not None:
            sys.modules["kernels"] = package


class Adapter(nn.Module):
    """A low-rank change of a quantised layer, added to its output: up @ down @ x. down: [rank, in]. up: [out, rank], with every factor in it."""

    def __init__(self, down: Tensor, up: Tensor):
        super().__init__()
        self.down = nn.Parameter(down, requires_grad=False)
        self.up = nn.Parameter(up, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))


class QuantisedOperations(TorchOperations):
    """Plain torch layers, of which the linear ones can keep their weight in a quantised format."""

    class Linear(TorchOperations.Linear):
        form: Format | None = None  # None: a plain linear layer

        def keep_in(self, form: Format) -> None:
            """Make room for a weight in a format, on the layer's device; its values are to be loaded after."""
            weight, scale = form.shapes(self.out_features, self.in_features)
            device = self.weight.device
            self.hold(form, torch.empty(weight, dtype=torch.int8, device=device), torch.empty(scale, device=device))

        def hold(self, form: Format, weight: Tensor, scale: Tensor) -> None:
            """Take a weight and scale that `form` made."""
            self.form = form
            # Bytes rather than float8: `.to(dtype)` of a module, and transformers' T5, change floats and leave integers.
            self.weight = nn.Parameter(weight.view(torch.int8), requires_grad=False)
            self.weight_scale = nn.Parameter(scale, requires_grad=False)
            self.adapters = nn.ModuleList()

        def restore(self, dtype: torch.dtype) -> None:
            """Become a plain linear layer again, of the values that the format left."""
            self.weight = nn.Parameter(self.dequantised(dtype), requires_grad=False)
            self.form = None
            del self.weight_scale, self.adapters

        def dequantised(self, dtype: torch.dtype = torch.float32) -> Tensor:
            """The weight [out, in] without adapters."""
            if self.form is None:
                return self.weight.to(dtype)
            return self.form.dequantise(self.weight, self.weight_scale, (self.out_features, self.in_features), dtype)

        def forward(self, x: Tensor) -> Tensor:
            if self.form is None:
                return super().forward(x)
            out = self.form.linear(x, self)
            for adapter in self.adapters:
                out = out + adapter(x)
            return out


def is_quantised(module: nn.Module) -> bool:
    """Whether a layer keeps its weight in one of these formats."""
    return isinstance(module, QuantisedOperations.Linear) and module.form is not None


def replace_linears(model: nn.Module, names: Iterable[str]) -> None:
    """Put QuantisedOperations.Linear in the place of some nn.Linear of a model made elsewhere, sharing their parameters."""
    for name in names:
        old = model.get_submodule(name)
        new = QuantisedOperations.Linear(old.in_features, old.out_features, old.bias is not None, device="meta")
        new.weight, new.bias = old.weight, old.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)


def relative_error(weight: Tensor, form: Format, stored: Tensor, scale: Tensor) -> float:
    """RMS of what a format changed, as a share of the weight's RMS. For inputs that are white noise this is the error of the layer's output too."""
    changed, total, fp32 = 0.0, 0.0, torch.float32
    if form.bits == 4:  # packed weights have no rows
        restored = _chunks(weight, form.dequantise(stored, scale, tuple(weight.shape), fp32))
    else:
        rows = _chunks(weight, stored, scale.expand(len(weight), 1))
        restored = ((chunk, form.dequantise(part, own, tuple(chunk.shape), fp32)) for chunk, part, own in rows)
    for chunk, part in restored:
        chunk = chunk.float()
        total += chunk.square().sum(dtype=torch.float64).item()
        changed += (part - chunk).square_().sum(dtype=torch.float64).item()
    return math.sqrt(changed / total) if total else 0.0


def _chunks(weight: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of each, so many at a time that the fp32 form of a weight never exists whole."""
    rows = max(1, _CHUNK_ELEMENTS // weight.shape[1])
    return zip(*(one.split(rows) for one in (weight, *others)), strict=True)


def _row_maxima(weight: Tensor) -> Tensor:
    """[out, 1] largest magnitude of each row, fp32."""
    maxima = torch.cat([chunk.abs().amax(dim=1, keepdim=True).float() for (chunk,) in _chunks(weight)])
    if not torch.isfinite(maxima).all():
        raise OpenSoraError("The weight holds values that are not finite numbers; download its file again.")
    return maxima


def _scale(maxima: Tensor, largest: float) -> Tensor:
    """maxima / largest, rounded up to a bfloat16, so that multiplying by it in bf16 is as exact as in fp32. Zero becomes one."""
    exact = maxima / largest
    rounded = exact.to(torch.bfloat16)
    above = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
    scale = torch.where(rounded.float() < exact, above, rounded).float()
    return torch.where(maxima > 0, scale, torch.ones_like(scale))
