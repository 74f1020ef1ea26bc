"""Prompts: the two text encoders, what becomes of a prompt before they read it, many prompts from a list, and long ones made of short ones."""

from comfy_api.latest import io, ui

from ..opensora_core.choices import UNCONDITIONALS
from ..opensora_core.errors import OpenSoraError
from ..opensora_core.families.table import DEFAULT
from ..opensora_core.names import check_name
from ..opensora_core.text.prompt import MOTION_SCORE, file_name_part
from ..opensora_core.text.recipe import TextRecipe, Unread
from ..opensora_core.text.refine import IMAGE, KINDS
from .host import inputs, keep, paths, prompts, refine, shared, text
from .host.condition import FPS_KEY, NULL_KEY, marked, nothing
from .host.families import family_of
from .host.node import Node, outputs

FOLDER = "text_encoders"
T5_ALONE = "none (T5 alone)"
COMMENT = "#"
_MOST_PROMPTS = 9999


def _with_none(files: list[str]) -> list[str]:
    """The files, none, and the small model last."""
    return [*files[:-1], T5_ALONE, files[-1]]


class OpenSoraTextEncoderLoader(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OpenSoraTextEncoderLoader",
            category="Open-Sora/loaders",
            inputs=[
                io.Combo.Input("t5_name", options=paths.choices(FOLDER, "t5")),
                io.Combo.Input("clip_l_name", options=_with_none(paths.choices(FOLDER, "clip"))),
                inputs.choice("precision", text.PRECISIONS),
                inputs.choice("device", text.DEVICES, advanced=True),
            ],
            outputs=outputs(clip=io.Clip),
        )

    @classmethod
    def fingerprint_inputs(cls, t5_name, clip_l_name, precision, device):
        clip_l = [T5_ALONE] if clip_l_name == T5_ALONE else paths.stamp(FOLDER, clip_l_name, paths.CLIP)
        return [*paths.stamp(FOLDER, t5_name, paths.T5), *clip_l, precision, device]

    @classmethod
    def execute(cls, t5_name, clip_l_name, precision, device) -> io.NodeOutput:
        named = ((t5_name, paths.T5), (clip_l_name, paths.CLIP))
        files = [None if name == T5_ALONE else paths.model_file(FOLDER, name, part) for name, part in named]
        clip = shared.shared_text_encoders(*files, precision, device)
        prompts.note_source(clip)
        keep.watch(clip)
        return io.NodeOutput(clip)


class OpenSoraT5TextEncode(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OpenSoraT5TextEncode",
            category="Open-Sora/conditioning",
            inputs=[
                io.Clip.Input("clip"),
                io.String.Input("prompt", multiline=True, dynamic_prompts=True),
                io.String.Input("negative_prompt", multiline=True, dynamic_prompts=True, default=""),
                *inputs.decoration(),
                io.Boolean.Input("keep_encoded", default=False, optional=True, advanced=True),
                io.Model.Input("model", optional=True),
                io.Float.Input("aesthetic_score", default=-1.0, min=-1.0, max=10.0, step=0.1, optional=True),
                io.String.Input("camera_motion", default="", optional=True),
                inputs.choice("unconditional", UNCONDITIONALS, optional=True, advanced=True),
            ],
            outputs=outputs(positive=io.Conditioning, negative=io.Conditioning, text=io.String),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, clip, prompt, negative_prompt, motion_score, fps, keep_encoded, aesthetic_score, camera_motion, unconditional, model=None
    ) -> io.NodeOutput:
        family = DEFAULT if model is None else family_of(model)
        scores = {
            "motion_score": prompts.motion_score(family.text, motion_score),
            "aesthetic_score": None if aesthetic_score < 0 else aesthetic_score,
        }
        camera = camera_motion if camera_motion != "none" else ""
        decorated = family.text.words(prompt, family.text.said(fps=fps, camera_motion=camera, **scores))
        negative = family.text.against(negative_prompt, unconditional)
        positive, negative = _both(clip, decorated, negative, family.text, cls.hidden.unique_id, keep_encoded)
        if family is not DEFAULT:
            positive, negative = (marked(side, **{FPS_KEY: fps}) for side in (positive, negative))
        return io.NodeOutput(positive, negative, decorated)


