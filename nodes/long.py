"""Long videos: going on from a finished one, segment by segment."""

from comfy_api.latest import io

from ..opensora_core import geometry
from ..opensora_core.choices import AUTO, EXACT
from ..opensora_core.errors import OpenSoraError
from ..opensora_core.run.request import SamplingOptions
from ..opensora_core.run.segments import segment_prompts
from ..opensora_core.sampling.guidance import Guidance
from ..opensora_core.text.prompt import MOTION_SCORE
from ..opensora_core.text.recipe import TextRecipe
from .host import inputs, long, notice, prompts, run
from .host.condition import FPS_KEY, marked
from .host.families import family_of, require_open_sora
from .host.guider import check_latent
from .host.kept import OutputFile
from .host.node import Node
from .host.vae import check_pair

_MAX_SEGMENTS = 1000
_MAX_FRAMES = 1025


class OpenSoraContinueVideo(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OpenSoraContinueVideo",
            display_name="Open-Sora Continue Video",
            category="Open-Sora/sampling",
            description="Goes on from a finished video by any number of segments, each from the last latents of the one before, and saves every "
            "finished segment. Experimental: the released model may never have been trained to go on from a clip.",
            search_aliases=[
                "open sora long video",
                "extend video",
                "continue",
                "go on",
                "longer video",
                "video to video",
                "长视频",
                "视频延长",
            ],
            is_experimental=True,
            inputs=[
                io.Model.Input("model", tooltip="The Open-Sora model."),
                io.Conditioning.Input("positive", tooltip="The encoded prompt of all segments; not used where prompts are written below."),
                io.Conditioning.Input("negative", tooltip="The encoded negative prompt of all segments."),
                inputs.vae(),
                io.Latent.Input("latent", tooltip="The finished video, from a sampler, from this node, or from Load Latent."),
                io.Int.Input(
                    "segments", default=1, min=1, max=_MAX_SEGMENTS, tooltip="How many segments to add. Memory stays that of one."
                ),
                inputs.seed(
                    "Number that noise is drawn from; every segment gets its own by where it begins, so that going on later is the same as at once."
                ),
                inputs.steps("Steps of each segment"),
                inputs.text_guidance(),
                inputs.image_guidance("a segment follows the frames it goes on from"),
                *_length_inputs(),
                *inputs.oscillation(),
                inputs.shift("segment"),
                *inputs.exactness("segment"),
                *_prompt_inputs(),
                inputs.length("a segment"),
                inputs.speed("segment"),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The whole video, given part included; it can be gone on from again."),
                io.Image.Output(display_name="images", tooltip="Its frames, each once; videos of a batch follow one another."),
                io.String.Output(display_name="file", tooltip="The .latent file in the output folder that holds the whole video."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, num_frames=None, context_frames=None, length=None):
        of_context = inputs.problems(context_frames=inputs.problem(geometry.CAUSAL.check_num_frames, context_frames or None))
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
        num_frames=0,
        context_frames=0,
        filename_prefix="latents/open-sora-long",
        policy=AUTO,
        text_oscillation=Guidance.text_oscillation,
        image_oscillation=Guidance.image_oscillation,
        shift=SamplingOptions.shift,
        noise_device=SamplingOptions.noise_device,
        latent_dtype=SamplingOptions.latent_dtype,
        clip=None,
        prompts="",
        motion_score=MOTION_SCORE,
        fps=SamplingOptions.fps,
        length="",
        speed=EXACT,
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


def _length_inputs() -> list:
    return [
        io.Int.Input(
            "num_frames",
            default=0,
            min=0,
            max=_MAX_FRAMES,
            tooltip="Length of a segment in frames, 4k+1, with the frames it is given. 0 = as the video, at most 129.",
        ),
        io.Int.Input(
            "context_frames",
            default=0,
            min=0,
            max=_MAX_FRAMES,
            tooltip="Frames that a segment is given of the one before, 4k+1. 0 = a quarter of its length (33 of 129, as the reference); more = "
            "smoother, and less that is new.",
        ),
        io.String.Input(
            "filename_prefix",
            default="latents/open-sora-long",
            tooltip="Where in the output folder the video is kept, as latents, after every segment. Load Latent reads it from the input folder.",
        ),
        inputs.policy("segment", "Of the decode, a segment at a time. "),
    ]


def _prompt_inputs() -> list:
    return [
        io.Clip.Input("clip", optional=True, tooltip="T5-XXL and CLIP-L, to encode the prompts below; not needed without them."),
        io.String.Input(
            "prompts",
            multiline=True,
            dynamic_prompts=True,
            default="",
            optional=True,
            tooltip="New prompts, one per line: line 1 for the first new segment, and so on; the last line holds for the rest. Empty = positive for all.",
        ),
        *inputs.decoration("the prompts above", optional=True, advanced=True),
    ]


def _encode(clip, lines: list[str], recipe: TextRecipe, said: tuple[int, int], node_id: str | None) -> list:
    """The CONDITIONING of each line. said: frames per second and motion score."""
    if clip is None:
        raise OpenSoraError("New prompts need a text encoder to read them: connect clip, or leave prompts empty.")
    told = recipe.said(fps=said[0], motion_score=prompts.motion_score(recipe, said[1]))
    encoded = prompts.encode(clip, [recipe.words(line, told) for line in lines], node_id, recipe=recipe)
    return [marked(side, **{FPS_KEY: said[0]}) for side in encoded] if recipe.has_mask else encoded
