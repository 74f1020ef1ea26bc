"""Open-Sora Video Dataset: a folder of clips with captions, as latents and conditioning for ComfyUI's own LoRA trainer."""

from comfy_api.latest import io

from ..opensora_core.families.table import DEFAULT
from .host import dataset, inputs
from .host.families import family_of
from .host.node import Node


class OpenSoraVideoDataset(Node, category="training", outputs={"latents": [io.Latent], "positive": [io.Conditioning]}):
    takes = [
        inputs.files("folder", lambda: [*dataset.folders(), dataset.LESSON]),
        *inputs.of("vae", "clip", "latent"),
        io.Int.Input("fps", default=24, min=1, max=120),
        *inputs.of("motion_score"),
        io.Boolean.Input("cut_scenes", default=False),
        *inputs.of("model", optional=True),
    ]

    @classmethod
    def fingerprint_inputs(cls, folder):
        if folder == dataset.LESSON:
            return []
        return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(dataset.folder_of(folder).glob("[!.]*"))]

    @classmethod
    def execute(cls, folder, vae, clip, latent, fps, motion_score, cut_scenes, model) -> io.NodeOutput:
        family = DEFAULT if model is None else family_of(model)
        asked = dataset.Asked(tuple(latent["samples"].shape), fps, motion_score, cut_scenes, family)
        if folder == dataset.LESSON:
            found = dataset.lesson(vae, clip, asked)
        else:
            found = dataset.encoded(dataset.folder_of(folder), vae, clip, asked, cls.hidden.unique_id)
        return io.NodeOutput([{"samples": samples} for samples, _ in found], [conditioning for _, conditioning in found])
