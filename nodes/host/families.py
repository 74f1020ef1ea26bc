"""Which of the library's models the host knows, and how: a small row for each, from which the host's own classes are built.

`register` adds them to the host's list of known models, so that every stock loader (and everything that takes a MODEL: memory
management, LoRA, compilation, caching, context windows) works with them. The networks are the core's.
"""

from collections.abc import Callable
from dataclasses import dataclass

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_detection
import comfy.model_sampling
import comfy.supported_models
import comfy.supported_models_base
import comfy.text_encoders.flux
import comfy.text_encoders.sd3_clip
import torch
from torch import Tensor

from ...opensora_core import geometry
from ...opensora_core.checkpoint import detect
from ...opensora_core.checkpoint.load import compare
from ...opensora_core.choices import AUTO
from ...opensora_core.codecs.codec import Latents
from ...opensora_core.errors import CheckpointError, OpenSoraError
from ...opensora_core.families.table import FAMILIES, usual_codec
from ...opensora_core.family import Family, NetworkSizes
from ...opensora_core.networks.cogvideox.layout import HOST
from ...opensora_core.networks.cogvideox.model import CogVideoX
from ...opensora_core.networks.stdit.config import PICTURE_FPS
from ...opensora_core.run.request import SamplingOptions
from ...opensora_core.sampling import ddpm
from ...opensora_core.sampling.given import ImageCondition
from ...opensora_core.sampling.guidance import PICTURES
from ...opensora_core.sampling.v_prediction import training_angles
from ...opensora_core.shapes import Manifest, bare_shapes
from . import selftest
from .condition import BLANK_KEY, FPS_KEY, NULL_KEY, SCALE_KEY, STEPS_KEY, Reference, check_text, not_its_steps
from .network import HostCogVideoX, HostMMDiT, HostSTDiT, HostSTDiT3

_FLOW = getattr(getattr(comfy.model_base, "ModelType", None), "FLOW", None)
_SHIFT = 5.73  # of stock samplers' schedule: 256px, 129 frames; Open-Sora Scheduler sets each clip's own


class CoreModel(selftest.base(comfy.model_base, "BaseModel")):
    """The host's model object around one of the library's networks."""

    def __init__(self, row: "HostRow", identity: detect.Identity, model_config, device=None):
        def build(dtype=None, device=None, operations=None, **detected):
            # `detected` is what the host's own detector says of these keys; the sizes are read from the tensors instead.
            return row.network(identity.config, operations, dtype, device)

        super().__init__(model_config, _FLOW, device=device, unet_model=build)
        self.family, self.config = identity.family, identity.config

    def resize_cond_for_context_window(self, cond_key, cond_value, window, x_in, device, retain_index_list=()):
        if cond_key in ("c_crossattn", "y", "attention_mask", "sizes"):
            return cond_value  # never cut in time, even where a width happens to equal the number of frames
        return super().resize_cond_for_context_window(cond_key, cond_value, window, x_in, device, retain_index_list=list(retain_index_list))


class BesideModel(CoreModel):
    """A model that reads given frames beside the latents: CLIP pooled as `y`, condition channels in every pass."""

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
    """A model whose inputs are a text mask, sizes and a frame mask (Open-Sora 1.0 to 1.3): given frames are held by the run, or, of 1.3, read beside."""

    def extra_conds(self, **kwargs):
        noise, mask, context = kwargs["noise"], kwargs.get("attention_mask"), kwargs.get("cross_attn")
        check_text(context, None, self.config)
        mask = torch.ones(context.shape[:2], dtype=torch.long) if mask is None else mask.long()
        if kwargs.get(NULL_KEY):
            context = self.diffusion_model.null_caption[: mask.shape[1]].to(context).expand(len(mask), -1, -1)
        named = {"c_crossattn": context, "attention_mask": mask}
        if self.config.has_sizes:
            num_frames, height, width = self.config.grid.decoded(noise.shape)
            fps = float(PICTURE_FPS if num_frames == 1 else kwargs.get(FPS_KEY) or SamplingOptions.fps)
            named["sizes"] = torch.tensor([[fps, num_frames, height, width]])
        reference = Reference.of(kwargs)
        if reference is not None and not kwargs.get(STEPS_KEY):
            raise not_its_steps(self.family.title, is_learned=False)
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


class AngleSampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.V_PREDICTION):
    """CogVideoX's noise levels as the host has them: sigma is the tangent of the library's angle, and x is divided by its cosine.

    At pure noise that would be infinite; there the host's own largest number stands. Clips of 1.5 go with a latent frame more in front
    while they are sampled, whoever samples them.
    """

    LARGEST = 4518.75

    def __init__(self, model_config, grid: geometry.Grid, snr_shift: float):
        super().__init__(model_config)
        self.grid = grid
        self.set_sigmas(training_angles(snr_shift).tan().clamp(0, self.LARGEST).float())

    def angles(self, sigmas: Tensor) -> Tensor:
        """The library's points of the host's sigmas, fp64 on the CPU."""
        sigmas = sigmas.double().cpu()
        return torch.where(sigmas >= self.sigmas[-1].item(), torch.pi / 2, torch.atan(sigmas))

    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        lead = self.grid.lead_in(noise.shape[2])
        if self.grid.patch_time > 1 and not lead:
            raise OpenSoraError(
                f"A LATENT of {noise.shape[2]} frames is no clip of this model, which has an odd number; make it with its own node."
            )
        if lead:
            # Its noise is drawn from the clip's own: a stock sampler has no seed for it.
            generator = torch.Generator().manual_seed(noise.flatten()[:1].double().cpu().view(torch.int64).item() % 2**63)
            front = torch.randn(noise[:, :, :lead].shape, generator=generator).to(noise) * bool(noise.any())
            noise = torch.cat((front, noise), dim=2)
            latent_image = torch.cat((latent_image[:, :, :1].expand(-1, -1, lead, -1, -1), latent_image), dim=2)
        return super().noise_scaling(sigma, noise, latent_image, max_denoise)

    def inverse_noise_scaling(self, sigma, latent):
        return latent[:, :, self.grid.patch_time - 1 :]


class PictureModel(CoreModel):
    """CogVideoX: T5 alone, and the latents of a picture beside the first frame for the models that take one."""

    def __init__(self, row: "HostRow", identity: detect.Identity, model_config, device=None):
        super().__init__(row, identity, model_config, device)
        self.model_sampling = self.sampling_of(0.0)

    def sampling_of(self, shift: float) -> AngleSampling:
        """Its noise levels; shift: of the ratio of signal to noise, 0 = the model's own."""
        return AngleSampling(self.model_config, self.config.grid, shift or (1.0 if self.config.is_rotary else 3.0))

    def extra_conds(self, **kwargs):
        reference = Reference.of(kwargs)
        if reference is not None and reference.use.is_whole:
            raise OpenSoraError(
                "A stock sampler makes no clip over; take Open-Sora Sampler, or encode it with VAEEncode and lower denoise."
            )
        self.family.check_given(*([], PICTURES) if reference is None else (reference.names, reference.use))
        check_text(kwargs.get("cross_attn"), None, self.config)
        conds = {key: value for key, value in super().extra_conds(**kwargs).items() if key == "c_concat"}
        return {**conds, "c_crossattn": comfy.conds.CONDRegular(kwargs["cross_attn"])}

    def concat_cond(self, **kwargs):
        """[B, C, T, H, W] of the clip with what goes in front of it: the picture in the first frame, zeros in the others."""
        reference = Reference.of(kwargs)
        if reference is None:
            return None
        noise, recipe = kwargs["noise"], self.family.sampling
        known, latents = reference.fit(tuple(noise.shape))
        frames = noise.shape[2] + self.config.grid.lead_in(noise.shape[2])
        x = noise.new_empty(*noise.shape[:2], frames, *noise.shape[3:])
        given = recipe.given(ImageCondition(known, self.process_latent_in(latents), reference.use), x, None, x.dtype)
        told = {"condition_scale": kwargs.get(SCALE_KEY, AUTO)}
        return recipe.inputs(self.config, {"context": x[:0]}, given, told)["cond"].to(kwargs["device"])


class LearnedModel(FramesModel):
    """Open-Sora 1.0 and 1.1, whose variance is learned: their own steps make use of it, and no stock sampler can."""

    def __init__(self, row: "HostRow", identity: detect.Identity, model_config, device=None):
        super().__init__(row, identity, model_config, device)
        self.model_sampling = comfy.model_base.model_sampling(model_config, comfy.model_base.ModelType.EPS)
        # The host's sigma is the ratio of noise to clean, as the library's points are.
        self.model_sampling.set_sigmas(ddpm.respaced_schedule(None, None, ddpm.NUM_TIMESTEPS).points[:-1].flip(0))

    def extra_conds(self, **kwargs):
        if not kwargs.get(STEPS_KEY):
            raise not_its_steps(self.family.title, is_learned=True)
        return super().extra_conds(**kwargs)


def latents_of(row: "HostRow") -> type:
    """A format of the host for the latents that a model was trained on."""
    config = row.family.released
    latents: Latents = usual_codec(config).latents
    own = {
        "latent_dimensions": 3,
        "latent_channels": latents.channels,
        "spacial_downscale_ratio": config.grid.space,
        "temporal_downscale_ratio": config.grid.frames.time,
        "process_in": lambda self, values: latents.to_model(values),
        "process_out": lambda self, values: latents.to_codec(values),
    }
    if like := getattr(comfy.latent_formats, row.seen_as, None):
        own |= {name: value for name, value in vars(like()).items() if name.startswith("latent_rgb_factors")}
    return type("OpenSoraLatents", (selftest.base(comfy.latent_formats, "LatentFormat"),), own)


