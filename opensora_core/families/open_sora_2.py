"""Open-Sora 2.0, its high-compression variant, and the codecs of both."""

from dataclasses import replace

from ..codecs.dc_ae import VIDEO_DC_AE, DCAEConfig, VideoDCAE
from ..codecs.hunyuan.config import HUNYUAN_VAE, VAEConfig
from ..codecs.hunyuan.model import CausalVAE
from ..family import Clip, Family, Part
from ..geometry import CAUSAL, HIGH_COMPRESSION
from ..networks.mmdit.config import OPEN_SORA_2, OPEN_SORA_2_DC_AE, TransformerConfig
from ..networks.mmdit.layout import FUSED, GROUPS, KEYS, UNFUSED
from ..networks.mmdit.model import MMDiT, example
from ..sampling.given import Beside
from ..sampling.longer import LongRule
from ..sampling.run import SamplingRecipe, beside
from ..sampling.schedule import Flow, shifted_schedule
from ..text.prompt import MOTION_SCORE, T5_LENGTH, decorate
from ..text.recipe import CLIP, T5, Said, TextRecipe

HUNYUAN = Part(
    kind="hunyuan_vae",
    title="the HunyuanVideo VAE",
    other="a HunyuanVideo-layout VAE",
    place="which is Open-Sora 2.0's video VAE and belongs in the VAE slot (models/vae in ComfyUI)",
    keys=("encoder.down_blocks.0.resnets.0.conv1.conv.bias", "encoder.mid_block.attentions.0.group_norm.weight", "post_quant_conv.bias"),
    config=VAEConfig.of,
    released=HUNYUAN_VAE,
    build=CausalVAE,
)

DC_AE = Part(
    kind="dc_ae",
    title="the Video DC-AE",
    other="a Video DC-AE",
    place="which is the VAE of Open-Sora 2.0's high-compression variant and belongs in the VAE slot (models/vae in ComfyUI)",
    keys=("encoder.stages.0.op_list.0.main.conv1.conv.weight", "decoder.project_out.op_list.0.weight"),
    config=DCAEConfig.of,
    released=VIDEO_DC_AE,
    build=VideoDCAE,
)

OPEN_SORA = Family(
    kind="open_sora_2",
    title="the Open-Sora 2.0 transformer",
    other="an Open-Sora 2.0 transformer",
    keys=(*KEYS, "cond_in.bias"),
    config=TransformerConfig.of,
    owns=lambda config: config.cond_embed and config.patch_size > 1,
    released=OPEN_SORA_2,
    build=MMDiT,
    layouts=(FUSED, UNFUSED),
    groups=GROUPS,
    example=example,
    codecs=(HUNYUAN.kind,),
    grid=CAUSAL,
    usual=Clip(height=192, width=336, num_frames=129, fps=24, num_steps=50, scales=(7.5, 3.0)),
    sampling=SamplingRecipe(process=Flow(+1), schedule=shifted_schedule, solvers=("euler",), given=Beside, inputs=beside),
    text=TextRecipe(
        (T5, CLIP),
        T5_LENGTH,
        False,
        lambda prompt, said: decorate(prompt, said.fps, said.motion_score),
        "",
        usual=Said(motion_score=MOTION_SCORE),
    ),
    longer=LongRule(),
    zero_at_first=("cond_in.weight",),
    plain=("img_in",),
)

HIGH_COMPRESSION_VARIANT = replace(
    OPEN_SORA,
    kind="open_sora_2_dc_ae",
    title="the Open-Sora 2.0 transformer for the high-compression Video DC-AE (128 latent channels)",
    other="an Open-Sora 2.0 transformer for the high-compression Video DC-AE",
    place="which belongs in the model slot, with the Video DC-AE as its VAE",
    owns=lambda config: config.cond_embed and config.patch_size == 1,
    released=OPEN_SORA_2_DC_AE,
    codecs=(DC_AE.kind,),
    grid=HIGH_COMPRESSION,
    usual=replace(OPEN_SORA.usual, height=576, width=1024, num_frames=128),
)
