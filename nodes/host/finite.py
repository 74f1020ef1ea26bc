"""A network's answer that is not made of numbers: what it probably comes from, and fp16 given up for what is wider."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from ...opensora_core.run.finite import is_finite

_HOOKS = ("sampler_pre_cfg_function", "sampler_cfg_function", "sampler_post_cfg_function", "model_function_wrapper")
_CHECK = "a damaged file (python -m opensora_core inspect FILE looks at it), or a precision that it was not made for (precision fp32 is the widest)"


class Wider:
    """A network of the host that computes in fp16 (--fp16-unet) and can go on in bf16, which reaches further: its layers then cast their
    weights as they are used, as the host's own casting layers do. Undone with `off`; the weights are never changed."""

    def __init__(self, model):
        self._model, self._before, self._changed = model, None, []

    def on(self) -> bool:
        """Whether there was a wider type to go on in."""
        if self._changed or self._model.get_dtype_inference() != torch.float16:
            return False
        self._changed = [module for module in self._model.diffusion_model.modules() if getattr(module, "comfy_cast_weights", None) is False]
        for module in self._changed:
            module.comfy_cast_weights = True
        self._before, self._model.manual_cast_dtype = self._model.manual_cast_dtype, torch.bfloat16
        return True

    def off(self) -> None:
        """Undo what `on` did."""
        if self._changed:
            self._model.manual_cast_dtype = self._before
        for module in self._changed:
            del module.comfy_cast_weights
        self._changed = []


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
    hooks = [hook for name in _HOOKS for hook in _as_list(options.get(name))]
    return ", ".join(dict.fromkeys(f"{hook.__module__.split('.')[-1]}: {hook.__name__}" for hook in hooks if hasattr(hook, "__name__")))


def _as_list(value) -> list:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


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
