"""Choosing between drafts: a batch of videos laid out as one."""

from comfy_api.latest import io

from ..opensora_core.errors import OpenSoraError
from ..opensora_core.media.contact_sheet import contact_sheet
from .host.node import Node


class OpenSoraContactSheet(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OpenSoraContactSheet",
            display_name="Open-Sora Contact Sheet",
            category="Open-Sora/video",
            description="Lays the videos of a batch side by side, each with its number, to choose one of them: as one video, so that movement is seen.",
            search_aliases=["open sora grid", "contact sheet", "compare seeds", "drafts", "video grid"],
            inputs=[
                io.Image.Input(
                    "images", tooltip="The frames of all videos, one video after the other, as a decode of the latent gives them."
                ),
                io.Latent.Input("latent", tooltip="The latent that they were decoded from; it says how many videos there are."),
                io.Int.Input("columns", default=0, min=0, max=16, tooltip="Videos in a row. 0 = as near to a square as it can be."),
                io.Boolean.Input(
                    "numbers",
                    default=True,
                    tooltip="On = each shows its batch_index, for Get Latent From Batch (0 is the first). Off = none.",
                ),
            ],
            outputs=[io.Image.Output(display_name="sheet", tooltip="The frames of one video that shows all, for Create Video.")],
        )

    @classmethod
    def execute(cls, images, latent, columns=0, numbers=True) -> io.NodeOutput:
        number = latent["samples"].shape[0]
        if images.ndim != 4 or images.shape[-1] < 3 or images.shape[0] % number:
            raise OpenSoraError(
                f"{list(images.shape)} is not the frames of {number} videos of one length; connect the decode of the same latent."
            )
        videos = images[..., :3].reshape(number, -1, *images.shape[1:3], 3)
        return io.NodeOutput(contact_sheet(videos, columns, [str(index) for index in range(number)] if numbers else None))
