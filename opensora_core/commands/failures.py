"""What becomes of a video that could not be finished: a sentence for the person, and the latents that are kept of it."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from ..device_memory import is_out_of_memory, ran_out
from ..errors import DecodeOutOfMemory, OutOfMemory
from ..video import numbered


def keep_latents(error: DecodeOutOfMemory, video: Path) -> Path:
    """Write the latents beside where the video would be, for `OpenSoraPipeline.decode(load_file(path)["latents"])`."""
    number = 0
    while (path := numbered(video, number).with_suffix(".latents.safetensors")).exists():
        number += 1
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"latents": error.latents.contiguous()}, path)
    return path


def failure(error: BaseException) -> str | None:
    """One sentence for a failure that is the machine's; None for one that is ours, which should show where."""
    text = str(error).strip().splitlines()
    if isinstance(error, OutOfMemory):
        return str(error)
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "the device ran out of memory; try --offload minimal, --decode-policy low_memory, or a smaller or shorter video."
    if is_out_of_memory(error):
        advice = "try --dtype bf16, --decode-policy low_memory, or a smaller or shorter video"
        return ran_out("the machine", torch.device("cpu"), advice)
    if isinstance(error, OSError):
        return text[0] if text else type(error).__name__
    return None
