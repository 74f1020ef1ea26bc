"""The host's T5 + CLIP-L text encoder, given exactly the tokens that Open-Sora was trained with.

The host's own reading of a prompt differs from upstream in three ways: "(word:1.3)" is taken for a
weight, T5 is padded to 256 tokens and never cut, and a long prompt becomes several CLIP chunks. Here the
ids come straight from the host's tokenizers: 512 T5 tokens and one CLIP chunk, as the transformers
library makes them from the same tokenizer files. An encoder with a vocabulary of its own, as the built-in
model has, brings its tokenizer beside its file, which also says how long a text is.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.supported_models_base
import comfy.text_encoders.flux
import comfy.text_encoders.genmo
import comfy.text_encoders.sd3_clip
import comfy.utils
import torch

from ...opensora_core.checkpoint import detect, quantised
from ...opensora_core.checkpoint.files import read_network
from ...opensora_core.checkpoint.load import compare
from ...opensora_core.checkpoint.quantize import FORMATS
from ...opensora_core.choices import AUTO, BF16, FILE_FORMATS, FP8, NF4
from ...opensora_core.encoders import clip as clip_model, t5 as t5_model
from ...opensora_core.encoders.tokens import Tokenizer, find_tokenizer, read_tokenizer
from ...opensora_core.errors import CheckpointError, OpenSoraError
from ...opensora_core.families.table import DEFAULT
from ...opensora_core.shapes import Manifest
from ...opensora_core.text.recipe import CLIP, T5, TextRecipe
from .paths import load_tensors
from .precision import NF4Operations, quantise_layers, unpatchable

PRECISIONS = (AUTO, BF16, *FILE_FORMATS, NF4)
DEVICES = (AUTO, "cpu")

RELEASED_T5, RELEASED_CLIP = t5_model.T5Sizes(), clip_model.CLIPSizes()
_CLIP_TABLE, _ = clip_model.WHERE["vocab_size"]
_T5_LINEARS = (".q.weight", ".k.weight", ".v.weight", ".o.weight", ".wi_0.weight", ".wi_1.weight", ".wo.weight")


@dataclass
class EncoderFile:
    """A text encoder's tensors under the names that transformers gives them, and what they are."""

    name: str
    identity: detect.Identity
    state: dict
    path: Path = Path()  # a tokenizer of its own lies beside it

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: tuple(tensor.shape) for key, tensor in self.state.items()}

    @property
    def is_quantised(self) -> bool:
        return any(key.endswith(".comfy_quant") for key in self.state)


class ExactTokenizer:
    """The host's Flux tokenizer with Open-Sora's recipe, so that stock text nodes are exact as well.

    tokenizer: the host's FluxTokenizer. own: by the host's names ("t5xxl", "l"), the tokenizers of encoders that are not read with the
    host's.
    """

    def __init__(self, tokenizer, own: dict[str, Tokenizer] | None = None):
        self.inner = tokenizer
        self.clip_l = getattr(tokenizer, "clip_l", None)
        self.t5xxl = getattr(tokenizer, "t5xxl", None) or tokenizer.clip_t5xxl
        self.tokenizers = {"t5xxl": host_tokenizer(T5), **(own or {})}
        if self.clip_l is not None:  # one with a longer position table is padded to its full length by the host
            self.tokenizers.setdefault("l", replace(host_tokenizer(CLIP), length=self.clip_l.max_length))

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **options) -> dict:
        """What the host's CLIP.tokenize asks for. Options (weights, minimum lengths) belong to other recipes and are ignored."""
        tokens, _ = exact_tokens(self, text)
        if return_word_ids:
            return {name: [[(token, weight, 0) for token, weight in chunk] for chunk in chunks] for name, chunks in tokens.items()}
        return tokens

    def untokenize(self, token_weight_pair):
        return self.inner.untokenize(token_weight_pair)

    def state_dict(self) -> dict:
        return self.inner.state_dict()


