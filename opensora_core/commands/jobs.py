"""The one loop of `generate`: prompts are encoded together, pictures drawn together, then each video made and written as soon as it is done."""

import shutil
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ..errors import DecodeOutOfMemory, NotNumbers, OpenSoraError, OutOfMemory
from ..media.latent_file import SUFFIX, save_latents
from ..media.video import save_prompt, save_video
from ..memory.device import is_out_of_memory, ran_out
from ..names import Claim
from ..pipeline import OpenSoraPipeline
from ..run.request import EncodedPrompt
from .extend import KeptFile, Longer, Text
from .ledger import Ledger
from .options import GenerateOptions
from .output import say
from .pictures import PictureJob, draw
from .progress import Screen
from .recipe import recipe_for

# Prompts are encoded so many at a time: half a GiB of main memory, and the text encoders are read once for all of them.
ENCODED_TOGETHER = 32
# With pictures to draw, so many videos at a time: Flux is read once for them, and a stop in the middle loses no more than these pictures.
DRAWN_TOGETHER = 8
_LOOK_AGAIN = 5.0  # seconds until what others are at work on is looked at again
_LEAST_ROOM = 2**24  # bytes of disk below which no video is begun


@dataclass(frozen=True, kw_only=True)
class Job:
    """A video to make.

    name: for messages, such as "row 3 (line 4)". title: of its bars. options: what was said, its prompt among it, and the model's own numbers.
    arguments: keywords of the pipeline's call, but for prompt, seed and callbacks.
    place: claims the file to write, once the video begins; nothing is overwritten.
    key: what the ledger knows it by. number: its row, for people. asked: all that was asked for, in JSON's terms, a seed that was not given as None.
    picture: that Flux draws for it, its first frame. longer: what is added to it.
    request: what a person wrote, where a text model made a prompt of it.
    """

    name: str
    title: str
    options: GenerateOptions
    seed: int
    arguments: dict[str, Any]
    place: Callable[[], Claim]
    key: str = ""
    number: int = 0
    asked: dict[str, Any] = field(default_factory=dict)
    picture: PictureJob | None = None
    longer: Longer | None = None
    request: str = ""

    @property
    def text(self) -> Text:
        return self.options.prompt, self.arguments["negative_prompt"], self.arguments["options"]

    @property
    def texts(self) -> list[Text]:
        """Every text that is encoded for this video."""
        return [self.text] if self.longer is None else self.longer.texts(self.text)

    def check(self, pipe: OpenSoraPipeline) -> None:
        """Raise an OpenSoraError for what cannot be made, before any weight is read."""
        arguments = self.arguments
        if self.picture is not None:
            arguments = arguments | {"image": torch.zeros(1, arguments["height"], arguments["width"], 3)}  # in place of the one to be drawn
        pipe(self.options.prompt, seed=self.seed, check_only=True, **arguments)


