"""Which of the library's models the host knows, and how: a small row for each, from which the host's own classes are built.

`register` adds them to the host's list of known models, so that every stock loader (and everything that takes a MODEL: memory
management, LoRA, compilation, caching, context windows) works with them. The networks are the core's.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_detection
import comfy.supported_models
import comfy.supported_models_base
import comfy.text_encoders.flux
import comfy.text_encoders.sd3_clip
import torch
from torch import Tensor

from ...opensora_core import geometry
from ...opensora_core.checkpoint import detect
from ...opensora_core.checkpoint.load import compare
from ...opensora_core.codecs.codec import Latents
from ...opensora_core.errors import OpenSoraError
from ...opensora_core.families.table import FAMILIES, usual_codec
from ...opensora_core.family import Family, NetworkSizes
from ...opensora_core.shapes import Manifest, bare_shapes
from . import selftest
from .condition import BLANK_KEY, FPS_KEY, NULL_KEY, STEPS_KEY, Reference, check_text
from .network import HostMMDiT, HostSTDiT3


class CoreModel(selftest.base(comfy.model_base, "BaseModel")):
    """The host's model object around one of the library's networks."""

    def __init__(self, row: "HostRow", identity: detect.Identity, model_config, device=None):
        def build(dtype=None, device=None, operations=None, **detected):
            # `detected` is what the host's own detector says of these keys; the sizes are read from the tensors instead.
            return row.network(identity.config, operations, dtype, device)

        super().__init__(model_config, row.model_type, device=device, unet_model=build)
        self.family, self.config = identity.family, identity.config

    def resize_cond_for_context_window(self, cond_key, cond_value, window, x_in, device, retain_index_list=()):
        if cond_key in ("c_crossattn", "y", "attention_mask", "sizes"):
            return cond_value  # never cut in time, even where a width happens to equal the number of frames
        return super().resize_cond_for_context_window(cond_key, cond_value, window, x_in, device, retain_index_list=list(retain_index_list))


class BesideModel(CoreModel):
    """Where given frames travel beside the latents: CLIP pooled as `y`, condition channels in every pass."""

    def encode_adm(self, **kwargs):
        return kwargs.get("pooled_output")

    def extra_conds(self, **kwargs):
        check_text(kwargs.get("cross_attn"), kwargs.get("pooled_output"), self.config)
        conds = super().extra_conds(**kwargs)
        # Not the base class's CONDCrossAttn: it repeats text tokens to batch prompts of unequal length, which changes a joint attention.
        conds["c_crossattn"] = comfy.conds.CONDRegular(kwargs["cross_attn"])
        return conds

    def concat_cond(self, **kwargs):
        """[B, 1 + C, T, H, W]: 1 where a latent frame is given, and its latent. Zeros for text to video, so that all passes batch."""
        noise, device = kwargs["noise"], kwargs["device"]
        reference = Reference.of(kwargs)
        if reference is None:
            shape = (noise.shape[0], 1 + self.config.in_channels, *noise.shape[2:])
            return torch.zeros(shape, device=device, dtype=noise.dtype)
        known, latents = reference.fit(tuple(noise.shape))
        return torch.cat((known, known * self.process_latent_in(latents)), dim=1).to(device)


class FramesModel(CoreModel):
    """Where a text mask, sizes and a frame mask are inputs (Open-Sora 1.2, 1.3): given frames are held by the run, or, of 1.3, read beside."""

    def extra_conds(self, **kwargs):
        noise, mask, context = kwargs["noise"], kwargs.get("attention_mask"), kwargs.get("cross_attn")
        check_text(context, None, self.config)
        mask = torch.ones(context.shape[:2], dtype=torch.long) if mask is None else mask.long()
        if kwargs.get(NULL_KEY):
            context = self.diffusion_model.null_caption[: mask.shape[1]].to(context).expand(len(mask), -1, -1)
        frames, height, width = noise.shape[2:]
        grid = self.config.grid
        num_frames = grid.pixel_frames(frames)
        fps = 120.0 if num_frames == 1 else float(kwargs.get(FPS_KEY, self.family.usual.fps))
        sizes = torch.tensor([[fps, num_frames, grid.space * height, grid.space * width]])
        named = {"c_crossattn": context, "attention_mask": mask, "sizes": sizes}
        reference = Reference.of(kwargs)
        if reference is not None and not kwargs.get(STEPS_KEY):
            raise OpenSoraError(
                f"Frames that are given enter {self.family.title.removesuffix(' transformer')} at every step, which a stock sampler does not do; "
                "use Open-Sora Sampler."
            )
        if reference is not None and self._is_held(reference):
            named["edit"] = reference.edit(tuple(noise.shape))
        conds = {key: value for key, value in super().extra_conds(**kwargs).items() if key in ("c_concat",)}
        return conds | {name: comfy.conds.CONDRegular(value) for name, value in named.items()}

    def concat_cond(self, **kwargs):
        """[B, 1 + C, T, H, W], where given latents are read beside the noise; None without any."""
        noise, reference = kwargs["noise"], Reference.of(kwargs)
        if reference is None or self._is_held(reference):
            return None
        known, latents = reference.fit(tuple(noise.shape))
        latents = known * self.process_latent_in(latents) * (0.0 if kwargs.get(BLANK_KEY) else 1.0)
        return torch.cat((known, latents), dim=1).to(kwargs["device"])

    def _is_held(self, reference: Reference) -> bool:
        return reference.use.is_held or not self.config.window


class HighCompressionLatents(selftest.base(comfy.latent_formats, "LatentFormat")):
    """The Video DC-AE's latents: as they are, 4 frames and 32x32 pixels each, without a preview."""

    latent_dimensions = 3
    spacial_downscale_ratio = geometry.HIGH_COMPRESSION.space
    temporal_downscale_ratio = geometry.TIME_COMPRESSION

    latent_channels = 128


