"""The workflows of Open-Sora 1.2 and 1.3: graphs in API form, for build_workflows.py. Every number of a run comes from Open-Sora Defaults."""

FILES = {
    "1.2": ("OpenSora-STDiT-v3.safetensors", "OpenSora-VAE-v1.2.safetensors"),
    "1.3": ("OpenSora-STDiT-v4.safetensors", "OpenSora-VAE-v1.3.safetensors"),
}
PICTURES_1_3 = "OpenSora-STDiT-v4-i2v.safetensors"
T5, T5_ALONE = "t5xxl_fp16.safetensors", "none (T5 alone)"
BETWEEN = "0;0,1,0,-1,1"  # the first reference begins the video, the second ends it


def text_to_video(version: str, prompt: str, size: str, length: str) -> dict:
    """Text to video."""
    transformer, vae = FILES[version]
    return {
        "1": {"class_type": "OpenSoraModelLoader", "inputs": {"model_name": transformer}},
        "2": {"class_type": "OpenSoraTextEncoderLoader", "inputs": {"t5_name": T5, "clip_l_name": T5_ALONE}},
        "3": {"class_type": "OpenSoraVAELoader", "inputs": {"vae_name": vae}},
        "4": {
            "class_type": "OpenSoraT5TextEncode",
            "inputs": {"clip": ["2", 0], "prompt": prompt, "negative_prompt": "", "model": ["1", 0], "camera_motion": ""},
        },
        "5": {"class_type": "OpenSoraEmptyLatent", "inputs": {"model": ["1", 0], "size": size, "length": length}},
        "20": {"class_type": "OpenSoraDefaults", "inputs": {"model": ["1", 0]}},
        "6": {
            "class_type": "OpenSoraRectifiedFlowSampler",
            "inputs": {
                "model": ["1", 0], "positive": ["4", 0], "negative": ["4", 1], "latent": ["5", 0], "seed": 42,
                "steps": ["20", 0], "text_guidance": ["20", 1], "image_guidance": ["20", 2],
            },
        },
        "7": {"class_type": "OpenSoraTiledVAEDecode", "inputs": {"vae": ["3", 0], "latent": ["6", 0]}},
        "8": {"class_type": "CreateVideo", "inputs": {"images": ["7", 0], "fps": ["5", 4]}},
        "9": {"class_type": "SaveVideo", "inputs": {"video": ["8", 0], "filename_prefix": f"video/open-sora-{version}"}},
    }  # fmt: skip


def _given(graph: dict, kind: str, **inputs) -> dict:
    graph["11"] = {
        "class_type": kind,
        "inputs": {"positive": ["4", 0], "negative": ["4", 1], "vae": ["3", 0], "latent": ["5", 0], **inputs},
    }
    graph["6"]["inputs"] |= {"positive": ["11", 0], "negative": ["11", 1], "latent": ["11", 2]}
    return graph


def image_to_video(graph: dict, transformer: str = "") -> dict:
    """The same with a first frame. transformer: the file of another one."""
    graph["10"] = {"class_type": "LoadImage", "inputs": {"image": "example.png"}}
    if transformer:
        graph["1"]["inputs"]["model_name"] = transformer
    return _given(graph, "OpenSoraImageToVideo", start_image=["10", 0])


def masked(graph: dict) -> dict:
    """The same between two pictures, by a mask strategy."""
    for number in ("10", "12"):
        graph[number] = {"class_type": "LoadImage", "inputs": {"image": "example.png"}}
    return _given(graph, "OpenSoraMaskStrategy", strategy=BETWEEN, reference_0=["10", 0], reference_1=["12", 0])


def endless(graph: dict, later_prompts: str) -> dict:
    """The same with two more clips."""
    numbers = {name: graph["6"]["inputs"][name] for name in ("steps", "text_guidance", "image_guidance")}
    wires = {"model": ["1", 0], "positive": ["4", 0], "negative": ["4", 1], "vae": ["3", 0], "latent": ["6", 0], "clip": ["2", 0]}
    graph["10"] = {
        "class_type": "OpenSoraContinueVideo",
        "inputs": {**wires, "segments": 2, "seed": 42, "prompts": later_prompts, **numbers},
    }
    del graph["7"]
    graph["8"]["inputs"]["images"] = ["10", 1]
    graph["9"]["inputs"]["filename_prefix"] += "-endless"
    return graph
