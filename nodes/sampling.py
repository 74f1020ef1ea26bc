"""From noise to a clip: the schedule, the guidance, one node that does a whole run, the numbers that a model is usually run
with, and which steps of a run are best computed, measured on the user's own model."""

from comfy_api.latest import io

from ..opensora_core.errors import OpenSoraError
from ..opensora_core.sampling.guidance import Guidance
from .host import calibrate, guider, inputs, notice, run
from .host.families import family_of
from .host.node import Node, gathered
from .host.vae import check_decoders

_GUIDANCE = ("text_guidance", "image_guidance", "text_oscillation", "image_oscillation", "temporal_ramp")
_OWN_WAY = ("solver", "guidance_curve")


class OpenSoraScheduler(Node, category="sampling", outputs={"model": io.Model, "sigmas": io.Sigmas}):
    takes = inputs.of("model", "latent", "steps", "shift", "speed")

    @classmethod
    def execute(cls, model, latent, steps, shift, speed) -> io.NodeOutput:
        model, sigmas, line = run.shifted(model, latent["samples"], steps, shift, speed)
        cls.show(line, notice.INFO)
        return io.NodeOutput(model, sigmas)


class OpenSoraGuider(Node, category="sampling", outputs={"guider": io.Guider}, hidden=("unique_id", "dynprompt")):
    takes = inputs.of("model", "positive", "negative", *_GUIDANCE, "speed", *_OWN_WAY)

    @classmethod
    @gathered(guidance=inputs.guidance_of)
    def execute(cls, model, positive, negative, guidance, speed, solver) -> io.NodeOutput:
        check_decoders(cls.hidden.dynprompt, cls.hidden.unique_id, family_of(model).codecs)
        recipe = family_of(model).sampling.chosen(solver)
        return io.NodeOutput(guider.OpenSoraGuider(model, positive, negative, guidance, speed=speed, recipe=recipe))


class OpenSoraRectifiedFlowSampler(Node, category="sampling", outputs={"latent": io.Latent}, hidden=("unique_id", "dynprompt")):
    takes = inputs.of(
        "model", "positive", "negative", "latent", "seed", "steps", *_GUIDANCE, "shift", "noise_device", "latent_dtype", "speed", *_OWN_WAY
    )

    @classmethod
    @gathered(guidance=inputs.guidance_of, options=run.RunInputs)
    def execute(cls, model, positive, negative, latent, guidance, options) -> io.NodeOutput:
        check_decoders(cls.hidden.dynprompt, cls.hidden.unique_id, family_of(model).codecs)
        return io.NodeOutput(run.run(model, (positive, negative), latent, guidance, options, cls.hidden.unique_id))


_USUAL = {"steps": io.Int, "text_guidance": io.Float, "image_guidance": io.Float}
_USUAL |= {"width": io.Int, "height": io.Int, "frames": io.Int, "fps": io.Float, "sampler": io.Sampler}


class OpenSoraDefaults(Node, category="sampling", outputs=_USUAL, hidden=()):
    takes = inputs.of("model")

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        usual, sampler = family_of(model).usual, run.own_sampler(family_of(model).sampling)
        text, image = (*usual.scales, 1.0)[:2]
        return io.NodeOutput(usual.num_steps, text, image, usual.width, usual.height, usual.num_frames, float(usual.fps), sampler)


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
