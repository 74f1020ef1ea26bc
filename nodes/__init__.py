"""The nodes of this pack, in the order in which a video is made."""

from comfy_api.latest import ComfyExtension, io

from .calibrate import OpenSoraCalibrate
from .conditioning import OpenSoraImageToVideo, OpenSoraMaskStrategy, OpenSoraVideoToVideo
from .dataset import OpenSoraVideoDataset
from .decode import OpenSoraContactSheet, OpenSoraTiledVAEDecode, OpenSoraTiledVAEEncode, OpenSoraVAELoader
from .flux import OpenSoraFluxPicture, OpenSoraFluxToVideo
from .host import keep, moving, route, selftest
from .host.families import register
from .latents import OpenSoraEmptyLatent, OpenSoraEmptyLatentHighCompression, OpenSoraEmptyLatentVideo
from .loaders import OpenSoraLoraLoader, OpenSoraModelLoader
from .long import OpenSoraContinueVideo
from .memory import OpenSoraLoadedModels, OpenSoraOffload, OpenSoraPreflight, OpenSoraQuantize
from .sampling import OpenSoraDefaults, OpenSoraGuider, OpenSoraRectifiedFlowSampler, OpenSoraScheduler
from .text import OpenSoraPromptHelper, OpenSoraPromptList, OpenSoraT5TextEncode, OpenSoraTextEncoderLoader

NODES: tuple[type[io.ComfyNode], ...] = (
    OpenSoraModelLoader,
    OpenSoraTextEncoderLoader,
    OpenSoraVAELoader,
    OpenSoraLoraLoader,
    OpenSoraT5TextEncode,
    OpenSoraPromptList,
    OpenSoraEmptyLatentVideo,
    OpenSoraImageToVideo,
    OpenSoraVideoToVideo,
    OpenSoraScheduler,
    OpenSoraGuider,
    OpenSoraRectifiedFlowSampler,
    OpenSoraContinueVideo,
    OpenSoraTiledVAEDecode,
    OpenSoraTiledVAEEncode,
    OpenSoraContactSheet,
    OpenSoraOffload,
    OpenSoraQuantize,
    OpenSoraLoadedModels,
    OpenSoraPreflight,
    OpenSoraFluxPicture,
    OpenSoraFluxToVideo,
    OpenSoraEmptyLatentHighCompression,
    OpenSoraEmptyLatent,
    OpenSoraDefaults,
    OpenSoraMaskStrategy,
    OpenSoraCalibrate,
    OpenSoraPromptHelper,
    OpenSoraVideoDataset,
)


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
