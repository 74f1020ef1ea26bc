"""`generate`: a prompt, or a table of them, and pictures if given, to video files."""

import logging
from dataclasses import replace
from pathlib import Path

from ..errors import OpenSoraError
from ..media.latent_file import read_latents
from ..media.video import IMAGE_SUFFIX, VIDEO_SUFFIX, check_can_be_written, save_video
from ..memory.component import resolve_device
from ..names import Claim, check_name, claim_unused, taken_by
from ..parallel import Group, together
from ..pipeline import OpenSoraPipeline
from ..run.request import random_seed
from ..sampling.solvers import MAX_SEED
from . import table
from .extend import Longer
from .frames import call_arguments
from .guides import understood
from .jobs import Job, Jobs
from .ledger import Ledger
from .model import device_of, pipeline, with_usual
from .options import DONE, SOME_FAILED, ExtendOptions, GenerateOptions, changed
from .output import check_count, check_writable, say
from .pictures import check_given, flux_files, picture_job
from .progress import Screen
from .refine import check as check_refine, refined_jobs


def run(options: GenerateOptions) -> int:
    """Make `--num-samples` videos, or one for each row, each written as soon as it is done; paths go to standard output.

    A video that fails for want of memory or disk is named on standard error and the others still run.
    """
    check_refine(options)
    extending = changed(options, ExtendOptions)
    if options.csv is not None and extending:
        raise OpenSoraError(f"{extending[0]} makes one prompt's video longer; leave it out beside --csv.")
    if options.csv is not None:
        return table.run(options)
    if options.shard is not None:
        raise OpenSoraError(f"--shard {options.shard} shares out the rows of a table; give it with --csv.")
    with together(resolve_device(device_of(options.device))) as group:
        if group is None or not group.rank:
            return _make(options, extending, group) if options.decode is None else _decode(options, group)
        # The share of a process that is not the first: no prompt, no file, no line.
        logging.getLogger(__package__.rpartition(".")[0]).setLevel(logging.ERROR)
        pipeline(options).use_group(group).help()
        return DONE


def _make(options: GenerateOptions, extending: list[str], group: Group | None) -> int:
    if extending and options.extend is None:
        raise OpenSoraError(f"{extending[0]} goes with --extend N, the number of segments to add; add that.")
    screen, target = Screen(), Target(options)
    check_count("--num-samples", options.num_samples)
    prompts = [options.prompt] if options.prompt_path is None else table.read_lines(options.prompt_path)
    if options.t2i2v and len(prompts) > 1:
        raise OpenSoraError("--t2i2v draws the picture of one prompt; give --csv in place of --prompt-path for several.")
    check_given(options)
    pipe = pipeline(options)
    seed = random_seed() if options.seed is None else options.seed
    jobs: list[Job] = []
    for prompt in prompts:
        jobs += _jobs(replace(options, prompt=prompt, seed=seed), pipe, target, screen, len(prompts) * options.num_samples, len(jobs))
        # What a size comes to is said with the first prompt alone.
        size = {name: jobs[0].arguments[name] for name in ("height", "width")} | {"num_frames": str(jobs[0].arguments["num_frames"])}
        options = replace(options, **size, resolution=None, aspect_ratio=None, image_size=None, aspect_order=None)
    if options.refine_prompt:
        jobs = refined_jobs(jobs, options, pipe)
    if group is not None:
        pipe.use_group(group)
    with screen:
        making = Jobs(pipe, Ledger(target.folder, is_written=False), screen, is_one_request=len(prompts) == 1 or group is not None)
        making.run(jobs)
    if making.failed:
        say(f"{len(making.failed)} of {len(jobs)} videos failed")
    return SOME_FAILED if making.failed else DONE


