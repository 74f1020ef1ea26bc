"""Which kernels compute: attention's, chosen for one MODEL through the host's own override (without a choice the host's holds), and those that
come with the host (comfy_kitchen) for layers of a block, in one pass over memory.

In eager mode norms, modulation and rotation move far more memory than they compute. The kernels' sums are taken in another order, so
they serve the speeds that are no longer exact to the bit; a compiled model fuses by itself.
"""

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.ops
import comfy.quant_ops
import torch
from torch import Tensor, nn

from ...opensora_core.choices import AUTO, CUDNN, FLASH, SAGE, SDPA
from ...opensora_core.errors import OpenSoraError
from ...opensora_core.run.kernels import PACKAGES, cudnn_first

ATTENTION = (AUTO, SDPA, CUDNN, SAGE, FLASH)
KERNELS = {"adaln", "rms_rope_split_half1"}


def with_attention(model, name: str):
    """A copy of the MODEL that computes attention by a kernel; the MODEL itself for auto.

    Raises an OpenSoraError where the kernel's library is not installed in ComfyUI's Python, or there is no NVIDIA GPU for it.
    """
    if name == AUTO:
        return model
    attention = comfy.ldm.modules.attention
    attend = attention.get_attention_function(name, None) if name in PACKAGES else attention.attention_pytorch
    if attend is None:
        raise OpenSoraError(
            f"attention={name!r} needs the library {PACKAGES[name]}, which ComfyUI's Python does not have; use {AUTO} or {CUDNN}."
        )
    if name != SDPA and comfy.model_management.get_torch_device().type != "cuda":
        raise OpenSoraError(f"attention={name!r} computes on an NVIDIA GPU, and there is none here; use {AUTO}.")
    copy = model.clone()
    copy.set_model_optimized_attention(cudnn_first()(attend) if name == CUDNN else attend)
    return copy


class KitchenLayers:
    """opensora_core.ops.Fused of one run."""

    def __init__(self):
        self._held = (None, None)

    def norm_modulate(self, norm: nn.Module, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return comfy.quant_ops.ck.adaln(x, scale, shift, norm.eps)

    def norm_rotate(self, norm: nn.Module, x: Tensor, pe: Tensor, start: int) -> Tensor:
        of, rotation = self._held  # taken together: the host may run two devices in two threads
        if of is not pe:
            cos, sin = pe
            rotation = torch.stack((cos, -sin, sin, cos), dim=-1).unflatten(-1, (2, 2))[None]
            self._held = (pe, rotation)
        weight, bias, stream = comfy.ops.cast_bias_weight(norm, x, offloadable=True)
        rotated = comfy.quant_ops.ck.rms_rope_split_half1(x, rotation[:, start : start + x.shape[1]], weight, norm.eps)
        comfy.ops.uncast_bias_weight(norm, weight, bias, stream)
        return rotated


def fused(device: torch.device, options: dict) -> KitchenLayers | None:
    """What serves a run on this device, of a MODEL with these options; None where it computes layer by layer.

    The plain backend of the kernels is the same steps one after the other, so another one must be there.
    """
    kitchen = getattr(comfy.quant_ops, "ck", None)
    if kitchen is None or device.type == "cpu" or "torch_compile_kwargs" in options:
        return None
    backends = [one for name, one in kitchen.list_backends().items() if name != "eager" and one["available"] and not one["disabled"]]
    return KitchenLayers() if any(KERNELS <= {*one["capabilities"]} for one in backends) else None
