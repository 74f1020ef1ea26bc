"""OpenSoraPipeline: prompt (and pictures) in, frames out, with no host.

This is the face: it turns arguments into a checked request (run/asked.py), and refuses all that a person can get wrong before the first
weight is read. Who has the networks: run/parts.py. The walks themselves: run/clip.py.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy
import torch
from torch import Tensor

from .choices import ATTENTIONS, AUTO, BUDGET, EVERYTHING, EXACT, FORWARDS, MINIMAL, OFFLOADS
from .codecs.codec import Latents
from .errors import OpenSoraError, check_choice
from .memory.component import Placement, resolve_device, resolve_precision
from .memory.decode import VideoVAE
from .memory.footprint import sizes_of_files
from .memory.residency import make_residency
from .ops import sliced_attention
from .parallel import Group
from .run.asked import check_request, given_of, going_on_of, guidance_of, options_of, seed_of, steps_of, with_usual
from .run.calibrate import Calibrated, calibrate
from .run.clip import checked_latents, make_clip, make_longer
from .run.decode import decode_latents
from .run.files import ModelFiles, check_encoders, check_lora
from .run.kernels import attention_of
from .run.needs import transformer_bytes, weight_capacity
from .run.parts import Networks, PictureNetworks
from .run.picture import PictureRequest, paint
from .run.request import EncodedPrompt, GenerationRequest, SamplingOptions, finite, random_seed
from .run.result import GenerationResult, SegmentCallback, StageProgress, StepCallback, Watchers
from .run.sample import check_size, do_share
from .run.segments import segment_prompts
from .run.text import encode
from .sampling.given import CONTEXTS
from .sampling.longer import Continuation

AnyPath, Device = str | Path, str | torch.device


class OpenSoraPipeline:
    """Open-Sora, or CogVideoX, from its files. Networks are read when they are first needed; pipelines over the same files share them.

    torch_dtype: of the networks; None = bf16 on an accelerator, fp32 on the CPU.
    precision: auto, fp32 or bf16: the same choice in a word. fp8_e4m3fn, int8 or nf4: quantise the large layers of the transformer and of T5 as
    they are read; with auto a quantised file is kept as it is stored.
    Raises an OpenSoraError where a part is not there, or the settings contradict each other.

    Attributes:
        vae: `.enable_tiling(tile_size, tile_overlap)`, `.policy` (auto, exact, low_memory).
        keep_loaded: keep networks in memory when no pipeline uses them, within loaded.SHARED.keep_limit_gib.
        keep_encoded: keep encoded prompts, so that the same prompt does not need the encoders again.
        lora_notes: for people, how many of how many layers each LoRA changes.
    """

    def __init__(self, files: ModelFiles, torch_dtype: torch.dtype | None = None, precision: str = AUTO):
        self.files = files.check_exist()
        runs_in_half = torch_dtype == torch.float16 and self.files.family.dtype == "F16"
        torch_dtype, quantised = resolve_precision(torch_dtype, precision, runs_in_half)
        self._networks = Networks(self.files, Placement(torch.device("cpu"), torch_dtype), quantised)
        self._flux: PictureNetworks | None = None
        self.lora_notes: list[str] = []

    @classmethod
    def from_pretrained(
        cls, folder: AnyPath = "small", *, torch_dtype: torch.dtype | None = None, precision: str = AUTO, tokenizers: AnyPath | None = None
    ) -> "OpenSoraPipeline":
        """A pipeline over a folder as the model is published (hpcai-tech/Open-Sora-v2, or in diffusers' layout), or over "small", the built-in one.

        Nothing is downloaded. tokenizers: a folder to look for both in, if not beside the encoders.
        """
        return cls(ModelFiles.in_folder(folder, tokenizers), torch_dtype, precision)

    @classmethod
    def from_files(
        cls,
        *,
        dit: AnyPath,
        vae: AnyPath,
        t5: AnyPath,
        clip: AnyPath | None = None,
        tokenizers: AnyPath | None = None,
        torch_dtype: torch.dtype | None = None,
        precision: str = AUTO,
    ) -> "OpenSoraPipeline":
        """A pipeline over single files (or hub folders, for the text encoders). clip: for models that read CLIP beside T5."""
        paths = (Path(path).expanduser() if isinstance(path, AnyPath) else path for path in (dit, vae, t5, clip, tokenizers))
        return cls(ModelFiles(*paths), torch_dtype, precision)

    @property
    def vae(self) -> VideoVAE:
        """The VAE: how it decodes, and clips in and out of it."""
        return self._networks.video_vae

    keep_loaded = property(lambda self: self._networks.keep_loaded, lambda self, keep: setattr(self._networks, "keep_loaded", keep))
    keep_encoded = property(lambda self: self._networks.keep_encoded, lambda self, keep: setattr(self._networks, "keep_encoded", keep))

    @property
    def device(self) -> torch.device:
        """Where the networks compute."""
        return self._networks.placement.device

    @property
    def dtype(self) -> torch.dtype:
        """What the networks compute in; latents between steps are fp32."""
        return self._networks.placement.dtype

    @property
    def latents(self) -> Latents:
        """How the VAE's latents become the transformer's, and back."""
        return sizes_of_files(self.files.dit, self.files.vae).vae.latents

    @property
    def latent_scale(self) -> float | tuple[float, ...]:
        """What latents are multiplied by between the VAE and the transformer, from the VAE's header."""
        return self.latents.scale

    def latent_frames(self, num_frames: int) -> int:
        """Latent frames of a clip of so many frames. Raises an OpenSoraError for counts that no clip has."""
        return self.files.grid.latent_frames(num_frames)

    @property
    def offload(self) -> str:
        """everything, auto, resident, budget or minimal; see memory/component.py."""
        return self._networks.placement.mode

    def to(self, device: Device) -> "OpenSoraPipeline":
        """Compute on a device ("auto": CUDA, else Apple's GPU, else the CPU)."""
        self._networks.placement.device = resolve_device(device)
        self._networks.release()
        return self

    def enable_offload(self, mode: str = AUTO, budget_gib: float | None = None, device: Device | None = None) -> "OpenSoraPipeline":
        """Let networks leave the device when they do not work, and stream what does not fit. No mode changes a result.

        mode: auto: each network whole while it works, streamed block by block as far as it does not fit. resident: the transformer stays.
        budget: at most budget_gib of weights on the device. minimal: one block at a time.
        device: where to compute; None = the device chosen before, or one that is found.
        Raises an OpenSoraError for an unknown mode, weights that cannot fit, or a budget that no plan can keep; says what can.
        """
        check_choice("offload", mode, OFFLOADS)
        if budget_gib is not None and mode != BUDGET:
            raise OpenSoraError(f"A budget goes with the offload mode budget, and {mode} takes none; leave it out.")
        if device is None:
            device = AUTO if self._networks.placement.device.type == "cpu" else self._networks.placement.device
        target = Placement(resolve_device(device), self._networks.placement.torch_dtype, mode, budget_gib)
        if mode != AUTO:
            make_residency(transformer_bytes(self.files, target, self._networks.quantised), mode, budget_gib, weight_capacity(target))
        self.to(target.device)
        self._networks.placement.mode, self._networks.placement.budget_gib = mode, budget_gib
        return self

    def enable_model_cpu_offload(self, device: Device | None = None) -> "OpenSoraPipeline":
        """Keep each network on the device only while it works: enable_offload("auto")."""
        return self.enable_offload(AUTO, device=device)

    def enable_sequential_cpu_offload(self, device: Device | None = None) -> "OpenSoraPipeline":
        """Keep one block of a network on the device at a time, the least device memory: enable_offload("minimal")."""
        return self.enable_offload(MINIMAL, device=device)

    def enable_attention_slicing(self, slice_size: int = 1) -> "OpenSoraPipeline":
        """Let attention take `slice_size` heads at a time: the same result with less workspace, slower."""
        if not isinstance(slice_size, int) or slice_size < 1:
            raise OpenSoraError(f"slice_size={slice_size!r} heads cannot be taken at a time; use 1 or more.")
        self._networks.use_attention(sliced_attention(slice_size))
        return self

    def use_attention(self, name: str) -> "OpenSoraPipeline":
        """Let the transformer compute attention by another kernel: auto, sdpa, sliced, cudnn, sage or flash; see run/kernels.py.

        Raises an OpenSoraError for an unknown name, a library that is not installed, or a device or dtype that the kernel does not compute on.
        """
        check_choice("attention", name, ATTENTIONS)
        self._networks.use_attention(attention_of(name, self.device, self.dtype))
        return self

    def compile(self) -> "OpenSoraPipeline":
        """Compile the transformer's blocks at their first use, each class once. Results agree to rounding; a new size compiles again."""
        self._networks.is_compiled = True
        self._networks.transformer.release()
        return self

    def use_group(self, group: Group) -> "OpenSoraPipeline":
        """Make videos together with other processes, which have the same files and options; see parallel.py.

        The first process is called as usual; the others call `help` instead, and end with the group. A model can be shared out over so many and no more.
        """
        check_size(self.files, group.size)
        self._networks.video_vae.group = group
        return self

    @torch.inference_mode()
    def help(self) -> None:
        """The share of a process that is not the first of its group."""
        do_share(self._networks)

    def load_lora(self, path: AnyPath, strength: float = 1.0) -> "OpenSoraPipeline":
        """Add a LoRA file or PEFT folder to the transformer, after those added before. strength: a finite factor on its change; 1 is the file's own."""
        strength = finite("strength", strength)
        self.lora_notes.append(check_lora(self.files, path))
        self._networks.loras.append((Path(path), strength))
        self._networks.transformer.release()
        return self

    def load_flux(self, dit: AnyPath, vae: AnyPath) -> "OpenSoraPipeline":
        """Add Flux.1, which draws the picture that a video begins with. No weight is read.

        dit: flux1-dev or flux1-schnell as released. vae: ae.safetensors. T5 and CLIP are the pipeline's own.
        """
        flux = PictureNetworks(dit, vae, self._networks.placement, self._networks.quantised)
        of_both = "; use a Flux that reads the same encoders: picture and video are made of one prompt."
        check_encoders(self.files, flux.dit.name, flux.config, of_both)
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

        prompt: of the video; of the picture too, undecorated, unless picture_prompt is another. seeds: one for each picture; upstream gives picture and
        video the same. request: see run/picture.py, PictureRequest.for_ratio. progress: (stage, done, total) for the stages text and picture.

        Returns ([1, H, W, 3] uint8 for each seed, the encoded prompt): `pipe(encoded, image=picture, seed=seed, ...)` makes the video.
        Nothing of Flux is in memory any more.
        """
        self._drawing()
        self.check_files()
        shown = (prompt if picture_prompt is None else picture_prompt, "", None)
        of_picture, of_video = self.encode_prompts([shown, (prompt, negative_prompt, options_of(options))], progress)
        return self.paint([(of_picture, request, seed) for seed in seeds], progress), of_video

    @torch.inference_mode()
    def paint(self, pictures: Sequence[tuple[EncodedPrompt, PictureRequest, int]], progress: StageProgress | None = None) -> list[Tensor]:
        """Draw a picture with Flux for each (prompt as encode_prompts gives it with options None, request, seed); Flux is read once for all."""
        flux = self._drawing()
        if self.offload != EVERYTHING:
            self._networks.transformer.release()  # one large network in memory at a time
        return paint(flux, pictures, Watchers(progress=progress).stage("picture"))

    def _drawing(self) -> PictureNetworks:
        if self._flux is None:
            raise OpenSoraError("There is no Flux to draw with; call load_flux with its two files first.")
        return self._flux

    @torch.inference_mode()
    def encode_prompt(self, prompt: str, negative_prompt: str = "", options: SamplingOptions | None = None) -> EncodedPrompt:
        """Decorate and encode a prompt once, for several calls. The negative prompt is encoded as it is."""
        return encode(self._networks, [(prompt, negative_prompt, options_of(options))])[0]

    @torch.inference_mode()
    def encode_prompts(
        self, prompts: Sequence[tuple[str, str, SamplingOptions | None]], progress: StageProgress | None = None
    ) -> list[EncodedPrompt]:
        """Encode several prompts, each (prompt, negative prompt, options), reading either text encoder once for all of them.

        Options None: the prompt is read as it is, as that of a picture (paint). One of the released model takes 17 MB of main memory.
        progress: ("text", done, total), T5's work alone.
        """
        return encode(self._networks, prompts, Watchers(progress=progress).stage("text"))

    @torch.inference_mode()
    def __call__(  # noqa: PLR0913 - the settings people know by these names; inside they travel as one GenerationRequest
        self,
        prompt: str | EncodedPrompt,
        *,
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        image=None,
        last_image=None,
        video=None,
        direction: str = FORWARDS,
        context: int = CONTEXTS[0],
        image_strength: float = 1.0,
        references: Sequence = (),
        mask_strategy: str = "",
        seed: int | None = None,
        generator: torch.Generator | None = None,
        num_videos_per_prompt: int = 1,
        callback: StepCallback | None = None,
        progress: StageProgress | None = None,
        options: SamplingOptions | None = None,
        check_only: bool = False,
        latents_only: bool = False,
        noise: Tensor | None = None,
        speed: str = EXACT,
    ) -> GenerationResult:
        """Make videos.

        Args:
            prompt: a text, or what encode_prompt gave (negative_prompt is then not read).
            height, width: pixels, for 2.0 multiples of 16; see Grid.named_size. None, as of all numbers here: the model's own; scales of 1 are neutral.
            num_frames: for 2.0 4k+1, its high-compression variant 4k, Open-Sora 1.2 17k, 1.3 16k+1, CogVideoX 8k+1 or 16k+1.
            image, last_image: first and last frame: paths, PIL images, [H, W, 3] uint8 or float in 0..1, or a frame's latents.
            video, direction, context: a clip to go on from, where, and by how many frames (media/pictures.py); CogVideoX makes it over instead.
            image_strength: 0..1, how closely it holds to what is given (guidance.ReferenceUse). references, mask_strategy: see sampling/masks.py.
            seed: 0..2**64-1; None draws one, or a generator's. Video k is what seed + k gives alone. noise: [B, C, T, H, W], in place of theirs.
            callback, progress, options: see result.Watchers, SamplingOptions. check_only: refuse what cannot be met, make nothing but seeds.
            latents_only: no frames. speed: exact, or balanced, fast, draft: a plan of fewer steps (sampling/plan.py); steps are then not read.

        Raises an OpenSoraError for a request that cannot be met, before any weight is read.
        """
        watchers, files, options, given = Watchers(callback, progress), self.files, options_of(options), (image, last_image, video)
        how = {"direction": direction, "context": context, "strength": finite("image_strength", image_strength)}
        size = {"height": height, "width": width, "num_frames": num_frames, "num_steps": steps_of(files, speed, num_inference_steps)}
        size = with_usual(files, **size)
        request = GenerationRequest(
            prompt=prompt,
            negative_prompt=negative_prompt,
            **size,
            guidance=guidance_of(files, options, guidance_scale, image_guidance_scale),
            references=given_of(files, given, how, size["num_frames"], references, mask_strategy),
            seed=seed_of(seed, generator),
            num_videos=num_videos_per_prompt,
            options=options,
            speed=speed,
            grid=files.grid,
            noise=noise,
        )
        check_request(self._networks, request)
        only = GenerationResult(seeds=request.seeds, request=request)
        return only if check_only else make_clip(self._networks, request, watchers, not latents_only)

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
        references: Sequence = (),
        mask_strategy: str = "",
        last_image=None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        seed: int | None = None,
        on_segment: SegmentCallback | None = None,
        callback: StepCallback | None = None,
        progress: StageProgress | None = None,
        options: SamplingOptions | None = None,
        check_only: bool = False,
        speed: str = EXACT,
    ) -> GenerationResult:
        """Go on from finished videos (run/segments.py). An experiment: the released weights may never have been trained to.

        Args:
            video: what a call gave, or its `.latents`: [B, C, T, H, W] in the transformer's scale.
            prompts: one for each segment in turn, the last for all that follow; None = the video's own.
            segments: how many to add. references, mask_strategy: as for a call; segments are its loops from 1 on.
            last_image: what the last segment ends with (Open-Sora 1.1 to 1.3).
            num_frames, context_frames: of a segment, and what of it is given; see sampling/longer.py.
            seed: None = the video's own, or one drawn. A segment's noise depends on it and on where the segment begins.
            on_segment: (segments done, latents of the whole video so far), before the next begins: to put them in a safe place.
            callback, progress, options, check_only, speed: as for a call; there is no temporal ramp, as in upstream's video to video.

        Returns the whole video, from the first frame given; forwards and seconds are of what was added. Raises as a call.
        """
        watchers, grid, options = Watchers(callback, progress, on_segment), self.files.grid, options_of(options)
        video = video if isinstance(video, GenerationResult) else GenerationResult(latents=video)
        latents = checked_latents(video.latents)
        batch, _, length, height, width = latents.shape
        going = self.continuation(length, num_frames, context_frames)
        texts = segment_prompts(video.prompt if prompts is None else prompts, segments)
        request = GenerationRequest(
            prompt=texts[0],
            negative_prompt=negative_prompt,
            height=height * grid.space,
            width=width * grid.space,
            num_frames=grid.pixel_frames(going.segment),
            num_steps=steps_of(self.files, speed, num_inference_steps),
            guidance=guidance_of(self.files, options, guidance_scale, image_guidance_scale),
            references=going_on_of(self.files, latents, going, references, mask_strategy, last_image),
            seed=seed if seed is not None else video.seeds[0] if video.seeds else random_seed(),
            num_videos=batch,
            options=options,
            speed=speed,
            grid=grid,
        )
        check_request(self._networks, request)
        requests = [replace(request, prompt=text) for text in texts]
        return video if check_only else make_longer(self._networks, latents, going, requests, watchers, video.request)

    @torch.inference_mode()
    def decode(self, latents: Tensor, progress: StageProgress | None = None) -> list[list[numpy.ndarray]]:
        """Frames of finished latents, as `.frames` of a result; for latents that an earlier decode had no memory for.

        latents: [B, C, T, H, W], in the transformer's scale, as `.latents` of a result.
        Raises a DecodeOutOfMemory where memory ran out, whatever the decode policy could do.
        """
        return decode_latents(self._networks, latents, Watchers(progress=progress).stage("decode"))[0]

    def frames_of(self, latents: Tensor) -> tuple[int, int, int]:
        """(frames, height, width) of the video that latents [B, C, T, H, W] decode to. Raises an OpenSoraError if they are of another model."""
        vae = sizes_of_files(vae=self.files.vae).vae
        if latents.shape[1] != vae.latents.channels:
            raise OpenSoraError(
                f"These latents have {latents.shape[1]} channels and this model's have {vae.latents.channels}; use the model that made them."
            )
        return vae.grid.decoded(latents.shape)

    def continuation(self, video_length: int, num_frames: int | None = None, context_frames: int | None = None) -> Continuation:
        """How a video of so many latent frames goes on; see sampling/longer.py. Raises an OpenSoraError for what cannot be."""
        return self.files.family.check_longer().continuation(video_length, num_frames, context_frames, self.files.grid)

    def check_files(self) -> None:
        """Compare the parts by their headers and find the tokenizers, once; every call does so first."""
        self._networks.check_files()

    def use_plans(self, folder: AnyPath) -> "OpenSoraPipeline":
        """Look for calibrated plans of a speed in a folder of one's own first, as `calibrate` wrote them."""
        folder = Path(folder).expanduser()
        if not folder.is_dir():
            raise OpenSoraError(f"{folder} is no folder; give the one that calibrate wrote its plans into.")
        self._networks.plan_folders = (folder, *self._networks.plan_folders)
        return self

    def checked(self, calls: Sequence[tuple[str, int, dict]]) -> list[GenerationRequest]:
        """Requests of calls, each (prompt, seed, the other keywords of a call), as checked before any weight is read."""
        return [self(prompt, seed=seed, check_only=True, **arguments).request for prompt, seed, arguments in calls]

    def calibrate(self, requests: Sequence[GenerationRequest], folder: AnyPath, progress: StageProgress | None = None) -> Calibrated:
        """Measure the best plans for this model with some runs of one size, length and kind, and write them into a folder for `use_plans`.

        requests: as `checked` gives them; eight are enough. What is done is kept in the folder, so that a stopped calibration goes on.
        """
        return calibrate(self._networks, requests, Path(folder).expanduser(), Watchers(progress=progress))
