"""What sampling does when the device's memory runs out: the same evaluation again with less, and words for people if that fails too. And when
fp16 is too narrow: the same in bf16.

Two ways down, each once in a run, and kept to its end: the passes of a step one after another, then other models off the
device and the weights in RAM, from where the host streams them. The steps that are done stay done. How far a run has
gone lives in that run's model options and nowhere else: the host keeps GUIDER and MODEL objects for later runs.

Unloading under dynamic VRAM is the host's own call, written from its source; it has not been run on a GPU.
"""

from collections.abc import Callable
from typing import TypeVar

import comfy.conds
import comfy.model_management
import torch
from torch import Tensor

from ...opensora_core.choices import RESIDENT
from ...opensora_core.memory.residency import at_most
from . import offload, selftest

RUN_KEY = "open_sora_out_of_memory"  # in the model options of one run

_TEXT = "c_crossattn"  # every pass of this model has it

Result = TypeVar("Result")


def unless_out_of_memory(run: Callable[[], Result]) -> Result | None:
    """The result, or None when memory ran out; by then the exception, which holds the tensors of its frames, is gone."""
    try:
        return run()
    except RuntimeError as error:  # every way in which a device reports it; a cancelled run is no Exception at all
        if not comfy.model_management.is_oom(error):
            raise
    comfy.model_management.soft_empty_cache()
    return None


class Fallback:
    """How far one run has gone in needing less memory, and whether it computes in a wider type.

    Args:
        report: takes one line for people at each way down.
    """

    def __init__(self, report: Callable[[str], None]):
        self._report = report
        self.is_one_by_one = False
        self.is_streaming = False
        self._widened: tuple | None = None  # the model, its type before, and the layers that cast now

    def predict(self, passes: Callable[[list], list[Tensor]], conds: list, patcher, beside: list, options: dict) -> list[Tensor]:
        """One evaluation, tried again with less memory as long as there is a way.

        Args:
            passes: gives the predictions for conditions; may run several times.
            conds: the passes' conditions, processed by the host; None for a pass that is not run.
            patcher: of the model that is sampled with.
            beside: patchers of other models that this run needs.
            options: the run's model options.

        Raises:
            torch.OutOfMemoryError: memory ran out and no way down is left.
        """
        while (step_down := self._way_down(conds, patcher, beside, options)) is not None:
            predictions = unless_out_of_memory(lambda: passes(self._arranged(conds)))
            if predictions is not None:
                return predictions
            comfy.model_management.throw_exception_if_processing_interrupted()
            step_down()
        return passes(self._arranged(conds))

    def widen(self, model) -> bool:
        """Whether a network that computed in fp16 (--fp16-unet) goes on in bf16, which reaches further, to the run's end: its layers cast their
        weights as they are used, as the host's own casting layers do. The weights are never changed."""
        if self._widened is not None or model.get_dtype_inference() != torch.float16:
            return False
        layers = [module for module in model.diffusion_model.modules() if getattr(module, "comfy_cast_weights", None) is False]
        for module in layers:
            module.comfy_cast_weights = True
        self._widened, model.manual_cast_dtype = (model, model.manual_cast_dtype, layers), torch.bfloat16
        return True

    def end(self) -> None:
        """The network is as it was before the run."""
        if self._widened is not None:
            model, before, layers = self._widened
            model.manual_cast_dtype = before
            for module in layers:
                del module.comfy_cast_weights

    def failure(self, shape: tuple[int, ...], patcher) -> str:
        """What to say of a run that failed all the same. shape: [B, C, T, H, W] of its latents. Call it with the failed run's tensors gone."""
        num_videos, (frames, height, width) = shape[0], patcher.model.config.grid.decoded(shape)
        management, device = comfy.model_management, patcher.load_device
        free, total = (at_most(int(amount(device))) for amount in (management.get_free_memory, management.get_total_memory))
        clips = "" if num_videos == 1 else f"{num_videos} videos of "
        tried = ["one pass at a time"] * self.is_one_by_one + ["the weights waiting in RAM"] * self.is_streaming
        advice = "use offload minimal, or a precision with smaller weights (fp8_e4m3fn, int8)"
        if offload.offload_of(patcher) == RESIDENT:
            advice = "or use offload auto instead of resident"
        if self.is_streaming:
            advice = "or close other programs that use the device"
        return (
            f"Sampling {clips}{frames} frames of {height}x{width} (height x width) ran out of memory"
            f"{', also with ' * bool(tried)}{' and '.join(tried)}; beside the weights loaded now the device "
            f"has {free} of {total} GiB free: make fewer frames{' or videos' * (num_videos > 1)} or a smaller size, {advice}."
        )

    def _arranged(self, conds: list) -> list:
        return [cond and [_alone(entry) for entry in cond] for cond in conds] if self.is_one_by_one else conds

    def _way_down(self, conds: list, patcher, beside: list, options: dict) -> Callable[[], None] | None:
        if "multigpu_clones" in options:
            # The host leaves what its other devices answered in their queues; the next evaluation would take it for its own.
            return None
        if not self.is_one_by_one and sum(len(cond) for cond in conds if cond is not None) > 1:
            return self._one_by_one
        # Offload resident is a person's word that the weights stay.
        if not self.is_streaming and offload.offload_of(patcher) != RESIDENT:
            return lambda: self._stream(patcher, beside)
        return None

    def _one_by_one(self) -> None:
        self.is_one_by_one = True
        self._report("Ran out of memory; from here on the passes of a step run one after another.")

    def _stream(self, patcher, beside: list) -> None:
        self.is_streaming = True
        self._report("Ran out of memory; from here on the model's weights wait in RAM and travel as they are needed, which is slower.")
        management = comfy.model_management
        kept = [loaded for loaded in management.current_loaded_models if any(one.is_clone(loaded.model) for one in (patcher, *beside))]
        management.free_memory(offload.ALL, patcher.load_device, keep_loaded=kept)
        # Not through free_memory: it would take the whole model away from a run that needs it.
        patcher.partially_unload(patcher.offload_device, patcher.loaded_size())
        management.soft_empty_cache()


class _Alone(selftest.base(comfy.conds, "CONDRegular")):
    """A condition that the host cannot put into one batch with another's."""

    def can_concat(self, other) -> bool:
        return other is self


def _alone(entry: dict) -> dict:
    """The same entry of a processed condition, run on its own."""
    return {**entry, "model_conds": {**entry["model_conds"], _TEXT: _Alone(entry["model_conds"][_TEXT].cond)}}
