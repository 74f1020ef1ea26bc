"""`generate --t2i2v`: the pictures that videos begin with, drawn by Flux before the video's model is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import OpenSoraError
from ..geometry import ASPECT_RATIOS, nearest_aspect_ratio, training_ratios
from ..media.video import save_video
from ..names import claim_unused
from ..pipeline import OpenSoraPipeline
from ..run.picture import PictureRequest, check_seed
from ..run.request import EncodedPrompt
from .extend import Text
from .ledger import Ledger
from .options import GenerateOptions, PictureOptions, changed
from .output import say
from .progress import Screen

_IN_FOLDER = {"flux": "flux1-dev.safetensors", "flux_vae": "flux1-dev-ae.safetensors"}  # as in the hub repository


@dataclass(frozen=True, kw_only=True)
class PictureJob:
    """A picture to draw, for one or more videos.

    prompt: read as it is. asked: all that it depends on, in JSON's terms; a seed that was not given is None. name: for messages.
    file: to write, numbered if it is there. key: what the ledger knows it by. number: the row that asks for it first.
    """

    prompt: str
    request: PictureRequest
    seed: int
    asked: dict[str, Any]
    name: str = ""
    file: Path = Path()
    key: str = ""
    number: int = 0

    @property
    def text(self) -> Text:
        return self.prompt, "", None


def draw(pipe: OpenSoraPipeline, ledger: Ledger, screen: Screen, pictures: list[PictureJob], encoded: Mapping[Text, EncodedPrompt]) -> None:
    """Draw pictures, Flux read once for all; write each, and say and record where it is."""
    screen.at_work = ""
    asked = [(encoded[one.text], one.request, one.seed) for one in pictures]
    names = ", ".join(one.name for one in pictures)
    with screen.stages(f"picture{'s' * (len(pictures) > 1)} of {names}, by Flux") as bars:
        drawn = pipe.paint(asked, bars.progress)
    for one, picture in zip(pictures, drawn, strict=True):
        with claim_unused(one.file) as claimed:
            path = save_video(picture, claimed.path)
        ledger.add(one.key, path, one.number, one.seed, one.asked)
        say(f"picture of {one.name}: {path}")


def picture_job(options: GenerateOptions, arguments: dict[str, Any], seed: int) -> PictureJob:
    """The picture of a video, in the video's shape, at a size of its own; its name, file and key are still to be given.

    arguments: of the call that makes the video. seed: of the video.
    """
    if options.image_seed is not None:
        check_seed("image_seed", options.image_seed)
        seed = options.image_seed
    known, ratio = training_ratios(options.image_resolution), options.aspect_ratio
    if ratio not in ASPECT_RATIOS:
        ratio = nearest_aspect_ratio(arguments["height"], arguments["width"], known)
    how = {"steps": options.image_steps, "guidance": options.flux_guidance, "schedule": options.flux_schedule}
    request, prompt = PictureRequest.for_ratio(ratio, options.image_resolution, **how), options.image_prompt or options.prompt
    asked = {"prompt": prompt, "seed": options.seed if options.image_seed is None else options.image_seed, **vars(request)}
    return PictureJob(prompt=prompt, request=request, seed=seed, asked=asked)


def flux_files(options: GenerateOptions) -> list[Path]:
    """Flux's transformer and its VAE: named, or in the model's folder."""
    folder = None if options.model in (None, "small") else Path(options.model).expanduser()
    found = []
    for name, file in _IN_FOLDER.items():
        given = getattr(options, name)
        if given is None and (folder is None or not (folder / file).is_file()):
            where = f", and {options.model} holds no {file}" if folder is not None else ""
            raise OpenSoraError(f"--t2i2v needs Flux's files{where}; give --flux FILE and --flux-vae FILE.")
        found.append(folder / file if given is None else Path(given).expanduser())
    return found


def check_given(options: GenerateOptions) -> None:
    """Refuse options that do not go with --t2i2v, or not without it."""
    if options.t2i2v and (options.ref is not None or options.cond_type is not None):
        raise OpenSoraError("--t2i2v draws the first frame; leave out --ref and --cond-type.")
    of_pictures = changed(options, PictureOptions)
    if of_pictures and not options.t2i2v:
        raise OpenSoraError(f"{of_pictures[0]} is of the picture that Flux draws; add --t2i2v.")
