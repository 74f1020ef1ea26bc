"""STDiT and STDiT2, the networks of Open-Sora 1.0 and 1.1: each block attends over space, then over time."""

import torch
from torch import Tensor, nn

from . import layers
from .config import STDiTConfig


class STDiTBlock(layers.Block):
    """Space, time, text, MLP. 1.0 has neither a norm nor modulations of its own for time, and gates it as it gates space."""

    def __init__(self, config: STDiTConfig, seams: layers.Seams):
        super().__init__(config, seams, has_norm=config.has_sizes, rotates_first=True)
        self.attn_temp = layers.SelfAttention(config, config.has_sizes, True, seams)
        self.norm_temp = seams.layer_norm(config.hidden_size) if config.has_sizes else None
        self.scale_shift_table_temporal = seams.parameter(3, config.hidden_size) if config.has_sizes else None

    def forward(self, x: Tensor, texts: list[Tensor], times: tuple[Tensor, Tensor | None], time_place: Tensor, options: dict) -> Tensor:
        """x: [B, T, S, C].

        Args:
            texts: of CaptionEmbedder. times: [B, 1 or T, 6 * C] of space and MLP, [B, 1 or T, 3 * C] of time (1.1).
            time_place: a rotary table (1.1), or an embedding [T, C] to add before attending over time, or None (1.0).
        """
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = layers.modulations(self.scale_shift_table, times[0])
        attended = self.attn(layers.modulate(self.norm1(x), shift, scale).flatten(0, 1), None, options)
        x = torch.addcmul(x, gate, attended.view(x.shape))
        if self.norm_temp is None:
            y, table = x if time_place is None else x + time_place[:, None], None
        else:
            shift, scale, gate = layers.modulations(self.scale_shift_table_temporal, times[1])
            y, table = layers.modulate(self.norm_temp(x), shift, scale), time_place
        y = y.transpose(1, 2)
        attended = self.attn_temp(y.flatten(0, 1), table, options)
        x = torch.addcmul(x, gate, attended.view(y.shape).transpose(1, 2))
        x = x + self.cross_attn(x, texts, options)
        return torch.addcmul(x, gate_mlp, self.mlp(layers.modulate(self.norm2(x), shift_mlp, scale_mlp)))


class BlockList(nn.ModuleList):
    """A list that gives its blocks when called, so that `network.blocks()` works here, where the checkpoint names the list `blocks` too."""

    def forward(self) -> list[nn.Module]:
        return list(self)


class STDiT(layers.STDiTBase):
    """Noise of a video latent and its learned variance, given text: Open-Sora 1.0."""

    def add_parts(self, config: STDiTConfig, seams: layers.Seams) -> None:
        self.blocks = BlockList(STDiTBlock(config, seams) for _ in range(config.depth))

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        *,
        context: Tensor | None = None,
        attention_mask: Tensor | None = None,
        transformer_options: dict | None = None,
    ) -> Tensor:
        """Predict once.

        Args:
            x: noisy latents [B, C, T, H, W].
            timestep: [B], 999 (noise) to 0. Rounded to x's dtype, as upstream does.
            context: T5 hidden states [B, L, context_in_dim], or None: the null caption. attention_mask: [B, L], 0 = not looked at.

        Returns:
            [B, 2 * C, T, H, W]: noise, then the variance as a share of the way between its bounds, -1..1.
        """
        options, frames = dict(transformer_options or {}), x.shape[2]
        t = self.t_embedder(timestep.to(x.dtype), x.dtype)
        texts = self.y_embedder(self.context_of(context, attention_mask), attention_mask)
        places = (place / self.config.space_scale for place in layers.token_places(*layers.token_size(x), x.device))
        tokens = self.x_embedder(x) + layers.position_embedding(*places, self.config.hidden_size, torch.float32).to(x.dtype)
        angles = (
            torch.arange(frames, device=x.device)[:, None] / self.config.time_scale * layers.frequencies(self.config.hidden_size, x.device)
        )
        place = torch.cat((angles.sin(), angles.cos()), dim=-1).to(x.dtype)
        times = (self.t_block(t)[:, None], None)
        for index, block in enumerate(self.blocks()):
            tokens = block(tokens, texts, times, place if index == 0 else None, options)
        return self.finish(self.final_layer(tokens, t, None, None), x.shape[2:])


class STDiT2(STDiT):
    """Open-Sora 1.1: knows the size, length and frame rate, and which frames are given."""

    def add_parts(self, config: STDiTConfig, seams: layers.Seams) -> None:
        super().add_parts(config, seams)
        hidden = config.hidden_size
        self.t_block_temp = nn.Sequential(nn.SiLU(), seams.linear(hidden, 3 * hidden))
        self.rope = nn.Module()
        self.rope.freqs = seams.parameter(config.head_dim // 2)
        self.csize_embedder, self.ar_embedder = layers.Embedder(hidden // 3, seams), layers.Embedder(hidden // 3, seams)
        self.fl_embedder, self.fps_embedder = layers.Embedder(hidden, seams), layers.Embedder(hidden, seams)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        *,
        context: Tensor | None = None,
        sizes: Tensor,
        attention_mask: Tensor | None = None,
        edit: Tensor | None = None,
        transformer_options: dict | None = None,
    ) -> Tensor:
        """Predict once.

        Args:
            x, timestep, context, attention_mask: as of STDiT.
            sizes: [B, 4], see layers.SIZES.
            edit: [B, T], a frame is made while a thousand times it is at least the timestep, and given before; None = all are made.

        Returns:
            [B, 2 * C, T, H, W]: noise, then the variance as a share of the way between its bounds, -1..1.
        """
        options, active = dict(transformer_options or {}), layers.active_frames(edit, timestep)
        info, rate = self._sizes(sizes, x.dtype)
        t = self.t_embedder(timestep.to(x.dtype), x.dtype)
        zero = None if active is None else self.t_embedder(torch.zeros_like(timestep), x.dtype)
        times = tuple(
            layers.per_frame(project, t + of, None if zero is None else zero + of, active)
            for project, of in ((self.t_block, info), (self.t_block_temp, rate))
        )
        texts = self.y_embedder(self.context_of(context, attention_mask), attention_mask)
        table = layers.rotary_table([torch.arange(x.shape[2], device=x.device)], self.rope.freqs, self.table_dtype)
        tokens = self.x_embedder(x) + self.positions(x, sizes)[0]
        for block in self.blocks():
            tokens = block(tokens, texts, times, table, options)
        return self.finish(self.final_layer(tokens, t, None if zero is None else zero + info, active), x.shape[2:])

    def _sizes(self, sizes: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Embeddings [B, C] of the picture's size and of time. Sizes are rounded as tables are."""
        ratio = (sizes[:, 2] / sizes[:, 3]).to(self.table_dtype)
        fps, frames, height, width = sizes.to(self.table_dtype).unbind(1)
        info = (self.csize_embedder(height, dtype), self.csize_embedder(width, dtype), self.ar_embedder(ratio, dtype))
        return torch.cat(info, dim=-1), self.fl_embedder(frames, dtype) + self.fps_embedder(fps, dtype)
