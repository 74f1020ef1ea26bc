"""Models kept loaded beyond their use, where a person asks for it: up to a limit, the least recently used given up first.

The host wins: "Free model and node cache" (/free with free_memory) gives all of them up, and where RAM runs short by the host's own
measure they go. Neither is announced to a node pack, so the first is seen as the server answers it, and the second is looked at
whenever a file is asked for and whenever something that was given out here dies.

The host counts its models in a list that only the thread of its queue may change, and a model that dies changes it: so nothing is given
up while the server answers, but on that thread, or a little later while the queue waits.
"""

import asyncio
import gc
import logging
import threading
import weakref

import comfy.memory_management
import psutil
from server import PromptServer

from ...opensora_core.memory.loaded import SHARED

logger = logging.getLogger(__name__)

_FREE = ("/free", "/api/free")
_PATIENCE = 3.0  # seconds for the host to free what is its own

_free_was_asked = threading.Event()


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
    queue = getattr(getattr(PromptServer, "instance", None), "prompt_queue", None)
    is_free_awaited = queue is not None and bool(queue.get_flags(reset=False).get("free_memory"))  # the host lets go when the prompt ends
    return SHARED.keep_limit_gib > 0 and not is_free_awaited


def watch(given) -> None:
    """Look at the host's memory when this MODEL, CLIP or VAE dies."""
    weakref.finalize(given, yield_to_host).atexit = False


def yield_to_host() -> None:
    """Give up what is kept: all of it after /free, else the least recently used as long as less RAM is available than the host wants free."""
    if _free_was_asked.is_set():
        _free_was_asked.clear()
        SHARED.release()  # whoever uses them still does, until the host lets go too
        gc.collect()  # as the host does then: a VAE of its own refers to itself
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
        _free_was_asked.set()
        asyncio.get_running_loop().call_later(_PATIENCE, _free_while_idle)


def _free_while_idle() -> None:
    """Give memory back where nothing of ours has run or died since. With the queue's lock no prompt can begin meanwhile; one that runs will see to it."""
    queue = PromptServer.instance.prompt_queue
    with queue.mutex:
        if not queue.currently_running and not queue.flags:
            yield_to_host()
