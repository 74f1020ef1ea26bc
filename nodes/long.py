"""Long videos: going on from a finished one, segment by segment, each safe in the output folder before the next begins."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..opensora_core import geometry
from ..opensora_core.errors import OpenSoraError
from ..opensora_core.geometry import Tiling
from ..opensora_core.geometry.open_sora_1 import PIECES
from ..opensora_core.run.request import SamplingOptions
from ..opensora_core.run.segments import context_of, decode_windows, join, segment_prompts, segment_seed
from ..opensora_core.sampling.given import image_condition
from ..opensora_core.sampling.guidance import Guidance, ReferenceUse
from ..opensora_core.sampling.longer import Continuation, LongRule
from ..opensora_core.text.recipe import TextRecipe
from .host import clips, inputs, notice, prompts, run
from .host.condition import FPS_KEY, marked, with_condition
from .host.families import family_of, require_open_sora
from .host.guider import check_latent
from .host.kept import OutputFile
from .host.node import Node, gathered
from .host.vae import check_pair, vae_config

_MAX_SEGMENTS = 1000
_MAX_FRAMES = 1025
_GIVES = {"latent": io.Latent, "images": io.Image, "file": io.String}


class OpenSoraContinueVideo(Node, category="sampling", outputs=_GIVES, is_experimental=True):
    takes = [
        *inputs.of("model", "positive", "negative", "vae", "latent"),
        io.Int.Input("segments", default=1, min=1, max=_MAX_SEGMENTS),
        *inputs.of("seed", "steps", "text_guidance", "image_guidance"),
        io.Int.Input("num_frames", default=0, min=0, max=_MAX_FRAMES),
        io.Int.Input("context_frames", default=0, min=0, max=_MAX_FRAMES),
        io.String.Input("filename_prefix", default="latents/open-sora-long"),
        *inputs.of("policy", "text_oscillation", "image_oscillation", "shift", "noise_device", "latent_dtype"),
        *inputs.of("clip", optional=True),
        io.String.Input("prompts", multiline=True, dynamic_prompts=True, default="", optional=True),
        *inputs.of("motion_score", "fps", optional=True, advanced=True),
        *inputs.of("length", "speed"),
    ]

    @classmethod
    def validate_inputs(cls, num_frames=None, context_frames=None, length=None):
        # 0 = by itself; which model it is, and so which lengths it has, is known when it runs
        found = {"context_frames": inputs.problem(_check_some_clip, context_frames or None)}
        if (length or "").strip():
            return {"length": inputs.problem(geometry.CAUSAL.length, length, SamplingOptions.fps), **found}
        return {"num_frames": inputs.problem(_check_some_clip, num_frames or None), **found}

    @classmethod
    @gathered(
        guidance=inputs.guidance_of,
        options=run.RunInputs,
        asked=("segments", "length", "num_frames", "context_frames"),
        new=("clip", "prompts", "fps", "motion_score"),
    )
    def execute(cls, model, positive, negative, vae, latent, guidance, options, asked, filename_prefix, policy, new) -> io.NodeOutput:
        node_id = cls.hidden.unique_id
        config, family = require_open_sora(model), family_of(model)
        config.grid.check_goes_on()
        rule = family.check_longer()
        shape = check_latent(latent["samples"], config)
        check_pair(vae, family.codecs)
        frames = inputs.frames_of(asked["length"], asked["num_frames"], config.grid, family.usual.fps)
        continuation = rule.continuation(shape[2], frames or None, asked["context_frames"] or None, config.grid)
        lines = segment_prompts([line.strip() for line in new["prompts"].splitlines() if line.strip()] or [""], asked["segments"])
        with OutputFile(filename_prefix) as file:
            # All prompts before the first segment: the text encoders are then not needed again.
            positives = _encode(lines, family.text, new, node_id) if new["prompts"].strip() else [positive] * len(lines)
            added = _Segments(continuation, positives, negative, guidance, options, rule, (vae, policy))
            finished = _go_on(model, latent, added, file, node_id)
            with _naming(file, node_id):
                images = _decode(vae, finished["samples"], continuation, policy, cls.show)
        return io.NodeOutput(finished, images, str(file.path))


def _check_some_clip(num_frames: int) -> None:
    """Refuse, as Open-Sora 2.0 does, a count of frames that neither its clips have nor those of 1.2, whose pieces are others."""
    if num_frames % PIECES.frames.step:
        geometry.CAUSAL.frames.check(num_frames)


def _encode(lines: list[str], recipe: TextRecipe, new: dict[str, Any], node_id: str | None) -> list:
    """The CONDITIONING of each line. new: the CLIP that reads it, fps and motion_score."""
    if new["clip"] is None:
        raise OpenSoraError("New prompts need a text encoder to read them: connect clip, or leave prompts empty.")
    told = recipe.said(fps=new["fps"], motion_score=prompts.motion_score(recipe, new["motion_score"]))
    encoded = prompts.encode(new["clip"], [recipe.words(line, told) for line in lines], node_id, recipe=recipe)
    return [marked(side, **{FPS_KEY: new["fps"]}) for side in encoded] if recipe.has_mask else encoded


@dataclass(frozen=True)
class _Segments:
    """What is to be added to a video.

    continuation: how long a segment is and what it is given.
    positives: the CONDITIONING of each segment. negative: of all.
    guidance, options: of each; the seed is the video's, see run/segments.py.
    rule: of the model. decoder: the VAE and the policy, for models that go on from what is decoded.
    """

    continuation: Continuation
    positives: list
    negative: list
    guidance: Guidance
    options: run.RunInputs
    rule: LongRule
    decoder: tuple[Any, str]


def _go_on(model, latent: dict, segments: _Segments, file: OutputFile, node_id: str | None) -> dict:
    """Sample every segment.

    latent: LATENT of a finished video, [B, C, T, H, W].
    Returns a LATENT of the whole video.
    Raises OpenSoraError: whatever a sampler raises; from the second segment on it names the file with what is finished.
    """
    continuation, samples, grid = segments.continuation, latent["samples"], vae_config(segments.decoder[0]).grid
    out = {key: value for key, value in latent.items() if key not in ("noise_mask", "batch_index")}
    total = len(segments.positives)
    for index, positive in enumerate(segments.positives):
        with _naming(file, node_id):
            given = _given(samples, segments, lambda line: notice.show(line, node_id))
            shape = (*samples.shape[:2], continuation.segment, *samples.shape[3:])
            condition = image_condition(shape, given.to(samples), use=ReferenceUse(is_clip=not segments.rule.from_picture))
            conditionings = tuple(with_condition(conditioning, condition) for conditioning in (positive, segments.negative))
            options = replace(segments.options, seed=segment_seed(segments.options.seed, samples.shape[2]))
            clip = {**out, **clips.empty(shape, grid)}
            made = run.run(model, conditionings, clip, segments.guidance, options, node_id, f"{index + 1}/{total}:")
            samples = join(samples, made["samples"], continuation)
            file.keep(samples, grid)
        notice.show(file.sentence, node_id, notice.INFO)
    return {**out, "samples": samples}


def _given(samples: Tensor, segments: _Segments, report: Callable[[str], None]) -> Tensor:
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


def _decode(vae, samples: Tensor, continuation: Continuation, policy: str, report: Callable[[str], None]) -> Tensor:
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
def _naming(file: OutputFile, node_id: str | None) -> Iterator[None]:
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
