"""Clips and captions of a folder in the host's input folder, encoded once and kept beside them."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...opensora_core.errors import OpenSoraError
from ...opensora_core.family import Family
from ...opensora_core.geometry import Tiling
from ...opensora_core.media.dataset import captioned_clips
from ...opensora_core.names import complete_or_absent
from ...opensora_core.sampling.given import fit_clip
from ...opensora_core.sampling.plan import fingerprint_of
from . import clips, notice, prompts
from .vae import vae_config

_KEPT = ".open_sora_encoded"  # folder of what is encoded, inside the folder of clips


def folders() -> list[str]:
    """Names of the folders in the host's input folder that hold captions."""
    inside = Path(folder_paths.get_input_directory())
    return sorted({path.parent.name for suffix in ("txt", "csv") for path in inside.glob(f"[!.]*/*.{suffix}")})


def folder_of(name: str) -> Path:
    """The folder of that name. Raises an OpenSoraError if there is none."""
    if name not in folders():
        raise OpenSoraError(
            f"folder={name!r} is no folder with captions in ComfyUI's input folder; put clips and their captions into one there, and press R."
        )
    return Path(folder_paths.get_input_directory()) / name


@dataclass(frozen=True)
class Asked:
    """How clips and captions are read.

    shape: of the latents. fps: that clips are read at. family: of the model that is to learn. motion_score: said in every caption.
    """

    shape: tuple[int, ...]
    fps: int
    motion_score: int
    cut_scenes: bool
    family: Family


def encoded(folder: Path, vae, clip, asked: Asked, node_id: str | None) -> list:
    """(latents [1, C, T, H, W], CONDITIONING) of every piece of a folder's clips that is long enough.

    Raises OpenSoraError: see media/dataset.py; no piece is long enough; a VAE of other latents; or nothing can be written beside the clips.
    """
    grid = vae_config(vae).grid
    count, size = grid.pixel_frames(asked.shape[2]), tuple(side * grid.space for side in asked.shape[3:])
    found = [piece for one in captioned_clips(folder) for piece in (one.scenes(asked.fps) if asked.cut_scenes else [one])]
    made_by = [fingerprint_of(network.named_parameters()) for network in (vae.first_stage_model, clip.cond_stage_model)]
    recipe, said = asked.family.text, asked.family.text.said(fps=asked.fps, motion_score=asked.motion_score)
    samples, short, bar = [], [], comfy.utils.ProgressBar(len(found))
    for piece in found:
        comfy.model_management.throw_exception_if_processing_interrupted()
        text, stat = recipe.words(piece.caption, said), piece.path.stat()
        about = [piece.path.name, stat.st_size, stat.st_mtime_ns, piece.first, count, size, asked.fps, text, *made_by]
        path = folder / _KEPT / f"{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]}.safetensors"
        kept = _kept(path)
        if kept is None and (frames := piece.read(count, asked.fps)) is not None:
            latent = clips.encode(vae, fit_clip(frames, *size), Tiling(), None, lambda line: None)
            ((states, values),) = prompts.encode(clip, [text], None, recipe=recipe)[0]
            kept = {"latent": latent, "states": states, **{name: value for name, value in values.items() if isinstance(value, Tensor)}}
            _keep(path, kept)
        if kept is None:
            short.append(piece.path.name)
        else:
            samples.append((kept.pop("latent"), [[kept.pop("states"), kept]]))
        bar.update(1)
    if not samples:
        raise OpenSoraError(f"No clip in {folder.name} has {count} frames at {asked.fps} FPS; use a shorter length, or longer clips.")
    skipped = f", {len(short)} too short and left out ({', '.join(short[:3])}{', …' if len(short) > 3 else ''})" if short else ""
    notice.show(f"{len(samples)} samples of {count} frames{skipped}", node_id, notice.INFO)
    return samples


def _kept(path: Path) -> dict[str, Tensor] | None:
    try:
        kept = load_file(path) if path.is_file() else {}
        return kept if {"latent", "states"} <= kept.keys() else None
    except (OSError, SafetensorError):  # damaged: it is made again
        return None


def _keep(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        path.parent.mkdir(exist_ok=True)
        with complete_or_absent(path) as partial:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial)
    except OSError as error:
        raise OpenSoraError(f"What is encoded cannot be kept in {path.parent.parent.name} ({error.strerror}); make room there.") from error
