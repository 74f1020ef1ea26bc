"""STDiT3, the network of Open-Sora 1.2 and 1.3: blocks over space and blocks over time in turn.

1.3 turns queries and keys by their place as well as by time, attends over time within windows of the picture, and has inputs
for given frames beside the noise.
"""

from functools import partial

import torch
from torch import Tensor, nn

from . import layers
from .config import STDiTConfig


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
            x: noisy latents [B, C, T, H, W].
            timestep: [B], 1000 (noise) to 0 (data). 1.2 rounds it to x's dtype, as upstream does.
            context: T5 hidden states [B, L, context_in_dim], or None: the null caption. attention_mask: [B, L], 0 = not looked at.
            sizes: [B, 4], see layers.SIZES.
            edit: [B, T], 0 (a frame is given) .. 1 (it is made); None = all are made. See active_frames.
            cond: 1.3's given latents [B, 1 + C, T, H, W]: first where they are, 1, in whole frames that are the same in the whole batch;
                then they, zero elsewhere.

        Returns:
            Velocity [B, C, T, H, W], data minus noise.
        """
        context, active = self.context_of(context, attention_mask), layers.active_frames(edit, timestep)
        t, t_zero = self._times(timestep, sizes[:, 0], x.dtype, active is not None)
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

    def _times(self, timestep: Tensor, fps: Tensor, dtype: torch.dtype, has_zero: bool) -> tuple[Tensor, Tensor | None]:
        timestep = timestep if self.config.window else timestep.to(dtype)
        rate = self.fps_embedder(fps.expand(len(timestep)), dtype)
        zero = self.t_embedder(torch.zeros_like(timestep), dtype) + rate if has_zero else None
        return self.t_embedder(timestep, dtype) + rate, zero

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
