"""What T5 and CLIP have in common: where their tensors are and whether all of them are there, their sizes, and how texts go in."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoint.detect import identify, require
from ..checkpoint.files import Header, read_network
from ..checkpoint.formats import LayerFormat, is_note, stored_formats
from ..checkpoint.load import compare
from ..checkpoint.quantised import Float8, precision_format
from ..errors import CheckpointError
from ..shapes import Shapes, size
from ..text.recipe import T5
from .tokens import Tokenizer, find_tokenizer, read_tokenizer

logger = logging.getLogger(__name__)

Where = Mapping[str, tuple[str, int]]  # a size -> the tensor and the axis that it is read from

_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
# Parts of whole T5 and CLIP checkpoints that no text encoder needs; saying so would help nobody.
_UNUSED = ("decoder.", "lm_head.", "vision_model.", "visual_projection.", "text_projection", "logit_scale", "embed_tokens.", "position_ids")


@dataclass(frozen=True)
class Source:
    """Where an encoder's weights are. path: a file, or a folder in the hub's layout. header: of the file, or of all the shards.

    names: key in the file -> the tensor's name in the released files; of the encoder's tensors only.
    """

    path: Path
    header: Header
    names: Mapping[str, str]

    @classmethod
    def open(cls, path: str | Path, slot: str, names_of: Callable[[Shapes, str], Mapping[str, str]]) -> "Source":
        """An encoder from its header alone. slot: see detect.require. names_of: (shapes, what stands before the encoder's keys) -> `names`."""
        path = Path(path).expanduser()
        header = read_network(path)
        shapes = header.shapes
        return cls(path, header, names_of(shapes, require(identify(shapes), slot, path.name).prefix))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the encoder's tensors by released name."""
        return {name: self.header.tensors[key].shape for key, name in self.names.items() if not is_note(key)}

    def check(self, where: Where) -> None:
        """Raise a CheckpointError unless the tables are there that sizes are read from, and weights are stored in a form that is read."""
        shapes = self.shapes
        for name, _ in where.values():
            if len(shapes.get(name, ())) != 2:
                raise CheckpointError(f"{self.path.name} lacks the table {name}, which its size is read from; download the file again.")
        tensors = self.header.tensors
        for key, info in tensors.items():
            layer, _, leaf = key.rpartition(".")
            is_int8 = info.dtype == "I8" and not tensors.keys().isdisjoint((f"{layer}.weight_scale", f"{layer}.scale_weight"))
            if leaf == "weight" and not is_int8 and info.dtype not in _FLOATS:
                raise CheckpointError(
                    f"{key} in {self.header.name} is stored as {info.dtype}: of quantised text encoders only fp8 ones and ComfyUI's int8 ones "
                    "are read here. Give the fp16, bf16, fp8 or int8 file."
                )

    def check_whole(self, expected: Shapes) -> None:
        """Raise a CheckpointError unless every tensor of the encoder is there; what else the file holds is named in a warning."""
        compare(self.shapes, expected).whole(f"{self.path.name} is a text encoder")
        others = [key for key in self.header.tensors if self.names.get(key) not in expected and not is_note(key)]
        if extra := [key for key in others if not any(part in key for part in _UNUSED)]:
            logger.warning("%s holds %d tensors that its text encoder does not use: %s", self.path.name, len(extra), ", ".join(extra[:20]))

    def formats(self, kept: Iterable[str] = (), precision: str | None = None) -> dict[str, LayerFormat]:
        """The layers whose weight is quantised, by released name.

        kept: linear layers that are to keep their weight in 8 or 4 bits. precision: fp8_e4m3fn, int8 or nf4 for those of them that are not stored in
        8 bits; None leaves those plain.
        """
        form, kept = precision and precision_format(precision), set(kept)
        stored, formats = stored_formats(self.header), {}
        for key, name in self.names.items():
            layer = name.removesuffix(".weight")
            found = stored.get(key.removesuffix(".weight")) if key.endswith(".weight") else None
            if not found and layer in kept and self.header.tensors[key].dtype == "F8_E4M3":
                found = LayerFormat(Float8(), True)  # plain numbers, without a scale
            if found or (form and layer in kept):
                formats[layer] = found or LayerFormat(form, False)
        return formats

    def converted(self, key: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
        """See checkpoint.load.Convert."""
        return [(self.names[key], tensor)] if key in self.names else []

    def tokenizer(self, kind: str, chosen: str | Path | None, vocabulary: int) -> Tokenizer:
        """The tokenizer that belongs to the encoder; errors as find_tokenizer's, and where it has more tokens than the encoder."""
        tokenizer = read_tokenizer(kind, find_tokenizer(kind, self.path, chosen))
        if tokenizer.size > vocabulary:
            raise CheckpointError(
                f"The {kind} tokenizer in {tokenizer.folder} has {tokenizer.size} tokens and {self.path.name} has {vocabulary}: "
                "they are not of one model. Give the encoder's own tokenizer."
            )
        return tokenizer


def read_sizes(shapes: Shapes, where: Where) -> dict[str, int]:
    """An encoder's sizes, of those of its tensors that are there. shapes: by released name."""
    return {field: size(shapes, name, axis) for field, (name, axis) in where.items() if name in shapes}


class Encoder:
    """An encoder of the transformers library with its tokenizer (tokens.py). model: its layers may be moved or replaced."""

    def __init__(self, model: nn.Module, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer

    def tokenize(self, texts: list[str]) -> Tensor:
        """[B] texts -> ids [B, L], int64; L = tokenizer.length. A text that is cut is named in the log."""
        rows = []
        for text in texts:
            ids, note = self.tokenizer.fitted(text)
            if note:
                # Most good prompts are longer than CLIP reads, and T5 reads them whole: not worth a warning.
                logger.log(logging.WARNING if self.tokenizer.kind == T5 else logging.INFO, note)
            rows.append(ids)
        return torch.tensor(rows, dtype=torch.int64)

    @torch.no_grad()
    def last_hidden(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, L] ids -> [B, L, features], in the model's dtype, on its device."""
        # The layers of a model on meta are brought in by accelerate as they are called, from the CPU on.
        device = self.model.device if self.model.device.type != "meta" else torch.device("cpu")
        mask = mask if mask is None else mask.to(device)
        return self.model(input_ids=ids.to(device), attention_mask=mask).last_hidden_state
