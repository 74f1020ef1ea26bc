"""Which files hold a model's parts, and whether they are there and belong together. No weight is read here."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path

from ..checkpoint.detect import HALF, identify
from ..checkpoint.files import Halves, find_weights, read_network
from ..checkpoint.load import check_keys, open_decoder, open_model
from ..checkpoint.lora import changed_words, fitting_layers, shapes_of
from ..encoders.clip import open_clip
from ..encoders.t5 import open_t5
from ..encoders.tokens import find_tokenizer
from ..errors import CheckpointError, OpenSoraError
from ..families.table import FAMILIES, codecs_of, family_of
from ..family import Clip, Family, NetworkSizes
from ..geometry import Grid
from ..memory.loaded import FileStamp, stamp
from ..shapes import dim
from ..text.recipe import CLIP, T5

SMALL = Path(__file__).parent.parent / "assets" / "small"
PLANS = SMALL.parent / "plans"  # calibrated for the built-in model
SMALL_CLIP = (64, 64, 17)  # (height, width, frames) of the clips that the built-in model was trained on

_LAYOUT = {
    "dit": "Open_Sora_v2.safetensors",
    "vae": "hunyuan_vae.safetensors",
    "t5": "google/t5-v1_1-xxl",
    "clip": "openai/clip-vit-large-patch14",
}
_DIFFUSERS = {"dit": "transformer", "vae": "vae", "t5": "text_encoder"}  # of a model that reads no CLIP
_T5_REPOSITORIES = ("t5-v1_1-xxl", "t5_ckpts/t5-v1_1-xxl", "t5_ckpts")
# What the high-compression variant's own repository calls them; it has no text encoders, so theirs are laid beside it.
_HIGH_COMPRESSION = {"dit": "Open_Sora_v2_Video_DC_AE.safetensors", "vae": "F32T4C128_AE.safetensors"}


@dataclass(frozen=True)
class ModelFiles:
    """Where a model's parts are.

    dit, vae: weights files, or folders of them. t5, clip: files or hub folders; clip is None where the model reads none.
    tokenizers: a folder to look for both tokenizers in; None = beside the encoders.
    """

    dit: Path
    vae: Path | Halves
    t5: Path
    clip: Path | None
    tokenizers: Path | None = None

    def __post_init__(self):
        if isinstance(self.vae, Path) and self.vae.exists():
            object.__setattr__(self, "vae", whole_vae(self.vae))

    @classmethod
    def in_folder(cls, folder: str | Path, tokenizers: str | Path | None = None) -> "ModelFiles":
        """The files of a folder in the layout of the hub repository hpcai-tech/Open-Sora-v2, or of "small", the built-in model.

        Without that model's transformer, those of the high-compression variant (hpcai-tech/Open-Sora-v2-Video-DC-AE) are taken. A folder in
        the layout of the diffusers library, as CogVideoX is published, is known by its folder of the transformer; one of the repositories
        of Open-Sora 1.0 to 1.3, as their guides download them, by their names. Raises an OpenSoraError for what is not there.
        """
        if str(folder) == "small":
            if not SMALL.is_dir():
                raise OpenSoraError("The built-in model 'small' is not part of this copy; install it again, or give a folder as the model.")
            folder = SMALL
        folder = Path(folder).expanduser()
        if not folder.is_dir():
            hint = "; for a transformer's file give all four parts" if folder.is_file() else " (nothing is downloaded)"
            raise OpenSoraError(f"The model {folder} is not a folder; give a folder that holds {', '.join(_LAYOUT.values())}{hint}.")
        layout = _LAYOUT
        if (folder / "transformer").is_dir():
            own, layout = folder / "tokenizer", _DIFFUSERS
            tokenizers = tokenizers or (own if own.is_dir() else None)
        elif _in(folder, _HIGH_COMPRESSION["dit"]).exists() and not _in(folder, _LAYOUT["dit"]).exists():
            layout = {**_LAYOUT, **_HIGH_COMPRESSION}
        found = _published(folder) or {part: _in(folder, name) for part, name in layout.items()}
        if missing := [layout[part] for part, path in found.items() if not path.exists()]:
            raise OpenSoraError(f"The model folder {folder} lacks {', '.join(missing)}; download it whole, or name each part's file.")
        return cls(**{"clip": None, **found}, tokenizers=None if tokenizers is None else Path(tokenizers))

    @property
    def family(self) -> Family:
        """The row of the transformer. Its header is read once, and again only if the file is replaced. Raises a CheckpointError if it is none."""
        return _family_of(stamp(self.dit))

    @property
    def usual(self) -> Clip:
        """What the model is asked for where a person says nothing."""
        height, width, num_frames = SMALL_CLIP if self._is_small else self.family.usual.size
        return replace(self.family.usual, height=height, width=width, num_frames=num_frames)

    @property
    def grid(self) -> Grid:
        """How the transformer counts frames and pixels, from its file's header. Raises a CheckpointError if it is none."""
        return self.family.grid

    def clip_note(self, height: int, width: int, num_frames: int) -> str:
        """What to tell a person who asks for what the model was not trained on; "" otherwise. Raises an OpenSoraError for what it cannot make."""
        if not self._is_small:
            return self.family.suits(height, width, num_frames)
        if (height, width, num_frames) == SMALL_CLIP:
            return ""
        return (
            f"The built-in model was trained on clips of {SMALL_CLIP[1]}x{SMALL_CLIP[0]} pixels and {SMALL_CLIP[2]} frames; "
            f"{width}x{height} and {num_frames} frame{'s' * (num_frames > 1)} are made all the same, and are likely to show something else than what is asked for."
        )

    @property
    def _is_small(self) -> bool:
        return self.dit.parent == SMALL

    def check_exist(self) -> "ModelFiles":
        """Return self; an OpenSoraError names the first part that is not there."""
        for part in fields(self):
            path = getattr(self, part.name)
            if path is not None and not path.exists():
                raise OpenSoraError(f"{path} does not exist; give --{part.name} a file or folder that is there.")
        return self


