"""Which kernel computes attention, chosen for one MODEL through the host's own override; without a choice the host's holds."""

from contextlib import nullcontext

import comfy.ldm.modules.attention
import comfy.model_management

from ...opensora_core.choices import AUTO, CUDNN, FLASH, SAGE, SDPA
from ...opensora_core.errors import OpenSoraError
from ...opensora_core.run.kernels import PACKAGES, cudnn_first

CHOICES = (AUTO, SDPA, CUDNN, SAGE, FLASH)
OVERRIDE = "optimized_attention_override"  # the host's name, in transformer_options


def with_attention(model, name: str):
    """A copy of the MODEL that computes attention by a kernel; the MODEL itself for auto.

    Raises:
        OpenSoraError: the kernel's library is not installed in ComfyUI's Python, or there is no NVIDIA GPU for it.
    """
    if name == AUTO:
        return model
    attend = comfy.ldm.modules.attention.attention_pytorch
    if name in PACKAGES:
        attend = comfy.ldm.modules.attention.get_attention_function(name, None)
        if attend is None:
            raise OpenSoraError(
                f"attention={name!r} needs the library {PACKAGES[name]}, which ComfyUI's Python does not have; use {AUTO} or {CUDNN}."
            )
    if name != SDPA and comfy.model_management.get_torch_device().type != "cuda":
        raise OpenSoraError(f"attention={name!r} computes on an NVIDIA GPU, and there is none here; use {AUTO}.")

    def override(usual, *args, **kwargs):
        with cudnn_first() if name == CUDNN else nullcontext():
            return attend(*args, **kwargs)

    copy = model.clone()
    copy.model_options["transformer_options"] = {**copy.model_options.get("transformer_options", {}), OVERRIDE: override}
    return copy
