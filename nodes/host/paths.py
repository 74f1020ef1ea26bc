"""Files by the names that nodes show: from the host's model folders, or the small model that comes with the pack. Nowhere else."""

import os
from pathlib import Path, PurePosixPath, PureWindowsPath

import folder_paths

from ...opensora_core import model_files
from ...opensora_core.errors import CheckpointError

SMALL = "small (built in)"
_SMALL_FILES = {"diffusion_models": "Open_Sora_v2.safetensors", "vae": "hunyuan_vae.safetensors"}


def choices(folder: str) -> list[str]:
    """Names to choose from: the files of a model folder and, where the pack has it, the small model."""
    files = folder_paths.get_filename_list(folder)
    return [*files, SMALL] if _small_file(folder).is_file() else files


def model_file(folder: str, name: str) -> str:
    """Full path of a file in one of the host's model folders ("diffusion_models", "loras"), or of the small model's.

    Raises:
        CheckpointError: a name that leads out of the folder, or no such file.
    """
    if name == SMALL and _small_file(folder).is_file():
        return str(_small_file(folder))
    parts = (*PurePosixPath(name).parts, *PureWindowsPath(name).parts)
    if not name or ".." in parts or PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive or name.startswith("\\"):
        raise CheckpointError(f"{name!r} is not inside models/{folder}; put the file there and choose it from the list.")
    path = folder_paths.get_full_path(folder, name)
    if path is None:
        raise CheckpointError(f"{name} is not in models/{folder} (any more); put it there, press R to refresh, and choose it again.")
    return path


def stamp(folder: str, name: str) -> tuple[str, int, int]:
    """What changes when a file is replaced by another of the same name: path, modification time, size."""
    path = model_file(folder, name)
    stat = os.stat(path)
    return path, stat.st_mtime_ns, stat.st_size


def _small_file(folder: str) -> Path:
    return model_files.SMALL / _SMALL_FILES.get(folder, "none")
