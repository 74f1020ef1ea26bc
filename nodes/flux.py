"""Text to picture to video: Flux draws the first frame, Open-Sora sets it in motion."""

from comfy_api.latest import io

from ..opensora_core import geometry
from ..opensora_core.choices import PICTURE_SCHEDULES
from ..opensora_core.families.table import DEFAULT
from ..opensora_core.run.picture import DRAWING, GUIDANCE, PictureRequest
from ..opensora_core.sampling.solvers import MAX_SEED
from ..opensora_core.text.recipe import Said
from .host import flux, inputs, prompts
from .host.node import Node, outputs

SAME_SEED = -1
VIDEO_RESOLUTIONS = ("256px", "768px")
RESOLUTION = DRAWING.resolution
PICTURE_RESOLUTIONS = (RESOLUTION, *(name for name in geometry.RESOLUTIONS if name != RESOLUTION))


def _flux_inputs() -> list:
    return [io.Model.Input("flux_model"), io.Vae.Input("flux_vae"), io.Clip.Input("clip")]


def _steps_input(name: str) -> io.Int.Input:
    return io.Int.Input(name, default=0, min=0, max=geometry.LARGEST["num_steps"])


def _schedule_inputs() -> list:
    return [
        inputs.choice("flux_schedule", PICTURE_SCHEDULES, advanced=True),
        io.Float.Input("flux_guidance", default=GUIDANCE, min=0.0, max=100.0, step=0.1, advanced=True),
    ]


class OpenSoraFluxPicture(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OpenSoraFluxPicture",
            category="Open-Sora/flux",
            inputs=[
                *_flux_inputs(),
                io.String.Input("prompt", multiline=True, dynamic_prompts=True),
                inputs.choice("aspect_ratio", geometry.ASPECT_RATIOS),
                inputs.seed(),
                _steps_input("steps"),
                *_schedule_inputs(),
                inputs.choice("resolution", PICTURE_RESOLUTIONS, advanced=True),
                io.Boolean.Input("unload", default=False, advanced=True),
            ],
            outputs=outputs(picture=io.Image),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, flux_model, flux_vae, clip, prompt, aspect_ratio, seed, steps, flux_schedule, flux_guidance, resolution, unload
    ) -> io.NodeOutput:
        request = PictureRequest.for_ratio(aspect_ratio, resolution, steps=steps, guidance=flux_guidance, schedule=flux_schedule)
        flux.require_flux(flux_model)
        flux.check_flux_vae(flux_vae)
        positive, _ = prompts.encode_kept(clip, prompt)
        try:
            return io.NodeOutput(flux.paint(flux_model, flux_vae, positive, request, seed, cls.hidden.unique_id))
        finally:
            if unload:
                flux.unload(flux_model)


class OpenSoraFluxToVideo(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OpenSoraFluxToVideo",
            category="Open-Sora/flux",
            enable_expand=True,
            inputs=[
                *_flux_inputs(),
                io.Model.Input("model"),
                io.Vae.Input("vae"),
                io.String.Input("prompt", multiline=True, dynamic_prompts=True),
                io.String.Input("negative_prompt", multiline=True, dynamic_prompts=True, default=""),
                inputs.choice("resolution", VIDEO_RESOLUTIONS),
                inputs.choice("aspect_ratio", geometry.ASPECT_RATIOS),
                io.Int.Input("num_frames", default=129, min=5, max=1025, step=4),
                inputs.seed(),
                inputs.steps(),
                _steps_input("image_steps"),
                *_schedule_inputs(),
                *inputs.decoration(advanced=True),
                *inputs.guidance(advanced=True),
                io.Int.Input("image_seed", default=SAME_SEED, min=SAME_SEED, max=MAX_SEED, optional=True),
                inputs.choice("image_resolution", PICTURE_RESOLUTIONS, optional=True, advanced=True),
                io.String.Input("image_prompt", multiline=True, dynamic_prompts=True, default="", optional=True, advanced=True),
                inputs.length(),
                inputs.speed(),
            ],
            outputs=[
                io.Image.Output(display_name="video frames"),
                io.Image.Output(display_name="picture"),
                io.Latent.Output(display_name="latent"),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
        )

    @classmethod
    def validate_inputs(cls, num_frames=None, length=None):
        return inputs.length_problems(length, num_frames, geometry.CAUSAL)

    @classmethod
    def execute(
        cls,
        flux_model,
        flux_vae,
        clip,
        model,
        vae,
        prompt,
        negative_prompt,
        resolution,
        aspect_ratio,
        num_frames,
        seed,
        steps,
        image_steps,
        flux_schedule,
        flux_guidance,
        motion_score,
        fps,
        text_guidance,
        image_guidance,
        image_seed,
        image_resolution,
        image_prompt,
        length,
        speed,
    ) -> io.NodeOutput:
        num_frames = inputs.frames_of(length, num_frames)
        flux.check_parts(flux_model, flux_vae, clip, model, vae)
        flux.check_video(resolution, aspect_ratio, num_frames, (text_guidance, image_guidance))
        PictureRequest.for_ratio(aspect_ratio, image_resolution, steps=image_steps, guidance=flux_guidance, schedule=flux_schedule)
        decorated = DEFAULT.text.words(prompt, Said(fps, motion_score))
        shown = image_prompt if image_prompt.strip() else prompt
        is_kept = flux.keep_prompts(clip, [shown, decorated, negative_prompt], cls.hidden.unique_id)
        picture = {
            "prompt": shown, "aspect_ratio": aspect_ratio, "seed": seed if image_seed == SAME_SEED else image_seed, "steps": image_steps,
            "flux_schedule": flux_schedule, "flux_guidance": flux_guidance, "resolution": image_resolution, "unload": True,
        }  # fmt: skip
        text = {"prompt": prompt, "negative_prompt": negative_prompt, "motion_score": motion_score, "fps": fps, "keep_encoded": is_kept}
        latent = {"resolution": resolution, "aspect_ratio": aspect_ratio, "num_frames": num_frames}
        sampler = {"seed": seed, "steps": steps, "text_guidance": text_guidance, "image_guidance": image_guidance, "speed": speed}
        links, nodes = flux.video_graph(cls.hidden.dynprompt, cls.hidden.unique_id, picture, text, latent, sampler)
        return io.NodeOutput(*links, expand=nodes)
