"""Bytes that each network of a model needs: its weights, block by block, and the peak of running it.

Weights come from a file's header, or from a module built on the meta device where there is no file. Peaks come from the real
modules, run on the meta device under an allocation counter (count.py), so that they follow the code.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.detect import Identity
from ..checkpoint.files import Header
from ..checkpoint.formats import stored_formats
from ..checkpoint.load import open_model
from ..checkpoint.quantised import CHUNK_ROWS, NF4, Float8, Int8Matmul, QuantisedOperations
from ..choices import BF16, FP8, FP32, INT8, QUANTISED, dtype_word, torch_dtype
from ..codecs.codec import CodecConfig, Encoded
from ..codecs.tiling import largest_tile, tiled_decode, tiled_encode
from ..encoders.clip import CLIPSizes, clip_network, open_clip
from ..encoders.t5 import T5Sizes, keep_layers_in, open_t5, quantised_layers, t5_network
from ..encoders.tokens import find_tokenizer, text_length
from ..errors import CheckpointError
from ..families.table import DEFAULT, codec_for, codec_of, family_of, usual_codec
from ..family import QUANTISED_GROUPS, Network, NetworkSizes
from ..geometry import Tiling
from ..sampling.given import image_condition
from ..sampling.guidance import Guidance
from ..sampling.run import Conditions, TextCondition, sample
from ..shapes import manifest_of
from ..text.prompt import T5_LENGTH
from ..text.recipe import CLIP, T5
from .count import AllocationCounter
from .decode import codec_on_meta, counted_peak
from .residency import UnitBytes
from .stream import module_bytes

# What a weights file's main dtype is called here.
_STORED = {"F32": FP32, "BF16": BF16, "F16": "fp16", "F8_E4M3": FP8, "I8": INT8}
_TEXTS = 2  # prompt and negative prompt are encoded together
_FEW_BLOCKS = 2  # of each kind: every block after the second needs what the second does
_LINEAR_FROM = 2  # of the longest chunks that a layer takes of a sequence


class _Shapes:
    """Stands in for bitsandbytes where only shapes matter, so that its precisions can be planned without it."""

    class QuantState:
        def __init__(self, absmax, shape, code, blocksize, quant_type, dtype):
            self.shape, self.dtype = shape, dtype

    @staticmethod
    def int8_linear_matmul(left: Tensor, right: Tensor) -> Tensor:
        return left.new_empty(left.shape[0], right.shape[0], dtype=torch.int32)

    @staticmethod
    def dequantize_4bit(weight: Tensor, state: QuantState) -> Tensor:
        return weight.new_empty(state.shape, dtype=state.dtype)


_FORMS = {form.name: form for form in (Float8(), Int8Matmul(_Shapes), NF4(_Shapes))}


@dataclass(frozen=True)
class Weights:
    """Weights of a network as it runs: bytes block by block.

    is_mapped: whether they are the file's own bytes, which are mapped and take no memory that cannot be given back.
    """

    sizes: UnitBytes
    is_mapped: bool = True


@dataclass(frozen=True)
class TextSizes:
    """Sizes of both text encoders as the tensors say them (clip None where a model reads none), and tokens of a text that T5 reads."""

    t5: T5Sizes = T5Sizes()
    clip: CLIPSizes | None = CLIPSizes()
    length: int = T5_LENGTH


@dataclass(frozen=True)
class ModelSizes:
    """A model to plan for; the defaults are the released files.

    stored: what most of the transformer's file is stored in: fp32, bf16, fp16, or a quantised precision. stored_text: likewise for T5.
    groups: which layers of the transformer are quantised where it is, see family.py. name: for people.
    """

    transformer: NetworkSizes = DEFAULT.released
    vae: CodecConfig = usual_codec(DEFAULT.released)
    text: TextSizes = TextSizes()
    stored: str = BF16
    stored_text: str = BF16
    groups: tuple[str, ...] = QUANTISED_GROUPS
    name: str = "Open-Sora 2.0 (released sizes)"


def sizes_of_files(
    dit: str | Path | None = None, vae: str | Path | None = None, t5: str | Path | None = None, clip: str | Path | None = None
) -> ModelSizes:
    """Sizes of a model from the headers of its files; a part that is not given has the released sizes."""
    found = ModelSizes()
    if dit is not None:
        header, identity = open_model(dit, "transformer")
        config, (stored, groups) = identity.config, _stored_transformer(header, identity)
        recipe = family_of(config).text
        text = TextSizes(clip=found.text.clip if CLIP in recipe.encoders else None, length=recipe.length)
        found = replace(found, transformer=config, vae=usual_codec(config), text=text, stored=stored, groups=groups, name=header.name)
    if vae is not None:
        codec = open_model(vae, "vae")[1].config
        found = replace(found, vae=codec if dit is None else codec_for(family_of(found.transformer), codec))
    if t5 is not None:
        source, sizes = open_t5(t5)
        try:
            length = text_length(T5, find_tokenizer(T5, source.path))
        except CheckpointError:
            length = T5_LENGTH  # planning needs no tokenizer, and one elsewhere is the released one
        text = replace(found.text, t5=sizes, length=min(found.text.length, length))
        found = replace(found, text=text, stored_text=_STORED.get(next(iter(source.header.dtypes)), FP32))
    if clip is not None:
        found = replace(found, text=replace(found.text, clip=open_clip(clip)[1]))
    return found


@lru_cache(maxsize=32)
def transformer_weights(config: NetworkSizes, precision: str, stored: str, groups: tuple[str, ...] = QUANTISED_GROUPS) -> Weights:
    """Weights of the transformer in a precision, from a file whose weights are `stored` so."""
    model = _transformer(config, precision, groups)
    return Weights(module_bytes(model, model.blocks()), precision == stored)


def forward_peak(config: NetworkSizes, precision: str, latent_shape: tuple[int, ...], text_length: int = T5_LENGTH) -> int:
    """Peak of one forward's activations, its result included, its inputs not. latent_shape: [B, C, T, H, W]. text_length: tokens of T5's.

    Above some thousands of tokens it is a line: what is alive at the peak takes so many bytes a token, or does not depend on them.
    There it is taken from two shorter sequences; a test compares that with the whole, to the byte.
    """
    batch, channels, *extent = latent_shape
    side, time = config.patch_size, config.grid.patch_time
    extent[0] += config.grid.lead_in(extent[0])
    tokens = torch.Size(extent).numel() // (side**2 * time)
    unit = _LINEAR_FROM * max(CHUNK_ROWS, _transformer(config.with_blocks(1), precision).piece_tokens)
    if tokens <= 3 * unit or not family_of(config).is_straight:
        return _counted_forward(config, precision, (batch, channels, *extent), text_length)
    strips = ((batch, channels, time * length, side, side) for length in (unit, 2 * unit))
    near, far = (_counted_forward(config, precision, strip, text_length) for strip in strips)
    return far + (tokens - 2 * unit) * (far - near) // unit


@lru_cache(maxsize=64)
def _counted_forward(config: NetworkSizes, precision: str, latent_shape: tuple[int, ...], text_length: int) -> int:
    few = config.with_blocks(_FEW_BLOCKS)
    model = _transformer(few, precision)
    inputs = family_of(config).example(few, latent_shape, text_length, model.dtype, "meta")
    with torch.inference_mode(), AllocationCounter() as counter:
        model(**inputs)
    return counter.peak


@lru_cache(maxsize=64)
def sampling_peak(
    config: NetworkSizes, precision: str, latent_shape: tuple[int, ...], has_given: bool, text_length: int = T5_LENGTH
) -> tuple[int, int]:
    """(one forward's activations, everything else that is alive beside it): latents, predictions, text, reference.

    The solver itself is run, around a transformer that only counts.
    """
    one = forward_peak(config, precision, latent_shape, text_length)
    batch, channels, _, *sides = latent_shape
    family = family_of(config)
    recipe, has_given = family.sampling, has_given or bool(family.requires)
    with torch.inference_mode(), AllocationCounter() as counter:
        latents = _empty(torch.float32, *latent_shape)
        contexts = [_empty(torch.float32, batch, text_length, config.context_in_dim, device="cpu").to("meta") for _ in range(2)]
        sides_of_text = [{"context": context} for context in contexts]
        if CLIP in family.text.encoders:
            sides_of_text = [{**side, "y": _empty(torch.float32, batch, config.vec_in_dim)} for side in sides_of_text]
        text = TextCondition(*sides_of_text)
        told = Conditions(text, image_condition(latent_shape, _empty(torch.float32, batch, channels, 1, *sides)) if has_given else None)
        network, schedule = _Counted(counter, one, _dtype(precision), config), recipe.way(config, latent_shape, 1)
        sample(recipe, network, latents, schedule, recipe.guidance(Guidance(), recipe.solvers[0]), told, seeds=range(batch))
    return one, counter.peak - one


@lru_cache(maxsize=64)
def tiled_peak(config: CodecConfig, precision: str, shape: tuple[int, ...], tiling: Tiling, is_decode: bool = True) -> tuple[int, int]:
    """(one tile's activations, everything else that is alive beside it) of decoding latents, or encoding one picture, of this shape.

    The tiling itself is run, around a codec that only counts.
    """
    dtype, grid, tiling = _dtype(precision), config.grid, config.cut(tiling) if is_decode else tiling
    tile = tile_peak(config, dtype, (*shape[:2], *largest_tile(shape, tiling, is_decode, grid)), is_decode)

    def count(part: Tensor) -> Tensor | Encoded:
        counter.count_at_most(tile)
        batch, _, _, rows, columns = part.shape
        if is_decode:
            return part.new_empty(batch, config.in_channels, *grid.decoded(part.shape))
        return Encoded(part.new_empty(batch, 2 * config.latents.channels, 1, rows // grid.space, columns // grid.space))

    with torch.inference_mode(), AllocationCounter() as counter:
        (tiled_decode if is_decode else tiled_encode)(count, _empty(dtype, *shape), tiling, grid=grid)
    return tile, max(0, counter.peak - tile)


def tile_peak(config: CodecConfig, dtype: torch.dtype, shape: tuple[int, ...], is_decode: bool) -> int:
    """Peak of one call of a codec on a tile [B, C, T, H, W].

    Where the codec says that it is a line, it is taken from two shorter clips; a test compares that with the whole, to the byte.
    """
    straight_from = getattr(codec_of(config).build, "straight_from", None)
    near = straight_from(config, shape) if is_decode and straight_from else shape[2]
    if shape[2] <= near + 2:
        return counted_peak(config, dtype, shape, is_decode)
    first, last = (counted_peak(config, dtype, (*shape[:2], length, *shape[3:]), is_decode) for length in (near, near + 2))
    return last + (shape[2] - near - 2) * (last - first) // 2


@lru_cache(maxsize=8)
def vae_weights(config: CodecConfig, precision: str) -> int:
    """Bytes of the VAE's weights."""
    return sum(tensor.nbytes for tensor in codec_on_meta(config, _dtype(precision)).state_dict().values())


@lru_cache(maxsize=8)
def text_weights(sizes: TextSizes, precision: str, stored: str) -> tuple[Weights, int]:
    """(T5's weights, bytes of CLIP's); the embedding table and norms of a quantised T5 stay as they are."""
    t5 = t5_network(sizes.t5, _dtype(precision))
    clip = () if sizes.clip is None else clip_network(sizes.clip, _dtype(precision)).parameters()
    if precision in QUANTISED:
        keep_layers_in(t5, dict.fromkeys(quantised_layers(t5), _FORMS[precision]))
    return Weights(module_bytes(t5, t5.encoder.block), precision == stored), sum(parameter.nbytes for parameter in clip)


def text_peak(sizes: TextSizes, precision: str) -> int:
    """Peak of encoding prompt and negative prompt with T5, its result included (CLIP's is a hundredth of it)."""
    largest = sizes.t5.d_ff * sizes.t5.d_model * _dtype(precision).itemsize if precision in QUANTISED else 0
    return _counted_t5(sizes, _dtype(precision)) + largest  # a quantised layer's weight is brought to bf16 while it works


@lru_cache(maxsize=8)
def _counted_t5(sizes: TextSizes, dtype: torch.dtype) -> int:
    model = t5_network(replace(sizes.t5, num_layers=min(_FEW_BLOCKS, sizes.t5.num_layers)), dtype)
    ids = torch.empty(_TEXTS, sizes.length, dtype=torch.int64, device="meta")
    with torch.inference_mode(), AllocationCounter() as counter:
        model(input_ids=ids)
    return counter.peak


@dataclass
class _Counted:
    """A transformer of which only the need counts."""

    counter: AllocationCounter
    peak: int
    dtype: torch.dtype
    config: NetworkSizes

    def __call__(self, x: Tensor, timestep: Tensor, **inputs) -> Tensor:
        self.counter.count_at_most(self.peak)
        return x.new_empty(x.shape[0], getattr(self.config, "predicted_channels", x.shape[1]), *x.shape[2:])


def _transformer(config: NetworkSizes, precision: str, groups: tuple[str, ...] = QUANTISED_GROUPS) -> Network:
    """The transformer on the meta device, quantised where the precision says so."""
    family = family_of(config)
    model = family.build(config, QuantisedOperations, dtype=_dtype(precision), device="meta")
    if precision in QUANTISED:
        for layer in family.layers_to_quantise(manifest_of(model), groups):
            model.get_submodule(layer).keep_in(_FORMS[precision])
    return model.requires_grad_(False)


def _dtype(precision: str) -> torch.dtype:
    """What a network in a precision computes in."""
    return torch_dtype(precision) or torch.bfloat16


def _empty(dtype: torch.dtype, *shape: int, device: str = "meta") -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def _stored_transformer(header: Header, identity: Identity) -> tuple[str, tuple[str, ...]]:
    """(precision, groups of quantised layers)."""
    formats = stored_formats(header, identity.prefix)
    names = sorted({layer_format.form.name for layer_format in formats.values()})
    if not names:
        return dtype_word(header.compute_dtype), QUANTISED_GROUPS
    return names[0], tuple(sorted({group for layer in formats if (group := identity.family.group_of(layer))}))