def _both(clip, prompt: str, negative: str | Unread, recipe: TextRecipe, node_id: str | None, keep: bool) -> list[list]:
    """CONDITIONING of a prompt and of what stands against it."""
    if isinstance(negative, str):
        return prompts.encode(clip, [prompt, negative], node_id, keep, recipe)
    (positive,) = prompts.encode(clip, [prompt], node_id, keep, recipe)
    return [positive, nothing(positive) if negative is Unread.ZEROS else marked(positive, **{NULL_KEY: True})]


class OpenSoraPromptList(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OpenSoraPromptList",
            category="Open-Sora/conditioning",
            inputs=[
                io.String.Input("prompts", multiline=True, dynamic_prompts=False),
                io.Int.Input("first", default=1, min=1, max=_MOST_PROMPTS, control_after_generate=io.ControlAfterGenerate.fixed),
                io.Int.Input("count", default=0, min=0, max=_MOST_PROMPTS),
                io.String.Input("filename_prefix", default="video/open-sora"),
            ],
            outputs=[
                io.String.Output(display_name="prompt", is_output_list=True),
                io.String.Output(display_name="filename_prefix", is_output_list=True),
            ],
        )

    @classmethod
    def execute(cls, prompts, first, count, filename_prefix) -> io.NodeOutput:
        check_name(filename_prefix, "filename_prefix")
        lines = [line.strip() for line in prompts.splitlines()]
        wanted = [line for line in lines if line and not line.startswith(COMMENT)]
        if not wanted:
            raise OpenSoraError("The list is empty; write a prompt on each line.")
        if first > len(wanted):
            raise OpenSoraError(f"first={first} is past the end of the list, which has {len(wanted)} prompts; use 1 to {len(wanted)}.")
        chosen = list(enumerate(wanted, 1))[first - 1 : first - 1 + count if count else None]
        names = [f"{filename_prefix}_{number:04d}_{file_name_part(prompt)}" for number, prompt in chosen]
        return io.NodeOutput([prompt for _, prompt in chosen], names)


class OpenSoraPromptHelper(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OpenSoraPromptHelper",
            category="Open-Sora/conditioning",
            inputs=[
                io.Clip.Input("clip", lazy=True),
                io.String.Input("prompt", multiline=True, dynamic_prompts=True),
                inputs.choice("kind", KINDS),
                inputs.seed(),
                io.Int.Input("max_length", default=512, min=16, max=8192),
                io.Float.Input("temperature", default=0.7, min=0.0, max=2.0, step=0.05),
                io.Image.Input("image", optional=True),
                io.String.Input("edited", multiline=True, dynamic_prompts=False, default="", optional=True),
            ],
            outputs=outputs(text=io.String, motion_score=io.Int),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def check_lazy_status(cls, edited="", **others) -> list[str]:
        """The text model is loaded only where it is asked."""
        return [] if edited.strip() else ["clip"]

    @classmethod
    def execute(cls, clip, prompt, kind, seed, max_length, temperature, edited, image=None) -> io.NodeOutput:
        if edited.strip():
            return _written(edited.strip(), MOTION_SCORE)
        if not prompt.strip() and kind != IMAGE:
            raise OpenSoraError("The prompt is empty; say in a few words what to show.")
        sampling = {"seed": seed, "max_length": max_length, "temperature": temperature}
        return _written(*refine.refined(clip, prompt, kind, image, sampling, cls.hidden.unique_id))


def _written(text: str, score: int) -> io.NodeOutput:
    return io.NodeOutput(text, score, ui=ui.PreviewText(text))
