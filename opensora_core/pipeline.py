"""OpenSoraPipeline: prompt (and pictures) in, frames out, with no host.

The walk: decorate and encode the prompt -> lay reference latents beside the noise -> sigmas -> guided Euler run ->
reference frames restored -> decode. Everything a person can get wrong is refused before the first weight is read.
"""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy
import torch
from torch import Tensor

from .capacity import Needs, decoding_ran_out, encoding_ran_out, reference_ran_out, sampling_ran_out, weight_capacity
from .checkpoint.load import load_transformer, load_vae
from .checkpoint.lora import merge_lora
from .components import (
    AUTO,
    BUDGET,
    MINIMAL,
    OFFLOADS,
    Component,
    Habits,
    Placement,
    VideoVAE,
    resolve_device,
    resolve_precision,
)
from .device_memory import unless_out_of_memory
from .errors import DecodeOutOfMemory, OpenSoraError, OutOfMemory
from .flux.painter import FluxPainter, PictureRequest, PictureText
from .footprint import sizes_of_files
from .geometry import SPACE_COMPRESSION, pixel_frames
from .loaded import PROMPTS, SHARED, own_structure
from .long_video import Continuation, context_of, continuation, decode_windows, join, segment_prompts, segment_seed, windows
from .model_files import ModelFiles, check_files, check_lora, check_shared_encoders
from .offload.plan import BLOCK_LISTS, make_plan
from .ops import attention, sliced_attention
from .references import LATENT_RANK, References, read_references
from .request import LATENT_DTYPES, EncodedPrompt, GenerationRequest, SamplingOptions, finite, random_seed
from .sampling.conditioning import CONTEXTS, FORWARDS, ImageCondition, fit_clip, fit_image, image_condition
from .sampling.guidance import ReferenceUse
from .sampling.schedule import latent_flow_shift, sigmas
from .sampling.solver import StepReport, TextCondition, noise, sample
from .text.encoders import load_clip, load_t5
from .text.prompt import decorate
from .video import to_uint8

logger = logging.getLogger(__name__)

StepCallback = Callable[[int, int, int, int, Tensor], None]
StageProgress = Callable[[str, int, int], None]
SegmentCallback = Callable[[int, Tensor], None]


