"""The seam every layer goes through: a namespace of layer classes, and one attention function; and what networks compute alike.

A model takes `operations` (Linear, LayerNorm, RMSNorm, GroupNorm, Conv2d, Conv3d) and `attention`. Here they are plain
torch; in ComfyUI they are the host's, which is how casting, offload and quantised weights reach the
model without a branch in it.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .errors import OpenSoraError

CHUNK_ELEMENTS = 2**24  # that fp32 work takes at a time: 64 MiB, above which kernels are as fast as they get
THETA = 10000  # of every rotary table and sinusoid


def _uninitialised(layer: type[nn.Module]) -> type[nn.Module]:
    return type(layer.__name__, (layer,), {"reset_parameters": lambda self: None})


class _Conv3d(nn.Conv3d):
    """On a CPU oneDNN's for a small input too, for which torch takes another that is four times slower."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.device.type == "cpu" and x.dtype == torch.float32 and weight.shape[-1] > 1 and torch.backends.mkldnn.is_available():
            return torch.ops.aten.mkldnn_convolution(x, weight, bias, self.padding, self.stride, self.dilation, self.groups)
        return super()._conv_forward(x, weight, bias)


class TorchOperations:
    """Plain torch layers whose parameters are left uninitialised: a checkpoint owns every value."""

    Linear, Conv2d, Conv3d = map(_uninitialised, (nn.Linear, nn.Conv2d, _Conv3d))
    LayerNorm, RMSNorm, GroupNorm = map(_uninitialised, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm))


