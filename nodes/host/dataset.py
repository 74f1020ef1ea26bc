"""Clips and captions of a folder in the host's input folder, encoded once and kept beside them; or of the lesson that needs no file."""

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
from ...opensora_core.evaluation import world
from ...opensora_core.family import Family
from ...opensora_core.geometry import Tiling
from ...opensora_core.media.dataset import captioned_clips
from ...opensora_core.names import complete_or_absent
from ...opensora_core.sampling.given import fit_clip
from ...opensora_core.sampling.plan import fingerprint_of
from . import clips, notice, prompts
from .vae import vae_config

LESSON = "charcoal shapes (built in)"  # in place of a folder
_COLOUR = "charcoal"
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
    count, *size = _extent(vae, asked)
    found = [piece for one in captioned_clips(folder) for piece in (one.scenes(asked.fps) if asked.cut_scenes else [one])]
    made_by = [fingerprint_of(network.named_parameters()) for network in (vae.first_stage_model, clip.cond_stage_model)]
    samples, short, bar = [], [], comfy.utils.ProgressBar(len(found))
    for piece in found:
        comfy.model_management.throw_exception_if_processing_interrupted()
        text, stat = _words(asked, piece.caption, asked.motion_score), piece.path.stat()
        about = [piece.path.name, stat.st_size, stat.st_mtime_ns, piece.first, count, size, asked.fps, text, *made_by]
        path = folder / _KEPT / f"{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]}.safetensors"
        kept = _kept(path)
        if kept is None and (frames := piece.read(count, asked.fps)) is not None:
            kept = _encode(frames, text, vae, clip, size, asked.family)
            _keep(path, kept)
        if kept is None:
            short.append(piece.path.name)
        else:
            samples.append(_sample(kept))
        bar.update(1)
    if not samples:
        raise OpenSoraError(f"No clip in {folder.name} has {count} frames at {asked.fps} FPS; use a shorter length, or longer clips.")
    skipped = f", {len(short)} too short and left out ({', '.join(short[:3])}{', …' if len(short) > 3 else ''})" if short else ""
    notice.show(f"{len(samples)} samples of {count} frames{skipped}", node_id, notice.INFO)
    return samples


def lesson(vae, clip, asked: Asked) -> list:
    """As `encoded`, of the clips that teach the built-in model a colour; each caption says its own clip's motion score."""
    count, *size = _extent(vae, asked)
    samples, scenes = [], world.lesson(_COLOUR)
    bar = comfy.utils.ProgressBar(len(scenes))
    for scene in scenes:
        comfy.model_management.throw_exception_if_processing_interrupted()
        text = _words(asked, scene.caption, scene.motion_score)
        samples.append(_sample(_encode(scene.render(count), text, vae, clip, size, asked.family)))
        bar.update(1)
    return samples


def _extent(vae, asked: Asked) -> tuple[int, int, int]:
    """(frames, height, width) of every sample, in pixels."""
    grid = vae_config(vae).grid
    return grid.pixel_frames(asked.shape[2]), asked.shape[3] * grid.space, asked.shape[4] * grid.space


def _words(asked: Asked, caption: str, motion_score: int) -> str:
    """What the text encoders read of a caption."""
    recipe = asked.family.text
    return recipe.words(caption, recipe.said(fps=asked.fps, motion_score=motion_score))


def _encode(frames: Tensor, text: str, vae, clip, size: list[int], family: Family) -> dict[str, Tensor]:
    latent = clips.encode(vae, fit_clip(frames, *size), Tiling(), None, lambda line: None)
    ((states, values),) = prompts.encode(clip, [text], None, recipe=family.text)[0]
    return {"latent": latent, "states": states, **{name: value for name, value in values.items() if isinstance(value, Tensor)}}


def _sample(encoded: dict[str, Tensor]) -> tuple:
    return encoded.pop("latent"), [[encoded.pop("states"), encoded]]


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