@dataclass(frozen=True)
class HostRow:
    """A model in the host."""

    kind: str  # of the library's row
    name: str  # of the class for its files; the MODEL's has "Model" after it, which people read
    model: type  # says what of a CONDITIONING becomes which input of the network
    network: Callable  # (config, operations, dtype, device) -> the network as the host calls it
    memory_factor: float  # what the host multiplies latent pixels by to estimate the activations
    seen_as: str = ""  # the host's format of latents whose colours a preview has; "" = grey
    latent_format: type | None = None  # the host's own, where it has one of these latents
    own_of_the_host: str = ""  # a key of files that the host has a class of its own for, which stock loaders then give

    @property
    def family(self) -> Family:
        return next(family for family in FAMILIES if family.kind == self.kind)


_FACTOR = 1.8  # as the host has it for HunyuanVideo: the same width and tokens
_HUNYUAN = selftest.base(comfy.latent_formats, "HunyuanVideo")
_DENSE = _FACTOR * geometry.PATCH_SIZE**2  # the host counts latent pixels, each of which is a token here
ROWS = (
    HostRow("open_sora_2", "OpenSora2", BesideModel, HostMMDiT, _FACTOR, latent_format=_HUNYUAN),
    HostRow("open_sora_2_dc_ae", "OpenSora2HighCompression", BesideModel, HostMMDiT, _DENSE),
    HostRow("open_sora_1_0", "OpenSora10", LearnedModel, HostSTDiT, 1.0, seen_as="SD15"),
    HostRow("open_sora_1_1", "OpenSora11", LearnedModel, HostSTDiT, 1.0, seen_as="SD15"),
    HostRow("open_sora_1_2", "OpenSora12", FramesModel, HostSTDiT3, 1.0),
    HostRow("open_sora_1_3", "OpenSora13", FramesModel, HostSTDiT3, 1.0),
    *(
        HostRow(
            family.kind,
            f"OpenSora{family.repositories[0].replace('-', '').replace('.', '')}",
            PictureModel,
            HostCogVideoX,
            _FACTOR,
            own_of_the_host=HOST.mark,
        )
        for family in FAMILIES
        if family.build is CogVideoX
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
        if state_dict is None or (cls.row.own_of_the_host and f"{unet_key_prefix}{cls.row.own_of_the_host}" in state_dict):
            return False
        kind = detect.identify(_shapes(state_dict, unet_key_prefix)).kind
        return kind in (cls.row.kind, detect.damaged(cls.row.kind))

    def model_type(self, state_dict, prefix=""):
        return _FLOW

    def inpaint_model(self):
        return False

    def get_model(self, state_dict, prefix="", device=None):
        found = _shapes(state_dict, prefix)
        self.identity = detect.require(detect.identify(found), "transformer", "This file")
        # A quantised weight may show half its columns; what is missing is missing all the same.
        exact = self.quant_config is None and self.custom_operations is None
        try:
            compare(found, self.identity.manifest(), self.identity.layout).whole(f"This file is {self.identity.title}", exact)
        except CheckpointError as error:
            raise CheckpointError(f"{error} If it is one file of several, Open-Sora Load Model reads them together.") from error
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
        "sampling_settings": {"shift": _SHIFT},
        "latent_format": row.latent_format or latents_of(row),
        "memory_usage_factor": row.memory_factor,
    }
    if row.family.dtype == "F16":  # trained in it: a file that is stored so computes so
        settings["supported_inference_dtypes"] = [*FileClass.supported_inference_dtypes, torch.float16]
    return type(row.name, (FileClass,), {**settings, "model": type(f"{row.name}Model", (row.model,), {})})


CLASSES = [_file_class(row) for row in ROWS]


def register() -> None:
    """Make the host know the models. First in its list: the host takes the first that matches, and Flux would match too. Of some models
    its detector knows no key; it is asked first all the same, so that every other file is detected as ever."""
    models, ours = comfy.supported_models.models, {row.name for row in ROWS}
    models[:] = [*CLASSES, *(model for model in models if model.__name__ not in ours)]
    detection = comfy.model_detection
    detect_unet_config = getattr(detection.detect_unet_config, "of_the_host", detection.detect_unet_config)

    def detect_or_ours(state_dict, key_prefix, metadata=None):
        """What the host's own detector says; {} where it knows none of the keys and a class of ours does."""
        found = detect_unet_config(state_dict, key_prefix, metadata=metadata)
        return {} if found is None and any(one.matches({}, state_dict, key_prefix) for one in CLASSES) else found

    detect_or_ours.of_the_host = detect_unet_config
    detection.detect_unet_config = detect_or_ours


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
    if found.startswith("CogVideoX"):
        raise OpenSoraError(f"This MODEL is ComfyUI's own {found}; load its file with Open-Sora Load Model, which makes it this pack's.")
    raise OpenSoraError(f"This MODEL is {found}, not one of this pack's; load Open_Sora_v2.safetensors with Open-Sora Load Model.")


def converted(state: dict[str, Tensor], identity: detect.Identity) -> dict[str, Tensor]:
    """A file's tensors, without prefix, as the module's."""
    return {name: part for key, tensor in state.items() for name, part in identity.layout.convert(key, tensor, identity.config)}


def _shapes(state: dict[str, Tensor], prefix: str) -> Manifest:
    return bare_shapes({key: tensor.shape for key, tensor in state.items()}, prefix)
