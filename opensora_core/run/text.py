"""The stage text: prompts decorated, encoded by T5 and CLIP, each encoder read once for all that is asked of it."""

from collections.abc import Sequence

from ..codecs.tiling import Progress
from ..errors import OutOfMemory
from ..memory.device import unless_out_of_memory
from ..memory.loaded import PROMPTS
from ..sampling.run import TextCondition
from ..text.prompt import decorate
from .parts import Networks
from .ran_out import encoding_ran_out
from .request import EncodedPrompt, GenerationRequest, SamplingOptions

# A prompt, its negative prompt, and the options that hold what its decoration says; None = it is read as it is, as a picture's.
Asked = tuple[str, str, SamplingOptions | None]


def encode_prompt(networks: Networks, asked: Asked) -> EncodedPrompt:
    """One prompt; what is kept of it from before (networks.keep_encoded) needs no encoder."""
    if not networks.keep_encoded:
        return encode_prompts(networks, [asked], lambda done, total: None)[0]
    files = networks.files
    texts = _decorated(asked)
    encoders = [path for path in (files.t5, files.clip, files.tokenizers) if path is not None]
    encoded = PROMPTS.get(texts, encoders, networks.options, lambda: vars(encode(networks, [texts], lambda done, total: None)[0]))
    return EncodedPrompt(texts[0], TextCondition(**encoded))


def encode_prompts(networks: Networks, asked: Sequence[Asked], progress: Progress) -> list[EncodedPrompt]:
    """As encode_prompt of each, but none is kept. progress counts T5's work alone."""
    texts = [_decorated(one) for one in asked]
    return [EncodedPrompt(text, condition) for (text, _), condition in zip(texts, encode(networks, texts, progress), strict=True)]


def encode_requests(networks: Networks, requests: Sequence[GenerationRequest], progress: Progress) -> list[EncodedPrompt]:
    """The prompt of every request, each different one encoded once."""
    asked = {request.prompt: _asked(request) for request in requests if isinstance(request.prompt, str)}
    encoded = dict(zip(asked, encode_prompts(networks, list(asked.values()), progress) if asked else (), strict=True))
    return [encoded[request.prompt] if isinstance(request.prompt, str) else request.prompt for request in requests]


def encode_request(networks: Networks, request: GenerationRequest) -> EncodedPrompt:
    """The prompt of one request."""
    return encode_prompt(networks, _asked(request)) if isinstance(request.prompt, str) else request.prompt


def encode(networks: Networks, texts: Sequence[tuple[str, str]], progress: Progress) -> list[TextCondition]:
    """Of each (text, negative text), both as they are, on the CPU.

    Raises:
        OutOfMemory: the device has no room for an encoder's work.
    """
    encoded = unless_out_of_memory(lambda: _encode(networks, texts, progress))
    if encoded is None:
        raise OutOfMemory(encoding_ran_out(networks.placement))
    return encoded


def _encode(networks: Networks, texts: Sequence[tuple[str, str]], progress: Progress) -> list[TextCondition]:
    contexts = []
    progress(0, len(texts))
    with networks.t5.at_work(networks.needs.beside_t5()) as t5:
        for pair in texts:
            contexts.append(t5.encode(list(pair)).float().cpu().split(1))
            progress(len(contexts), len(texts))
    with networks.clip.at_work() as clip:
        pooled = [clip.encode(list(pair)).float().cpu().split(1) for pair in texts]
    sides = ([{"context": context, "y": y} for context, y in zip(*rows, strict=True)] for rows in zip(contexts, pooled, strict=True))
    return [TextCondition(*pair) for pair in sides]


def _asked(request: GenerationRequest) -> Asked:
    return request.prompt, request.negative_prompt, request.options


def _decorated(asked: Asked) -> tuple[str, str]:
    prompt, negative_prompt, options = asked
    return prompt if options is None else decorate(prompt, options.fps, options.motion_score), negative_prompt
