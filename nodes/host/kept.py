"""Latents in the output folder: what a run grows there, and what is saved when a run ends badly."""

import os
from pathlib import Path

import folder_paths
from torch import Tensor

from ...opensora_core.errors import OpenSoraError
from ...opensora_core.geometry import CAUSAL
from ...opensora_core.media import latent_file

_PREFIX = "latents/open-sora-kept"


class OutputFile:
    """The .latent file of one run in the output folder: the whole video so far, replaced as it grows.

    Args:
        prefix: as the host's own save nodes take it, folders included.

    Raises:
        OpenSoraError: a prefix that leads out of the output folder, or a folder that cannot be made.
    """

    def __init__(self, prefix: str):
        output = folder_paths.get_output_directory()
        # Asked before the host is, whose answer to a way out is an exception of no kind.
        target = os.path.realpath(os.path.join(output, os.path.normpath(prefix)))
        if not prefix.strip() or os.path.commonpath([os.path.realpath(output), os.path.dirname(target)]) != os.path.realpath(output):
            raise OpenSoraError(f"filename_prefix={prefix!r} leads out of the output folder; use a name such as latents/open-sora-long.")
        try:
            folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, output)
        except OSError as error:
            raise OpenSoraError(f"Nothing can be written to {prefix!r} in the output folder ({error.strerror}).") from error
        file = f"{name}_{counter:05}_{latent_file.SUFFIX}"
        self.path = Path(folder) / file
        self.label = f"output/{Path(subfolder).as_posix()}/{file}" if subfolder else f"output/{file}"
        self.num_segments = 0

    def keep(self, latents: Tensor) -> None:
        """Write the video with one more finished segment."""
        frames = str(CAUSAL.pixel_frames(latents.shape[2]))
        self.write(latents, {"made_by": "OpenSoraContinueVideo", "segments_added": str(self.num_segments + 1), "frames": frames})
        self.num_segments += 1

    def write(self, latents: Tensor, about: dict[str, str]) -> None:
        """Write latents in place of what is there."""
        try:
            latent_file.save_latents(self.path, latents, about)
        except OSError as error:
            raise OpenSoraError(f"{self.label} could not be written ({error}); make room, or choose another filename_prefix.") from error

    @property
    def sentence(self) -> str:
        """Where finished work is; "" before there is any."""
        if not self.num_segments:
            return ""
        return f"The video with {self.num_segments} finished segment{'s' * (self.num_segments > 1)} is in {self.label}."


def keep(latents: Tensor, state: str) -> str:
    """Save latents [B, C, T, H, W] in the VAE's scale; a sentence that says where, or why not. state: what they are, "finished"."""
    try:
        file = OutputFile(_PREFIX)
        file.write(latents, {"made_by": "Open-Sora"})
    except OpenSoraError as error:
        return f"The latents could not be kept: {error}"
    return f"The latents, {state}, are kept in {file.label}."
