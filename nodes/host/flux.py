"""Flux.1 through the host's own Flux code: the picture that a video begins with, and the graph that goes on from it.

The user's own MODEL (any precision, GGUF, with LoRAs), VAE and CLIP are used as they are; here is only what upstream does
differently from the host's usual Flux workflow: its schedule, its guidance, its picture's size, and prompts read by its recipe.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_sampling
import comfy.samplers
import comfy.utils
import latent_preview
import node_helpers
import torch
from comfy_execution.graph_utils import GraphBuilder
from torch import Tensor

from ...opensora_core.errors import OpenSoraError
from ...opensora_core.families.table import PAINTER
from ...opensora_core.family import NetworkSizes
from ...opensora_core.geometry import CAUSAL, HIGH_COMPRESSION, SPACE_COMPRESSION
from ...opensora_core.run.finite import is_finite, not_numbers, one_colour
from ...opensora_core.run.picture import DRAWING, PictureRequest, check_text
from ...opensora_core.sampling import schedule, solvers
from ...opensora_core.sampling.guidance import Guidance
from . import kept, notice, prompts, selftest, text
from .families import is_open_sora, require_open_sora
from .run import agreeing, walk
from .vae import vae_config

T = TypeVar("T")

PATCH = 2  # latent pixels per token side, of every Flux.1
SOCKETS = ("flux_model", "flux_vae", "clip", "model", "vae")


def require_flux(model, name: str = "flux_model") -> NetworkSizes:
    """Sizes of a MODEL, if it is a Flux.1 that draws from text: which kind it is, and the widths of the text it reads.

    Raises:
        OpenSoraError: another model, or a Flux that wants a picture to begin with.
    """
    inner = getattr(model, "model", None)
    if is_open_sora(model):
        raise OpenSoraError(f"{name} holds Open-Sora 2.0, the video model; connect a Flux.1 model to it, and Open-Sora to model.")
    config = getattr(getattr(inner, "model_config", None), "unet_config", {})
    # Chroma, Flux.2 and others are subclasses in the host's own module; wrappers of other packs are subclasses elsewhere.
    is_host_variant = type(inner).__module__ == comfy.model_base.__name__ and type(inner) is not comfy.model_base.Flux
    if not isinstance(inner, comfy.model_base.Flux) or is_host_variant or config.get("image_model") != "flux":
        raise OpenSoraError(
            f"{name} holds {type(inner).__name__}, not Flux.1; load flux1-dev or flux1-schnell with Load Diffusion Model. "
            "To begin with another model's picture, use the workflow in which it is a part of its own, with Open-Sora Image to Video."
        )
    features, channels = config.get("in_channels", 0), config.get("out_channels", 0)
    if features > channels:
        raise OpenSoraError(
            f"{name} holds a Flux that begins with a picture (Fill, Canny, Depth and the like); use flux1-dev or flux1-schnell."
        )
    widths = {name: config[name] for name in ("context_in_dim", "vec_in_dim")}
    return replace(PAINTER.released, guidance_embed=bool(config.get("guidance_embed")), **widths)


def check_flux_vae(vae, name: str = "flux_vae") -> None:
    """Raise an OpenSoraError unless the VAE decodes pictures of Flux.1: 16 latent channels, 2D, 8 pixels a side."""
    network = getattr(vae, "first_stage_model", None)
    channels, dimensions = getattr(vae, "latent_channels", None), getattr(vae, "latent_dim", None)
    if (channels, dimensions) == (16, 2) and vae.spacial_compression_decode() == SPACE_COMPRESSION:
        return
    found = "no VAE" if network is None else f"{type(network).__name__} ({channels} latent channels, {dimensions}D)"
    video = "; the video VAE belongs to vae" if dimensions == 3 else ""
    raise OpenSoraError(f"{name} holds {found}; connect Flux's own picture VAE, ae.safetensors (16 latent channels, 2D){video}.")


def check_parts(flux_model, flux_vae, clip, model, vae) -> None:
    """Everything that a person can have connected wrongly, each named by its input, before anything is drawn."""
    require_flux(flux_model)
    check_flux_vae(flux_vae)
    _named("clip", lambda: text.check_clip(clip))
    video = _named("model", lambda: require_open_sora(model))
    of_vae = _named("vae", lambda: vae_config(vae))
    if HIGH_COMPRESSION in (video.grid, of_vae.grid):
        raise OpenSoraError(
            "model or vae is of the high-compression variant, whose clips have other lengths and sizes; connect Open-Sora Flux Picture to Open-Sora "
            "Image to Video, with a clip from Open-Sora Empty Latent (High Compression)."
        )


def paint(model, vae, positive: list, request: PictureRequest, seed: int, node_id: str | None) -> Tensor:
    """Draw a picture.

    Args:
        positive: CONDITIONING of the undecorated prompt.
        node_id: the node that shows progress.

    Returns:
        IMAGE [1, H, W, 3] in 0..1.

    Raises:
        OpenSoraError: another MODEL or VAE, or text that this Flux does not read.
    """
    facts = require_flux(model)
    check_flux_vae(vae)
    for context, values in positive:
        check_text(context, values.get("pooled_output"), facts, "use T5-XXL and CLIP-L")
    sides = [side // SPACE_COMPRESSION for side in (request.height, request.width)]
    alpha = DRAWING.shift(request.schedule, sides[0] * sides[1] // PATCH**2, facts.guidance_embed)
    steps = DRAWING.num_steps(request.steps, facts.guidance_embed)
    # A copy whose own sampling agrees with the sigmas.
    kind, shift = comfy.model_sampling.ModelSamplingDiscreteFlow, {"shift": alpha, "multiplier": 1.0}
    if isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.ModelSamplingFlux):
        kind, shift = comfy.model_sampling.ModelSamplingFlux, {"shift": math.log(alpha)}
    patched = agreeing(model, kind, **shift)
    guider = selftest.base(comfy.samplers, "CFGGuider")(patched)
    guider.set_cfg(1.0)  # one pass: dev is distilled from guidance, schnell has none
    guider.inner_set_conds({"positive": node_helpers.conditioning_set_values(positive, {"guidance": request.guidance})})
    own = DRAWING.schedule_name(request.schedule, facts.guidance_embed)
    name = f"Flux {'dev' if facts.guidance_embed else 'schnell'}"
    line = f"Picture {request.width}x{request.height}, seed {seed}: {name}, {steps} steps, {own} schedule"
    notice.show(line, node_id, notice.INFO)
    empty = torch.zeros((1, 16, *sides), device=comfy.model_management.intermediate_device())
    noise, sigmas = solvers.noise(empty.shape, seed), schedule.sigmas(steps, alpha)
    latents = walk(PAINTER.sampling, guider, noise, empty, sigmas, latent_preview.prepare_callback(patched, steps), seed)
    if not is_finite(latents):
        why = f"the Flux file or a LoRA on it, the encoded prompt, or a node that patches the model{_fp16_words(model.model.get_dtype_inference())}"
        raise OpenSoraError(not_numbers("Drawing the picture", model.model.get_dtype_inference(), why))
    picture = vae.decode(latents)
    if not is_finite(picture):
        why = f"Flux's VAE{_fp16_words(vae.vae_dtype)}"
        raise OpenSoraError(f"{not_numbers('Decoding the picture', vae.vae_dtype, why)} {kept.keep(latents, 'finished')}")
    notice.show(one_colour(picture), node_id)
    return picture


def _fp16_words(dtype: torch.dtype) -> str:
    return ", or fp16, which is too narrow (start ComfyUI without its options for fp16)" if dtype == torch.float16 else ""


def unload(model) -> None:
    """Take a MODEL off its device. Its weights stay in RAM, or in the file, for the next picture."""
    comfy.model_management.unload_model_and_clones(model)


def keep_prompts(clip, texts: list[str], node_id: str | None) -> bool:
    """Encode prompts one after the other, so that the text encoders enter the GPU once for picture and video together.

    Returns:
        Whether they are kept: not where the CLIP does not say which files it is from. They are then encoded where they are used.
    """
    if not prompts.can_keep(clip):
        return False
    prompts.encode(clip, texts, node_id, keep=True)
    return True


def video_graph(dynprompt, node_id: str, picture: dict, text: dict, latent: dict, sampler: dict) -> tuple[tuple, dict]:
    """The nodes that a Flux to Video node stands for, linked to what it is linked to.

    The host runs and caches them one by one: a new video of a picture does not draw it again, and the picture is shown on the node
    while the video is sampled.

    Args:
        dynprompt: the host's DynamicPrompt, which knows the node's own wires.
        picture, text, latent, sampler: inputs of Open-Sora Flux Picture and of the nodes after it, besides their sockets.

    Returns:
        (links of video frames, picture and latent; nodes).
    """
    given = dynprompt.get_node(node_id)["inputs"]
    wires = {name: given[name] for name in SOCKETS}
    graph = GraphBuilder()
    drawn = graph.node("OpenSoraFluxPicture", id="picture", **{name: wires[name] for name in SOCKETS[:3]}, **picture)
    graph.node("PreviewImage", id="preview", images=drawn.out(0))
    encoded = graph.node("OpenSoraT5TextEncode", id="text", clip=wires["clip"], **text)
    empty = graph.node("OpenSoraEmptyLatentVideo", id="latent", **latent)
    sockets = {"positive": encoded.out(0), "negative": encoded.out(1), "latent": empty.out(0)}
    begun = graph.node("OpenSoraImageToVideo", id="start", vae=wires["vae"], start_image=drawn.out(0), **sockets)
    conditioned = {name: begun.out(slot) for slot, name in enumerate(sockets)}
    finished = graph.node("OpenSoraRectifiedFlowSampler", id="video", model=wires["model"], **conditioned, **sampler)
    frames = graph.node("OpenSoraTiledVAEDecode", id="frames", vae=wires["vae"], latent=finished.out(0))
    return (frames.out(0), drawn.out(0), finished.out(0)), graph.finalize()


def check_video(resolution: str, aspect_ratio: str, num_frames: int, guidance: tuple[float, float]) -> None:
    """Raise an OpenSoraError for a video that could not be made after the picture."""
    CAUSAL.named_size(resolution, aspect_ratio)
    if CAUSAL.frames.check(num_frames) < CAUSAL.frames.shortest_clip:
        raise OpenSoraError(f"num_frames={num_frames} is the picture alone; use at least 5.")
    Guidance(*guidance)


def _named(name: str, check: Callable[[], T]) -> T:
    try:
        return check()
    except OpenSoraError as error:
        raise OpenSoraError(f"{name}: {error}") from error
