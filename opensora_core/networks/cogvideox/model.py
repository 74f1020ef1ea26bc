"""The CogVideoX transformer: assembly, blocks and forward.

Text and video tokens attend together; each block modulates the two with numbers of their own. Parameter names are the keys of the
published diffusers layout; layout.py says which others there are and how they are brought into it at load.

Source: huggingface/diffusers@58eb52c0 models/transformers/cogvideox_transformer_3d.py, models/embeddings.py and
pipelines/cogvideo/pipeline_cogvideox.py. For clips of another length than the learned positions' that takes computed ones; here the first
of the learned ones are taken, as in zai-org/CogVideo@e519eced sat/dit_video_concat.py.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import OpenSoraError
from ...ops import (
    THETA,
    JointNetwork,
    Seams,
    TwoLayers,
    gelu,
    inputs_like,
    pack,
    rotary_table,
    rotate_pairs,
    sinusoid,
    token_chunks,
    token_grid,
    unpack,
)
from .config import BASE_GRID, CogVideoXConfig

OFS = 2.0  # the 1.5-5B-I2V's second "timestep", the same in every run
BLOCK_EPS, HEAD_EPS = 1e-5, 1e-6
SINCOS_SCALE = 1.875  # rows and columns of the grid that the 2B's table was made for, to BASE_GRID's
EMBEDDING = "linear_1", "linear_2"


def sincos_tables(grid: tuple[int, int, int], dim: int) -> list[Tensor]:
    """The 2B's positions, fp64 on the CPU, as parts of the features that follow one another, each to be broadcast over [T, h, w, part].

    Time has the first quarter, width the next three eighths, height the last; within a part sines come first.
    """
    tables = []
    for axis, features, scale in ((0, dim // 4, 1.0), (2, dim * 3 // 8, SINCOS_SCALE), (1, dim * 3 // 8, SINCOS_SCALE)):
        steps = THETA ** -(torch.arange(0, features, 2, dtype=torch.float64) / features)
        angles = torch.outer(torch.arange(grid[axis], dtype=torch.float64) / scale, steps)
        shape = [grid[axis] if each == axis else 1 for each in range(3)]
        tables.append(torch.cat((angles.sin(), angles.cos()), dim=-1).view(*shape, -1))
    return tables


def rotary_positions(config: CogVideoXConfig, grid: tuple[int, int, int]) -> list[Tensor]:
    """Positions along time, height and width, fp64.

    Integers, but that the 1.0 models lay a grid of another size into the middle of BASE_GRID: as large as fits, its last position at
    the absolute end times (n - 1) / n.
    """
    positions = [torch.arange(side, dtype=torch.float64) for side in grid]
    if config.patch[0] == 1:
        (_, base_h, base_w), (_, h, w) = BASE_GRID, grid
        fitted = (base_h, round(base_h / h * w)) if h / w > base_h / base_w else (round(base_w / w * h), base_w)
        for axis, length in enumerate(fitted, 1):
            start, side = round((BASE_GRID[axis] - length) / 2), grid[axis]
            positions[axis] = torch.linspace(start, (start + length) * (side - 1) / side, side, dtype=torch.float64)
    return positions


def modulate(x: Tensor, num_txt: int, txt: tuple[Tensor, Tensor], video: tuple[Tensor, Tensor]) -> Tensor:
    """x * (1 + scale) + shift, text and video tokens each with its own (shift, scale). x is the caller's own and is overwritten."""
    for part, (shift, scale) in ((x[:, :num_txt], txt), (x[:, num_txt:], video)):
        part.mul_(1 + scale).add_(shift)
    return x


def gated(x: Tensor, change: Tensor, num_txt: int, txt_gate: Tensor, gate: Tensor) -> Tensor:
    """x + gate * change, text and video tokens each with its own gate. The change is the caller's own and is overwritten."""
    change[:, :num_txt].mul_(txt_gate)
    change[:, num_txt:].mul_(gate)
    return change.add_(x)


class PatchEmbed(nn.Module):
    """Latents and text features as tokens, and the learned positions where a model has them."""

    def __init__(self, config: CogVideoXConfig, seams: Seams):
        super().__init__()
        self.patch, taken = config.patch, config.in_channels * (1 + config.takes_picture)
        if self.patch[0] == 1:
            self.proj = seams.operations.Conv2d(taken, config.hidden_size, config.patch_size, stride=config.patch_size, **seams.place)
        else:
            self.proj = seams.linear(taken * math.prod(self.patch), config.hidden_size)
        self.text_proj = seams.linear(config.context_in_dim, config.hidden_size)
        table = torch.empty(1, config.table_rows, config.hidden_size, **seams.place)
        self.pos_embedding = nn.Parameter(table) if config.table_rows else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, T' * H' * W', D], in the order t, h, w."""
        if self.patch[0] > 1:
            return self.proj(pack(x, self.patch))
        tokens = self.proj(x.transpose(1, 2).flatten(0, 1)).flatten(2).transpose(1, 2)
        return tokens.reshape(x.shape[0], -1, tokens.shape[-1])


