"""Long videos: going on from a finished one, segment by segment."""

from comfy_api.latest import io

from ..opensora_core import geometry
from ..opensora_core.errors import OpenSoraError
from ..opensora_core.run.request import SamplingOptions
from ..opensora_core.run.segments import segment_prompts
from ..opensora_core.text.recipe import TextRecipe
from .host import inputs, long, prompts, run
from .host.condition import FPS_KEY, marked
from .host.families import family_of, require_open_sora
from .host.guider import check_latent
from .host.kept import OutputFile
from .host.node import Node, gathered
from .host.vae import check_pair

_MAX_SEGMENTS = 1000
_MAX_FRAMES = 1025
_GIVES = {"latent": io.Latent, "images": io.Image, "file": io.String}


class OpenSoraContinueVideo(Node, category="sampling", outputs=_GIVES, is_experimental=True):
    takes = [
        *inputs.of("model", "positive", "negative", "vae", "latent"),
        io.Int.Input("segments", default=1, min=1, max=_MAX_SEGMENTS),
        *inputs.of("seed", "steps", "text_guidance", "image_guidance"),
        io.Int.Input("num_frames", default=0, min=0, max=_MAX_FRAMES),
        io.Int.Input("context_frames", default=0, min=0, max=_MAX_FRAMES),
        io.String.Input("filename_prefix", default="latents/open-sora-long"),
        *inputs.of("policy", "text_oscillation", "image_oscillation", "shift", "noise_device", "latent_dtype"),
        *inputs.of("clip", optional=True),
        io.String.Input("prompts", multiline=True, dynamic_prompts=True, default="", optional=True),
        *inputs.of("motion_score", "fps", optional=True, advanced=True),
        *inputs.of("length", "speed"),
    ]

    @classmethod
    def validate_inputs(cls, num_frames=None, context_frames=None, length=None):
        found = {"context_frames": inputs.problem(geometry.CAUSAL.check_num_frames, context_frames or None)}
        if (length or "").strip():  # in the model's own lengths, which are known when it runs
            return {"length": inputs.problem(geometry.CAUSAL.length, length, SamplingOptions.fps), **found}
        return {**inputs.length_problems("", num_frames or None, geometry.CAUSAL), **found}  # 0 = by itself

    @classmethod
    @gathered(
        guidance=inputs.guidance_of, options=run.RunInputs, said=("fps", "motion_score"), asked=("length", "num_frames", "context_frames")
    )
    def execute(
        cls, model, positive, negative, vae, latent, segments, guidance, options, asked, filename_prefix, policy, clip, prompts, said
    ) -> io.NodeOutput:
        node_id = cls.hidden.unique_id
        config, family = require_open_sora(model), family_of(model)
        config.grid.check_goes_on()
        rule = family.check_longer()
        shape = check_latent(latent["samples"], config)
        check_pair(vae, family.codecs)
        frames = inputs.frames_of(asked["length"], asked["num_frames"], config.grid, family.usual.fps)
        continuation = rule.continuation(shape[2], frames or None, asked["context_frames"] or None, config.grid)
        lines = segment_prompts([line.strip() for line in prompts.splitlines() if line.strip()] or [""], segments)
        with OutputFile(filename_prefix) as file:
            # All prompts before the first segment: the text encoders are then not needed again.
            positives = _encode(clip, lines, family.text, said, node_id) if prompts.strip() else [positive] * segments
            added = long.Segments(continuation, positives, negative, guidance, options, rule, (vae, policy))
            finished = long.go_on(model, latent, added, file, node_id)
            with long.naming(file, node_id):
                images = long.decode(vae, finished["samples"], continuation, policy, cls.show)
        return io.NodeOutput(finished, images, str(file.path))


def _encode(clip, lines: list[str], recipe: TextRecipe, said: dict[str, int], node_id: str | None) -> list:
    """The CONDITIONING of each line. said: fps and motion_score."""
    if clip is None:
        raise OpenSoraError("New prompts need a text encoder to read them: connect clip, or leave prompts empty.")
    told = recipe.said(fps=said["fps"], motion_score=prompts.motion_score(recipe, said["motion_score"]))
    encoded = prompts.encode(clip, [recipe.words(line, told) for line in lines], node_id, recipe=recipe)
    return [marked(side, **{FPS_KEY: said["fps"]}) for side in encoded] if recipe.has_mask else encoded
