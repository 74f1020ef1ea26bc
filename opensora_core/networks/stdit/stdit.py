"""STDiT, the network of Open-Sora 1.0 and 1.1, whose blocks attend over space, then over time; and STDiT3, of 1.2 and 1.3: blocks over
space and blocks over time in turn.

1.3 turns queries and keys by their place as well as by time, attends over time within windows of the picture, and has inputs
for given frames beside the noise.
"""

from functools import partial

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
    """Noise of a video latent and its learned variance, given text. 1.1 knows the size, length and frame rate, and which frames are given."""

    def add_parts(self, config: STDiTConfig, seams: layers.Seams) -> None:
        super().add_parts(config, seams)
        hidden = config.hidden_size
        self.blocks = BlockList(STDiTBlock(config, seams) for _ in range(config.depth))
        if config.has_sizes:
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
        sizes: Tensor | None = None,
        attention_mask: Tensor | None = None,
        edit: Tensor | None = None,
        transformer_options: dict | None = None,
    ) -> Tensor:
        """Predict once.

        Args:
            x: noisy latents [B, C, T, H, W].
            timestep: [B], 999 (noise) to 0. Rounded to x's dtype, as upstream does.
            context: T5 hidden states [B, L, context_in_dim], or None: the null caption. attention_mask: [B, L], 0 = not looked at.
            sizes: [B, 4], see layers.SIZES; 1.1 alone reads them, and edit.
            edit: [B, T], a frame is made while a thousand times it is at least the timestep, and given before; None = all are made.

        Returns:
            [B, 2 * C, T, H, W]: noise, then the variance as a share of the way between its bounds, -1..1.
        """
        options, active = dict(transformer_options or {}), layers.active_frames(edit if self.config.has_sizes else None, timestep)
        t = self.t_embedder(timestep.to(x.dtype), x.dtype)
        zero = t if active is None else self.t_embedder(torch.zeros_like(timestep), x.dtype)  # read where frames are given
        times = (self.t_block(t)[:, None], None)
        if self.config.has_sizes:
            info, rate = self._sizes(sizes, x.dtype)
            of_time = layers.per_frame(self.t_block_temp, t + rate, zero + rate, active)
            zero = zero + info
            times = (layers.per_frame(self.t_block, t + info, zero, active), of_time)
        texts = self.y_embedder(self.context_of(context, attention_mask), attention_mask)
        embedding, places = self._places(x, sizes)
        tokens = self.x_embedder(x) + embedding
        for block, place in zip(self.blocks(), places, strict=True):
            tokens = block(tokens, texts, times, place, options)
        return self.finish(self.final_layer(tokens, t, zero, active), x.shape[2:])

    def _places(self, x: Tensor, sizes: Tensor | None) -> tuple[Tensor, list[Tensor | None]]:
        """The embedding of a frame's tokens, and for each block the places in time: a rotary table, or an embedding for 1.0's first."""
        frames, hidden, depth = torch.arange(x.shape[2], device=x.device), self.config.hidden_size, self.config.depth
        if self.config.has_sizes:
            return self.positions(x, sizes)[0], [layers.rotary_table([frames], self.rope.freqs, self.table_dtype)] * depth
        places = (place / self.config.space_scale for place in layers.token_places(*layers.token_size(x), x.device))
        angles = frames[:, None] / self.config.time_scale * layers.frequencies(hidden, x.device)
        in_time = torch.cat((angles.sin(), angles.cos()), dim=-1).to(x.dtype)
        return layers.position_embedding(*places, hidden, torch.float32).to(x.dtype), [in_time, *[None] * (depth - 1)]

    def _sizes(self, sizes: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Embeddings [B, C] of the picture's size and of time. Sizes are rounded as tables are."""
        ratio = (sizes[:, 2] / sizes[:, 3]).to(self.table_dtype)
        fps, frames, height, width = sizes.to(self.table_dtype).unbind(1)
        info = (self.csize_embedder(height, dtype), self.csize_embedder(width, dtype), self.ar_embedder(ratio, dtype))
        return torch.cat(info, dim=-1), self.fl_embedder(frames, dtype) + self.fps_embedder(fps, dtype)


class Step:
    """What every block of a forward shares.

    Attributes:
        t: [B, 1 or T, 6 * C]. texts, nulls: tokens of the prompt, and those that given frames look at (CaptionEmbedder).
        given: indices of the given frames (1.3).
        tables: rotary tables of the spatial and of the temporal blocks, or None.
        windows: the temporal blocks' attention within windows (1.3), or None: each position attends over time alone.
    """

    def __init__(self, t: Tensor, texts: list[Tensor], options: dict):
        self.t, self.texts, self.options = t, texts, options
        self.given, self.nulls, self.tables, self.windows = [], [], (None, None), None


class STDiT3Block(layers.Block):
    def __init__(self, config: STDiTConfig, is_temporal: bool, seams: layers.Seams):
        super().__init__(config, seams)
        self.is_temporal = is_temporal

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """x: [B, T, S, C]."""
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = layers.modulations(self.scale_shift_table, step.t)
        x = torch.addcmul(x, gate, self._attend(layers.modulate(self.norm1(x), shift, scale), step))
        x = x + self._look_up(x, step)
        return torch.addcmul(x, gate_mlp, self.mlp(layers.modulate(self.norm2(x), shift_mlp, scale_mlp)))

    def _attend(self, x: Tensor, step: Step) -> Tensor:
        table = step.tables[self.is_temporal]
        if not self.is_temporal:
            return self.attn(x.flatten(0, 1), table, step.options).view(x.shape)
        if step.windows is not None:
            return self.attn(x.flatten(1, 2), table, step.options, step.windows).view(x.shape)
        by_position = x.transpose(1, 2)
        return self.attn(by_position.flatten(0, 1), table, step.options).view(by_position.shape).transpose(1, 2)

    def _look_up(self, x: Tensor, step: Step) -> Tensor:
        """Cross-attention; given frames see the null caption."""
        if not step.given:
            return self.cross_attn(x, step.texts, step.options)
        made = [frame for frame in range(x.shape[1]) if frame not in step.given]
        out = torch.empty_like(x)
        for frames, texts in ((step.given, step.nulls), (made, step.texts)):
            if frames:
                out[:, frames] = self.cross_attn(x[:, frames], texts, step.options)
        return out


class STDiT3(layers.STDiTBase):
    """Velocity of a video latent, from noise to data, given text."""

    def add_parts(self, config: STDiTConfig, seams: layers.Seams) -> None:
        super().add_parts(config, seams)
        self.fps_embedder = layers.Embedder(config.hidden_size, seams)
        self.rope = nn.Module()
        self.rope.freqs = seams.parameter(config.head_dim // (6 if config.window else 2))
        if config.window:
            self.x_embedder_cond, self.x_embedder_cond_mask = layers.PatchEmbed(config, seams), layers.PatchEmbed(config, seams)
        self.spatial_blocks = nn.ModuleList(STDiT3Block(config, False, seams) for _ in range(config.depth))
        self.temporal_blocks = nn.ModuleList(STDiT3Block(config, True, seams) for _ in range(config.depth))

    def blocks(self) -> list[nn.Module]:
        """The blocks in the order in which they run: space, time, space, ..."""
        return [block for pair in zip(self.spatial_blocks, self.temporal_blocks, strict=True) for block in pair]

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        *,
        context: Tensor | None = None,
        sizes: Tensor,
        attention_mask: Tensor | None = None,
        edit: Tensor | None = None,
        cond: Tensor | None = None,
        transformer_options: dict | None = None,
    ) -> Tensor:
        """Predict once.

        Args:
            x, context, attention_mask, sizes: as of STDiT.
            timestep: [B], 1000 (noise) to 0 (data). 1.2 rounds it to x's dtype, as upstream does.
            edit: [B, T], 0 (a frame is given) .. 1 (it is made); None = all are made. See active_frames.
            cond: 1.3's given latents [B, 1 + C, T, H, W]: first where they are, 1, in whole frames that are the same in the whole batch;
                then they, zero elsewhere.

        Returns:
            Velocity [B, C, T, H, W], data minus noise.
        """
        context, active = self.context_of(context, attention_mask), layers.active_frames(edit, timestep)
        timestep = timestep if self.config.window else timestep.to(x.dtype)
        rate = self.fps_embedder(sizes[:, 0].expand(len(timestep)), x.dtype)
        t = self.t_embedder(timestep, x.dtype) + rate
        t_zero = None if active is None else self.t_embedder(torch.zeros_like(timestep), x.dtype) + rate
        modulation = layers.per_frame(self.t_block, t, t_zero, active)
        step = Step(modulation, self.y_embedder(context, attention_mask), dict(transformer_options or {}))
        embedding, scale = self.positions(x, sizes)
        step.tables = self._tables(x, scale)
        tokens = self.x_embedder(x)
        if self.config.window:
            step.windows = partial(layers.windowed, (x.shape[2], *layers.token_size(x)), self.config.window)
            if cond is not None:
                where, latents = cond.split((1, x.shape[1]), dim=1)
                tokens = tokens + self.x_embedder_cond(latents) + self.x_embedder_cond_mask(where.expand(x.shape))
                step.given = [0] if where.is_meta else where[0].amax((0, 2, 3)).nonzero().flatten().tolist()
                null = self.null_caption[: context.shape[1]].to(context)
                step.nulls = self.y_embedder(null.expand(len(context), -1, -1), attention_mask) if step.given else []
        tokens = tokens + embedding
        for block in self.blocks():
            tokens = block(tokens, step)
        return self.finish(self.final_layer(tokens, t, t_zero, active), x.shape[2:])[:, : self.config.in_channels]

    def _tables(self, x: Tensor, scale: float) -> tuple[Tensor | None, Tensor]:
        """Rotary tables of the spatial and the temporal blocks."""
        frames, (rows, columns) = x.shape[2], layers.token_size(x)
        time = torch.arange(frames, device=x.device)
        if not self.config.window:
            return None, layers.rotary_table([time], self.rope.freqs, self.table_dtype)
        row, column = layers.token_places(rows, columns, x.device)
        spatial = self._table(torch.zeros_like(row), row, column, scale)
        row, column = ((place % self.config.window).repeat(frames) for place in (row, column))
        return spatial, self._table(time.repeat_interleave(rows * columns), row, column, scale)

    def _table(self, time: Tensor, row: Tensor, column: Tensor, scale: float) -> Tensor:
        places = [place.to(self.table_dtype) / scale for place in (row, column)]
        return layers.rotary_table([time, *places], self.rope.freqs, self.table_dtype)
