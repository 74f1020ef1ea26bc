"""What a file is, from names and shapes alone; the released files' manifests; the layouts' relation."""

import math
import random
import re

import pytest
import torch

from opensora_core.checkpoint import detect
from opensora_core.codecs.dc_ae import VIDEO_DC_AE, DCAEConfig
from opensora_core.codecs.hunyuan.config import HUNYUAN_VAE, VAEConfig
from opensora_core.codecs.picture import FLUX_AE
from opensora_core.encoders.clip import CLIPSizes, clip_manifest
from opensora_core.encoders.t5 import T5Sizes, t5_manifest
from opensora_core.errors import CheckpointError
from opensora_core.families import table
from opensora_core.networks.mmdit.config import FLUX_DEV, OPEN_SORA_2, OPEN_SORA_2_DC_AE, TransformerConfig
from opensora_core.networks.mmdit.layout import FUSED, UNFUSED, file_name, module_name, unfuse

TINY = TransformerConfig(16, 2, 96, 3, 384, 2, 3, 64, 64, True, False)
TINY_VAE = VAEConfig(16, (16, 32, 32, 32), 1)

# Written by hand from the released files' description, not by running the modules.
ANCHORS = {
    "img_in.weight": (3072, 64),
    "cond_in.weight": (3072, 68),
    "txt_in.weight": (3072, 4096),
    "time_in.in_layer.weight": (3072, 256),
    "time_in.out_layer.bias": (3072,),
    "vector_in.in_layer.weight": (3072, 768),
    "double_blocks.0.img_mod.lin.weight": (18432, 3072),
    "double_blocks.18.txt_mod.lin.bias": (18432,),
    "double_blocks.0.img_attn.q_proj.weight": (3072, 3072),
    "double_blocks.18.txt_attn.v_proj.bias": (3072,),
    "double_blocks.0.txt_attn.norm.query_norm.scale": (128,),
    "double_blocks.7.img_attn.norm.key_norm.scale": (128,),
    "double_blocks.0.img_attn.proj.weight": (3072, 3072),
    "double_blocks.0.txt_mlp.0.weight": (12288, 3072),
    "double_blocks.0.img_mlp.2.weight": (3072, 12288),
    "single_blocks.0.q_proj.weight": (3072, 3072),
    "single_blocks.37.k_proj.bias": (3072,),
    "single_blocks.37.v_mlp.weight": (15360, 3072),
    "single_blocks.0.linear2.weight": (3072, 15360),
    "single_blocks.0.norm.query_norm.scale": (128,),
    "single_blocks.0.modulation.lin.weight": (9216, 3072),
    "final_layer.linear.weight": (64, 3072),
    "final_layer.adaLN_modulation.1.weight": (6144, 3072),
}
FUSED_ANCHORS = {
    "double_blocks.0.img_attn.qkv.weight": (9216, 3072),
    "double_blocks.18.txt_attn.qkv.bias": (9216,),
    "single_blocks.37.linear1.weight": (21504, 3072),
    "single_blocks.0.linear1.bias": (21504,),
    "guidance_in.in_layer.weight": (3072, 256),
    "guidance_in.out_layer.weight": (3072, 3072),
}
VAE_ANCHORS = {
    "encoder.conv_in.conv.weight": (128, 3, 3, 3, 3),
    "encoder.down_blocks.1.resnets.0.conv_shortcut.conv.weight": (256, 128, 1, 1, 1),
    "encoder.down_blocks.3.resnets.1.conv2.conv.bias": (512,),
    "encoder.down_blocks.0.downsamplers.0.conv.conv.weight": (128, 128, 3, 3, 3),
    "encoder.mid_block.attentions.0.to_out.0.weight": (512, 512),
    "encoder.mid_block.resnets.1.norm2.weight": (512,),
    "encoder.conv_out.conv.weight": (32, 512, 3, 3, 3),
    "quant_conv.weight": (32, 32, 1, 1, 1),
    "post_quant_conv.bias": (16,),
    "decoder.conv_in.conv.weight": (512, 16, 3, 3, 3),
    "decoder.up_blocks.2.resnets.0.conv_shortcut.conv.weight": (256, 512, 1, 1, 1),
    "decoder.up_blocks.2.upsamplers.0.conv.conv.weight": (256, 256, 3, 3, 3),
    "decoder.up_blocks.3.resnets.2.conv1.conv.weight": (128, 128, 3, 3, 3),
    "decoder.conv_norm_out.weight": (128,),
    "decoder.conv_out.conv.weight": (3, 128, 3, 3, 3),
}

