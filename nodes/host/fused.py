"""Layers of a block in one pass over memory, by the kernels that come with the host (comfy_kitchen).

In eager mode norms, modulation and rotation move far more memory than they compute. The kernels' sums are taken in another order, so
they serve the speeds that are no longer exact to the bit; a compiled model fuses by itself.
"""

import comfy.ops
import comfy.quant_ops
import torch
from torch import Tensor, nn

KERNELS = ("adaln", "rms_rope_split_half1")


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


def layers(device: torch.device, options: dict) -> KitchenLayers | None:
    """What serves a run on this device, of a MODEL with these options; None where it computes layer by layer.

    The plain backend of the kernels is the same steps one after the other, so another one must be there.
    """
    kitchen = getattr(comfy.quant_ops, "ck", None)
    if kitchen is None or device.type == "cpu" or "torch_compile_kwargs" in options:
        return None
    backends = kitchen.list_backends().items()
    able = [set(one["capabilities"]) for name, one in backends if name != "eager" and one["available"] and not one["disabled"]]
    return KitchenLayers() if any(have.issuperset(KERNELS) for have in able) else None
