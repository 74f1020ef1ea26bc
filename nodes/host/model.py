"""Open-Sora 2.0 as one of the host's own models.

`register` adds it to the host's list of known models, so that every stock loader (and everything that takes a
MODEL: memory management, LoRA, compilation, caching, context windows) works with it. The network is the core's
MMDiT; what is here only translates: the host's calls, its conditioning dictionaries, its layer classes.
"""

import logging

import comfy.conds
import comfy.latent_formats
import comfy.ldm.modules.attention
import comfy.model_base
import comfy.patcher_extension
import comfy.sd
import comfy.supported_models
import comfy.supported_models_base
import comfy.text_encoders.flux
import comfy.text_encoders.sd3_clip
import comfy.utils
import torch
from torch import Tensor

from ...opensora_core import geometry
from ...opensora_core.checkpoint import detect, quantised
from ...opensora_core.checkpoint.files import Header, quantisation, read_header
from ...opensora_core.checkpoint.load import compare
from ...opensora_core.checkpoint.quantised import Format
from ...opensora_core.checkpoint.quantize import FORMATS
from ...opensora_core.choices import AUTO, DTYPES, INT8, NF4, PRECISIONS, torch_dtype
from ...opensora_core.errors import CheckpointError, OpenSoraError, check_choice
from ...opensora_core.networks.mmdit.config import TransformerConfig
from ...opensora_core.networks.mmdit.model import MMDiT
from ...opensora_core.shapes import Manifest, bare_shapes
from . import nf4, selftest
from .condition import Reference, check_text
from .precision import quantise_state

logger = logging.getLogger(__name__)

TIMESTEP_SCALE = 1000  # the host hands the network its sigma times this; stock ModelSamplingSD3 sets the same number
_HOST_PREFIXES = ("", "model.diffusion_model.", "model.")  # what the host's own loader takes off


def host_attention(q: Tensor, k: Tensor, v: Tensor, transformer_options: dict) -> Tensor:
    """The host's choice of attention kernel. q, k, v: [B, H, L, D] -> [B, L, H * D]."""
    # By attribute at call time: the host and other packs may replace it.
    attend = comfy.ldm.modules.attention.optimized_attention
    return attend(q, k, v, q.shape[1], skip_reshape=True, transformer_options=transformer_options)


class HostMMDiT(MMDiT):
    """The core transformer behind the host's calling convention: condition channels appended to x, sigma times 1000, wrappers."""

    # In place of the core's property: the host's layers have no weight to ask before the file is read.
    dtype = None

    def __init__(self, config: TransformerConfig, operations, dtype, device):
        super().__init__(config, operations, host_attention, dtype, device)
        self.dtype = dtype

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor, y=None, control=None, transformer_options=None, **unused) -> Tensor:
        """x: [B, C + C + 1, T, H, W], latents then condition (mask first); timestep: [B], sigma * 1000. Returns [B, C, T, H, W].

        `control` and further keywords are the host's; this model has no use for them.
        """
        options = transformer_options if transformer_options is not None else {}
        wrappers = comfy.patcher_extension.get_all_wrappers(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, options)
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(self._velocity, self, wrappers)
        # Positional, options last: that is where stock wrappers look for them.
        return executor.execute(x, timestep, context, y, control, options)

    def _velocity(self, x, timestep, context, y, control, transformer_options):
        channels = self.config.in_channels
        latents, cond = x[:, :channels], x[:, channels:]
        return super().forward(latents, timestep / TIMESTEP_SCALE, context, y, cond, None, transformer_options)


class OpenSora2Model(selftest.base(comfy.model_base, "BaseModel")):
    """The host's model object: rectified flow, CLIP pooled as `y`, condition channels in every pass."""

    def __init__(self, model_config, config: TransformerConfig, device=None):
        def build(dtype=None, device=None, operations=None, **detected):
            # `detected` is what the host's own detector says of these keys, for Flux; the sizes are read from the tensors instead.
            return HostMMDiT(config, operations, dtype, device)

        super().__init__(model_config, comfy.model_base.ModelType.FLOW, device=device, unet_model=build)
        self.config = config

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

    def resize_cond_for_context_window(self, cond_key, cond_value, window, x_in, device, retain_index_list=()):
        if cond_key in ("c_crossattn", "y"):
            return cond_value  # never cut in time, even where a width happens to equal the number of frames
        return super().resize_cond_for_context_window(cond_key, cond_value, window, x_in, device, retain_index_list=list(retain_index_list))


