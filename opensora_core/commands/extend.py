"""`generate --extend`: a video made longer by segments, and the .latent file that holds what is finished of it."""

import tempfile
from copy import copy
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from ..choices import SCRIPTS
from ..codecs.codec import Latents
from ..errors import OpenSoraError
from ..media.latent_file import SUFFIX, read_latents, save_latents
from ..names import claim_unused
from ..pipeline import OpenSoraPipeline
from ..run.request import EncodedPrompt, SamplingOptions
from ..run.result import GenerationResult
from ..run.segments import segment_prompts
from .options import GenerateOptions, SizeOptions, flag
from .progress import Screen

_OF_MASKS = ("references", "mask_strategy")
Text = tuple[str, str, SamplingOptions | None]  # as OpenSoraPipeline.encode_prompts takes it


class KeptFile:
    """The .latent file beside a video: all that is finished of it, replaced as it grows.

    video: the file that is being made. longer: what is added to it, if it is.
    """

    def __init__(self, video: Path, kind: Latents, longer: "Longer | None"):
        self.path, self._kind, self._longer = video.with_suffix(SUFFIX), kind, longer
        self._num_segments: int | None = None

    def keep(self, num_segments: int, latents: Tensor) -> None:
        """Write the latents of a first clip and so many segments."""
        save_latents(self.path, self._kind.to_codec(latents))
        self._num_segments = num_segments

    def keep_of(self, latents: Tensor, suffix: str = "") -> str:
        """Write what could not be decoded, or not written, if it is not kept yet, and say where it is and what goes on from it.

        suffix: of its name, so that the next try can have the video's.
        """
        if self.sentence:
            return self.sentence
        path = self.path.with_stem(self.path.stem + suffix)  # of a name that is this run's own
        try:
            save_latents(path, self._kind.to_codec(latents))
        except OSError:
            with claim_unused(Path(tempfile.gettempdir()) / path.name) as elsewhere:
                path = save_latents(elsewhere.path, self._kind.to_codec(latents))
        return f"They are in {path}, which ComfyUI's Load Latent reads too; `generate --decode {path}` makes the video of them."

    @property
    def sentence(self) -> str:
        """Where finished work is, and how to go on from it; "" before there is any."""
        if self._num_segments is None:
            return ""
        if self._num_segments == self._longer.num_segments:
            return f"All of it is in {self.path}; `generate --decode {self.path}` makes the video."
        done = f" and {self._num_segments} segment{'s' * (self._num_segments > 1)}" if self._num_segments else ""
        return f"What is finished (the first clip{done}) is in {self.path}; go on with --extend-from {self.path} --extend-frames {self._longer.num_frames}."


class Longer:
    """What `--extend` and its companions ask for, checked as far as it can be before a network is read.

    arguments: of the call that makes the first clip. num_segments, num_frames: how many, and of each, what it is given included.
    """

    def __init__(self, options: GenerateOptions, arguments: dict[str, Any], pipe: OpenSoraPipeline, screen: Screen):
        pipe.files.grid.check_goes_on()
        rule = pipe.files.family.check_longer()
        self._pipe, self._screen = pipe, screen
        self._latents = None if options.extend_from is None else pipe.latents.to_model(_read(options))
        self._prompts = segment_prompts(options.extend_prompt or options.prompt, options.extend)
        self._arguments = {
            name: arguments[name]
            for name in ("negative_prompt", "num_inference_steps", "guidance_scale", "image_guidance_scale", "options", "speed", *_OF_MASKS)
            if name in arguments
        } | {"num_frames": options.extend_frames, "context_frames": options.extend_context, "segments": options.extend}
        if rule.has_scripts and arguments.get("last_image") is not None:
            if options.parity == SCRIPTS and arguments["image"] is None and not rule.re_encodes:
                raise OpenSoraError(
                    "With --parity scripts an end alone (i2v_tail) is given to no clip of a loop: upstream's script takes every clip for one that "
                    "another follows. Leave out --parity scripts, which gives it to the last clip, or give --ref too (i2v_loop)."
                )
            self._arguments["last_image"] = arguments["last_image"]
        length = pipe.latent_frames(arguments["num_frames"]) if self._latents is None else self._latents.shape[2]
        going = pipe.continuation(length, options.extend_frames, options.extend_context)  # raises before the first clip is made
        self.num_segments, self.num_frames = options.extend, pipe.files.grid.pixel_frames(going.segment)
        if self._latents is not None:
            pipe.extend(self._latents, self._prompts, check_only=True, **self._arguments)

    def with_prompt(self, prompt: str, description: str) -> "Longer":
        """The same with another text wherever a segment has this prompt."""
        made = copy(self)
        made._prompts = [description if one == prompt else one for one in self._prompts]
        return made

    def texts(self, first: Text) -> list[Text]:
        """Every text that is encoded, the first clip's own text first."""
        segments = [(prompt, *first[1:]) for prompt in self._prompts]
        return segments if self._latents is not None else [first, *segments]

    def make(self, encoded: dict[Text, EncodedPrompt], first: Text, seed: int, arguments: dict, kept: KeptFile) -> GenerationResult:
        """The first clip, unless latents were given, and what is added to it.

        encoded: all `texts`. first: of the first clip. arguments: of the call that makes it. kept: is told what is finished.
        """
        clip = GenerationResult(latents=self._latents)
        if "last_image" in self._arguments:  # of the last segment
            arguments = {**arguments, "last_image": None} | ({} if arguments["image"] is not None else {"image_strength": 1.0})
        if self._latents is None:
            with self._screen.stages(f"first clip, seed {seed}") as bars:
                clip = self._pipe(encoded[first], seed=seed, latents_only=True, callback=bars.step, progress=bars.progress, **arguments)
            kept.keep(0, clip.latents)
        prompts = [encoded[(prompt, *first[1:])] for prompt in self._prompts]
        with self._screen.stages(f"{len(prompts)} segment{'s' * (len(prompts) > 1)} more, kept in {kept.path}") as bars:
            told = {"on_segment": kept.keep, "callback": bars.step, "progress": bars.progress}
            return self._pipe.extend(clip, prompts, seed=seed, **told, **self._arguments)


def _read(options: GenerateOptions) -> Tensor:
    # What a file of latents decides, so that it cannot be asked for beside one.
    names = [*(field.name for field in fields(SizeOptions) if field.default is None and field.name != "fps"), "cond_type", "ref", "ref_end"]
    given = [name for name in names if getattr(options, name) is not None]
    if given:
        raise OpenSoraError(f"{flag(given[0])} is of a first clip; leave it out beside --extend-from, whose file is what is gone on from.")
    return read_latents(Path(options.extend_from).expanduser())
