"""Whether what a stage made can be used: values that are numbers, frames that are not all of one colour. The host's nodes ask it too."""

import torch
from torch import Tensor

_LEAST_DIFFERENCE = 1 / 255  # in a channel; less is not seen


def is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite. A part at a time: the answer for a whole clip would take a quarter of its memory."""
    return all(bool(torch.isfinite(part).all()) for part in values.split(1)) if values.ndim else bool(torch.isfinite(values))


def not_numbers(stage: str, dtype: torch.dtype, cause: str) -> str:
    """The sentence for values that are not finite. stage: "Decoding", "Sampling, step 3 of 50,". cause: the likely one, a thing, without a full stop."""
    what = f"{stage} gave values that are not numbers (NaN or infinite), in {str(dtype).removeprefix('torch.')}"
    return f"Suspect {cause}. {what}."


def again_words(stage: str, dtype: torch.dtype) -> str:
    """The line for people before a second try. stage: "Decoding"."""
    return f"{stage} gave values that are not numbers in {str(dtype).removeprefix('torch.')}; it is done once more in float32."


def one_colour(frames: Tensor) -> str:
    """A line for people where frames [T, H, W, 3] in 0..1 show nothing but one colour; else ""."""
    return one_colour_between(frames.amin(dim=(0, 1, 2)).float(), frames.amax(dim=(0, 1, 2)).float(), len(frames))


def one_colour_between(low: Tensor, high: Tensor, count: int) -> str:
    """one_colour of `count` frames whose least and largest values, [3] in 0..1, are these."""
    if bool((high - low >= _LEAST_DIFFERENCE).any()):
        return ""
    colour = tuple(round(float(channel) * 255) for channel in (low + high) / 2)
    name = {(0, 0, 0): "black", (255, 255, 255): "white"}.get(colour, f"of one colour, {colour}")
    return (
        f"All {count} frames are {name}: look at the latents, the VAE and the nodes that patch the model before making more."
        if count > 1
        else f"The frame is {name} all over: look at the latents and the VAE."
    )
