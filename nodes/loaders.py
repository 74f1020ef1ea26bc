"""The transformer and what is laid over it: model and LoRA files."""

import folder_paths
from comfy_api.latest import io

from ..opensora_core.choices import OFFLOADS, PRECISIONS
from .host import attention, inputs, keep, lora, notice, paths, shared
from .host.attention import with_attention
from .host.node import Node, outputs
from .host.offload import apply_offload

MODELS, LORAS = "diffusion_models", "loras"


class OpenSoraModelLoader(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OpenSoraModelLoader",
            category="Open-Sora/loaders",
            inputs=[
                io.Combo.Input("model_name", options=paths.choices(MODELS, "transformer")),
                inputs.choice("precision", PRECISIONS),
                inputs.choice("offload", OFFLOADS, optional=True),
                inputs.budget(optional=True, advanced=True),
                inputs.choice("attention", attention.CHOICES, optional=True, advanced=True),
            ],
            outputs=outputs(model=io.Model),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name, precision, offload, budget_gib, attention):
        return [*paths.stamp(MODELS, model_name), precision, offload, budget_gib, attention]

    @classmethod
    def execute(cls, model_name, precision, offload, budget_gib, attention) -> io.NodeOutput:
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
            category="Open-Sora/loaders",
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input("lora_name", options=folder_paths.get_filename_list(LORAS)),
                io.Float.Input("strength", default=1.0, min=-10.0, max=10.0, step=0.05),
            ],
            outputs=outputs(model=io.Model),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name, strength, model=None):
        return [*paths.stamp(LORAS, lora_name), strength]

    @classmethod
    def execute(cls, model, lora_name, strength) -> io.NodeOutput:
        patched, line = lora.apply_lora(model, paths.model_file(LORAS, lora_name), strength)
        notice.show(line, cls.hidden.unique_id, notice.INFO)
        return io.NodeOutput(patched)
