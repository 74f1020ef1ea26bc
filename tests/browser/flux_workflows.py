"""The workflows of text to picture to video: graphs in API form, their notes, layout and files, for build_workflows.py.

In one of them Open-Sora Flux to Video does it all; in the other the same chain is made of the host's own Flux nodes, so that any other
image model, an upscaler or a ControlNet can stand in between. The parts of that chain are also a blueprint.
"""

from dataclasses import replace

ONE_NOTE = """## Text to picture to video, 256px

Flux draws the first frame at 1024 x 576, Open-Sora makes a video of it: 129 frames of 336 x 192 at 24 FPS. This is how Open-Sora 2.0 is best used.

- The picture is shown on the node while the video is made.
- **A new video from a picture you like**: put the seed shown with it into `image_seed`; then `seed` alone is new, and the picture is not drawn again.
- Flux schnell works as well: 4 steps are taken by themselves.
- 768px: find picture and seed at 256px first; each forward there works on about nine times the tokens.
"""
PARTS_NOTE = """## Text to picture to video in parts, 256px

The chain of **Open-Sora Flux to Video** with ComfyUI's own Flux nodes: from the picture on, everything is Open-Sora.

- **Any other image model**: replace the nodes before *VAE Decode*, or load a picture.
- **In between**: put an upscaler, a ControlNet or an editor before `start_image`; Open-Sora scales the picture to the video.
- The same picture with a new seed of the **Open-Sora Sampler** is a new video; the picture is not drawn again.
- Flux's own schedule is used here. **Open-Sora Flux Picture** draws by the one that Open-Sora was released with.
"""
PROMPT = (
    "A red paper kite climbs above a wide beach at sunset. Long waves roll in and leave a mirror of wet sand that catches the orange light. The kite "
    "turns slowly in the wind, its tail drawing curves, while the camera follows it upward."
)
FLUX_FILES = {
    "flux": [
        {
            "name": "flux1-dev.safetensors",
            "url": "https://huggingface.co/Comfy-Org/flux1-dev/resolve/main/flux1-dev.safetensors",
            "directory": "diffusion_models",
        }
    ],
    "flux_vae": [
        {
            "name": "ae.safetensors",
            "url": "https://huggingface.co/Comfy-Org/Lumina_Image_2.0_Repackaged/resolve/main/split_files/vae/ae.safetensors",
            "directory": "vae",
        }
    ],
}
FLUX, FLUX_VAE = "20", "21"  # nodes in both workflows
FLUX_LOADERS = {
    FLUX: {
        "class_type": "UNETLoader",
        "inputs": {"unet_name": "flux1-dev.safetensors", "weight_dtype": "default"},
        "_meta": {"title": "Load Flux"},
    },
    FLUX_VAE: {"class_type": "VAELoader", "inputs": {"vae_name": "ae.safetensors"}, "_meta": {"title": "Load Flux VAE"}},
}
# The part of the second workflow that is a blueprint too, everything but loaders and what is done with picture and frames, in columns.
CHAIN = (
    ("33", "22", "23", "24", "29"), ("25", "26", "27", "28", "30"), ("31", "4", "5"), ("11", "6"), ("7",),
)  # fmt: skip
CHAIN_TITLE = "Open-Sora 2 Flux to Video"
CHAIN_TEXT = "Flux draws the first frame and Open-Sora 2.0 makes a video of it. Open it to put an upscaler, a ControlNet or another image model in between."
CHAIN_WIDGETS = [  # no name twice; the front-end shows a sampler's seed first
    ["6", "seed"], ["33", "value"], ["4", "negative_prompt"], ["5", "resolution"], ["5", "aspect_ratio"], ["5", "num_frames"], ["29", "width"],
    ["29", "height"], ["27", "noise_seed"], ["23", "guidance"], ["6", "steps"], ["4", "motion_score"],
]  # fmt: skip


def in_one_node(graph: dict) -> dict:
    """Text to video (as build_workflows.text_to_video gives it) with one node in place of encoding, sampling and decoding."""
    wires = {"flux_model": [FLUX, 0], "flux_vae": [FLUX_VAE, 0], "clip": ["2", 0], "model": ["1", 0], "vae": ["3", 0]}
    kept = {name: graph[name] for name in ("1", "2", "3", "8", "9")} | FLUX_LOADERS
    kept["10"] = {"class_type": "OpenSoraFluxToVideo", "inputs": {**wires, "prompt": PROMPT, "negative_prompt": "", "seed": 42}}
    kept["8"]["inputs"] = {"images": ["10", 0], "fps": 24}
    kept["9"]["inputs"]["filename_prefix"] = "video/open-sora-flux"
    return kept


