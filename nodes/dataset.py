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
            display_name="Open-Sora Video Dataset",
            category="Open-Sora/training",
            description="Reads a folder of clips with captions and encodes them for Train LoRA: one latent and one conditioning for each clip or scene. "
            "What is encoded is kept in the folder, so that the next run encodes nothing again.",
            search_aliases=["open sora train", "lora dataset", "train video lora", "finetune", "captions", "训练", "数据集"],
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=dataset.folders(),
                    tooltip="A folder in ComfyUI's input folder. It holds videos, each with its caption in a text file of the same name, or a CSV with "
                    "the columns path and text, and num_frames if wanted.",
                ),
                io.Vae.Input("vae"),
                io.Clip.Input("clip"),
                io.Latent.Input(
                    "latent",
                    tooltip="An empty clip of the size and length that every clip is brought to: cut in the middle, and its first frames.",
                ),
                io.Int.Input("fps", default=24, min=1, max=120, tooltip="Frames a second at which clips are read, and which captions say."),
                io.Int.Input(
                    "motion_score",
                    default=4,
                    min=0,
                    max=15,
                    tooltip="How much moves, said in every caption: 1 to 15. 4 is the released default; 0 leaves the sentence out.",
                ),
                io.Boolean.Input(
                    "cut_scenes",
                    default=False,
                    tooltip="On = a sample from each scene of a clip (needs PySceneDetect). Off = one from its beginning.",
                ),
                io.Model.Input(
                    "model", optional=True, tooltip="The model that is to learn; it says how captions are read. None = Open-Sora 2.0."
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latents", is_output_list=True, tooltip="One for each sample, for Train LoRA."),
                io.Conditioning.Output(display_name="positive", is_output_list=True, tooltip="The encoded caption of each."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, folder, vae=None, clip=None, latent=None, fps=24, motion_score=4, cut_scenes=False, model=None):
        return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(dataset.folder_of(folder).glob("[!.]*"))]

    @classmethod
    def execute(cls, folder, vae, clip, latent, fps, motion_score, cut_scenes, model=None) -> io.NodeOutput:
        family = DEFAULT if model is None else family_of(model)
        asked = dataset.Asked(tuple(latent["samples"].shape), fps, motion_score, cut_scenes, family)
        found = dataset.encoded(dataset.folder_of(folder), vae, clip, asked, cls.hidden.unique_id)
        return io.NodeOutput([{"samples": samples} for samples, _ in found], [conditioning for _, conditioning in found])
