"""A look at the host's insides when the pack is loaded: is everything that we stand on where we expect it?

On a host that has moved them the nodes still appear, so that workflows open, and running one says what is
needed. A part missing here is found in a second, not after an hour of sampling.
"""

import inspect
import logging
import pkgutil
import re
from collections.abc import Iterable
from functools import cache

from ...opensora_core.errors import OpenSoraError

logger = logging.getLogger(__name__)

NEEDED = "0.33.0"  # also in pyproject.toml, requires-comfyui (a test compares)

# By where it is looked for: what the pack stands on, and in brackets the parameters that we pass or are passed.
_PARTS = {
    "comfy.supported_models": "models",
    "comfy.supported_models_base": "BASE(unet_config)",
    "comfy.supported_models_base.BASE": "matches get_model process_unet_state_dict process_unet_state_dict_for_saving",
    "comfy.model_base": "BaseModel(model_config,model_type,device,unet_model) Flux(model_config) model_sampling(model_config,model_type)",
    "comfy.model_base.BaseModel": "extra_conds concat_cond encode_adm resize_cond_for_context_window process_latent_in",
    "comfy.latent_formats": "HunyuanVideo LatentFormat",
    "comfy.conds": "CONDRegular(cond) CONDNoiseShape(cond)",
    "comfy.samplers": "CFGGuider(model_patcher) calc_cond_batch(model,conds,x_in,timestep,model_options) KSAMPLER(sampler_function) "
    "cfg_function(model,cond_pred,uncond_pred,cond_scale,x,timestep,cond,uncond) sampler_object(name)",
    "comfy.samplers.CFGGuider": "predict_noise sample inner_set_conds set_cfg",
    "comfy.model_sampling": "ModelSamplingDiscreteFlow(model_config) ModelSamplingFlux(model_config) CONST",
    "comfy.sd": "load_diffusion_model_state_dict(sd,model_options,metadata,disable_dynamic) VAE "
    "load_lora_for_models(model,clip,lora,strength_model,strength_clip)",
    "comfy.utils": "load_torch_file(return_metadata) ProgressBar(total) repeat_to_batch_size(tensor,batch_size)",
    "comfy.patcher_extension": "WrapperExecutor get_all_wrappers(wrapper_type,transformer_options)",
    "comfy.ldm.modules.attention": "optimized_attention(q,k,v,heads,skip_reshape)",
    "comfy.model_management": "load_models_gpu(models,memory_required) throw_exception_if_processing_interrupted is_oom(e) "
    "free_memory(memory_required,device,keep_loaded) current_loaded_models unload_all_models get_free_memory(dev) get_total_memory(dev) "
    "extra_reserved_memory unload_model_and_clones(model,unload_additional_models,all_devices)",
    "comfy.model_patcher": "CoreModelPatcher(model,load_device,offload_device)",
    "comfy.model_patcher.ModelPatcher": "partially_load(device_to,extra_memory,force_patch_weights) partially_unload(device_to,memory_to_free) "
    "clone(disable_dynamic,model_override,force_deepcopy) add_patches(patches,strength_patch,strength_model) "
    "add_hook_patches(hook,patches,strength_patch,strength_model) add_weight_wrapper(name,function) get_key_patches(filter_prefix) "
    "model_state_dict_for_saving(model,prefix) set_attachments remove_attachments get_attachment loaded_size model_size get_free_memory "
    "is_dynamic detach",
    "comfy.ops": "disable_weight_init manual_cast",
    "comfy_execution.utils": "get_executing_context",
    "comfy_execution.progress": "get_progress_state",
    "comfy_execution.graph_utils": "GraphBuilder",
    "latent_preview": "prepare_callback(model,steps)",
}
_PART = re.compile(r"(\w+)(?:\(([\w,]*)\))?")


def problem() -> str:
    """One sentence if this host lacks something that the pack stands on, else ""."""
    parts = [(f"{where}.{name}", parameters) for where, text in _PARTS.items() for name, parameters in _PART.findall(text)]
    lacking = [name for name, parameters in parts if not _fits(name, filter(None, parameters.split(",")))]
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


@cache
def before(mixin: type, host_class: type) -> type:
    """The class of a patcher with more before the host's own. By its class, so that it works for other packs' patchers (GGUF) and every way of
    copying."""
    return type(f"{mixin.__name__}{host_class.__name__}", (mixin, host_class), {})


def _fits(name: str, parameters: Iterable[str]) -> bool:
    try:
        found = inspect.signature(pkgutil.resolve_name(name)).parameters
    except (ImportError, AttributeError):
        return False
    except (TypeError, ValueError):  # no function, or a class that hides its own: that it is there is all that can be said
        return True
    accepts_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in found.values())
    return accepts_any or all(name in found for name in parameters)
