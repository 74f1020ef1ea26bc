"""A long video in the host: segments sampled one after another, each safe in the output folder before the next begins."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...opensora_core.errors import OpenSoraError
from ...opensora_core.geometry import Tiling
from ...opensora_core.run.segments import context_of, decode_windows, join, segment_seed
from ...opensora_core.sampling.given import image_condition
from ...opensora_core.sampling.guidance import Guidance, ReferenceUse
from ...opensora_core.sampling.longer import Continuation, LongRule
from . import clips, notice, run
from .condition import with_condition
from .kept import OutputFile
from .vae import vae_config


@dataclass(frozen=True)
class Segments:
    """What is to be added to a video.

    continuation: how long a segment is and what it is given.
    positives: the CONDITIONING of each segment. negative: of all.
    guidance, options: of each; the seed is the video's, see long_video.segment_seed.
    rule: of the model. decoder: the VAE and the policy, for models that go on from what is decoded.
    """

    continuation: Continuation
    positives: list
    negative: list
    guidance: Guidance
    options: run.RunInputs
    rule: LongRule
    decoder: tuple[Any, str]


def go_on(model, latent: dict, segments: Segments, file: OutputFile, node_id: str | None) -> dict:
    """Sample every segment.

    latent: LATENT of a finished video, [B, C, T, H, W].
    Returns a LATENT of the whole video.
    Raises OpenSoraError: whatever a sampler raises; from the second segment on it names the file with what is finished.
    """
    continuation, samples, grid = segments.continuation, latent["samples"], vae_config(segments.decoder[0]).grid
    out = {key: value for key, value in latent.items() if key not in ("noise_mask", "batch_index")}
    total = len(segments.positives)
    for index, positive in enumerate(segments.positives):
        with naming(file, node_id):
            given = _given(samples, segments, lambda line: notice.show(line, node_id))
            shape = (*samples.shape[:2], continuation.segment, *samples.shape[3:])
            condition = image_condition(shape, given.to(samples), use=ReferenceUse(is_clip=not segments.rule.from_picture))
            conditionings = tuple(with_condition(conditioning, condition) for conditioning in (positive, segments.negative))
            options = replace(segments.options, seed=segment_seed(segments.options.seed, samples.shape[2]))
            clip = {**out, **clips.empty(shape, grid)}
            made = run.run(model, conditionings, clip, segments.guidance, options, node_id, f"{index + 1}/{total}:")
            samples = join(samples, made["samples"], continuation)
            file.keep(samples)
        notice.show(file.sentence, node_id, notice.INFO)
    return {**out, "samples": samples}


def _given(samples: Tensor, segments: Segments, report: Callable[[str], None]) -> Tensor:
    """The latents [B, C, context, H, W] that the next segment begins with: the last ones as sampled, or those of their frames."""
    continuation, rule, (vae, policy) = segments.continuation, segments.rule, segments.decoder
    if not rule.re_encodes:
        return context_of(samples, continuation)
    # The last frame depends on those before it: it is decoded with them.
    ends = samples[:, :, -(continuation.segment if rule.from_picture else continuation.context) :]
    decoded = [clips.decode(vae, end, Tiling(), policy, report, is_kept=True) for end in ends.split(1)]
    if rule.from_picture:
        return clips.encode_pictures(vae, torch.cat([frames[-1:] for frames in decoded]))
    return torch.cat([clips.encode(vae, frames, Tiling(), None, report) for frames in decoded])


def decode(vae, samples: Tensor, continuation: Continuation, policy: str, report: Callable[[str], None]) -> Tensor:
    """Frames [B * frames, H, W, 3] of long videos, decoded one segment's length at a time (clips.decode), or by the VAE's own pieces."""
    if vae_config(vae).grid.piece:
        return clips.decode(vae, samples, Tiling(), policy, report, is_kept=True)
    frames = vae_config(vae).grid.pixel_frames(samples.shape[2])
    images, done = None, 0
    for video in samples.split(1):
        for piece in decode_windows(video, continuation, lambda part: clips.decode(vae, part, Tiling(), policy, report, is_kept=True)):
            if images is None:
                images = piece.new_empty((samples.shape[0] * frames, *piece.shape[1:]))
            images[done : done + piece.shape[0]] = piece
            done += piece.shape[0]
    return images


@contextmanager
def naming(file: OutputFile, node_id: str | None) -> Iterator[None]:
    """Whatever ends the block, a person is told where the finished segments are."""
    try:
        yield
    except OpenSoraError as error:
        if not file.num_segments:
            raise
        raise OpenSoraError(f"{error} {file.sentence}") from error
    except BaseException:  # cancelled, which is no Exception, or a failure of the host's
        notice.show(file.sentence, node_id)
        raise
