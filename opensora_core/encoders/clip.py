"""CLIP-L's text encoder for the command line, through the transformers library. In ComfyUI the host's own encoder is used.

It is read from its own file, from a whole CLIP's, or from a hub folder. Sizes come from the tensors; what they cannot say is what the
released encoder is: heads of 64, quick GELU, epsilon 1e-5.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoint.load import fill
from ..errors import CheckpointError
from ..shapes import Manifest, Shapes, count, manifest_of
from ..text.prompt import CLIP_LENGTH
from ..text.recipe import CLIP
from .source import Encoder, Source, read_sizes

_HEAD_DIM = 64

_LEVEL = "text_model."  # which transformers 5 leaves out of a text model's names, and every other writer puts before them
_TABLE, _POSITIONS = "embeddings.token_embedding.weight", "embeddings.position_embedding.weight"
_OTHERS = {512: "CLIP ViT-B", 1024: "CLIP-H", 1280: "CLIP-G"}


@dataclass(frozen=True)
class CLIPSizes:
    """Sizes of a CLIP text encoder, in the words of its config.json; the defaults are CLIP-L's."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    max_position_embeddings: int = CLIP_LENGTH

    @property
    def num_attention_heads(self) -> int:
        return self.hidden_size // _HEAD_DIM if self.hidden_size % _HEAD_DIM == 0 else 1


WHERE = {
    "vocab_size": (_LEVEL + _TABLE, 0),
    "hidden_size": (_LEVEL + _TABLE, 1),
    "max_position_embeddings": (_LEVEL + _POSITIONS, 0),
    "intermediate_size": (f"{_LEVEL}encoder.layers.0.mlp.fc1.weight", 0),
}


def clip_sizes(shapes: Shapes) -> CLIPSizes:
    """Sizes from the shapes of an encoder's tensors, by released name; of a tensor that is missing, CLIP-L's. Errors as t5_sizes'."""
    return CLIPSizes(**read_sizes(shapes, WHERE), num_hidden_layers=count(shapes, f"{_LEVEL}encoder.layers."))


def clip_names(shapes: Shapes, prefix: str) -> dict[str, str]:
    """{key in a file: released name} of the text encoder's tensors; the file may also hold the vision model."""
    level = "" if prefix + _TABLE in shapes else _LEVEL
    names = {key: _LEVEL + key[len(prefix + level) :] for key in shapes if key.startswith(prefix + level)}
    return {key: name for key, name in names.items() if not name.endswith("position_ids")}  # 0, 1, 2, ...: made, not read


def open_clip(path: str | Path) -> tuple[Source, CLIPSizes]:
    """CLIP's text encoder and its sizes, from the header alone; errors as open_t5's."""
    source = Source.open(path, "clip", clip_names)
    source.check(WHERE)
    return source, clip_sizes(source.shapes)


def clip_network(sizes: CLIPSizes, dtype: torch.dtype = torch.float32) -> nn.Module:
    """transformers' CLIPTextModel on the meta device."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        **asdict(sizes),
        num_attention_heads=sizes.num_attention_heads,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
        bos_token_id=sizes.vocab_size - 2,
        eos_token_id=sizes.vocab_size - 1,
        pad_token_id=sizes.vocab_size - 1,
    )
    with torch.device("meta"):
        return CLIPTextModel(config).to(dtype).requires_grad_(False).train(False)


def clip_manifest(sizes: CLIPSizes = CLIPSizes()) -> Manifest:
    """Shape of every tensor of an encoder, by released name."""
    return manifest_of(_as_released(clip_network(sizes)))


def _as_released(model: nn.Module) -> nn.ModuleDict:
    """A clip_network whose parameters are called as in the released files, by any version of transformers."""
    level = _LEVEL.rstrip(".")
    return nn.ModuleDict({level: getattr(model, level, model)})


class CLIPEncoder(Encoder):
    """CLIP-L's text model: after the final layer norm, the features of the first end-of-text token."""

    def encode(self, texts: list[str]) -> Tensor:
        """[B] texts -> [B, width], in the model's dtype, on its device."""
        ids = self.tokenize(texts)
        hidden = self.last_hidden(ids)
        # Not pooler_output: which token it takes depends on the library's version and a configuration's end-of-text id.
        first_end = (ids == self.tokenizer.end).int().argmax(dim=-1)
        return hidden[torch.arange(len(ids)), first_end]


def load_clip(path: str | Path, dtype: torch.dtype, device: torch.device | str, tokenizers: str | Path | None = None) -> CLIPEncoder:
    """Read CLIP-L's text encoder. Arguments and errors as load_t5's."""
    source, sizes = open_clip(path)
    if sizes.hidden_size in _OTHERS or sizes.hidden_size % _HEAD_DIM:
        found = _OTHERS.get(sizes.hidden_size, "a CLIP text encoder")
        raise CheckpointError(f"{source.path.name} is {found} (width {sizes.hidden_size}); give CLIP-L (width 768).")
    if (length := sizes.max_position_embeddings) != CLIP_LENGTH:
        raise CheckpointError(f"{source.path.name} has {length} positions, a long-text CLIP; give CLIP-L with {CLIP_LENGTH}.")
    tokenizer = source.tokenizer(CLIP, tokenizers, sizes.vocab_size)
    source.check_whole(clip_manifest(sizes))
    model = clip_network(sizes, dtype)
    (inner,) = fill(_as_released(model), source.header, source.converted, device, source.formats()).values()
    inner.embeddings.position_ids = torch.arange(CLIP_LENGTH, device=device)[None]
    return CLIPEncoder(model, tokenizer)