class AdaptiveNorm(nn.Module):
    """A layer norm, and the numbers that its output is modulated with."""

    def __init__(self, dim: int, time_embed_dim: int, count: int, seams: Seams):
        super().__init__()
        self.count = count
        self.linear = seams.linear(time_embed_dim, count * dim)
        self.norm = seams.layer_norm(dim, BLOCK_EPS, affine=True)

    def numbers(self, vec: Tensor) -> tuple[Tensor, ...]:
        """`count` of [B, 1, D]: shift, scale (and gate) of the video tokens, then of the text tokens."""
        return self.linear(F.silu(vec))[:, None].chunk(self.count, dim=-1)


class Attention(nn.Module):
    """Over text and video tokens together; only video tokens are turned by their position."""

    def __init__(self, dim: int, head_dim: int, seams: Seams):
        super().__init__()
        self.head_dim = head_dim
        self.to_q, self.to_k, self.to_v = (seams.linear(dim, dim) for _ in range(3))
        self.norm_q, self.norm_k = (seams.layer_norm(head_dim, HEAD_EPS, affine=True) for _ in range(2))
        self.to_out = nn.ModuleList([seams.linear(dim, dim)])

    def forward(self, x: Tensor, pe: Tensor | None, num_txt: int, attend: Callable[..., Tensor]) -> Tensor:
        # One after another: a projection is let go once it is normalised.
        q, k = (norm(layer(x).unflatten(-1, (-1, self.head_dim))) for norm, layer in ((self.norm_q, self.to_q), (self.norm_k, self.to_k)))
        for video in (q[:, num_txt:], k[:, num_txt:]) if pe is not None else ():
            for tokens in token_chunks(video):
                video[:, tokens] = rotate_pairs(video[:, tokens].float(), pe[:, tokens])
        v = self.to_v(x).unflatten(-1, (-1, self.head_dim))
        return self.to_out[0](attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)))


class Block(nn.Module):
    def __init__(self, config: CogVideoXConfig, seams: Seams):
        super().__init__()
        dim, self.attention = config.hidden_size, seams.attention
        self.norm1 = AdaptiveNorm(dim, config.time_embed_dim, 6, seams)
        self.attn1 = Attention(dim, config.head_dim, seams)
        self.norm2 = AdaptiveNorm(dim, config.time_embed_dim, 6, seams)
        self.ff = TwoLayers(("net.0.proj", "net.2"), (dim, config.mlp_hidden_size, dim), seams, gelu)

    def forward(self, x: Tensor, vec: Tensor, pe: Tensor | None, num_txt: int, transformer_options: dict) -> Tensor:
        """x: [B, L, D], text tokens first; vec: [B, time_embed_dim]; pe: rotary_table's, or None."""

        def attend(*qkv: Tensor) -> Tensor:
            return self.attention(*qkv, transformer_options)

        for norm, layer in ((self.norm1, lambda h: self.attn1(h, pe, num_txt, attend)), (self.norm2, self.ff)):
            shift, scale, gate, txt_shift, txt_scale, txt_gate = norm.numbers(vec)
            h = modulate(norm.norm(x), num_txt, (txt_shift, txt_scale), (shift, scale))
            x = gated(x, layer(h), num_txt, txt_gate, gate)
        return x


