"""A prompt as CLIP's released tokenizer mends it before it reads it: what is curly, wide, joined or invisible becomes plain.

What is not done is to guess at text that was decoded in a wrong encoding; it is read as it stands.
"""

import html
import html.entities
import re
import unicodedata

_ENTITY = re.compile(r"&#?[0-9A-Za-z]{1,24};")
_TERMINAL = re.compile(r"\x1b\[[\d;]*[A-Za-z]")
_JOINED = "ĲĳŉǱǲǳǄǅǆǇǈǉǊǋǌﬀﬁﬂﬃﬄﬅﬆ"
# Controls that older Windows programs wrote quotes and dashes with.
WINDOWS_CONTROLS = {code: bytes([code]).decode("cp1252", "ignore") or chr(code) for code in range(0x80, 0xA0)}
_INVISIBLE = dict.fromkeys([*range(0x09), 0x0B, *range(0x0E, 0x20), 0x7F, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD)])


def mend(text: str) -> str:
    """Straight quotes, narrow letters, ligatures apart, lines that end in "\\n", no control characters, NFC.

    HTML's names for characters are replaced too, up to the line with the first "<".

    Source: the behaviour of ftfy.fix_text (6.3) in its default settings, which transformers' CLIPTokenizer calls where it is installed.
    """
    first_tag = text.find("<")
    end = text.rfind("\n", 0, first_tag) + 1 if first_tag >= 0 else len(text)
    return plain(text[:end], True) + plain(text[end:])


def plain(text: str, has_entities: bool = False) -> str:
    """Characters in their plain form, and HTML's names for them where has_entities says so."""
    before = None
    while text != before:  # what one replacement leaves, another may take
        before = text
        if has_entities:
            text = _ENTITY.sub(_character, text)
        text = text.replace("\r\n", "\n").replace("\r", "\n").translate(_PLAIN)
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # pairs are joined, others become U+FFFD
        text = unicodedata.normalize("NFC", _TERMINAL.sub("", text).translate(_INVISIBLE))
    return text


def _character(entity: re.Match) -> str:
    """What "&eacute;", "&#233;" or "&EACUTE;" stands for; the text itself where that is nothing."""
    text, name = entity[0], entity[0][1:]
    if name in html.entities.html5:
        return html.entities.html5[name]
    plain = html.unescape(text)
    if name.startswith("#"):
        return text if ";" in plain else plain
    return html.entities.html5.get(name.lower(), text).upper() if name.isupper() and plain == text else text


def _plain_characters() -> dict[int, str]:
    """Code point -> what is written for it."""
    plain = {0x3000: " ", 0x2028: "\n", 0x2029: "\n"}
    plain |= dict.fromkeys(map(ord, "\u02bc\u2018\u2019\u201a\u201b"), "'") | dict.fromkeys(map(ord, "\u201c\u201d\u201e\u201f"), '"')
    plain |= {code: unicodedata.normalize("NFKC", chr(code)) for code in range(0xFF01, 0xFFF0)}
    for letter in _JOINED:
        plain[ord(letter)] = "".join(chr(int(code, 16)) for code in unicodedata.decomposition(letter).split()[1:])
    return plain | WINDOWS_CONTROLS


_PLAIN = _plain_characters()