def latents_of(config: NetworkSizes) -> type:
    """The host's format of the latents that a network was trained on, without a preview."""
    latents: Latents = usual_codec(config).latents
    own = {
        "latent_dimensions": 3,
        "latent_channels": latents.channels,
        "spacial_downscale_ratio": config.grid.space,
        "temporal_downscale_ratio": geometry.TIME_COMPRESSION,
        "process_in": lambda self, values: latents.to_model(values),
        "process_out": lambda self, values: latents.to_codec(values),
    }
    return type("OpenSoraLatents", (selftest.base(comfy.latent_formats, "LatentFormat"),), own)


@dataclass(frozen=True)
class HostRow:
    """A model in the host."""

    kind: str  # of the library's row
    name: str  # of the class for its files; the MODEL's has "Model" after it, which people read
    model: type  # says what of a CONDITIONING becomes which input of the network
    network: Callable  # (config, operations, dtype, device) -> the network as the host calls it
    latent_format: type
    memory_factor: float  # what the host multiplies latent pixels by to estimate the activations
    shift: float = 5.73  # of stock samplers' schedule: 256px, 129 frames; Open-Sora Scheduler sets each clip's own
    model_type: object = getattr(getattr(comfy.model_base, "ModelType", None), "FLOW", None)


def row_of(kind: str) -> Family:
    return next(row for row in FAMILIES if row.kind == kind)


_FACTOR = 1.8  # as the host has it for HunyuanVideo: the same width and tokens
_HUNYUAN = selftest.base(comfy.latent_formats, "HunyuanVideo")
_DENSE = _FACTOR * geometry.PATCH_SIZE**2  # the host counts latent pixels, each of which is a token here
ROWS = (
    HostRow("open_sora_2", "OpenSora2", BesideModel, HostMMDiT, _HUNYUAN, _FACTOR),
    HostRow("open_sora_2_dc_ae", "OpenSora2HighCompression", BesideModel, HostMMDiT, HighCompressionLatents, _DENSE),
    *(
        HostRow(
            f"open_sora_1_{minor}", f"OpenSora1{minor}", FramesModel, HostSTDiT3, latents_of(row_of(f"open_sora_1_{minor}").released), 1.0
        )
        for minor in (2, 3)
    ),
)