def _in(folder: Path, name: str) -> Path:
    """A part of a model's folder: the file, or the index of its shards where it is in several."""
    index = folder / f"{name}.index.json"
    return index if index.is_file() and not (folder / name).exists() else folder / name


def _published(folder: Path) -> dict[str, Path] | None:
    """The parts of a folder that holds a model's repositories as they are called on the hub, each perhaps under its owner's name."""

    def place(names: tuple[str, ...]) -> Path | None:
        return next((path for name in names for path in sorted([*folder.glob(name), *folder.glob(f"*/{name}")])), None)

    for family in FAMILIES:
        dit = place(family.repositories)
        if dit is None:
            continue
        wanted = {"vae": codecs_of(family)[0].repositories, "t5": _T5_REPOSITORIES}
        found = {part: place(names) for part, names in wanted.items()}
        if missing := [names[0] for part, names in wanted.items() if found[part] is None]:
            raise OpenSoraError(f"{folder} holds {dit.name} and lacks {' and '.join(missing)}; put it beside, or name each part's file.")
        return {"dit": dit, **found}
    return None


def whole_vae(path: str | Path, pictures: str | Path | None = None) -> Path | Halves:
    """A VAE's path; of 1.2's temporal half with that of the picture VAE which it encodes the latents of.

    pictures: that one's file or folder; None = what lies beside the half and fits, the one that is called sdxl where there are several:
    Stable Diffusion's and SDXL's cannot be told apart by their tensors.
    Raises a CheckpointError where another file than a half's is named with `pictures`, or what is to stand beside it is not there.
    """
    path = Path(path).expanduser()
    try:
        half = read_network(path)
    except CheckpointError:  # said where it is read
        return path
    if identify(half.shapes).slot != HALF:
        return path
    if pictures is not None:
        found = [Path(pictures).expanduser()]
        if not _completes(half.shapes, found[0]):
            header = read_network(found[0])
            raise CheckpointError(
                f"{header.name} is {identify(header.shapes).title}; give SDXL's picture VAE, which {half.name} is used with."
            )
    else:
        places = [path, path.parent] if path.is_dir() else [path.parent]
        beside = [entry for place in places for entry in (*find_weights(place), *filter(Path.is_dir, sorted(place.iterdir())))]
        found = [entry for one in beside for entry in (one, one / "vae") if entry.exists() and _completes(half.shapes, entry)]
        if len(found) > 1:
            found = [entry for entry in found if "sdxl" in str(entry.relative_to(places[-1])).lower()] or found
    if len(found) == 1:
        return Halves(path, found[0])
    what = f"{len(found)} picture VAEs lie beside it, {', '.join(entry.name for entry in found)}" if found else "none lies beside it"
    raise CheckpointError(
        f"{half.name} is the temporal half of the Open-Sora 1.2 VAE, which is used with SDXL's picture VAE; {what}: put that one's file or folder "
        "there, with sdxl in its name, or name it (--ckpt-path-vae2d)."
    )


