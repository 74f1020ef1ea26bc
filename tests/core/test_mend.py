"""Prompts mended as CLIP's released tokenizer mends them; the recorded results are ftfy's (tests/golden/make_mended.py)."""

import json

import pytest

from opensora_core.text.clean import mend


def test_mended_as_the_reference_does(golden_path):
    pairs = json.loads((golden_path / "mended.json").read_text(encoding="utf-8"))
    assert len(pairs) == 300 and sum(text != mended for text, mended in pairs) > 200
    wrong = [(text, mend(text), mended) for text, mended in pairs if mend(text) != mended]
    assert not wrong, wrong[:5]


@pytest.mark.parametrize(
    ("text", "mended"),
    [
        ("the circle\u2019s edge", "the circle's edge"),
        ("a \u201cred\u201d circle", 'a "red" circle'),
        ("\uff32\uff25\uff24\u3000cat", "RED cat"),
        ("\ufb01ne wa\ufb04es", "fine waffles"),
        ("cafe\u0301", "caf\u00e9"),
        ("a\x00b\x1b[31mc\ufeff", "abc"),
        ("\ud83d\ude00 \ud83d", "\U0001f600 \ufffd"),
        ("&lt;b&gt; &EACUTE; &nothing; R&D;", "<b> \u00c9 &nothing; R&D;"),
        ("&eacute;\n<b> &eacute;", "\u00e9\n<b> &eacute;"),
        ("\x93quoted\x94", '"quoted"'),
    ],
)
def test_mend(text, mended):
    assert mend(text) == mended and mend(mended.split("<")[0]) == mended.split("<")[0]