class Jobs:
    """Videos on their way.

    ledger: says what is made already, and is told what is.
    is_one_request: all are of one prompt, or by several processes together, so that a defect, or a refusal, ends the command. Else it is the
    failure of its row.
    is_shared: other processes make the same videos into the same folder: each is claimed before it is begun.
    failed: by the job's name, why.
    """

    def __init__(self, pipe: OpenSoraPipeline, ledger: Ledger, screen: Screen, is_one_request: bool, is_shared: bool = False):
        self._pipe, self._ledger, self._screen, self._is_one_request = pipe, ledger, screen, is_one_request
        self._is_shared, self._counted = is_shared, set()
        self._encoded: dict[Text, EncodedPrompt] = {}
        self._kept: KeptFile | None = None
        self.failed: dict[str, str] = {}

    def run(self, jobs: list[Job]) -> None:
        """Make all of them, or say why not."""
        together = DRAWN_TOGETHER if self._is_shared or any(job.picture for job in jobs) else ENCODED_TOGETHER
        is_told = False
        while True:
            for first in range(0, len(jobs), together):
                self._run_some(self._left(jobs[first : first + together]))
            jobs = self._left(jobs) if self._is_shared else []
            if not jobs:
                return
            if not is_told:
                say(f"{len(jobs)} of the videos are being made by others; what a lost one leaves is taken up here")
            is_told = True
            time.sleep(_LOOK_AGAIN)

    def _left(self, jobs: list[Job]) -> list[Job]:
        """The videos that nobody has finished yet; those that others finished are counted on the screen."""
        if not self._is_shared:
            return jobs
        self._ledger.read_again()
        open_ones = [job for job in jobs if job.name not in self.failed]
        left = [job for job in open_ones if self._ledger.finished(job.key) is None]
        by_others = {job.name for job in open_ones} - {job.name for job in left} - self._counted
        self._counted |= by_others
        self._screen.made_by_others(len(by_others))
        return left

    def _run_some(self, jobs: list[Job]) -> None:
        self._kept = None
        wanted = {job.picture.key: job.picture for job in reversed(jobs) if job.picture and not self._ledger.finished(job.picture.key)}
        pictures = list(wanted.values())[::-1]  # each of the first job that asks for it
        self._try(jobs, lambda: self._encode(jobs, pictures))
        self._draw([job for job in jobs if job.name not in self.failed], pictures)
        for job in jobs:
            if job.name in self.failed:
                continue
            self._screen.at_work = job.name
            self._try([job], partial(self._claimed, job))

    def _claimed(self, job: Job) -> None:
        """Make a video, unless somebody else is at work on it or has finished it."""
        claimed = self._ledger.claim(job.key) if self._is_shared else nullcontext()
        with claimed or nullcontext():
            if claimed and self._left([job]):
                self._make(job)
                self._counted.add(job.name)

    def _encode(self, jobs: list[Job], pictures: list[PictureJob]) -> None:
        """Encode what is not encoded yet; what is not needed any more is forgotten."""
        whose = [(text, job.name) for job in jobs for text in job.texts]
        whose += [(picture.text, f"{picture.name}, picture") for picture in pictures]
        names = dict(reversed(whose))  # of the first that needs it
        self._encoded = {text: encoded for text, encoded in self._encoded.items() if text in names}
        new = list(dict.fromkeys(text for text, _ in whose if text not in self._encoded))
        if not new:
            return
        with self._screen.stages(f"{len(new)} prompt{'s' * (len(new) > 1)}") as stages:

            def progress(stage: str, done: int, total: int) -> None:
                self._screen.at_work = names[new[done]] if done < total else ""
                stages.progress(stage, done, total)

            self._encoded |= zip(new, self._pipe.encode_prompts(new, progress), strict=True)

    def _draw(self, jobs: list[Job], pictures: list[PictureJob]) -> None:
        """Draw pictures, Flux read once for all; where that fails, each alone, so that the failure is that of the jobs it belongs to."""
        if not jobs:
            return
        if len(pictures) > 1:
            try:
                draw(self._pipe, self._ledger, self._screen, pictures, self._encoded)
            except (OpenSoraError, OSError, MemoryError, RuntimeError) as error:
                why = failure(error) or error
                say(f"drawing {len(pictures)} pictures together failed ({why}); each is drawn alone")
        for picture in pictures:
            if not self._ledger.finished(picture.key):
                its = [job for job in jobs if job.picture is not None and job.picture.key == picture.key]
                self._try(its, partial(draw, self._pipe, self._ledger, self._screen, [picture], self._encoded))

    def _make(self, job: Job) -> None:
        """Make a video under a name that is this run's alone until it is there, say where it is, then write what lies beside it."""
        with job.place() as claimed:
            self._kept = KeptFile(claimed.path, self._pipe.latents, job.longer)
            folder = claimed.path.parent
            if shutil.disk_usage(folder).free < _LEAST_ROOM:
                raise OSError(f"Free some room: the disk of {folder} is full.")
            seed, arguments = job.seed, job.arguments
            if job.picture is not None:
                arguments = arguments | {"image": self._ledger.finished(job.picture.key)}
                if job.asked["seed"] is None and job.picture.asked["seed"] is None:
                    seed = self._ledger.seed(job.picture.key)  # a picture of an earlier try, and its video, have one seed
            if job.longer is not None:
                result = job.longer.make(self._encoded, job.text, seed, arguments, self._kept)
            else:
                where = f"on {self._pipe.device} in {str(self._pipe.dtype).removeprefix('torch.')}"
                with self._screen.stages(f"{job.title}, seed {seed}, {where}") as bars:
                    result = self._pipe(self._encoded[job.text], seed=seed, callback=bars.step, progress=bars.progress, **arguments)
            try:
                path = save_video(result.frames[0], claimed.path, job.options.fps, comment=recipe_for(job, seed, self._pipe))
            except OSError as error:
                raise OSError(f"{error} {self._kept.keep_of(result.latents, '_finished')}") from error
            # The finished video stands, whatever fails beside it.
            problems = [save_prompt(path, result.prompt.text)]
            try:
                self._ledger.add(job.key, path, job.number, seed, job.asked)
            except OSError as error:
                problems.append(f"{path} is finished; that it is could not be recorded ({error}), so that the same command makes it again.")
            try:
                if job.options.save_latents:
                    save_latents(path.with_suffix(SUFFIX), self._pipe.latents.to_codec(result.latents))
            except OSError as error:
                problems.append(f"{path} is finished; its latents could not be written beside it ({error.strerror or error}).")
            self._screen.finished(str(path))
            for problem in filter(None, problems):
                say(problem)

    def _try(self, jobs: list[Job], work: Callable[[], None]) -> None:
        """Do some work; where it fails, these jobs have, and the others go on. A refusal or a defect is raised where all jobs are one request."""
        try:
            work()
            return
        except BrokenPipeError:  # whoever read the paths is gone
            raise
        except KeyboardInterrupt:
            if self._kept is not None and self._kept.sentence:
                say(self._kept.sentence)
            raise
        except (DecodeOutOfMemory, NotNumbers) as error:
            sentence = f"{error} {self._kept.keep_of(error.latents)}"
        except (OpenSoraError, OSError, MemoryError, RuntimeError) as error:
            why = failure(error)
            if why is None and self._is_one_request:
                raise
            if why is None and not isinstance(error, OpenSoraError):  # a defect, which should show where
                say(traceback.format_exc())
                why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            sentence = " ".join(filter(None, [why or str(error), self._kept and self._kept.sentence]))
        for job in jobs:
            self.failed[job.name] = sentence
            self._screen.failed(f"error: {job.name} failed: {sentence}")


def failure(error: Exception) -> str | None:
    """One sentence for a failure that is the machine's; None for a refusal, and for a defect of ours."""
    if isinstance(error, OutOfMemory):
        return str(error)
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "the device ran out of memory; try --offload minimal, --decode-policy low_memory, or a smaller or shorter video."
    if is_out_of_memory(error):
        return ran_out("the machine", torch.device("cpu"), "try --dtype bf16, --decode-policy low_memory, or a smaller or shorter video")
    return (str(error).strip().splitlines() or [type(error).__name__])[0] if isinstance(error, OSError) else None
