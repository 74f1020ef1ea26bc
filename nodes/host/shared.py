"""One copy of a file's weights for all loader nodes that name it, and what of it is loaded where.

Held weakly: a model lives as long as some node's output, a running graph or the host's own list needs it, so that
/free, the host's cache eviction and replaced files do what their users expect; beyond that only what a person asks to be
kept (keep.py). Nothing is moved or unloaded here but through the host's own calls.
"""

import copy
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import comfy.model_management
from torch import nn

from ...opensora_core.choices import NF4
from ...opensora_core.errors import OpenSoraError
from ...opensora_core.memory.loaded import SHARED, stamp
from ...opensora_core.memory.residency import at_least
from . import keep, prompts
from .model import load_model
from .precision import is_nf4
from .text import load_text_encoders
from .vae import load_vae

MODEL, TEXT_ENCODERS, VAE, OTHER = KINDS = ("model", "text encoders", "VAE", "other")
NONE, ALL = "none", "everything"
UNLOAD = (NONE, MODEL, TEXT_ENCODERS, VAE, ALL)
_IN_CACHE = {kind: f"ComfyUI {kind}" for kind in KINDS}  # the library's own pipelines share other objects over the same files

_SHELL = "open_sora_clip"  # attachment of a CLIP's patcher

_ours: weakref.WeakSet = weakref.WeakSet()  # every patcher of a MODEL or CLIP, and every VAE, that was loaded here and is alive


@dataclass(frozen=True)
class Entry:
    """A model that the host knows, or that is in RAM because of ours.

    kind: one of KINDS. files: names of what it was loaded from; empty where it does not say.
    size: bytes of its weights. on_device: bytes of them on `device` now.
    precision: types of its weights, the most of them first. is_kept: in RAM beyond its use.
    """

    kind: str
    name: str
    files: tuple[str, ...]
    device: str
    size: int
    on_device: int
    precision: str
    is_kept: bool = False

    def line(self) -> str:
        """What it is, where and how large, for a person."""
        kept = ", kept loaded" if self.is_kept else ""
        what = ", ".join(self.files) or self.name
        if self.device == "cpu" or not self.on_device:
            where = "all in RAM"
        elif self.on_device >= self.size:
            where = f"all on {self.device}"
        else:
            where = f"{_gib(self.on_device)} on {self.device}, {_gib(self.size - self.on_device)} in RAM"
        return f"{self.kind}: {what} ({self.name}), {self.precision}, {_gib(self.size)}, {where}{kept}"


def shared_model(path: str, precision: str):
    """The MODEL of a transformer file, as model.load_model gives it. Clone it before changing anything."""
    return _shared(MODEL, path, {"precision": precision}, partial(load_model, path, precision))


def shared_text_encoders(t5_path: str, clip_l_path: str | None, precision: str, device: str):
    """A CLIP over the weights of two files, as text.load_text_encoders gives it."""
    options = {"with": clip_l_path and stamp(clip_l_path), "precision": precision, "device": device}

    def load():
        """The patcher, with everything else of the CLIP attached to it: copies with a LoRA are copies of it, and keep it alive."""
        clip = load_text_encoders(t5_path, clip_l_path, precision, device)
        patcher, clip.patcher = clip.patcher, None  # no circle
        patcher.set_attachments(_SHELL, clip)
        return patcher

    patcher = _shared(TEXT_ENCODERS, t5_path, options, load)
    clip = copy.copy(patcher.get_attachment(_SHELL))
    clip.patcher, clip.tokenizer_options = patcher, dict(clip.tokenizer_options)
    return clip


def shared_vae(path: str):
    """The VAE of a file, as vae.load_vae gives it."""
    return _shared(VAE, path, {}, partial(load_vae, path))


def keep_loaded(gib: float) -> str:
    """Keep up to so many GiB of models in RAM when nothing uses them (keep.py), and say so; errors as keep.set_limit's."""
    keep.set_limit(gib, tuple(_IN_CACHE.values()))
    return f"Up to {gib:g} GiB stay loaded after their use." if gib else ""


