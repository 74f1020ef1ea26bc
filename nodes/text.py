"""Prompts: the two text encoders, what becomes of a prompt before they read it, many prompts from a list, and long ones made of short ones."""

from comfy_api.latest import io, ui

from ..opensora_core.choices import UNCONDITIONALS
from ..opensora_core.errors import OpenSoraError
from ..opensora_core.families.table import DEFAULT
from ..opensora_core.names import check_name
from ..opensora_core.text import refine
from ..opensora_core.text.prompt import MOTION_SCORE, file_name_part
from ..opensora_core.text.recipe import TextRecipe, Unread
from .host import inputs, keep, paths, prompts, shared, text
from .host.condition import FPS_KEY, NULL_KEY, marked, nothing
from .host.families import family_of
from .host.node import Node, gathered

FOLDER = "text_encoders"
T5_ALONE = "none (T5 alone)"
COMMENT = "#"
_MOST_PROMPTS = 9999


def _clip_files() -> list[str]:
    *files, small = paths.choices(FOLDER, "clip")
    return [*files, T5_ALONE, small]


class OpenSoraTextEncoderLoader(Node, category="loaders", outputs={"clip": io.Clip}, hidden=()):
    takes = [
        inputs.files("t5_name", lambda: paths.choices(FOLDER, "t5")),
        inputs.files("clip_l_name", _clip_files),
        inputs.choice("precision", text.PRECISIONS),
        inputs.choice("device", text.DEVICES, advanced=True),
    ]

    @classmethod
    def fingerprint_inputs(cls, t5_name, clip_l_name):
        clip_l = () if clip_l_name == T5_ALONE else paths.stamp(FOLDER, clip_l_name, paths.CLIP)
        return [*paths.stamp(FOLDER, t5_name, paths.T5), *clip_l]

    @classmethod
    def execute(cls, t5_name, clip_l_name, precision, device) -> io.NodeOutput:
        named = ((t5_name, paths.T5), (clip_l_name, paths.CLIP))
        files = [None if name == T5_ALONE else paths.model_file(FOLDER, name, part) for name, part in named]
        clip = shared.shared_text_encoders(*files, precision, device)
        prompts.note_source(clip)
        keep.watch(clip)
        return io.NodeOutput(clip)


_TEXTS = {"positive": io.Conditioning, "negative": io.Conditioning, "text": io.String}


class OpenSoraT5TextEncode(Node, category="conditioning", outputs=_TEXTS):
    takes = [
        *inputs.of("clip", "prompt", "negative_prompt", "motion_score", "fps"),
        io.Boolean.Input("keep_encoded", default=False, optional=True, advanced=True),
        *inputs.of("model", optional=True),
        io.Float.Input("aesthetic_score", default=-1.0, min=-1.0, max=10.0, step=0.1, optional=True),
        io.String.Input("camera_motion", default="", optional=True),
        inputs.choice("unconditional", UNCONDITIONALS, optional=True, advanced=True),
    ]

    @classmethod
    @gathered(said=("motion_score", "fps", "aesthetic_score", "camera_motion"))
    def execute(cls, clip, prompt, negative_prompt, keep_encoded, unconditional, model, said) -> io.NodeOutput:
        family = DEFAULT if model is None else family_of(model)
        fps, camera = said["fps"], said["camera_motion"]
        said["motion_score"] = prompts.motion_score(family.text, said["motion_score"])
        said |= {"camera_motion": "" if camera == "none" else camera}
        if said["aesthetic_score"] < 0:
            said["aesthetic_score"] = None
        decorated = family.text.words(prompt, family.text.said(**said))
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


class OpenSoraPromptList(Node, category="conditioning", outputs={"prompt": [io.String], "filename_prefix": [io.String]}, hidden=()):
    takes = [
        io.String.Input("prompts", multiline=True, dynamic_prompts=False),
        io.Int.Input("first", default=1, min=1, max=_MOST_PROMPTS, control_after_generate=io.ControlAfterGenerate.fixed),
        io.Int.Input("count", default=0, min=0, max=_MOST_PROMPTS),
        io.String.Input("filename_prefix", default="video/open-sora"),
    ]

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


_SAMPLING = {"top_k": 64, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.05}  # as the host's own node has them


class OpenSoraPromptHelper(Node, category="conditioning", outputs={"text": io.String, "motion_score": io.Int}):
    takes = [
        io.Clip.Input("clip", lazy=True),
        *inputs.of("prompt"),
        inputs.choice("kind", refine.KINDS),
        *inputs.of("seed"),
        io.Int.Input("max_length", default=512, min=16, max=8192),
        io.Float.Input("temperature", default=0.7, min=0.0, max=2.0, step=0.05),
        *inputs.of("image", optional=True),
        io.String.Input("edited", multiline=True, dynamic_prompts=False, default="", optional=True),
    ]

    @classmethod
    def check_lazy_status(cls, edited="", **others) -> list[str]:
        """The text model is loaded only where it is asked."""
        return [] if edited.strip() else ["clip"]

    @classmethod
    @gathered(sampling=("seed", "max_length", "temperature"))
    def execute(cls, clip, prompt, kind, sampling, edited, image) -> io.NodeOutput:
        text, score = edited.strip(), MOTION_SCORE
        if not text:
            if not prompt.strip() and kind != refine.IMAGE:
                raise OpenSoraError("The prompt is empty; say in a few words what to show.")
            sees = hasattr(_writer(clip), "preprocess_embed") and image is not None
            if image is not None and not sees:
                cls.show("This text model sees no pictures; it goes by the prompt alone.")
            media = {"image": image[:1] if sees else None, "video": None, "audio": None}
            tokens = clip.tokenize(refine.asked(prompt, kind, sees), skip_template=False, min_length=1, thinking=False, **media)
            # At temperature 0 always the likeliest token.
            answer = clip.decode(clip.generate(tokens, do_sample=sampling["temperature"] > 0, **sampling, **_SAMPLING))
            text, score = refine.answered(answer, prompt)
            if text == prompt.strip():
                cls.show("The text model wrote no description; the prompt is given on as it is.")
        return io.NodeOutput(text, score, ui=ui.PreviewText(text))


def _writer(clip):
    """The network inside a host CLIP that writes text. Raises an OpenSoraError where it has none and only reads prompts."""
    held = getattr(clip, "cond_stage_model", None)
    inner = (getattr(part, "transformer", None) for part in held.modules()) if hasattr(held, "generate") else ()
    writer = next((one for one in inner if hasattr(one, "generate")), None)
    if writer is None:
        name = "no text model" if held is None else type(held).__name__.rstrip("_")
        raise OpenSoraError(
            f"This CLIP ({name}) reads prompts and writes none. Load one that can with Load CLIP (CLIPLoader), such as a Qwen3.5, Qwen3-VL or Gemma 3 "
            "file in models/text_encoders: any that ComfyUI's Generate Text takes."
        )
    return writer
