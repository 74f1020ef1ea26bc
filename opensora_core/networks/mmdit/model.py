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
    TwoLayers,
    inputs_like,
    pack,
    rotary_table,
    sinusoid,
    unpack,
)
from .config import TransformerConfig
from .layers import DoubleStreamBlock, LastLayer, SingleStreamBlock, position_ids

EMBEDDER = "in_layer", "out_layer"
SINUSOID = 256


class MMDiT(JointNetwork):
    """Velocity of a video latent, from data to noise, given text and an image condition."""

    INPUT = "img_in"

    def add_parts(self, config: TransformerConfig, seams: Seams) -> None:
        if config.hidden_size % config.num_heads or sum(config.axes_dim) != config.head_dim:
            raise OpenSoraError(
                f"hidden_size={config.hidden_size} with {config.num_heads} heads gives rotary axes {config.axes_dim}; "
                f"they must sum to the head dimension {config.head_dim} (a multiple of 16)."
            )
        hidden, block = config.hidden_size, (config.hidden_size, config.head_dim, config.mlp_hidden_size, seams)
        self.img_in = seams.linear(config.packed_channels, hidden)
        self.time_in = TwoLayers(EMBEDDER, (SINUSOID, hidden, hidden), seams)
        self.vector_in = TwoLayers(EMBEDDER, (config.vec_in_dim, hidden, hidden), seams)
        self.guidance_in = TwoLayers(EMBEDDER, (SINUSOID, hidden, hidden), seams) if config.guidance_embed else None
        cond = config.packed_channels + config.patch_size**2  # one mask channel beside the reference latent: 68 for the released model
        self.cond_in = seams.linear(cond, hidden) if config.cond_embed else None
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
            img, txt = _run(block, ("double_block", index), {"img": img, "txt": txt, "vec": vec, "pe": pe}, options)
        num_txt = txt.shape[1]
        joined = torch.cat((txt, img), dim=1)
        del img, txt
        options.update(total_blocks=len(self.single_blocks), block_type="single", img_slice=[num_txt, joined.shape[1]])
        for index, block in enumerate(self.single_blocks):
            joined = _run(block, ("single_block", index), {"img": joined, "vec": vec, "pe": pe}, options, num_txt)
        out = self.tokens.whole(self.final_layer(joined[:, num_txt:], vec), counts[1])
        return unpack(out, latent_size, self.config.patch)

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
                raise OpenSoraError("This model is guidance-distilled (guidance_in is in its file); give a guidance value.")
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


def _run(block, place: tuple[str, int], inputs: dict[str, Tensor], options: dict, *beside: int) -> Tensor | tuple[Tensor, Tensor]:
    """A block, or what the host has put in its place. inputs: by the host's names, in the block's order; beside: what a replacement does not see."""
    options["block_index"] = place[1]
    replacement = options.get("patches_replace", {}).get("dit", {}).get(place)
    if replacement is None:
        return block(*inputs.values(), *beside, options)
    streams = [name for name in ("img", "txt") if name in inputs]

    def original(args: dict) -> dict[str, Tensor]:
        out = block(*(args[name] for name in inputs), *beside, args["transformer_options"])
        return dict(zip(streams, out if len(streams) > 1 else (out,), strict=True))

    out = replacement({**inputs, "transformer_options": options}, {"original_block": original})
    return (out["img"], out["txt"]) if len(streams) > 1 else out["img"]
