"""The nodes of this pack, in the order in which a video is made."""

from comfy_api.latest import ComfyExtension, io

from .conditioning import OpenSoraImageToVideo
from .decode import OpenSoraTiledVAEDecode, OpenSoraTiledVAEEncode, OpenSoraVAELoader
from .latents import OpenSoraEmptyLatentVideo
from .text import OpenSoraT5TextEncode, OpenSoraTextEncoderLoader

NODES: tuple[type[io.ComfyNode], ...] = (
    OpenSoraTextEncoderLoader,
    OpenSoraVAELoader,
    OpenSoraT5TextEncode,
    OpenSoraEmptyLatentVideo,
    OpenSoraImageToVideo,
    OpenSoraTiledVAEDecode,
    OpenSoraTiledVAEEncode,
)


class OpenSoraExtension(ComfyExtension):
    """What the host asks for: the node classes, once the model is known to it."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return list(NODES)
