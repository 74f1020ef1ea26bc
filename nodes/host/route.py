"""The pack's one route on the host's server, POST /open_sora/text: what its page asks while a person types. Nothing goes out."""

from bisect import bisect_right
from functools import cache

from server import PromptServer, web

from ...opensora_core.encoders.tokens import Tokenizer, find_tokenizer, read_tokenizer
from ...opensora_core.families.table import DEFAULT
from ...opensora_core.geometry import resolution_size
from ...opensora_core.run.files import SMALL
from ...opensora_core.text.recipe import CLIP, T5, Said
from . import notice, paths, preview, text

PATH = "/open_sora/text"
_LONGEST = 20_000  # characters of a prompt that are counted


def listen() -> None:
    """Answer at PATH, once."""
    server = getattr(PromptServer, "instance", None)
    if server is None or any(getattr(route, "path", "") == PATH for route in server.routes):
        return

    @server.routes.post(PATH)
    async def answer(request: web.Request) -> web.Response:
        try:
            return web.json_response(reply(await request.json()))
        except (ValueError, TypeError, KeyError, AttributeError) as error:  # an OpenSoraError is a ValueError
            return web.json_response({"error": str(error)[:200]}, status=400)


def reply(asked: dict) -> dict:
    """What is said to a page.

    asked: {locale, page}, the language of a page that has opened or runs something and its client id, answered by what preview.now says;
    {size: [resolution, aspect ratio, multiple]}, answered by {size: [width, height]}; or {prompt, motion_score, fps, loaders: [T5's file,
    CLIP's]}, by {text, t5, clip, dropped}: the prompt as read, [tokens, most] of each encoder, and the end of it that T5 would not read.
    """
    if "locale" in asked:
        notice.spoken[:] = [str(asked["locale"])[:20]]
        preview.pages.add(str(asked.get("page", "")))
        return preview.now()
    if "size" in asked:
        resolution, ratio, multiple = asked["size"]
        height, width = resolution_size(str(resolution), str(ratio), int(multiple or 16))
        return {"size": [width, height]}
    words = DEFAULT.text.words(str(asked["prompt"])[:_LONGEST], Said(int(asked.get("fps") or 0), int(asked.get("motion_score") or 0)))
    loaders = zip((T5, CLIP), asked.get("loaders", ["", ""]), strict=True)
    t5, clip = (_tokenizer(kind, name == paths.SMALL) for kind, name in loaders)
    counts = {name: [len(one.ids(words)), one.length] for name, one in (("t5", t5), ("clip", clip))}
    parts = words.split(" ")
    too_many = bisect_right(range(len(parts) + 1), t5.length, key=lambda count: len(t5.ids(" ".join(parts[:count]))))
    return {"text": words, **counts, "dropped": " ".join(parts[too_many - 1 :])[-80:]}


@cache
def _tokenizer(kind: str, is_small: bool) -> Tokenizer:
    """The built-in model's, or the host's own."""
    return read_tokenizer(kind, find_tokenizer(kind, SMALL, SMALL)) if is_small else text.host_tokenizer(kind)
