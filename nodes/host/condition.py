"""What travels with a CONDITIONING: the text encoders' outputs and the given latent frames, under the host's own keys.

`concat_latent_image` holds raw VAE latents, `concat_mask` is 1 where a latent pixel is to be made: the host's
convention, which stock image-to-video and inpainting nodes follow too. How a run uses them travels under a key of
our own, which our guider alone reads.
"""

from collections.abc import Callable
from dataclasses import dataclass

import comfy.utils
import torch
import torch.nn.functional as F
from torch import Tensor

from ...opensora_core.errors import OpenSoraError
from ...opensora_core.family import NetworkSizes
from ...opensora_core.sampling.given import ImageCondition, put_back
from ...opensora_core.sampling.guidance import PICTURES, ReferenceUse

NULL_KEY = "open_sora_null"  # the model's own null caption stands in the text's place
STEPS_KEY = "open_sora_steps"  # a run of ours lets given frames enter at every step
BLANK_KEY = "open_sora_blank"  # where frames are given is told, and they are not
FPS_KEY = "open_sora_fps"
SCALE_KEY = "open_sora_condition_scale"  # a word of choices.CONDITION_SCALES
LATENT_KEY, MASK_KEY, USE_KEY = _KEYS = "concat_latent_image", "concat_mask", "open_sora_use"
_ENCODE = "encode the prompt with Open-Sora Text Encode, or with CLIPTextEncode from DualCLIPLoader of type flux"


def not_its_steps(title: str, is_learned: bool) -> OpenSoraError:
    """What is said of a sampler that is not ours. title: of the model's row. is_learned: the variance is; else frames are given."""
    name = title.removeprefix("the ").removesuffix(" transformer")
    what = (
        f"{name} takes its own steps, with the variance that it has learned"
        if is_learned
        else f"Frames that are given enter {name} at every step"
    )
    return OpenSoraError(
        f"{what}, which this sampler does not do; use Open-Sora Sampler, or the sampler of Open-Sora Defaults with Open-Sora Scheduler and Guider."
    )


