"""The small model's tokenizers: the world's words whole, every caption short enough, the same ids from every reader."""

import re

import pytest

from opensora_core.encoders.tokens import read_tokenizer
from opensora_core.evaluation import world
from opensora_core.text.recipe import CLIP, T5
from training import tokenizers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tokenizers.write(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="module")
def t5(folder):
    return read_tokenizer(T5, folder / tokenizers.T5_FOLDER)


@pytest.fixture(scope="module")
def clip(folder):
    return read_tokenizer(CLIP, folder / tokenizers.CLIP_FOLDER)


def test_every_caption_is_read_whole(t5, clip):
    captions = tokenizers.captions()
    assert len(set(captions)) > 2000
    assert "a red circle moving to the left on a gray background. 24 FPS. " in " ".join(captions)
    assert max(len(t5.ids(text)) for text in captions) <= tokenizers.T5_TEXT_LENGTH
    assert max(len(clip.ids(text)) for text in captions) <= 77
    assert not any(2 in t5.ids(text) for text in captions), "an unknown piece"


def test_content_words_are_one_piece(t5, clip):
    words = [*world.SHAPES, *world.COLOURS, *world.BACKGROUNDS, *world.DIRECTIONS, *(str(number) for number in range(1, 16))]
    assert [word for word in words if len(t5.ids(word)) != 2] == []  # itself and the end
    assert [word for word in words if word.isalpha() and len(clip.ids(word)) != 3] == []
    assert len({t5.ids(word)[0] for word in words}) == len(set(words))


def test_ids_that_the_encoders_expect(t5, clip, folder):
    assert (t5.pad, t5.end, t5.ids("")) == (0, 1, [1])
    assert t5.size < 400 and clip.size < 1000
    assert clip.ids("") == [clip.end - 1, clip.end] and clip.end == clip.size - 1 == clip.pad
    assert t5.ids("é\u3042")[-2:] == [2, 1], "what it has no piece for is unknown"
    assert clip.end not in clip.ids("é\u3042!")[1:-1], "every byte has a piece"


def test_the_library_reads_the_same_ids(t5, clip, folder):
    """ComfyUI and others read tokenizer.json or vocab.json through transformers; T5 here is read by sentencepiece."""
    import transformers

    fast = transformers.T5TokenizerFast.from_pretrained(str(folder / tokenizers.T5_FOLDER))
    slow = transformers.CLIPTokenizer.from_pretrained(str(folder / tokenizers.CLIP_FOLDER))
    texts = [*tokenizers.captions()[::25], "A Red circle, 2 dogs & 120 FPS?", "  two  spaces "]
    assert [text for text in texts if fast(text)["input_ids"] != t5.ids(text)] == []
    assert [text for text in texts if slow(text)["input_ids"] != clip.ids(text)] == []
    assert fast.model_max_length == tokenizers.T5_TEXT_LENGTH


def test_capitals_mean_the_same(t5, clip, folder):
    same = tokenizers.spellings(folder / tokenizers.T5_FOLDER)
    for text in ("A Red circle", "A RED CIRCLE", "a red circle", "A red Circle"):
        assert [same.get(token, token) for token in t5.ids(text)] == t5.ids("a red circle")
        assert clip.ids(text) == clip.ids("a red circle")
    assert not set(same) & set(same.values())
    assert [same.get(token, token) for token in t5.ids("24 fps")] == t5.ids("24 FPS")


def test_the_same_files_every_time(folder, tmp_path):
    again = tokenizers.write(tmp_path)
    for path in folder.rglob("*.*"):
        if path.is_file():
            assert (again / path.relative_to(folder)).read_bytes() == path.read_bytes(), path.name
    assert re.search(r'"model_max_length": 32\b', (again / tokenizers.T5_FOLDER / "tokenizer_config.json").read_text())