DC_AE_ANCHORS = {
    "encoder.project_in.conv.bias": (128,),
    "encoder.stages.0.op_list.1.main.conv2.norm.bias": (128,),
    "encoder.stages.2.op_list.2.main.conv.weight": (512, 512, 3, 3, 3),
    "encoder.stages.4.op_list.3.main.conv.weight": (1024, 1024, 3, 3, 3),
    "encoder.stages.3.op_list.0.context_module.main.aggreg.0.0.weight": (1536, 1, 5, 5, 5),
    "encoder.stages.3.op_list.0.context_module.main.aggreg.0.1.weight": (1536, 32, 1, 1, 1),
    "encoder.stages.5.op_list.2.local_module.main.depth_conv.conv.weight": (8192, 1, 3, 3, 3),
    "encoder.project_out.main.op_list.0.conv.weight": (128, 1024, 3, 3, 3),
    "decoder.project_in.main.conv.weight": (1024, 128, 3, 3, 3),
    "decoder.stages.1.op_list.0.main.conv.conv.weight": (256, 512, 3, 3, 3),
    "decoder.stages.4.op_list.3.context_module.main.proj.norm.weight": (1024,),
    "decoder.project_out.op_list.0.bias": (128,),
    "decoder.project_out.op_list.2.conv.weight": (3, 128, 3, 3, 3),
}
TINY_DC_AE = DCAEConfig(8, (8, 8, 16, 32, 32, 32), (2, 1, 1, 1, 1, 1), (1, 2, 1, 1, 1, 1))


def count(manifest):
    return len(manifest), sum(math.prod(shape) for shape in manifest.values())


def shapes(*names):
    return dict.fromkeys(names, (8, 8))


