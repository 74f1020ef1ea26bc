"""Layers of the STDiT networks. Attribute names are the checkpoint's keys.

Tokens are [B, T, S, C]: frames, then the H * W positions of a frame, row by row. Modulations are [B, 1 or T, 1, C]: one for
all frames, or, under a frame mask, one for each.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ...ops import THETA, SeamedNetwork, Seams, TwoLayers, gelu, inputs_like, rotate_pairs, sinusoid
from .config import BASE_SIZE, PATCH_SIZE, STDiTConfig

# What a network is told of a video, in this order; a picture has 120 frames per second. Height and width, in pixels, are a batch's own.
SIZES = ("fps", "num_frames", "height", "width")


def frequencies(dim: int, device=None) -> Tensor:
    """THETA ** -(2k/dim) for k below dim/2, fp32."""
    return 1.0 / THETA ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)


def token_places(height: int, width: int, device) -> tuple[Tensor, Tensor]:
    """Row and column of every token of a frame [H * W], whole numbers."""
    return torch.arange(height, device=device).repeat_interleave(width), torch.arange(width, device=device).repeat(height)


def grid_positions(height: int, width: int, scale: float, device) -> tuple[Tensor, Tensor]:
    """Row and column of every token of a frame [H * W] fp32, stretched to a square of the same area and divided by the scale."""
    side, (rows, columns) = round((height * width) ** 0.5), token_places(height, width, device)
    return rows / scale * (side / height), columns / scale * (side / width)


def position_embedding(rows: Tensor, columns: Tensor, dim: int, table_dtype: torch.dtype) -> Tensor:
    """[N, dim] fp32: sines and cosines of the column, then of the row.

    table_dtype: of the frequencies, which the released versions round to bf16 with the rest of the network; angles are fp32.
    """
    steps = frequencies(dim // 2, rows.device).to(table_dtype).float()
    angles = [position[:, None] * steps for position in (columns, rows)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=-1)


def rotary_table(positions: list[Tensor], freqs: Tensor, table_dtype: torch.dtype) -> Tensor:
    """Cosines and sines of interleaved pairs [2, L, pairs]; the positions' axes, [L] each, share a head in equal parts.

    Positions, frequencies and angles are rounded to `table_dtype`, as the released versions do.
    """
    freqs = freqs.to(positions[0].device, table_dtype)
    angles = torch.cat([position.to(table_dtype)[:, None] * freqs for position in positions], dim=-1)
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn the interleaved pairs of [N, H, L, D] by a rotary table [2, L, D/2], in x's type."""
    return rotate_pairs(x, table.to(x.dtype))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, x, 1 + scale)


def modulations(table: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    """A block's learned table [n, C] added to the shared [B, F, n * C]: n of [B, F, 1, C]."""
    return (table.to(t) + t.unflatten(-1, table.shape)).unsqueeze(2).unbind(-2)


class Embedder(nn.Module):
    """A number as a vector: sinusoid, linear, SiLU, linear."""

    def __init__(self, hidden_size: int, seams: Seams):
        super().__init__()
        self.mlp = nn.Sequential(seams.linear(256, hidden_size), nn.SiLU(), seams.linear(hidden_size, hidden_size))

    def forward(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        return self.mlp(sinusoid(values).to(dtype))


def mlp(widths: tuple[int, int, int], seams: Seams) -> TwoLayers:
    return TwoLayers(("fc1", "fc2"), widths, seams, gelu)


class PatchEmbed(nn.Module):
    """Latents [B, C, T, H, W] to tokens [B, T, S, hidden]; an odd side is filled up with a row or column of zeros."""

    def __init__(self, config: STDiTConfig, seams: Seams):
        super().__init__()
        kernel = (1, PATCH_SIZE, PATCH_SIZE)
        self.proj = seams.conv3d(config.in_channels, config.hidden_size, kernel, kernel)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, -x.shape[-1] % PATCH_SIZE, 0, -x.shape[-2] % PATCH_SIZE))
        return self.proj(x).flatten(3).permute(0, 2, 3, 1)


class CaptionEmbedder(nn.Module):
    """Text features to tokens. `y_embedding` [length, context_in_dim] is the caption of no prompt."""

    def __init__(self, config: STDiTConfig, seams: Seams):
        super().__init__()
        self.y_proj = mlp((config.context_in_dim, config.hidden_size, config.hidden_size), seams)
        self.y_embedding = seams.parameter(config.text_length, config.context_in_dim)

    def forward(self, context: Tensor, mask: Tensor | None) -> list[Tensor]:
        """[B, L, context_in_dim], mask [B, L] -> the tokens to attend: one [B, L', hidden], or where lengths differ, B of [1, L', hidden]."""
        tokens = self.y_proj(context)
        if mask is None:
            return [tokens]
        kept = [row[keep] for row, keep in zip(tokens, mask.to(tokens.device).bool(), strict=True)]
        if len({len(row) for row in kept}) == 1:
            return [torch.stack(kept)]
        return [row[None] for row in kept]


