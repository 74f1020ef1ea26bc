"""Long videos: going on from a finished one, segment by segment."""

from comfy_api.latest import io

from ..opensora_core import geometry
from ..opensora_core.errors import OpenSoraError
from ..opensora_core.run.request import SamplingOptions
from ..opensora_core.run.segments import segment_prompts
from ..opensora_core.sampling.guidance import Guidance
from ..opensora_core.text.recipe import TextRecipe
from .host import inputs, long, notice, prompts, run
from .host.condition import FPS_KEY, marked
from .host.families import family_of, require_open_sora
from .host.guider import check_latent
from .host.kept import OutputFile
from .host.node import Node, outputs
from .host.vae import check_pair

_MAX_SEGMENTS = 1000
_MAX_FRAMES = 1025


class OpenSoraContinueVideo(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OpenSoraContinueVideo",
            category="Open-Sora/sampling",
            is_experimental=True,
            inputs=[
                io.Model.Input("model"),
                *inputs.clip(),
                io.Int.Input("segments", default=1, min=1, max=_MAX_SEGMENTS),
                inputs.seed(),
                inputs.steps(),
                *inputs.guidance(),
                io.Int.Input("num_frames", default=0, min=0, max=_MAX_FRAMES),
                io.Int.Input("context_frames", default=0, min=0, max=_MAX_FRAMES),
                io.String.Input("filename_prefix", default="latents/open-sora-long"),
                inputs.policy(),
                *inputs.oscillation(),
                inputs.shift(),
                *inputs.exactness(),
                io.Clip.Input("clip", optional=True),
                io.String.Input("prompts", multiline=True, dynamic_prompts=True, default="", optional=True),
                *inputs.decoration(optional=True, advanced=True),
                inputs.length(),
                inputs.speed(),
            ],
            outputs=outputs(latent=io.Latent, images=io.Image, file=io.String),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, num_frames=None, context_frames=None, length=None):
        of_context = inputs.problems(context_frames=inputs.problem(geometry.CAUSAL.frames.check, context_frames or None))
        if length is not None and length.strip():  # in the model's own lengths, which are known when it runs
            return inputs.problems(length=inputs.problem(geometry.CAUSAL.length, length, SamplingOptions.fps)) | of_context
        return inputs.length_problems("", num_frames or None, geometry.CAUSAL) | of_context  # 0 = by itself

    @classmethod
    def execute(
        cls,
        model,
        positive,
        negative,
        vae,
        latent,
        segments,
        seed,
        steps,
        text_guidance,
        image_guidance,
        num_frames,
        context_frames,
        filename_prefix,
        policy,
        text_oscillation,
        image_oscillation,
        shift,
        noise_device,
        latent_dtype,
        prompts,
        motion_score,
        fps,
        length,
        speed,
        clip=None,
    ) -> io.NodeOutput:
        node_id = cls.hidden.unique_id
        config, family = require_open_sora(model), family_of(model)
        config.grid.check_goes_on()
        rule = family.check_longer()
        shape = check_latent(latent["samples"], config)
        check_pair(vae, family.codecs)
        asked = inputs.frames_of(length, num_frames, config.grid, family.usual.fps) or None, context_frames or None
        continuation = rule.continuation(shape[2], *asked, config.grid)
        lines = segment_prompts([line.strip() for line in prompts.splitlines() if line.strip()] or [""], segments)
        guidance = Guidance(text_guidance, image_guidance, text_oscillation, image_oscillation)
        options = run.RunInputs(seed, steps, shift, noise_device, latent_dtype, speed)
        with OutputFile(filename_prefix) as file:
            # All prompts before the first segment: the text encoders are then not needed again.
            positives = _encode(clip, lines, family.text, (fps, motion_score), node_id) if prompts.strip() else [positive] * segments
            added = long.Segments(continuation, positives, negative, guidance, options, rule, (vae, policy))
            finished = long.go_on(model, latent, added, file, node_id)
            try:
                images = long.decode(vae, finished["samples"], continuation, policy, lambda line: notice.show(line, node_id))
            except OpenSoraError as error:
                raise OpenSoraError(f"{error} {file.sentence}") from error
        return io.NodeOutput(finished, images, str(file.path))


def _encode(clip, lines: list[str], recipe: TextRecipe, said: tuple[int, int], node_id: str | None) -> list:
    """The CONDITIONING of each line. said: frames per second and motion score."""
    if clip is None:
        raise OpenSoraError("New prompts need a text encoder to read them: connect clip, or leave prompts empty.")
    told = recipe.said(fps=said[0], motion_score=prompts.motion_score(recipe, said[1]))
    encoded = prompts.encode(clip, [recipe.words(line, told) for line in lines], node_id, recipe=recipe)
    return [marked(side, **{FPS_KEY: said[0]}) for side in encoded] if recipe.has_mask else encoded
