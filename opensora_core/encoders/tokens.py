"""From text to token ids on the command line: where the tokenizer's files are, and reading them.

T5's SentencePiece model is read by the sentencepiece library itself, which is what upstream's slow tokenizer did, and its
tokenizer.json by the tokenizers library: versions of transformers differ in what they make of either. Nothing is downloaded.
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from ..readers import read_json
from ..text.clean import mend
from ..text.prompt import CLIP_LENGTH, T5_LENGTH
from ..text.recipe import CLIP, T5

# Relative to a folder a person names, or in which an encoder lies: itself, then the layouts people have.
_FOLDERS = {
    T5: (".", "t5_tokenizer", "google/t5-v1_1-xxl", "tokenizer_2"),
    CLIP: (".", "sd1_tokenizer", "openai/clip-vit-large-patch14", "tokenizer"),
}
_IN_COMFYUI = {T5: "comfy/text_encoders/t5_tokenizer", CLIP: "comfy/sd1_tokenizer"}
_FILES = {
    T5: "spiece.model or tokenizer.json (of google/t5-v1_1-xxl)",
    CLIP: "vocab.json and merges.txt, or tokenizer.json (of openai/clip-vit-large-patch14)",
}
_ALGORITHM = {T5: "Unigram", CLIP: "BPE"}

# What T5's SentencePiece model makes of controls and spaces before it looks: the former are gone, the latter plain.
_SPACES = dict.fromkeys([*range(0x01, 0x09), 0x0B, *range(0x0E, 0x20), 0x7F, 0x8F, 0x9F]) | dict.fromkeys(map(ord, "\t\n\f\r\x85\xa0"), " ")

_MOST_SENTINELS = 10_000
_T5_SENTINELS = 100  # <extra_id_0> to <extra_id_99>, where the tokenizer's files say nothing else


@dataclass(frozen=True)
class Tokenizer:
    """An encoder's tokenizer. kind: T5 or CLIP. folder: where it was read.

    ids: text -> token ids with the start token (CLIP) and the end-of-text token, neither padded nor cut.
    pad, end: ids to pad with and of the end-of-text token. size: one more than the highest id; the encoder's table must have as many rows.
    length: tokens of a text as its encoder is given it, padded or cut; see text_length.
    """

    kind: str
    ids: Callable[[str], list[int]]
    pad: int
    end: int
    size: int
    length: int
    folder: Path

    def fitted(self, text: str) -> tuple[list[int], str]:
        """A text's ids, padded or cut to `length` so that the end-of-text token stays, and a sentence if its end was dropped, else ""."""
        ids = list(self.ids(text))
        if (dropped := len(ids) - self.length) <= 0:
            return ids + [self.pad] * -dropped, ""
        sentence = f"The prompt is {dropped} tokens longer than the {self.length} that {self.kind} reads; its end was dropped."
        return [*ids[: self.length - 1], ids[-1]], sentence


def find_tokenizer(kind: str, encoder: Path, chosen: str | Path | None = None) -> Path:
    """The folder of an encoder's tokenizer. Raises a CheckpointError that says which files to put where, if there is none.

    kind: T5 or CLIP. encoder: the encoder's file or hub folder; its tokenizer may lie beside it or in it.
    chosen: a folder to look in instead, itself or with the usual subfolders.
    """
    if chosen is not None:
        places = [Path(chosen).expanduser() / name for name in _FOLDERS[kind]]
    else:
        beside = encoder if encoder.is_dir() else encoder.parent
        places = [*(beside / name for name in _FOLDERS[kind]), *(root / _IN_COMFYUI[kind] for root in _comfyui_roots(encoder))]
    for place in places:
        if _holds(kind, place):
            return place
    if chosen is not None:
        raise CheckpointError(f"There is no {kind} tokenizer in {chosen}; put {_FILES[kind]} there.")
    raise CheckpointError(
        f"No {kind} tokenizer was found for {encoder.name}; put {_FILES[kind]} beside it, name their folder with --tokenizers, "
        "or set COMFYUI_PATH to a ComfyUI, which brings them."
    )


def read_tokenizer(kind: str, folder: Path) -> Tokenizer:
    """Read a tokenizer from a folder that find_tokenizer returned."""
    try:
        return _t5(folder) if kind == T5 else _clip(folder)
    except Exception as error:  # tokenizers documents no exception types; each means the same to a person
        raise CheckpointError(f"Download the {kind} tokenizer in {folder} again; it cannot be read: {error}") from error