class HighCompressionLatents(selftest.base(comfy.latent_formats, "LatentFormat")):
    """The Video DC-AE's latents: as they are, 4 frames and 32x32 pixels each, without a preview."""

    latent_dimensions = 3
    spacial_downscale_ratio = geometry.HIGH_COMPRESSION.space
    temporal_downscale_ratio = geometry.TIME_COMPRESSION

    def __init__(self, channels: int):
        self.latent_channels = channels


class OpenSora2(selftest.base(comfy.supported_models_base, "BASE")):
    """What the host's list of models holds: how the file is told from a Flux file, and how it becomes an OpenSora2Model."""

    unet_config = {"image_model": "flux", "guidance_embed": False}  # what the host's detector makes of these keys
    unet_extra_config = {}
    sampling_settings = {"shift": 5.73}  # 256px, 129 frames; Open-Sora Scheduler sets each clip's own
    latent_format = selftest.base(comfy.latent_formats, "HunyuanVideo")
    memory_usage_factor = 1.8  # as the host has it for HunyuanVideo: the same width and tokens
    supported_inference_dtypes = [torch.bfloat16, torch.float32]
    vae_key_prefix = ["vae."]
    text_encoder_key_prefix = ["text_encoders."]

    @classmethod
    def matches(cls, unet_config, state_dict=None, unet_key_prefix=""):
        if state_dict is None or any(unet_config.get(key) != value for key, value in cls.unet_config.items()):
            return False
        double = f"{unet_key_prefix}double_blocks.0.img_attn."
        has_layout = f"{double}q_proj.weight" in state_dict or f"{double}qkv.weight" in state_dict
        return has_layout and f"{unet_key_prefix}cond_in.weight" in state_dict

    def model_type(self, state_dict, prefix=""):
        return comfy.model_base.ModelType.FLOW

    def inpaint_model(self):
        return False

    def _fit_to(self, config: TransformerConfig) -> None:
        """Where the variant differs; the released 2.0 model is what stands above."""
        if config.grid.is_causal:
            return
        self.latent_format = HighCompressionLatents(config.in_channels)
        self.memory_usage_factor *= geometry.PATCH_SIZE**2  # the host counts latent pixels, each of which is a token here

    def get_model(self, state_dict, prefix="", device=None):
        shapes = bare_shapes({key: tuple(tensor.shape) for key, tensor in state_dict.items()}, prefix)
        self.identity = detect.require(detect.identify(shapes), "transformer", "This file")
        # A quantised weight may show half its columns; what is missing is missing all the same.
        exact = self.quant_config is None and self.custom_operations is None
        _check_whole(shapes, self.identity, "This file", exact)
        self._fit_to(self.identity.config)
        return OpenSora2Model(self, self.identity.config, device)

    def process_unet_state_dict(self, state_dict):
        return _converted(state_dict, self.identity)

    def process_unet_state_dict_for_saving(self, state_dict):
        return super().process_unet_state_dict_for_saving(
            {self.identity.layout.file_name(key): tensor for key, tensor in state_dict.items()}
        )

    def clip_target(self, state_dict=None):
        prefix = f"{self.text_encoder_key_prefix[0]}t5xxl.transformer."
        found = comfy.text_encoders.sd3_clip.t5_xxl_detect(state_dict or {}, prefix)
        flux = comfy.text_encoders.flux
        return comfy.supported_models_base.ClipTarget(flux.FluxTokenizer, flux.flux_clip(**found))


def register() -> None:
    """Make the host know the model. First in its list: the host takes the first that matches, and Flux would match too."""
    models = comfy.supported_models.models
    models[:] = [OpenSora2, *(model for model in models if model.__name__ != OpenSora2.__name__)]


def is_open_sora(model) -> bool:
    """Whether a MODEL is Open-Sora 2.0. By name as well: a reloaded pack has a second class of the same name."""
    inner = getattr(model, "model", None)
    return isinstance(inner, OpenSora2Model) or type(inner).__name__ == OpenSora2Model.__name__


def require_open_sora(model) -> TransformerConfig:
    """The sizes of a MODEL's transformer.

    Raises:
        OpenSoraError: the MODEL is another one.
    """
    if is_open_sora(model):
        return model.model.config
    found = type(getattr(model, "model", model)).__name__
    raise OpenSoraError(f"This MODEL is {found}, not Open-Sora 2.0; load Open_Sora_v2.safetensors with Open-Sora Load Model.")


