"""Clips and captions of a folder in the host's input folder, encoded once and kept beside them; or of the lesson that needs no file."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ...opensora_core.errors import OpenSoraError
from ...opensora_core.evaluation import world
from ...opensora_core.families.table import DEFAULT
from ...opensora_core.geometry import Tiling
from ...opensora_core.media.dataset import Piece, captioned_clips
from ...opensora_core.names import complete_or_absent
from ...opensora_core.sampling.given import fit_clip
from ...opensora_core.sampling.plan import fingerprint_of
from . import clips, notice, prompts
from .condition import FPS_KEY
from .families import family_of
from .vae import clip_shape, vae_config

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


class Encoder:
    """Makes samples, (latents [1, C, T, H, W], CONDITIONING), of clips and captions. Its arguments are inputs of the node.

    Raises OpenSoraError: a VAE of no video, or a LATENT of another one; see media/dataset.py; or nothing can be written beside the clips.
    """

    def __init__(self, vae, clip, latent: dict, fps: int, motion_score: int, model):
        self.vae, self.clip, self.fps, self.motion_score = vae, clip, fps, motion_score
        self.frames, *self.size = vae_config(vae).grid.decoded(clip_shape(vae, latent))  # of a sample, in pixels
        self.recipe = (DEFAULT if model is None else family_of(model)).text

    def of_folder(self, folder: Path, cut_scenes: bool, node_id: str | None) -> list[tuple]:
        """A sample of every clip in a folder, or scene of one, that is long enough; there must be one."""
        found = [piece for one in captioned_clips(folder) for piece in (one.scenes(self.fps) if cut_scenes else [one])]
        made_by = [fingerprint_of(network.named_parameters()) for network in (self.vae.first_stage_model, self.clip.cond_stage_model)]
        made = [self._of_piece(piece, made_by, folder / _KEPT) for piece in _counted(found)]
        samples = [sample for sample in made if sample is not None]
        short = [piece.path.name for piece, sample in zip(found, made, strict=True) if sample is None]
        if not samples:
            raise OpenSoraError(
                f"No clip in {folder.name} has {self.frames} frames at {self.fps} FPS; use a shorter length, or longer clips."
            )
        skipped = f", {len(short)} too short and left out ({', '.join(short[:3])}{', …' if len(short) > 3 else ''})" if short else ""
        notice.show(f"{len(samples)} samples of {self.frames} frames{skipped}", node_id, notice.INFO)
        return samples

    def of_lesson(self) -> list[tuple]:
        """A sample of every clip that teaches the built-in model a colour; each caption says its own clip's motion score."""
        scenes = _counted(world.lesson(_COLOUR))
        return [self._sample(self._encoded(scene.render(self.frames), self._words(scene.caption, scene.motion_score))) for scene in scenes]

    def _of_piece(self, piece: Piece, made_by: list[str], folder: Path) -> tuple | None:
        """The sample of a piece, kept in a folder from the first time on; None where the piece is too short."""
        text, stat = self._words(piece.caption, self.motion_score), piece.path.stat()
        about = [piece.path.name, stat.st_size, stat.st_mtime_ns, piece.first, self.frames, self.size, self.fps, text, *made_by]
        path = folder / f"{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]}.safetensors"
        with suppress(OSError, SafetensorError, KeyError):  # not there, or damaged: it is made
            return self._sample(load_file(path))
        if (frames := piece.read(self.frames, self.fps)) is None:
            return None
        encoded = self._encoded(frames, text)
        try:
            folder.mkdir(exist_ok=True)
            with complete_or_absent(path) as partial:
                partial.write_bytes(save(encoded))
        except OSError as error:
            raise OpenSoraError(f"What is encoded cannot be kept in {folder.parent.name} ({error.strerror}); make room there.") from error
        return self._sample(encoded)

    def _words(self, caption: str, motion_score: int) -> str:
        """What the text encoders read of a caption."""
        return self.recipe.words(caption, self.recipe.said(fps=self.fps, motion_score=prompts.motion_score(self.recipe, motion_score)))

    def _encoded(self, frames: Tensor, text: str) -> dict[str, Tensor]:
        latent = clips.encode(self.vae, fit_clip(frames, *self.size), Tiling(), None, lambda line: None)
        ((states, values),) = prompts.encode(self.clip, [text], None, recipe=self.recipe)[0]
        tensors = {"latent": latent, "states": states, **values}
        return {name: tensor.cpu().contiguous() for name, tensor in tensors.items() if isinstance(tensor, Tensor)}

    def _sample(self, encoded: dict[str, Tensor]) -> tuple:
        return encoded.pop("latent"), [[encoded.pop("states"), {**encoded, FPS_KEY: self.fps}]]


def _counted(pieces: list) -> Iterator:
    """Each of some pieces of work in turn, unless the run is interrupted, with progress on the node."""
    bar = comfy.utils.ProgressBar(len(pieces))
    for piece in pieces:
        comfy.model_management.throw_exception_if_processing_interrupted()
        yield piece
        bar.update(1)
