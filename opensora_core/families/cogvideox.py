"""CogVideoX: 2B, 5B, 5B-I2V, 1.5-5B and 1.5-5B-I2V, and the VAE that all of them share.

The 2B is Apache-2.0; the 5B and 1.5 transformers are under the CogVideoX License, whose commercial use needs a registration.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from ..choices import AUTO, CONSTANT, DIFFUSERS, RELEASED
from ..codecs import cogvideox as codec
from ..errors import OpenSoraError
from ..family import Clip, Family, Part
from ..networks.cogvideox import config as configs, layout
from ..networks.cogvideox.config import CogVideoXConfig
from ..networks.cogvideox.model import CogVideoX, example
from ..sampling.given import FirstFrame, Given, MadeOver
from ..sampling.guidance import Guidance
from ..sampling.longer import LongRule
from ..sampling.run import SamplingRecipe, Side
from ..sampling.schedule import Schedule
from ..sampling.solvers import clip_noise
from ..sampling.v_prediction import VPrediction, v_schedule
from ..text.recipe import T5, TextRecipe

SCALE, SCALE_2B = codec.COGVIDEOX_VAE.scale, 1.15258426
SHORT_SIDE, LONG_SIDE = 768, 1360

VAE = Part(
    kind="cogvideox_vae",
    title="the CogVideoX VAE",
    other="a CogVideoX VAE",
    place="which is the VAE of all CogVideoX models and belongs in the VAE slot (models/vae in ComfyUI)",
    keys=("decoder.mid_block.resnets.0.norm1.norm_layer.weight|decoder.mid.block_1.norm1.norm_layer.weight",),
    config=codec.CogVideoXVAEConfig.of,
    released=codec.COGVIDEOX_VAE,
    build=codec.CogVideoXVAE,
    layouts=codec.LAYOUTS,
)


def _schedule(config: CogVideoXConfig, extent, num_steps: int, shift: float = 0.0, parity: bool = False) -> Schedule:
    """shift: of the ratio of signal to noise; 0 = the model's own: 3 for the 2B, 1 for the others."""
    return v_schedule(num_steps, shift or (1.0 if config.is_rotary else 3.0), parity)


def _guidance(guidance: Guidance, solver: str) -> Guidance:
    """Two passes at every step, and one where the scale is at most 1; the released curve goes with the solver that it was released with."""
    curve = guidance.curve if guidance.curve != AUTO else RELEASED if solver == "dpm" else CONSTANT
    return Guidance(max(1.0, guidance.text), 1.0, False, False, False, curve=curve if guidance.text > 1 else CONSTANT)


def picture_factor(config: CogVideoXConfig, condition_scale: str) -> float:
    """What the picture's latents, as the VAE gives them, are multiplied by.

    5B-I2V was trained on 0.7 of them. Of 1.5-5B-I2V the authors' own code takes them as they are, and diffusers 1/0.7 of them, which makes
    frames after the first greyer. "1.0": as they are, whatever the model.
    """
    is_first = config.patch[0] == 1
    if condition_scale == DIFFUSERS:
        return SCALE if is_first else 1 / SCALE
    return SCALE if is_first and condition_scale == AUTO else 1.0


def _inputs(config: CogVideoXConfig, side: Side, given: Given, numbers: Mapping[str, float | str], parity: bool = False) -> Side:
    if given.cond is None:
        return side
    factor = picture_factor(config, DIFFUSERS if parity else str(numbers.get("condition_scale", AUTO))) / SCALE
    return {**side, "cond": (given.cond * factor).to(side["context"])}


