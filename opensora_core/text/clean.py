"""How captions were cleaned for Open-Sora 1.0 to 1.3, and so prompts are too: links, markup, marks and shop talk go, letters are lowered.

The rules are those of DeepFloyd IF and PixArt; HTML and damaged characters are read here by the standard library. And how CLIP's released
tokenizer mends a prompt before it reads it: what is curly, wide, joined or invisible becomes plain. What is not done is to guess at text
that was decoded in a wrong encoding; it is read as it stands.
"""

import html
import html.entities
import re
import unicodedata
from html.parser import HTMLParser

_ENDINGS = "com|co|ru|net|org|edu|gov|it"
_FILES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_SITE = rf"[a-z0-9.-]+[.](?:{_ENDINGS})[\w/-]*\b/?(?!@)"
_DASHES = (
    "\u002d\u058a\u05be\u1400\u1806\u2010\u2011\u2012\u2013\u2014\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
    "\ufe31\ufe32\ufe58\ufe63\uff0d"
)
_MARKS = "#®•©™&@·º½¾¿¡§~()[]{}|\\/*"


def _rules(*pairs: tuple[str, str]) -> list[tuple[re.Pattern, str]]:
    return [(re.compile(pattern), by) for pattern, by in pairs]


_LINKS = _rules((rf"\b(?:https?:(?:/{{1,3}}|[a-z0-9%])|{_SITE})", ""), (rf"\b(?:www:(?:/{{1,3}}|[a-z0-9%])|{_SITE})", ""))
_CHARACTERS = _rules(
    (r"@\w+\b", ""),  # people
    ("[\u31c0-\u9fff]+", ""),  # Chinese, Japanese and Korean blocks
    (f"[{re.escape(_DASHES)}]+", "-"),
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    ("&quot;?", ""),
    ("&amp", ""),
    (r"\d{1,3}(?:\.\d{1,3}){3}", " "),  # addresses of machines
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{_FILES})", ""),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (f"[{re.escape(_MARKS)}]+", " "),
    (r"\s+\.\s+", " "),
)
_WORDS = _rules(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # article numbers
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILES})(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # sizes; the second letter is Cyrillic
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)
_JOINTS = re.compile("[-_]")


def clean_caption(text: str) -> str:
    """A prompt as the released scripts clean it, which do it twice over."""
    return _clean_once(_clean_once(text))


def _clean_once(text: str) -> str:
    text = _unquote(text).strip().lower().replace("<person>", "person")
    text = _apply(_CHARACTERS, html_text(_apply(_LINKS, text)))
    if len(_JOINTS.findall(text)) > 3:  # this-is-my-cute-cat
        text = _JOINTS.sub(" ", text)
    text = html.unescape(html.unescape(fix_text(text))).strip()
    return _apply(_WORDS, text).strip()


def _apply(rules: list[tuple[re.Pattern, str]], text: str) -> str:
    for pattern, by in rules:
        text = pattern.sub(by, text)
    return text


def _unquote(text: str) -> str:
    """%20 and + as in an address are spaces, %c3%a9 is é; bytes that are no UTF-8 become U+FFFD."""
    return re.sub(
        "(?:%[0-9a-fA-F]{2})+", lambda found: bytes.fromhex(found[0].replace("%", "")).decode("utf-8", "replace"), text.replace("+", " ")
    )


class _Text(HTMLParser):
    """Collects text outside tags, comments, and elements whose text is not read."""

    HIDDEN = {"script", "style", "template", "rt", "rp"}
    KEPT = {"pre", "textarea"}  # spaces as they are
    VOID = set(
        "area base basefont bgsound br col command embed frame hr image img input isindex keygen link menuitem meta nextid param source spacer "
        "track wbr".split()
    )

    def __init__(self):
        super().__init__(convert_charrefs=False)
        self.parts, self.piece, self.open = [], "", []

    def flush(self):
        piece, self.piece = self.piece, ""
        if piece and not piece.strip("\n\t\x0c\r ") and not self.KEPT & set(self.open):
            piece = "\n" if "\n" in piece else " "
        if not self.HIDDEN & set(self.open):
            self.parts.append(piece)

    def handle_data(self, data):
        self.piece += data

    def handle_charref(self, name):
        self.piece += html.unescape(f"&#{name};")

    def handle_entityref(self, name):
        self.piece += html.entities.html5.get(f"{name};", f"&{name}")

    def handle_starttag(self, tag, attrs):
        self.flush()
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        self.flush()
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_comment(self, data):
        self.flush()

    handle_decl = handle_pi = handle_comment

    def unknown_decl(self, data):
        self.flush()
        if data.upper().startswith("CDATA["):
            self.parts.append(data[len("CDATA[") :])


def html_text(text: str) -> str:
    """What a page shows of a text with markup."""
    parser = _Text()
    parser.feed(text)
    parser.close()
    parser.flush()
    return "".join(parser.parts)


# UTF-8 that was read as Windows-1252. Small letters leave only â€ and one more: dashes, quotes, dots.
_MISREAD = re.compile("â€[\x80-\u2122]")


def fix_text(text: str) -> str:
    """Characters in their plain form: what ftfy.fix_text does to text in small letters."""
    return _plain(_MISREAD.sub(_reread, text.translate(_WINDOWS_CONTROLS)).replace("â€ ", "†"))  # a byte 0xa0 that has become a space


def _reread(found: re.Match) -> str:
    """Read again; text that cannot be as it is."""
    try:
        return found[0].encode("cp1252").decode("utf-8")
    except UnicodeError:
        return found[0]


_ENTITY = re.compile(r"&#?[0-9A-Za-z]{1,24};")
_TERMINAL = re.compile(r"\x1b\[[\d;]*[A-Za-z]")
_JOINED = "ĲĳŉǱǲǳǄǅǆǇǈǉǊǋǌﬀﬁﬂﬃﬄﬅﬆ"
# Controls that older Windows programs wrote quotes and dashes with.
_WINDOWS_CONTROLS = {code: bytes([code]).decode("cp1252", "ignore") or chr(code) for code in range(0x80, 0xA0)}
_INVISIBLE = dict.fromkeys([*range(0x09), 0x0B, *range(0x0E, 0x20), 0x7F, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD)])
_PLAIN = {0x3000: " ", 0x2028: "\n", 0x2029: "\n"}  # what is written for a character
_PLAIN |= dict.fromkeys(map(ord, "\u02bc\u2018\u2019\u201a\u201b"), "'") | dict.fromkeys(map(ord, "\u201c\u201d\u201e\u201f"), '"')
_PLAIN |= {code: unicodedata.normalize("NFKC", chr(code)) for code in range(0xFF01, 0xFFF0)}
_PLAIN |= {ord(letter): "".join(chr(int(code, 16)) for code in unicodedata.decomposition(letter).split()[1:]) for letter in _JOINED}
_PLAIN |= _WINDOWS_CONTROLS


def mend(text: str) -> str:
    """Straight quotes, narrow letters, ligatures apart, lines that end in "\\n", no control characters, NFC.

    HTML's names for characters are replaced too, up to the line with the first "<".

    Source: the behaviour of ftfy.fix_text (6.3) in its default settings, which transformers' CLIPTokenizer calls where it is installed.
    """
    first_tag = text.find("<")
    end = text.rfind("\n", 0, first_tag) + 1 if first_tag >= 0 else len(text)
    return _plain(text[:end], True) + _plain(text[end:])


def _plain(text: str, has_entities: bool = False) -> str:
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
