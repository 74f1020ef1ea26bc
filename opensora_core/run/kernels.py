"""What a transformer's blocks compute with: an attention by its name, and blocks that are compiled, each class once."""

import logging
from collections.abc import Callable, Sequence
from contextlib import ContextDecorator
from functools import partial

import torch
from torch import Tensor, nn

from ..choices import AUTO, CUDNN, FLASH, SAGE, SDPA, SLICED, dtype_word
from ..errors import OpenSoraError
from ..ops import attention, sliced_attention

logger = logging.getLogger(__name__)

_HOPPER = 9  # compute capability
PACKAGES = {SAGE: "sageattention", FLASH: "flash-attn"}


def attention_of(name: str, device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    """An attention of ops.py's form by its name in choices.ATTENTIONS; its library must be there, and compute on this device in this dtype."""
    if name == SLICED:
        return sliced_attention(1)
    if name in (AUTO, SDPA):
        if name == AUTO and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == _HOPPER:
            logger.info("On this card attention cudnn, or sage if it is installed, is faster than auto.")
        return attention
    try:
        found = cudnn_first()(attention) if name == CUDNN else _of_library(name)
    except ImportError as error:
        missing = f"attention={name!r} needs the library {PACKAGES[name]}, which is not installed here; use {AUTO} or {CUDNN}."
        raise OpenSoraError(missing) from error
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        raise OpenSoraError(
            f"attention={name!r} computes on an NVIDIA GPU in bf16, and this is {device.type} in {dtype_word(dtype)}; use {AUTO}."
        )
    return found


def cudnn_first() -> ContextDecorator:
    """Inside it, or in a function that it decorates, torch's attention is cudnn's where that can compute it."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)


def _of_library(name: str) -> Callable[..., Tensor]:
    if name == SAGE:
        from sageattention import sageattn

        return lambda q, k, v, transformer_options: sageattn(q, k, v, tensor_layout="HND", is_causal=False).transpose(1, 2).flatten(2)
    from flash_attn import flash_attn_func  # it takes [B, L, H, D]

    return lambda q, k, v, transformer_options: flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v))).flatten(2)


def compile_blocks(blocks: Sequence[nn.Module]) -> None:
    """Compile the forward of blocks in place. Those of one class share the compiled code; what streams weights in and out stays around it.

    Where compiling fails, at the first call, a line says so and all go on uncompiled.
    """
    is_compiled = [True]

    def forward(eager: Callable, compiled: Callable, *args):
        if is_compiled[0]:
            try:
                return compiled(*args)
            except Exception as error:
                if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                    raise
                is_compiled[0] = False
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                logger.warning("The blocks could not be compiled (%s); they run uncompiled.", reason)
        return eager(*args)

    for block in blocks:
        block.forward = partial(forward, block.forward, torch.compile(block.forward, dynamic=False))
