"""Write mended.json: 300 prompts as people's editors leave them, and what ftfy makes of each. Needs ftfy 6.3.

python tests/golden/make_mended.py
"""

import json
import unicodedata
from pathlib import Path

import ftfy

PROMPTS = [
    "the circle's edge is \"red\" and fine", "a finite flock of waffles", "a cat's cradle, it's 5 o'clock", "rain & sea, 24 FPS.", "office fluff: 1 < 2",
    "naïve café, crème brûlée", "Ångström's dog", "žluťoučký kůň", "ñandú y cigüeña", "hồ Hoàn Kiếm", "北京的一只猫", "東京タワーの夜", "서울의 밤하늘",
    "красный круг", "κόκκινος κύκλος", "दिल्ली में बारिश", "عربة حمراء", "a cat 🐈 on a mat", "👩‍🚀 on the moon", "flags 🇩🇪 🇯🇵", "10 % of 20 °C",
    "½ cup of tea", "a → b", "“already” curly", "ends with a quote\"", "(word:1.3) and [brackets]", "tabs\tand  spaces ", "x² + y² = z²", "ﬁrst ﬂight", "",
]  # fmt: skip


def curly(text):
    return text.replace("'", "’").replace(' "', " “").replace('"', "”")


def low(text):
    return "‚" + text.replace("'", "‛") + "‘ „" + text + "‟ ʼ"


def wide(text):
    return "".join(chr(ord(letter) + 0xFEE0) if "!" <= letter <= "~" else letter for letter in text).replace(" ", "\u3000")


def joined(text):
    pairs = {"ffi": "ﬃ", "ff": "ﬀ", "fi": "ﬁ", "fl": "ﬂ", "st": "ﬆ"}
    for plain, letter in pairs.items():
        text = text.replace(plain, letter)
    return f"Ĳssel {text} ŉ ǅ ﬅ"


def apart(text):
    return unicodedata.normalize("NFD", text)


def invisible(text):
    return "\ufeff" + "\x07".join(text.split("a")) + "\x1f\u206c\ufffc\x7f"


def lines(text):
    return text.replace(" ", "\r\n", 1).replace(" ", "\u2028", 1).replace(" ", "\r", 1) + "\u2029\n"


def entities(text):
    return f"&quot;{text}&quot; &eacute;&EACUTE;&#8217;&#x1F408; &amp;lt; &nothing; R&D; &copy"


def coloured(text):
    return f"\x1b[31;1m{text}\x1b[0m"


def halves(text):
    return f"{text} ｶﾞﾗｽ ￥￡ \ud83d\ude00 \ud83d"


CHANGES = (curly, low, wide, joined, apart, invisible, lines, entities, coloured, halves)


def main():
    texts = [change(prompt) for prompt in PROMPTS for change in CHANGES]
    pairs = [[text, ftfy.fix_text(text)] for text in texts]
    Path(__file__).with_name("mended.json").write_text(json.dumps(pairs, indent=0) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