class SelfAttention(nn.Module):
    """Attention of sequences with themselves. Without normalised queries and keys (1.0) there are no q_norm and k_norm."""

    def __init__(self, config: STDiTConfig, has_norm: bool, rotates_first: bool, seams: Seams):
        super().__init__()
        self.attention, self.head_dim, self.rotates_first = seams.attention, config.head_dim, rotates_first
        self.qkv = seams.linear(config.hidden_size, 3 * config.hidden_size)
        self.q_norm, self.k_norm = (seams.rms_norm(config.head_dim) if has_norm else nn.Identity() for _ in range(2))
        self.proj = seams.linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, table: Tensor | None, options: dict, within=lambda attention: attention) -> Tensor:
        """[N, L, C] -> the same. table: rotary, [2, L, D/2], or None. within: gives what attends, of the attention seam."""
        q, k, v = (part.transpose(1, 2) for part in self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).unbind(2))
        q, k = self._prepared(q, self.q_norm, table), self._prepared(k, self.k_norm, table)
        return self.proj(within(self.attention)(q, k, v, options))

    def _prepared(self, x: Tensor, norm: nn.Module, table: Tensor | None) -> Tensor:
        if table is None:
            return norm(x)
        return norm(rotate(x, table)) if self.rotates_first else rotate(norm(x), table)


