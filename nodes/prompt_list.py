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
            display_name="Open-Sora Prompt List",
            category="Open-Sora/conditioning",
            description="One prompt per line: the nodes behind it run once for each line, with each model loaded once, and every video gets its own file.",
            search_aliases=["open sora batch", "prompts from lines", "prompt iterator", "many prompts", "csv", "批量"],
            inputs=[
                io.String.Input(
                    "prompts",
                    multiline=True,
                    dynamic_prompts=False,
                    tooltip="One prompt per line. Empty lines, and lines that begin with #, are left out and not counted.",
                ),
                io.Int.Input(
                    "first",
                    default=1,
                    min=1,
                    max=_MOST,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="The prompt to begin with. With count 1 and the control below on increment, every run in the queue makes the next one.",
                ),
                io.Int.Input(
                    "count",
                    default=0,
                    min=0,
                    max=_MOST,
                    tooltip="How many prompts to run. 0 = all that are left. All videos of a run are in RAM until the last is decoded; "
                    "for long lists use 1 and queue as many runs.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="video/open-sora",
                    tooltip="How the files' names begin, in ComfyUI's output folder; the prompt's number and first words are added.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="prompt", is_output_list=True, tooltip="The prompts, one for each run of what is behind."),
                io.String.Output(
                    display_name="filename_prefix",
                    is_output_list=True,
                    tooltip="A name of its own for each, for the filename_prefix of Save Video: video/open-sora_0001_a-red-kite.",
                ),
            ],
        )

    @classmethod
    def execute(cls, prompts, first, count, filename_prefix) -> io.NodeOutput:
        check_name(filename_prefix, "filename_prefix")
        lines = [line.strip() for line in prompts.splitlines()]
        wanted = [line for line in lines if line and not line.startswith(COMMENT)]
        if not wanted:
            raise OpenSoraError("There is no prompt in the list; write one on each line.")
        if first > len(wanted):
            raise OpenSoraError(f"first={first} is past the end of the list, which has {len(wanted)} prompts; use 1 to {len(wanted)}.")
        chosen = list(enumerate(wanted, 1))[first - 1 : first - 1 + count if count else None]
        names = [f"{filename_prefix}_{number:04d}_{file_name_part(prompt)}" for number, prompt in chosen]
        return io.NodeOutput([prompt for _, prompt in chosen], names)
