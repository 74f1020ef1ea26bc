"""Writes the tokenizers of the small model, made from every caption of its world.

    python -m training.tokenizers DIRECTORY

In the files and formats of google/t5-v1_1-xxl and openai/clip-vit-large-patch14, with a few hundred pieces each. The same
captions always give the same files. `demo.tiny` writes the tokenizers of the random checkpoint with the same functions.
"""

import argparse
import io
import json
import re
import struct
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from string import ascii_letters, digits, punctuation

from opensora_core.evaluation import world
from opensora_core.text.prompt import CLIP_LENGTH, MOTION_SCORE_RANGE, decorate

T5_FOLDER = "google/t5-v1_1-xxl"
CLIP_FOLDER = "openai/clip-vit-large-patch14"
T5_TEXT_LENGTH = 32  # tokens, the end included; the longest decorated caption has fewer

_SPACE = "\u2581"  # how SentencePiece writes the space before a word
_NORMAL, _UNKNOWN, _CONTROL = 1, 2, 3  # types of pieces
_WORD_SCORE, _CHARACTER_SCORE = -4.0, -8.0  # log probabilities: a whole word beats its letters

_START, _END = "<|startoftext|>", "<|endoftext|>"
_CLIP_SPLIT = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True)
class T5Recipe:
    """A T5 tokenizer of texts of `length` tokens, with `sentinels` pieces <extra_id_N> above the others (T5's own has 100).

    With `capitals` each word has pieces for "red", "Red" and "RED".
    """

    length: int
    sentinels: int
    capitals: bool


def captions() -> list[str]:
    """Every wording of every combination of the world, as it is encoded, with each motion score in turn; and each score by itself."""
    scores = range(MOTION_SCORE_RANGE[0], MOTION_SCORE_RANGE[1] + 1)
    texts = [
        template.format(**{**combination.__dict__, "direction": words})
        for combination, template in product(world.combinations(), world._TEMPLATES)
        for words in world._WORDS[combination.direction]
    ]
    decorated = [decorate(text, world.FPS, scores[index % len(scores)]) for index, text in enumerate(texts)]
    return decorated + [decorate("a", world.FPS, score) for score in scores]


def write(directory: str | Path) -> Path:
    """Write both tokenizers into `directory`, under the hub repository's folder names, and return it.

    T5: ids 0 pad, 1 end, 2 unknown; each word and number of the captions is one piece; model_max_length 32 is how long a text
    the small model reads. CLIP: every byte can be read, each word of the captions is one piece; the end-of-text id is the highest.
    """
    directory = Path(directory)
    write_t5(directory / T5_FOLDER, captions(), T5Recipe(T5_TEXT_LENGTH, 0, True))
    write_clip(directory / CLIP_FOLDER, captions())
    return directory


def write_t5(folder: Path, sentences: list[str], recipe: T5Recipe) -> None:
    """A SentencePiece unigram model (what our command line reads first) and the same pieces as tokenizer.json.

    The pieces are the sentences' words and numbers, whole, and letters, digits and punctuation, of which other texts are made.
    """
    from sentencepiece import SentencePieceProcessor

    folder.mkdir(parents=True, exist_ok=True)
    words = _words(sentences)
    if recipe.capitals:
        words = {variant: None for word in words for variant in _variants(word)}
    characters = sorted({*ascii_letters, *digits, *punctuation, *"".join(sentences).replace(" ", ""), _SPACE})
    pieces = [*((piece, 0.0, _CONTROL) for piece in ("<pad>", "</s>")), ("<unk>", 0.0, _UNKNOWN)]
    pieces += [(f"{_SPACE}{word}", _WORD_SCORE, _NORMAL) for word in words] + [(piece, _CHARACTER_SCORE, _NORMAL) for piece in characters]
    model = _unigram_model(pieces)
    (folder / "spiece.model").write_bytes(model)
    read = SentencePieceProcessor(model_proto=model)
    vocabulary = [(read.id_to_piece(index), read.get_score(index)) for index in range(read.get_piece_size())]
    _fast_t5(vocabulary, recipe.sentinels).save(str(folder / "tokenizer.json"))
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    settings = {"tokenizer_class": "T5Tokenizer", "model_max_length": recipe.length, "extra_ids": recipe.sentinels}
    write_json(folder / "tokenizer_config.json", settings | special)
    write_json(folder / "special_tokens_map.json", special)


