"""What a checkpoint is, from the names and shapes of its tensors; its file name is never asked.

The models that this library builds have rows in families/; every other kind of file that people put into these slots has a line in a
table here, so that a wrong one gets a sentence that says what it is and where it belongs.
"""

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import CheckpointError
from ..families.table import CODECS, FAMILIES
from ..family import Family, Part
from ..shapes import AS_RELEASED, Layout, Manifest, Shapes, bare_shapes, dim


@dataclass(frozen=True)
class Identity:
    """What a file is.

    kind: one word for code: a row's kind, or "t5", "lora", "unknown" and so on. title: for people; fits after "is".
    place: for people, "which ...": where it belongs; may be empty. prefix: what stands before every key of the model in the file.
    slot: the file of a model's folder that it can be, one of those of `require`; "" for none.
    row: of a model that this library builds; None otherwise. config, layout: its sizes, and how the file keeps it.
    """

    kind: str
    title: str
    place: str = ""
    prefix: str = ""
    slot: str = ""
    row: Part | None = None
    config: Any = None
    layout: Layout = AS_RELEASED

    @property
    def family(self) -> Family | None:
        """The row of a network that denoises; None of anything else."""
        return self.row if isinstance(self.row, Family) else None

    def convert(self, key: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
        """What a tensor of the file becomes: (name in the module, tensor) pairs, none where it is not the model's; see Layout.convert."""
        return self.layout.convert(key[len(self.prefix) :], tensor, self.config) if key.startswith(self.prefix) else []

    def manifest(self) -> Manifest:
        """Every tensor that a file of these sizes and this layout has."""
        return self.row.manifest(self.config, self.layout)


_OTHER_FAMILY = "which belongs to that model's own nodes and pipelines"


class Signature(NamedTuple):
    """A kind of file by the keys that it has; "a|b" is either. title, place, slot: as Identity's."""

    kind: str
    title: str
    keys: tuple[str, ...]
    place: str = _OTHER_FAMILY
    slot: str = ""


# Where a model's keys may begin: as released, as a ComfyUI checkpoint, as saved by common training tools.
_PREFIXES = (
    "", "model.diffusion_model.", "diffusion_model.", "transformer.", "module.", "model.", "vae.", "first_stage_model.",
    "text_encoders.t5xxl.transformer.", "t5xxl.transformer.", "text_encoders.clip_l.transformer.", "clip_l.transformer.",
    "text_encoder.", "cond_stage_model.transformer.", "conditioner.embedders.0.transformer.",
)  # fmt: skip

HALF = "vae_half"  # the slot of one half of a VAE

_VISION = "vision_model.embeddings.patch_embedding.weight"

# Asked in this order, each from top to bottom: where the keys of one are in another's files too, the more particular stands first.
_OTHER_NETWORKS = (
    Signature("hunyuan_video", "the HunyuanVideo transformer", (
        "txt_in.individual_token_refiner.blocks.0.norm1.weight|context_embedder.token_refiner.refiner_blocks.0.norm1.weight",)),
    Signature("flux2", "a Flux.2 transformer", ("double_stream_modulation_img.lin.weight",)),
    Signature("chroma", "a Chroma transformer", ("distilled_guidance_layer.in_proj.weight",)),
    Signature("flux_diffusers", "a Flux.1 transformer in the diffusers layout", (
        "transformer_blocks.0.norm1_context.linear.weight", "single_transformer_blocks.0.proj_mlp.weight", "context_embedder.weight"),
        "which diffusers' FluxPipeline loads"),
    Signature("mochi", "a Mochi transformer", ("t5_y_embedder.to_q.weight|time_embed.pooler.to_kv.weight",)),
    Signature("wan", "a Wan transformer", ("head.modulation|condition_embedder.time_proj.weight", "patch_embedding.weight")),
    Signature("ltx", "an LTX-Video transformer", ("patchify_proj.weight|proj_in.weight", "caption_projection.linear_1.weight")),
    Signature("sd3", "a Stable Diffusion 3 transformer", ("joint_blocks.0.x_block.attn.qkv.weight",)),
    Signature("sd_unet", "a Stable Diffusion checkpoint", ("input_blocks.0.0.weight",)),
)  # fmt: skip
_OTHER_CODECS = (
    Signature("hunyuan_vae_renamed", "the HunyuanVideo VAE under other key names", (
        "encoder.down.0.block.0.conv1.conv.weight", "quant_conv.weight"), "which ComfyUI's own Load VAE reads"),
    Signature("dc_ae_diffusers", "a DC-AE in the diffusers layout", ("encoder.down_blocks.0.0.conv1.weight",),
        "which is not Open-Sora's Video DC-AE as it was released"),
    Signature("wan_vae", "the Wan VAE", ("decoder.middle.0.residual.0.gamma|encoder.down_blocks.0.norm1.gamma",)),
    Signature("ltx_vae", "the LTX-Video VAE", ("decoder.up_blocks.0.res_blocks.0.conv1.conv.weight",)),
)  # fmt: skip
_PICTURES = "which makes single pictures"
_AFTER_CODECS = (
    Signature("temporal_vae", "the temporal half of the Open-Sora 1.2 VAE", (
        "temporal_vae.encoder.block_res_blocks.0.0.norm1.weight|encoder.block_res_blocks.0.0.norm1.weight",),
        "which is used with SDXL's VAE, a file or folder beside it", HALF),
    Signature("sd_vae", "a Stable Diffusion VAE", ("encoder.down.0.block.0.conv1.weight", "quant_conv.weight"), _PICTURES),
    Signature("picture_vae_diffusers", "a picture VAE in the diffusers layout", (
        "encoder.down_blocks.0.resnets.0.conv1.weight", "decoder.conv_in.weight"), _PICTURES),
    Signature("dc_ae_pictures", "a DC-AE for pictures", (
        "encoder.stages.0.op_list.0.main.conv1.conv.weight", "decoder.project_out.op_list.0.weight"), _PICTURES),
    Signature("umt5", "a UMT5 encoder", ("encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight",),
        "which Wan uses; its vocabulary is not T5's"),
    Signature("t5", "", ("encoder.block.0.layer.0.SelfAttention.q.weight",), "", "t5"),
    Signature("clip_full", "a whole CLIP (text and vision)", ("text_model.embeddings.token_embedding.weight", _VISION), "", "clip"),
    Signature("clip_text", "", ("text_model.embeddings.token_embedding.weight|embeddings.token_embedding.weight",), "", "clip"),
    Signature("clip_vision", "a CLIP vision model", (_VISION,), "which reads pictures, not prompts"),
    Signature("llm", "a language model", ("layers.0.self_attn.q_proj.weight", "embed_tokens.weight"),
        "which HunyuanVideo and others use as text encoder"),
)  # fmt: skip

# The third of those that end a key is a GLoRA's.
_OF_LORA = re.compile(
    r"\.lora_(A|B|down\.|up\.|linear_layer\.|magnitude_vector)|[._]lora\.(down|up)\.|\.matrix_[AB]\.|\.(hada|lokr)_w|\.oft_(blocks|diag)|\.dora_scale"
    r"|\.(diff|diff_b|a1\.weight|lora_embedding_A)$"
)

_IN_ORDER = (*_OTHER_NETWORKS, *FAMILIES, *_OTHER_CODECS, *CODECS, *_AFTER_CODECS)

# What each file of a model should be.
_SLOTS = {
    "transformer": "the Open-Sora 2.0 transformer, Open_Sora_v2.safetensors (in ComfyUI under models/diffusion_models)",
    "vae": "the HunyuanVideo VAE, hunyuan_vae.safetensors (in ComfyUI under models/vae)",
    "t5": "a T5 v1.1 XXL encoder (in ComfyUI under models/text_encoders, the file that Flux uses)",
    "clip": "CLIP-L's text encoder (in ComfyUI under models/text_encoders, the file that Flux uses)",
    "flux": "a Flux.1 transformer as it was released, flux1-dev.safetensors or flux1-schnell.safetensors, as --flux",
    "flux_vae": "the Flux.1 picture autoencoder as it was released, ae.safetensors, as --flux-vae",
    "lora": "a LoRA trained for the Open-Sora 2.0 transformer (in ComfyUI under models/loras)",
}


def identify(shapes: Shapes) -> Identity:
    """Say what a file is; kind "unknown" where no table line fits. Never raises.

    shapes: of every tensor in the file, by its key. Two-dimensional quantised weights may show half their columns.
    """
    if any(map(_OF_LORA.search, shapes)):
        return Identity("lora", "a LoRA", "which is applied to a loaded model (models/loras in ComfyUI)", slot="lora")
    for one in _IN_ORDER:
        for prefix in _PREFIXES:
            if all(any(prefix + key in shapes for key in needed.split("|")) for needed in one.keys):
                bare = bare_shapes(shapes, prefix)
                found = _sized(one, bare, prefix) if isinstance(one, Part) else _named(one, bare, prefix)
                if found is not None:
                    return found
    first = ", ".join(list(shapes)[:3]) or "none"
    return Identity("unknown", f"not a model that is known here ({len(shapes)} tensors, the first: {first})")


def require(identity: Identity, slot: str, name: str) -> Identity:
    """Return the identity if it fits the slot; a CheckpointError says what the file is and what the slot needs. name: the file's, for the sentence."""
    if identity.slot == slot:
        return identity
    place = f", {identity.place}" if identity.place else ""
    raise CheckpointError(f"{name} is {identity.title}{place}; give {_SLOTS[slot]}.")


def damaged(kind: str) -> str:
    """The kind of a file that has the keys of a row's and sizes that cannot be read."""
    return f"{kind}_damaged"


def _sized(row: Part, shapes: Shapes, prefix: str) -> Identity | None:
    """A model of ours; None if it is another row's, which has the same keys."""
    try:
        config = row.config(shapes)
    except CheckpointError as error:
        title = f"{row.other or row.title} whose sizes cannot be read: {str(error).rstrip('.')}"
        return Identity(damaged(row.kind), title, prefix=prefix, layout=row.layout_of(shapes))
    if config is None or not row.owns(config):
        return None
    layout, title = row.layout_of(shapes), row.title
    if row.other and config != row.released:
        title = f"{row.other} of other sizes ({config.words()})"
    if layout is not row.layouts[-1]:
        title += layout.words
    return Identity(row.kind, title, row.place, prefix, row.slot, row, config, layout)


def _named(signature: Signature, shapes: Shapes, prefix: str) -> Identity:
    kind, title, _, place, slot = signature
    if kind == "t5":
        width = dim(shapes, "encoder.final_layer_norm.weight", 0, dim(shapes, "shared.weight", 1, 0))
        title = "a T5 XXL encoder" if width == 4096 else f"a T5 encoder of width {width} (T5 XXL has 4096)"
        place = "which belongs in the T5 text encoder slot (models/text_encoders in ComfyUI)"
    if kind == "clip_text":
        table = "embeddings.token_embedding.weight"  # transformers 5 drops the text_model level
        width = dim(shapes, f"text_model.{table}", 1, dim(shapes, table, 1, 0))
        title = {768: "the CLIP-L text encoder", 1280: "the CLIP-G text encoder"}.get(width, f"a CLIP text encoder of width {width}")
        place = "which belongs in a text encoder slot (models/text_encoders in ComfyUI)"
    return Identity(kind, title, place, prefix, slot)
