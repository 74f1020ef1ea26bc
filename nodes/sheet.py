"""Choosing between drafts: a batch of videos laid out as one."""

from comfy_api.latest import io

from ..opensora_core.errors import OpenSoraError
from ..opensora_core.media.contact_sheet import contact_sheet
from .host.node import Node, outputs


class OpenSoraContactSheet(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OpenSoraContactSheet",
            category="Open-Sora/video",
            inputs=[
                io.Image.Input("images"),
                io.Latent.Input("latent"),
                io.Int.Input("columns", default=0, min=0, max=16),
                io.Boolean.Input("numbers", default=True),
            ],
            outputs=outputs(sheet=io.Image),
        )

    @classmethod
    def execute(cls, images, latent, columns, numbers) -> io.NodeOutput:
        number = latent["samples"].shape[0]
        if images.ndim != 4 or images.shape[-1] < 3 or images.shape[0] % number:
            raise OpenSoraError(
                f"{list(images.shape)} is not the frames of {number} videos of one length; connect the decode of the same latent."
            )
        videos = images[..., :3].reshape(number, -1, *images.shape[1:3], 3)
        return io.NodeOutput(contact_sheet(videos, columns, [str(index) for index in range(number)] if numbers else None))