def unload(kind: str) -> str:
    """Take models of a kind off the device, through the host.

    kind: one of UNLOAD.
    Returns what was done, in a sentence; "" for none. Raises OpenSoraError: one of the models is at work.
    """
    if kind == NONE:
        return ""
    chosen = [patcher for patcher in _host_patchers() if kind == ALL or _kind(patcher) == kind]
    for patcher in chosen:
        if getattr(patcher.model, "current_patcher", None) is not None:
            raise OpenSoraError(
                f"{type(patcher.model).__name__} is sampling at this moment and is not unloaded; try again when it is done."
            )
    for patcher in chosen:
        comfy.model_management.unload_model_and_clones(patcher, unload_additional_models=False, all_devices=True)
    if not chosen:
        return f"There was {'nothing' if kind == ALL else f'no {kind}'} to unload."
    return f"Unloaded: {', '.join(type(patcher.model).__name__ for patcher in chosen)}."


def report(done: str) -> str:
    """Every model in the host's list, whoever loaded it, and those of ours that are only in RAM, after the sentence of what was done."""
    patchers = {id(patcher.model): patcher for patcher in [*map(_patcher, _ours), *_host_patchers()]}
    entries = sorted(map(_entry, patchers.values()), key=lambda entry: (KINDS.index(entry.kind), entry.line()))
    on_gpu = sum(entry.on_device for entry in entries if entry.device != "cpu")
    in_ram = sum(entry.size for entry in entries) - on_gpu
    verdict = f"{len(entries)} loaded: {_gib(on_gpu)} on the GPU, {_gib(in_ram)} in RAM" if entries else "No model is loaded."
    return "\n".join([verdict, *filter(None, [done]), *(entry.line() for entry in entries)])


def _shared(kind: str, path: str, options: dict[str, Hashable], load: Callable):
    found = SHARED.get(_IN_CACHE[kind], path, options, load, lambda thing: int(_patcher(thing).model_size()), keep.is_on())
    keep.yield_to_host()  # with what was loaded just now
    _ours.add(found)
    return found


def _host_patchers() -> list:
    loaded = (entry.model for entry in comfy.model_management.current_loaded_models)
    return [patcher for patcher in loaded if patcher is not None]


def _patcher(thing):
    """The host's patcher of a MODEL, CLIP or VAE."""
    return getattr(thing, "patcher", thing)


def _entry(patcher) -> Entry:
    return Entry(
        kind=_kind(patcher),
        name=type(patcher.model).__name__,
        files=tuple(Path(file).name for file in prompts.loaded_from(getattr(patcher, "cached_patcher_init", None))[0]),
        device=str(patcher.load_device),
        size=int(patcher.model_size()),
        on_device=int(patcher.loaded_size()),
        precision=_precision(patcher.model),
        is_kept=any(_patcher(kept).model is patcher.model for kept in SHARED.kept() if hasattr(_patcher(kept), "load_device")),
    )


def _precision(network: nn.Module) -> str:
    sizes: dict[str, int] = {}
    for module in network.modules():
        for key, weight in module.named_parameters(recurse=False):
            held = getattr(weight, "_qdata", weight)  # of the host's quantised tensors
            name = NF4 if key == "weight" and is_nf4(module) else str(held.dtype).removeprefix("torch.")
            sizes[name] = sizes.get(name, 0) + held.numel() * held.element_size()
    return " and ".join(sorted(sizes, key=lambda name: -sizes[name])) or "no weights"


def _kind(patcher) -> str:
    if hasattr(patcher.model, "diffusion_model"):
        return MODEL
    if any(hasattr(patcher.model, name) for name in ("encode_token_weights", "clip_layer")):
        return TEXT_ENCODERS
    return VAE if hasattr(patcher.model, "decode") or hasattr(patcher.model, "decoder") else OTHER


def _gib(num_bytes: int) -> str:
    return f"{at_least(num_bytes)} GiB"
