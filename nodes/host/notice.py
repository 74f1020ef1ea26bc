"""A line that a person sees: on the node while it runs, and in the log."""

import json
import logging
from pathlib import Path

import comfy_execution.progress
import comfy_execution.utils
import folder_paths
from server import PromptServer

logger = logging.getLogger(__name__)

INFO = logging.INFO
_language: list[str] = []


def show(text: str, node_id: str | None, level: int = logging.WARNING) -> None:
    """Show one line.

    Args:
        text: a sentence; empty does nothing.
        node_id: the node's unique id (a string, "25:24" inside subgraphs), or None when it runs outside a graph.
    """
    if not text:
        return
    logger.log(level, "Open-Sora: %s", text)
    server = getattr(PromptServer, "instance", None)
    if server is not None and node_id:
        _send(server, text, shown_on(node_id))


def shown_on(node_id: str) -> str:
    """The node on a canvas that a running one is seen on: a node that another one stands for is not on the canvas itself."""
    return comfy_execution.progress.get_progress_state().dynprompt.get_display_node_id(node_id)


def _send(server, text: str, node_id: str) -> None:
    """Send to a node, and to those on whose inside it lies ("14:6" is inside "14"): whichever of them a person looks at."""
    parts = node_id.split(":")
    for depth in range(len(parts), 0, -1):
        server.send_progress_text(text, ":".join(parts[:depth]), server.client_id)


def language() -> str:
    """The language of the front-end: as the last page said that opened, else as its user chose it, else English."""
    return _language[-1] if _language else _chosen_language()


def speak(locale: str) -> None:
    """Note the language of a page that has opened."""
    _language[:] = [locale]


def _chosen_language() -> str:
    try:
        settings = Path(folder_paths.get_user_directory(), "default", "comfy.settings.json").read_text(encoding="utf-8")
        return str(json.loads(settings).get("Comfy.Locale", "en"))
    except (OSError, ValueError, AttributeError, RecursionError):
        return "en"


def executing_node() -> str | None:
    """The unique id of the node that is running now, for objects that one node makes and another uses; None outside a graph."""
    context = comfy_execution.utils.get_executing_context()
    return None if context is None else context.node_id
