"""The nodes of this pack, in the order in which a video is made."""

from comfy_api.latest import ComfyExtension, io

from . import conditioning, dataset, decode, flux, latents, loaders, long, memory, sampling, text
from .host import keep, moving, route, selftest
from .host.families import register
from .host.node import texts

_FILES = (conditioning, dataset, decode, flux, latents, loaders, long, memory, sampling, text)
_CLASSES = {name: made for file in _FILES for name, made in vars(file).items()}
NODES: tuple[type[io.ComfyNode], ...] = tuple(_CLASSES[name] for name in texts())


class OpenSoraExtension(ComfyExtension):
    """What the host asks for: the model made known, then the node classes."""

    async def on_load(self) -> None:
        self.problem = selftest.problem()
        if not self.problem:
            register()
            keep.listen()
            route.listen()
            await moving.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [selftest.refusing(node, self.problem) for node in NODES] if self.problem else list(NODES)
