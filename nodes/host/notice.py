"""A line that a person sees: on the node while it runs, and in the log."""

import logging

import comfy_execution.progress
import comfy_execution.utils
from server import PromptServer

logger = logging.getLogger(__name__)

INFO = logging.INFO


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
        # A node that another one stands for is not on the canvas; what it says is shown on that one.
        server.send_progress_text(text, comfy_execution.progress.get_progress_state().dynprompt.get_display_node_id(node_id))


def executing_node() -> str | None:
    """The unique id of the node that is running now, for objects that one node makes and another uses; None outside a graph."""
    context = comfy_execution.utils.get_executing_context()
    return None if context is None else context.node_id
