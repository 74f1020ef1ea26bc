"""T5 v1.1 for the command line, through the transformers library. In ComfyUI the host's own encoder is used.

Every file form that people have is read: single safetensors files (fp16, bf16, fp32, fp8 or ComfyUI's int8) and hub folders. Sizes
come from the tensors; what they cannot say is what the released encoder is: gated GELU, epsilon 1e-6.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoint.load import fill
from ..checkpoint.quantised import Format, replace_linears
from ..errors import CheckpointError
from ..shapes import Manifest, Shapes, count, manifest_of
from ..text.recipe import T5, TextRecipe
from .source import Encoder, Source, read_sizes

_BLOCKS = "encoder.block"

_TABLE, _ALIAS = "shared.weight", "encoder.embed_tokens.weight"  # one tensor, under its two names
_ATTENTION, _FEED_FORWARD = f"{_BLOCKS}.0.layer.0.SelfAttention.", f"{_BLOCKS}.0.layer.1.DenseReluDense."
_OTHERS = {512: "T5 small", 768: "T5 base", 1024: "T5 large", 2048: "T5 XL (3B)"}


@dataclass(frozen=True)
class T5Sizes:
    """Sizes of a T5 v1.1 encoder, in the words of its config.json; the defaults are XXL's."""

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32


WHERE = {
    "vocab_size": (_TABLE, 0),
    "d_model": (_TABLE, 1),
    "d_kv": (f"{_ATTENTION}q.weight", 0),  # of all heads together
    "d_ff": (f"{_FEED_FORWARD}wi_0.weight", 0),
    "num_heads": (f"{_ATTENTION}relative_attention_bias.weight", 1),
    "relative_attention_num_buckets": (f"{_ATTENTION}relative_attention_bias.weight", 0),
}


def t5_sizes(shapes: Shapes) -> T5Sizes:
    """Sizes from the shapes of an encoder's tensors, by released name; of a tensor that is missing, XXL's. Raises a CheckpointError if they cannot be."""
    found = read_sizes(shapes, WHERE)
    heads = found.get("num_heads", T5Sizes.num_heads)
    inner = found.get("d_kv", T5Sizes.num_heads * T5Sizes.d_kv)
    if inner % heads:
        raise CheckpointError(f"The sizes of this T5 encoder cannot be: {inner} features in {heads} heads. Download the file again.")
    return T5Sizes(**found | {"d_kv": inner // heads, "num_layers": count(shapes, f"{_BLOCKS}.")})


def t5_names(shapes: Shapes, prefix: str) -> dict[str, str]:
    """{key in a file: released name} of the encoder's tensors; the file may also hold a decoder."""
    bare = {key: key[len(prefix) :] for key in shapes if key.startswith((f"{prefix}encoder.", f"{prefix}shared."))}
    return {key: _TABLE if name == _ALIAS else name for key, name in bare.items()}


def open_t5(path: str | Path) -> tuple[Source, T5Sizes]:
    """An encoder and its sizes, from the header alone.

    Raises a CheckpointError for a file that is damaged, another model, quantised in a way that is not read, or lacks what sizes are read from.
    """
    source = Source.open(path, "t5", t5_names)
    if f"{_FEED_FORWARD}wi.weight" in source.shapes:
        raise CheckpointError(f"{source.path.name} is a T5 1.0 encoder; give T5 v1.1 XXL, which is gated (wi_0, wi_1).")
    source.check(WHERE)
    return source, t5_sizes(source.shapes)


def t5_network(sizes: T5Sizes, dtype: torch.dtype = torch.float32) -> nn.Module:
    """transformers' T5EncoderModel on the meta device. In float16 each feed-forward output layer is float32, as there: it overflows."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(**asdict(sizes), feed_forward_proj="gated-gelu", layer_norm_epsilon=1e-6, use_cache=False)
    with torch.device("meta"):
        model = T5EncoderModel(config).to(dtype)
    for name, part in model.named_modules():
        if dtype == torch.float16 and name.endswith(".wo"):
            part.float()
    model.set_input_embeddings(model.get_input_embeddings())  # one table under its two names
    return model.requires_grad_(False).train(False)


def t5_manifest(sizes: T5Sizes = T5Sizes()) -> Manifest:
    """Shape of every tensor of an encoder, by released name."""
    manifest = manifest_of(t5_network(sizes))
    del manifest[_ALIAS]
    return manifest


def quantised_layers(model: nn.Module) -> list[str]:
    """The layers of a t5_network that may keep their weight in 8 or 4 bits: its linear ones, but for those that float16 leaves out."""
    return [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and part.weight.dtype == model.dtype]


def keep_layers_in(model: nn.Module, forms: dict[str, Format]) -> None:
    """Let layers of a t5_network keep their weight in a format, by name; the weights are to be loaded after."""
    replace_linears(model, forms)
    for name, form in forms.items():
        model.get_submodule(name).keep_in(form)


class T5Encoder(Encoder):
    """T5 v1.1: the last hidden state of every token. Without a recipe it reads as many tokens as its tokenizer says, without a mask."""

    has_mask = False

    def follow(self, recipe: TextRecipe) -> "T5Encoder":
        """Read prompts as a model does: no more tokens than its recipe says, with its mask."""
        self.tokenizer = replace(self.tokenizer, length=min(recipe.length, self.tokenizer.length))
        self.has_mask = recipe.has_mask
        return self

    def blocks(self) -> Sequence[nn.Module]:
        """The blocks in the order in which they run."""
        return self.model.encoder.block

    def mask(self, ids: Tensor) -> Tensor | None:
        """[B, L] ids -> int64 [B, L], 1 up to the last end-of-text token and 0 for the padding after it; None where padding is attended."""
        if not self.has_mask:
            return None
        return ((ids == self.tokenizer.end).flip(-1).cumsum(-1).flip(-1) > 0).long()

    def encode(self, texts: list[str]) -> Tensor:
        """[B] texts -> [B, L, width], in the model's dtype, on its device."""
        ids = self.tokenize(texts)
        return self.last_hidden(ids, self.mask(ids))


def load_t5(
    path: str | Path, dtype: torch.dtype, device: torch.device | str, tokenizers: str | Path | None = None, precision: str | None = None
) -> T5Encoder:
    """Read a T5 v1.1 encoder. Linear layers that its file stores in 8 bits are kept so, and brought to `dtype` as they are called.

    path: a single file as Flux users have it, or a hub folder such as google/t5-v1_1-xxl. dtype: to compute in, see t5_network.
    device: where the weights go; "cpu" leaves unconverted ones memory-mapped.
    tokenizers: folder of the tokenizer; None = beside the file, in its folder, or in a ComfyUI that is found.
    precision: fp8_e4m3fn, int8 or nf4 to quantise linear layers that are stored plain; see checkpoint/quantised.py.
    """
    source, sizes = open_t5(path)
    if other := _OTHERS.get(sizes.d_model):
        raise CheckpointError(f"{source.path.name} is {other} (width {sizes.d_model}); give T5 v1.1 XXL (width 4096).")
    tokenizer = source.tokenizer(T5, tokenizers, sizes.vocab_size)
    source.check_whole(t5_manifest(sizes))
    model = t5_network(sizes, dtype)
    kept = quantised_layers(model)
    formats = source.formats(kept, precision)
    keep_layers_in(model, {name: formats[name].form for name in kept if name in formats})
    return T5Encoder(fill(model, source.header, source.converted, device, formats), tokenizer)