def _recipe(takes_picture: bool, solvers: tuple[str, ...]) -> SamplingRecipe:
    recipe = SamplingRecipe(
        process=VPrediction(),
        schedule=_schedule,
        solvers=solvers,
        given=FirstFrame if takes_picture else partial(MadeOver, VPrediction()),
        inputs=_inputs,
        guidance=_guidance,
        noise=clip_noise,
        makes_over=not takes_picture,
        passes=2,
    )
    theirs = {"schedule": partial(_schedule, parity=True), "inputs": partial(_inputs, parity=True)}
    if takes_picture:  # whose posterior is sampled, of the stream that then gives the noise
        theirs |= {"before": 1, "noise": partial(clip_noise, before=1)}
    return replace(recipe, as_diffusers=replace(recipe, **theirs))


def _suits(name: str, config: CogVideoXConfig, height: int, width: int, num_frames: int) -> str:
    """See Family.suits."""
    sides, trained, is_trained = sorted((height, width)), "720x480", (height, width) == (480, 720)
    if config.patch[0] > 1:
        trained, is_trained = f"{LONG_SIDE}x{SHORT_SIDE}", (height, width) == (SHORT_SIDE, LONG_SIDE)
        if config.takes_picture:
            trained, is_trained = "a short side of 768 and a long one of 768 to 1360", sides[0] == SHORT_SIDE and sides[1] <= LONG_SIDE
    if config.table_rows and not is_trained:
        raise OpenSoraError(
            f"CogVideoX {name} has learned positions for {trained} pixels (width x height) alone; {width}x{height} cannot be made; use that size."
        )
    said = f"CogVideoX {name} was trained on {trained} pixels (width x height); {width}x{height} is made all the same, and is likely to be worse."
    return "" if is_trained else said


_USUAL_1_0 = Clip(height=480, width=720, num_frames=49, fps=8, num_steps=50, scales=(6.0,))
_USUAL_1_5 = Clip(height=SHORT_SIDE, width=LONG_SIDE, num_frames=81, fps=16, num_steps=50, scales=(6.0,))
_LICENSED = "; CogVideoX License: commercial use needs a registration"


def _row(kind: str, name: str, released: CogVideoXConfig, dtype: str = "BF16") -> Family:
    takes_picture, is_first = released.takes_picture, released.patch[0] == 1
    return Family(
        kind=kind,
        title=f"the CogVideoX {name} transformer",
        other=f"a CogVideoX transformer like {name}",
        repositories=(f"CogVideoX{name}" if name.startswith("1.5") else f"CogVideoX-{name.replace('B', 'b')}",),
        place=f"{Family.place}{_LICENSED if released.is_rotary else ''}",
        keys=layout.KEYS,
        config=layout.config_of,
        owns=lambda config: (config.takes_picture, config.patch, config.is_rotary) == (takes_picture, released.patch, released.is_rotary),
        released=released,
        build=CogVideoX,
        layouts=layout.LAYOUTS,
        groups=layout.GROUPS,
        example=example,
        codecs=(VAE.kind,),
        latent_scale=SCALE if released.is_rotary else SCALE_2B,
        grid=released.grid,
        usual=_USUAL_1_0 if is_first else _USUAL_1_5,
        text=TextRecipe((T5,), configs.TEXT_TOKENS, False, lambda prompt, said: prompt, ""),
        sampling=_recipe(takes_picture, ("dpm", "ddim") if released.is_rotary else ("ddim", "dpm")),
        takes=("image",) if takes_picture else ("video",),
        requires=("image",) if takes_picture else (),
        longer=LongRule(re_encodes=True, from_picture=True) if takes_picture else None,
        lora_key=layout.lora_key,
        suits=partial(_suits, name, released),
        dtype=dtype,
    )


ROWS = (
    _row("cogvideox_2b", "2B", configs.COGVIDEOX_2B, "F16"),
    _row("cogvideox_5b", "5B", configs.COGVIDEOX_5B),
    _row("cogvideox_5b_i2v", "5B-I2V", configs.COGVIDEOX_5B_I2V),
    _row("cogvideox_1_5", "1.5-5B", configs.COGVIDEOX_1_5_5B),
    _row("cogvideox_1_5_i2v", "1.5-5B-I2V", configs.COGVIDEOX_1_5_5B_I2V),
)