def exact_tokens(tokenizer, text: str, recipe: TextRecipe = DEFAULT.text) -> tuple[dict, str]:
    """The tokens of a prompt as upstream makes them.

    tokenizer: a FluxTokenizer or an ExactTokenizer. text: taken literally; brackets are no weights.
    Returns {"t5xxl": [512 (id, 1.0) pairs, or as many as the recipe says], "l": [77 pairs]}, and a sentence if T5 had to drop the end of
    the prompt, else "".
    """
    exact, most = tokenizer if isinstance(tokenizer, ExactTokenizer) else ExactTokenizer(tokenizer), {"t5xxl": recipe.length}
    fitted = {name: replace(one, length=min(one.length, most.get(name, one.length))).fitted(text) for name, one in exact.tokenizers.items()}
    return {name: [[(token, 1.0) for token in ids]] for name, (ids, _) in fitted.items()}, fitted["t5xxl"][1]


@lru_cache(maxsize=2)
def host_tokenizer(kind: str) -> Tokenizer:
    """The host's tokenizer files, read as on the command line: the host's own objects differ with the version of transformers."""
    read = read_tokenizer(kind, Path(comfy.sd.__file__).parent / ("text_encoders/t5_tokenizer" if kind == T5 else "sd1_tokenizer"))
    return replace(read, length=DEFAULT.text.length) if kind == T5 else read


def encode(clip, text: str, recipe: TextRecipe = DEFAULT.text) -> tuple[list, str]:
    """Encode a prompt through the host.

    clip: a host CLIP holding T5, and CLIP-L where the model reads it, from our loader or from DualCLIPLoader type flux. recipe: how the
    model reads prompts.
    Returns CONDITIONING ([B, 512, 4096] (the built-in model: [B, 32, 64]) T5 states without a mask, and CLIP's pooled [B, 768]), and a
    sentence about dropped words or "".
    Raises OpenSoraError: the CLIP holds other encoders.
    """
    check_clip(clip, recipe)
    tokens, note = exact_tokens(clip.tokenizer, text, recipe)
    t5 = clip.cond_stage_model.t5xxl
    was, t5.enable_attention_masks = t5.enable_attention_masks, recipe.has_mask
    try:
        conditioning = clip.encode_from_tokens_scheduled(tokens)
    finally:
        t5.enable_attention_masks = was
    if not recipe.has_mask:
        return conditioning, note
    ids = [token for token, _ in tokens["t5xxl"][0]]
    last = len(ids) - 1 - ids[::-1].index(t5.special_tokens["end"])
    mask = (torch.arange(len(ids)) <= last).long()[None]  # 0 for the padding after the end of the text
    return [[states, {**values, "attention_mask": mask}] for states, values in conditioning], note


def check_clip(clip, recipe: TextRecipe = DEFAULT.text) -> None:
    """Raise an OpenSoraError unless the CLIP holds T5, and CLIP-L as Flux uses it where the recipe reads it."""
    held = getattr(clip, "cond_stage_model", None)
    if isinstance(held, comfy.text_encoders.flux.FluxClipModel) or (CLIP not in recipe.encoders and hasattr(held, "t5xxl")):
        return
    found = "no text encoder" if held is None else f"another text encoder ({type(held).__name__.rstrip('_')})"
    raise OpenSoraError(
        f"This CLIP holds {found}; Open-Sora reads T5-XXL and CLIP-L together. "
        "Use Open-Sora Load Text Encoders, or DualCLIPLoader with type flux."
    )


def load_text_encoders(t5_path: str, clip_l_path: str | None, precision: str = AUTO, device: str = AUTO, disable_dynamic: bool = False):
    """Load both encoders as one host CLIP.

    t5_path, clip_l_path: single files, in either order; clip_l_path None: T5 alone.
    precision: auto (as stored), bf16, fp8_e4m3fn or int8 (T5's linear layers in the host's 8-bit formats, the rest as stored), or nf4
        (in 4 bits, by bitsandbytes; experimental, see precision.py).
    device: auto (the host's choice) or cpu.
    Raises CheckpointError: a file that is something else, or lacks tensors.
    """
    t5, clip_l = sort_files(read_encoder(t5_path), clip_l_path and read_encoder(clip_l_path))
    options = {**_t5_overrides(t5), **(_clip_overrides(clip_l) if clip_l else {})}
    own = _own_tokenizers(t5, clip_l)
    if "l" in own:
        clip_l.state[_CLIP_TABLE], own["l"] = _as_released(clip_l.state[_CLIP_TABLE], own["l"])
    _set_precision(t5, clip_l, precision)
    options["dtype"] = _load_dtype(t5.state, clip_l and clip_l.state)
    if t5.is_quantised:
        options["t5xxl_quantization_metadata"] = {"mixed_ops": True}
    if device == "cpu":
        options["load_device"] = options["offload_device"] = torch.device("cpu")
    if precision == NF4:
        clip = _host_clip(t5, clip_l, {**options, "custom_operations": NF4Operations}, True)
        unpatchable(clip.patcher)
    else:
        clip = _host_clip(t5, clip_l, options, disable_dynamic)
    clip.patcher.cached_patcher_init = (load_text_encoders_patcher, (t5_path, clip_l_path, precision, device))
    clip.tokenizer = ExactTokenizer(clip.tokenizer, own)
    return clip


