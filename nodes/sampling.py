"""From noise to a clip: the schedule, the guidance, and one node that does a whole run."""

from comfy_api.latest import io

from ..opensora_core.sampling.guidance import Guidance
from .host import guider, inputs, run

_MAX_STEPS = 1000
_MAX_SCALE = 100.0
_TEXT_TOOLTIP = "How strongly the video follows the prompt against the negative prompt. 1 = neutral (the negative prompt is not used); the released default is 7.5."
_IMAGE_TOOLTIP = (
    "How strongly the video follows its reference picture. 1 = neutral; the released default is 3. It has no effect without a picture."
)


def _guidance_inputs() -> list:
    return [
        io.Float.Input("text_guidance", default=Guidance.text, min=0.0, max=_MAX_SCALE, step=0.1, tooltip=_TEXT_TOOLTIP),
        io.Float.Input("image_guidance", default=Guidance.image, min=0.0, max=_MAX_SCALE, step=0.1, tooltip=_IMAGE_TOOLTIP),
        *inputs.oscillation(),
        io.Boolean.Input(
            "temporal_ramp",
            default=Guidance.temporal_ramp,
            advanced=True,
            tooltip="On = the released way: image guidance grows from 1 at the first frame to its full scale at the last. Off = the same for all frames.",
        ),
    ]


def _shift_input() -> io.Float.Input:
    return io.Float.Input(
        "shift",
        default=0.0,
        min=0.0,
        max=100.0,
        step=0.01,
        advanced=True,
        tooltip="How long the run stays near noise. 0 = from the clip's size and length, as released (5.73 at 256px, 11.87 at 768px, 129 frames); "
        "1 = equal steps.",
    )


def _conditioning_inputs() -> list:
    return [
        io.Conditioning.Input("positive", tooltip="The encoded prompt, with reference pictures if there are any."),
        io.Conditioning.Input("negative", tooltip="The encoded negative prompt."),
    ]


class OpenSoraScheduler(io.ComfyNode):
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
                io.Int.Input("steps", default=50, min=1, max=_MAX_STEPS, tooltip="Number of steps. The released default is 50."),
                _shift_input(),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="The model with its sampling shift set to match, for the guider and for KSampler."
                ),
                io.Sigmas.Output(display_name="sigmas", tooltip="Noise levels from 1 (noise) to 0 (video), for SamplerCustomAdvanced."),
            ],
        )

    @classmethod
    def execute(cls, model, latent, steps, shift=0.0) -> io.NodeOutput:
        return io.NodeOutput(*run.shifted(model, latent["samples"], steps, shift))


class OpenSoraGuider(io.ComfyNode):
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
    ) -> io.NodeOutput:
        guidance = Guidance(text_guidance, image_guidance, text_oscillation, image_oscillation, temporal_ramp)
        return io.NodeOutput(guider.OpenSoraGuider(model, positive, negative, guidance))


class OpenSoraRectifiedFlowSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OpenSoraRectifiedFlowSampler",
            display_name="Open-Sora Sampler",
            category="Open-Sora/sampling",
            description="A whole run in one node: noise, schedule, guidance and Euler steps as Open-Sora 2.0 was released.",
            search_aliases=["open sora sampler", "ksampler", "rectified flow", "text to video", "image to video"],
            inputs=[
                io.Model.Input("model", tooltip="The Open-Sora model."),
                *_conditioning_inputs(),
                io.Latent.Input("latent", tooltip="The empty clip; it says size, length and number of videos."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Number that the noise is drawn from: the same seed and settings give the same video.",
                ),
                io.Int.Input("steps", default=50, min=1, max=_MAX_STEPS, tooltip="Number of steps. The released default is 50."),
                *_guidance_inputs(),
                _shift_input(),
                io.Combo.Input(
                    "noise_device",
                    options=list(run.NOISE_DEVICES),
                    default=run.NOISE_DEVICES[0],
                    advanced=True,
                    tooltip="Where noise is drawn. cpu = the same for a seed on every machine; gpu = as the reference does, with bf16 latents.",
                ),
                io.Combo.Input(
                    "latent_dtype",
                    options=list(run.LATENT_DTYPES),
                    default="fp32",
                    advanced=True,
                    tooltip="How the clip is kept between steps. fp32 = exact; bf16 = rounded, as the reference does.",
                ),
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
        shift=0.0,
        noise_device=run.NOISE_DEVICES[0],
        latent_dtype="fp32",
    ) -> io.NodeOutput:
        guidance = Guidance(text_guidance, image_guidance, text_oscillation, image_oscillation, temporal_ramp)
        settings = run.RunSettings(seed, steps, shift, noise_device, latent_dtype)
        return io.NodeOutput(run.run(model, (positive, negative), latent, guidance, settings, cls.hidden.unique_id))
