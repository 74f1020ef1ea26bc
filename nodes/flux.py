"""Text to picture to video: Flux draws the first frame, Open-Sora sets it in motion."""

from functools import partial

from comfy_api.latest import io

from ..opensora_core import geometry
from ..opensora_core.families.table import DEFAULT
from ..opensora_core.run.picture import DRAWING, PictureRequest
from ..opensora_core.sampling.solvers import MAX_SEED
from ..opensora_core.text.recipe import Said
from .host import flux, inputs, prompts
from .host.node import Node, gathered

SAME_SEED = -1
VIDEO_RESOLUTIONS = ("256px", "768px")
RESOLUTION = DRAWING.resolution
PICTURE_RESOLUTIONS = (RESOLUTION, *(name for name in geometry.RESOLUTIONS if name != RESOLUTION))
_steps_input = partial(io.Int.Input, default=0, min=0, max=geometry.LARGEST["num_steps"])


def _request_of(aspect_ratio, resolution, steps, flux_schedule, flux_guidance) -> PictureRequest:
    return PictureRequest.for_ratio(aspect_ratio, resolution, steps=steps, guidance=flux_guidance, schedule=flux_schedule)


class OpenSoraFluxPicture(Node, category="flux", outputs={"picture": io.Image}):
    takes = [
        *inputs.of("flux_model", "flux_vae", "clip", "prompt", "aspect_ratio", "seed"),
        _steps_input("steps"),
        *inputs.of("flux_schedule", "flux_guidance"),
        inputs.choice("resolution", PICTURE_RESOLUTIONS, advanced=True),
        io.Boolean.Input("unload", default=False, advanced=True),
    ]

    @classmethod
    @gathered(request=_request_of)
    def execute(cls, flux_model, flux_vae, clip, prompt, seed, request, unload) -> io.NodeOutput:
        flux.require_flux(flux_model)
        flux.check_flux_vae(flux_vae)
        positive, _ = prompts.encode_kept(clip, prompt)
        try:
            return io.NodeOutput(flux.paint(flux_model, flux_vae, positive, request, seed, cls.hidden.unique_id))
        finally:
            if unload:
                flux.unload(flux_model)


_GIVES = {"video frames": io.Image, "picture": io.Image, "latent": io.Latent}


class OpenSoraFluxToVideo(Node, category="flux", outputs=_GIVES, hidden=("unique_id", "dynprompt"), enable_expand=True):
    takes = [
        *inputs.of("flux_model", "flux_vae", "clip", "model", "vae", "prompt", "negative_prompt"),
        inputs.choice("resolution", VIDEO_RESOLUTIONS),
        *inputs.of("aspect_ratio"),
        io.Int.Input("num_frames", default=129, min=5, max=1025, step=4),
        *inputs.of("seed", "steps"),
        _steps_input("image_steps"),
        *inputs.of("flux_schedule", "flux_guidance", "motion_score", "fps", "text_guidance", "image_guidance", advanced=True),
        io.Int.Input("image_seed", default=SAME_SEED, min=SAME_SEED, max=MAX_SEED, optional=True),
        inputs.choice("image_resolution", PICTURE_RESOLUTIONS, optional=True, advanced=True),
        io.String.Input("image_prompt", multiline=True, dynamic_prompts=True, default="", optional=True, advanced=True),
        *inputs.of("length", "speed"),
    ]

    @classmethod
    def validate_inputs(cls, num_frames=None, length=None):
        return inputs.length_problems(length, num_frames, geometry.CAUSAL)

    @classmethod
    @gathered(
        drawn=("image_prompt", "image_seed", "image_steps", "flux_schedule", "flux_guidance", "image_resolution"),
        text=("prompt", "negative_prompt", "motion_score", "fps"),
        latent=("resolution", "aspect_ratio", "num_frames", "length"),
        sampler=("seed", "steps", "text_guidance", "image_guidance", "speed"),
    )
    def execute(cls, flux_model, flux_vae, clip, model, vae, drawn, text, latent, sampler) -> io.NodeOutput:
        latent["num_frames"] = inputs.frames_of(latent.pop("length"), latent["num_frames"])
        flux.check_parts(flux_model, flux_vae, clip, model, vae)
        flux.check_video(**latent, guidance=(sampler["text_guidance"], sampler["image_guidance"]))
        request = {"aspect_ratio": latent["aspect_ratio"], "resolution": drawn["image_resolution"], "steps": drawn["image_steps"]}
        request |= {name: drawn[name] for name in ("flux_schedule", "flux_guidance")}
        _request_of(**request)  # before anything is encoded
        shown = drawn["image_prompt"] if drawn["image_prompt"].strip() else text["prompt"]
        decorated = DEFAULT.text.words(text["prompt"], Said(text["fps"], text["motion_score"]))
        text["keep_encoded"] = flux.keep_prompts(clip, [shown, decorated, text["negative_prompt"]], cls.hidden.unique_id)
        seed = sampler["seed"] if drawn["image_seed"] == SAME_SEED else drawn["image_seed"]
        picture = {"prompt": shown, "seed": seed, **request, "unload": True}
        links, nodes = flux.video_graph(cls.hidden.dynprompt, cls.hidden.unique_id, picture, text, latent, sampler)
        return io.NodeOutput(*links, expand=nodes)
