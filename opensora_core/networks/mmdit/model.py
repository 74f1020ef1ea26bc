"""The MMDiT of Open-Sora 2.0: assembly and forward.

One tensor layout, the released checkpoint's; layout.py says which others there are and how they are brought into it at load.
"""

import torch
from torch import Tensor, nn

from ...errors import OpenSoraError
from ...ops import (
    FUSED,
    JointNetwork,
    Seams,
    TorchOperations,
    TwoLayers,
    attention as torch_attention,
    inputs_like,
    pack,
    rotary_table,
    sinusoid,
    unpack,
)
from .config import TransformerConfig
from .layers import DoubleStreamBlock, LastLayer, SingleStreamBlock
from .rope import position_ids

EMBEDDER = "in_layer", "out_layer"
SINUSOID = 256


class MMDiT(JointNetwork):
    """Velocity of a video latent, from data to noise, given text and an image condition.

    Args:
        config: sizes, see config.py.
        operations: namespace with Linear, LayerNorm and RMSNorm.
        attention: (q, k, v [B, H, L, D], transformer_options) -> [B, L, H * D].
    """

    def __init__(self, config: TransformerConfig, operations=TorchOperations, attention=torch_attention, dtype=None, device=None):
        super().__init__()
        if config.hidden_size % config.num_heads or sum(config.axes_dim) != config.head_dim:
            raise OpenSoraError(
                f"hidden_size={config.hidden_size} with {config.num_heads} heads gives rotary axes {config.axes_dim}; "
                f"they must sum to the head dimension {config.head_dim} (a multiple of 16)."
            )
        self.config = config
        seams = Seams(operations, attention, dtype, device)
        hidden, block = config.hidden_size, (config.hidden_size, config.head_dim, config.mlp_hidden_size, seams)
        self.img_in = seams.linear(config.packed_channels, hidden)
        self.time_in = TwoLayers(EMBEDDER, (SINUSOID, hidden, hidden), seams)
        self.vector_in = TwoLayers(EMBEDDER, (config.vec_in_dim, hidden, hidden), seams)
        self.guidance_in = TwoLayers(EMBEDDER, (SINUSOID, hidden, hidden), seams) if config.guidance_embed else None
        self.cond_in = seams.linear(config.packed_cond_channels, hidden) if config.cond_embed else None
        self.txt_in = seams.linear(config.context_in_dim, hidden)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(*block) for _ in range(config.depth))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(*block) for _ in range(config.depth_single_blocks))
        self.final_layer = LastLayer(hidden, config.packed_channels, seams)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        y: Tensor,
        cond: Tensor | None = None,
        guidance: Tensor | None = None,
        transformer_options: dict | None = None,
    ) -> Tensor:
        """Predict once.

        Args:
            x: noisy latents [B, C, T, H, W]; H and W multiples of the patch.
            timestep: [B], 1 (noise) to 0 (data). Rounded to x's dtype, as upstream's sampler does.
            context: T5 hidden states [B, L, context_in_dim]; every token is attended, padding too.
            y: CLIP pooled output [B, vec_in_dim].
            cond: mask and masked reference latents [B, C + 1, T, H, W]; None = all zero (text to video).
            guidance: [B] embedded guidance of a distilled model (Flux-dev); None otherwise.
            transformer_options: the host's patches and block labels; see layers.py.

        Returns:
            Velocity [B, C, T, H, W], noise minus data.
        """
        options = dict(transformer_options or {})
        if "attn1_patch" in options.get("patches", {}) or torch.is_grad_enabled():
            options.pop(FUSED, None)  # patches are shown q and k before rotation; the fused layers have no gradient
        latent_size = x.shape[-3:]
        img, txt, vec = self._embed(x, timestep, context, y, cond, guidance)
        img, txt, pe = self._positions(img, txt, latent_size, options)
        counts = options["token_counts"] = (txt.shape[1], img.shape[1])
        txt, img = self.tokens.mine(txt, counts[:1]), self.tokens.mine(img, counts[1:])
        options.update(total_blocks=len(self.double_blocks), block_type="double")
        for index, block in enumerate(self.double_blocks):
            img, txt = _run_double(block, index, (img, txt, vec, pe), options)
        num_txt = txt.shape[1]
        joined = torch.cat((txt, img), dim=1)
        del img, txt
        options.update(total_blocks=len(self.single_blocks), block_type="single", img_slice=[num_txt, joined.shape[1]])
        for index, block in enumerate(self.single_blocks):
            joined = _run_single(block, index, (joined, vec, pe), num_txt, options)
        out = self.tokens.whole(self.final_layer(joined[:, num_txt:], vec), counts[1])
        return unpack(out, latent_size, self.config.patch)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype to call the model in, which is not that of a weight that is quantised."""
        return self.img_in.bias.dtype

    def blocks(self) -> list[nn.Module]:
        """The blocks in the order in which they run."""
        return [*self.double_blocks, *self.single_blocks]

    def _embed(self, x, timestep, context, y, cond, guidance):
        patch = self.config.patch
        img = self.img_in(pack(x, patch))
        if self.cond_in is not None:
            if cond is None:
                cond = x.new_zeros(x.shape[0], self.config.in_channels + 1, *x.shape[2:])
            img = img + self.cond_in(pack(cond, patch))
        vec = self.time_in(sinusoid(1000.0 * timestep.to(x.dtype).float()).to(x.dtype)) + self.vector_in(y)
        if self.guidance_in is not None:
            if guidance is None:
                raise OpenSoraError("This model is guidance-distilled (guidance_in is in its file); a guidance value is needed.")
            vec = vec + self.guidance_in(sinusoid(1000.0 * guidance.to(x.dtype).float()).to(x.dtype))
        return img, self.txt_in(context), vec

    def _positions(self, img, txt, latent_size, options):
        frames, height, width = latent_size
        patch = self.config.patch_size
        img_ids = position_ids(frames, height // patch, width // patch, img.device, options.get("rope_options"))
        txt_ids = img_ids.new_zeros(txt.shape[1], img_ids.shape[-1])
        for patch_fn in options.get("patches", {}).get("post_input", ()):
            # Patches see one row of ids per batch item, as the host's own models show them.
            rows = {"img_ids": img_ids.expand(img.shape[0], -1, -1), "txt_ids": txt_ids.expand(txt.shape[0], -1, -1)}
            out = patch_fn({"img": img, "txt": txt, **rows, "transformer_options": options})
            img, txt, img_ids, txt_ids = out["img"], out["txt"], out["img_ids"][0], out["txt_ids"][0]
        ids = self.tokens.mine(torch.cat((txt_ids, img_ids)), (len(txt_ids), len(img_ids)), dim=0)
        return img, txt, rotary_table(ids, self.config.axes_dim)


def example(
    config: TransformerConfig, latent_shape: tuple[int, ...], text_length: int, dtype: torch.dtype, device: torch.device | str
) -> dict[str, Tensor]:
    """Inputs of MMDiT.forward by name, for a latent [B, C, T, H, W]; only timestep and guidance are set."""
    batch, channels, *extent = latent_shape
    inputs = inputs_like(latent_shape, 0.5, (text_length, config.context_in_dim), dtype, device)
    inputs["y"] = torch.empty(batch, config.vec_in_dim, dtype=dtype, device=device)
    if config.cond_embed:
        inputs["cond"] = torch.empty(batch, channels + 1, *extent, dtype=dtype, device=device)
    if config.guidance_embed:
        inputs["guidance"] = torch.full((batch,), 4.0, device=device)
    return inputs


def _run_double(block, index: int, streams: tuple, options: dict) -> tuple[Tensor, Tensor]:
    """One double block, or what the host has put in its place."""
    options["block_index"] = index
    replacement = options.get("patches_replace", {}).get("dit", {}).get(("double_block", index))
    if replacement is None:
        return block(*streams, options)

    def original(args):
        img, txt = block(args["img"], args["txt"], args["vec"], args["pe"], args["transformer_options"])
        return {"img": img, "txt": txt}

    args = dict(zip(("img", "txt", "vec", "pe"), streams, strict=True), transformer_options=options)
    out = replacement(args, {"original_block": original})
    return out["img"], out["txt"]


def _run_single(block, index: int, streams: tuple, num_txt: int, options: dict) -> Tensor:
    """One single block, or what the host has put in its place."""
    options["block_index"] = index
    replacement = options.get("patches_replace", {}).get("dit", {}).get(("single_block", index))
    if replacement is None:
        return block(*streams, num_txt, options)

    def original(args):
        return {"img": block(args["img"], args["vec"], args["pe"], num_txt, args["transformer_options"])}

    args = dict(zip(("img", "vec", "pe"), streams, strict=True), transformer_options=options)
    return replacement(args, {"original_block": original})["img"]
