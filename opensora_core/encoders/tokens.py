"""From text to token ids on the command line: where the tokenizer's files are, and reading them.

T5's SentencePiece model is read by the sentencepiece library itself, which is what the reference's slow tokenizer
did (transformers 5 needs protobuf for that file); every other form goes through transformers. Nothing is downloaded.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from ..text.prompt import CLIP_LENGTH, T5_LENGTH, dropped_sentence, fit_tokens
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

_T5_SENTINELS = 100  # <extra_id_0> to <extra_id_99>, where the tokenizer's files say nothing else


@dataclass(frozen=True)
class Tokenizer:
    """An encoder's tokenizer.

    Attributes:
        kind: T5 or CLIP.
        ids: text -> token ids with the start token (CLIP) and the end-of-text token, neither padded nor cut.
        pad: id to pad with.
        end: id of the end-of-text token.
        size: one more than the highest id; the encoder's table must have as many rows.
        length: tokens of a text as its encoder is given it, padded or cut; see text_length.
        folder: where it was read.
    """

    kind: str
    ids: Callable[[str], list[int]]
    pad: int
    end: int
    size: int
    length: int
    folder: Path

    def fitted(self, text: str) -> tuple[list[int], str]:
        """A text's ids, padded or cut to `length`, and a sentence if its end was dropped, else ""."""
        ids, dropped = fit_tokens(list(self.ids(text)), self.length, self.pad)
        return ids, dropped_sentence(self.kind, dropped, self.length)


def find_tokenizer(kind: str, encoder: Path, chosen: str | Path | None = None) -> Path:
    """The folder of an encoder's tokenizer.

    Args:
        kind: T5 or CLIP.
        encoder: the encoder's file or hub folder; its tokenizer may lie beside it or in it.
        chosen: a folder to look in instead, itself or with the usual subfolders.

    Raises:
        CheckpointError: none was found; says which files to put where.
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
        raise CheckpointError(f"There is no {kind} tokenizer in {chosen}; it needs {_FILES[kind]}.")
    raise CheckpointError(
        f"No {kind} tokenizer was found for {encoder.name}: put {_FILES[kind]} beside it, name their folder with --tokenizers, "
        "or set COMFYUI_PATH to a ComfyUI, which brings them."
    )


def read_tokenizer(kind: str, folder: Path) -> Tokenizer:
    """Read a tokenizer from a folder that find_tokenizer returned.

    Raises:
        CheckpointError: its files are damaged.
    """
    try:
        if kind == T5 and (folder / "spiece.model").is_file():
            return _sentencepiece(folder)
        return _transformers(kind, folder)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"The {kind} tokenizer in {folder} cannot be read: {error}") from error


def text_length(kind: str, folder: Path) -> int:
    """How many tokens of a text the encoder of a tokenizer reads: CLIP 77, T5 512 or what its files say if that is less.

    A model that was trained with shorter texts says so by "model_max_length" in tokenizer_config.json: text tokens are attended
    without a mask, so that more padding would change its pictures.
    """
    if kind == CLIP:
        return CLIP_LENGTH
    length = _settings(folder).get("model_max_length")
    # Libraries write an enormous number where none is known.
    return length if isinstance(length, int) and 1 < length < T5_LENGTH else T5_LENGTH


def _settings(folder: Path) -> dict:
    """tokenizer_config.json, {} where there is none."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    settings = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        raise ValueError(f"{path.name} holds no settings")
    return settings


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
    if kind == T5 and (folder / "spiece.model").is_file():
        return True
    if kind == CLIP and (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return True
    try:
        with open(folder / "tokenizer.json", encoding="utf-8") as file:
            return json.load(file)["model"]["type"] == _ALGORITHM[kind]
    except (OSError, ValueError, KeyError, TypeError):
        return False  # absent, or not such a file: the search goes on


def _sentencepiece(folder: Path) -> Tokenizer:
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    pieces = model.get_piece_size()
    sentinels = _settings(folder).get("extra_ids", _T5_SENTINELS)
    specials = {text: model.piece_to_id(text) for text in ("</s>", "<pad>", "<unk>")}
    # Sentinels stand after the pieces, counted down: <extra_id_0> is the last.
    specials |= {f"<extra_id_{number}>": pieces + sentinels - 1 - number for number in range(sentinels)}
    pattern = re.compile("(" + "|".join(map(re.escape, specials)) + ")")

    def ids(text: str) -> list[int]:
        parts = [part for part in pattern.split(text) if part]
        tokens = [[specials[part]] if part in specials else model.encode(part) for part in parts]
        return [*(token for part in tokens for token in part), model.eos_id()]

    return Tokenizer(T5, ids, model.pad_id(), model.eos_id(), pieces, text_length(T5, folder), folder)


def _transformers(kind: str, folder: Path) -> Tokenizer:
    import transformers

    # The fast classes give the same ids in transformers 4 and 5, and the host's; version 4's slow CLIP tokenizer reads
    # typographic quotes and Chinese in other ways, depending on whether ftfy is installed.
    reader = transformers.T5TokenizerFast if kind == T5 else transformers.CLIPTokenizerFast
    tokenizer = reader.from_pretrained(str(folder), local_files_only=True)

    def ids(text: str) -> list[int]:
        return tokenizer(text, truncation=False, verbose=False)["input_ids"]

    sentinels = _T5_SENTINELS if kind == T5 else 0  # not part of the pieces, as above
    highest = max(index for token, index in tokenizer.get_vocab().items() if not (sentinels and token.startswith("<extra_id_")))
    return Tokenizer(kind, ids, tokenizer.pad_token_id, tokenizer.eos_token_id, highest + 1, text_length(kind, folder), folder)