def load_model(path: str, precision: str = AUTO, disable_dynamic: bool = False):
    """Load an Open-Sora 2.0 transformer file as a MODEL, through the host's own loader.

    Args:
        precision: auto (as stored, where the device computes in it), fp32, bf16, fp8_e4m3fn or int8 (block weights held in 8 bits),
            or nf4 (in 4 bits, by bitsandbytes; experimental, see nf4.py).
        disable_dynamic: the host asks for a copy without its dynamic memory, for compilation and hooks.

    Raises:
        CheckpointError: another model, a damaged or incomplete file, or a quantised one for which a precision was asked.
        OpenSoraError: an unknown precision, or nf4 without bitsandbytes.
    """
    header, identity = _check_file(path, precision)
    form = _form(precision, header)
    state, metadata = comfy.utils.load_torch_file(path, return_metadata=True)
    if form or identity.prefix not in _HOST_PREFIXES:
        cut = len(identity.prefix)
        state = {key[cut:]: tensor for key, tensor in state.items() if key.startswith(identity.prefix)}
    options = {"dtype": torch_dtype(precision)} if precision in DTYPES else {}
    is_nf4 = precision == NF4
    if is_nf4:
        options = {"custom_operations": nf4.NF4Operations, "dtype": _working_dtype(state)}
    if form:
        if identity.layout.is_recut:
            state = {identity.layout.file_name(key): tensor for key, tensor in _converted(state, identity).items()}
        state = quantise_state(state, form, identity.family)
    patcher = comfy.sd.load_diffusion_model_state_dict(state, options, metadata, disable_dynamic or is_nf4)
    if patcher is None or not is_open_sora(patcher):
        found = "nothing" if patcher is None else type(patcher.model).__name__
        raise CheckpointError(
            f"ComfyUI took {header.name} for {found}, though its tensors are {identity.title}; update ComfyUI and this pack."
        )
    patcher.cached_patcher_init = (load_model, (path, precision))
    return nf4.unpatchable(patcher) if is_nf4 else patcher


def _form(precision: str, header: Header) -> Format | None:
    """The format that weights are brought into; None for what is stored in 8 bits, which is not rounded again, and for plain numbers."""
    if precision == NF4:
        return quantised.NF4()
    return FORMATS[precision]() if precision in FORMATS and not _is_float8(header) else None


def _working_dtype(state: dict[str, Tensor]) -> torch.dtype:
    """What the host would hold these weights in if they were not to be quantised."""
    stored, size = comfy.utils.weight_dtype(state), comfy.utils.calculate_parameters(state)
    return comfy.model_management.unet_dtype(model_params=size, supported_dtypes=OpenSora2.supported_inference_dtypes, weight_dtype=stored)


def _check_file(path: str, precision: str) -> tuple[Header, detect.Identity]:
    check_choice("precision", precision, PRECISIONS)
    header = read_header(path)
    identity = detect.require(detect.identify(header.shapes), "transformer", header.name)
    form = quantisation(header)
    if form and precision != AUTO:
        raise CheckpointError(
            f"{header.name} is already quantised ({form}); use it with precision auto, or choose the bf16 file for {precision}."
        )
    if precision in (INT8, NF4) and _is_float8(header):
        raise CheckpointError(
            f"{header.name} is stored in float8 already; use it with precision auto, or choose the bf16 file for {precision}."
        )
    extra = _check_whole(bare_shapes(header.shapes, identity.prefix), identity, header.name, exact=form is None)
    if extra and not form:
        logger.warning("%s holds %d tensors that its model does not use: %s", header.name, len(extra), ", ".join(extra[:5]))
    return header, identity


def _is_float8(header: Header) -> bool:
    return any(name.startswith("F8") for name in header.dtypes)


def _converted(state: dict[str, Tensor], identity: detect.Identity) -> dict[str, Tensor]:
    """A file's tensors, without prefix, as the module's."""
    return {name: part for key, tensor in state.items() for name, part in identity.layout.convert(key, tensor, identity.config)}


def _check_whole(shapes: Manifest, identity: detect.Identity, name: str, exact: bool) -> tuple[str, ...]:
    """Raise unless every tensor of the model is there; returns those that are not the model's."""
    result = compare(shapes, identity.manifest(), identity.layout)
    if result.missing or (exact and result.misshaped):
        raise CheckpointError(f"{name} is {identity.title} but not whole; {result.sentence()}. Download it again.")
    return result.extra
