"""What a model is: a frozen row that names its parts. The rows stand in families/; nothing else knows a model.

Four things vary independently (network, codec, text, sampling), so a row is put together from parts and inherits from nothing.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from re import Pattern
from typing import TYPE_CHECKING, Any, Protocol

from .errors import OpenSoraError
from .geometry import Grid
from .shapes import AS_RELEASED, Layout, Manifest, Shapes, manifest_of
from .text.recipe import TextRecipe

QUANTISED_GROUPS = ("attention", "mlp")  # of every family's linear layers, what is quantised where nothing else is asked for

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from .sampling.guidance import ReferenceUse
    from .sampling.longer import LongRule
    from .sampling.run import SamplingRecipe


class NetworkSizes(Protocol):
    """Sizes of a network that denoises, frozen and hashable.

    in_channels, patch_size: channels of the latents; latent pixels of a token's side. grid: how it counts frames, pixels, latents and tokens.
    """

    in_channels: int
    patch_size: int
    grid: Grid

    def with_blocks(self, most: int) -> "NetworkSizes":
        """These sizes with at most so many blocks of each kind; blocks are alike, so that a few tell what each needs."""

    def words(self) -> str:
        """For people: "hidden 3072, 24 heads of 128, 19 double and 38 single blocks"."""


class Network(Protocol):
    """A network that denoises. It is called as network(x, timestep, **named inputs, transformer_options).

    dtype: what it is to be called in. piece_tokens: tokens that a layer takes at a time at most; far above them activations grow as a line.
    """

    config: NetworkSizes
    dtype: "torch.dtype"
    piece_tokens: int

    def blocks(self) -> "Sequence[nn.Module]":
        """The large repeated parts in the order in which they run: what is streamed, planned and quantised."""


@dataclass(frozen=True)
class Clip:
    """What a model is usually asked for, the released configuration's: pixels, frames, frames per second, steps, guidance scales."""

    height: int
    width: int
    num_frames: int
    fps: float
    num_steps: int
    scales: tuple[float, ...]

    @property
    def size(self) -> tuple[int, int, int]:
        """(height, width, frames)."""
        return self.height, self.width, self.num_frames


@dataclass(frozen=True)
class Drawing:
    """How a model draws the picture that a video begins with. is_distilled: of dev, from guidance; False: schnell.

    Attributes:
        resolution: of the picture where none is asked for, upstream's whatever the video's is.
        num_steps: (steps asked for or 0, is_distilled) -> steps.
        schedule_name: (one of PICTURE_SCHEDULES, is_distilled) -> which of them auto is.
        shift: (one of PICTURE_SCHEDULES, tokens, is_distilled) -> the shift of the schedule. All raise an OpenSoraError for what is not known.
    """

    resolution: str
    num_steps: Callable[[int, bool], int]
    schedule_name: Callable[[str, bool], str]
    shift: Callable[[str, int, bool], float]


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """A network of which there are files: how one is known, what its sizes are, how it is built. A codec's row is one; what a codec offers, codecs/codec.py says.

    Attributes:
        kind: one word for code, used nowhere else.
        title: for people, of the released sizes; fits after "is".
        other: the title of other sizes, to which they are added; "" where the title says enough.
        place: for people, "which ...": where the file belongs.
        repositories: names under which it is published, of hub repositories or of single files.
        slot: which file of a model's folder it is: "transformer", "vae", "flux", the painter's ("flux_vae"); "" if it is only known by sight.
        keys: tensors that every file of it has ("a|b" is either), whatever the prefix.
        config: sizes from shapes without prefix; None for another model's file that has the same keys.
            Raises a CheckpointError where they cannot be.
        owns: whether sizes are this row's, where several rows share a network.
        released, also_released: the sizes of the released file, and of others that were. dtype: what that file is stored in, as safetensors has it.
        build: (config, operations, attention, dtype, device) -> the module; a codec takes no attention.
        layouts: how files keep it; the last is taken where no other one's mark is there.
    """

    kind: str
    title: str
    other: str = ""
    place: str = "which belongs in the VAE slot (models/vae in ComfyUI)"
    slot: str = "vae"
    keys: tuple[str, ...]
    config: Callable[[Shapes], Any]
    owns: Callable[[Any], bool] = lambda config: True
    released: Any
    also_released: tuple[Any, ...] = ()
    dtype: str = "BF16"
    repositories: tuple[str, ...] = ()
    build: Callable[..., Any]
    layouts: tuple[Layout, ...] = (AS_RELEASED,)

    def layout_of(self, shapes: Shapes) -> Layout:
        """How a file keeps its tensors, from its shapes without prefix."""
        return next((layout for layout in self.layouts if layout.mark in shapes), self.layouts[-1])

    def manifest(self, config: Any, layout: Layout | None = None) -> Manifest:
        """Every tensor of a file of these sizes, from the module itself on meta."""
        return (layout or self.layouts[-1]).manifest(manifest_of(self.build(config, device="meta")))