def spellings(folder: Path) -> dict[int, int]:
    """T5 id of a word in other capitals -> id of the word as the captions write it: both need the same embedding.

    The captions hardly ever have capitals, so that training alone would leave "Red" meaning nothing.
    """
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    words = _words(captions())
    same = {variant: word for word in words for variant in _variants(word) if variant not in words}
    return {model.piece_to_id(f"{_SPACE}{variant}"): model.piece_to_id(f"{_SPACE}{word}") for variant, word in same.items()}


def _words(sentences: list[str]) -> list[str]:
    return sorted(set(re.findall(r"[^\W\d_]+|\d+", " ".join(sentences))))


def _variants(word: str) -> list[str]:
    return sorted({word, word.lower(), word.capitalize(), word.upper()})


def _unigram_model(pieces: list[tuple[str, float, int]]) -> bytes:
    """A SentencePiece model file of (piece, log probability, type), with the library's own text normalisation.

    The library's trainer only considers pieces that it meets in several words, so it cannot be asked for whole ones; it gives
    the file's other parts. Source of the format: google/sentencepiece, src/sentencepiece_model.proto (ModelProto).
    """
    from sentencepiece import SentencePieceTrainer

    trained = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([ascii_letters, digits]),
        model_writer=trained,
        vocab_size=100,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    written = [
        _field(1, _field(1, piece.encode()) + b"\x15" + struct.pack("<f", score) + bytes([0x18, kind])) for piece, score, kind in pieces
    ]
    kept = [_field(number, value) for number, value in _fields(trained.getvalue()) if number != 1]
    return b"".join(written + kept)


def _field(number: int, value: bytes) -> bytes:
    """A length-delimited protobuf field."""
    length, size = bytearray(), len(value)
    while size > 127:
        length.append(size & 127 | 128)
        size >>= 7
    return bytes([number << 3 | 2, *length, size]) + value


def _fields(message: bytes) -> list[tuple[int, bytes]]:
    """(number, value) of a message whose fields are all length-delimited."""
    found, at = [], 0
    while at < len(message):
        number, at, size, shift = message[at] >> 3, at + 1, 0, 0
        while True:
            byte, at = message[at], at + 1
            size |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        found.append((number, message[at : at + size]))
        at += size
    return found


def _fast_t5(vocabulary: list[tuple[str, float]], sentinels: int):
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    fast = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    steps = [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    fast.normalizer = normalizers.Sequence(steps)
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.decoder = decoders.Metaspace()
    fast.add_special_tokens(["<pad>", "</s>", "<unk>", *(f"<extra_id_{index}>" for index in reversed(range(sentinels)))])
    fast.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return fast


def write_clip(folder: Path, sentences: list[str], start: int | None = None) -> None:
    """Byte-level BPE: every byte, every byte at a word's end, and the words of the sentences.

    Args:
        start: id of the start token, the end being the next; None = directly above the pieces.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(ByteLevel.alphabet())
    merges = _merges(sorted(set(re.findall("[a-z]+", " ".join(sentences).lower()))))
    tokens = [*alphabet, *(f"{byte}</w>" for byte in alphabet), *(left + right for left, right in merges)]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    start = len(vocabulary) if start is None else start
    vocabulary |= {_START: start, _END: start + 1}
    write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges), ""]), encoding="utf-8")
    _fast_clip(vocabulary, merges).save(str(folder / "tokenizer.json"))
    special = {name: _END for name in ("eos_token", "unk_token", "pad_token")} | {"bos_token": _START}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": CLIP_LENGTH, "do_lower_case": True}
    write_json(folder / "tokenizer_config.json", settings | special)
    write_json(folder / "special_tokens_map.json", special)


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """Pairs to merge, commonest first, until every word is one piece; ties go to the alphabet."""
    parts = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges = []
    while pairs := Counter(pair for word in parts for pair in pairwise(word)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word in parts:
            for index in range(len(word) - 2, -1, -1):
                if (word[index], *word[index + 1 : index + 2]) == best:
                    word[index : index + 2] = ["".join(best)]
    return merges


def _fast_clip(vocabulary: dict[str, int], merges: list[tuple[str, str]]):
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    model = models.BPE(vocabulary, merges, continuing_subword_prefix="", end_of_word_suffix="</w>", fuse_unk=False, unk_token=_END)
    fast = Tokenizer(model)
    fast.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    split = pre_tokenizers.Split(Regex(_CLIP_SPLIT), behavior="removed", invert=True)
    fast.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([_START, _END])
    ends = [(_END, vocabulary[_END]), (_START, vocabulary[_START])]
    fast.post_processor = processors.RobertaProcessing(*ends, trim_offsets=False, add_prefix_space=False)
    return fast


def write_json(path: Path, value) -> None:
    """As the hub's files are written: readable, in UTF-8."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory")
    print(write(parser.parse_args().directory))
