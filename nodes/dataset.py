"""Open-Sora Video Dataset: a folder of clips with captions, as latents and conditioning for ComfyUI's own LoRA trainer."""

from comfy_api.latest import io

from .host import dataset, inputs
from .host.node import Node, gathered


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
    @gathered(encoder=dataset.Encoder)
    def execute(cls, folder, cut_scenes, encoder) -> io.NodeOutput:
        if folder == dataset.LESSON:
            found = encoder.of_lesson()
        else:
            found = encoder.of_folder(dataset.folder_of(folder), cut_scenes, cls.hidden.unique_id)
        return io.NodeOutput([{"samples": samples} for samples, _ in found], [conditioning for _, conditioning in found])