def _host_clip(t5: EncoderFile, clip_l: EncoderFile | None, options: dict, disable_dynamic: bool):
    """The host's CLIP of both, or of T5 by itself."""
    if clip_l is not None:
        # CLIP's projection is not in the files Flux users have and is not used; without it the host warns of a missing tensor.
        clip_l.state.setdefault("text_projection.weight", torch.eye(clip_l.shapes[_CLIP_TABLE][1]))
        return comfy.sd.load_text_encoder_state_dicts(
            [clip_l.state, t5.state], clip_type=comfy.sd.CLIPType.FLUX, model_options=options, disable_dynamic=disable_dynamic
        )
    genmo, target = comfy.text_encoders.genmo, comfy.supported_models_base.ClipTarget
    return comfy.sd.CLIP(
        target(genmo.MochiT5Tokenizer, genmo.mochi_te(**comfy.text_encoders.sd3_clip.t5_xxl_detect(t5.state))),
        parameters=comfy.utils.calculate_parameters(t5.state),
        state_dict=[t5.state],
        model_options=options,
        disable_dynamic=disable_dynamic,
    )


def load_text_encoders_patcher(t5_path: str, clip_l_path: str | None, precision: str, device: str, disable_dynamic: bool = False):
    """The patcher of a fresh copy, for the host's multi-GPU and hook clones."""
    return load_text_encoders(t5_path, clip_l_path, precision, device, disable_dynamic).patcher


def read_encoder(path: str) -> EncoderFile:
    """Map a file's tensors and say what they are. Keys lose their prefix; older 8-bit layouts become the host's present one."""
    name = read_network(path).name  # says in a sentence what is wrong with a truncated or damaged file
    state, metadata = load_tensors(path)
    state, _ = comfy.utils.convert_old_quants(state, model_prefix="", metadata=metadata)
    identity = detect.identify({key: tuple(tensor.shape) for key, tensor in state.items()})
    prefix = identity.prefix
    bare = {key[len(prefix) :]: tensor for key, tensor in state.items() if key.startswith(prefix)}
    return EncoderFile(name, identity, bare, Path(path))


def sort_files(first: EncoderFile, second: EncoderFile | None) -> tuple[EncoderFile, EncoderFile | None]:
    """(T5, CLIP-L), whichever way round they were given, or T5 alone. Raises a CheckpointError where one is neither, or both are the same."""
    if second and second.identity.kind == "t5" and first.identity.kind != "t5":
        first, second = second, first
    for file, kind in ((first, "t5"), (second, "clip")):
        if file:
            detect.require(file.identity, kind, file.name)
    return first, second


def _t5_overrides(t5: EncoderFile) -> dict:
    sizes = _sizes(t5, t5_model.WHERE, t5_model.t5_sizes, t5_model.t5_manifest)
    return {} if sizes == RELEASED_T5 else {"t5xxl_model_config": asdict(sizes)}


def _clip_overrides(clip_l: EncoderFile) -> dict:
    # The host knows a CLIP file by its second layer.
    where = {**clip_model.WHERE, "num_hidden_layers": ("text_model.encoder.layers.1.mlp.fc1.weight", 0)}
    sizes = _sizes(clip_l, where, clip_model.clip_sizes, clip_model.clip_manifest)
    if sizes == RELEASED_CLIP:
        return {}
    config = {**asdict(sizes), "num_attention_heads": sizes.num_attention_heads}
    # The host rebuilds "clip_l_model_config" from "model_config" when it looks for long CLIP-L files, so both carry it.
    return {"clip_l_model_config": config, "model_config": config}


