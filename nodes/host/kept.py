"""Latents in the output folder: what a run grows there, and what is saved when a run ends badly."""

import os
from functools import partial
from pathlib import Path

import folder_paths
from torch import Tensor

from ...opensora_core.errors import OpenSoraError
from ...opensora_core.geometry import CAUSAL, Grid
from ...opensora_core.media import latent_file
from ...opensora_core.names import check_name, claim_unused, sweep

_PREFIX = "latents/open-sora-kept"


class OutputFile:
    """The .latent file of one run in the output folder: the whole video so far, replaced as it grows. A context manager, at whose end its
    name is no longer claimed.

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
        check_name(prefix, "filename_prefix")
        try:
            folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, output)
            sweep(Path(folder))
            # The host counts files that are there, not one that another run, or another host on the same folder, is about to write.
            wanted = partial("{}_{:05}_{}".format, name)
            path = Path(folder) / wanted(counter, latent_file.SUFFIX)
            self._claim = claim_unused(path, lambda number: path.with_name(wanted(counter + number, latent_file.SUFFIX)))
        except OSError as error:
            raise OpenSoraError(
                f"Nothing can be written to {prefix!r} in the output folder ({error.strerror}); make room, or choose another name."
            ) from error
        self.path = self._claim.path
        self.label = "/".join(filter(None, ["output", Path(subfolder).as_posix() if subfolder else "", self.path.name]))
        self.num_segments = 0

    def __enter__(self) -> "OutputFile":
        return self

    def __exit__(self, *error) -> None:
        self._claim.release()

    def keep(self, latents: Tensor, grid: Grid = CAUSAL) -> None:
        """Write the video with one more finished segment. grid: of its model."""
        frames = str(grid.pixel_frames(latents.shape[2]))
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
        with OutputFile(_PREFIX) as file:
            file.write(latents, {"made_by": "Open-Sora"})
    except OpenSoraError as error:
        return f"The latents could not be kept: {error}"
    return f"The latents, {state}, are kept in {file.label}."