def text_length(kind: str, folder: Path) -> int:
    """How many tokens of a text the encoder of a tokenizer reads: CLIP 77, T5 512 or what its files say if that is less.

    A model that was trained with shorter texts says so by "model_max_length" in tokenizer_config.json: text tokens are attended
    without a mask, so that more padding would change its pictures.
    """
    if kind == CLIP:
        return CLIP_LENGTH
    length = _tokenizer_config(folder).get("model_max_length")
    # Libraries write an enormous number where none is known.
    return length if isinstance(length, int) and 1 < length < T5_LENGTH else T5_LENGTH


def _tokenizer_config(folder: Path) -> dict:
    """tokenizer_config.json, {} where there is none."""
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.is_file() else {}


def _comfyui_roots(encoder: Path) -> Iterator[Path]:
    named = os.environ.get("COMFYUI_PATH")
    if named:
        yield Path(named).expanduser()
    # This package may stand in custom_nodes (perhaps as a link) and the encoder in models/text_encoders.
    for path in (Path(__file__).absolute(), Path(__file__).resolve(), encoder.absolute()):
        yield from path.parents
    yield Path.home() / "comfy" / "ComfyUI"
    yield Path.home() / "ComfyUI"


def _holds(kind: str, folder: Path) -> bool:
    if all((folder / name).is_file() for name in (("spiece.model",) if kind == T5 else ("vocab.json", "merges.txt"))):
        return True
    try:
        return read_json(folder / "tokenizer.json")["model"]["type"] == _ALGORITHM[kind]
    except (ValueError, KeyError, TypeError):
        return False  # absent, or not such a file: the search goes on


def _t5(folder: Path) -> Tokenizer:
    """T5's, as upstream's slow tokenizer reads: a special token in a text is itself, and what stands beside it are texts of their own."""
    if (folder / "spiece.model").is_file():
        from sentencepiece import SentencePieceProcessor

        model = SentencePieceProcessor(model_file=str(folder / "spiece.model"))
        encode, to_id, pieces = model.encode, model.piece_to_id, model.get_piece_size()
    else:
        from tokenizers import Tokenizer as Pieces

        model = Pieces.from_file(str(folder / "tokenizer.json"))
        to_id, pieces = model.token_to_id, sum(not piece.startswith("<extra_id_") for piece in model.get_vocab())

        def encode(text: str) -> list[int]:
            return model.encode(text.translate(_SPACES).strip(), add_special_tokens=False).ids

    sentinels = _tokenizer_config(folder).get("extra_ids", _T5_SENTINELS)
    if type(sentinels) is not int or not 0 <= sentinels <= _MOST_SENTINELS:
        raise CheckpointError(f"tokenizer_config.json gives extra_ids={str(sentinels)[:40]}, which is no number of sentinels")
    specials = {text: to_id(text) for text in ("</s>", "<pad>", "<unk>")}
    # Sentinels stand after the pieces, counted down: <extra_id_0> is the last.
    specials |= {f"<extra_id_{number}>": pieces + sentinels - 1 - number for number in range(sentinels)}
    pattern, end = re.compile("(" + "|".join(map(re.escape, specials)) + ")"), specials["</s>"]

    def ids(text: str) -> list[int]:
        parts = [part for part in pattern.split(text) if part]
        tokens = [token for part in parts for token in ([specials[part]] if part in specials else encode(part))]
        return tokens if tokens[-1:] == [end] else [*tokens, end]

    return Tokenizer(T5, ids, specials["<pad>"], end, pieces, text_length(T5, folder), folder)


def _clip(folder: Path) -> Tokenizer:
    import transformers

    # The fast class gives the same ids in transformers 4 and 5; version 4's slow one reads typographic quotes and Chinese in other
    # ways, depending on whether ftfy is installed. Here the text is always mended.
    tokenizer = transformers.CLIPTokenizerFast.from_pretrained(str(folder), local_files_only=True, model_max_length=CLIP_LENGTH)

    def ids(text: str) -> list[int]:
        return tokenizer(mend(text), truncation=False, verbose=False)["input_ids"]

    size = 1 + max(tokenizer.get_vocab().values())
    return Tokenizer(CLIP, ids, tokenizer.pad_token_id, tokenizer.eos_token_id, size, text_length(CLIP, folder), folder)