def _sizes(file: EncoderFile, where: dict, sizes_of: Callable, manifest_of: Callable[[Any], Manifest]):
    """An encoder's sizes. Raises a CheckpointError unless all of its tensors are there."""
    if missing := [name for name in dict.fromkeys(name for name, _ in where.values()) if name not in file.state]:
        raise CheckpointError(f"{file.name} is {file.identity.title} without {', '.join(missing)}; download the file again.")
    sizes = sizes_of(file.shapes)
    # 4-bit layers show half their columns, so a quantised file is only asked for its tensors' names.
    compare(file.shapes, manifest_of(sizes)).whole(f"{file.name} is {file.identity.title}", exact=not file.is_quantised)
    return sizes


def _own_tokenizers(t5: EncoderFile, clip_l: EncoderFile | None = None) -> dict[str, Tokenizer]:
    """By the host's names, the tokenizers of the encoders that have another vocabulary than the released ones, from beside their files.

    Raises CheckpointError: there is none, or it has more tokens than the encoder.
    """
    own = {}
    for name, kind, file, (table, _), released in (
        ("t5xxl", T5, t5, t5_model.WHERE["vocab_size"], RELEASED_T5.vocab_size),
        ("l", CLIP, clip_l, clip_model.WHERE["vocab_size"], RELEASED_CLIP.vocab_size),
    ):
        if file is None or (found := file.shapes[table][0]) == released:
            continue
        wrong = (
            f"{file.name} is {file.identity.title} with a vocabulary of {found:,}; ComfyUI's tokenizer is the released one, of {released:,}"
        )
        try:
            own[name] = read_tokenizer(kind, find_tokenizer(kind, file.path, file.path.parent))
        except CheckpointError as error:
            raise CheckpointError(
                f"Use an encoder with the released vocabulary, or put its tokenizer beside it: {wrong}. {error}"
            ) from error
        if own[name].size > found:
            raise CheckpointError(f"Put the encoder's own tokenizer beside it: {wrong}, and the one there has {own[name].size:,} tokens.")
    return own


def _as_released(table: torch.Tensor, tokenizer: Tokenizer) -> tuple[torch.Tensor, Tokenizer]:
    """CLIP's embedding table with as many rows as the released one, which is what the host makes; and its tokenizer with the start and end tokens,
    its two highest, under the released ids, by which the host knows them."""
    first, shift = tokenizer.end - 1, RELEASED_CLIP.vocab_size - 1 - tokenizer.end
    rows = table.new_zeros(RELEASED_CLIP.vocab_size, table.shape[1])
    rows[:first], rows[-2:] = table[:first], table[first : first + 2]

    def ids(text: str) -> list[int]:
        return [token + shift if token >= first else token for token in tokenizer.ids(text)]

    return rows, replace(tokenizer, ids=ids, pad=tokenizer.pad + shift, end=tokenizer.end + shift, size=RELEASED_CLIP.vocab_size)


def _set_precision(t5: EncoderFile, clip_l: EncoderFile | None, precision: str) -> None:
    if precision == AUTO:
        return
    if t5.is_quantised:
        raise CheckpointError(f"{t5.name} is already quantised; use precision auto, or an unquantised file for {precision}.")
    if precision == BF16:
        for file in filter(None, (t5, clip_l)):
            file.state = {key: tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor for key, tensor in file.state.items()}
        return
    form = quantised.NF4() if precision == NF4 else FORMATS[precision]()
    if t5.state["encoder.final_layer_norm.weight"].dtype == torch.float8_e4m3fn:
        if precision == FP8:
            return  # stored so already
        raise CheckpointError(f"{t5.name} is stored in fp8; use precision auto, or an unquantised file for {precision}.")
    layers = [key[: -len(".weight")] for key in t5.state if key.endswith(_T5_LINEARS)]
    t5.state = quantise_layers(t5.state, layers, form)


def _load_dtype(t5_state: dict, clip_state: dict | None = None) -> torch.dtype:
    """The dtype to ask the host for so that neither encoder is rounded.

    The host keeps T5 as stored where it recognises it (24 blocks) and that is no wider than this dtype, and
    gives everything else this dtype.
    """
    t5 = t5_state["encoder.final_layer_norm.weight"].dtype
    if clip_state is None:
        return t5
    clip_l = clip_state["text_model.final_layer_norm.weight"].dtype
    known = "encoder.block.23.layer.1.DenseReluDense.wi_1.weight" in t5_state
    return clip_l if t5 == clip_l or (known and t5.itemsize <= clip_l.itemsize) else torch.float32