@dataclass
class GenerationResult:
    """What a run made.

    Attributes:
        frames: for every video, its frames, uint8 [H, W, 3].
        latents: [B, C, T, H, W] fp32 on the CPU, in the transformer's scale (LATENT_SCALE times the VAE's).
        prompt: its text as it was encoded, and what may be given to a next call in place of the text. seeds: of every video.
        forwards: transformer rows of each video; forwards_saved: against three at every step.
        seconds: spent in each stage: text, condition, sampling, decode. Reading a network counts where it happened.
        notes: lines a person should see, such as a decode that memory made other than exact.
    """

    frames: list[list[numpy.ndarray]] = field(default_factory=list)
    latents: Tensor | None = None
    prompt: EncodedPrompt | None = None
    seeds: list[int] = field(default_factory=list)
    forwards: int = 0
    forwards_saved: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class OpenSoraPipeline:
    """Open-Sora 2.0 from its files. Networks are read when they are first needed; pipelines over the same files share them.

    Args:
        files: where the parts are.
        torch_dtype: of the networks; None = bf16 on an accelerator, fp32 on the CPU.
        precision: auto, fp32 or bf16: the same choice in a word. fp8_e4m3fn, int8 or nf4: quantise the large layers of the
            transformer and of T5 as they are read; with auto a quantised file is kept as it is stored.

    Attributes:
        vae: `.enable_tiling(tile_size, tile_overlap)`, `.policy` (auto, exact, low_memory).
        keep_loaded: keep networks in memory when no pipeline uses them, within loaded.SHARED.keep_limit_gib.
        keep_encoded: keep encoded prompts, so that the same prompt does not need the encoders again.

    Raises:
        OpenSoraError: a part is not there, or the settings contradict each other.
    """

    def __init__(self, files: ModelFiles, torch_dtype: torch.dtype | None = None, precision: str = "auto"):
        self.files = files.check_exist()
        torch_dtype, self._quantised = resolve_precision(torch_dtype, precision)
        self._placement = Placement(torch.device("cpu"), torch_dtype)
        self._is_checked = False
        self._attention = attention
        self._loras: list[tuple[Path, float]] = []
        self._flux: FluxPainter | None = None
        self.keep_loaded = self.keep_encoded = False
        read_t5 = partial(load_t5, tokenizers=files.tokenizers, precision=self._quantised)
        read_clip = partial(load_clip, tokenizers=files.tokenizers)
        self._transformer = Component(self._read_transformer, self._placement, Habits(is_main=True, block_lists=BLOCK_LISTS))
        self._vae = Component(partial(self._read_shared, "vae", files.vae, load_vae), self._placement)
        self._t5 = Component(
            partial(self._read_shared, "t5", files.t5, read_t5), self._placement, Habits(is_kept=False, block_lists=("encoder.block",))
        )
        self._clip = Component(partial(self._read_shared, "clip", files.clip, read_clip), self._placement, Habits(is_kept=False))
        self.vae = VideoVAE(self._vae, self._placement)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path = "small",
        *,
        torch_dtype: torch.dtype | None = None,
        precision: str = "auto",
        tokenizers: str | Path | None = None,
    ) -> "OpenSoraPipeline":
        """A pipeline over a folder in the layout of hpcai-tech/Open-Sora-v2, or over "small", the built-in model.

        Nothing is downloaded. tokenizers: a folder to look for both in, if not beside the encoders.
        """
        return cls(ModelFiles.in_folder(folder, tokenizers), torch_dtype, precision)

    @classmethod
    def from_files(
        cls,
        *,
        dit: str | Path,
        vae: str | Path,
        t5: str | Path,
        clip: str | Path,
        tokenizers: str | Path | None = None,
        torch_dtype: torch.dtype | None = None,
        precision: str = "auto",
    ) -> "OpenSoraPipeline":
        """A pipeline over single files (or hub folders, for the text encoders)."""
        parts = {"dit": dit, "vae": vae, "t5": t5, "clip": clip, "tokenizers": tokenizers}
        files = ModelFiles(**{name: path and Path(path).expanduser() for name, path in parts.items()})
        return cls(files, torch_dtype, precision)

    @property
    def device(self) -> torch.device:
        """Where the networks compute."""
        return self._placement.device

    @property
    def dtype(self) -> torch.dtype:
        """What the networks compute in; latents between steps are fp32."""
        return self._placement.dtype

    @property
    def latent_scale(self) -> float:
        """What latents are multiplied by between the VAE and the transformer, from the VAE's header."""
        return sizes_of_files(vae=self.files.vae).vae.latent_scale

    def latent_frames(self, num_frames: int) -> int:
        """Latent frames of a clip of so many frames. Raises an OpenSoraError for counts that no clip has."""
        return self.files.grid.latent_frames(num_frames)

    @property
    def offload(self) -> str:
        """everything, auto, resident, budget or minimal; see components.py."""
        return self._placement.mode

    def to(self, device: str | torch.device) -> "OpenSoraPipeline":
        """Compute on a device ("auto": CUDA, else Apple's GPU, else the CPU)."""
        self._placement.device = resolve_device(device)
        self._release()
        return self

    def enable_offload(
        self, mode: str = AUTO, budget_gib: float | None = None, device: str | torch.device | None = None
    ) -> "OpenSoraPipeline":
        """Let networks leave the device when they do not work, and stream what does not fit. No mode changes a result.

        Args:
            mode: auto: each network whole while it works, streamed block by block as far as it does not fit. resident: the
                transformer stays. budget: at most budget_gib of weights on the device. minimal: one block at a time.
            budget_gib: GiB, for the mode budget.
            device: where to compute; None = the device chosen before, or one that is found.

        Raises:
            OpenSoraError: an unknown mode, weights that cannot fit, or a budget that no plan can keep; says what can.
        """
        if mode not in OFFLOADS:
            raise OpenSoraError(f"The offload mode {mode!r} is not known; use one of {', '.join(OFFLOADS)}.")
        if budget_gib is not None and mode != BUDGET:
            raise OpenSoraError(f"A budget goes with the offload mode budget; {mode} takes none.")
        if device is None:
            device = "auto" if self._placement.device.type == "cpu" else self._placement.device
        target = Placement(resolve_device(device), self._placement.torch_dtype, mode, budget_gib)
        if mode != AUTO:
            make_plan(Needs(self.files, target, self._quantised).transformer_weights(), mode, budget_gib, weight_capacity(target))
        self.to(target.device)
        self._placement.mode, self._placement.budget_gib = mode, budget_gib
        return self

    def enable_model_cpu_offload(self, device: str | torch.device | None = None) -> "OpenSoraPipeline":
        """Keep each network on the device only while it works: enable_offload("auto")."""
        return self.enable_offload(AUTO, device=device)

    def enable_sequential_cpu_offload(self, device: str | torch.device | None = None) -> "OpenSoraPipeline":
        """Keep one block of a network on the device at a time, the least device memory: enable_offload("minimal")."""
        return self.enable_offload(MINIMAL, device=device)

    def enable_attention_slicing(self, slice_size: int = 1) -> "OpenSoraPipeline":
        """Let attention take `slice_size` heads at a time: the same result with less workspace, slower."""
        if not isinstance(slice_size, int) or slice_size < 1:
            raise OpenSoraError(f"slice_size={slice_size!r} heads cannot be taken at a time; use 1 or more.")
        self._attention = sliced_attention(slice_size)
        self._transformer.release()
        return self

    def load_lora(self, path: str | Path, strength: float = 1.0) -> "OpenSoraPipeline":
        """Add a LoRA to the transformer, after those added before.

        Args:
            path: a LoRA file or PEFT folder.
            strength: factor on its change; 1 is the file's own.

        Raises:
            OpenSoraError: not a finite strength, or no LoRA for this model.
        """
        strength = finite("strength", strength)
        check_lora(self.files, path)
        self._loras.append((Path(path), strength))
        self._transformer.release()
        return self

    def load_flux(self, dit: str | Path, vae: str | Path) -> "OpenSoraPipeline":
        """Add Flux.1, which draws the picture that a video begins with. No weight is read.

        Args:
            dit: flux1-dev or flux1-schnell as released. vae: ae.safetensors. T5 and CLIP are the pipeline's own.

        Raises:
            OpenSoraError: a file that is something else, or reads other encoders.
        """
        flux = FluxPainter(dit, vae, self._placement, self._quantised)
        check_shared_encoders(self.files, flux.dit.name, flux.config.context_in_dim, flux.config.vec_in_dim)
        self._flux = flux
        return self

    @torch.inference_mode()
    def draw(
        self,
        prompt: str,
        seeds: Sequence[int],
        request: PictureRequest,
        *,
        picture_prompt: str | None = None,
        negative_prompt: str = "",
        options: SamplingOptions | None = None,
        progress: StageProgress | None = None,
    ) -> tuple[list[Tensor], EncodedPrompt]:
        """Draw pictures with Flux, and encode the videos' prompt: both encoders are read once for picture and video.

        Args:
            prompt: of the video; of the picture too, undecorated, unless picture_prompt is another.
            seeds: one for each picture. The reference gives picture and video the same.
            request: see flux.painter.PictureRequest.for_ratio.
            progress: (stage, done, total) for the stages text and picture.

        Returns:
            ([1, H, W, 3] uint8 for each seed, the encoded prompt): `pipe(encoded, image=picture, seed=seed, ...)` makes the video.
            Nothing of Flux is in memory any more.

        Raises:
            OpenSoraError: load_flux was not called, a seed out of range, or memory ran out.
        """
        if self._flux is None:
            raise OpenSoraError("There is no Flux to draw with; call load_flux with its two files first.")
        options, progress = options or SamplingOptions(), progress or _silent
        self.check_files()
        text = decorate(prompt, options.fps, options.motion_score)
        shown = prompt if picture_prompt is None else picture_prompt
        of_picture, of_video = self._encode([(shown, ""), (text, negative_prompt)], progress)
        pictures = self._flux.paint(PictureText(of_picture.context, of_picture.pooled), request, seeds, partial(progress, "picture"))
        return pictures, EncodedPrompt(text, of_video)

    @torch.inference_mode()
    def encode_prompt(self, prompt: str, negative_prompt: str = "", options: SamplingOptions | None = None) -> EncodedPrompt:
        """Decorate and encode a prompt once, for several calls. The negative prompt is encoded as it is."""
        options = options or SamplingOptions()
        if not self.keep_encoded:
            return self.encode_prompts([(prompt, negative_prompt, options)])[0]
        text = decorate(prompt, options.fps, options.motion_score)
        texts = (text, negative_prompt)
        files = [path for path in (self.files.t5, self.files.clip, self.files.tokenizers) if path is not None]
        encoded = PROMPTS.get(texts, files, self._options(self.dtype, self.device), lambda: vars(self._encode([texts], _silent)[0]))
        return EncodedPrompt(text, TextCondition(**encoded))

    @torch.inference_mode()
    def encode_prompts(
        self, prompts: Sequence[tuple[str, str, SamplingOptions]], progress: StageProgress | None = None
    ) -> list[EncodedPrompt]:
        """As encode_prompt for each (prompt, negative prompt, options), reading either text encoder once for all of them.

        One of the released model takes 17 MB of main memory. progress: ("text", done, total), T5's work alone.
        """
        texts = [(decorate(prompt, options.fps, options.motion_score), negative) for prompt, negative, options in prompts]
        return [
            EncodedPrompt(text, condition) for (text, _), condition in zip(texts, self._encode(texts, progress or _silent), strict=True)
        ]

    def _encode(self, texts: list[tuple[str, str]], progress: StageProgress) -> list[TextCondition]:
        """Of each (text, negative text), on the CPU."""
        encoded = unless_out_of_memory(lambda: self._encode_now(texts, progress))
        if encoded is None:
            raise OutOfMemory(encoding_ran_out(self._placement))
        return encoded

    def _encode_now(self, texts: list[tuple[str, str]], progress: StageProgress) -> list[TextCondition]:
        contexts = []
        progress("text", 0, len(texts))
        with self._t5.at_work(self._needs.beside_t5()) as t5:
            for pair in texts:
                contexts.append(t5.encode(list(pair)).float().cpu().split(1))
                progress("text", len(contexts), len(texts))
        with self._clip.at_work() as clip:
            pooled = [clip.encode(list(pair)).float().cpu().split(1) for pair in texts]
        return [TextCondition(*(row[k] for k in (0, 1) for row in rows)) for rows in zip(contexts, pooled, strict=True)]

    @torch.inference_mode()
    def __call__(  # noqa: PLR0913 - the settings people know by these names; inside they travel as one GenerationRequest
        self,
        prompt: str | EncodedPrompt,
        *,
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        image_guidance_scale: float = 3.0,
        image=None,
        last_image=None,
        video=None,
        direction: str = FORWARDS,
        context: int = CONTEXTS[0],
        image_strength: float = 1.0,
        seed: int | None = None,
        num_videos_per_prompt: int = 1,
        callback: StepCallback | None = None,
        progress: StageProgress | None = None,
        options: SamplingOptions | None = None,
        check_only: bool = False,
    ) -> GenerationResult:
        """Make videos.

        Args:
            prompt: a text, or what encode_prompt gave (negative_prompt is then not read).
            height, width: pixels, multiples of 16; see geometry.resolution_size. None: 192 and 336, the built-in model 64.
            num_frames: 4k+1. None: 129, the built-in model 17. The high-compression variant: sides multiples of 32, 4k frames (128).
            guidance_scale, image_guidance_scale: 1 is neutral.
            image, last_image: first and last frame: paths, PIL images, [H, W, 3] uint8 or float in 0..1, or a frame's latents.
            video, direction, context: a clip to go on from, where, and by how many of its frames; see references.read_references.
            image_strength: 0..1, how closely the video holds to what is given; see guidance.ReferenceUse.
            seed: 0..2**64-1; None draws one. Video k of the batch is what seed + k gives alone.
            callback: after every step, (step from 1, num_steps, forwards_done, forwards_saved, latents).
            progress: (stage, done, total) for the stages text, condition, sampling and decode.
            options: what is seldom changed, see request.SamplingOptions.
            check_only: refuse what cannot be met, and make nothing: the result holds the seeds alone.

        Raises:
            OpenSoraError: a request that cannot be met, before any weight is read.
        """
        options, usual = options or SamplingOptions(), self.files.usual_clip
        request = GenerationRequest(
            prompt=prompt,
            negative_prompt=negative_prompt,
            height=usual[0] if height is None else height,
            width=usual[1] if width is None else width,
            num_frames=usual[2] if num_frames is None else num_frames,
            num_steps=num_inference_steps,
            guidance=options.guidance(guidance_scale, image_guidance_scale),
            references=read_references(
                image, last_image, video, direction=direction, context=context, strength=finite("image_strength", image_strength)
            ),
            seed=random_seed() if seed is None else seed,
            num_videos=num_videos_per_prompt,
            options=options,
            grid=self.files.grid,
        )
        self._check(request)
        if check_only:
            return GenerationResult(seeds=[request.seed + k for k in range(request.num_videos)])
        return self._generate(request, callback, progress or _silent)

    def _check(self, request: GenerationRequest) -> None:
        """What the files decide of a request."""
        self.check_files()
        request.references.check(request.num_videos, request.latent_extent, self.files.grid)
        if any(given.ndim == LATENT_RANK for given in request.references.given.values()):
            request.references.check_channels(sizes_of_files(self.files.dit).transformer.in_channels)

    def _generate(self, request: GenerationRequest, callback: StepCallback | None, progress: StageProgress) -> GenerationResult:
        result = GenerationResult(seeds=[request.seed + k for k in range(request.num_videos)])
        note = self.files.clip_note(request.height, request.width, request.num_frames)
        if note:
            logger.warning("%s", note)
            result.notes.append(note)
        with self._stage("text", result):
            progress("text", 0, 1)
            result.prompt = request.prompt
            if isinstance(request.prompt, str):
                result.prompt = self.encode_prompt(request.prompt, request.negative_prompt, request.options)
            progress("text", 1, 1)
        with self._stage("condition", result):
            generators = [_posterior_generator(request, k) for k in range(request.num_videos)]
            condition = self._condition(request, generators, partial(progress, "condition"))
        with self._stage("sampling", result):
            progress("sampling", 0, request.num_steps)
            result.latents = self._sample(request, condition, result, _watch(result, callback, progress))
        with self._stage("decode", result):
            result.frames, result.notes = self._decode(result.latents, partial(progress, "decode"), result.notes)
        return result

    @torch.inference_mode()
    def extend(  # noqa: PLR0913 - as __call__
        self,
        video: GenerationResult | Tensor,
        prompts: str | EncodedPrompt | Sequence[str | EncodedPrompt] | None = None,
        *,
        segments: int = 1,
        negative_prompt: str = "",
        num_frames: int | None = None,
        context_frames: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        image_guidance_scale: float = 3.0,
        seed: int | None = None,
        on_segment: SegmentCallback | None = None,
        callback: StepCallback | None = None,
        progress: StageProgress | None = None,
        options: SamplingOptions | None = None,
    ) -> GenerationResult:
        """Go on from finished videos (long_video.py). An experiment: the released weights may never have been trained to.

        Args:
            video: what a call gave, or its `.latents`: [B, C, T, H, W] in the transformer's scale.
            prompts: one for each segment in turn, the last for all that follow; None = the video's own.
            segments: how many to add.
            num_frames, context_frames: of a segment, and what of it is given; see long_video.continuation.
            seed: None = the video's own, or one drawn. A segment's noise depends on it and on where the segment begins.
            on_segment: (segments done, latents of the whole video so far), before the next begins: to put them in a safe place.
            callback, progress, options: as for a call; there is no temporal ramp, as in the reference's video to video.

        Returns:
            The whole video, from the first frame given; forwards and seconds are of what was added.

        Raises:
            OpenSoraError: a request that cannot be met, before any weight is read.
        """
        video = video if isinstance(video, GenerationResult) else GenerationResult(latents=video)
        batch, _, length, height, width = _check_latents(video.latents)
        plan = continuation(length, num_frames, context_frames)
        texts = segment_prompts(video.prompt if prompts is None else prompts, segments)
        options = options or SamplingOptions()
        request = GenerationRequest(
            prompt=texts[0],
            negative_prompt=negative_prompt,
            height=height * SPACE_COMPRESSION,
            width=width * SPACE_COMPRESSION,
            num_frames=pixel_frames(plan.segment),
            num_steps=num_inference_steps,
            guidance=options.guidance(guidance_scale, image_guidance_scale),
            references=_going_on(video.latents, plan),
            seed=seed if seed is not None else video.seeds[0] if video.seeds else random_seed(),
            num_videos=batch,
            options=options,
        )
        self._check(request)
        return self._extend(video, plan, [replace(request, prompt=text) for text in texts], _Watchers(callback, progress, on_segment))

    def _extend(
        self, video: GenerationResult, plan: Continuation, requests: list[GenerationRequest], watchers: "_Watchers"
    ) -> GenerationResult:
        first, latents = requests[0], video.latents.float().cpu()
        result = GenerationResult(latents=latents, seeds=[first.seed + k for k in range(first.num_videos)])
        with self._stage("text", result):
            texts = self._encode_all(requests, watchers.progress)
        with self._stage("sampling", result):
            for index, request in enumerate(requests):
                request = replace(request, seed=segment_seed(first.seed, latents.shape[2]), references=_going_on(latents, plan))
                part = GenerationResult(prompt=texts[index])
                on_step = watchers.steps_of(part, index, len(requests), request.num_steps)
                try:
                    made = self._sample(request, self._condition(request, [], lambda done, total: None), part, on_step)
                except OutOfMemory as error:
                    error.latents = latents  # the segments that are finished
                    raise
                latents = result.latents = join(latents, made, plan)
                result.prompt, result.notes = part.prompt, result.notes + part.notes
                result.forwards += part.forwards
                result.forwards_saved += part.forwards_saved
                watchers.on_segment(index + 1, latents)
        with self._stage("decode", result):
            result.frames, result.notes = self._decode(latents, partial(watchers.progress, "decode"), result.notes, plan)
        return result

    def _encode_all(self, requests: list[GenerationRequest], progress: StageProgress) -> list[EncodedPrompt]:
        """The prompt of every request, each different one encoded once."""
        texts = {request.prompt: request for request in requests if isinstance(request.prompt, str)}
        asked = [(text, request.negative_prompt, request.options) for text, request in texts.items()]
        encoded = dict(zip(texts, self.encode_prompts(asked, progress) if asked else (), strict=True))
        return [encoded[request.prompt] if isinstance(request.prompt, str) else request.prompt for request in requests]

    @torch.inference_mode()
    def decode(self, latents: Tensor, progress: StageProgress | None = None) -> list[list[numpy.ndarray]]:
        """Frames of finished latents, as `.frames` of a result; for latents that an earlier decode had no memory for.

        Args:
            latents: [B, C, T, H, W], in the transformer's scale, as `.latents` of a result.

        Raises:
            DecodeOutOfMemory: memory ran out, whatever the decode policy could do.
        """
        return self._decode(latents, partial(progress or _silent, "decode"), [])[0]

    def _condition(self, request: GenerationRequest, generators: list, progress) -> ImageCondition | None:
        references, options = request.references, request.options
        if not request.has_reference:
            return None
        ends: list[Tensor | None] = []
        for given in references.ends:
            progress(sum(end is not None for end in ends), len(references.given))
            if given is None or given.ndim == LATENT_RANK:
                ends.append(None if given is None else given.to(self.device))
                continue
            fit = fit_clip if references.use.is_clip else fit_image
            clip = fit(given, request.height, request.width, options.fit)
            latents = unless_out_of_memory(partial(self.vae.encode, clip, generators))
            if latents is None:
                raise OutOfMemory(reference_ran_out(tuple(clip.shape), self.device))
            ends.append(latents)
        progress(len(references.given), len(references.given))
        head, tail = ends
        channels = (head if head is not None else tail).shape[1]
        return image_condition((request.num_videos, channels, *request.latent_extent), head, tail, references.use)

    def _sample(self, request: GenerationRequest, condition: ImageCondition | None, result: GenerationResult, on_step) -> Tensor:
        text, needs = result.prompt.condition, self._needs

        def run(is_last_try: bool) -> Tensor:
            with self._transformer.at_work(0 if is_last_try else needs.beside_transformer(request), is_last_try) as transformer:
                return self._run(transformer, request, text, condition, on_step)

        latents = unless_out_of_memory(lambda: run(False))
        if latents is None and self.offload in (AUTO, BUDGET):
            note = "The device ran out of memory while sampling; it begins again with one block of the transformer on the device at a time."
            logger.warning("%s", note)
            result.notes.append(note)
            latents = unless_out_of_memory(lambda: run(True))
        if latents is None:
            raise OutOfMemory(sampling_ran_out(request, self._placement))
        return latents

    def _run(self, transformer, request: GenerationRequest, text: TextCondition, condition: ImageCondition | None, on_step) -> Tensor:
        options, device = request.options, self._placement.device
        where = device if options.noise_device == "gpu" else torch.device("cpu")
        shape = (1, transformer.config.in_channels, *request.latent_extent)
        rows = [noise(shape, request.seed + k, where, LATENT_DTYPES[options.latent_dtype]) for k in range(request.num_videos)]
        alpha = options.shift or latent_flow_shift(shape, transformer.config.patch_size)
        schedule = sigmas(request.num_steps, alpha)
        text = TextCondition(**{name: part.expand(len(rows), *part.shape[1:]) for name, part in vars(text).items()})
        latents = sample(transformer, torch.cat(rows).to(device), schedule, request.guidance, text, condition, on_step)
        if not torch.isfinite(latents).all():
            raise OpenSoraError(
                f"The transformer gave values that are not numbers (in {self.dtype}); try fp32, or check the file with inspect."
            )
        return latents.float().cpu()

    def _decode(
        self, latents: Tensor, progress, notes: list[str], plan: Continuation | None = None
    ) -> tuple[list[list[numpy.ndarray]], list[str]]:
        """(frames of every video, `notes` and what the decode adds to them). plan: of a video of segments, which is decoded in as long parts."""
        plan = plan or Continuation(segment=latents.shape[2], context=0)
        videos, frames = latents.split(1), []
        parts = windows(latents.shape[2], plan)
        begun = 0
        progress(0, 1)  # how many tiles there are is known with the first

        def decode_all() -> list[str]:
            with self.vae.decoder((*videos[0].shape[:2], parts[0][1], *videos[0].shape[3:])) as (decode, added):

                def decode_part(part: Tensor) -> Tensor:
                    nonlocal begun
                    begun += 1
                    before, all_parts = begun - 1, len(videos) * len(parts)
                    pixels = decode(part, lambda done, total: progress(before * total + done, all_parts * total))
                    return pixels.permute(0, 2, 3, 4, 1)[0]

                for one in videos:
                    pieces = decode_windows(one, plan, decode_part)
                    # A frame at a time: fp32 copies of a whole clip would be larger than the clip.
                    frames.append([to_uint8((frame.float() + 1) / 2)[0] for piece in pieces for frame in piece.split(1)])
            return notes + added

        told = unless_out_of_memory(decode_all)
        if told is None:
            grid, (length, rows, columns) = self.files.grid, latents.shape[2:]
            size = f"{grid.pixel_frames(length)} frames of {grid.space * rows}x{grid.space * columns} (height x width)"
            raise DecodeOutOfMemory(decoding_ran_out(size, self.vae.policy, self.device), latents)
        return frames, told

    def _read_transformer(self, dtype: torch.dtype, device: torch.device):
        read = partial(load_transformer, precision=self._quantised)
        model = self._read_shared("transformer", self.files.dit, read, dtype, device)
        for block in (*model.double_blocks, *model.single_blocks):
            block.attention = self._attention
        for path, strength in self._loras:
            merge_lora(model, path, strength)
        return model

    def _read_shared(self, kind: str, path: Path, read: Callable, dtype: torch.dtype, device: torch.device):
        """A network of our own over weights that every pipeline of these files and options shares."""
        options = self._options(dtype, device)
        if kind in ("t5", "clip") and self.files.tokenizers is not None:
            options["tokenizers"] = str(self.files.tokenizers)
        return own_structure(SHARED.get(kind, path, options, partial(read, path, dtype, device), keep=self.keep_loaded))

    def _options(self, dtype: torch.dtype, device: torch.device) -> dict[str, str]:
        return {"dtype": str(dtype).removeprefix("torch."), "device": str(device), "precision": self._quantised or "as stored"}

    def check_files(self) -> None:
        """Compare the parts by their headers and find the tokenizers, once; every call does so first.

        Raises:
            OpenSoraError: a part is something else, or of another model than the others.
        """
        if not self._is_checked:
            paths = [path for path in vars(self.files).values() if path is not None]
            SHARED.checked(paths, partial(check_files, self.files))
            self._is_checked = True

    @property
    def _needs(self) -> Needs:
        return Needs(self.files, self._placement, self._quantised)

    def _release(self) -> None:
        for component in (self._transformer, self._vae, self._t5, self._clip):
            component.release()

    @contextmanager
    def _stage(self, name: str, result: GenerationResult):
        begun = time.perf_counter()
        yield
        if self._placement.device.type == "cuda":
            torch.cuda.synchronize(self._placement.device)
        result.seconds[name] = time.perf_counter() - begun


