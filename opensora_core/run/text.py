"""The stage text: prompts in the words that the model knows, encoded by T5 and CLIP, each encoder read once for all that is asked of it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..codecs.tiling import Progress
from ..memory.component import Component
from ..memory.device import ran_out
from ..memory.loaded import PROMPTS
from ..sampling.run import Side, TextCondition
from ..text.prompt import check_text
from ..text.recipe import CLIP, TextRecipe, Unread
from .needs import beside_t5
from .parts import Networks
from .ran_out import change, with_less
from .request import Asked, EncodedPrompt, SamplingOptions

SAID = ("fps", "motion_score", "aesthetic_score", "camera_motion")  # of SamplingOptions, what a recipe may say beside a prompt
Texts = tuple[str, str | Unread]  # a prompt and a negative prompt as the encoders read them


def encode(networks: Networks, asked: Sequence[Asked], progress: Progress = lambda done, total: None) -> list[EncodedPrompt]:
    """Encode prompts. Those that were encoded before, or are kept from before (networks.keep_encoded), need no encoder.

    progress: (done, total) of T5's work alone. Raises an OutOfMemory where the device has no room for an encoder's work.
    """
    recipe = networks.files.family.text
    texts = [_texts(recipe, one) for one in asked if not isinstance(one, EncodedPrompt)]
    if networks.keep_encoded:
        encoders = [path for path in (networks.files.t5, networks.files.clip, networks.files.tokenizers) if path is not None]
        options = {**networks.options, "tokens": recipe.length, "mask": recipe.has_mask}
        kept = PROMPTS.get(texts, encoders, options, lambda missing: [vars(one) for one in _encode(networks, missing, progress)])
        conditions = [TextCondition(**parts) for parts in kept]
    else:
        conditions = _encode(networks, texts, progress)
    encoded = (EncodedPrompt(text, condition) for (text, _), condition in zip(texts, conditions, strict=True))
    return [one if isinstance(one, EncodedPrompt) else next(encoded) for one in asked]


def _texts(recipe: TextRecipe, asked: tuple) -> Texts:
    prompt, negative_prompt, options = asked
    check_text(prompt), check_text(negative_prompt, "The negative prompt")
    if options is None:
        return prompt, negative_prompt
    return worded(recipe, prompt, options), recipe.against(negative_prompt, options.unconditional)


def worded(recipe: TextRecipe, prompt: str, options: SamplingOptions) -> str:
    """A prompt with what a model reads beside it. Raises an OpenSoraError for a score or a rate that the model does not know."""
    return recipe.words(prompt, recipe.said(**{name: getattr(options, name) for name in SAID}))


def _encode(networks: Networks, texts: Sequence[Texts], progress: Progress) -> list[TextCondition]:
    """The encodings of each pair of texts, on the CPU; a pair that comes again is encoded once."""

    def by(component: Component, read: Callable, beside_bytes: int = 0, told=lambda done: None) -> dict[Texts, Sequence[Tensor]]:
        def work(encoder) -> dict[Texts, Sequence[Tensor]]:
            made = {}
            for done, pair in enumerate(texts, 1):
                if pair not in made:
                    made[pair] = read(encoder, [text for text in pair if isinstance(text, str)]).split(1)
                    if pair[1] is Unread.ZEROS:
                        made[pair] += (torch.zeros_like(made[pair][0]),)
                told(done)
            return made

        def say() -> str:
            advice = f"use T5 in 8 bits (an fp8 file or precision fp8_e4m3fn), {change(placement)}"
            return ran_out("Encoding the prompt", placement.device, advice)

        return with_less(component, placement, work, beside_bytes, ("encoding the prompt", "the text encoder"), say)[0]

    def states(encoder, some: list[str]) -> Tensor:
        return encoder.encode(some).float().cpu()

    if not texts:
        return []
    progress(0, len(texts))
    recipe, placement = networks.files.family.text, networks.placement
    named = {"context": by(networks.t5, states, beside_t5(networks), lambda done: progress(done, len(texts)))}
    if CLIP in recipe.encoders:
        named["y"] = by(networks.clip, states)
    if recipe.has_mask:
        named["attention_mask"] = by(networks.t5, lambda encoder, some: encoder.mask(encoder.tokenize(some)))
    return [TextCondition(*(_side(named, pair, side) for side in (0, 1))) for pair in texts]


def _side(named: dict[str, dict[Texts, Sequence[Tensor]]], pair: Texts, side: int) -> Side:
    """The named inputs of one side. The null caption has the prompt's mask alone: its features are in the transformer's file."""
    if pair[side] is Unread.NULL_CAPTION:
        return {"attention_mask": named["attention_mask"][pair][0]}
    return {name: made[pair][side] for name, made in named.items()}
