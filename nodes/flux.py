"""Text to picture to video: Flux draws the first frame, Open-Sora sets it in motion."""

from comfy_api.latest import io

from ..opensora_core import geometry
from ..opensora_core.choices import EXACT, PICTURE_SCHEDULES
from ..opensora_core.families.table import DEFAULT
from ..opensora_core.run.picture import DRAWING, GUIDANCE, PictureRequest
from ..opensora_core.run.request import SamplingOptions
from ..opensora_core.sampling.guidance import Guidance
from ..opensora_core.sampling.solvers import MAX_SEED
from ..opensora_core.text.prompt import MOTION_SCORE
from ..opensora_core.text.recipe import Said
from .host import flux, inputs, prompts
from .host.node import Node

SAME_SEED = -1
VIDEO_RESOLUTIONS = ("256px", "768px")
RESOLUTION = DRAWING.resolution
PICTURE_RESOLUTIONS = (RESOLUTION, *(name for name in geometry.RESOLUTIONS if name != RESOLUTION))


def _flux_inputs() -> list:
    return [
        io.Model.Input("flux_model", tooltip="Your own Flux.1, dev or schnell, in any precision, GGUF too: from Load Diffusion Model."),
        io.Vae.Input("flux_vae", tooltip="Flux's picture VAE, ae.safetensors, from Load VAE."),
        inputs.text_encoders(),
    ]


def _aspect_ratio_input() -> io.Combo.Input:
    return inputs.choice(
        "aspect_ratio",
        geometry.ASPECT_RATIOS,
        tooltip="Width : height of the video; the picture is drawn in the nearest size that Open-Sora was trained on.",
    )


def _picture_resolution_input(name: str, **place) -> io.Combo.Input:
    return io.Combo.Input(
        name,
        options=list(PICTURE_RESOLUTIONS),
        default=RESOLUTION,
        tooltip="Area of the picture. 768px as released, whatever the video's; the picture is then scaled to the video.",
        **place,
    )


def _steps_input(name: str) -> io.Int.Input:
    return io.Int.Input(
        name,
        default=0,
        min=0,
        max=geometry.LARGEST["num_steps"],
        tooltip="Steps of the picture. 0 = what the model was made for: 50 for Flux dev, as released, 4 for schnell.",
    )


def _schedule_inputs() -> list:
    return [
        inputs.choice(
            "flux_schedule",
            PICTURE_SCHEDULES,
            advanced=True,
            tooltip="How the picture's steps are spaced. open-sora = as released with Open-Sora; flux = Flux's own (equal steps for schnell); "
            "auto = open-sora for dev, flux for schnell.",
        ),
        io.Float.Input(
            "flux_guidance",
            default=GUIDANCE,
            min=0.0,
            max=100.0,
            step=0.1,
            advanced=True,
            tooltip="How strongly Flux dev follows the prompt. 4 is what Open-Sora was released with; schnell does not read it.",
        ),
    ]


