"""From noise to a clip: the schedule, the guidance, one node that does a whole run, and the numbers that a model is usually run with."""

from comfy_api.latest import io

from ..opensora_core.sampling.guidance import Guidance
from .host import guider, inputs, notice, run
from .host.families import family_of
from .host.node import Node, outputs
from .host.vae import check_decoders


def _guidance_inputs() -> list:
    return [
        *inputs.guidance(),
        *inputs.oscillation(),
        io.Boolean.Input("temporal_ramp", default=Guidance.temporal_ramp, advanced=True),
    ]


def _conditioning_inputs() -> list:
    return [io.Conditioning.Input("positive"), io.Conditioning.Input("negative")]


class OpenSoraScheduler(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OpenSoraScheduler",
            category="Open-Sora/sampling",
            inputs=[io.Model.Input("model"), io.Latent.Input("latent"), inputs.steps(), inputs.shift(), inputs.speed()],
            hidden=[io.Hidden.unique_id],
            outputs=outputs(model=io.Model, sigmas=io.Sigmas),
        )

    @classmethod
    def execute(cls, model, latent, steps, shift, speed) -> io.NodeOutput:
        model, sigmas, line = run.shifted(model, latent["samples"], steps, shift, speed)
        notice.show(line, cls.hidden.unique_id, notice.INFO)
        return io.NodeOutput(model, sigmas)


class OpenSoraGuider(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OpenSoraGuider",
            category="Open-Sora/sampling",
            inputs=[
                io.Model.Input("model"),
                *_conditioning_inputs(),
                *_guidance_inputs(),
                inputs.speed(),
                *inputs.own_way(),
            ],
            outputs=outputs(guider=io.Guider),
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        negative,
        text_guidance,
        image_guidance,
        text_oscillation,
        image_oscillation,
        temporal_ramp,
        speed,
        solver,
        guidance_curve,
    ) -> io.NodeOutput:
        guidance = Guidance(text_guidance, image_guidance, text_oscillation, image_oscillation, temporal_ramp, curve=guidance_curve)
        check_decoders(cls.hidden.dynprompt, cls.hidden.unique_id, family_of(model).codecs)
        recipe = family_of(model).sampling.chosen(solver)
        return io.NodeOutput(guider.OpenSoraGuider(model, positive, negative, guidance, speed=speed, recipe=recipe))


class OpenSoraRectifiedFlowSampler(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OpenSoraRectifiedFlowSampler",
            category="Open-Sora/sampling",
            inputs=[
                io.Model.Input("model"),
                *_conditioning_inputs(),
                io.Latent.Input("latent"),
                inputs.seed(),
                inputs.steps(),
                *_guidance_inputs(),
                inputs.shift(),
                *inputs.exactness(),
                inputs.speed(),
                *inputs.own_way(),
            ],
            outputs=outputs(latent=io.Latent),
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
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
        text_oscillation,
        image_oscillation,
        temporal_ramp,
        shift,
        noise_device,
        latent_dtype,
        speed,
        solver,
        guidance_curve,
    ) -> io.NodeOutput:
        guidance = Guidance(text_guidance, image_guidance, text_oscillation, image_oscillation, temporal_ramp, curve=guidance_curve)
        options = run.RunInputs(seed, steps, shift, noise_device, latent_dtype, speed, solver)
        check_decoders(cls.hidden.dynprompt, cls.hidden.unique_id, family_of(model).codecs)
        return io.NodeOutput(run.run(model, (positive, negative), latent, guidance, options, cls.hidden.unique_id))


class OpenSoraDefaults(Node):
    @classmethod
    def define_schema(cls):
        guidance = {"steps": io.Int, "text_guidance": io.Float, "image_guidance": io.Float}
        clip = {"width": io.Int, "height": io.Int, "frames": io.Int, "fps": io.Float}
        return io.Schema(
            node_id="OpenSoraDefaults",
            category="Open-Sora/sampling",
            inputs=[io.Model.Input("model")],
            outputs=outputs(**guidance, **clip, sampler=io.Sampler),
        )

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        usual, sampler = family_of(model).usual, run.own_sampler(family_of(model).sampling)
        text, image = (*usual.scales, 1.0)[:2]
        return io.NodeOutput(usual.num_steps, text, image, usual.width, usual.height, usual.num_frames, float(usual.fps), sampler)
