"""What a checkpoint is, from the names and shapes of its tensors; its file name is never asked.

Every kind of file that people put into these slots has a line in a table here, so that a wrong one gets a
sentence that says what it is and where it belongs. Second dimensions are trusted only where no
quantiser halves them: input layers; everything else is read from biases and norms.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..codecs.dc_ae.config import VIDEO_DC_AE, DCAEConfig
from ..codecs.hunyuan.config import HUNYUAN_VAE, VAEConfig
from ..errors import CheckpointError
from ..networks.mmdit.config import FLUX_DEV, OPEN_SORA_2, OPEN_SORA_2_DC_AE, TransformerConfig

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Identity:
    """What a file is.

    Attributes:
        kind: one word for code: "open_sora_2", "flux", "hunyuan_vae", "t5", "lora", "unknown" and so on.
        title: for people; fits after "is".
        place: for people, "which ...": where it belongs; may be empty.
        prefix: what stands before every key of the model in the file.
        config: sizes, where this library can build the model; None otherwise.
        fused: Flux layout (fused qkv, interleaved rotary pairs); False is the released 2.0 layout.
    """

    kind: str
    title: str
    place: str = ""
    prefix: str = ""
    config: TransformerConfig | VAEConfig | DCAEConfig | None = None
    fused: bool = False


class Signature(NamedTuple):
    """A kind of file, by keys it has (all of `needs`, where "a|b" is either) and keys it lacks."""

    kind: str
    title: str
    place: str
    needs: tuple[str, ...]
    lacks: tuple[str, ...] = ()


# Where a model's keys may begin: as released, as a ComfyUI checkpoint, as saved by common training tools.
_PREFIXES = (
    "", "model.diffusion_model.", "diffusion_model.", "transformer.", "module.", "model.", "vae.", "first_stage_model.",
    "text_encoders.t5xxl.transformer.", "t5xxl.transformer.", "text_encoders.clip_l.transformer.", "clip_l.transformer.",
    "text_encoder.", "cond_stage_model.transformer.", "conditioner.embedders.0.transformer.",
)  # fmt: skip

_OTHER_FAMILY = "which belongs to that model's own nodes and pipelines"
_NOT_YET = "which is not supported yet (2.0 is)"

_DIFFUSION = "double_blocks.0.img_attn.norm.key_norm.scale|double_blocks.0.img_attn.norm.key_norm.weight"
_STDIT3 = "spatial_blocks.0.attn.qkv.weight"
_PICTURE_VAE = "encoder.down.0.block.0.conv1.weight"
_VISION = "vision_model.embeddings.patch_embedding.weight"

# Read from top to bottom: where one family's keys contain another's, the more particular stands first.
_SIGNATURES = (
    Signature(
        "hunyuan_video", "the HunyuanVideo transformer", _OTHER_FAMILY,
        ("txt_in.individual_token_refiner.blocks.0.norm1.weight|context_embedder.token_refiner.refiner_blocks.0.norm1.weight",),
    ),
    Signature("flux2", "a Flux.2 transformer", _OTHER_FAMILY, ("double_stream_modulation_img.lin.weight",)),
    Signature("chroma", "a Chroma transformer", _OTHER_FAMILY, ("distilled_guidance_layer.in_proj.weight",)),
    Signature("mmdit", "", "", (_DIFFUSION, "img_in.bias")),
    Signature(
        "flux_diffusers", "a Flux.1 transformer in the diffusers layout", "which diffusers' FluxPipeline loads",
        ("transformer_blocks.0.norm1_context.linear.weight", "single_transformer_blocks.0.proj_mlp.weight", "context_embedder.weight"),
    ),
    Signature(
        "cogvideox", "a CogVideoX transformer", _OTHER_FAMILY,
        ("patch_embed.text_proj.weight|mixins.patch_embed.proj.weight",),
    ),
    Signature("mochi", "a Mochi transformer", _OTHER_FAMILY, ("t5_y_embedder.to_q.weight|time_embed.pooler.to_kv.weight",)),
    Signature("wan", "a Wan transformer", _OTHER_FAMILY, ("head.modulation|condition_embedder.time_proj.weight", "patch_embedding.weight")),
    Signature(
        "ltx", "an LTX-Video transformer", _OTHER_FAMILY,
        ("patchify_proj.weight|proj_in.weight", "caption_projection.linear_1.weight"),
    ),
    Signature("open_sora_1_3", "the Open-Sora 1.3 transformer", _NOT_YET, (_STDIT3, "x_embedder_cond.proj.weight")),
    Signature("open_sora_1_2", "the Open-Sora 1.2 transformer", _NOT_YET, (_STDIT3, "y_embedder.y_proj.fc1.weight")),
    Signature("open_sora_1_1", "the Open-Sora 1.1 transformer", _NOT_YET, ("blocks.0.attn_temp.qkv.weight", "t_block_temp.1.weight")),
    Signature("open_sora_1_0", "an Open-Sora 1.0 transformer", _NOT_YET, ("blocks.0.attn_temp.qkv.weight", "t_block.1.weight")),
    Signature("sd3", "a Stable Diffusion 3 transformer", _OTHER_FAMILY, ("joint_blocks.0.x_block.attn.qkv.weight",)),
    Signature("sd_unet", "a Stable Diffusion checkpoint", _OTHER_FAMILY, ("input_blocks.0.0.weight",)),
    Signature("cogvideox_vae", "the CogVideoX VAE", _OTHER_FAMILY, ("decoder.mid_block.resnets.0.norm1.norm_layer.weight",)),
    Signature(
        "hunyuan_vae", "the HunyuanVideo VAE", "which is Open-Sora 2.0's video VAE and belongs in the VAE slot (models/vae in ComfyUI)",
        ("encoder.down_blocks.0.resnets.0.conv1.conv.bias", "encoder.mid_block.attentions.0.group_norm.weight", "post_quant_conv.bias"),
    ),
    Signature("open_sora_1_3_vae", "the Open-Sora 1.3 VAE", _NOT_YET, ("decoder.up.2.upsample.conv3d.conv1.conv.weight",)),
    Signature(
        "open_sora_1_2_vae", "the Open-Sora 1.2 VAE", _NOT_YET,
        ("spatial_vae.module.encoder.conv_in.weight|temporal_vae.encoder.conv_in.conv.weight",),
    ),
    Signature(
        "hunyuan_vae_renamed", "the HunyuanVideo VAE under other key names",
        "which ComfyUI's own Load VAE reads", ("encoder.down.0.block.0.conv1.conv.weight", "quant_conv.weight"),
    ),
    Signature(
        "dc_ae", "the Video DC-AE", "which is the VAE of Open-Sora 2.0's high-compression variant and belongs in the VAE slot (models/vae in ComfyUI)",
        ("encoder.stages.0.op_list.0.main.conv1.conv.weight", "decoder.project_out.op_list.0.weight"),
    ),
    Signature(
        "dc_ae_diffusers", "a DC-AE in the diffusers layout", "which is not Open-Sora's Video DC-AE as it was released",
        ("encoder.down_blocks.0.0.conv1.weight",),
    ),
    Signature("wan_vae", "the Wan VAE", _OTHER_FAMILY, ("decoder.middle.0.residual.0.gamma|encoder.down_blocks.0.norm1.gamma",)),
    Signature("ltx_vae", "the LTX-Video VAE", _OTHER_FAMILY, ("decoder.up_blocks.0.res_blocks.0.conv1.conv.weight",)),
    Signature("sd_vae", "a Stable Diffusion VAE", "which makes single pictures", (_PICTURE_VAE, "quant_conv.weight")),
    Signature(
        "flux_ae", "the Flux.1 picture autoencoder", "which turns Flux's latents into pictures (--flux-vae on the command line); Stable Diffusion 3's has the same shape",
        (_PICTURE_VAE, "decoder.conv_in.weight"),
    ),
    Signature(
        "picture_vae_diffusers", "a picture VAE in the diffusers layout", "which makes single pictures",
        ("encoder.down_blocks.0.resnets.0.conv1.weight", "decoder.conv_in.weight"),
    ),
    Signature(
        "umt5", "a UMT5 encoder", "which Wan uses; its vocabulary is not T5's",
        ("encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight",),
    ),
    Signature("t5", "", "", ("encoder.block.0.layer.0.SelfAttention.q.weight",)),
    Signature(
        "clip_full", "a whole CLIP (text and vision)", "",
        ("text_model.embeddings.token_embedding.weight", _VISION),
    ),
    Signature("clip_text", "", "", ("text_model.embeddings.token_embedding.weight|embeddings.token_embedding.weight",)),
    Signature("clip_vision", "a CLIP vision model", "which reads pictures, not prompts", (_VISION,)),
    Signature(
        "llm", "a language model", "which HunyuanVideo and others use as text encoder",
        ("layers.0.self_attn.q_proj.weight", "embed_tokens.weight"),
    ),
)  # fmt: skip

_LORA_MARKS = (
    ".lora_A", ".lora_B", ".lora_down.", ".lora_up.", ".lora.down.", ".lora.up.", "_lora.down.", "_lora.up.", ".lora_linear_layer.",
)  # fmt: skip

_LARGEST_SIZE = 1 << 20  # of one dimension; far above any model's

_SLOTS = {
    "transformer": (
        ("open_sora_2", "open_sora_2_dc_ae"),
        "the Open-Sora 2.0 transformer, Open_Sora_v2.safetensors (in ComfyUI under models/diffusion_models)",
    ),
    "vae": (("hunyuan_vae", "dc_ae"), "the HunyuanVideo VAE, hunyuan_vae.safetensors (in ComfyUI under models/vae)"),
    "t5": (("t5",), "a T5 v1.1 XXL encoder (in ComfyUI under models/text_encoders, the file that Flux uses)"),
    "clip": (("clip_text", "clip_full"), "CLIP-L's text encoder (in ComfyUI under models/text_encoders, the file that Flux uses)"),
    "flux": (("flux",), "a Flux.1 transformer as it was released, flux1-dev.safetensors or flux1-schnell.safetensors, as --flux"),
    "flux_vae": (("flux_ae",), "the Flux.1 picture autoencoder as it was released, ae.safetensors, as --flux-vae"),
    "lora": (("lora",), "a LoRA trained for the Open-Sora 2.0 transformer (in ComfyUI under models/loras)"),
}


def identify(shapes: Shapes) -> Identity:
    """Say what a file is.

    Args:
        shapes: shape of every tensor in the file, by its key. Two-dimensional quantised weights may show
            half their columns.

    Returns:
        An Identity; kind "unknown" where no table line fits. Never raises.
    """
    if any(mark in key for key in shapes for mark in _LORA_MARKS):
        return Identity("lora", "a LoRA", "which is applied to a loaded model (models/loras in ComfyUI)")
    for signature in _SIGNATURES:
        for prefix in _PREFIXES:
            if _matches(signature, shapes, prefix):
                return _describe(signature, bare_shapes(shapes, prefix), prefix)
    first = ", ".join(list(shapes)[:3]) or "none"
    return Identity("unknown", f"not a model that is known here ({len(shapes)} tensors, the first: {first})")


def require(identity: Identity, slot: str, name: str, kinds: tuple[str, ...] = ()) -> Identity:
    """Return the identity if it fits the slot, else say what the file is and what the slot needs.

    Args:
        slot: "transformer", "vae", "t5", "clip", "flux", "flux_vae" or "lora".
        name: the file's name, for the sentence.
        kinds: kinds to accept instead of the slot's own, for instance ("flux",).

    Raises:
        CheckpointError: the file is something else.
    """
    accepted, needed = _SLOTS[slot]
    if identity.kind in (kinds or accepted):
        return identity
    place = f", {identity.place}" if identity.place else ""
    raise CheckpointError(f"{name} is {identity.title}{place}; Open-Sora 2.0 needs {needed} here.")


def bare_shapes(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    """The tensors under `prefix`, without it."""
    return {key[len(prefix) :]: tuple(shape) for key, shape in shapes.items() if key.startswith(prefix)}


def transformer_config(shapes: Shapes) -> TransformerConfig:
    """Sizes of an MMDiT (Open-Sora 2.0 or Flux, unfused or fused), from bare or prefixed keys.

    heads = hidden / length of `key_norm`; the patch area is what the condition's one mask channel adds to
    its packed features, cond_in - img_in (2x2 where there is no cond_in, as in Flux).

    Raises:
        CheckpointError: a tensor the sizes are read from is missing or they contradict each other.
    """
    shapes = bare_shapes(shapes, _prefix_of(shapes, "img_in.bias"))
    hidden = _size(shapes, "img_in.bias")
    norm = "double_blocks.0.img_attn.norm.key_norm."
    head_dim = _size(shapes, norm + "scale" if norm + "scale" in shapes else norm + "weight")
    packed = _size(shapes, "final_layer.linear.bias")
    patch_size = _patch_size(shapes, packed)
    if hidden % head_dim or head_dim % 16 or packed % patch_size**2:
        raise CheckpointError(
            f"The sizes of this transformer cannot be: hidden {hidden} with heads of {head_dim} (rotary axes need a multiple of 16), "
            f"{packed} packed channels with a patch of {patch_size}."
        )
    return TransformerConfig(
        in_channels=packed // patch_size**2,
        patch_size=patch_size,
        hidden_size=hidden,
        num_heads=hidden // head_dim,
        mlp_hidden_size=_size(shapes, "double_blocks.0.img_mlp.0.bias"),
        depth=_count(shapes, "double_blocks."),
        depth_single_blocks=_count(shapes, "single_blocks."),
        context_in_dim=_size(shapes, "txt_in.weight", 1),
        vec_in_dim=_size(shapes, "vector_in.in_layer.weight", 1),
        cond_embed="cond_in.bias" in shapes,
        guidance_embed="guidance_in.in_layer.bias" in shapes,
    )


def vae_config(shapes: Shapes) -> VAEConfig:
    """Sizes of a HunyuanVideo-layout VAE, from bare or prefixed keys.

    Raises:
        CheckpointError: a tensor the sizes are read from is missing or they contradict each other.
    """
    shapes = bare_shapes(shapes, _prefix_of(shapes, "encoder.conv_in.conv.bias"))
    blocks = _count(shapes, "encoder.down_blocks.")
    widths = tuple(_size(shapes, f"encoder.down_blocks.{block}.resnets.0.conv2.conv.bias") for block in range(blocks))
    groups = min(widths, default=0) // 4
    if len(widths) != len(HUNYUAN_VAE.block_out_channels) or not groups or any(width % groups for width in widths):
        raise CheckpointError(
            f"The widths of this VAE cannot be: {list(widths)}; four multiples of a quarter of the narrowest are expected."
        )
    return VAEConfig(
        latent_channels=_size(shapes, "post_quant_conv.bias"),
        block_out_channels=widths,
        layers_per_block=_count(shapes, "encoder.down_blocks.0.resnets."),
        in_channels=_size(shapes, "encoder.conv_in.conv.weight", 1),
    )


def dc_ae_config(shapes: Shapes) -> DCAEConfig:
    """Sizes of a Video DC-AE, from bare or prefixed keys. Which stages attend and which change time is the released model's.

    Raises:
        CheckpointError: a tensor the sizes are read from is missing or they contradict each other.
    """
    shapes = bare_shapes(shapes, _prefix_of(shapes, "encoder.project_in.conv.bias"))
    stages = range(_count(shapes, "encoder.stages."))
    # A stage of residual blocks, or of attention.
    blocks = ("main.conv2.norm.bias", "context_module.main.proj.norm.bias")
    keys = [[f"encoder.stages.{stage}.op_list.0.{block}" for block in blocks] for stage in stages]
    widths = tuple(_size(shapes, attends if attends in shapes else residual) for residual, attends in keys)
    counts = [[_count(shapes, f"{half}.stages.{stage}.op_list.") for stage in stages] for half in ("encoder", "decoder")]
    # But for the last stage, one of them is the step to the next.
    depths = (tuple(count - (stage < len(stages) - 1) for stage, count in zip(stages, half, strict=True)) for half in counts)
    config = DCAEConfig(
        _size(shapes, "encoder.project_out.main.op_list.0.conv.bias"), widths, *depths, _size(shapes, "encoder.project_in.conv.weight", 1)
    )
    if problem := config.problem():
        raise CheckpointError(problem)
    return config


def _matches(signature: Signature, shapes: Shapes, prefix: str) -> bool:
    present = all(any(prefix + key in shapes for key in needed.split("|")) for needed in signature.needs)
    return present and not any(prefix + key in shapes for key in signature.lacks)


def _describe(signature: Signature, shapes: Shapes, prefix: str) -> Identity:
    found = Identity(signature.kind, signature.title, signature.place, prefix)
    if signature.kind == "mmdit":
        return _describe_mmdit(shapes, found)
    if signature.kind == "hunyuan_vae":
        return _describe_vae(shapes, found)
    if signature.kind == "dc_ae":
        return _describe_dc_ae(shapes, found)
    if signature.kind == "t5":
        width = dim(shapes, "encoder.final_layer_norm.weight", 0, dim(shapes, "shared.weight", 1, 0))
        xxl = width == 4096
        title = "a T5 XXL encoder" if xxl else f"a T5 encoder of width {width} (T5 XXL has 4096)"
        return replace(found, title=title, place="which belongs in the T5 text encoder slot (models/text_encoders in ComfyUI)")
    if signature.kind == "clip_text":
        table = "embeddings.token_embedding.weight"  # transformers 5 drops the text_model level
        width = dim(shapes, f"text_model.{table}", 1, dim(shapes, table, 1, 0))
        title = {768: "the CLIP-L text encoder", 1280: "the CLIP-G text encoder"}.get(width, f"a CLIP text encoder of width {width}")
        return replace(found, title=title, place="which belongs in a text encoder slot (models/text_encoders in ComfyUI)")
    return found


def _describe_mmdit(shapes: Shapes, found: Identity) -> Identity:
    fused = "double_blocks.0.img_attn.qkv.bias" in shapes
    cond = "cond_in.bias" in shapes
    layout = f"{'fused' if fused else 'unfused'} qkv, {'with' if cond else 'no'} cond_in"
    try:
        config = transformer_config(shapes)
    except CheckpointError as error:
        return replace(found, kind="mmdit_damaged", title=f"a Flux-like transformer ({layout}) whose sizes cannot be read: {error}")
    found = replace(found, config=config, fused=fused)
    if not cond:
        title = ("a Flux.1 transformer" if fused else "a Flux.1 transformer in Open-Sora's key layout") + f" ({layout})"
        place = (
            "which draws the picture that a video begins with: --flux on the command line, flux_model of Open-Sora Flux to Video"
            if fused
            else "which is the start of fine-tuning and was not trained for video"
        )
        return replace(found, kind="flux" if fused else "flux_unfused", title=title, place=place)
    if config.patch_size == 1:
        title = f"the Open-Sora 2.0 transformer for the high-compression Video DC-AE ({config.in_channels} latent channels)"
        title += "" if config == OPEN_SORA_2_DC_AE else f" of other sizes ({sizes(config)})"
        return replace(
            found, kind="open_sora_2_dc_ae", title=title, place="which belongs in the model slot, with the Video DC-AE as its VAE"
        )
    title = "the Open-Sora 2.0 transformer" if config == OPEN_SORA_2 else f"an Open-Sora 2.0 transformer of other sizes ({sizes(config)})"
    title += " in the fused Flux layout" if fused else ""
    return replace(found, kind="open_sora_2", title=title, place="which belongs in the model slot (models/diffusion_models in ComfyUI)")


def _describe_vae(shapes: Shapes, found: Identity) -> Identity:
    try:
        config = vae_config(shapes)
    except CheckpointError as error:
        return replace(found, kind="hunyuan_vae_damaged", title=f"a HunyuanVideo VAE whose sizes cannot be read: {error}")
    title = found.title if config == HUNYUAN_VAE else f"a HunyuanVideo-layout VAE of other sizes ({sizes(config)})"
    return replace(found, config=config, title=title)


def _describe_dc_ae(shapes: Shapes, found: Identity) -> Identity:
    if len(shapes["encoder.stages.0.op_list.0.main.conv1.conv.weight"]) != 5:
        return replace(found, kind="dc_ae_pictures", title="a DC-AE for pictures", place="which makes single pictures")
    try:
        config = dc_ae_config(shapes)
    except CheckpointError as error:
        return replace(found, kind="dc_ae_damaged", title=f"a Video DC-AE whose sizes cannot be read: {error}")
    title = found.title if config == VIDEO_DC_AE else f"a Video DC-AE of other sizes ({sizes(config)})"
    return replace(found, config=config, title=title)


def sizes(config: TransformerConfig | VAEConfig | DCAEConfig) -> str:
    """A configuration in words: "hidden 3072, 24 heads of 128, 19 double and 38 single blocks"."""
    if isinstance(config, DCAEConfig):
        depths = (" ".join(map(str, depths)) for depths in (config.encoder_depths, config.decoder_depths))
        return f"widths {'/'.join(map(str, config.widths))}, blocks {' and '.join(depths)}, {config.latent_channels} latent channels"
    if isinstance(config, VAEConfig):
        widths = "/".join(map(str, config.block_out_channels))
        return f"widths {widths}, {config.layers_per_block} layers per block, {config.latent_channels} latent channels"
    return (
        f"hidden {config.hidden_size}, {config.num_heads} heads of {config.head_dim}, "
        f"{config.depth} double and {config.depth_single_blocks} single blocks"
    )


def dim(shapes: Shapes, key: str, axis: int, default: int) -> int:
    """One dimension of a tensor, or the default where the tensor or that dimension is missing."""
    shape = shapes.get(key, ())
    return shape[axis] if axis < len(shape) else default


def _patch_size(shapes: Shapes, packed: int) -> int:
    if "cond_in.weight" not in shapes:
        return FLUX_DEV.patch_size
    img_features = _size(shapes, "img_in.weight", 1)
    area = _size(shapes, "cond_in.weight", 1) - img_features
    if img_features < packed and packed % img_features == 0:
        area *= packed // img_features  # 4-bit weights show half their columns
    side = math.isqrt(max(area, 0))
    if side < 1 or side * side != area:
        raise CheckpointError(
            f"cond_in reads {area + img_features} features and img_in {img_features}; their difference must be the patch area, 4 or 1."
        )
    return side


def _size(shapes: Shapes, key: str, axis: int = 0) -> int:
    size = dim(shapes, key, axis, 0)
    if not 1 <= size <= _LARGEST_SIZE:
        found = f"has shape {list(shapes[key])}" if key in shapes else "is missing"
        raise CheckpointError(f"The tensor {key}, from which the model's size is read, {found}; the file is incomplete or damaged.")
    return size


def _count(shapes: Shapes, stem: str) -> int:
    """One more than the highest index that follows `stem`; a gap is left for the key check to name."""
    indices = (key[len(stem) :].split(".", 1)[0] for key in shapes if key.startswith(stem))
    return 1 + max((int(index) for index in indices if index.isdigit()), default=-1)


def _prefix_of(shapes: Shapes, key: str) -> str:
    return next((prefix for prefix in _PREFIXES if prefix + key in shapes), "")
