"""A short prompt made the long description that the models were trained on, by any text model: what it is asked, and what is read of its answer.

Pure text. Who runs a text model stands elsewhere: ComfyUI's in nodes/text.py, a folder of transformers' in commands/refine.py.
"""

import re

from .prompt import MOTION_SCORE, MOTION_SCORE_RANGE

TEXT, IMAGE = KINDS = ("text to video", "image to video")

_RULES = """Rules:
- Write English, whatever language the request is in; one paragraph of 80 to 120 words in the present tense, in everyday words.
- Keep everything that the request names, as it names it. {open}
- Say what moves and how, in the order in which it happens; say whether the camera moves.
- It is one continuous shot of a few seconds. No cuts, no sounds, no thoughts; written words in the picture only if the request asks for them.
- Begin with what is seen, for instance "A close-up of" or "A view of". No heading, no list, no remark.
After the paragraph write one line more, "Motion score: N", a whole number for how much moves: 1 is a still scene, 4 is calm movement such as a person \
walking, 15 is as wild as an explosion."""
_OPEN = "Where it leaves something open, decide: how things look, where they are, the light, the time of day, how near the camera is."
_TASKS = {
    TEXT: "Write the caption of a short video that shows what the request below asks for. A model draws the video from your words alone.",
    IMAGE: "Write the caption of a short video whose first frame is a given picture. A model has the picture, and draws from your words how it goes on.",
}
_GOES_ON = "and give most words to what happens. If the request asks for no movement, choose"
_PICTURE = {
    True: f"The picture is before you: name its subject and its setting in a few words, true to what you see, {_GOES_ON} one that suits the picture.",
    False: f"You do not see the picture: describe no looks beyond what the request names, {_GOES_ON} a calm one.",
}

_THOUGHTS = re.compile(r"<(think|thinking|thought)>.*?(?:</\1>|\Z)", re.S)
_SCORE = re.compile(r"[\s*_#>-]*motion score\W{1,6}(\d{1,3})\b[^\n]*|\b(\d{1,3}) motion score\.?", re.I)
_LABEL = re.compile(r"\A\W*(?:video )?(?:caption|description|prompt)\W*:\W*", re.I)


def asked(prompt: str, kind: str = TEXT, sees_picture: bool = False) -> str:
    """What a text model is asked. kind: one of KINDS. sees_picture: whether the model is given the picture too."""
    open_ = _OPEN if kind == TEXT else _PICTURE[sees_picture]
    return f"{_TASKS[kind]}\n{_RULES.format(open=open_)}\n\nRequest: {prompt.strip() or '(none)'}"


def answered(answer: str, prompt: str) -> tuple[str, int]:
    """(the description, the motion score that is proposed) of a text model's answer, whatever it wrapped them in.

    An answer without a description leaves the prompt as it was, one without a score proposes the released 4.
    """
    text = _THOUGHTS.sub("", answer.replace("\0", ""))
    scores = [int(one or other) for one, other in _SCORE.findall(text)]
    text = _LABEL.sub("", _SCORE.sub("", text).replace("```", " ").replace("**", ""))
    text = " ".join(text.split()).strip("\"'“”「」 ")
    low, high = MOTION_SCORE_RANGE
    return text or prompt.strip(), min(max(scores[-1], low), high) if scores else MOTION_SCORE