class FileClass(selftest.base(comfy.supported_models_base, "BASE")):
    """What the host's list of models holds: how a file is told from others, and how it becomes a MODEL. `row` is set by `register`."""

    row: HostRow
    unet_extra_config = {}
    supported_inference_dtypes = [torch.bfloat16, torch.float32]
    vae_key_prefix = ["vae."]
    text_encoder_key_prefix = ["text_encoders."]

    @classmethod
    def matches(cls, unet_config, state_dict=None, unet_key_prefix=""):
        kind = "" if state_dict is None else _identify(state_dict, unet_key_prefix).kind
        return kind in (cls.row.kind, detect.damaged(cls.row.kind))

    def model_type(self, state_dict, prefix=""):
        return self.row.model_type

    def inpaint_model(self):
        return False

    def get_model(self, state_dict, prefix="", device=None):
        self.identity = detect.require(_identify(state_dict, prefix), "transformer", "This file")
        # A quantised weight may show half its columns; what is missing is missing all the same.
        exact = self.quant_config is None and self.custom_operations is None
        found = bare_shapes(_shapes(state_dict), prefix)
        compare(found, self.identity.manifest(), self.identity.layout).whole(f"This file is {self.identity.title}", exact)
        self.latent_format.latent_channels = self.identity.config.in_channels
        return self.model(self.row, self.identity, self, device)

    def process_unet_state_dict(self, state_dict):
        return converted(state_dict, self.identity)

    def process_unet_state_dict_for_saving(self, state_dict):
        return super().process_unet_state_dict_for_saving(
            {self.identity.layout.file_name(key): tensor for key, tensor in state_dict.items()}
        )

    def clip_target(self, state_dict=None):
        prefix = f"{self.text_encoder_key_prefix[0]}t5xxl.transformer."
        found = comfy.text_encoders.sd3_clip.t5_xxl_detect(state_dict or {}, prefix)
        flux = comfy.text_encoders.flux
        return comfy.supported_models_base.ClipTarget(flux.FluxTokenizer, flux.flux_clip(**found))


def _file_class(row: HostRow) -> type:
    settings = {
        "row": row,
        "sampling_settings": {"shift": row.shift},
        "latent_format": row.latent_format,
        "memory_usage_factor": row.memory_factor,
    }
    return type(row.name, (FileClass,), {**settings, "model": type(f"{row.name}Model", (row.model,), {})})


CLASSES = [_file_class(row) for row in ROWS]


def register() -> None:
    """Make the host know the models. First in its list: the host takes the first that matches, and Flux would match too."""
    models, ours = comfy.supported_models.models, {row.name for row in ROWS}
    models[:] = [*CLASSES, *(model for model in models if model.__name__ not in ours)]


@contextmanager
def known_to_the_host(state_dict) -> Iterator[None]:
    """While the host loads these tensors: its own detector, which knows none of some models' keys, says what they are.

    It is asked first, and only where it says nothing; every other file is detected as ever.
    """
    detection, own = comfy.model_detection, comfy.model_detection.detect_unet_config

    def detect_or_ours(state, prefix, metadata=None):
        found = own(state, prefix, metadata=metadata)
        return {} if found is None and state.keys() <= state_dict.keys() else found

    detection.detect_unet_config = detect_or_ours
    try:
        yield
    finally:
        detection.detect_unet_config = own


def is_open_sora(model) -> bool:
    """Whether a MODEL is one of these. By name: a reloaded pack has a second class of the same name."""
    return type(getattr(model, "model", None)).__name__ in {f"{row.name}Model" for row in ROWS}


def family_of(model) -> Family:
    """The library's row of a MODEL; errors as require_open_sora's."""
    require_open_sora(model)
    return model.model.family


def require_open_sora(model) -> NetworkSizes:
    """The sizes of a MODEL's transformer.

    Raises:
        OpenSoraError: the MODEL is another one.
    """
    if is_open_sora(model):
        return model.model.config
    found = type(getattr(model, "model", model)).__name__
    raise OpenSoraError(f"This MODEL is {found}, not Open-Sora 2.0; load Open_Sora_v2.safetensors with Open-Sora Load Model.")


def converted(state: dict[str, Tensor], identity: detect.Identity) -> dict[str, Tensor]:
    """A file's tensors, without prefix, as the module's."""
    return {name: part for key, tensor in state.items() for name, part in identity.layout.convert(key, tensor, identity.config)}


def _shapes(state: dict[str, Tensor]) -> Manifest:
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def _identify(state: dict[str, Tensor], prefix: str) -> detect.Identity:
    return detect.identify(bare_shapes(_shapes(state), prefix))