class CogVideoX(JointNetwork):
    """v of a noisy video latent, given text and, for the I2V models, a picture."""

    INPUT = "patch_embed.proj"

    def add_parts(self, config: CogVideoXConfig, seams: Seams) -> None:
        dim, ofs = config.hidden_size, config.ofs_embed_dim
        self.patch_embed = PatchEmbed(config, seams)
        self.time_embedding = TwoLayers(EMBEDDING, (dim, config.time_embed_dim, config.time_embed_dim), seams)
        self.ofs_embedding = TwoLayers(EMBEDDING, (ofs, ofs, ofs), seams) if ofs else None
        self.transformer_blocks = nn.ModuleList([Block(config, seams) for _ in range(config.depth)])
        self.norm_final = seams.layer_norm(dim, BLOCK_EPS, affine=True)
        self.norm_out = AdaptiveNorm(dim, config.time_embed_dim, 2, seams)
        self.proj_out = seams.linear(dim, config.in_channels * math.prod(config.patch))

    def blocks(self) -> list[nn.Module]:
        """The blocks in the order in which they run."""
        return list(self.transformer_blocks)

    def forward(
        self, x: Tensor, timestep: Tensor, context: Tensor, cond: Tensor | None = None, transformer_options: dict | None = None
    ) -> Tensor:
        """Predict once.

        Args:
            x: noisy latents [B, C, T, H, W]; T, H and W multiples of the patch.
            timestep: [B], of training: 0 (clean) to 999 (noise).
            context: T5 hidden states [B, L, context_in_dim]; every token is attended, padding too.
            cond: latents of the given picture in the first frame and zeros in the others, [B, C, T, H, W]; for the I2V models alone.
            transformer_options: the host's, for the attention; blocks are labelled in it.

        Returns:
            [B, C, T, H, W], sqrt(a) * noise - sqrt(1 - a) * clean, where a is the share of the clean latents in x squared.

        Raises an OpenSoraError for latents of a size, or a picture, that the model cannot have.
        """
        options, grid = dict(transformer_options or {}), token_grid(x.shape[2:], self.config.patch)
        self._check(x, cond)
        vec = self.time_embedding(sinusoid(timestep, self.config.hidden_size).to(x.dtype))
        if self.ofs_embedding is not None:
            vec = vec + self.ofs_embedding(sinusoid(timestep.new_full((1,), OFS), self.config.ofs_embed_dim).to(x.dtype))
        num_txt, video = context.shape[1], self.patch_embed(x if cond is None else torch.cat((x, cond), dim=1))
        h = torch.cat((self.patch_embed.text_proj(context), video), dim=1)
        del video
        self._add_positions(h, num_txt, grid)
        pe = self._rotary_table(grid, h.device) if self.config.is_rotary else None
        counts = options["token_counts"] = (num_txt, h.shape[1] - num_txt)
        h, num_txt = self.tokens.mine(h, counts), self.tokens.count(num_txt)
        pe = pe if pe is None else self.tokens.mine(pe, counts[1:])
        options.update(total_blocks=len(self.transformer_blocks), block_type="double", img_slice=[num_txt, h.shape[1]])
        for index, block in enumerate(self.transformer_blocks):
            options["block_index"] = index
            h = block(h, vec, pe, num_txt, options)
        numbers = self.norm_out.numbers(vec)
        h = modulate(self.norm_out.norm(self.norm_final(h[:, num_txt:])), 0, numbers, numbers)
        return unpack(self.tokens.whole(self.proj_out(h), counts[1]), x.shape[2:], self.config.patch)

    def _rotary_table(self, grid: tuple[int, int, int], device: torch.device) -> Tensor:
        """Of every video token, [2, T * h * w, 1, head_dim / 2] fp32: a quarter of a head is time, three eighths each height and width."""
        ids = torch.stack(torch.meshgrid(*rotary_positions(self.config, grid), indexing="ij"), dim=-1).flatten(0, 2)
        head = self.config.head_dim
        return rotary_table(ids, (head // 4, head * 3 // 8, head * 3 // 8)).to(device)  # made on the CPU: some devices have no fp64

    def _add_positions(self, h: Tensor, num_txt: int, grid: tuple[int, int, int]) -> None:
        """Add the learned table, or the one that the 2B computes, to the tokens, in place. Only the learned one has rows for text."""
        table = self.patch_embed.pos_embedding
        if table is not None:
            table = table.to(h.device, h.dtype)
            rows = table.shape[1] - math.prod(BASE_GRID)
            h[:, : min(num_txt, rows)] += table[:, : min(num_txt, rows)]
            h[:, num_txt:] += table[:, rows : rows + math.prod(grid)]
        elif not self.config.is_rotary:
            video, first = h[:, num_txt:].unflatten(1, grid), 0
            for part in sincos_tables(grid, self.config.hidden_size):
                video[..., first : first + part.shape[-1]] += part.to(h.dtype).to(h.device)
                first += part.shape[-1]

    def _check(self, x: Tensor, cond: Tensor | None) -> None:
        config, (frames, height, width) = self.config, x.shape[2:]
        if (cond is not None) != config.takes_picture:
            lacks = "makes a video from a picture, and none was given; give one, or a text-to-video model"
            has = "makes videos from text alone, and a picture was given; give an I2V model, or no picture"
            raise OpenSoraError(f"This CogVideoX model {lacks if config.takes_picture else has}.")
        most, rows, columns = (side * step for side, step in zip(BASE_GRID, config.patch, strict=True))
        if config.table_rows and ((height, width) != (rows, columns) or frames > most):
            raise OpenSoraError(
                f"CogVideoX 5B-I2V has learned positions for up to {most} latent frames of {rows}x{columns} (49 frames at 480x720, height x "
                f"width); give such latents, not {frames} of {height}x{width}."
            )


def example(
    config: CogVideoXConfig, latent_shape: tuple[int, ...], text_length: int, dtype: torch.dtype, device: torch.device | str
) -> dict[str, Tensor]:
    """Inputs of CogVideoX.forward by name, for a latent [B, C, T, H, W]; only timestep is set."""
    inputs = inputs_like(latent_shape, 500.0, (text_length, config.context_in_dim), dtype, device)
    return inputs | ({"cond": torch.empty(latent_shape, dtype=dtype, device=device)} if config.takes_picture else {})
