"""Moving house: nodes of the earlier Open-Sora packs and of the CogVideoX wrapper for which one of ours means the same. The host offers to put ours in
their places where the old pack is not installed; docs/MOVING.md says what moves and what cannot.

What is not here stays missing: a loader that holds network, text encoder and VAE in one, what takes it, and names that two packs have with
other inputs (OpenSoraLoader and OpenSoraSampler). An old input that a graph may lack is not mapped: the host would look for it all the same.

Names, order of widgets and of outputs: chaojie/ComfyUI-Open-Sora@59c1994c, bombax-xiaoice/ComfyUI-Open-Sora-I2V@549d9fb4,
kijai/ComfyUI-CogVideoXWrapper@12632213 (nodes.py and model_loading.py of each).
"""

from comfy_api.latest import ComfyAPI, io
from server import PromptServer

# Old node: its widgets in order (also the one that the front-end puts beneath a seed), our node, our inputs, with its own behind a colon where that
# has another name, how many outputs, which keep their places.
MOVES = {
    "OpenSoraRun": ("dtype", "OpenSoraTiledVAEDecode", "vae latent:samples", 1),
    "OpenSoraDecoder": ("dtype", "OpenSoraTiledVAEDecode", "vae latent:latents", 1),
    "OpenSoraEncoder": ("dtype", "OpenSoraTiledVAEEncode", "vae image", 1),
    "OpenSoraTextEncoder": ("positive_prompt negative_prompt camera_motion", "OpenSoraT5TextEncode",
                            "clip:text_encoder prompt:positive_prompt negative_prompt camera_motion", 2),
    "CogVideoXModelLoader": ("model", "OpenSoraModelLoader", "model_name:model", 1),
    "CogVideoXVAELoader": ("model_name", "OpenSoraVAELoader", "vae_name:model_name", 1),
    "CogVideoTextEncode": ("prompt", "OpenSoraT5TextEncode", "clip prompt", 1),
    "CogVideoSampler": ("num_frames steps cfg seed control_after_generate scheduler", "OpenSoraRectifiedFlowSampler",
                        "model positive negative steps text_guidance:cfg seed", 1),
    "CogVideoDecode": ("enable_vae_tiling", "OpenSoraTiledVAEDecode", "vae latent:samples", 1),
}  # fmt: skip


class _Move(io.NodeReplace):
    """A replacement whose outputs keep their places. Pages are told so, to take wires along; the host itself is not, which needs no telling
    and would look for inputs of nodes behind by their old names, whichever of the two it replaced first (node_replace_manager.py of 0.33)."""

    def as_dict(self) -> dict:
        places = range(MOVES[self.old_node_id][-1])
        return {**super().as_dict(), "output_mapping": [{"new_idx": place, "old_idx": place} for place in places]}


async def register() -> None:
    """Tell the host of all of them, where there is one that opens workflows."""
    if getattr(PromptServer, "instance", None) is not None:
        for old, (widgets, ours, inputs, _) in MOVES.items():
            taken = [{"new_id": new, "old_id": was or new} for new, _, was in (one.partition(":") for one in inputs.split())]
            await ComfyAPI().node_replacement.register(_Move(ours, old, old_widget_ids=widgets.split(), input_mapping=taken))
