"""Open-Sora for ComfyUI. The host calls `comfy_entrypoint`; nothing of the host or of torch is imported before that."""

NEEDED = "0.33.0"  # also in pyproject.toml, requires-comfyui (a test compares)
WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """The extension that lists this pack's nodes.

    Raises:
        ImportError: a host so old that parts of it which the nodes import are not there yet; it shows the sentence in its log.
    """
    try:
        from .nodes import OpenSoraExtension
    except ImportError as error:
        raise ImportError(
            f"Open-Sora needs ComfyUI {NEEDED} or newer, with all that its requirements.txt names; here: {error}. Update ComfyUI."
        ) from error
    return OpenSoraExtension()
