"""Many videos from one graph: a list of prompts, over which the host runs every node behind it, once for each."""

from comfy_api.latest import io

from ..opensora_core.errors import OpenSoraError
from ..opensora_core.names import check_name
from ..opensora_core.text.prompt import file_name_part
from .host.node import Node

COMMENT = "#"
_MOST = 9999


class OpenSoraPromptList(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OpenSoraPromptList",
            category="Open-Sora/conditioning",
            inputs=[
                io.String.Input("prompts", multiline=True, dynamic_prompts=False),
                io.Int.Input("first", default=1, min=1, max=_MOST, control_after_generate=io.ControlAfterGenerate.fixed),
                io.Int.Input("count", default=0, min=0, max=_MOST),
                io.String.Input("filename_prefix", default="video/open-sora"),
            ],
            outputs=[
                io.String.Output(display_name="prompt", is_output_list=True),
                io.String.Output(display_name="filename_prefix", is_output_list=True),
            ],
        )

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
