"""Inputs that several nodes have, so that each is worded once."""

from comfy_api.latest import io

from ...opensora_core.sampling.guidance import Guidance


def oscillation() -> list:
    """Whether guidance rests on odd steps; the same on every node that samples."""
    return [
        io.Boolean.Input(
            "text_oscillation",
            default=Guidance.text_oscillation,
            advanced=True,
            tooltip="On = the released way: from step 10, every odd step runs at text guidance 1, which is faster. Off = the full scale at every step.",
        ),
        io.Boolean.Input(
            "image_oscillation",
            default=Guidance.image_oscillation,
            advanced=True,
            tooltip="On = the released way: from step 10, every odd step runs at image guidance 1. Off = the full scale at every step.",
        ),
    ]