@dataclass(frozen=True, kw_only=True, eq=False)
class Family(Part):
    """A model that makes videos or pictures.

    Attributes:
        groups: its linear layers by what they do, patterns of whole names: "attention", "mlp", and others of the network's own.
        example: (config, latent_shape [B, C, T, H, W], text_length, dtype, device) -> the named inputs of a forward. Numbers of one dimension
            have usual values, the others are not set.
        codecs: kinds of codec whose latents it works on, the usual one first.
        grid: how it counts frames, pixels, latents and tokens.
        usual: the released configuration.
        text: how it reads prompts.
        sampling: how a run of it goes: process, schedule, solvers, given frames, inputs of a pass.
        zero_at_first: weights that are zero before training.
        plain: layers that compute with plain weights even where a file holds them quantised.
        latent_scale: what the codec's latents are multiplied by for this network, where the codec's file does not tell; 0 = it does.
        is_straight: whether what a forward needs is a line in its tokens, above some thousands, whatever their extent.
        takes, requires: what may, and what must, be given besides a prompt, by the names that OpenSoraPipeline has for it.
        longer: how finished videos of it go on; None where they cannot.
        suits: (height, width, frames) -> what to tell a person who asks for what it was not trained on; "" otherwise. Raises an
            OpenSoraError for what it cannot make.
        draws: how it draws a picture for a video to begin with; None for models of videos.
        lora_key: a key of a LoRA file as checkpoint/lora.py reads it.
    """

    place: str = "which belongs in the model slot (models/diffusion_models in ComfyUI)"
    slot: str = "transformer"
    groups: Mapping[str, Pattern]
    example: "Callable[..., dict[str, Tensor]]"
    codecs: tuple[str, ...]
    grid: Grid
    usual: Clip
    text: TextRecipe
    sampling: "SamplingRecipe"
    zero_at_first: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    latent_scale: float = 0.0
    is_straight: bool = True
    takes: tuple[str, ...] = ("image", "last_image", "video")
    requires: tuple[str, ...] = ()
    longer: "LongRule | None" = None
    draws: Drawing | None = None
    suits: Callable[[int, int, int], str] = lambda height, width, num_frames: ""
    lora_key: Callable[[str], str] = lambda key: key

    def check_given(self, given: Iterable[str], use: "ReferenceUse") -> None:
        """Raise an OpenSoraError unless the model can make use of all that is given, by name, and lacks nothing."""
        given, alone = tuple(given), "a prompt alone" if not self.takes else f"a prompt and {' or '.join(self.takes)}"
        for name in given:
            if name not in self.takes:
                raise OpenSoraError(f"This model is {self.title}, which makes videos of {alone}; leave out {name}, or use another model.")
        for name in self.requires:
            if name not in given:
                raise OpenSoraError(f"This model is {self.title}, which makes videos of a picture; give a picture ({name}).")
            if use.strength < 1:
                raise OpenSoraError(f"This model is {self.title}, which sees its picture at every step; leave the strength at 1.")
        if given and use.is_whole and use.strength == 1:
            raise OpenSoraError(
                f"This model is {self.title}, which makes a clip over; use a strength below 1, such as the published 0.2 (1 is the clip as it is)."
            )

    def check_longer(self) -> "LongRule":
        """How finished videos of this model go on. Raises an OpenSoraError where they cannot."""
        if self.longer is None:
            raise OpenSoraError(
                f"This model is {self.title}, which reads text alone and goes on from no video; use a picture-to-video model."
            )
        return self.longer

    def group_of(self, layer: str) -> str | None:
        """The group that a linear layer belongs to, or None if it is no such layer."""
        return next((group for group, pattern in self.groups.items() if pattern.fullmatch(layer)), None)

    def layers_to_quantise(self, shapes: Shapes, groups: Iterable[str] = QUANTISED_GROUPS) -> list[str]:
        """Names of the linear layers in some groups, from the tensors of a file or module by name."""
        layers = (key.removesuffix(".weight") for key, shape in shapes.items() if key.endswith(".weight") and len(shape) == 2)
        return [layer for layer in layers if self.group_of(layer) in groups]