def windowed(size: tuple[int, int, int], window: int, attention):
    """An attention within windows of `window` x `window` positions and all frames; windows at the far edges are smaller.

    Upstream fills those up with zeros and masks them, which is the same.
    """
    starts = [(0, side - side % window) if side % window else (0,) for side in size[1:]]

    def attend(q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
        grids = [part.unflatten(2, size) for part in (q, k, v)]
        out = q.new_empty(q.shape[0], *size, q.shape[1] * q.shape[3])
        for top in starts[0]:
            for left in starts[1]:
                rows = slice(top, None if top == starts[0][-1] else starts[0][-1])
                columns = slice(left, None if left == starts[1][-1] else starts[1][-1])
                part = out[:, :, rows, columns]
                high, wide = min(window, part.shape[2]), min(window, part.shape[3])
                cut = {"h": high, "w": wide}
                pieces = [rearrange(x[:, :, :, rows, columns], "b n t (i h) (j w) d -> (b i j) n (t h w) d", **cut) for x in grids]
                whole = {"i": part.shape[2] // high, "j": part.shape[3] // wide, "t": size[0], **cut}
                part.copy_(rearrange(attention(*pieces, options), "(b i j) (t h w) c -> b t (i h) (j w) c", **whole))
        return out.flatten(1, 3)

    return attend


class CrossAttention(nn.Module):
    """Every token looks at its own prompt's tokens."""

    def __init__(self, config: STDiTConfig, seams: Seams):
        super().__init__()
        self.attention, self.head_dim = seams.attention, config.head_dim
        self.q_linear = seams.linear(config.hidden_size, config.hidden_size)
        self.kv_linear = seams.linear(config.hidden_size, 2 * config.hidden_size)
        self.proj = seams.linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, texts: list[Tensor], options: dict) -> Tensor:
        """x: [B, T, S, C]. texts: as of CaptionEmbedder."""
        queries = self.q_linear(x.flatten(1, 2)).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        parts = []
        for q, text in zip(queries.split(len(x) // len(texts)), texts, strict=True):
            k, v = (part.transpose(1, 2) for part in self.kv_linear(text).unflatten(-1, (2, -1, self.head_dim)).unbind(2))
            parts.append(self.attention(q, k, v, options))
        return self.proj(parts[0] if len(parts) == 1 else torch.cat(parts)).view(x.shape)


class Block(nn.Module):
    """What every block has, whose attention can be exchanged. The rest as of SelfAttention."""

    def __init__(self, config: STDiTConfig, seams: Seams, has_norm: bool = True, rotates_first: bool = False):
        super().__init__()
        self.norm1 = seams.layer_norm(config.hidden_size)
        self.attn = SelfAttention(config, has_norm, rotates_first, seams)
        self.scale_shift_table = seams.parameter(6, config.hidden_size)
        self.cross_attn = CrossAttention(config, seams)
        self.norm2 = seams.layer_norm(config.hidden_size)
        self.mlp = mlp((config.hidden_size, config.mlp_hidden_size, config.hidden_size), seams)

    @property
    def attention(self):
        return self.cross_attn.attention

    @attention.setter
    def attention(self, function) -> None:
        for part in self.modules():
            if isinstance(part, (SelfAttention, CrossAttention)):
                part.attention = function


class FinalLayer(nn.Module):
    def __init__(self, config: STDiTConfig, seams: Seams):
        super().__init__()
        self.norm_final = seams.layer_norm(config.hidden_size)
        self.linear = seams.linear(config.hidden_size, PATCH_SIZE**2 * config.out_channels)
        self.scale_shift_table = seams.parameter(2, config.hidden_size)

    def forward(self, x: Tensor, t: Tensor, t_zero: Tensor | None, active: Tensor | None) -> Tensor:
        """[B, T, S, C] -> [B, T, S, patch]. t, t_zero: [B, C], of the step's time and of time 0; active: [B, T], True: the step's.

        A frame at time 0 is modulated twice, first as the others: so the networks were trained.
        """
        x = self._modulated(x, t)
        if active is not None:
            x = torch.where(active[:, :, None, None], x, self._modulated(x, t_zero))
        return self.linear(x)

    def _modulated(self, x: Tensor, t: Tensor) -> Tensor:
        shift, scale = modulations(self.scale_shift_table, t.repeat(1, 2)[:, None])
        return modulate(self.norm_final(x), shift, scale)


class STDiTBase(SeamedNetwork):
    """What the networks have in common: what goes in, and what comes out."""

    INPUT = "x_embedder.proj"
    piece_tokens = 1  # layers take all tokens at once

    def add_parts(self, config: STDiTConfig, seams: Seams) -> None:
        self.x_embedder = PatchEmbed(config, seams)
        self.t_embedder = Embedder(config.hidden_size, seams)
        self.t_block = nn.Sequential(nn.SiLU(), seams.linear(config.hidden_size, 6 * config.hidden_size))
        self.y_embedder = CaptionEmbedder(config, seams)
        self.final_layer = FinalLayer(config, seams)

    @property
    def table_dtype(self) -> torch.dtype:
        """Type of position tables and sizes: fp32 in an fp32 network, else bf16, as the released versions were trained and run."""
        return torch.float32 if self.dtype == torch.float32 else torch.bfloat16

    @property
    def null_caption(self) -> Tensor:
        """[text_length, context_in_dim]: what stands in a prompt's place where there is none; the prompt's mask stays."""
        return self.y_embedder.y_embedding

    def context_of(self, context: Tensor | None, mask: Tensor) -> Tensor:
        """Text features [B, L, context_in_dim]; None stands for no prompt: the null caption, under the mask [B, L] of the prompt beside it."""
        if context is not None:
            return context
        return self.null_caption[: mask.shape[1]].to(self.dtype).expand(len(mask), -1, -1)

    def positions(self, x: Tensor, sizes: Tensor) -> tuple[Tensor, float]:
        """The embedding of a frame's tokens [S, C], and the scale of positions."""
        # On the meta device nothing has a value, and none matters.
        height, width = (8 * x.shape[-2], 8 * x.shape[-1]) if sizes.is_meta else sizes[0, 2:].to(self.table_dtype).tolist()
        scale = (height * width) ** 0.5 / BASE_SIZE
        rows, columns = grid_positions(*token_size(x), scale, x.device)
        return position_embedding(rows, columns, self.config.hidden_size, self.table_dtype).to(x.dtype), scale

    def finish(self, tokens: Tensor, latent_size: torch.Size) -> Tensor:
        """[B, T, S, patch] -> [B, out_channels, T, H, W]. latent_size: (T, H, W)."""
        rows = -(-latent_size[1] // PATCH_SIZE)
        pattern = "b t (h w) (p q c) -> b c t (h p) (w q)"
        x = rearrange(tokens, pattern, h=rows, p=PATCH_SIZE, q=PATCH_SIZE)
        return x[..., : latent_size[1], : latent_size[2]]


def token_size(x: Tensor) -> tuple[int, int]:
    """Token rows and columns of a frame of latents [..., H, W]."""
    return -(-x.shape[-2] // PATCH_SIZE), -(-x.shape[-1] // PATCH_SIZE)


def active_frames(edit: Tensor | None, timestep: Tensor) -> Tensor | None:
    """Which frames a step is to change [B, T]: edit [B, T] in 0 (given) .. 1 (made) of a thousand is at least the timestep [B]."""
    return None if edit is None else (edit * 1000 >= timestep.float()[:, None]) | (edit >= 1)


def per_frame(project: nn.Module, t: Tensor, t_zero: Tensor | None, active: Tensor | None) -> Tensor:
    """Modulations [B, 1 or T, n]: of the step's time, and where a frame is not active of time 0. t, t_zero: [B, C]."""
    return project(t)[:, None] if active is None else torch.where(active[:, :, None], project(t)[:, None], project(t_zero)[:, None])


def example(
    config: STDiTConfig, latent_shape: tuple[int, ...], text_length: int, dtype: torch.dtype, device: torch.device | str
) -> dict[str, Tensor]:
    """Inputs of a forward by name, for a latent [B, C, T, H, W]; only timestep and sizes are set."""
    batch, channels, *extent = latent_shape
    inputs = inputs_like(latent_shape, 500.0, (text_length, config.context_in_dim), dtype, device)
    if config.has_sizes:
        inputs["sizes"] = torch.tensor([[24.0, *config.grid.decoded(extent)]] * batch, device=device)
    if config.window:
        inputs["cond"] = torch.empty(batch, 1 + channels, *extent, dtype=dtype, device=device)
    return inputs
