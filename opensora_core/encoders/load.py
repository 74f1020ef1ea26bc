"""T5 and CLIP for the command line, through the transformers library. In ComfyUI the host's own encoders are used.

Both read every file form people have: single safetensors files (fp16, bf16, fp32 or fp8) and hub folders. Sizes come from
the tensors; what they cannot say is what the released encoders are (gated GELU, T5 epsilon 1e-6; CLIP heads of 64,
quick GELU, epsilon 1e-5). No attention mask is passed: padding is attended, as in training.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..checkpoint.detect import identify, require
from ..checkpoint.files import Header
from ..checkpoint.formats import LayerFormat, is_note
from ..checkpoint.quantised import replace_linears
from ..errors import CheckpointError
from ..family import NetworkSizes
from ..text.prompt import CLIP_LENGTH, dropped_sentence, fit_tokens
from .tokens import CLIP, T5, Tokenizer, find_tokenizer, read_tokenizer
from .weights import cast_tensors, check_formats, kept_tensors, layer_formats, read_headers

logger = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[int, ...]]

CLIP_HEAD_DIM = 64

_OTHER_T5 = {512: "T5 small", 768: "T5 base", 1024: "T5 large", 2048: "T5 XL (3B)"}
_OTHER_CLIP = {512: "CLIP ViT-B", 1024: "CLIP-H", 1280: "CLIP-G"}
# Parts of whole T5 and CLIP checkpoints that no text encoder needs; saying so would help nobody.
_UNUSED = ("decoder.", "lm_head.", "vision_model.", "visual_projection.", "text_projection", "logit_scale", "embed_tokens.", "position_ids")
_ALIAS = "encoder.embed_tokens.weight"  # T5's table, shared.weight, under its other name


class T5Encoder:
    """T5 v1.1: the last hidden state of every token, padding included.

    Attributes:
        model: transformers' T5EncoderModel; its layers may be moved or replaced.
        tokenizer: see tokens.py.
        width: features per token, 4096 for XXL.
    """

    def __init__(self, model: nn.Module, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.width = model.config.d_model

    def blocks(self) -> Sequence[nn.Module]:
        """In the order in which they run."""
        return self.model.encoder.block

    def tokenize(self, texts: list[str]) -> Tensor:
        """[B] texts -> ids [B, L], int64; L = tokenizer.length, 512 for XXL's. A prompt that is cut is named in a warning."""
        return _tokenize(texts, self.tokenizer, T5, logging.WARNING)

    @torch.no_grad()
    def encode(self, texts: list[str]) -> Tensor:
        """[B] texts -> [B, L, width], in the model's dtype, on its device."""
        return self.model(input_ids=self.tokenize(texts).to(_ids_device(self.model))).last_hidden_state


