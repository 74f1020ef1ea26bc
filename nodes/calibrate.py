"""Open-Sora Calibrate: which steps of a run are best computed, measured on the user's own model."""

from comfy_api.latest import io, ui

from ..opensora_core.errors import OpenSoraError
from ..opensora_core.sampling.guidance import Guidance
from .host import calibrate, inputs, notice
from .host.node import Node, outputs


class OpenSoraCalibrate(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OpenSoraCalibrate",
            category="Open-Sora/sampling",
            is_input_list=True,
            is_output_node=True,
            inputs=[
                io.Model.Input("model"),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                io.Latent.Input("latent"),
                inputs.seed(),
                *inputs.guidance(),
            ],
            outputs=outputs(report=io.String),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, positive, negative, latent, seed, text_guidance, image_guidance) -> io.NodeOutput:
        if len(negative) not in (1, len(positive)):
            raise OpenSoraError(f"{len(negative)} negative prompts for {len(positive)} prompts; give one negative prompt, or one for each.")
        pairs = [(one, negative[index % len(negative)]) for index, one in enumerate(positive)]
        guidance, node_id = Guidance(text_guidance[0], image_guidance[0]), cls.hidden.unique_id
        found = calibrate.calibrate(model[0], pairs, latent[0]["samples"], guidance, seed[0], node_id)
        report = found.report()
        notice.show(report, node_id, notice.INFO)
        return io.NodeOutput(report, ui=ui.PreviewText(report))
