"""A look at the host's insides when the pack is loaded: is everything that we stand on where we expect it?

On a host that has moved them the nodes still appear, so that workflows open, and running one says what is
needed. A part missing here is found in a second, not after an hour of sampling.
"""

import inspect
import logging

import comfy.conds
import comfy.latent_formats
import comfy.ldm.modules.attention
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.ops
import comfy.patcher_extension
import comfy.samplers
import comfy.sd
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import comfy_execution.graph_utils
import comfy_execution.progress
import comfy_execution.utils
import latent_preview

from ...opensora_core.errors import OpenSoraError

logger = logging.getLogger(__name__)

NEEDED = "0.33.0"  # also in pyproject.toml, requires-comfyui (a test compares)

_PATCHER = getattr(comfy.model_patcher, "ModelPatcher", None)

# (what it is called, where it is looked for, its name, parameters that we pass or are passed).
_PARTS = (
    ("comfy.supported_models", comfy.supported_models, "models", ()),
    ("comfy.supported_models_base", comfy.supported_models_base, "BASE", ("unet_config",)),
    ("comfy.model_base", comfy.model_base, "BaseModel", ("model_config", "model_type", "device", "unet_model")),
    ("comfy.latent_formats", comfy.latent_formats, "HunyuanVideo", ()),
    ("comfy.latent_formats", comfy.latent_formats, "LatentFormat", ()),
    ("comfy.conds", comfy.conds, "CONDRegular", ("cond",)),
    ("comfy.conds", comfy.conds, "CONDNoiseShape", ("cond",)),
    ("comfy.samplers", comfy.samplers, "CFGGuider", ("model_patcher",)),
    ("comfy.samplers", comfy.samplers, "calc_cond_batch", ("model", "conds", "x_in", "timestep", "model_options")),
    (
        "comfy.samplers",
        comfy.samplers,
        "cfg_function",
        ("model", "cond_pred", "uncond_pred", "cond_scale", "x", "timestep", "cond", "uncond"),
    ),
    ("comfy.samplers", comfy.samplers, "KSAMPLER", ("sampler_function",)),
    ("comfy.samplers", comfy.samplers, "sampler_object", ("name",)),
    ("comfy.model_sampling", comfy.model_sampling, "ModelSamplingDiscreteFlow", ("model_config",)),
    ("comfy.model_sampling", comfy.model_sampling, "CONST", ()),
    ("comfy.sd", comfy.sd, "load_diffusion_model_state_dict", ("sd", "model_options", "metadata", "disable_dynamic")),
    ("comfy.sd", comfy.sd, "load_lora_for_models", ("model", "clip", "lora", "strength_model", "strength_clip")),
    ("comfy.sd", comfy.sd, "VAE", ()),
    ("comfy.utils", comfy.utils, "load_torch_file", ("return_metadata",)),
    ("comfy.utils", comfy.utils, "ProgressBar", ("total",)),
    ("comfy.utils", comfy.utils, "repeat_to_batch_size", ("tensor", "batch_size")),
    ("comfy.patcher_extension", comfy.patcher_extension, "WrapperExecutor", ()),
    ("comfy.patcher_extension", comfy.patcher_extension, "get_all_wrappers", ("wrapper_type", "transformer_options")),
    ("comfy.ldm.modules.attention", comfy.ldm.modules.attention, "optimized_attention", ("q", "k", "v", "heads", "skip_reshape")),
    ("comfy.model_management", comfy.model_management, "load_models_gpu", ("models", "memory_required")),
    ("comfy.model_management", comfy.model_management, "throw_exception_if_processing_interrupted", ()),
    ("comfy.model_management", comfy.model_management, "is_oom", ("e",)),
    ("comfy.model_management", comfy.model_management, "free_memory", ("memory_required", "device", "keep_loaded")),
    ("comfy.model_management", comfy.model_management, "current_loaded_models", ()),
    ("comfy.model_management", comfy.model_management, "unload_all_models", ()),
    ("comfy_execution.utils", comfy_execution.utils, "get_executing_context", ()),
    ("comfy.model_patcher", comfy.model_patcher, "CoreModelPatcher", ("model", "load_device", "offload_device")),
    ("comfy.model_management", comfy.model_management, "get_free_memory", ("dev",)),
    ("comfy.model_management", comfy.model_management, "get_total_memory", ("dev",)),
    ("comfy.model_management", comfy.model_management, "current_loaded_models", ()),
    ("comfy.model_management", comfy.model_management, "extra_reserved_memory", ()),
    ("comfy.model_management", comfy.model_management, "unload_model_and_clones", ("model", "unload_additional_models", "all_devices")),
    ("comfy.model_patcher.ModelPatcher", _PATCHER, "partially_load", ("device_to", "extra_memory", "force_patch_weights")),
    ("comfy.model_patcher.ModelPatcher", _PATCHER, "partially_unload", ("device_to", "memory_to_free")),
    ("comfy.model_patcher.ModelPatcher", _PATCHER, "clone", ("disable_dynamic", "model_override", "force_deepcopy")),
    ("comfy.ops", comfy.ops, "disable_weight_init", ()),
    ("comfy.ops", comfy.ops, "manual_cast", ()),
    ("comfy.model_patcher.ModelPatcher", _PATCHER, "add_patches", ("patches", "strength_patch", "strength_model")),
    ("comfy.model_patcher.ModelPatcher", _PATCHER, "add_hook_patches", ("hook", "patches", "strength_patch", "strength_model")),
    ("comfy.model_patcher.ModelPatcher", _PATCHER, "add_weight_wrapper", ("name", "function")),
    ("comfy.model_patcher.ModelPatcher", _PATCHER, "get_key_patches", ("filter_prefix",)),
    ("comfy.model_patcher.ModelPatcher", _PATCHER, "model_state_dict_for_saving", ("model", "prefix")),
    ("latent_preview", latent_preview, "prepare_callback", ("model", "steps")),
    ("comfy.model_base", comfy.model_base, "Flux", ("model_config",)),
    ("comfy.model_sampling", comfy.model_sampling, "ModelSamplingFlux", ("model_config",)),
    ("comfy_execution.progress", comfy_execution.progress, "get_progress_state", ()),
    ("comfy_execution.graph_utils", comfy_execution.graph_utils, "GraphBuilder", ()),
)
_METHODS = (
    (comfy, "model_base.BaseModel", ("extra_conds", "concat_cond", "encode_adm", "resize_cond_for_context_window", "process_latent_in")),
    (comfy, "supported_models_base.BASE", ("matches", "get_model", "process_unet_state_dict", "process_unet_state_dict_for_saving")),
    (
        comfy,
        "model_patcher.ModelPatcher",
        ("set_attachments", "remove_attachments", "get_attachment", "loaded_size", "model_size", "get_free_memory", "is_dynamic", "detach"),
    ),
    (comfy, "samplers.CFGGuider", ("predict_noise", "sample", "inner_set_conds", "set_cfg")),
)


