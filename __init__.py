"""Open-Sora for ComfyUI. The host calls `comfy_entrypoint`; nothing of the host or of torch is imported before that."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """The extension that lists this pack's nodes."""
    from .nodes import OpenSoraExtension

    return OpenSoraExtension()