class Seams(NamedTuple):
    """How the layers of a network or codec are made: the classes, the type and place of parameters, a network's attention, the groups of a codec's norms."""

    operations: type
    dtype: torch.dtype | None
    device: torch.device | str | None
    attention: Callable | None = None
    groups: int = 32

    @property
    def place(self) -> dict:
        return {"dtype": self.dtype, "device": self.device}

    def linear(self, in_features: int, out_features: int) -> nn.Module:
        return self.operations.Linear(in_features, out_features, **self.place)

    def conv2d(self, in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> nn.Module:
        return self.operations.Conv2d(in_channels, out_channels, kernel, stride, 0 if stride > 1 else kernel // 2, **self.place)

    def conv3d(self, in_channels: int, out_channels: int, kernel=3, stride=1, padding=0, groups: int = 1, bias: bool = True) -> nn.Module:
        return self.operations.Conv3d(in_channels, out_channels, kernel, stride, padding, groups=groups, bias=bias, **self.place)

    def layer_norm(self, dim: int, eps: float = 1e-6, affine: bool = False) -> nn.Module:
        return self.operations.LayerNorm(dim, elementwise_affine=affine, eps=eps, **self.place)

    def rms_norm(self, dim: int) -> nn.Module:
        return self.operations.RMSNorm(dim, eps=1e-6, **self.place)

    def group_norm(self, channels: int, eps: float = 1e-6) -> nn.Module:
        return self.operations.GroupNorm(self.groups, channels, eps=eps, **self.place)

    def parameter(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(*shape, **self.place), requires_grad=False)


def sinusoid(values: Tensor, dim: int = 256) -> Tensor:
    """[N] -> [N, dim] fp32: `dim`/2 cosines, then as many sines. Source: DiT (facebookresearch/DiT models.py), TimestepEmbedder."""
    frequencies = torch.exp(torch.arange(dim // 2, dtype=torch.float32, device=values.device) * (-math.log(10000) / (dim // 2)))
    angles = values.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def rotary_table(ids: Tensor, axes_dim: tuple[int, ...]) -> Tensor:
    """Cosines and sines for every token [2, L, 1, D/2] fp32, ready to broadcast over heads of [B, L, H, D].

    ids: [L, 3] positions. axes_dim: rotary dimensions of each axis, summing to the head dimension D. Inside an axis of d,
    angle k is pos * theta**(-2k/d), k = 0..d/2-1.
    Source: SPEC of RoFormer (arXiv 2104.09864); axes as in black-forest-labs/flux math.py, rope.
    """
    angles = []
    for axis, dim in enumerate(axes_dim):
        # fp64 where it exists: a position of 256 at full frequency loses 1e-5 in fp32.
        precise = torch.float32 if ids.device.type == "mps" else torch.float64
        exponent = torch.arange(0, dim, 2, dtype=precise, device=ids.device) / dim
        angles.append(ids[:, axis, None].to(precise) * THETA**-exponent)
    table = torch.cat(angles, dim=-1)[:, None]
    return torch.stack((table.cos(), table.sin())).float()


def rotate_pairs(x: Tensor, table: Tensor) -> Tensor:
    """Turn the pairs (2k, 2k + 1) of the last axis by cosines and sines, a table [2, ...] that is broadcast over them."""
    cos, sin = table
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


def token_chunks(x: Tensor) -> list[slice]:
    """The tokens of [B, L, H, D] in chunks: fp32 work on all of them at once would be the largest thing in a block."""
    step = max(1, CHUNK_ELEMENTS * x.shape[1] // max(1, x.numel()))
    return [slice(start, start + step) for start in range(0, x.shape[1], step)]


def token_grid(latent_size: Sequence[int], patch: tuple[int, int, int]) -> tuple[int, int, int]:
    """Tokens along time, height and width. Raises an OpenSoraError for latents (frames, height, width) that are no whole patches."""
    if any(side % step for side, step in zip(latent_size, patch, strict=True)):
        raise OpenSoraError(
            f"Latents of {'x'.join(map(str, latent_size))} (frames x height x width) cannot be cut into patches of {'x'.join(map(str, patch))}; "
            f"use multiples of {', '.join(map(str, patch))} (height and width in pixels: of {8 * patch[1]})."
        )
    return tuple(side // step for side, step in zip(latent_size, patch, strict=True))


def pack(latents: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """[B, C, T, H, W] -> tokens [B, L, C * values of a patch], in the order t, h, w; inside one channel slowest, then t, h, w.

    Raises as token_grid. Source: hpcaitech/Open-Sora@7ad6a96a opensora/utils/sampling.py, pack.
    """
    t, h, w = token_grid(latents.shape[2:], patch)
    return rearrange(latents, "b c (t a) (h p) (w q) -> b (t h w) (c a p q)", t=t, h=h, w=w)


def unpack(tokens: Tensor, latent_size: Sequence[int], patch: tuple[int, int, int]) -> Tensor:
    """Exact inverse of pack."""
    (t, h, w), (a, p, q) = token_grid(latent_size, patch), patch
    return rearrange(tokens, "b (t h w) (c a p q) -> b c (t a) (h p) (w q)", t=t, h=h, w=w, a=a, p=p, q=q)


def gelu(x: Tensor) -> Tensor:
    """tanh-GELU of a tensor that is the caller's own: in place, unless gradients need it as it was."""
    return F.gelu(x, approximate="tanh") if torch.is_grad_enabled() else torch.ops.aten.gelu_(x, approximate="tanh")


def place_at(module: nn.Module, path: str, layer: nn.Module) -> None:
    """Make a layer a module's own under a name of several parts ("net.0.proj")."""
    *folders, name = path.split(".")
    for folder in folders:
        if folder not in module._modules:
            module.add_module(folder, nn.Module())
        module = module._modules[folder]
    module.add_module(name, layer)


class TwoLayers(nn.Module):
    """Two linear layers under the checkpoint's names, and an activation of what the first gives, its own, between them."""

    def __init__(self, names: tuple[str, str], widths: tuple[int, int, int], seams: Seams, activation: Callable[[Tensor], Tensor] = F.silu):
        super().__init__()
        self.names, self.activation = names, activation
        for name, ends in zip(names, (widths[:2], widths[1:]), strict=True):
            place_at(self, name, seams.linear(*ends))

    def forward(self, x: Tensor) -> Tensor:
        first, second = (self.get_submodule(name) for name in self.names)
        return second(self.activation(first(x)))


FUSED = "open_sora_fused"  # in transformer_options: a Fused, in place of layer by layer


class Fused(Protocol):
    """Layers of a block that a library computes in one pass over memory. The numbers are the layers' own to about 1e-6 in fp32."""

    def norm_modulate(self, norm: nn.Module, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """LayerNorm without parameters, then `* (1 + scale) + shift`. x: [B, L, D]; shift, scale: [B, 1, D]."""

    def norm_rotate(self, norm: nn.Module, x: Tensor, pe: Tensor, start: int) -> Tensor:
        """RMSNorm over the head, then the rotate-half rotation. x: [B, L, H, D], tokens from `start` of pe [2, all, 1, D/2]."""


class AllTokens:
    """Which tokens of a forward are this process's: all of them. parallel.py shares them out over several."""

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
    """Softmax attention without a mask, scale head_dim**-0.5: q, k, v [B, H, L, D] -> [B, L, H * D].

    transformer_options: the host's per-call options; unused here, so that a host function fits the seam.
    """
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class SeamedNetwork(nn.Module):
    """A network that denoises. Its kind makes the layers (`add_parts`, which raises an OpenSoraError for sizes that there cannot be).

    Args:
        config: sizes.
        operations: namespace with Linear, LayerNorm, RMSNorm, Conv2d and Conv3d.
        attention: (q, k, v [B, H, L, D], transformer_options) -> [B, L, H * D].

    INPUT: the name of its input layer, whose bias is never quantised.
    """

    INPUT: str

    def __init__(self, config, operations=TorchOperations, attention=attention, dtype=None, device=None):
        super().__init__()
        self.config = config
        self.add_parts(config, Seams(operations, dtype, device, attention))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype to call the model in: that of its input layer."""
        return self.get_submodule(self.INPUT).bias.dtype


class JointNetwork(SeamedNetwork):
    """A network whose text and video tokens attend together. tokens: which of them this process computes."""

    tokens = AllTokens()

    @property
    def piece_tokens(self) -> int:
        """Tokens that a layer takes at a time at most (token_chunks); far above them a forward's activations grow as a line."""
        return -(-CHUNK_ELEMENTS // self.config.hidden_size)


def inputs_like(
    latent_shape: tuple[int, ...], timestep: float, text: tuple[int, int], dtype: torch.dtype, device: torch.device | str
) -> dict[str, Tensor]:
    """Inputs that every network has, by name, for a latent [B, C, T, H, W] and a text (length, width); only the timestep is set."""
    return {
        "x": torch.empty(latent_shape, dtype=dtype, device=device),
        "timestep": torch.full((latent_shape[0],), timestep, device=device),
        "context": torch.empty(latent_shape[0], *text, dtype=dtype, device=device),
    }


def sliced_attention(slice_size: int):
    """An attention of the same result that takes `slice_size` heads at a time, for less workspace."""

    def attend(q: Tensor, k: Tensor, v: Tensor, transformer_options: dict) -> Tensor:
        parts = zip(q.split(slice_size, 1), k.split(slice_size, 1), v.split(slice_size, 1), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*p) for p in parts], dim=1).transpose(1, 2).flatten(2)

    return attend
