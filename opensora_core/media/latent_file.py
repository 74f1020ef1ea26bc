"""Finished latents on disk, in the form of ComfyUI's own .latent files, which its Load Latent reads.

A safetensors file: `latent_tensor` [B, C, T, H, W], as the VAE gives and takes them, and an empty `latent_format_version_0`,
which says that they are not scaled.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import OpenSoraError
from ..names import complete_or_absent, shown
from ..readers import kind_of

SUFFIX = ".latent"
_LATENTS, _IS_UNSCALED = "latent_tensor", "latent_format_version_0"


def save_latents(path: str | Path, latents: Tensor, about: dict[str, str] | None = None) -> Path:
    """Write latents; the file appears, or is replaced, only when it is complete. An OSError leaves a file of that name as it was.

    path: ending in .latent; folders are made. latents: [B, C, T, H, W] in the VAE's own scale, on any device.
    about: texts to write into the file's header.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {_LATENTS: latents.detach().cpu().float().contiguous(), _IS_UNSCALED: torch.tensor([])}
    with complete_or_absent(path) as partial:
        partial.touch()
        usual = partial.stat().st_mode  # safetensors' files are their owner's alone
        try:
            save_file(tensors, partial, metadata=about)
        except SafetensorError as error:
            raise OSError(f"{path} could not be written ({error}).") from error
        partial.chmod(usual)
    return path


def read_latents(path: str | Path) -> Tensor:
    """Latents [B, C, T, H, W] fp32 in the VAE's own scale, on the CPU. Raises an OpenSoraError for what is not the file of a video's latents."""
    path = Path(path)
    if kind := kind_of(path):
        raise OpenSoraError(f"{shown(path)} is {kind}; give a {SUFFIX} file.")
    if not path.is_file():
        raise OpenSoraError(f"There is no file {shown(path)}; give a {SUFFIX} file, as --extend and ComfyUI's Save Latent write them.")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise OpenSoraError(f"{path.name} cannot be read as latents ({str(error)[:200]}); give a {SUFFIX} file.") from error
    latents = tensors.get(_LATENTS)
    if latents is None or latents.ndim != 5 or 0 in latents.shape or not latents.is_floating_point():
        found = f"latents of {list(latents.shape)}" if latents is not None else f"{len(tensors)} tensors, none named {_LATENTS}"
        raise OpenSoraError(f"{path.name} holds {found}; give latents of a video, [videos, channels, latent frames, height, width].")
    if _IS_UNSCALED not in tensors:
        raise OpenSoraError(f"{path.name} is of an old form whose scale is another model's; save the latents again.")
    if not torch.isfinite(latents).all():
        raise OpenSoraError(f"{path.name} holds values that are not numbers, as of a run that failed; make it again.")
    return latents.float()
