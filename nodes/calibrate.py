"""Open-Sora Calibrate: which steps of a run are best computed, measured on the user's own model."""

from comfy_api.latest import io, ui

from ..opensora_core.errors import OpenSoraError
from ..opensora_core.sampling.guidance import Guidance
from .host import calibrate, inputs, notice
from .host.node import Node


class OpenSoraCalibrate(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OpenSoraCalibrate",
            display_name="Open-Sora Calibrate",
            category="Open-Sora/sampling",
            description="Measures which steps of a run are best computed for your model, at a size, a length and what is given, and keeps the plans "
            "where speed looks for them. Takes as long as about five exact videos for each prompt, and goes on where it was stopped.",
            search_aliases=["open sora calibrate", "speed plan", "faster", "step schedule", "align your steps"],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The Open-Sora model, as it is sampled with."),
                io.Conditioning.Input("positive", tooltip="The encoded prompts, as a list (Open-Sora Prompt List): eight are enough."),
                io.Conditioning.Input("negative", tooltip="The encoded negative prompt, one for all or one for each."),
                io.Latent.Input("latent", tooltip="An empty clip of the size and length to calibrate; plans hold for these alone."),
                inputs.seed("Number that the noise of the first prompt is drawn from; the next has the next."),
                inputs.text_guidance(),
                inputs.image_guidance("the video follows its reference picture"),
            ],
            outputs=[
                io.String.Output(
                    display_name="report", tooltip="Forwards and distance to the exact run of every plan; the node shows it too."
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, positive, negative, latent, seed, text_guidance, image_guidance) -> io.NodeOutput:
        if len(negative) not in (1, len(positive)):
            raise OpenSoraError(f"{len(negative)} negative prompts for {len(positive)} prompts; give one, or one for each.")
        pairs = [(one, negative[index % len(negative)]) for index, one in enumerate(positive)]
        guidance, node_id = Guidance(text_guidance[0], image_guidance[0]), cls.hidden.unique_id
        found = calibrate.calibrate(model[0], pairs, latent[0]["samples"], guidance, seed[0], node_id)
        report = found.report()
        notice.show(report, node_id, notice.INFO)
        return io.NodeOutput(report, ui=ui.PreviewText(report))
