"""Memory: where a model's weights are, smaller files, and what is loaded."""

from comfy_api.latest import io, ui

from ..opensora_core import geometry
from ..opensora_core.choices import EXACT, FILE_FORMATS, OFFLOADS, POLICIES, PRECISIONS
from ..opensora_core.errors import OpenSoraError
from ..opensora_core.memory.estimate import Request, Settings
from .host import inputs, notice, offload, paths, planning, precision, shared
from .host.families import require_open_sora
from .host.node import Node

MODELS = "diffusion_models"


def _shown(report: str, node_id: str | None, *others) -> io.NodeOutput:
    """A report as first output, kept in the history and shown on the node."""
    notice.show(report, node_id, notice.INFO)
    return io.NodeOutput(report, *others, ui=ui.PreviewText(report))


class OpenSoraOffload(Node):
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
                inputs.choice(
                    "mode",
                    OFFLOADS,
                    tooltip="auto = ComfyUI decides (best for most). resident = all weights in GPU memory, refused if they do not fit. "
                    "budget = at most budget_gib of them. minimal = as few as can be, slowest.",
                ),
                inputs.budget(
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


class OpenSoraQuantize(Node):
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
                    options=paths.choices(MODELS, "transformer"),
                    tooltip="The bf16 or fp32 transformer in models/diffusion_models, for instance Open_Sora_v2.safetensors.",
                ),
                inputs.choice(
                    "format",
                    FILE_FORMATS,
                    tooltip="fp8_e4m3fn = one scale for each layer; int8 = one for each output of a layer, slightly more exact. Both give a file of 15 GB.",
                ),
                io.String.Input(
                    "file_name",
                    default="Open_Sora_v2_fp8_e4m3fn.safetensors",
                    tooltip="Name of the new file in models/diffusion_models, without folders. A file that exists is never overwritten.",
                ),
            ],
            outputs=[io.String.Output(display_name="report", tooltip="The file that was written, and how much the weights were changed.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name, format, file_name):
        return [*paths.stamp(MODELS, model_name), format, file_name]

    @classmethod
    def execute(cls, model_name, format, file_name) -> io.NodeOutput:
        source, target = paths.model_file(MODELS, model_name), paths.new_file(MODELS, file_name)
        report = precision.write_quantised(source, target, format)
        return _shown(report, cls.hidden.unique_id)


class OpenSoraLoadedModels(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OpenSoraLoadedModels",
            display_name="Open-Sora Loaded Models",
            category="Open-Sora/memory",
            description="Shows which models are loaded, where, in what precision and how large, and can take some off the GPU.",
            search_aliases=["open sora memory", "loaded models", "unload models", "free memory", "vram"],
            is_output_node=True,
            inputs=[
                io.AnyType.Input(
                    "any",
                    optional=True,
                    tooltip="Anything; it only makes this node run after the one it comes from. Not connected: at any time.",
                ),
                inputs.choice(
                    "unload",
                    shared.UNLOAD,
                    tooltip="What to take off the GPU first, through ComfyUI; it comes back when it is needed. none = only look.",
                ),
                io.Float.Input(
                    "keep_gib",
                    default=0.0,
                    min=0.0,
                    max=4096.0,
                    step=1.0,
                    optional=True,
                    advanced=True,
                    tooltip="GiB of models from Open-Sora loaders that stay in RAM when no workflow uses them, the least recently used given up first. "
                    "Until ComfyUI ends, RAM runs short or its cache is freed. 0 = none.",
                ),
            ],
            outputs=[io.String.Output(display_name="report", tooltip="A line for each model; the node shows it too.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, unload, any=None, keep_gib=0.0):
        return float("nan")  # what is loaded changes without any input

    @classmethod
    def execute(cls, unload, any=None, keep_gib=0.0) -> io.NodeOutput:
        kept = shared.keep_loaded(keep_gib)
        done = " ".join(filter(None, [shared.unload(unload), kept]))
        return _shown(shared.report(done), cls.hidden.unique_id)


class OpenSoraPreflight(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OpenSoraPreflight",
            display_name="Open-Sora Preflight",
            category="Open-Sora/memory",
            description="Says before a run what a video needs, stage by stage, recommends settings that fit, and stops the run if nothing does.",
            search_aliases=["open sora memory estimate", "will it fit", "vram estimate", "out of memory", "plan", "显存"],
            is_output_node=True,
            inputs=[
                *inputs.sides(336, 192, of=" of the video"),
                io.Int.Input(
                    "num_frames", default=129, min=1, max=geometry.LARGEST["num_frames"], step=4, tooltip="Frames of the video, 4k+1."
                ),
                io.Combo.Input(
                    "model_name",
                    options=paths.choices(MODELS, "transformer"),
                    tooltip="The transformer in models/diffusion_models that is to make it.",
                ),
                inputs.choice(
                    "precision",
                    PRECISIONS,
                    tooltip="The precision it is to be loaded in. auto = as stored, or whatever fits if that does not.",
                ),
                inputs.choice(
                    "offload",
                    OFFLOADS,
                    tooltip="The offload mode it is to run in; budget means 8 GiB here. auto = as much in GPU memory as fits.",
                ),
                inputs.length(),
                inputs.speed(),
            ],
            outputs=[
                io.String.Output(
                    display_name="report", tooltip="What is needed in each stage and what that is made of; the node shows it too."
                ),
                io.Combo.Output(display_name="precision", options=list(PRECISIONS), tooltip="For Open-Sora Load Model."),
                io.Combo.Output(display_name="offload", options=list(OFFLOADS), tooltip="For Open-Sora Load Model or Open-Sora Offload."),
                io.Combo.Output(display_name="policy", options=list(POLICIES), tooltip="For Open-Sora Tiled VAE Decode."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, width=None, height=None, num_frames=None, length=None, model_name=None):
        try:
            grid = geometry.CAUSAL if model_name is None else planning.grid_of(paths.model_file(MODELS, model_name))
        except OpenSoraError as error:
            return inputs.problems(model_name=str(error))
        return inputs.length_problems(length, num_frames, grid) | inputs.size_problems(height, width, grid)

    @classmethod
    def fingerprint_inputs(cls, width, height, num_frames, model_name, precision, offload, length="", speed=EXACT):
        # Not what is free at the moment: everything after this node would run again each time.
        return [*paths.stamp(MODELS, model_name), width, height, num_frames, precision, offload, length, speed]

    @classmethod
    def execute(cls, width, height, num_frames, model_name, precision, offload, length="", speed=EXACT) -> io.NodeOutput:
        path = paths.model_file(MODELS, model_name)
        request = Request(height, width, num_frames, grid=planning.grid_of(path), settings=Settings(precision, offload), speed=speed)
        report, *settings, fit = planning.advise(request, path, length)
        notice.show(fit["verdict"], cls.hidden.unique_id, notice.INFO)
        return io.NodeOutput(report, *settings, ui={"text": (report,), "open_sora_plan": [fit]})