class Target:
    """The file or the folder to write to, and what files in it begin with. Raises an OpenSoraError for a file of another kind."""

    def __init__(self, options: GenerateOptions):
        self._name = name = options.sample_name or "video"
        self.path, self._is_told = check_name(options.out, "--out"), False
        self.is_folder = self.path.is_dir() or not self.path.suffix
        self.folder = self.path if self.is_folder else self.path.parent
        check_name(f"{name}_0000{VIDEO_SUFFIX}", "--sample-name")
        if not self.is_folder and self.path.suffix.lower() not in (VIDEO_SUFFIX, IMAGE_SUFFIX):
            raise OpenSoraError(
                f"--out {options.out} ends in {self.path.suffix}; give a folder, or a file ending in {VIDEO_SUFFIX} ({IMAGE_SUFFIX} for one frame)."
            )

    def free(self) -> Claim:
        """A name that nothing has: the next video_0000.mp4 of a folder; clip.mp4, clip_1.mp4, ... of a file. It is held until it is released."""
        if self.is_folder:
            return claim_unused(self.folder, lambda number: self.folder / f"{self._name}_{number:04d}{VIDEO_SUFFIX}")
        made = claim_unused(self.path)
        if made.path != self.path and not self._is_told:
            there = taken_by(self.path)
            say(f"{f'{there.name} is there already' if there else f'{self.path.name} is being made'}; writing {made.path.name}")
        self._is_told = True
        return made

    def some_file(self) -> Path:
        """A file like those that will be written."""
        return self.folder / f"{self._name}_0000{VIDEO_SUFFIX}" if self.is_folder else self.path


def _decode(options: GenerateOptions, group: Group | None) -> int:
    """Write the videos of finished latents, for which nothing is sampled."""
    target, pipe = Target(options), pipeline(options)
    options = with_usual(options, pipe.files.usual)
    latents = read_latents(check_name(options.decode, "--decode"))
    check_writable(target.folder, "" if target.is_folder else target.path.name)
    frames, height, width = pipe.frames_of(latents)
    if group is not None:
        pipe.use_group(group)
    check_can_be_written(target.some_file(), (frames, height, width), options.fps)
    with Screen() as screen:
        with screen.stages(f"{frames} frames of {width}x{height}") as bars:
            videos = pipe.decode(pipe.latents.to_model(latents), bars.progress)
        for video in videos:
            with target.free() as claimed:
                screen.finished(str(save_video(video, claimed.path, options.fps)))
    return DONE


def _jobs(options: GenerateOptions, pipe: OpenSoraPipeline, target: Target, screen: Screen, total: int, before: int) -> list[Job]:
    """Every video of a prompt, which differ by their seeds alone, checked before any weight is read. total, before: of all prompts."""
    count = options.num_samples
    options = understood(with_usual(options, pipe.files.usual), pipe.files.family)
    arguments = call_arguments(options, pipe.files)
    seed = options.seed
    if not 0 <= seed <= MAX_SEED - count + 1:
        raise OpenSoraError(f"--seed {seed} is out of range; use 0 to {MAX_SEED - count + 1}.")
    if target.path.suffix.lower() == IMAGE_SUFFIX and arguments["num_frames"] > 1:
        raise OpenSoraError(f"{arguments['num_frames']} frames do not fit in one picture; end --out in {VIDEO_SUFFIX}, or give a folder.")
    check_writable(target.folder, "" if target.is_folder else target.path.name)
    longer = Longer(options, arguments, pipe, screen) if options.extend is not None else None
    if options.t2i2v:
        pipe.load_flux(*flux_files(options))
    jobs = []
    for own in range(seed, seed + count):
        name, picture = f"video {before + own - seed + 1}", None
        if options.t2i2v:
            picture = picture_job(options, arguments, own)
            of_seed = f"seed {picture.seed}"
            picture = replace(picture, name=of_seed, key=of_seed, file=target.folder / f"picture_seed_{picture.seed}{IMAGE_SUFFIX}")
        about = {"options": options, "arguments": arguments, "place": target.free, "key": name, "picture": picture, "longer": longer}
        jobs.append(Job(name=f"{name} (seed {own})", title=f"{name} of {total}", seed=own, asked={"seed": own}, **about))
    jobs[0].check(pipe)
    check_can_be_written(target.some_file(), (arguments["num_frames"], arguments["height"], arguments["width"]), options.fps)
    return jobs
