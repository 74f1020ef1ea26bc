"""Models kept loaded beyond their use, where a person asks for it: up to a limit, the least recently used given up first.

The host wins: "Free model and node cache" (/free with free_memory) gives all of them up, and where RAM runs short by the host's own
measure they go. Neither is announced to a node pack, so the first is seen as the server answers it, and the second is looked at
whenever a file is asked for and whenever something that was given out here dies.
"""

import logging
import weakref

import comfy.memory_management
import psutil
from server import PromptServer

from ...opensora_core.loaded import SHARED

logger = logging.getLogger(__name__)

_FREE = ("/free", "/api/free")


def set_limit(gib: float, kinds: tuple[str, ...]) -> None:
    """Keep up to so many GiB from now on, also of what is loaded of these kinds of the shared cache. 0 keeps none.

    Raises:
        OpenSoraError: no amount of memory.
    """
    SHARED.keep_up_to(gib, kinds)
    yield_to_host()


def is_on() -> bool:
    """Whether what is loaded now may be kept."""
    yield_to_host()
    return SHARED.keep_limit_gib > 0 and not _is_free_awaited()


def watch(given) -> None:
    """Look at the host's memory when this MODEL, CLIP or VAE dies."""
    weakref.finalize(given, yield_to_host).atexit = False


def yield_to_host() -> None:
    """Give up what is kept, the least recently used first, as long as less RAM is available than the host wants free."""
    while psutil.virtual_memory().available < comfy.memory_management.RAM_CACHE_HEADROOM:
        name = SHARED.give_up_oldest()
        if name is None:
            return
        logger.info("RAM is short; %s is not kept loaded any more.", name)


def listen() -> None:
    """Have /free give up what is kept. To be called before the host's server starts."""
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.app.on_response_prepare.append(_answered)


async def _answered(request, response) -> None:
    if request.method == "POST" and request.path in _FREE and response.status == 200 and (await request.json()).get("free_memory"):
        SHARED.release()  # whoever uses them still does, until the host has let go too


def _is_free_awaited() -> bool:
    """Whether /free came while a prompt runs: the host lets go when that ends."""
    queue = getattr(getattr(PromptServer, "instance", None), "prompt_queue", None)
    return queue is not None and bool(queue.get_flags(reset=False).get("free_memory"))
