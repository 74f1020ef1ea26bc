"""The seam every layer goes through: a namespace of layer classes, and one attention function.

A model takes `operations` (Linear, LayerNorm, RMSNorm, GroupNorm, Conv2d, Conv3d) and `attention`. Here they are plain
torch; in ComfyUI they are the host's, which is how casting, offload and quantised weights reach the
model without a branch in it.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

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


class Seams(NamedTuple):
    """How the layers of a network are made: the classes, the attention, and the type and place of parameters."""

    operations: type
    attention: callable
    dtype: torch.dtype | None
    device: torch.device | str | None

    @property
    def place(self) -> dict:
        return {"dtype": self.dtype, "device": self.device}

    def linear(self, in_features: int, out_features: int) -> nn.Module:
        return self.operations.Linear(in_features, out_features, **self.place)

    def layer_norm(self, dim: int, eps: float = 1e-6, affine: bool = False) -> nn.Module:
        return self.operations.LayerNorm(dim, elementwise_affine=affine, eps=eps, **self.place)

    def rms_norm(self, dim: int) -> nn.Module:
        return self.operations.RMSNorm(dim, eps=1e-6, **self.place)

    def parameter(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(*shape, **self.place), requires_grad=False)


def sinusoid(values: Tensor, dim: int = 256) -> Tensor:
    """[N] -> [N, dim] fp32: `dim`/2 cosines, then as many sines. Source: DiT (facebookresearch/DiT models.py), TimestepEmbedder."""
    frequencies = torch.exp(torch.arange(dim // 2, dtype=torch.float32, device=values.device) * (-math.log(10000) / (dim // 2)))
    angles = values.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


FUSED = "open_sora_fused"  # in transformer_options: a Fused, in place of layer by layer


class Fused(Protocol):
    """Layers of a block that a library computes in one pass over memory. The numbers are the layers' own to about 1e-6 in fp32."""

    def norm_modulate(self, norm: nn.Module, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """LayerNorm without parameters, then `* (1 + scale) + shift`. x: [B, L, D]; shift, scale: [B, 1, D]."""

    def norm_rotate(self, norm: nn.Module, x: Tensor, pe: Tensor, start: int) -> Tensor:
        """RMSNorm over the head, then the rotate-half rotation. x: [B, L, H, D], tokens from `start` of pe [2, all, 1, D/2]."""


class AllTokens:
    """Which tokens of a forward are this process's: all of them. parallel/shares.py shares them out over several."""

    def count(self, number: int) -> int:
        """How many of so many tokens."""
        return number

    def mine(self, tokens: Tensor, counts: Sequence[int], dim: int = 1) -> Tensor:
        """Of each part of a sequence, as long as `counts` say, its own share; the shares one behind the other."""
        return tokens

    def whole(self, tokens: Tensor, count: int) -> Tensor:
        """[B, count, D] of everybody's shares of it."""
        return tokens


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
