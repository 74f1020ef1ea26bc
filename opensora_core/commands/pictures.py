"""`generate --t2i2v`: the pictures that videos begin with, drawn by Flux before the video's model is read."""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from ..errors import OpenSoraError
from ..geometry import ASPECT_RATIOS, nearest_aspect_ratio, training_ratios
from ..media.video import IMAGE_SUFFIX, save_video, unused_path
from ..pipeline import OpenSoraPipeline
from ..run.picture import PictureRequest, check_seed
from ..run.request import EncodedPrompt
from .failures import failure
from .options import CallSettings, say
from .progress import Bars

_IN_FOLDER = {"flux": "flux1-dev.safetensors", "flux_vae": "flux1-dev-ae.safetensors"}  # as in the hub repository


class Pictures:
    """The first frames of one command's videos.

    Raises:
        OpenSoraError: files, settings or a video that cannot be, before any weight is read.
    """

    def __init__(self, args: argparse.Namespace, settings: CallSettings, pipe: OpenSoraPipeline):
        self.are_wanted = args.t2i2v
        self._args, self._settings, self._pipe = args, settings, pipe
        self._drawn: list[Tensor] = []
        if not self.are_wanted:
            return
        self._request = picture_request(args, settings)
        pipe.load_flux(*flux_files(args))
        check_drawn(pipe, args.prompt, settings)

    def draw(self, folder: Path) -> str | EncodedPrompt | None:
        """Draw all of them and write each to `folder`.

        Returns:
            The videos' prompt: encoded together with the pictures', or as it is where none is wanted; None where drawing failed,
            which is said.
        """
        if not self.are_wanted:
            return self._args.prompt
        args, arguments = self._args, self._settings.arguments
        seeds = [self._settings.seed + index for index in range(args.num_samples)] if args.image_seed is None else [args.image_seed]
        size = f"{self._request.height}x{self._request.width} (height x width)"
        try:
            with Bars(f"picture{'s' if len(seeds) > 1 else ''} of {size}, seed {', '.join(map(str, seeds))}, by Flux") as bars:
                self._drawn, prompt = self._pipe.draw(
                    args.prompt,
                    seeds,
                    self._request,
                    picture_prompt=args.image_prompt,
                    negative_prompt=arguments["negative_prompt"],
                    options=arguments["options"],
                    progress=bars.progress,
                )
            for seed, picture in zip(seeds, self._drawn, strict=True):
                path = save_video(picture, unused_path(folder / f"picture_seed_{seed}{IMAGE_SUFFIX}"))
                say(f"picture of seed {seed}: {path}")
        except (OSError, MemoryError, RuntimeError) as error:
            sentence = failure(error)
            if sentence is None:
                raise
            say(f"error: the picture failed: {sentence}")
            return None
        return prompt

    def first_frame(self, index: int) -> dict[str, Tensor]:
        """What the pipeline's call for video `index` is given; nothing without --t2i2v."""
        return {"image": self._drawn[min(index, len(self._drawn) - 1)]} if self.are_wanted else {}


def picture_request(args: argparse.Namespace, settings: CallSettings) -> PictureRequest:
    """How the picture of a video is drawn: in the video's shape, at a size of its own.

    Raises:
        OpenSoraError: settings that Flux cannot be asked for.
    """
    if args.image_seed is not None:
        check_seed("image_seed", args.image_seed)
    height, width = settings.arguments["height"], settings.arguments["width"]
    known = training_ratios(args.image_resolution)
    ratio = args.aspect_ratio if args.aspect_ratio in ASPECT_RATIOS else nearest_aspect_ratio(height, width, known)
    return PictureRequest.for_ratio(
        ratio, args.image_resolution, steps=args.image_steps, guidance=args.flux_guidance, schedule=args.flux_schedule
    )


def check_drawn(pipe: OpenSoraPipeline, prompt: str, settings: CallSettings) -> None:
    """Raise an OpenSoraError unless the video can begin with a picture that is still to be drawn."""
    blank = torch.zeros(1, settings.arguments["height"], settings.arguments["width"], 3)
    pipe(prompt, seed=settings.seed, check_only=True, **settings.arguments | {"image": blank})


def flux_files(args: argparse.Namespace) -> list[Path]:
    """Flux's transformer and its VAE: named, or in the model's folder.

    Raises:
        OpenSoraError: neither.
    """
    return [_file(args, name) for name in _IN_FOLDER]


def _file(args: argparse.Namespace, name: str) -> Path:
    given = getattr(args, name)
    if given is not None:
        return Path(given).expanduser()
    model = args.model
    inside = Path(model).expanduser() / _IN_FOLDER[name] if model not in (None, "small") else None
    if inside is not None and inside.is_file():
        return inside
    where = f"; {model} holds no {_IN_FOLDER[name]}" if inside is not None else ""
    raise OpenSoraError(f"--t2i2v needs Flux's files, --flux FILE and --flux-vae FILE{where}.")


def check_given(args: argparse.Namespace) -> None:
    """What does not go together with --t2i2v, or not without it.

    Raises:
        OpenSoraError: names the argument.
    """
    if args.t2i2v:
        if args.ref is not None or args.cond_type is not None:
            raise OpenSoraError("--t2i2v draws the first frame; leave out --ref and --cond-type.")
        return
    for name, default in args.picture_defaults.items():
        if getattr(args, name) != default:
            raise OpenSoraError(f"--{name.replace('_', '-')} is of the picture that Flux draws; add --t2i2v.")
