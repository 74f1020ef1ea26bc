"""CLIP-L's text encoder for the command line, through the transformers library. In ComfyUI the host's own encoder is used.

It is read from its own file, from a whole CLIP's, or from a hub folder. Sizes come from the tensors; what they cannot say is what the
released encoder is: heads of 64, quick GELU, epsilon 1e-5.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoint.detect import identify, require
from ..checkpoint.files import read_network
from ..checkpoint.load import fill
from ..errors import CheckpointError
from ..shapes import Manifest, Shapes, manifest_of
from ..text.prompt import CLIP_LENGTH
from ..text.recipe import CLIP
from .source import Source, read_sizes
from .t5 import ids_device
from .tokens import Tokenizer, tokenize

HEAD_DIM = 64

_LEVEL = "text_model."  # which transformers 5 leaves out of a text model's names, and every other writer puts before them
_TABLE, _POSITIONS = "embeddings.token_embedding.weight", "embeddings.position_embedding.weight"
_OTHERS = {512: "CLIP ViT-B", 1024: "CLIP-H", 1280: "CLIP-G"}


@dataclass(frozen=True)
class CLIPSizes:
    """Sizes of a CLIP text encoder; the defaults are CLIP-L's."""

    vocabulary: int = 49408
    width: int = 768
    mlp: int = 3072
    layers: int = 12
    positions: int = CLIP_LENGTH


WHERE = {
    "vocabulary": (_LEVEL + _TABLE, 0),
    "width": (_LEVEL + _TABLE, 1),
    "positions": (_LEVEL + _POSITIONS, 0),
    "mlp": (f"{_LEVEL}encoder.layers.0.mlp.fc1.weight", 0),
}


def clip_sizes(shapes: Shapes) -> CLIPSizes:
    """Sizes from the shapes of an encoder's tensors, by released name; of a tensor that is missing, CLIP-L's. Errors as t5_sizes'."""
    return read_sizes(CLIPSizes(), shapes, WHERE, f"{_LEVEL}encoder.layers.")


def clip_names(shapes: Shapes, prefix: str) -> dict[str, str]:
    """{key in a file: released name} of the text encoder's tensors; the file may also hold the vision model."""
    level = "" if prefix + _TABLE in shapes else _LEVEL
    names = {key: _LEVEL + key[len(prefix + level) :] for key in shapes if key.startswith(prefix + level)}
    return {key: name for key, name in names.items() if not name.endswith("position_ids")}  # 0, 1, 2, ...: made, not read


def open_clip(path: str | Path) -> tuple[Source, CLIPSizes]:
    """As open_t5, of CLIP's text encoder."""
    path = Path(path).expanduser()
    header = read_network(path)
    shapes = header.shapes
    source = Source(path, header, clip_names(shapes, require(identify(shapes), "clip", path.name).prefix))
    source.check(WHERE)
    return source, clip_sizes(source.shapes)


def clip_network(sizes: CLIPSizes, dtype: torch.dtype = torch.float32) -> nn.Module:
    """transformers' CLIPTextModel on the meta device."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=sizes.mlp,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.width // HEAD_DIM if sizes.width % HEAD_DIM == 0 else 1,
        max_position_embeddings=sizes.positions,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
        bos_token_id=sizes.vocabulary - 2,
        eos_token_id=sizes.vocabulary - 1,
        pad_token_id=sizes.vocabulary - 1,
    )
    with torch.device("meta"):
        return CLIPTextModel(config).to(dtype).requires_grad_(False).train(False)


def clip_manifest(sizes: CLIPSizes = CLIPSizes()) -> Manifest:
    """Shape of every tensor of an encoder, by released name."""
    return {_LEVEL + name.removeprefix(_LEVEL): shape for name, shape in manifest_of(clip_network(sizes)).items()}


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
        return tokenize(self.tokenizer, texts, logging.INFO)

    @torch.no_grad()
    def encode(self, texts: list[str]) -> Tensor:
        """[B] texts -> [B, width], in the model's dtype, on its device."""
        ids = self.tokenize(texts).to(ids_device(self.model))
        hidden = self.model(input_ids=ids).last_hidden_state
        # Not pooler_output: which token it takes depends on the library's version and a configuration's end-of-text id.
        first_end = (ids == self.tokenizer.end).int().argmax(dim=-1)
        return hidden[torch.arange(len(ids), device=hidden.device), first_end]


def load_clip(path: str | Path, dtype: torch.dtype, device: torch.device | str, tokenizers: str | Path | None = None) -> CLIPEncoder:
    """Read CLIP-L's text encoder. Arguments and errors as load_t5's."""
    source, sizes = open_clip(path)
    if sizes.width in _OTHERS or sizes.width % HEAD_DIM:
        found = _OTHERS.get(sizes.width, "a CLIP text encoder")
        raise CheckpointError(f"{source.title} is {found} (width {sizes.width}); Open-Sora 2.0 reads CLIP-L (width 768).")
    if sizes.positions != CLIP_LENGTH:
        raise CheckpointError(
            f"{source.title} has {sizes.positions} positions, a long-text CLIP; Open-Sora 2.0 reads CLIP-L with {CLIP_LENGTH}."
        )
    tokenizer = source.tokenizer(CLIP, tokenizers, CLIP_LENGTH, sizes.vocabulary)
    source.check_whole(clip_manifest(sizes))
    model = clip_network(sizes, dtype)
    inner = getattr(model, _LEVEL.rstrip("."), model)

    def convert(key: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
        return [(name.removeprefix(_LEVEL), value) for name, value in source.converted(key, tensor)]

    formats = {name.removeprefix(_LEVEL): layer_format for name, layer_format in source.formats().items()}
    fill(inner, source.header, convert, device, formats)
    inner.embeddings.position_ids = torch.arange(CLIP_LENGTH, device=device)[None]
    return CLIPEncoder(model, tokenizer)
