"""The transformer and what is laid over it: model and LoRA files."""

import folder_paths
from comfy_api.latest import io

from ..opensora_core.choices import AUTO, DEFAULT_BUDGET_GIB, OFFLOADS, PRECISIONS
from .host import attention, inputs, keep, lora, notice, paths, shared
from .host.attention import with_attention
from .host.node import Node
from .host.offload import apply_offload

MODELS, LORAS = "diffusion_models", "loras"


class OpenSoraModelLoader(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OpenSoraModelLoader",
            display_name="Open-Sora Load Model",
            category="Open-Sora/loaders",
            description="Loads the Open-Sora 2.0 video transformer and says in a sentence what is wrong when a file is something else.",
            search_aliases=["open sora model", "opensora", "unet loader", "load diffusion model", "video model", "加载模型"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=paths.choices(MODELS, "transformer"),
                    tooltip="The transformer in models/diffusion_models: Open_Sora_v2.safetensors, or a quantised form of it that ComfyUI reads; one of "
                    "Open-Sora 1.2 or 1.3; or a CogVideoX, 2B (Apache-2.0), 5B or 1.5 (CogVideoX License: see this node's help).",
                ),
                inputs.choice(
                    "precision",
                    PRECISIONS,
                    tooltip="How the weights are held. auto = as stored in the file (bf16: 24 GB); fp8_e4m3fn or int8 = 15 GB, slightly less exact; "
                    "fp32 = 48 GB; nf4 = 11.4 GB, less exact, without LoRA, experimental.",
                ),
                inputs.choice(
                    "offload",
                    OFFLOADS,
                    optional=True,
                    tooltip="Where weights are while a video is made. auto = ComfyUI decides (best for most). resident = all in GPU memory, refused if "
                    "they do not fit. budget = at most budget_gib of them. minimal = as few as can be, slowest.",
                ),
                inputs.budget(
                    optional=True,
                    advanced=True,
                    tooltip="GiB of weights in GPU memory at most, where offload is budget; else without effect.",
                ),
                inputs.choice(
                    "attention",
                    attention.CHOICES,
                    optional=True,
                    advanced=True,
                    tooltip="What computes attention. auto = what ComfyUI was started with. sdpa = PyTorch's own; cudnn = faster on Hopper cards; sage and "
                    "flash = those libraries, where they are installed; sage is slightly less exact.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="The video transformer, for Open-Sora and stock samplers, LoRA and other model nodes."
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name, precision, offload=AUTO, budget_gib=DEFAULT_BUDGET_GIB, attention=AUTO):
        return [*paths.stamp(MODELS, model_name), precision, offload, budget_gib, attention]

    @classmethod
    def execute(cls, model_name, precision=AUTO, offload=AUTO, budget_gib=DEFAULT_BUDGET_GIB, attention=AUTO) -> io.NodeOutput:
        loaded = shared.shared_model(paths.model_file(MODELS, model_name), precision)
        loaded, line = apply_offload(loaded, offload, budget_gib)
        loaded = with_attention(loaded, attention)
        keep.watch(loaded)
        notice.show(line, cls.hidden.unique_id, notice.INFO)
        return io.NodeOutput(loaded)


class OpenSoraLoraLoader(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OpenSoraLoraLoader",
            display_name="Open-Sora Load LoRA",
            category="Open-Sora/loaders",
            description="Applies a LoRA in any of the usual key formats, the reference's own PEFT files included, and fails clearly if nothing in it matches.",
            search_aliases=["open sora lora", "load lora", "peft", "lora loader"],
            inputs=[
                io.Model.Input("model", tooltip="The Open-Sora model; it is copied, never changed."),
                io.Combo.Input(
                    "lora_name", options=folder_paths.get_filename_list(LORAS), tooltip="A LoRA for Open-Sora 2.0, in models/loras."
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="How strongly the LoRA changes the model. 1 = as trained, 0 = not at all, negative = the other way.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model with the LoRA.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name, strength, model=None):
        return [*paths.stamp(LORAS, lora_name), strength]

    @classmethod
    def execute(cls, model, lora_name, strength=1.0) -> io.NodeOutput:
        patched, line = lora.apply_lora(model, paths.model_file(LORAS, lora_name), strength)
        notice.show(line, cls.hidden.unique_id, notice.INFO)
        return io.NodeOutput(patched)