def in_parts(graph: dict) -> dict:
    """Text to video with a picture by the host's own Flux nodes as its first frame, both from one prompt."""
    stock = {
        "22": ("CLIPTextEncode", {"clip": ["2", 0], "text": ["33", 0]}),
        "23": ("FluxGuidance", {"conditioning": ["22", 0], "guidance": 4.0}),
        "24": ("ModelSamplingFlux", {"model": [FLUX, 0], "max_shift": 1.15, "base_shift": 0.5, "width": 1024, "height": 576}),
        "25": ("BasicGuider", {"model": ["24", 0], "conditioning": ["23", 0]}),
        "26": ("BasicScheduler", {"model": ["24", 0], "scheduler": "simple", "steps": 50, "denoise": 1.0}),
        "27": ("RandomNoise", {"noise_seed": 42}),
        "28": ("KSamplerSelect", {"sampler_name": "euler"}),
        "29": ("EmptySD3LatentImage", {"width": 1024, "height": 576, "batch_size": 1}),
        "30": (
            "SamplerCustomAdvanced",
            {"noise": ["27", 0], "guider": ["25", 0], "sampler": ["28", 0], "sigmas": ["26", 0], "latent_image": ["29", 0]},
        ),
        "31": ("VAEDecode", {"samples": ["30", 0], "vae": [FLUX_VAE, 0]}),
        "32": ("PreviewImage", {"images": ["31", 0]}),
        "33": ("PrimitiveStringMultiline", {"value": PROMPT}),
    }
    graph |= FLUX_LOADERS | {number: {"class_type": kind, "inputs": inputs} for number, (kind, inputs) in stock.items()}
    graph["33"]["_meta"] = {"title": "Prompt"}
    graph["4"]["inputs"]["prompt"] = ["33", 0]
    graph["11"] = {
        "class_type": "OpenSoraImageToVideo",
        "inputs": {"positive": ["4", 0], "negative": ["4", 1], "vae": ["3", 0], "latent": ["5", 0], "start_image": ["31", 0]},
    }
    graph["6"]["inputs"] |= {"positive": ["11", 0], "negative": ["11", 1], "latent": ["11", 2]}
    graph["9"]["inputs"]["filename_prefix"] = "video/open-sora-flux-parts"
    return graph


def with_flux(released):
    """What the other workflows say of the files they read, and Flux's two. released: build_workflows' Files."""
    note = released.note.replace(
        "hpcai-tech/Open-Sora-v2\n\n**models/text_encoders**",
        "hpcai-tech/Open-Sora-v2\n- `flux1-dev.safetensors`, 23.8 GB, or any other file of Flux.1 dev or schnell\n\n**models/text_encoders**",
    )
    note = note.replace("\n\n## Licences", "\n- `ae.safetensors`, 335 MB, Flux's own\n\n## Licences")
    note = note.replace(
        "- **hunyuan_vae**: Tencent", "- **Flux.1 dev**: FLUX.1-dev Non-Commercial Licence; schnell Apache-2.0.\n- **hunyuan_vae**: Tencent"
    )
    return replace(released, note=note, models=released.models | {FLUX: FLUX_FILES["flux"], FLUX_VAE: FLUX_FILES["flux_vae"]})


def jobs(job, text_to_video, released) -> list[dict]:
    """Requests to the front-end. job, text_to_video, released: build_workflows'."""
    files = with_flux(released)
    columns = [["about", "files"], [FLUX, FLUX_VAE, "1", "2", "3"], ["10"], ["8", "9"]]
    one = job("open-sora-2-flux-to-video-256px", in_one_node(text_to_video("256px")), ONE_NOTE, columns, files)
    columns = [
        ["about", "files"], [FLUX, FLUX_VAE, "1", "2", "3"], ["33", "22", "23", "24", "29"], ["25", "26", "27", "28", "30"],
        ["31", "32"], ["4", "5"], ["11", "6"], ["7", "8", "9"],
    ]  # fmt: skip
    parts = job("open-sora-2-flux-to-video-in-parts-256px", in_parts(text_to_video("256px")), PARTS_NOTE, columns, files)
    groups = {"Files": columns[1], "Picture: Flux": sum(columns[2:5], []), "Video: Open-Sora": sum(columns[5:], [])}
    return [one, {**parts, "groups": groups}]


def blueprints(job, text_to_video) -> list[dict]:
    """As jobs, of the parts that become one node."""
    whole = job(CHAIN_TITLE, in_parts(text_to_video("256px")), "", [list(column) for column in CHAIN])
    part = {
        "inside": [number for column in CHAIN for number in column], "title": CHAIN_TITLE, "description": CHAIN_TEXT, "promoted": CHAIN_WIDGETS,
        "inputs": {"model": "flux_model", "vae": "flux_vae", "model_1": "model", "vae_1": "vae"}, "outputs": ["picture", "fps", "video frames"],
    }  # fmt: skip
    return [{**whole, **part, "picture": None}]
