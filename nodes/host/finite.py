"""A network's answer that is not made of numbers: what it probably comes from."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from ...opensora_core.run.finite import is_finite

_HOOKS = ("sampler_pre_cfg_function", "sampler_cfg_function", "sampler_post_cfg_function", "model_function_wrapper")
_CHECK = "a damaged file (python -m opensora_core inspect FILE looks at it), or a precision that it was not made for (precision fp32 is the widest)"


def cause(patcher, x: Tensor, conds: list, predictions: Iterable[Tensor], options: dict) -> str:
    """What probably made one evaluation of the network not finite, for people.

    Args:
        patcher: of the MODEL. x: what it was given. conds: its conditions, processed by the host.
        predictions: what the network gave, before anything changed it. options: the run's model options.
    """
    if not is_finite(x):
        return "the latents or the noise that it was given, which hold such values already"
    if all(map(is_finite, predictions)):
        return f"a node that changes guidance ({_names(options)}); take it away, or change its settings"
    if not all(map(is_finite, _tensors([entry["model_conds"] for cond in conds if cond for entry in cond]))):
        return "the encoded prompt or the reference picture, which holds such values already"
    if bad := _bad_weight(patcher):
        return f"{bad}, which holds such values: a damaged or unfinished file"
    if patcher.model.get_dtype_inference() == torch.float16:
        return "fp16, which is too narrow for this model; start ComfyUI without --fp16-unet"
    if found := _names(options):
        return f"a node that patches the model ({found}), or {_CHECK}"
    return _CHECK


def _names(options: dict) -> str:
    """Modules and names of the functions that were hung into a MODEL."""
    hung = [options.get(name) or [] for name in _HOOKS]
    hooks = [hook for some in hung for hook in (some if isinstance(some, list | tuple) else [some])]
    return ", ".join(dict.fromkeys(f"{hook.__module__.split('.')[-1]}: {hook.__name__}" for hook in hooks if hasattr(hook, "__name__")))


def _bad_weight(patcher) -> str:
    """The first weight of a MODEL, or of what is laid over it, that is not finite; "" for none."""
    for key, weight in patcher.model.diffusion_model.named_parameters():
        if _is_plain(weight) and not is_finite(weight):
            return key
    for key, patches in patcher.patches.items():
        if not all(map(is_finite, filter(_is_plain, _tensors([patch[1] for patch in patches])))):
            return f"a LoRA's change to {str(key).removeprefix('diffusion_model.')}"
    return ""


def _is_plain(weight) -> bool:
    return type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point() and weight.dtype.itemsize > 1


def _tensors(value) -> Iterator[Tensor]:
    """The floating tensors in lists, dictionaries, the host's conditions and its adapters."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)
    else:
        for name in ("cond", "weights"):
            if hasattr(value, name):
                yield from _tensors(getattr(value, name))
