"""The prompt helper: a few words made the long description that the models were trained on, with a text model of the user's own."""

from comfy_api.latest import io, ui

from ..opensora_core.errors import OpenSoraError
from ..opensora_core.text.prompt import MOTION_SCORE
from ..opensora_core.text.refine import IMAGE, KINDS
from .host import inputs, refine
from .host.node import Node, outputs


class OpenSoraPromptHelper(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OpenSoraPromptHelper",
            category="Open-Sora/conditioning",
            inputs=[
                io.Clip.Input("clip", lazy=True),
                io.String.Input("prompt", multiline=True, dynamic_prompts=True),
                inputs.choice("kind", KINDS),
                inputs.seed(),
                io.Int.Input("max_length", default=512, min=16, max=8192),
                io.Float.Input("temperature", default=0.7, min=0.0, max=2.0, step=0.05),
                io.Image.Input("image", optional=True),
                io.String.Input("edited", multiline=True, dynamic_prompts=False, default="", optional=True),
            ],
            outputs=outputs(text=io.String, motion_score=io.Int),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def check_lazy_status(cls, edited="", **others) -> list[str]:
        """The text model is loaded only where it is asked."""
        return [] if edited.strip() else ["clip"]

    @classmethod
    def execute(cls, clip, prompt, kind, seed, max_length, temperature, edited, image=None) -> io.NodeOutput:
        if edited.strip():
            return _shown(edited.strip(), MOTION_SCORE)
        if not prompt.strip() and kind != IMAGE:
            raise OpenSoraError("The prompt is empty; say in a few words what to show.")
        sampling = {"seed": seed, "max_length": max_length, "temperature": temperature}
        return _shown(*refine.refined(clip, prompt, kind, image, sampling, cls.hidden.unique_id))


def _shown(text: str, score: int) -> io.NodeOutput:
    return io.NodeOutput(text, score, ui=ui.PreviewText(text))
