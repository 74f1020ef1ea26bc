"""Small files that others wrote: what is no text, no JSON object, endless or no file is one sentence."""

import os

import pytest

from opensora_core.errors import CheckpointError, OpenSoraError
from opensora_core.readers import is_file, json_object, kind_of, read_json, read_text


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", '"x"', "[" * 100_000, '{"a":' * 50_000, '{"a": ' + "9" * 5000 + "}", b"\xff\xfe{"]
)
def test_what_is_no_object_is_one_sentence(text):
    with pytest.raises(CheckpointError, match="^Download the file again: the note (is not readable JSON|holds)"):
        json_object(text, "The note")


def test_an_object_is_read():
    assert json_object(b'{"a": [1]}', "x") == {"a": [1]}


def test_a_file_is_read_within_bounds(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')  # as editors on Windows begin a file
    assert read_json(path) == {"a": 1}
    with pytest.raises(CheckpointError, match=r"a\.json has more than 4 bytes"):
        read_json(path, 4)
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(OpenSoraError, match=r"Save the file in UTF-8: a\.json is not UTF-8 text \(line 1\)"):
        read_text(path)
    with pytest.raises(CheckpointError, match=r"b\.json cannot be read"):
        read_json(tmp_path / "b.json")


@pytest.mark.skipif(os.name != "posix", reason="pipes as files")
def test_what_may_never_end_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert [kind_of(path) for path in (tmp_path, tmp_path / "pipe", tmp_path / "none")] == ["a folder", "a pipe", None]
    with pytest.raises(CheckpointError, match="pipe is a pipe"):
        read_json(tmp_path / "pipe")


@pytest.mark.parametrize("name", ["none", "a\0b", "x" * 5000, "\ud800"])
def test_what_cannot_be_a_file_is_none(tmp_path, name):
    assert not is_file(tmp_path / name) and kind_of(tmp_path / name) is None
