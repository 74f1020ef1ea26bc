"""Blocks of the MMDiT. Attribute names are the checkpoint's keys; tensors are [B, L, D] or [B, L, H, D_head].

`img`, `txt`, `vec`, `pe` are the image stream, the text stream, the modulation vector and the rotary table.
Rotary pairs inside a head of dimension D are (j, D/2 + j), as the released 2.0 file was trained; layout.py permutes others at load.
Blocks look the host's patches up in plain dictionaries and never write into a tensor they were given:
a patch may have handed it to someone else as well.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops import FUSED, Seams, TwoLayers, gelu, token_chunks


def position_ids(latent_frames: int, rows: int, columns: int, device, options: dict | None = None) -> Tensor:
    """Integer positions in patch units, [T * rows * columns, 3] fp32 in the order t, h, w.

    options: scale and shift of an axis, under the host's names: scale_t, shift_t, scale_y, shift_y, scale_x, shift_x. A scale stretches
    the span from first to last position.
    """
    options = options or {}
    axes = []
    for count, name in ((latent_frames, "t"), (rows, "y"), (columns, "x")):
        positions = torch.arange(count, dtype=torch.float32, device=device)
        axes.append(positions * options.get(f"scale_{name}", 1.0) + options.get(f"shift_{name}", 0.0))
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)


def rotate_half(x: Tensor, pe: Tensor) -> Tensor:
    """Rotate [B, L, H, D] by the table of [2, L, 1, D/2], in fp32, a chunk of tokens at a time; the result has x's dtype."""
    chunks = token_chunks(x)
    if len(chunks) == 1:
        return _rotate(x, pe)
    out = torch.empty_like(x)
    for tokens in chunks:
        out[:, tokens] = _rotate(x[:, tokens], pe[:, tokens])
    return out


def _rotate(x: Tensor, pe: Tensor) -> Tensor:
    cos, sin = pe
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    rotated = wide.unflatten(-1, (2, -1)).mul(cos.unsqueeze(-2)).flatten(-2)
    half = cos.shape[-1]
    rotated[..., :half].addcmul_(second, sin, value=-1)  # our own temporary: half the memory traffic of joining two halves
    rotated[..., half:].addcmul_(first, sin)
    return rotated.to(x.dtype)


class ModulationOut(NamedTuple):
    shift: Tensor
    scale: Tensor
    gate: Tensor


def norm_modulate(norm: nn.Module, x: Tensor, mod: ModulationOut, options: dict) -> Tensor:
    if (fused := options.get(FUSED)) is not None:
        return fused.norm_modulate(norm, x, mod.shift, mod.scale)
    return torch.addcmul(mod.shift, norm(x), 1 + mod.scale)


def norm_rotate(norm: nn.Module, x: Tensor, pe: Tensor, start: int, options: dict) -> Tensor:
    """x [B, L, H, D] of the tokens from `start` on, normalised; already rotated by pe [2, all, 1, D/2] where the two are fused."""
    fused = options.get(FUSED)
    return norm(x) if fused is None else fused.norm_rotate(norm, x, pe, start)


class QKNorm(nn.Module):
    def __init__(self, head_dim: int, seams: Seams):
        super().__init__()
        self.query_norm, self.key_norm = seams.rms_norm(head_dim), seams.rms_norm(head_dim)


class Modulation(nn.Module):
    def __init__(self, hidden_size: int, count: int, seams: Seams):
        super().__init__()
        self.count = count
        self.lin = seams.linear(hidden_size, 3 * count * hidden_size)

    def forward(self, vec: Tensor) -> list[ModulationOut]:
        parts = self.lin(F.silu(vec))[:, None].chunk(3 * self.count, dim=-1)
        return [ModulationOut(*parts[3 * i : 3 * i + 3]) for i in range(self.count)]


