"""The graphs of text to picture to video, in API form, for build_workflows.py.

In one of them Open-Sora Flux to Video does it all; in the other the same chain is made of the host's own Flux nodes, so that any other
image model, an upscaler or a ControlNet can stand in between. The parts of that chain are also a blueprint.
"""

PROMPT = (
    "A red paper kite climbs above a wide beach at sunset. Long waves roll in and leave a mirror of wet sand that catches the orange light. The kite "
    "turns slowly in the wind, its tail drawing curves, while the camera follows it upward."
)
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
CHAIN_TEXT = "Flux draws the first frame and Open-Sora 2.0 makes a video of it. Open it to put an upscaler, a ControlNet or another image model in between."
CHAIN_WIDGETS = (
    ("33", "value", "prompt"), ("4", "negative_prompt"), ("5", "resolution"), ("5", "aspect_ratio"), ("5", "length"), ("6", "seed"),
    ("29", "width", "picture width"), ("29", "height", "picture height"), ("27", "noise_seed", "picture seed"), ("23", "guidance"), ("6", "steps"),
    ("4", "motion_score"),
)  # fmt: skip


def in_one_node(graph: dict) -> dict:
    """Text to video (as build_workflows.text_to_video gives it) with one node in place of encoding, sampling and decoding."""
    wires = {"flux_model": [FLUX, 0], "flux_vae": [FLUX_VAE, 0], "clip": ["2", 0], "model": ["1", 0], "vae": ["3", 0]}
    kept = {name: graph[name] for name in ("1", "2", "3", "8", "9")} | FLUX_LOADERS
    kept["10"] = {
        "class_type": "OpenSoraFluxToVideo",
        "inputs": {**wires, "prompt": PROMPT, "negative_prompt": "", "seed": 42, "length": "129"},
    }
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
