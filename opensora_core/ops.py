"""The seam every layer goes through: a namespace of layer classes, and one attention function.

A model takes `operations` (Linear, LayerNorm, RMSNorm, GroupNorm, Conv2d, Conv3d) and `attention`. Here they are plain
torch; in ComfyUI they are the host's, which is how casting, offload and quantised weights reach the
model without a branch in it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TorchOperations:
    """Plain torch layers whose parameters are left uninitialised: a checkpoint owns every value."""

    class Linear(nn.Linear):
        def reset_parameters(self):
            pass

    class LayerNorm(nn.LayerNorm):
        def reset_parameters(self):
            pass

    class RMSNorm(nn.RMSNorm):
        def reset_parameters(self):
            pass

    class GroupNorm(nn.GroupNorm):
        def reset_parameters(self):
            pass

    class Conv2d(nn.Conv2d):
        def reset_parameters(self):
            pass

    class Conv3d(nn.Conv3d):
        def reset_parameters(self):
            pass


def attention(q: Tensor, k: Tensor, v: Tensor, transformer_options: dict) -> Tensor:
    """Softmax attention without a mask, scale head_dim**-0.5.

    Args:
        q, k, v: [B, H, L, D].
        transformer_options: the host's per-call options; unused here, so that a host function fits the seam.

    Returns:
        [B, L, H * D].
    """
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def sliced_attention(slice_size: int):
    """An attention of the same result that takes `slice_size` heads at a time, for less workspace."""

    def attend(q: Tensor, k: Tensor, v: Tensor, transformer_options: dict) -> Tensor:
        parts = zip(q.split(slice_size, 1), k.split(slice_size, 1), v.split(slice_size, 1), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*p) for p in parts], dim=1).transpose(1, 2).flatten(2)

    return attend
