"""Prompts: the two text encoders, and what becomes of a prompt before they read it."""

from comfy_api.latest import io

from ..opensora_core.choices import AUTO
from ..opensora_core.families.table import DEFAULT
from ..opensora_core.text.recipe import Said
from .host import inputs, keep, paths, prompts, shared, text
from .host.node import Node

FOLDER = "text_encoders"


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
                    options=paths.choices(FOLDER, "clip"),
                    tooltip="The CLIP-L text encoder in models/text_encoders, for instance clip_l.safetensors.",
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
        return [*paths.stamp(FOLDER, t5_name, paths.T5), *paths.stamp(FOLDER, clip_l_name, paths.CLIP), precision, device]

    @classmethod
    def execute(cls, t5_name, clip_l_name, precision, device=AUTO) -> io.NodeOutput:
        files = [paths.model_file(FOLDER, name, part) for name, part in ((t5_name, paths.T5), (clip_l_name, paths.CLIP))]
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
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="The encoded prompt."),
                io.Conditioning.Output(display_name="negative", tooltip="The encoded negative prompt, without added sentences."),
                io.String.Output(display_name="text", tooltip="The prompt as it was encoded, with its added sentences."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, clip, prompt, negative_prompt, motion_score, fps, keep_encoded=False) -> io.NodeOutput:
        decorated = DEFAULT.text.words(prompt, Said(fps, motion_score))
        positive, negative = prompts.encode(clip, [decorated, negative_prompt], cls.hidden.unique_id, keep_encoded)
        return io.NodeOutput(positive, negative, decorated)
