"""Prompts: the two text encoders, and what becomes of a prompt before they read it."""

from comfy_api.latest import io

from ..opensora_core.choices import AUTO, UNCONDITIONALS
from ..opensora_core.families.table import DEFAULT
from ..opensora_core.text.prompt_1x import CAMERA_MOTIONS
from ..opensora_core.text.recipe import TextRecipe, Unread
from .host import inputs, keep, paths, prompts, shared, text
from .host.condition import FPS_KEY, NULL_KEY, marked, nothing
from .host.families import family_of
from .host.node import Node

FOLDER = "text_encoders"
T5_ALONE = "none (T5 alone)"


def _with_none(files: list[str]) -> list[str]:
    """The files, none, and the small model last."""
    return [*files[:-1], T5_ALONE, files[-1]]


class OpenSoraTextEncoderLoader(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OpenSoraTextEncoderLoader",
            display_name="Open-Sora Load Text Encoders",
            category="Open-Sora/loaders",
            description="Loads T5-XXL and CLIP-L, the files that Flux uses, so that Open-Sora reads prompts exactly as it was trained to.",
            search_aliases=["open sora clip", "t5 loader", "dual clip loader", "text encoder", "文本编码器"],
            inputs=[
                io.Combo.Input(
                    "t5_name",
                    options=paths.choices(FOLDER, "t5"),
                    tooltip="The T5 v1.1 XXL encoder in models/text_encoders, for instance t5xxl_fp16.safetensors.",
                ),
                io.Combo.Input(
                    "clip_l_name",
                    options=_with_none(paths.choices(FOLDER, "clip")),
                    tooltip="The CLIP-L text encoder in models/text_encoders, for instance clip_l.safetensors; none (T5 alone) for models that "
                    "read no CLIP, such as Open-Sora 1.2.",
                ),
                inputs.choice(
                    "precision",
                    text.PRECISIONS,
                    tooltip="How the weights are held. auto = as stored in the files; bf16 = 9.5 GB for T5; fp8_e4m3fn or int8 = 4.8 GB, slightly less exact; "
                    "nf4 = 2.9 GB, less exact, experimental.",
                ),
                inputs.choice(
                    "device",
                    text.DEVICES,
                    advanced=True,
                    tooltip="Where prompts are encoded. auto = where ComfyUI would; cpu = keep the GPU's memory free (slow).",
                ),
            ],
            outputs=[io.Clip.Output(display_name="clip", tooltip="T5 and CLIP-L together; plain CLIPTextEncode works with it too.")],
        )

    @classmethod
    def fingerprint_inputs(cls, t5_name, clip_l_name, precision, device):
        clip_l = [T5_ALONE] if clip_l_name == T5_ALONE else paths.stamp(FOLDER, clip_l_name, paths.CLIP)
        return [*paths.stamp(FOLDER, t5_name, paths.T5), *clip_l, precision, device]

    @classmethod
    def execute(cls, t5_name, clip_l_name, precision, device=AUTO) -> io.NodeOutput:
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
            display_name="Open-Sora Text Encode",
            category="Open-Sora/conditioning",
            description="Encodes a prompt and a negative prompt as Open-Sora 2.0 does: 512 T5 tokens, CLIP-L pooled, and sentences for frame rate and motion.",
            search_aliases=[
                "open sora prompt",
                "clip text encode",
                "t5 text encode",
                "motion score",
                "text to video",
                "提示词",
                "文生视频",
            ],
            inputs=[
                inputs.text_encoders(),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="What the video shows, in full sentences. Up to 512 tokens; brackets are plain text here, not weights.",
                ),
                io.String.Input(
                    "negative_prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip="What to move away from. Empty is neutral and is how the model was trained.",
                ),
                *inputs.decoration(),
                io.Boolean.Input(
                    "keep_encoded",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="On = keep what these prompts became (8 MB each, 256 MiB in all) until ComfyUI ends, so that using one again needs no text "
                    "encoder. Off = ComfyUI's own caching only.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The model that is to read the prompt; it says with how many tokens, and in which words scores are told. None = Open-Sora 2.0.",
                ),
                io.Float.Input(
                    "aesthetic_score",
                    default=-1.0,
                    min=-1.0,
                    max=10.0,
                    step=0.1,
                    optional=True,
                    tooltip="How good the video looks, said to Open-Sora 1.2 and 1.3: 0 to 10. -1 = the model's own way (6.5 for 1.2); 0 leaves it out.",
                ),
                io.String.Input(
                    "camera_motion",
                    default="",
                    optional=True,
                    tooltip=f"Said to Open-Sora 1.2 and 1.3: {', '.join(CAMERA_MOTIONS)}. Empty leaves it out.",
                ),
                inputs.choice(
                    "unconditional",
                    UNCONDITIONALS,
                    optional=True,
                    advanced=True,
                    tooltip="What the prompt is guided against. encoded = the negative prompt, also an empty one; zero = nothing at all, as CogVideoX's "
                    "authors do it; auto = the model's own way.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="The encoded prompt."),
                io.Conditioning.Output(display_name="negative", tooltip="The encoded negative prompt, without added sentences."),
                io.String.Output(display_name="text", tooltip="The prompt as it was encoded, with its added sentences."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        clip,
        prompt,
        negative_prompt,
        motion_score,
        fps,
        keep_encoded=False,
        model=None,
        aesthetic_score=-1.0,
        camera_motion="",
        unconditional=AUTO,
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