class CLIPEncoder:
    """CLIP-L's text model: after the final layer norm, the features of the first end-of-text token.

    Attributes: as T5Encoder's; width is 768.
    """

    def __init__(self, model: nn.Module, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.width = model.config.hidden_size

    def tokenize(self, texts: list[str]) -> Tensor:
        """[B] texts -> ids [B, 77], int64."""
        # Most good prompts are longer than CLIP reads, and T5 reads them whole: not worth a warning.
        return _tokenize(texts, self.tokenizer, CLIP, logging.INFO)

    @torch.no_grad()
    def encode(self, texts: list[str]) -> Tensor:
        """[B] texts -> [B, width], in the model's dtype, on its device."""
        ids = self.tokenize(texts).to(_ids_device(self.model))
        hidden = self.model(input_ids=ids).last_hidden_state
        # Not pooler_output: which token it takes depends on the library's version and a configuration's end-of-text id.
        first_end = (ids == self.tokenizer.end).int().argmax(dim=-1)
        return hidden[torch.arange(len(ids), device=hidden.device), first_end]


def _ids_device(model: nn.Module) -> torch.device:
    """Where ids are given to a model: its device, or the CPU for one whose layers accelerate brings in as they are called."""
    return model.device if model.device.type != "meta" else torch.device("cpu")


class TextEncoder:
    """Both encoders, as the transformer wants them."""

    def __init__(self, t5: T5Encoder, clip: CLIPEncoder):
        self.t5, self.clip = t5, clip

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """[B] texts -> context [B, 512 (the small model: 32), T5 width] and pooled [B, CLIP width]. Texts are encoded as given; see prompt.decorate."""
        return self.t5.encode(texts), self.clip.encode(texts)

    def to(self, device: torch.device | str) -> "TextEncoder":
        self.t5.model.to(device)
        self.clip.model.to(device)
        return self

    def check(self, config: NetworkSizes) -> None:
        """Raise a CheckpointError unless these encoders are of the widths that a transformer reads."""
        for name, found, wanted in (("T5", self.t5.width, config.context_in_dim), ("CLIP", self.clip.width, config.vec_in_dim)):
            if found != wanted:
                raise CheckpointError(
                    f"The {name} encoder gives {found} features and the transformer reads {wanted}: they are not of one model."
                )


def load_t5(
    path: str | Path,
    dtype: torch.dtype,
    device: torch.device | str,
    tokenizers: str | Path | None = None,
    precision: str | None = None,
) -> T5Encoder:
    """Read a T5 v1.1 encoder. Linear layers that its file stores in 8 bits are kept so, and brought to `dtype` as they are called.

    Args:
        path: a single file as Flux users have it, or a hub folder such as google/t5-v1_1-xxl.
        dtype: to compute in. In float16 each feed-forward output layer stays float32, as transformers keeps it: it overflows.
        device: where the weights go; "cpu" leaves unconverted ones memory-mapped.
        tokenizers: folder of the tokenizer; None = beside the file, in its folder, or in a ComfyUI that is found.
        precision: fp8_e4m3fn, int8 or nf4 to quantise linear layers that are stored plain; see checkpoint/quantised.py.

    Raises:
        CheckpointError: the file is damaged, incomplete or another model, or there is no tokenizer.
    """
    from transformers import T5Config, T5EncoderModel

    path = Path(path).expanduser()
    headers = read_headers(path)
    names = _t5_names(_shapes(headers), path.name)
    check_formats(headers)
    sizes = _t5_sizes({name: shape for name, (_, shape) in names.items()}, path.name)
    config = T5Config(
        vocab_size=sizes.vocabulary,
        d_model=sizes.width,
        d_kv=sizes.inner // sizes.heads,
        d_ff=sizes.mlp,
        num_layers=sizes.layers,
        num_heads=sizes.heads,
        relative_attention_num_buckets=sizes.buckets,
        feed_forward_proj="gated-gelu",
        layer_norm_epsilon=1e-6,
        use_cache=False,
    )
    tokenizer = _tokenizer(T5, path, tokenizers, sizes.vocabulary)
    half = dtype == torch.float16
    with torch.device("meta"):
        model = T5EncoderModel(config)
    linears = [
        f"{name}.weight" for name, part in model.named_modules() if isinstance(part, nn.Linear) and not (half and name.endswith(".wo"))
    ]
    stored = layer_formats(headers, [names[name][0] for name in linears if name in names], precision)
    source = _Source(
        path.name, headers, names, {name: stored[names[name][0]] for name in linears if name in names and names[name][0] in stored}
    )
    _fill(model, source, lambda name: torch.float32 if half and name.endswith(".wo.weight") else dtype, device)
    model.set_input_embeddings(model.get_input_embeddings())  # one table under its two names
    return T5Encoder(model, tokenizer)


def load_clip(path: str | Path, dtype: torch.dtype, device: torch.device | str, tokenizers: str | Path | None = None) -> CLIPEncoder:
    """Read CLIP-L's text encoder, from its own file or a whole CLIP's. Arguments and errors as load_t5's."""
    from transformers import CLIPTextConfig, CLIPTextModel

    path = Path(path).expanduser()
    headers = read_headers(path)
    names = _clip_names(_shapes(headers), path.name)
    check_formats(headers)
    sizes = _clip_sizes({name: shape for name, (_, shape) in names.items()}, path.name)
    tokenizer = _tokenizer(CLIP, path, tokenizers, sizes.vocabulary)
    config = CLIPTextConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=sizes.mlp,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        max_position_embeddings=CLIP_LENGTH,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
        pad_token_id=tokenizer.pad,
        bos_token_id=tokenizer.end - 1,
        eos_token_id=tokenizer.end,
    )
    with torch.device("meta"):
        model = CLIPTextModel(config)
    # transformers 4 keeps the text model under "text_model.", 5 does not; files nearly always do.
    if any(name.startswith("text_model.") for name in model.state_dict()):
        names = {f"text_model.{name}": stored for name, stored in names.items()}
    _fill(model, _Source(path.name, headers, names), lambda name: dtype, device)
    return CLIPEncoder(model, tokenizer)


