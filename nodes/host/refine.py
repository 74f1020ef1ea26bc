"""Text models that ComfyUI's own Generate Text can run, asked to make a long description of a short prompt."""

from ...opensora_core.errors import OpenSoraError
from ...opensora_core.text import refine
from . import notice

# As the host's own node has them where nobody says otherwise.
_SAMPLING = {"top_k": 64, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.05}
_LOADERS = (
    "Load one that can with Load CLIP (CLIPLoader), such as a Qwen3.5, Qwen3-VL or Gemma 3 file in models/text_encoders: any that ComfyUI's Generate "
    "Text takes."
)


def refined(clip, prompt: str, kind: str, image, sampling: dict, node_id: str | None) -> tuple[str, int]:
    """(the description, the motion score that is proposed).

    clip: a host CLIP that can write.
    image: IMAGE, of which the first is shown to a model that can see, or None.
    sampling: seed, max_length (tokens), temperature (0: always the likeliest token).
    Raises OpenSoraError: the CLIP reads prompts and writes none.
    """
    held = getattr(clip, "cond_stage_model", None)
    inner = (getattr(part, "transformer", None) for part in held.modules()) if hasattr(held, "generate") else ()
    writer = next((one for one in inner if hasattr(one, "generate")), None)  # the network inside a CLIP
    if writer is None:
        name = "no text model" if held is None else type(held).__name__.rstrip("_")
        raise OpenSoraError(f"This CLIP ({name}) reads prompts and writes none. {_LOADERS}")
    sees = image is not None and hasattr(writer, "preprocess_embed")
    if image is not None and not sees:
        notice.show("This text model sees no pictures; it goes by the prompt alone.", node_id)
    media = {"image": image[:1] if sees else None, "video": None, "audio": None}
    tokens = clip.tokenize(refine.asked(prompt, kind, sees), skip_template=False, min_length=1, thinking=False, **media)
    answer = clip.decode(clip.generate(tokens, do_sample=sampling["temperature"] > 0, **sampling, **_SAMPLING))
    text, score = refine.answered(answer, prompt)
    if text == prompt.strip():
        notice.show("The text model wrote no description; the prompt is given on as it is.", node_id)
    return text, score
