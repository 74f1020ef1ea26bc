"""Clips through any Open-Sora VAE: encode and decode in tiles, within the host's memory, with progress and one fallback."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ...opensora_core.choices import EXACT
from ...opensora_core.codecs.codec import Encoded
from ...opensora_core.codecs.tiling import check_tiling, tiled_decode, tiled_encode
from ...opensora_core.errors import OpenSoraError
from ...opensora_core.geometry import CAUSAL, Grid, Tiling
from ...opensora_core.memory.decode import MARGIN, Ladder, tile_encode_bytes, walk
from ...opensora_core.memory.residency import at_least, at_most
from ...opensora_core.run.finite import again_words, is_finite, not_numbers, one_colour
from . import kept
from .out_of_memory import unless_out_of_memory
from .vae import TileProgress, VAENetwork, check_latent_shape, exact_codec, in_float32, narrow_words, ram_for_parking, vae_config

Report = Callable[[str], None]

# Activations of the host's network, whole clip in time, over the core's: it pads whole clips and stores enlarged ones.
# Counted on the CPU: 1166 values per pixel and frame, against the core's 668 for a 256-pixel tile of 129 frames.
HOST_APPETITE = 2.0


def empty(shape: tuple[int, int, int, int, int], grid: Grid = CAUSAL) -> dict:
    """A LATENT of zeros, [videos, channels, latent frames, latent height, latent width], where the host keeps what passes between nodes.

    Raises OpenSoraError: it would take more than the machine has.
    """
    device = comfy.model_management.intermediate_device()
    needed, total = math.prod(shape) * torch.float32.itemsize, int(comfy.model_management.get_total_memory(device))
    if needed > total:
        raise OpenSoraError(
            f"A latent of {list(shape)} takes {at_least(needed)} GiB, and {device} has {at_most(total)}: make fewer or shorter videos, or smaller ones."
        )
    samples = torch.zeros(shape, device=device)
    # The host's own empty latents say how many pixels a latent pixel stands for, too.
    return {"samples": samples, "downscale_ratio_spacial": grid.space}


def decode(vae, samples: Tensor, tiling: Tiling, policy: str, report: Report, is_kept: bool = False) -> Tensor:
    """Decode a LATENT's videos, one after the other.

    vae: ours or the host's HunyuanVideo VAE.
    samples: [B, C, t, h, w], unscaled VAE latents.
    tiling: what it leaves to the VAE (config.cut) is filled in.
    policy: auto, exact or low_memory (CONTRACT: "Decode policy").
    report: takes one line for people whenever the result is not the whole-clip function that was asked for, or shows nothing.
    is_kept: the latents are in a file already.
    Returns [B * T, H, W, 3] in 0..1 on the host's intermediate device, as stock VAEDecode gives it.
    Raises OpenSoraError: another rank or VAE, not enough memory for policy exact, or frames that are not numbers in fp32 either.
    """
    check_latent_shape(tuple(samples.shape), vae_config(vae))
    if not is_finite(samples):
        raise OpenSoraError("The LATENT to decode holds values that are not numbers (NaN or infinite); look at the sampler that made it.")
    images, used = _once_more_in_float32("Decoding", vae, report, lambda vae: _decode_all(vae, samples, tiling, policy, report))
    if images is None:
        where = "" if is_kept else kept.keep(samples, "finished")
        raise OpenSoraError(f"{not_numbers('Decoding', used.vae_dtype, narrow_words(used))} {where}".strip())
    for video in images.split(len(images) // samples.shape[0]):
        if line := one_colour(video):
            report(line)
    return images


def _once_more_in_float32(stage: str, vae, report: Report, work: Callable[[Any], Tensor | None]) -> tuple[Tensor | None, Any]:
    """(what `work` makes with a VAE, or None where it is not finite in fp32 either; the VAE that it was made with)."""
    made = work(vae)
    if made is None and (wider := in_float32(vae)) is not None:
        report(again_words(stage, vae.vae_dtype))
        return work(wider), wider
    return made, vae


def _decode_all(vae, samples: Tensor, tiling: Tiling, policy: str, report: Report) -> Tensor | None:
    """The frames, or None if any of them is not finite."""
    config = vae_config(vae)
    shape = (1, *check_latent_shape(tuple(samples.shape), config)[1:])  # one video at a time
    dtype_bytes, is_ours = comfy.model_management.dtype_size(vae.vae_dtype), isinstance(vae.first_stage_model, VAENetwork)
    appetite = 1.0 if is_ours else HOST_APPETITE

    def free() -> int:
        return int(vae.patcher.get_free_memory(vae.device) / appetite)

    ladder = Ladder(config, shape, dtype_bytes, free, lambda: ram_for_parking(vae.device) if is_ours else 0)
    needed = int(appetite * ladder.need(check_tiling(config.cut(tiling), config.grid)))
    comfy.model_management.load_models_gpu([vae.patcher], memory_required=needed)
    result_of = walk(ladder.attempts(policy, tiling), report, unless_out_of_memory)
    images = unless_out_of_memory(lambda: result_of(partial(_decode, vae, samples)))
    if images is None:
        frames, height, width = config.grid.decoded(shape)
        advice = "use policy auto or low_memory" if policy == EXACT else "use a smaller tile_size or temporal_tile, or close other programs"
        raise OpenSoraError(
            f"Decoding {frames} frames of {height}x{width} (height x width) ran out of memory; "
            f"one tile needs about {needed / 2**30:.1f} GiB beside the weights; {advice}."
        )
    return images if is_finite(images) else None


def encode(vae, frames: Tensor, tiling: Tiling, seed: int | None, report: Report) -> Tensor:
    """Encode one clip.

    frames: [T, H, W, 3] in 0..1; T = 4k+1, sides multiples of 16 (of the Video DC-AE 4k and 32).
    seed: of a sample of the posterior; None for its mode.
    report: takes one line for people if the clip had to be tiled in time.
    Returns [1, C, t, h, w] unscaled VAE latents on the host's intermediate device.
    Raises OpenSoraError: another rank, frame count, size or VAE.
    """
    latents, used = _once_more_in_float32("Encoding", vae, report, lambda vae: _encode_all(vae, frames, tiling, seed, report))
    if latents is None:
        raise OpenSoraError(not_numbers("Encoding", used.vae_dtype, narrow_words(used)))
    return latents


def _encode_all(vae, frames: Tensor, tiling: Tiling, seed: int | None, report: Report) -> Tensor | None:
    """The latents, or None if any value of them is not finite."""
    config = vae_config(vae)
    if frames.ndim != 4 or frames.shape[-1] < 3 or 0 in frames.shape:
        raise OpenSoraError(f"Give a clip as an IMAGE batch, [frames, height, width, 3]: this one is {list(frames.shape)}.")
    num_frames, height, width = frames.shape[:3]
    config.grid.frames.check(num_frames)
    config.grid.check_size(height, width)
    if not is_finite(frames):
        raise OpenSoraError("The frames to encode hold values that are not numbers (NaN or infinite); look at what made them.")
    tiling = check_tiling(config.cut(tiling), config.grid)
    needed = tile_encode_bytes(config, (num_frames, height, width), tiling, comfy.model_management.dtype_size(vae.vae_dtype))
    appetite = 1.0 if isinstance(vae.first_stage_model, VAENetwork) else HOST_APPETITE
    comfy.model_management.load_models_gpu([vae.patcher], memory_required=int(appetite * MARGIN * needed))
    encoded = unless_out_of_memory(lambda: _encode(vae, frames, tiling))
    short = config.short_tile
    if encoded is None and tiling == config.cut(Tiling(tiling.tile_size, tiling.overlap)) and 0 < short < num_frames:
        report(f"Ran out of memory encoding the clip; encoding again {short} frames at a time. The latent differs slightly.")
        encoded = unless_out_of_memory(lambda: _encode(vae, frames, Tiling(tiling.tile_size, tiling.overlap, short)))
    if encoded is None:
        raise OpenSoraError(
            f"Encoding {num_frames} frames of {height}x{width} (height x width) ran out of memory; use a smaller tile_size."
        )
    encoded = encoded.to("cpu")
    # A CPU generator: the same seed gives the same latent on every card.
    latents = encoded.mode() if seed is None else encoded.sample(torch.Generator("cpu").manual_seed(seed))
    return latents.to(vae.output_device) if is_finite(latents) else None


def encode_pictures(vae, pictures: Tensor) -> Tensor:
    """Encode pictures each on its own, as references are: GroupNorm would mix the frames of a clip.

    pictures: [B, H, W, 3] in 0..1, sides multiples of 16.
    Returns [B, C, 1, h, w], the posterior's mode, in upstream's tiles.
    """
    return torch.cat([encode(vae, picture[None], Tiling(), None, lambda line: None) for picture in pictures])


def _decode(vae, samples: Tensor, tiling: Tiling) -> Tensor:
    progress, grid = TileProgress(clips=samples.shape[0]), vae_config(vae).grid
    clips = []
    with comfy.model_management.cuda_device_context(vae.device), exact_codec(vae) as (_, decode_tile):
        for latents in samples.split(1):
            pixels = tiled_decode(_on_device(vae, decode_tile), latents, tiling, progress, grid=grid)
            clips.append(vae.process_output(pixels)[0].movedim(0, -1))
    return clips[0] if len(clips) == 1 else torch.cat(clips)


def _encode(vae, frames: Tensor, tiling: Tiling) -> Encoded:
    pixels = vae.process_input(frames[..., :3].movedim(-1, 0)[None])
    with comfy.model_management.cuda_device_context(vae.device), exact_codec(vae) as (encode_tile, _):
        return tiled_encode(_on_device(vae, encode_tile), pixels, tiling, TileProgress(), grid=vae_config(vae).grid)


def _on_device(vae, function: Callable) -> Callable:
    """Run one tile on the VAE's device and bring it back, so that only one tile is ever there."""

    def run(tile: Tensor, *home: torch.device) -> Tensor | Encoded:
        result = function(tile.to(device=vae.device, dtype=vae.vae_dtype), *home)
        return result.to(vae.output_device, vae.vae_output_dtype())

    return run
