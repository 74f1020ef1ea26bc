"""From noise to a clip: the schedule, the guidance, and one node that does a whole run."""

from comfy_api.latest import io

from ..opensora_core.choices import AUTO, EXACT
from ..opensora_core.run.request import SamplingOptions
from ..opensora_core.sampling.guidance import Guidance
from .host import guider, inputs, notice, run
from .host.families import family_of
from .host.node import Node


def _guidance_inputs() -> list:
    return [
        inputs.text_guidance(),
        inputs.image_guidance("the video follows its reference picture", " It has no effect without a picture."),
        *inputs.oscillation(),
        io.Boolean.Input(
            "temporal_ramp",
            default=Guidance.temporal_ramp,
            advanced=True,
            tooltip="On = the released way: image guidance grows from 1 at the first frame to its full scale at the last. Off = the same for all frames.",
        ),
    ]


def _conditioning_inputs() -> list:
    return [
        io.Conditioning.Input("positive", tooltip="The encoded prompt, with reference pictures if there are any."),
        io.Conditioning.Input("negative", tooltip="The encoded negative prompt."),
    ]


class OpenSoraScheduler(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OpenSoraScheduler",
            display_name="Open-Sora Scheduler",
            category="Open-Sora/sampling",
            description="The noise levels of a run, shifted by the clip's size and length as Open-Sora does, and a model that agrees with them.",
            search_aliases=["open sora sigmas", "flow shift", "sigmas", "model sampling"],
            inputs=[
                io.Model.Input("model", tooltip="The Open-Sora model; it is copied, never changed."),
                io.Latent.Input("latent", tooltip="The clip to make; its size and length set the shift."),
                inputs.steps(),
                inputs.shift(),
                inputs.speed(),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="The model with its sampling shift set to match, for the guider and for KSampler."
                ),
                io.Sigmas.Output(display_name="sigmas", tooltip="Noise levels from 1 (noise) to 0 (video), for SamplerCustomAdvanced."),
            ],
        )

    @classmethod
    def execute(cls, model, latent, steps, shift=SamplingOptions.shift, speed=EXACT) -> io.NodeOutput:
        model, sigmas, line = run.shifted(model, latent["samples"], steps, shift, speed)
        notice.show(line, cls.hidden.unique_id, notice.INFO)
        return io.NodeOutput(model, sigmas)


class OpenSoraGuider(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OpenSoraGuider",
            display_name="Open-Sora Guider",
            category="Open-Sora/sampling",
            description="Open-Sora's guidance by prompt and picture for SamplerCustomAdvanced. Only the passes that a step needs are run.",
            search_aliases=["open sora cfg", "image guidance", "three-pass guidance", "dual cfg", "oscillating guidance"],
            inputs=[
                io.Model.Input("model", tooltip="The Open-Sora model, best from Open-Sora Scheduler."),
                *_conditioning_inputs(),
                *_guidance_inputs(),
                inputs.speed(),
                inputs.solver(),
                inputs.guidance_curve(),
            ],
            outputs=[
                io.Guider.Output(display_name="guider", tooltip="For SamplerCustomAdvanced; it puts the reference frames back at the end.")
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        negative,
        text_guidance,
        image_guidance,
        text_oscillation=Guidance.text_oscillation,
        image_oscillation=Guidance.image_oscillation,
        temporal_ramp=Guidance.temporal_ramp,
        speed=EXACT,
        solver=AUTO,
        guidance_curve=AUTO,
    ) -> io.NodeOutput:
        guidance = Guidance(text_guidance, image_guidance, text_oscillation, image_oscillation, temporal_ramp, curve=guidance_curve)
        recipe = family_of(model).sampling.chosen(solver)
        return io.NodeOutput(guider.OpenSoraGuider(model, positive, negative, guidance, speed=speed, recipe=recipe))


class OpenSoraRectifiedFlowSampler(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OpenSoraRectifiedFlowSampler",
            display_name="Open-Sora Sampler",
            category="Open-Sora/sampling",
            description="A whole run in one node: noise, schedule, guidance and Euler steps as Open-Sora 2.0 was released.",
            search_aliases=[
                "open sora sampler",
                "ksampler",
                "rectified flow",
                "text to video",
                "image to video",
                "文生视频",
                "图生视频",
                "采样器",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The Open-Sora model."),
                *_conditioning_inputs(),
                io.Latent.Input("latent", tooltip="The empty clip; it says size, length and number of videos."),
                inputs.seed("Number that the noise is drawn from: the same seed and settings give the same video."),
                inputs.steps(),
                *_guidance_inputs(),
                inputs.shift(),
                *inputs.exactness(),
                inputs.speed(),
                inputs.solver(),
                inputs.guidance_curve(),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The finished clip, for Open-Sora Tiled VAE Decode or VAE Decode.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        negative,
        latent,
        seed,
        steps,
        text_guidance,
        image_guidance,
        text_oscillation=Guidance.text_oscillation,
        image_oscillation=Guidance.image_oscillation,
        temporal_ramp=Guidance.temporal_ramp,
        shift=SamplingOptions.shift,
        noise_device=SamplingOptions.noise_device,
        latent_dtype=SamplingOptions.latent_dtype,
        speed=EXACT,
        solver=AUTO,
        guidance_curve=AUTO,
    ) -> io.NodeOutput:
        guidance = Guidance(text_guidance, image_guidance, text_oscillation, image_oscillation, temporal_ramp, curve=guidance_curve)
        options = run.RunInputs(seed, steps, shift, noise_device, latent_dtype, speed, solver)
        return io.NodeOutput(run.run(model, (positive, negative), latent, guidance, options, cls.hidden.unique_id))
