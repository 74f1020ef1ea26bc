"""Open-Sora Calibrate: which steps of a run are best computed, measured on the user's own model."""

from comfy_api.latest import io

from ..opensora_core.errors import OpenSoraError
from ..opensora_core.sampling.guidance import Guidance
from .host import calibrate, inputs
from .host.node import Node


class OpenSoraCalibrate(Node, category="sampling", outputs={"report": io.String}, is_input_list=True, is_output_node=True):
    takes = inputs.of("model", "positive", "negative", "latent", "seed", "text_guidance", "image_guidance")

    @classmethod
    def execute(cls, model, positive, negative, latent, seed, text_guidance, image_guidance) -> io.NodeOutput:
        if len(negative) not in (1, len(positive)):
            raise OpenSoraError(f"{len(negative)} negative prompts for {len(positive)} prompts; give one negative prompt, or one for each.")
        pairs = [(one, negative[index % len(negative)]) for index, one in enumerate(positive)]
        guidance = Guidance(text_guidance[0], image_guidance[0])
        found = calibrate.calibrate(model[0], pairs, latent[0]["samples"], guidance, seed[0], cls.hidden.unique_id)
        return cls.reported(found.report())
