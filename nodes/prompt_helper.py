"""The prompt helper: a few words made the long description that the models were trained on, with a text model of the user's own."""

from comfy_api.latest import io, ui

from ..opensora_core.errors import OpenSoraError
from ..opensora_core.text.prompt import MOTION_SCORE
from ..opensora_core.text.refine import IMAGE, KINDS
from .host import inputs, refine
from .host.node import Node


class OpenSoraPromptHelper(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OpenSoraPromptHelper",
            display_name="Open-Sora Prompt Helper",
            category="Open-Sora/conditioning",
            description="Turns a few words, in any language, into the long English description that the models were trained on, and proposes a motion score. "
            "With a text model that you have loaded; nothing leaves your machine.",
            search_aliases=[
                "open sora prompt",
                "prompt enhance",
                "refine prompt",
                "prompt extender",
                "LLM",
                "translate prompt",
                "提示词润色",
                "提示词",
            ],
            inputs=[
                io.Clip.Input(
                    "clip",
                    lazy=True,
                    tooltip="A text model that can write, from Load CLIP: a Qwen3.5, Qwen3-VL or Gemma 3 file, or any other that ComfyUI's Generate Text takes. "
                    "Not the T5 and CLIP-L that read prompts.",
                ),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="What to show, in a few words, in any language. With a picture it may be empty.",
                ),
                inputs.choice(
                    "kind",
                    KINDS,
                    tooltip="text to video = the whole scene is described. image to video = a picture is given, so that most words go to what happens.",
                ),
                inputs.seed("Another seed, another description. With temperature 0 without effect."),
                io.Int.Input(
                    "max_length",
                    default=512,
                    min=16,
                    max=8192,
                    tooltip="Tokens that the text model may write at most. A model that thinks before it answers needs more.",
                ),
                io.Float.Input(
                    "temperature",
                    default=0.7,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="How freely it writes. 0 = always the likeliest word, the same description for the same prompt.",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="The first frame, for a text model that can see (Qwen3.5, Qwen3-VL, Gemma 3 with vision); others go by the prompt alone.",
                ),
                io.String.Input(
                    "edited",
                    multiline=True,
                    dynamic_prompts=False,
                    default="",
                    optional=True,
                    tooltip="What stands here is given on as it is, and no text model is loaded or asked: copy the description below, paste it here, change it.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="text", tooltip="The description, for the prompt of Open-Sora Text Encode."),
                io.Int.Output(
                    display_name="motion_score",
                    tooltip="The motion score that is proposed, 1 to 15, for Open-Sora Text Encode; the released 4 with edited text.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def check_lazy_status(cls, edited="", **others) -> list[str]:
        """The text model is loaded only where it is asked."""
        return [] if edited.strip() else ["clip"]

    @classmethod
    def execute(cls, clip, prompt, kind, seed, max_length, temperature, image=None, edited="") -> io.NodeOutput:
        if edited.strip():
            return _shown(edited.strip(), MOTION_SCORE)
        if not prompt.strip() and kind != IMAGE:
            raise OpenSoraError("The prompt is empty; say in a few words what to show.")
        sampling = {"seed": seed, "max_length": max_length, "temperature": temperature}
        return _shown(*refine.refined(clip, prompt, kind, image, sampling, cls.hidden.unique_id))


def _shown(text: str, score: int) -> io.NodeOutput:
    return io.NodeOutput(text, score, ui=ui.PreviewText(text))