class SelfAttention(nn.Module):
    """One stream's projections; the streams attend together, in DoubleStreamBlock."""

    def __init__(self, hidden_size: int, head_dim: int, seams: Seams):
        super().__init__()
        self.head_dim = head_dim
        self.q_proj, self.k_proj, self.v_proj = (seams.linear(hidden_size, hidden_size) for _ in range(3))
        self.norm = QKNorm(head_dim, seams)
        self.proj = seams.linear(hidden_size, hidden_size)

    def qkv(self, x: Tensor, pe: Tensor, start: int, options: dict) -> tuple[Tensor, Tensor, Tensor]:
        """[B, L, hidden] -> three of [B, L, H, D], q and k as norm_rotate gives them."""
        q, k, v = (split_heads(layer(x), self.head_dim) for layer in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (norm_rotate(norm, one, pe, start, options) for norm, one in ((self.norm.query_norm, q), (self.norm.key_norm, k)))
        return q, k, v


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    return x.unflatten(-1, (-1, head_dim))


def joint_attention(qkv: list[Tensor], pe: Tensor, attention, num_txt: int, options: dict) -> Tensor:
    """Attend over text and image tokens together, through the host's attention patches; gives [B, L, H * D].

    qkv: three of [B, L, H, D], text tokens first, as norm_rotate gives them. The list is emptied, so that each is freed once used.
    pe: [2, L, 1, D/2]. num_txt: how many leading tokens are text.
    """
    patches = options.get("patches", {})
    extra = None
    if "attn1_patch" in patches or "attn1_output_patch" in patches:
        extra = {**options, "img_slice": [num_txt, qkv[0].shape[1]]}
        for patch in patches.get("attn1_patch", ()):
            q, k, v = (x.transpose(1, 2) for x in qkv)
            out = patch(q, k, v, pe=pe, attn_mask=None, extra_options=extra)
            qkv[:] = (out.get(name, x).transpose(1, 2) for name, x in zip("qkv", (q, k, v), strict=True))
            pe = out.get("pe", pe)
            del q, k, v, out
    rotate = rotate_half if options.get(FUSED) is None else lambda x, pe: x
    v = qkv.pop().transpose(1, 2)
    k = rotate(qkv.pop(), pe).transpose(1, 2)
    q = rotate(qkv.pop(), pe).transpose(1, 2)
    out = attention(q, k, v, options)
    for patch in patches.get("attn1_output_patch", ()):
        out = patch(out, extra)
    return out


class DoubleStreamBlock(nn.Module):
    def __init__(self, hidden_size: int, head_dim: int, mlp_hidden_size: int, seams: Seams):
        super().__init__()
        self.attention = seams.attention
        for stream in ("img", "txt"):
            mlp = TwoLayers(("0", "2"), (hidden_size, mlp_hidden_size, hidden_size), seams, gelu)
            self.add_module(f"{stream}_mod", Modulation(hidden_size, 2, seams))
            self.add_module(f"{stream}_norm1", seams.layer_norm(hidden_size))
            self.add_module(f"{stream}_attn", SelfAttention(hidden_size, head_dim, seams))
            self.add_module(f"{stream}_norm2", seams.layer_norm(hidden_size))
            self.add_module(f"{stream}_mlp", mlp)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor, transformer_options: dict) -> tuple[Tensor, Tensor]:
        img_mod1, img_mod2 = self.img_mod(vec)
        txt_mod1, txt_mod2 = self.txt_mod(vec)
        num_txt = txt.shape[1]

        img_qkv = self.img_attn.qkv(norm_modulate(self.img_norm1, img, img_mod1, transformer_options), pe, num_txt, transformer_options)
        txt_qkv = self.txt_attn.qkv(norm_modulate(self.txt_norm1, txt, txt_mod1, transformer_options), pe, 0, transformer_options)
        qkv = [torch.cat(pair, dim=1) for pair in zip(txt_qkv, img_qkv, strict=True)]
        del img_qkv, txt_qkv
        attended = joint_attention(qkv, pe, self.attention, num_txt, transformer_options)

        img = torch.addcmul(img, img_mod1.gate, self.img_attn.proj(attended[:, num_txt:]))
        img = torch.addcmul(img, img_mod2.gate, self.img_mlp(norm_modulate(self.img_norm2, img, img_mod2, transformer_options)))
        txt = torch.addcmul(txt, txt_mod1.gate, self.txt_attn.proj(attended[:, :num_txt]))
        txt = torch.addcmul(txt, txt_mod2.gate, self.txt_mlp(norm_modulate(self.txt_norm2, txt, txt_mod2, transformer_options)))
        return img, txt


class SingleStreamBlock(nn.Module):
    """Attention and MLP side by side on the joined sequence (arXiv 2302.05442)."""

    def __init__(self, hidden_size: int, head_dim: int, mlp_hidden_size: int, seams: Seams):
        super().__init__()
        self.attention, self.head_dim, self.split = seams.attention, head_dim, (hidden_size, mlp_hidden_size)
        self.q_proj, self.k_proj = seams.linear(hidden_size, hidden_size), seams.linear(hidden_size, hidden_size)
        self.v_mlp = seams.linear(hidden_size, hidden_size + mlp_hidden_size)
        self.linear2 = seams.linear(hidden_size + mlp_hidden_size, hidden_size)
        self.norm = QKNorm(head_dim, seams)
        self.pre_norm = seams.layer_norm(hidden_size)
        self.modulation = Modulation(hidden_size, 1, seams)

    def forward(self, x: Tensor, vec: Tensor, pe: Tensor, num_txt: int, transformer_options: dict) -> Tensor:
        (mod,) = self.modulation(vec)
        y = norm_modulate(self.pre_norm, x, mod, transformer_options)
        # One by one: a comprehension over `y` would keep torch.compile from tracing that it is let go.
        qkv = [norm_rotate(self.norm.query_norm, split_heads(self.q_proj(y), self.head_dim), pe, 0, transformer_options)]
        qkv.append(norm_rotate(self.norm.key_norm, split_heads(self.k_proj(y), self.head_dim), pe, 0, transformer_options))
        v_mlp = self.v_mlp(y)  # after q and k, whose making needs room of its own
        del y
        qkv.append(split_heads(v_mlp[..., : self.split[0]], self.head_dim))
        attended = joint_attention(qkv, pe, self.attention, num_txt, transformer_options)
        v, mlp = v_mlp.split(self.split, dim=-1)
        if torch.is_grad_enabled():
            v_mlp = torch.cat((attended, gelu(mlp)), dim=-1)
        else:  # v has been used by now, so the attention takes its place: the largest tensor of the block exists once
            v.copy_(attended)
            gelu(mlp)
        return torch.addcmul(x, mod.gate, self.linear2(v_mlp))


class LastLayer(nn.Module):
    def __init__(self, hidden_size: int, out_features: int, seams: Seams):
        super().__init__()
        self.norm_final = seams.layer_norm(hidden_size)
        self.linear = seams.linear(hidden_size, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), seams.linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)  # shift first: diffusers stores scale first
        return self.linear(torch.addcmul(shift, self.norm_final(x), 1 + scale))
