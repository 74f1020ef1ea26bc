"""Encoded prompts kept in memory, so that a prompt that comes again needs no text encoder."""

import os
import weakref
from collections.abc import Hashable, Iterable

from ...opensora_core.families.table import DEFAULT
from ...opensora_core.memory.loaded import PROMPTS, stamp
from ...opensora_core.text.prompt import MOTION_SCORE
from ...opensora_core.text.recipe import TextRecipe
from . import notice, text

# Of every text encoder that was asked: its files as they were then, and how they were loaded. None where it does not say.
_sources: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def encode(clip, texts: Iterable[str], node_id: str | None, keep: bool = False, recipe: TextRecipe = DEFAULT.text) -> list[list]:
    """CONDITIONING of each text, every different one encoded once. What T5 had to drop is shown on the node.

    recipe: how the model reads prompts. keep: take from memory what the same files encoded before, and keep what is encoded now.
    Raises OpenSoraError: the CLIP holds other encoders.
    """
    encoded, texts = {}, list(texts)
    for prompt in dict.fromkeys(texts):
        encoded[prompt], note = encode_kept(clip, prompt, recipe) if keep else text.encode(clip, prompt, recipe)
        notice.show(note, node_id)
    return [_own(encoded[prompt]) for prompt in texts]


def encode_kept(clip, prompt: str, recipe: TextRecipe = DEFAULT.text) -> tuple[list, str]:
    """text.encode, or what it made before of the same text with the same files.

    Returns CONDITIONING of one's own (its tensors are shared), and a sentence for people or "".
    Raises OpenSoraError: the CLIP holds other encoders.
    """
    text.check_clip(clip, recipe)
    if not can_keep(clip):
        conditioning, note = text.encode(clip, prompt, recipe)
        return conditioning, note or "This prompt is not kept: its CLIP does not say which files it is from, or has hooks."
    changes = str(clip.patcher.patches_uuid) if clip.patcher.patches else ""  # a LoRA on the encoders
    options = {"source": note_source(clip), "changes": changes, "layer": clip.layer_idx, "tokens": recipe.length, "mask": recipe.has_mask}
    dropped = text.exact_tokens(clip.tokenizer, prompt, recipe)[1]
    return _own(PROMPTS.get([prompt], (), options, lambda texts: [text.encode(clip, one, recipe)[0] for one in texts])[0]), dropped


def motion_score(recipe: TextRecipe, score: int) -> int | None:
    """What a node's motion score says to a model: its default is 2.0's own, and stands for every other model's own way."""
    return None if recipe is not DEFAULT.text and score == MOTION_SCORE else score


def _own(conditioning: list) -> list:
    """A CONDITIONING whose settings a later node may change; its tensors are shared."""
    return [[states, dict(values)] for states, values in conditioning]


def can_keep(clip) -> bool:
    """Whether a CLIP says which files it is from, and reads every prompt in one way."""
    return not (note_source(clip) is None or clip.patcher.forced_hooks or clip.use_clip_schedule)


def note_source(clip) -> Hashable:
    """What a CLIP was loaded from. Remembered from the first time on: its files may be replaced while it lives."""
    network = clip.cond_stage_model
    if network not in _sources:
        files, others = loaded_from(clip.patcher.cached_patcher_init)
        _sources[network] = (tuple(map(stamp, files)), tuple(others)) if files else None
    return _sources[network]


def loaded_from(loader: tuple | None) -> tuple[list[str], list[str]]:
    """(paths of files, everything else in words), from the call that would load a model again."""
    files, others = [], []
    for argument in loader[1] if loader else ():
        values = argument if isinstance(argument, list | tuple) else [argument]
        if values and all(isinstance(value, str) and os.path.isfile(value) for value in values):
            files += values
        else:
            others.append(repr(argument))
    return files, others
