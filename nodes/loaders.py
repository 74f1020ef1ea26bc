"""The transformer and what is laid over it: model and LoRA files."""

import folder_paths
from comfy_api.latest import io

from .host import inputs, keep, kernels, notice, paths, shared
from .host.inputs import MODELS
from .host.model import apply_lora
from .host.node import Node
from .host.offload import apply_offload

LORAS = "loras"


class OpenSoraModelLoader(Node, category="loaders", outputs={"model": io.Model}):
    takes = [
        *inputs.of("model_name", "precision"),
        *inputs.of("offload", optional=True),
        *inputs.of("budget_gib", optional=True, advanced=True),
        inputs.choice("attention", kernels.ATTENTION, optional=True, advanced=True),
    ]

    @classmethod
    def fingerprint_inputs(cls, model_name):
        return paths.stamp(MODELS, model_name)

    @classmethod
    def execute(cls, model_name, precision, offload, budget_gib, attention) -> io.NodeOutput:
        loaded = shared.shared_model(paths.model_file(MODELS, model_name), precision)
        loaded, line = apply_offload(loaded, offload, budget_gib)
        loaded = kernels.with_attention(loaded, attention)
        keep.watch(loaded)
        cls.show(line, notice.INFO)
        return io.NodeOutput(loaded)


class OpenSoraLoraLoader(Node, category="loaders", outputs={"model": io.Model}):
    takes = [
        *inputs.of("model"),
        inputs.files("lora_name", lambda: folder_paths.get_filename_list(LORAS)),
        io.Float.Input("strength", default=1.0, min=-10.0, max=10.0, step=0.05),
    ]

    @classmethod
    def fingerprint_inputs(cls, lora_name):
        return paths.stamp(LORAS, lora_name)

    @classmethod
    def execute(cls, model, lora_name, strength) -> io.NodeOutput:
        patched, line = apply_lora(model, paths.model_file(LORAS, lora_name), strength)
        cls.show(line, notice.INFO)
        return io.NodeOutput(patched)
