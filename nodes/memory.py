"""Memory: where a model's weights are, smaller files, and what is loaded."""

from comfy_api.latest import io, ui

from ..opensora_core import geometry
from ..opensora_core.choices import FILE_FORMATS, OFFLOADS, POLICIES, PRECISIONS
from ..opensora_core.errors import OpenSoraError
from ..opensora_core.memory.estimate import Request, Settings
from .host import inputs, notice, offload, paths, planning, precision, shared
from .host.families import require_open_sora
from .host.node import Node, outputs

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
            category="Open-Sora/memory",
            inputs=[io.Model.Input("model"), inputs.choice("mode", OFFLOADS), inputs.budget()],
            outputs=outputs(model=io.Model),
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
            category="Open-Sora/memory",
            is_output_node=True,
            inputs=[
                io.Combo.Input("model_name", options=paths.choices(MODELS, "transformer")),
                inputs.choice("format", FILE_FORMATS),
                io.String.Input("file_name", default="Open_Sora_v2_fp8_e4m3fn.safetensors"),
            ],
            outputs=outputs(report=io.String),
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
            category="Open-Sora/memory",
            is_output_node=True,
            inputs=[
                io.AnyType.Input("any", optional=True),
                inputs.choice("unload", shared.UNLOAD),
                io.Float.Input("keep_gib", default=0.0, min=0.0, max=4096.0, step=1.0, optional=True, advanced=True),
            ],
            outputs=outputs(report=io.String),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, unload, keep_gib, any=None):
        return float("nan")  # what is loaded changes without any input

    @classmethod
    def execute(cls, unload, keep_gib, any=None) -> io.NodeOutput:
        kept = shared.keep_loaded(keep_gib)
        done = " ".join(filter(None, [shared.unload(unload), kept]))
        return _shown(shared.report(done), cls.hidden.unique_id)


class OpenSoraPreflight(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OpenSoraPreflight",
            category="Open-Sora/memory",
            is_output_node=True,
            inputs=[
                *inputs.sides(336, 192),
                io.Int.Input("num_frames", default=129, min=1, max=geometry.LARGEST["num_frames"], step=4),
                io.Combo.Input("model_name", options=paths.choices(MODELS, "transformer")),
                inputs.choice("precision", PRECISIONS),
                inputs.choice("offload", OFFLOADS),
                inputs.length(),
                inputs.speed(),
            ],
            outputs=[
                io.String.Output(display_name="report"),
                io.Combo.Output(display_name="precision", options=list(PRECISIONS)),
                io.Combo.Output(display_name="offload", options=list(OFFLOADS)),
                io.Combo.Output(display_name="policy", options=list(POLICIES)),
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
    def fingerprint_inputs(cls, width, height, num_frames, model_name, precision, offload, length, speed):
        # Not what is free at the moment: everything after this node would run again each time.
        return [*paths.stamp(MODELS, model_name), width, height, num_frames, precision, offload, length, speed]

    @classmethod
    def execute(cls, width, height, num_frames, model_name, precision, offload, length, speed) -> io.NodeOutput:
        path = paths.model_file(MODELS, model_name)
        request = Request(height, width, num_frames, grid=planning.grid_of(path), settings=Settings(precision, offload), speed=speed)
        report, settings, fit = planning.advise(request, path, length)
        notice.show(fit["verdict"], cls.hidden.unique_id, notice.INFO)
        return io.NodeOutput(report, *settings, ui={"text": (report,), "open_sora_plan": [fit]})
