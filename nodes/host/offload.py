"""How much of a MODEL's weights may be on the device at a time, through the host's own loading.

The host asks a model's patcher to load as much as it has found room for (`partially_load`); what stays behind is brought
to the device layer by layer, by the host. A mode bounds that request and does nothing else, so LoRA, hooks, /free and
the host's own decisions to unload go on as ever. A mode belongs to a MODEL and its copies, not to the weights, which
copies share: whichever copy is sampled with decides where they are.

With dynamic VRAM the host does not load ahead at all: weights get memory as they are needed and give it up under pressure, those
beyond a model's watermark never get any. A bound sets that watermark. It is a hint: small layers come on top, and
whoever loads the model next moves it. That part was written from the allocator's source and has not been run on a GPU.
"""

import comfy.model_management

from ...opensora_core.choices import AUTO, BUDGET, MINIMAL, RESIDENT
from ...opensora_core.errors import OpenSoraError
from ...opensora_core.memory.residency import GIB, at_least, at_most
from . import selftest

_ATTACHMENT = "open_sora_offload"  # of a MODEL and its copies: (mode, bytes of weights on the device at most, or None: all of them, always)
ALL = 1e32  # bytes; the host's own word for "as much as there is"


class Bounded:
    """Goes before a patcher class of the host and bounds what it loads."""

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        """Called by the host with the bytes that it found room for, beyond those that are loaded."""
        offload = self.get_attachment(_ATTACHMENT)
        if offload is None:
            return super().partially_load(device_to, extra_memory, force_patch_weights)
        _, limit = offload
        if limit is None and not comfy.model_management.is_device_cpu(device_to):  # there the weights are in this memory already
            # What is free beside what else is on the device; the host has made what room it could by now. The patcher's own count has, with
            # dynamic VRAM, what other models and this one would give up.
            free = self.get_free_memory(device_to) + (0 if self.is_dynamic() else self.loaded_size())
            if self.model_size() > free:
                # As the host does when loading fails: nothing of it stays on the device uncounted.
                self.detach()
                raise OpenSoraError(_does_not_fit(self.model_size(), int(free), "the device has free"))
        # Negative where more is loaded than the mode allows; the host then unloads as much.
        extra_memory = ALL if limit is None else min(extra_memory, limit - self.loaded_size())
        result = super().partially_load(device_to, extra_memory, force_patch_weights)
        vbar = getattr(self.model, "dynamic_vbars", {}).get(device_to) if self.is_dynamic() else None
        if vbar is not None and limit is None:
            vbar.set_watermark_limit(self.model_size())  # what dynamic VRAM may not take from the weights until this node ends
        elif vbar is not None:
            vbar.set_watermark(limit)  # what it may give them from now on
        return result

    def clone(self, disable_dynamic=False, model_override=None, force_deepcopy=False):
        """The host's copy, bounded as this one is, whatever class the host made it of."""
        return _bounded(super().clone(disable_dynamic, model_override, force_deepcopy))


def apply_offload(model, mode: str, budget_gib: float) -> tuple[object, str]:
    """A copy of a MODEL with an offload mode.

    Args:
        mode: auto (the host decides), resident (all weights on the device), budget, or minimal (as little as the host can).
        budget_gib: for the mode budget: GiB of weights on the device at most.

    Returns:
        The copy, and a line for people that says what it means here ("" for auto).

    Raises:
        OpenSoraError: a budget of nothing or of more than the device has, or weights that can never fit.
    """
    copy = model.clone()
    if mode == AUTO:
        copy.remove_attachments(_ATTACHMENT)
        return copy, ""
    total = comfy.model_management.get_total_memory(model.load_device)
    size = model.model_size()
    if mode == BUDGET and budget_gib <= 0:
        raise OpenSoraError(
            f"A budget of {budget_gib} GiB is not an amount of memory; give more than 0, or use minimal for as little as can be."
        )
    if mode == BUDGET and budget_gib * GIB > total:
        raise OpenSoraError(f"A budget of {budget_gib:g} GiB is larger than the device, which has {at_most(total)} GiB; give at most that.")
    if mode == RESIDENT and size > total:
        raise OpenSoraError(_does_not_fit(size, total, "the device has"))
    limit = {RESIDENT: None, MINIMAL: 0, BUDGET: int(budget_gib * GIB)}[mode]
    copy = _bounded(copy)
    copy.set_attachments(_ATTACHMENT, (mode, limit))
    return copy, _line(copy, mode, limit, size)


def offload_of(model) -> str:
    """The mode of a MODEL."""
    offload = model.get_attachment(_ATTACHMENT)
    return AUTO if offload is None else offload[0]


def _bounded(patcher):
    if not isinstance(patcher, Bounded):
        patcher.__class__ = selftest.before(Bounded, type(patcher))
    return patcher


def _does_not_fit(size: int, room: int, words: str) -> str:
    return (
        f"Offload resident needs {at_least(size)} GiB for the weights and {words} {at_most(room)} GiB; "
        "use auto, a budget, or a precision with smaller weights (fp8_e4m3fn, int8)."
    )


def _line(model, mode: str, limit: int | None, size: int) -> str:
    if comfy.model_management.is_device_cpu(model.load_device):
        return f"Offload {mode}: ComfyUI computes on the CPU here, so that all {at_least(size)} GiB of weights are in RAM in every mode."
    hint = " With ComfyUI's dynamic VRAM this is a hint." if model.is_dynamic() else ""
    if limit is None:
        return f"Offload {mode}: all {at_least(size)} GiB of weights on the device.{hint}"
    if limit >= size:
        return f"Offload {mode}: the weights take {at_least(size)} GiB, so that all of them may stay on the device.{hint}"
    kept = f"at most {at_most(limit)}" if limit else "as little as possible"
    return f"Offload {mode}: {kept} of {at_least(size)} GiB of weights on the device, the rest waits in RAM.{hint}"
