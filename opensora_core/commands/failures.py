"""What becomes of a video that could not be finished: a sentence for the person, and the latents that are kept of it."""

from pathlib import Path

import torch

from ..errors import DecodeOutOfMemory, OutOfMemory
from ..media.latent_file import SUFFIX, save_latents
from ..media.video import numbered
from ..memory.device import is_out_of_memory, ran_out


def keep_latents(error: DecodeOutOfMemory, video: Path, scale: float) -> str:
    """Write the latents beside where the video would be, as ComfyUI and `latent_file.read_latents` read them, and say where they are.

    Args:
        scale: of the model's latents, OpenSoraPipeline.latent_scale.
    """
    number = 0
    while (path := numbered(video, number).with_suffix(SUFFIX)).exists():
        number += 1
    return f"They are in {save_latents(path, error.latents / scale)}, which ComfyUI's Load Latent reads too."


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
