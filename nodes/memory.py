"""Memory: where a model's weights are, smaller files, and what is loaded."""

from comfy_api.latest import io

from ..opensora_core import geometry
from ..opensora_core.choices import FILE_FORMATS, OFFLOADS, POLICIES, PRECISIONS
from ..opensora_core.errors import OpenSoraError
from ..opensora_core.memory.estimate import Request, Settings
from .host import inputs, notice, offload, paths, planning, precision, shared
from .host.families import require_open_sora
from .host.inputs import MODELS
from .host.node import Node


class OpenSoraOffload(Node, category="memory", outputs={"model": io.Model}):
    takes = [*inputs.of("model"), inputs.choice("mode", OFFLOADS), *inputs.of("budget_gib")]

    @classmethod
    def execute(cls, model, mode, budget_gib) -> io.NodeOutput:
        require_open_sora(model)
        model, line = offload.apply_offload(model, mode, budget_gib)
        cls.show(line, notice.INFO)
        return io.NodeOutput(model)


class OpenSoraQuantize(Node, category="memory", outputs={"report": io.String}, is_output_node=True):
    takes = [
        *inputs.of("model_name"),
        inputs.choice("format", FILE_FORMATS),
        io.String.Input("file_name", default="Open_Sora_v2_fp8_e4m3fn.safetensors"),
    ]

    @classmethod
    def fingerprint_inputs(cls, model_name):
        return paths.stamp(MODELS, model_name)

    @classmethod
    def execute(cls, model_name, format, file_name) -> io.NodeOutput:
        source, target = paths.model_file(MODELS, model_name), paths.new_file(MODELS, file_name)
        return cls.reported(precision.write_quantised(source, target, format))


class OpenSoraLoadedModels(Node, category="memory", outputs={"report": io.String}, is_output_node=True):
    takes = [
        io.AnyType.Input("any", optional=True),
        inputs.choice("unload", shared.UNLOAD),
        io.Float.Input("keep_gib", default=0.0, min=0.0, max=4096.0, step=1.0, optional=True, advanced=True),
    ]

    @classmethod
    def fingerprint_inputs(cls):
        return float("nan")  # what is loaded changes without any input

    @classmethod
    def execute(cls, unload, keep_gib, any) -> io.NodeOutput:
        kept = shared.keep_loaded(keep_gib)
        done = " ".join(filter(None, [shared.unload(unload), kept]))
        return cls.reported(shared.report(done))


_PLAN = {"report": io.String, "precision": PRECISIONS, "offload": OFFLOADS, "policy": POLICIES}


class OpenSoraPreflight(Node, category="memory", outputs=_PLAN, is_output_node=True):
    takes = [
        *inputs.sides(336, 192),
        io.Int.Input("num_frames", default=129, min=1, max=geometry.LARGEST["num_frames"], step=4),
        *inputs.of("model_name", "precision", "offload", "length", "speed"),
    ]

    @classmethod
    def validate_inputs(cls, width=None, height=None, num_frames=None, length=None, model_name=None):
        try:
            grid = geometry.CAUSAL if model_name is None else planning.grid_of(paths.model_file(MODELS, model_name))
        except OpenSoraError as error:
            return {"model_name": str(error)}
        return inputs.length_problems(length, num_frames, grid) | inputs.size_problems(height, width, grid)

    @classmethod
    def fingerprint_inputs(cls, model_name):
        return paths.stamp(MODELS, model_name)  # not what is free now: everything after this node would run again each time

    @classmethod
    def execute(cls, width, height, num_frames, model_name, precision, offload, length, speed) -> io.NodeOutput:
        path = paths.model_file(MODELS, model_name)
        request = Request(height, width, num_frames, grid=planning.grid_of(path), settings=Settings(precision, offload), speed=speed)
        report, settings, fit = planning.advise(request, path, length)
        cls.show(fit["verdict"], notice.INFO)
        return io.NodeOutput(report, *settings, ui={"text": (report,), "open_sora_plan": [fit]})
