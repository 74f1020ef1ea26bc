"""Encoded prompts kept in memory, so that a prompt that comes again needs no text encoder."""

import os
import weakref
from collections.abc import Hashable

from ...opensora_core.memory.loaded import PROMPTS, FileIdentity, identity
from . import text

# Of every text encoder that was asked: its files as they were then, and how they were loaded. None where it does not say.
_sources: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def encode_kept(clip, prompt: str) -> tuple[list, str]:
    """As text.encode, from memory where the same files encoded the same text before.

    Returns:
        CONDITIONING of one's own (its tensors are shared), and a sentence for people or "".

    Raises:
        OpenSoraError: the CLIP holds other encoders.
    """
    text.check_clip(clip)
    source = note_source(clip)
    if not can_keep(clip):
        conditioning, note = text.encode(clip, prompt)
        return conditioning, note or "This prompt is not kept: its CLIP does not say which files it is from, or has hooks."
    changes = str(clip.patcher.patches_uuid) if clip.patcher.patches else ""  # a LoRA on the encoders
    options = {"source": source, "changes": changes, "layer": clip.layer_idx}
    dropped = text.exact_tokens(clip.tokenizer, prompt)[1]
    conditioning = PROMPTS.get([prompt], (), options, lambda: text.encode(clip, prompt)[0])
    return [[states, dict(values)] for states, values in conditioning], dropped


def can_keep(clip) -> bool:
    """Whether a CLIP says which files it is from, and reads every prompt in one way."""
    return note_source(clip) is not None and not clip.patcher.forced_hooks and not clip.use_clip_schedule


def note_source(clip) -> Hashable:
    """What a CLIP was loaded from. Remembered from the first time on: its files may be replaced while it lives."""
    network = clip.cond_stage_model
    if network not in _sources:
        _sources[network] = _source(clip.patcher.cached_patcher_init)
    return _sources[network]


def _source(loader: tuple | None) -> Hashable:
    """(identities of the files, everything else in words), from the call that would load the CLIP again."""
    if loader is None:
        return None
    files: list[FileIdentity] = []
    others: list[str] = []
    for argument in loader[1]:
        values = argument if isinstance(argument, list | tuple) else [argument]
        if values and all(isinstance(value, str) and os.path.isfile(value) for value in values):
            files += [identity(value) for value in values]
        else:
            others.append(repr(argument))
    return (tuple(files), tuple(others)) if files else None
