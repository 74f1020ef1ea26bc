"""Memory: where a model's weights are, smaller files, and what is loaded."""

from comfy_api.latest import io, ui

from ..opensora_core.checkpoint.quantize import FORMATS
from .host import notice, offload, paths, precision
from .host.model import require_open_sora

MODELS = "diffusion_models"


class OpenSoraOffload(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OpenSoraOffload",
            display_name="Open-Sora Offload",
            category="Open-Sora/memory",
            description="Says how much of a model's weights may be in GPU memory at a time; the rest waits in RAM and travels as it is needed.",
            search_aliases=["open sora offload", "low vram", "block swap", "cpu offload", "out of memory"],
            inputs=[
                io.Model.Input("model", tooltip="The Open-Sora model, from any loader, with or without LoRA; it is copied, never changed."),
                io.Combo.Input(
                    "mode",
                    options=list(offload.MODES),
                    default=offload.AUTO,
                    tooltip="auto = ComfyUI decides (best for most). resident = all weights in GPU memory, refused if they do not fit. "
                    "budget = at most budget_gib of them. minimal = as few as can be, slowest.",
                ),
                io.Float.Input(
                    "budget_gib",
                    default=8.0,
                    min=0.1,
                    max=1024.0,
                    step=0.5,
                    tooltip="GiB of weights in GPU memory at most, in the mode budget only. What a video itself needs comes on top.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model with this mode. The video is the same in every mode.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, mode, budget_gib) -> io.NodeOutput:
        require_open_sora(model)
        model, line = offload.apply_offload(model, mode, budget_gib)
        notice.show(line, cls.hidden.unique_id, notice.INFO)
        return io.NodeOutput(model)


class OpenSoraQuantize(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OpenSoraQuantize",
            display_name="Open-Sora Quantize",
            category="Open-Sora/memory",
            description="Writes an 8-bit copy of the transformer file, 15 instead of 24 GB, which ComfyUI's own loader reads too.",
            search_aliases=["open sora fp8", "open sora int8", "quantise", "convert model", "smaller model"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=paths.choices(MODELS),
                    tooltip="The bf16 or fp32 transformer in models/diffusion_models, for instance Open_Sora_v2.safetensors.",
                ),
                io.Combo.Input(
                    "format",
                    options=list(FORMATS),
                    default="fp8_e4m3fn",
                    tooltip="fp8_e4m3fn = one scale for each layer; int8 = one for each output of a layer, slightly more exact. Both give a file of 15 GB.",
                ),
                io.String.Input(
                    "file_name",
                    default="Open_Sora_v2_fp8_e4m3fn.safetensors",
                    tooltip="Name of the new file in models/diffusion_models, without folders. A file that exists is never overwritten.",
                ),
            ],
            outputs=[io.String.Output(display_name="report", tooltip="The file that was written, and how much the weights were changed.")],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name, format, file_name):
        return [*paths.stamp(MODELS, model_name), format, file_name]

    @classmethod
    def execute(cls, model_name, format, file_name) -> io.NodeOutput:
        source, target = paths.model_file(MODELS, model_name), paths.new_file(MODELS, file_name)
        report = precision.write_quantised(source, target, format)
        return io.NodeOutput(report, ui=ui.PreviewText(report))