def problem() -> str:
    """One sentence if this host lacks something that the pack stands on, else ""."""
    lacking = [f"{where}.{name}" for where, module, name, parameters in _PARTS if not _fits(getattr(module, name, None), parameters)]
    lacking += [f"{path}.{method}" for root, path, methods in _METHODS for method in methods if not _has(root, f"{path}.{method}")]
    if not lacking:
        return ""
    sentence = (
        f"Open-Sora needs ComfyUI {NEEDED} or a newer one that this version of the pack knows; this ComfyUI lacks {', '.join(lacking)}. "
        "Update ComfyUI and the pack."
    )
    logger.warning(sentence)
    return sentence


def refusing(node: type, sentence: str) -> type:
    """The same node, which says `sentence` when it is run."""

    def execute(cls, **inputs):
        raise OpenSoraError(sentence)

    # Constant inputs are neither checked nor fingerprinted by a node that will not run.
    return type(node.__name__, (node,), {"execute": classmethod(execute), "__module__": node.__module__})


def base(module, name: str) -> type:
    """A host class to build ours on. Where it is gone, `problem` says so; any class will do for the nodes to appear."""
    return getattr(module, name, object)


def _fits(part, parameters: tuple[str, ...]) -> bool:
    if part is None:
        return False
    try:
        found = inspect.signature(part).parameters
    except (TypeError, ValueError):  # lists, and classes that hide theirs: that they are there is all that can be said
        return True
    accepts_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in found.values())
    return accepts_any or all(name in found for name in parameters)


def _has(root, path: str) -> bool:
    for name in path.split("."):
        root = getattr(root, name, None)
    return root is not None