class OpenSoraFluxPicture(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OpenSoraFluxPicture",
            display_name="Open-Sora Flux Picture",
            category="Open-Sora/flux",
            description="Draws the first frame of a video with your own Flux.1, in the size and by the schedule that Open-Sora was released with.",
            search_aliases=["open sora flux", "t2i2v", "text to image", "first frame"],
            inputs=[
                *_flux_inputs(),
                io.String.Input(
                    "prompt", multiline=True, dynamic_prompts=True, tooltip="What the picture shows. Nothing is added to it, as released."
                ),
                _aspect_ratio_input(),
                inputs.seed("Number that the picture's noise is drawn from. The released way uses the video's."),
                _steps_input("steps"),
                *_schedule_inputs(),
                _picture_resolution_input("resolution", advanced=True),
                io.Boolean.Input(
                    "unload",
                    default=False,
                    advanced=True,
                    tooltip="On = Flux leaves GPU memory as soon as the picture is drawn, for a video model to have all of it. Off = when ComfyUI "
                    "needs the room.",
                ),
            ],
            outputs=[io.Image.Output(display_name="picture", tooltip="The picture, for Open-Sora Image to Video or any other node.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        flux_model,
        flux_vae,
        clip,
        prompt,
        aspect_ratio,
        seed,
        steps,
        flux_schedule=PICTURE_SCHEDULES[0],
        flux_guidance=GUIDANCE,
        resolution=RESOLUTION,
        unload=False,
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
            display_name="Open-Sora Flux to Video",
            category="Open-Sora/flux",
            description="Prompt in, picture and video out: Flux draws the first frame and Open-Sora moves it, the way Open-Sora 2.0 is best used.",
            search_aliases=["open sora flux", "t2i2v", "text to image to video", "flux video", "text to video", "文生视频"],
            enable_expand=True,
            inputs=[
                *_flux_inputs(),
                io.Model.Input("model", tooltip="The Open-Sora model, from Open-Sora Load Model."),
                inputs.vae(),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="What picture and video show, and what moves, in full sentences.",
                ),
                io.String.Input(
                    "negative_prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip="What the video moves away from; Flux does not read it. Empty is how the model was trained.",
                ),
                inputs.choice(
                    "resolution",
                    VIDEO_RESOLUTIONS,
                    tooltip="Area of the video: those of squares with that side, what Open-Sora was trained at.",
                ),
                _aspect_ratio_input(),
                io.Int.Input(
                    "num_frames",
                    default=129,
                    min=5,
                    max=1025,
                    step=4,
                    tooltip="Length in frames, 4k+1. 129 frames are 5.4 seconds at 24 FPS, the longest the model was trained on.",
                ),
                inputs.seed("Number that noise is drawn from, of the picture too unless image_seed says otherwise."),
                inputs.steps("Steps of the video"),
                _steps_input("image_steps"),
                *_schedule_inputs(),
                *inputs.decoration("the video's prompt", advanced=True),
                inputs.text_guidance(advanced=True),
                inputs.image_guidance("the video follows the picture", advanced=True),
                *_picture_inputs(),
                inputs.length(),
                inputs.speed("video"),
            ],
            outputs=[
                io.Image.Output(display_name="video frames", tooltip="The frames of the video, the first of them the picture."),
                io.Image.Output(display_name="picture", tooltip="The picture as Flux drew it, in its own size."),
                io.Latent.Output(display_name="latent", tooltip="The finished clip's latent, to decode otherwise or to go on from."),
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
        flux_schedule=PICTURE_SCHEDULES[0],
        flux_guidance=GUIDANCE,
        motion_score=MOTION_SCORE,
        fps=SamplingOptions.fps,
        text_guidance=Guidance.text,
        image_guidance=Guidance.image,
        image_seed=SAME_SEED,
        image_resolution=RESOLUTION,
        image_prompt="",
        length="",
        speed=EXACT,
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
        video = flux.VideoInputs(
            text={"prompt": prompt, "negative_prompt": negative_prompt, "motion_score": motion_score, "fps": fps, "keep_encoded": is_kept},
            latent={
                "resolution": resolution, "aspect_ratio": aspect_ratio, "num_frames": num_frames, "width": 336, "height": 192, "batch_size": 1,
            },
            sampler={"seed": seed, "steps": steps, "text_guidance": text_guidance, "image_guidance": image_guidance, "speed": speed},
        )  # fmt: skip
        outputs, nodes = flux.video_graph(cls.hidden.dynprompt, cls.hidden.unique_id, picture, video)
        return io.NodeOutput(*outputs, expand=nodes)


def _picture_inputs() -> list:
    return [
        io.Int.Input(
            "image_seed",
            default=SAME_SEED,
            min=SAME_SEED,
            max=MAX_SEED,
            optional=True,
            advanced=True,
            tooltip="Number that the picture is drawn from. -1 = the same as seed, as released: a new seed is a new picture. Any other number keeps "
            "the picture while seed makes new videos of it; the seed of a picture is shown while it is drawn.",
        ),
        _picture_resolution_input("image_resolution", optional=True, advanced=True),
        io.String.Input(
            "image_prompt",
            multiline=True,
            dynamic_prompts=True,
            default="",
            optional=True,
            advanced=True,
            tooltip="What the picture shows, where that is not what the video's prompt says. Empty = the same prompt, as released.",
        ),
    ]