def _completes(half: Mapping[str, tuple[int, ...]], path: Path) -> bool:
    """Whether a file or folder holds what a VAE's half lacks."""
    try:
        other = read_network(path).shapes
    except CheckpointError:
        return False
    both = identify({**half, **other})
    return both.slot == "vae" and both.kind != identify(other).kind


@lru_cache(maxsize=32)
def _family_of(dit: FileStamp) -> Family:
    return open_model(dit.path, "transformer")[1].family


def check_files(files: ModelFiles) -> None:
    """Compare the parts by their headers, and find the tokenizers; no weight is read, and no file that was compared as it is before."""
    _compare(files, *(stamp(path) for path in vars(files).values() if path is not None))


@lru_cache(maxsize=64)
def _compare(files: ModelFiles, *stamps: FileStamp) -> None:
    model, codec = open_model(files.dit, "transformer")[1], open_model(files.vae, "vae")[1]
    if codec.kind not in model.family.codecs:
        wanted = codecs_of(model.family)[0].title
        raise CheckpointError(
            f"{files.vae.name} is {codec.row.title} and {files.dit.name} works on the latents of {wanted}; give the VAE the transformer was "
            "trained with."
        )
    transformer, vae = model.config, codec.config
    if vae.latent_channels != transformer.in_channels:
        raise CheckpointError(
            f"{files.vae.name} has {vae.latent_channels} latent channels and {files.dit.name} works on {transformer.in_channels}; "
            "give the VAE the transformer was trained with."
        )
    check_encoders(files, files.dit.name, transformer, "; give the encoders that the transformer was trained with.")
    find_tokenizer(T5, files.t5, files.tokenizers)
    if CLIP in model.family.text.encoders:
        find_tokenizer(CLIP, files.clip, files.tokenizers)


def check_encoders(files: ModelFiles, reader: str, sizes: NetworkSizes, end: str) -> None:
    """Compare the text encoders with what reads them; no weight is read.

    reader: the name of the file that reads them. sizes: of its network: context_in_dim and, where CLIP is read, vec_in_dim. end: of the sentence
    where they differ.
    """
    found = [(T5, files.t5, open_t5(files.t5)[1].d_model, sizes.context_in_dim)]
    if CLIP in family_of(sizes).text.encoders:
        if files.clip is None:
            raise CheckpointError(f"{reader} reads CLIP-L beside T5; give CLIP-L's file too (--clip).")
        found.append((CLIP, files.clip, open_clip(files.clip)[1].hidden_size, sizes.vec_in_dim))
    for kind, path, width, wanted in found:
        if width != wanted:
            raise CheckpointError(f"The {kind} encoder {path.name} gives {width} features and {reader} reads {wanted}{end}")


def check_lora(files: ModelFiles, path: str | Path) -> str:
    """For people: how many of the transformer's layers a LoRA changes. No weight of the transformer is read. Raises a CheckpointError if it is none."""
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"The LoRA {path} does not exist; check the path.")
    identity = open_model(files.dit, "transformer")[1]
    model = identity.row.build(identity.config, device="meta")
    return f"{path.name} {changed_words(fitting_layers(model, path), shapes_of(model))}"


def check_picture_files(dit: Path, vae: Path) -> NetworkSizes:
    """The sizes of a Flux transformer that can draw with this autoencoder, from the files' headers."""
    header, identity = open_model(dit, "flux")
    config = identity.config
    features = dim(header.shapes, f"{identity.prefix}img_in.weight", 1, 0)
    if features > config.packed_channels:
        raise CheckpointError(
            f"{header.name} is a Flux.1 transformer that also reads a picture ({features} features, not {config.packed_channels}), "
            "such as Fill, Canny or Depth; give flux1-dev or flux1-schnell."
        )
    check_keys(header, identity)
    channels = open_decoder(vae)[1].config.latent_channels
    if channels != config.in_channels:
        raise CheckpointError(
            f"{vae.name} has {channels} latent channels and {header.name} works on {config.in_channels}; give Flux's own (ae.safetensors)."
        )
    return config
