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
spoken: list[str] = []  # of the page that opened last, as route.py notes it


def show(text: str, node_id: str | None, level: int = logging.WARNING) -> None:
    """Show one line.

    text: a sentence; empty does nothing. node_id: the node's unique id (a string, "25:24" inside subgraphs), or None when it runs outside a
    graph.
    """
    if not text:
        return
    logger.log(level, "Open-Sora: %s", text)
    server = getattr(PromptServer, "instance", None)
    if server is not None and node_id:
        parts = shown_on(node_id).split(":")
        for depth in range(len(parts), 0, -1):  # also on the nodes inside which it lies ("14:6" is inside "14"): a person looks at either
            server.send_progress_text(text, ":".join(parts[:depth]), server.client_id)


def shown_on(node_id: str) -> str:
    """The node on a canvas that a running one is seen on: a node that another one stands for is not on the canvas itself."""
    return comfy_execution.progress.get_progress_state().dynprompt.get_display_node_id(node_id)


def language() -> str:
    """The language of the front-end: as the last page said that opened, else as its user chose it, else English."""
    if spoken:
        return spoken[-1]
    try:
        settings = Path(folder_paths.get_user_directory(), "default", "comfy.settings.json").read_text(encoding="utf-8")
        return str(json.loads(settings).get("Comfy.Locale", "en"))
    except (OSError, ValueError, AttributeError, RecursionError):
        return "en"


def executing_node() -> str | None:
    """The unique id of the node that is running now, for objects that one node makes and another uses; None outside a graph."""
    context = comfy_execution.utils.get_executing_context()
    return None if context is None else context.node_id
