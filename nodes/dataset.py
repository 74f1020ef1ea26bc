"""Open-Sora Video Dataset: a folder of clips with captions, as latents and conditioning for ComfyUI's own LoRA trainer."""

from comfy_api.latest import io

from ..opensora_core.families.table import DEFAULT
from .host import dataset
from .host.families import family_of
from .host.node import Node


class OpenSoraVideoDataset(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OpenSoraVideoDataset",
            category="Open-Sora/training",
            inputs=[
                io.Combo.Input("folder", options=dataset.folders()),
                io.Vae.Input("vae"),
                io.Clip.Input("clip"),
                io.Latent.Input("latent"),
                io.Int.Input("fps", default=24, min=1, max=120),
                io.Int.Input("motion_score", default=4, min=0, max=15),
                io.Boolean.Input("cut_scenes", default=False),
                io.Model.Input("model", optional=True),
            ],
            outputs=[
                io.Latent.Output(display_name="latents", is_output_list=True),
                io.Conditioning.Output(display_name="positive", is_output_list=True),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, folder, fps, motion_score, cut_scenes, vae=None, clip=None, latent=None, model=None):
        return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(dataset.folder_of(folder).glob("[!.]*"))]

    @classmethod
    def execute(cls, folder, vae, clip, latent, fps, motion_score, cut_scenes, model=None) -> io.NodeOutput:
        family = DEFAULT if model is None else family_of(model)
        asked = dataset.Asked(tuple(latent["samples"].shape), fps, motion_score, cut_scenes, family)
        found = dataset.encoded(dataset.folder_of(folder), vae, clip, asked, cls.hidden.unique_id)
        return io.NodeOutput([{"samples": samples} for samples, _ in found], [conditioning for _, conditioning in found])