def _tokenize(texts: list[str], tokenizer: Tokenizer, kind: str, level: int) -> Tensor:
    rows = []
    for text in texts:
        row, dropped = fit_tokens(tokenizer.ids(text), tokenizer.length, tokenizer.pad)
        if dropped:
            logger.log(level, dropped_sentence(kind, dropped, tokenizer.length))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.int64)


class _Sizes(NamedTuple):
    vocabulary: int
    width: int
    inner: int
    heads: int
    mlp: int
    layers: int
    buckets: int = 0


class _Source(NamedTuple):
    """Where a model's tensors are.

    `names`: name in the model -> (key in the file, shape). `formats`: name of a linear layer's weight -> the format it is kept in.
    """

    title: str
    headers: list[Header]
    names: dict[str, tuple[str, tuple[int, ...]]]
    formats: dict[str, LayerFormat] = {}


def _shapes(headers: list[Header]) -> dict[str, tuple[int, ...]]:
    return {key: info.shape for header in headers for key, info in header.tensors.items()}


def _t5_names(shapes: Shapes, title: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    prefix = require(identify(shapes), "t5", title).prefix
    names = _bare(shapes, prefix)
    if "shared.weight" not in names and _ALIAS in names:
        names["shared.weight"] = names[_ALIAS]
    return names


def _clip_names(shapes: Shapes, title: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    # transformers 5 writes a text model without the prefix that every other writer gives it.
    flat = "embeddings.token_embedding.weight" in shapes
    prefix = "" if flat else require(identify(shapes), "clip", title).prefix + "text_model."
    return _bare(shapes, prefix)


def _bare(shapes: Shapes, prefix: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {key[len(prefix) :]: (key, shape) for key, shape in shapes.items() if key.startswith(prefix) and not is_note(key)}


def _t5_sizes(shapes: Shapes, title: str) -> _Sizes:
    if "encoder.block.0.layer.1.DenseReluDense.wi.weight" in shapes:
        raise CheckpointError(
            f"{title} is a T5 1.0 encoder; Open-Sora 2.0 reads T5 v1.1 XXL, whose feed-forward layers are gated (wi_0, wi_1)."
        )
    attention = "encoder.block.0.layer.0.SelfAttention."
    vocabulary, width = _shape(shapes, "shared.weight", title)
    buckets, heads = _shape(shapes, f"{attention}relative_attention_bias.weight", title)
    if width in _OTHER_T5:
        raise CheckpointError(f"{title} is {_OTHER_T5[width]} (width {width}); Open-Sora 2.0 reads T5 v1.1 XXL (width 4096).")
    inner = _shape(shapes, f"{attention}q.weight", title)[0]
    mlp = _shape(shapes, "encoder.block.0.layer.1.DenseReluDense.wi_0.weight", title)[0]
    return _Sizes(vocabulary, width, inner, heads, mlp, _count(shapes, "encoder.block."), buckets)


def _clip_sizes(shapes: Shapes, title: str) -> _Sizes:
    vocabulary, width = _shape(shapes, "embeddings.token_embedding.weight", title)
    if width in _OTHER_CLIP or width % CLIP_HEAD_DIM:
        raise CheckpointError(
            f"{title} is {_OTHER_CLIP.get(width, 'a CLIP text encoder')} (width {width}); Open-Sora 2.0 reads CLIP-L (width 768)."
        )
    positions = _shape(shapes, "embeddings.position_embedding.weight", title)[0]
    if positions != CLIP_LENGTH:
        raise CheckpointError(f"{title} has {positions} positions, a long-text CLIP; Open-Sora 2.0 reads CLIP-L with {CLIP_LENGTH}.")
    mlp = _shape(shapes, "encoder.layers.0.mlp.fc1.weight", title)[0]
    return _Sizes(vocabulary, width, width, width // CLIP_HEAD_DIM, mlp, _count(shapes, "encoder.layers."))


def _shape(shapes: Shapes, name: str, title: str) -> tuple[int, int]:
    if len(shapes.get(name, ())) != 2:
        raise CheckpointError(f"{title} lacks the table {name}, from which the encoder's size is read; the file is incomplete or damaged.")
    return shapes[name]


def _count(shapes: Shapes, stem: str) -> int:
    return 1 + max(int(name[len(stem) :].split(".")[0]) for name in shapes if name.startswith(stem))


def _tokenizer(kind: str, path: Path, tokenizers: str | Path | None, vocabulary: int) -> Tokenizer:
    tokenizer = read_tokenizer(kind, find_tokenizer(kind, path, tokenizers))
    if tokenizer.size > vocabulary:
        raise CheckpointError(
            f"The {kind} tokenizer in {tokenizer.folder} has {tokenizer.size} tokens and {path.name} has {vocabulary}: "
            "they are not of one model."
        )
    return tokenizer


def _fill(model: nn.Module, source: _Source, dtype_of: Callable[[str], torch.dtype], device) -> None:
    """Give a model that was built on meta its weights: all of them, of the right shape."""
    own = model.state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in own.items() if name != _ALIAS and not name.endswith("position_ids")}
    _check_names(source, expected)
    stored = {source.names[name][0]: name for name in expected}
    formats = {source.names[name][0]: layer_format for name, layer_format in source.formats.items()}
    plain = stored.keys() - formats.keys()
    state = {stored[key]: tensor for key, tensor in cast_tensors(source.headers, plain, lambda key: dtype_of(stored[key]), device)}
    replace_linears(model, [name.removesuffix(".weight") for name in source.formats])
    for name, layer_format in source.formats.items():
        model.get_submodule(name.removesuffix(".weight")).keep_in(layer_format.form)
    for key, weight, scale in kept_tensors(source.headers, formats, device):
        state |= {stored[key]: weight, f"{stored[key]}_scale": scale}
    if _ALIAS in own:
        state[_ALIAS] = state["shared.weight"]
    for name, buffer in list(model.named_buffers()):
        # Positions 0, 1, 2, ... are made, not read; old versions of the library count them among the weights.
        positions = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent).register_buffer(leaf, positions, persistent=name in own)
        if name in own:
            state[name] = positions
    model.requires_grad_(False)
    model.load_state_dict(state, strict=True, assign=True)
    model.train(False)


def _check_names(source: _Source, expected: Shapes) -> None:
    missing = [name for name in expected if name not in source.names]
    if missing:
        raise CheckpointError(
            f"{source.title} is incomplete: it lacks {len(missing)} of {len(expected)} tensors, the first: {', '.join(missing[:5])}."
        )
    wrong = [name for name, shape in expected.items() if tuple(source.names[name][1]) != shape]
    if wrong:
        found, wanted = list(source.names[wrong[0]][1]), list(expected[wrong[0]])
        raise CheckpointError(
            f"{source.title} has {len(wrong)} tensors of a wrong shape, the first: {wrong[0]} {found}, expected {wanted}."
        )
    used = {source.names[name][0] for name in expected}
    keys = (key for key in _shapes(source.headers) if key not in used and not is_note(key))
    extra = [key for key in keys if not any(part in key for part in _UNUSED)]
    if extra:
        logger.warning("%s holds %d tensors that its text encoder does not use: %s", source.title, len(extra), ", ".join(extra[:20]))