@dataclass(frozen=True)
class _Watchers:
    """Who is told what while a long video is made; all may be None to begin with."""

    callback: StepCallback | None
    progress: StageProgress | None
    on_segment: SegmentCallback | None

    def __post_init__(self):
        object.__setattr__(self, "progress", self.progress or _silent)
        object.__setattr__(self, "on_segment", self.on_segment or (lambda done, latents: None))

    def steps_of(self, part: GenerationResult, index: int, segments: int, num_steps: int) -> Callable[[StepReport], None]:
        """For one segment: the progress of sampling counts the steps of all."""
        self.progress("sampling", index * num_steps, segments * num_steps)
        return _watch(part, self.callback, lambda stage, done, total: self.progress(stage, index * total + done, segments * total))


def _check_latents(latents) -> tuple[int, ...]:
    """Shape [B, C, T, H, W] of finished latents; that they are this model's is checked with the request."""
    if isinstance(latents, Tensor) and latents.ndim == LATENT_RANK and 0 not in latents.shape and torch.isfinite(latents).all():
        return tuple(latents.shape)
    found = list(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
    raise OpenSoraError(
        f"A video to go on from is a result, or its latents, finite numbers [videos, channels, latent frames, height, width]; this is {found}."
    )


def _going_on(latents: Tensor, plan: Continuation) -> References:
    return References(clip=context_of(latents, plan), use=ReferenceUse(is_clip=True))


def _watch(result: GenerationResult, callback: StepCallback | None, progress: StageProgress) -> Callable[[StepReport], None]:
    def on_step(report: StepReport) -> None:
        result.forwards, result.forwards_saved = report.forwards_done, report.forwards_saved
        if callback is not None:
            callback(report.step, report.num_steps, report.forwards_done, report.forwards_saved, report.latents)
        progress("sampling", report.step, report.num_steps)

    return on_step


def _posterior_generator(request: GenerationRequest, index: int) -> torch.Generator | None:
    """One for each video, so that a batch item is what its seed gives alone; None for the mode."""
    if request.options.posterior == "mode":
        return None
    return torch.Generator("cpu").manual_seed(request.seed + index)


def _silent(stage: str, done: int, total: int) -> None:
    pass