@dataclass(frozen=True)
class Reference:
    """Given latent frames, as a CONDITIONING carries them.

    latents: [B or 1, C, T, H, W], unscaled VAE latents.
    mask: [B or 1, 1, T, H, W], 1 = to be made; None = everything is given as far as `latents` reach.
    use: how a run uses them.
    """

    latents: Tensor
    mask: Tensor | None
    use: ReferenceUse = PICTURES

    @property
    def names(self) -> list[str]:
        """What is given, by the names that OpenSoraPipeline has for it."""
        if self.use.is_clip:
            return ["video"]
        if self.mask is None or self.mask.ndim < 5:
            return ["image"]
        given = self.mask.float().amin((0, 1, 3, 4)) < 1
        return ["image"] * bool(given[0]) + ["last_image"] * bool(given[1:].any())

    @classmethod
    def of(cls, values: dict) -> "Reference | None":
        """The reference in one entry's dictionary, or None."""
        latents = values.get(LATENT_KEY)
        return None if latents is None else cls(latents, values.get(MASK_KEY), values.get(USE_KEY, PICTURES))

    def check(self, latent_shape: tuple[int, ...]) -> None:
        """Raise an OpenSoraError unless the reference fits clips of [B, C, T, H, W]."""
        found = tuple(self.latents.shape)
        if len(found) != 5 or found[1] != latent_shape[1] or found[3:] != latent_shape[3:] or found[2] > latent_shape[2]:
            raise OpenSoraError(
                f"The reference picture's latent is {list(found)} and the clip's {list(latent_shape)}; "
                "give Open-Sora Image to Video the same LATENT as the sampler."
            )
        if found[0] not in (1, latent_shape[0]):
            raise OpenSoraError(f"{found[0]} reference pictures for a batch of {latent_shape[0]} videos; give 1 or {latent_shape[0]}.")

    def fit(self, latent_shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """(known [B, 1, T, H, W], 1 = given; latents [B, C, T, H, W], unscaled), both of the batch's size; errors as check's."""
        self.check(latent_shape)
        batch, _, frames, *size = latent_shape
        latents = self.latents.float()
        given = latents.shape[2]
        known = latents.new_ones(1, 1, given, *size) if self.mask is None else 1.0 - self._latent_mask(given, size).to(latents)
        missing = (0, 0, 0, 0, 0, frames - given)  # a shorter reference is the beginning of the clip
        known, latents = F.pad(known, missing)[:, :, :frames], F.pad(latents, missing)
        return comfy.utils.repeat_to_batch_size(known, batch), comfy.utils.repeat_to_batch_size(latents, batch)

    def _latent_mask(self, given: int, size: list[int]) -> Tensor:
        """The mask at the latent's resolution, `given` frames or as many as it has of the clip; values are 0 or 1."""
        mask = self.mask.float()
        if mask.ndim < 5:  # stock inpainting: [frames, (1,) H, W] in pixels; its nearest frames stand for the latent ones
            mask = mask.reshape(1, 1, -1, *mask.shape[-2:])
        mask = mask[:, :1]
        if list(mask.shape[3:]) != size or mask.shape[2] < given:
            mask = F.interpolate(mask, size=(max(given, 1), *size), mode="nearest")
        return mask.round()

    def edit(self, latent_shape: tuple[int, ...]) -> Tensor:
        """[B, T]: how far each latent frame may be edited, 0 (kept) to 1 (made); the strength holds it for that share of the time."""
        self.check(latent_shape)
        batch, _, frames, *_ = latent_shape
        given = self.latents.shape[2]
        made = self.latents.new_zeros(1, given) if self.mask is None else self.mask.float()[:, 0].amin((-2, -1))
        edit = 1 - (1 - F.pad(made, (0, frames - made.shape[1]), value=1.0)) * self.use.strength
        return comfy.utils.repeat_to_batch_size(edit.to(self.latents.device, self.latents.dtype), batch)

    def condition(self, latent_shape: tuple[int, ...], process: Callable[[Tensor], Tensor]) -> ImageCondition:
        """This reference as the library's ImageCondition. process: from the VAE's scale to the transformer's."""
        known, latents = self.fit(latent_shape)
        edit = self.edit(latent_shape)
        known = (edit[:, None, :, None, None].to(known) < 1).expand_as(known).to(known.dtype)
        return ImageCondition(known, process(latents), self.use, edit if self.use.is_held else None)

    def restore(self, latents: Tensor) -> Tensor:
        """Put the given latent frames back into finished, unscaled latents [B, C, T, H, W], in every item of the batch, if their use says so."""
        return put_back(latents, *self.fit(tuple(latents.shape))) if self.use.is_restored else latents


def reference_of(conditioning: list) -> Reference | None:
    """The first reference that a CONDITIONING ([tensor, values] pairs) carries, or None."""
    return next((Reference.of(values) for _, values in conditioning if values.get(LATENT_KEY) is not None), None)


def with_reference(conditioning: list, reference: Reference, over: bool = True) -> list:
    """A copy of a CONDITIONING whose entries carry a reference; over: also those that have one of their own."""
    given = {LATENT_KEY: reference.latents, MASK_KEY: reference.mask, USE_KEY: reference.use}
    given = {key: value for key, value in given.items() if value is not None}
    return [[context, values if LATENT_KEY in values and not over else {**_bare(values), **given}] for context, values in conditioning]


def with_condition(conditioning: list, condition: ImageCondition) -> list:
    """A copy of a CONDITIONING whose entries carry given latent frames, unscaled; none where they are not used at all."""
    if condition.use.strength == 0:
        return without_reference(conditioning)
    # The host's convention: 1 = to be generated. Its context windows and stock image nodes read both keys too.
    made = 1 - condition.mask
    if condition.edit is not None:
        made = condition.edit[:, None, :, None, None].to(made).expand(made.shape)
    return with_reference(conditioning, Reference(condition.latents, made, condition.use))


def marked(conditioning: list, **marks: bool | str) -> list:
    """A copy of a CONDITIONING whose entries say something more."""
    return [[context, {**values, **marks}] for context, values in conditioning]


def nothing(conditioning: list) -> list:
    """A copy of a CONDITIONING with zeros for what the encoders read."""

    def zeros(values: dict) -> dict:
        pooled = values.get("pooled_output")
        return values if pooled is None else {**values, "pooled_output": torch.zeros_like(pooled)}

    return [[torch.zeros_like(context), zeros(values)] for context, values in conditioning]


def without_reference(conditioning: list) -> list:
    """A copy of a CONDITIONING whose entries carry no reference."""
    return [[context, _bare(values)] for context, values in conditioning]


def _bare(values: dict) -> dict:
    return {key: value for key, value in values.items() if key not in _KEYS}


def check_conditioning(name: str, conditioning: list, config: NetworkSizes) -> None:
    """Raise an OpenSoraError unless every entry holds what T5 and CLIP-L give this transformer."""
    if not conditioning:
        raise OpenSoraError(f"The {name} conditioning is empty; {_ENCODE}.")
    for context, values in conditioning:
        check_text(context, values.get("pooled_output"), config, name)


def check_text(context: Tensor | None, pooled: Tensor | None, config: NetworkSizes, name: str = "given") -> None:
    """Raise an OpenSoraError unless context is [B, tokens, context_in_dim] and pooled [B, vec_in_dim]."""
    wanted = [("conditioning is not from T5-XXL: its text", context, 3, config.context_in_dim)]
    if getattr(config, "vec_in_dim", None) is not None:
        wanted.append(("conditioning lacks CLIP-L: its pooled output", pooled, 2, config.vec_in_dim))
    for what, tensor, rank, width in wanted:
        if tensor is None or tensor.ndim != rank or tensor.shape[-1] != width:
            found = "missing" if tensor is None else f"{tensor.shape[-1]} wide"
            raise OpenSoraError(f"The {name} {what} is {found}, this model reads {width}; {_ENCODE}.")