@pytest.mark.parametrize(
    ("manifest", "tensors", "parameters", "anchors"),
    [
        (lambda: table.manifest(OPEN_SORA_2), 1082, 11_891_390_528, ANCHORS),
        (lambda: table.manifest(OPEN_SORA_2_DC_AE), 1082, 11_891_971_200, {"img_in.weight": (3072, 128), "cond_in.weight": (3072, 129)}),
        (lambda: table.manifest(FLUX_DEV), 780, 11_901_408_320, FUSED_ANCHORS),
        (lambda: table.manifest(HUNYUAN_VAE), 248, 246_478_803, VAE_ANCHORS),
        (lambda: table.manifest(VIDEO_DC_AE), 339, 459_462_147, DC_AE_ANCHORS),
        (lambda: table.manifest(FLUX_AE), 244, 83_819_683, {"decoder.up.1.block.0.nin_shortcut.weight": (256, 512, 1, 1)}),
        (clip_manifest, 196, 123_060_480, {"text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768)}),
        (t5_manifest, 219, 4_762_310_656, {"encoder.block.23.layer.1.DenseReluDense.wo.weight": (4096, 10240)}),
    ],
)  # fmt: skip
def test_manifests_are_the_released_files(manifest, tensors, parameters, anchors):
    manifest = manifest()
    assert count(manifest) == (tensors, parameters)
    assert anchors.items() <= manifest.items()


@pytest.mark.parametrize(
    ("config", "layout", "kind"),
    [
        (OPEN_SORA_2, UNFUSED, "open_sora_2"),
        (OPEN_SORA_2, FUSED, "open_sora_2"),
        (OPEN_SORA_2_DC_AE, UNFUSED, "open_sora_2_dc_ae"),
        (FLUX_DEV, FUSED, "flux_1"),
        (FLUX_DEV, UNFUSED, "flux_1_unfused"),
        (TINY, UNFUSED, "open_sora_2"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_transformer_is_read_from_its_tensors(config, layout, kind, prefix):
    found = detect.identify({prefix + key: shape for key, shape in table.manifest(config, layout).items()})
    assert (found.kind, found.config, found.layout, found.prefix) == (kind, config, layout, prefix)


def test_norms_may_be_called_weight():
    renamed = {key.replace("_norm.scale", "_norm.weight"): shape for key, shape in table.manifest(TINY).items()}
    assert TransformerConfig.of(renamed) == TINY


@pytest.mark.parametrize("config", [OPEN_SORA_2, TINY])
def test_halved_columns_of_four_bit_weights_change_nothing_that_is_read(config):
    kept = ("txt_in.", "vector_in.", "img_in.", "cond_in.")
    halved = {
        key: (shape[0], shape[1] // 2) if len(shape) == 2 and not key.startswith(kept) else shape
        for key, shape in table.manifest(config).items()
    }
    assert detect.identify(halved).config == config


def test_patch_is_found_even_where_the_input_layers_are_halved():
    manifest = table.manifest(TINY)
    halved = {key: (manifest[key][0], manifest[key][1] // 2) for key in ("img_in.weight", "cond_in.weight")}
    assert TransformerConfig.of(manifest | halved) == TINY


@pytest.mark.parametrize("config", [HUNYUAN_VAE, TINY_VAE])
@pytest.mark.parametrize("prefix", ["", "vae."])
def test_a_vae_is_read_from_its_tensors(config, prefix):
    found = detect.identify({prefix + key: shape for key, shape in table.manifest(config).items()})
    assert (found.kind, found.config, found.prefix) == ("hunyuan_vae", config, prefix)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("flux_diffusers", ("transformer_blocks.0.norm1_context.linear.weight", "single_transformer_blocks.0.proj_mlp.weight", "context_embedder.weight")),
        ("hunyuan_video", ("txt_in.individual_token_refiner.blocks.0.norm1.weight", "double_blocks.0.img_attn.norm.key_norm.scale", "img_in.bias")),
        ("hunyuan_video", ("context_embedder.token_refiner.refiner_blocks.0.norm1.weight", "transformer_blocks.0.norm1_context.linear.weight")),
        ("wan", ("head.modulation", "patch_embedding.weight", "blocks.0.self_attn.q.weight")),
        ("wan", ("condition_embedder.time_proj.weight", "patch_embedding.weight", "blocks.0.attn1.to_q.weight")),
        ("ltx", ("patchify_proj.weight", "caption_projection.linear_1.weight")),
        ("mochi", ("t5_y_embedder.to_q.weight",)),
        ("sd3", ("joint_blocks.0.x_block.attn.qkv.weight",)),
        ("sd_unet", ("model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.quant_conv.weight")),
        ("hunyuan_vae_renamed", ("encoder.down.0.block.0.conv1.conv.weight", "quant_conv.weight")),
        ("dc_ae_pictures", ("encoder.stages.0.op_list.0.main.conv1.conv.weight", "decoder.project_out.op_list.0.weight")),
        ("dc_ae_diffusers", ("encoder.down_blocks.0.0.conv1.weight", "decoder.conv_in.weight")),
        ("wan_vae", ("decoder.middle.0.residual.0.gamma",)),
        ("sd_vae", ("encoder.down.0.block.0.conv1.weight", "decoder.conv_in.weight", "quant_conv.weight")),
        ("picture_vae_diffusers", ("encoder.down_blocks.0.resnets.0.conv1.weight", "decoder.conv_in.weight", "quant_conv.weight")),
        ("umt5", ("encoder.block.0.layer.0.SelfAttention.q.weight", "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight")),
        ("clip_vision", ("vision_model.embeddings.patch_embedding.weight",)),
        ("clip_full", ("vision_model.embeddings.patch_embedding.weight", "text_model.embeddings.token_embedding.weight")),
        ("llm", ("model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight")),
        ("lora", ("base_model.model.double_blocks.0.img_attn.q_proj.lora_A.weight",)),
        ("lora", ("lora_unet_double_blocks_0_img_attn_q_proj.lora_down.weight",)),
        ("unknown", ("layer.0.weight",)),
        ("unknown", ()),
    ],
)  # fmt: skip
def test_other_files_are_known_by_name(kind, names):
    found = detect.identify(shapes(*names))
    assert found.kind == kind
    with pytest.raises(CheckpointError, match=re.escape(f"x.safetensors is {found.title}")):
        detect.require(found, "transformer", "x.safetensors")


def test_text_encoders_say_their_size():
    assert detect.identify(t5_manifest()).title == "a T5 XXL encoder"
    assert (
        "width 64" in detect.identify(t5_manifest(T5Sizes(d_model=64, d_ff=128, num_layers=2, num_heads=4, vocab_size=100, d_kv=16))).title
    )
    assert detect.identify(clip_manifest()).title == "the CLIP-L text encoder"
    assert (
        detect.identify(clip_manifest(CLIPSizes(hidden_size=1280, num_hidden_layers=32, intermediate_size=5120))).title
        == "the CLIP-G text encoder"
    )
    new_names = {key.removeprefix("text_model."): shape for key, shape in clip_manifest().items()}
    assert detect.identify(new_names).kind == "clip_text"


def test_a_wrong_file_is_told_what_it_is_and_what_is_needed():
    flux = detect.identify(table.manifest(FLUX_DEV))
    sentence = r"Give the .*Open_Sora_v2\.safetensors.*flux1\.safetensors is a Flux\.1 transformer \(fused qkv, no cond_in\)"
    with pytest.raises(CheckpointError, match=sentence):
        detect.require(flux, "transformer", "flux1.safetensors")
    assert detect.require(flux, "flux", "flux1.safetensors") is flux
    with pytest.raises(CheckpointError, match="Give the HunyuanVideo VAE.*high-compression Video DC-AE.*belongs in the model slot"):
        detect.require(detect.identify(table.manifest(OPEN_SORA_2_DC_AE)), "vae", "dc.safetensors")
    with pytest.raises(CheckpointError, match="is the Video DC-AE.*high-compression variant.*belongs in the VAE slot"):
        detect.require(detect.identify(table.manifest(VIDEO_DC_AE)), "transformer", "F32T4C128_AE.safetensors")
    with pytest.raises(CheckpointError, match="Give a T5.*is the HunyuanVideo VAE.*belongs in the VAE slot"):
        detect.require(detect.identify(table.manifest(HUNYUAN_VAE)), "t5", "vae.safetensors")


@pytest.mark.parametrize("lost", ["img_in.weight", "txt_in.weight", "final_layer.linear.bias", "double_blocks.0.img_mlp.0.bias"])
def test_sizes_that_cannot_be_read_are_said_so_and_never_crash(lost):
    manifest = table.manifest(TINY)
    del manifest[lost]
    with pytest.raises(CheckpointError, match=re.escape(lost)):
        TransformerConfig.of(manifest)
    assert detect.identify(manifest).kind == "open_sora_2_damaged"


@pytest.mark.parametrize(
    "change",
    [
        {"cond_in.weight": (96, 70)},
        {"cond_in.weight": (96, 64)},
        {"cond_in.weight": (96,)},
        {"double_blocks.0.img_attn.norm.key_norm.scale": (36,)},
        {"double_blocks.0.img_attn.norm.key_norm.scale": ()},
        {"img_in.bias": (100,)},
    ],
)
def test_sizes_that_contradict_each_other_are_refused(change):
    manifest = table.manifest(TINY) | change
    with pytest.raises(CheckpointError):
        TransformerConfig.of(manifest)
    assert detect.identify(manifest).config is None


def test_a_vae_of_impossible_widths_is_refused():
    manifest = table.manifest(TINY_VAE) | {"encoder.down_blocks.2.resnets.0.conv2.conv.bias": (33,)}
    with pytest.raises(CheckpointError, match="33"):
        VAEConfig.of(manifest)
    assert detect.identify(manifest).kind == "hunyuan_vae_damaged"


def test_unfuse_gives_the_released_names_and_shapes():
    fused = table.manifest(TINY, FUSED)
    pairs = [pair for key, shape in fused.items() for pair in unfuse(key, torch.empty(shape, device="meta"), TINY)]
    assert {file_name(name): tuple(tensor.shape) for name, tensor in pairs} == table.manifest(TINY)
    assert len(pairs) == len(table.manifest(TINY))


def test_unfuse_moves_rows_and_changes_no_number():
    """Row r of a fused q is labelled r; the released layout wants even rows of each head first."""
    rows = torch.arange(3 * 96.0)
    parts = dict(unfuse("double_blocks.1.img_attn.qkv.bias", rows, TINY))
    head = [*range(0, 32, 2), *range(1, 32, 2)]
    order = [32 * h + j for h in range(3) for j in head]
    assert parts["double_blocks.1.img_attn.q_proj.bias"].tolist() == order
    assert parts["double_blocks.1.img_attn.k_proj.bias"].tolist() == [96 + j for j in order]
    assert parts["double_blocks.1.img_attn.v_proj.bias"].tolist() == list(range(192, 288))
    rows = torch.arange(3 * 96.0 + 384)
    parts = dict(unfuse("single_blocks.0.linear1.bias", rows, TINY))
    assert parts["single_blocks.0.q_proj.bias"].tolist() == order
    assert parts["single_blocks.0.v_mlp.bias"].tolist() == list(range(192, 192 + 96 + 384))
    ((name, scale),) = unfuse("single_blocks.0.norm.key_norm.scale", torch.arange(32.0), TINY)
    assert (name, scale.tolist()) == ("single_blocks.0.norm.key_norm.weight", head)
    untouched = torch.arange(96.0)
    assert unfuse("img_in.bias", untouched, TINY)[0][1] is untouched


def test_interleaved_and_rotate_half_give_the_same_attention_logits():
    """Complex numbers are the oracle: interleaved pairs (2j, 2j+1) against our halves (j, j + D/2)."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(6, 32, generator=generator, dtype=torch.float64) for _ in "qk")
    angles = torch.randn(6, 16, generator=generator, dtype=torch.float64)
    turn = torch.polar(torch.ones_like(angles), angles)
    interleaved = [torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (16, 2)).contiguous()) * turn).flatten(1) for x in (q, k)]

    def rotate_half(x):
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()), dim=-1)

    def moved(x):
        return torch.stack([unfuse("single_blocks.0.norm.query_norm.scale", row, TINY)[0][1] for row in x])

    halves = [rotate_half(moved(x)) for x in (q, k)]
    assert torch.allclose(interleaved[0] @ interleaved[1].T, halves[0] @ halves[1].T, atol=1e-12)
    unmoved = [rotate_half(x) for x in (q, k)]
    assert not torch.allclose(interleaved[0] @ interleaved[1].T, unmoved[0] @ unmoved[1].T, atol=1e-2)


def test_norm_names_go_both_ways():
    name = "double_blocks.0.img_attn.norm.query_norm"
    assert file_name(f"{name}.weight") == f"{name}.scale"
    assert module_name(f"{name}.scale") == f"{name}.weight"
    assert module_name("img_in.weight") == file_name("img_in.weight") == "img_in.weight"


@pytest.mark.parametrize("index", ["9" * 20, "9" * 5000, "1000"])
def test_a_block_index_that_no_file_of_so_few_tensors_has_is_refused_at_once(index):
    manifest = table.manifest(TINY) | {f"single_blocks.{index}.linear2.weight": (96, 480)}
    found = detect.identify(manifest)
    assert found.config is None and f"begins single_blocks.{index[:20]}" in found.title


def test_no_mixture_of_damaged_shapes_makes_identify_raise():
    """A seeded thousand of damaged files: keys lost, scalars, zero and absurd dimensions."""
    draw = random.Random(0)
    whole = [
        table.manifest(TINY),
        table.manifest(TINY_VAE),
        table.manifest(TINY_DC_AE),
        t5_manifest(T5Sizes(d_model=8, d_ff=16, num_layers=2, num_heads=2, vocab_size=10, d_kv=4)),
        clip_manifest(CLIPSizes(hidden_size=8, num_hidden_layers=1, intermediate_size=16, vocab_size=10)),
    ]
    for _ in range(1000):
        damaged = dict(draw.choice(whole))
        for key in draw.sample(list(damaged), 3):
            damaged[key] = tuple(draw.choice((0, 1, 7, 10**9)) for _ in range(draw.randint(0, 5)))
            if draw.random() < 0.3:
                del damaged[key]
        found = detect.identify(damaged)
        kinds = ("open_sora_2", "open_sora_2_dc_ae", "flux_1_unfused", "hunyuan_vae", "dc_ae")
        assert found.title and (found.config is None or found.kind in kinds)


@pytest.mark.parametrize("config", [VIDEO_DC_AE, TINY_DC_AE])
@pytest.mark.parametrize("prefix", ["", "vae."])
def test_a_dc_ae_is_read_from_its_tensors(config, prefix):
    found = detect.identify({prefix + key: shape for key, shape in table.manifest(config).items()})
    assert (found.kind, found.config, found.prefix) == ("dc_ae", config, prefix)
    assert ("other sizes" in found.title) == (config == TINY_DC_AE)


@pytest.mark.parametrize(
    "lost", ["encoder.stages.5.op_list.0.context_module.main.proj.norm.bias", "encoder.project_out.main.op_list.0.conv.bias"]
)
def test_a_damaged_dc_ae_names_the_tensor(lost):
    manifest = table.manifest(TINY_DC_AE)
    del manifest[lost]
    if "context_module" in lost:
        lost = "encoder.stages.5.op_list.0.main.conv2.norm.bias"  # neither kind of block is there
    found = detect.identify(manifest)
    assert found.kind == "dc_ae_damaged" and lost in found.title
