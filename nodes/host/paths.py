"""Files by the names that nodes show: from the host's model folders, or the small model that comes with the pack. Nowhere else."""

import os
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath

import comfy.utils
import folder_paths
from torch import Tensor

from ...opensora_core.checkpoint import detect
from ...opensora_core.checkpoint.files import Halves, merged_metadata, network_files, open_tensors, read_header
from ...opensora_core.errors import CheckpointError, OpenSoraError
from ...opensora_core.families.table import DEFAULT
from ...opensora_core.names import check_name, shown
from ...opensora_core.run import files as model_files

SMALL = "small (built in)"
VAE = "vae"
T5, CLIP = "t5", "clip"  # parts of the small model that lie in one folder of the host's
_SMALL_FILES = {
    "diffusion_models": "Open_Sora_v2.safetensors",
    VAE: "hunyuan_vae.safetensors",
    T5: "google/t5-v1_1-xxl/model.safetensors",
    CLIP: "openai/clip-vit-large-patch14/model.safetensors",
}


PLANS = "open_sora_plans"  # folder of calibrated plans, beside the host's own model folders


def plan_folders() -> list[Path]:
    """Where calibrated plans are looked for: models/open_sora_plans, or what the host's own settings name so, then the pack."""
    named = folder_paths.folder_names_and_paths.get(PLANS)
    return [*map(Path, named[0] if named else [Path(folder_paths.models_dir) / PLANS]), model_files.PLANS]


def choices(folder: str, slot: str) -> list[str]:
    """Names to choose from: the files of a model folder, and the small model. What a new node begins with is first: a file that really is
    what the slot needs, as the reader of its header says, Open-Sora 2.0's before others; where there is none, the small model.

    Args:
        slot: as detect.require's: "transformer", "vae", "t5" or "clip".
    """
    names = folder_paths.get_filename_list(folder)
    fitting = [name for name in names if _what(folder_paths.get_full_path(folder, name))[0] == slot]
    own = (name for name in fitting if _what(folder_paths.get_full_path(folder, name))[1] in (DEFAULT.kind, *DEFAULT.codecs))
    best = next(own, (*fitting, None)[0])
    return [best, *(name for name in names if name != best), SMALL] if best else [SMALL, *names]


def _what(path: str | None) -> tuple[str, str]:
    """The slot of a file, "" for nothing of ours, and its kind; its header is read once for each size and time it has."""
    try:
        stat = os.stat(path or "")
        return _what_of(path, stat.st_size, stat.st_mtime_ns)
    except OSError:
        return "", ""


@lru_cache(maxsize=4096)
def _what_of(path: str, size: int, time: int) -> tuple[str, str]:
    if not path.endswith((".safetensors", ".sft")) or not size:
        return "", ""
    try:
        identity = detect.identify(read_header(path).shapes)
    except OpenSoraError:
        return "", ""
    return identity.slot, identity.kind


def model_file(folder: str, name: str, part: str | None = None) -> str | Halves:
    """Full path of a file in one of the host's model folders ("diffusion_models", "loras"), or of the small model's; of a VAE's half, both.

    Args:
        part: which part of the small model is meant, where the folder is for several.

    Raises:
        CheckpointError: a name that leads out of the folder, no such file, or a half whose other one is not beside it.
    """
    small = model_files.SMALL / _SMALL_FILES.get(part or folder, "none")
    if name == SMALL and small.is_file():
        return str(small)
    if name == SMALL and (part or folder) in _SMALL_FILES:
        raise CheckpointError(f"The built-in model is not in this copy of the pack ({small.name} is missing); install the pack again.")
    parts = (*PurePosixPath(name).parts, *PureWindowsPath(name).parts) if isinstance(name, str) else ()
    if not parts or ".." in parts or PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive or name.startswith("\\"):
        raise CheckpointError(f"{name!r} is not inside models/{folder}; put the file into that folder and choose it from the list.")
    path = folder_paths.get_full_path(folder, name) if name.isprintable() else None
    if path is None:
        raise CheckpointError(
            f"{shown(name)} is not in models/{folder} (any more); put the file there, press R to refresh, and choose it again."
        )
    return path if folder != VAE or isinstance(whole := model_files.whole_vae(path), Path) else whole


def load_tensors(path: str | Path | Halves) -> tuple[dict[str, Tensor], dict | None]:
    """(tensors by key, metadata) of a network by the host's own reader: of its file, or of all its shards or halves where it is in several.

    Torch files are read by the library: the host does not look for weights beside other things that a training tool saved (SAT's "module").

    Raises:
        CheckpointError: a shard is missing.
    """
    state, metadata = {}, []
    for file in network_files(path):
        header = read_header(file)
        if header.format == "torch":
            with open_tensors(header) as tensor:
                part, about = {key: tensor(key) for key in header.tensors}, None
        else:
            part, about = comfy.utils.load_torch_file(str(file), safe_load=True, return_metadata=True)
        state.update(part)
        metadata.append(about)
    return state, merged_metadata(metadata, Path(str(path)).name)


def new_file(folder: str, name: str) -> Path:
    """Full path of a safetensors file to be written into a model folder. ".safetensors" is added to a name without an ending.

    Raises:
        OpenSoraError: a name that leads anywhere else, or one that is taken.
    """
    parts = (*PurePosixPath(name).parts, *PureWindowsPath(name).parts)
    if not name.strip() or parts != (name, name) or name.startswith(".") or not name.isprintable():
        raise OpenSoraError(f"{name!r} is not a file name; give a name without folders, such as Open_Sora_v2_fp8.safetensors.")
    check_name(name, "file_name")
    if not PurePosixPath(name).suffix:
        name += ".safetensors"
    if folder_paths.get_full_path(folder, name) is not None:
        raise OpenSoraError(f"models/{folder} has {name} already, which is not overwritten; give another name, or delete it first.")
    # The host lists older names of a folder first (models/unet).
    folders = [Path(path) for path in folder_paths.get_folder_paths(folder)]
    target = next((path for path in folders if path.name == folder and path.is_dir()), None) or next(filter(Path.is_dir, folders), None)
    if target is None:
        raise OpenSoraError(f"There is no folder models/{folder}; make that folder, and try again.")
    return target / name


def stamp(folder: str, name: str, part: str | None = None) -> tuple[str | int, ...]:
    """What changes when a file, or one of its shards, is replaced by another of the same name: path, modification time, size of each.
    Arguments as model_file's."""
    files = network_files(model_file(folder, name, part))
    return tuple(fact for file in files for fact in (str(file), file.stat().st_mtime_ns, file.stat().st_size))
