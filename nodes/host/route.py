"""The pack's one route on the host's server, POST /open_sora/text: what its page asks while a person types; and the order of our templates in
the host's own list. Nothing goes out."""

import json
from bisect import bisect_right
from functools import cache
from pathlib import Path

from server import PromptServer, web

from ...opensora_core.encoders.tokens import Tokenizer, find_tokenizer, read_tokenizer
from ...opensora_core.families.table import DEFAULT
from ...opensora_core.geometry import resolution_size
from ...opensora_core.run.files import SMALL
from ...opensora_core.text.recipe import CLIP, T5, Said
from . import notice, paths, preview, text

PATH = "/open_sora/text"
_LONGEST = 20_000  # characters of a prompt that are counted
_PACK = Path(__file__).parents[2].name


def listen() -> None:
    """Answer at PATH, once. To be called before the host's server starts."""
    server = getattr(PromptServer, "instance", None)
    if server is None or any(getattr(route, "path", "") == PATH for route in server.routes):
        return
    server.app.middlewares.append(_in_order)

    @server.routes.post(PATH)
    async def answer(request: web.Request) -> web.Response:
        try:
            return web.json_response(reply(await request.json()))
        except (ValueError, TypeError, KeyError, AttributeError) as error:  # an OpenSoraError is a ValueError
            return web.json_response({"error": str(error)[:200]}, status=400)


@web.middleware
async def _in_order(request: web.Request, handler) -> web.StreamResponse:
    """The host's list of templates with ours as they are numbered: it has them as the disk does, which is no order on most of Linux."""
    response = await handler(request)
    if request.path.removeprefix("/api") != "/workflow_templates" or response.status != 200:
        return response
    listed = json.loads(response.text)
    return web.json_response(listed | {name: sorted(found) for name, found in listed.items() if name == _PACK})


def reply(asked: dict) -> dict:
    """What is said to a page.

    asked: {locale, page}, the language of a page that has opened or runs something and its client id, answered by what preview.now says;
    {size: [resolution, aspect ratio, multiple]}, answered by {size: [width, height]}; or {prompt, motion_score, fps, loaders: [T5's file,
    CLIP's]}, by {text, t5, clip, dropped}: the prompt as read, [tokens, most] of each encoder, and the end of it that T5 would not read.
    """
    if "locale" in asked:
        notice.spoken[:] = [str(asked["locale"])[:20]]
        preview.pages.add(page := str(asked.get("page", "")))
        return preview.now(page)
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
