"""The library's networks behind the host's calling convention. What is here only translates: the host's calls and its choice of attention."""

from inspect import signature

import comfy.ldm.modules.attention
import comfy.patcher_extension
import torch
from torch import Tensor

from ...opensora_core.networks.cogvideox.model import CogVideoX
from ...opensora_core.networks.mmdit.config import TransformerConfig
from ...opensora_core.networks.mmdit.model import MMDiT
from ...opensora_core.networks.stdit.stdit import STDiT, STDiT3
from ...opensora_core.sampling import ddpm

TIMESTEP_SCALE = 1000  # the host hands the network its sigma times this; stock ModelSamplingSD3 sets the same number


def host_attention(q: Tensor, k: Tensor, v: Tensor, transformer_options: dict) -> Tensor:
    """The host's choice of attention kernel. q, k, v: [B, H, L, D] -> [B, L, H * D]."""
    # By attribute at call time: the host and other packs may replace it.
    attend = comfy.ldm.modules.attention.optimized_attention
    return attend(q, k, v, q.shape[1], skip_reshape=True, transformer_options=transformer_options)


class _HostNetwork:
    """Before a network of the library in a class: the host's calling convention, its wrappers and its choice of attention."""

    # In place of the core's property: the host's layers have no weight to ask before the file is read.
    dtype = None

    def __init__(self, config, operations, dtype, device):
        super().__init__(config, operations, host_attention, dtype, device)
        self.dtype = dtype
        self._reads = tuple(signature(super().forward).parameters)  # of what the host tells of a pass

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor, y=None, control=None, transformer_options=None, **named) -> Tensor:
        """x: [B, C or more, T, H, W], latents and then what is given beside them. Returns [B, C, T, H, W], or what the model gives there.

        Args:
            timestep: [B], as the network is told; of 2.0 sigma * 1000.
            named: what the MODEL's extra_conds gives. `control` and others are the host's; these models have no use for them.
        """
        options = transformer_options if transformer_options is not None else {}
        wrappers = comfy.patcher_extension.get_all_wrappers(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, options)
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(self._velocity, self, wrappers)
        return executor.execute(x, timestep, context, y, control, options, **named)  # wrappers look for the options at the end

    def _velocity(self, x, timestep, context, y, control, transformer_options, **named):
        latents, cond = x.split((self.config.in_channels, x.shape[1] - self.config.in_channels), dim=1)
        given = {**named, "context": context, "y": y, "cond": cond if cond.shape[1] else None, "transformer_options": transformer_options}
        return super().forward(latents, timestep, **{name: given[name] for name in self._reads if name in given})


class HostMMDiT(_HostNetwork, MMDiT):
    """2.0: condition channels appended to x (mask first)."""

    def __init__(self, config: TransformerConfig, operations, dtype, device):
        super().__init__(config, operations, dtype, device)
        # What the host's own networks of this kind say of themselves, and its nodes ask (RenormCFG for in_channels): of the latents.
        self.in_channels = self.out_channels = config.in_channels
        self.patch_size, self.hidden_size, self.num_heads = [1, config.patch_size, config.patch_size], config.hidden_size, config.num_heads

    def _velocity(self, x, timestep, *given, **named):
        return super()._velocity(x, timestep / TIMESTEP_SCALE, *given, **named)


class HostSTDiT3(_HostNetwork, STDiT3):
    """1.2 and 1.3: condition channels appended to x, and the velocity from data to noise."""

    def _velocity(self, *given, **named):
        return -super()._velocity(*given, **named)


class HostSTDiT(_HostNetwork, STDiT):
    """1.0 and 1.1, whose given frames are counted in the steps of the run.

    x is [B, 2 * C, T, H, W], so that the learned variance has a place in what comes back; its second half is not read.
    """

    def _velocity(self, x, timestep, context, y, control, transformer_options, edit=None, **named):
        if edit is not None:
            edit = ddpm.network_edit(edit, ddpm.tables(len(transformer_options["sample_sigmas"]) - 1, torch.float32))
        return super()._velocity(x, timestep, context, y, control, transformer_options, edit=edit, **named)


class HostCogVideoX(_HostNetwork, CogVideoX):
    """CogVideoX: the picture's channels appended to x; gives v."""
