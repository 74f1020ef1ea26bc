"""The workflows of CogVideoX: graphs in API form, for build_workflows.py."""

T2V_2B, T2V, I2V = "diffusion_pytorch_model.safetensors", "CogVideoX_1_5_5b_T2V_bf16.safetensors", "CogVideoX_1_5_5b_I2V_bf16.safetensors"
VAE, T5_ALONE = "cogvideox_vae_bf16.safetensors", "none (T5 alone)"
SMALL_CLIP, LARGE_CLIP = (720, 480, "49"), (1360, 768, "81")  # width, height, length of 1.0 and of 1.5


def cogvideox(graph: dict, dit: str, name: str) -> dict:
    """The same graph with a model's file, its own usual clip and numbers, and its settings from a plan of what this machine has."""
    width, height, length = SMALL_CLIP if dit == T2V_2B else LARGE_CLIP
    graph["31"] = {"class_type": "PrimitiveString", "inputs": {"value": length}, "_meta": {"title": "Length"}}
    graph["30"] = {
        "class_type": "OpenSoraPreflight", "inputs": {"width": width, "height": height, "length": ["31", 0], "model_name": dit},
    }  # fmt: skip
    graph["1"]["inputs"] = {"model_name": dit, "precision": ["30", 1], "offload": ["30", 2]}
    graph["2"]["inputs"]["clip_l_name"], graph["3"]["inputs"]["vae_name"] = T5_ALONE, VAE
    graph["4"]["inputs"]["model"] = ["1", 0]
    graph["5"] = {"class_type": "OpenSoraEmptyLatent", "inputs": {"model": ["1", 0], "length": ["31", 0]}}
    graph["7"]["inputs"]["policy"], graph["8"]["inputs"]["fps"] = ["30", 3], ["5", 4]
    graph["12"] = {"class_type": "OpenSoraDefaults", "inputs": {"model": ["1", 0]}}
    graph["6"]["inputs"] |= {"steps": ["12", 0], "text_guidance": ["12", 1], "image_guidance": ["12", 2]}
    graph["9"]["inputs"]["filename_prefix"] = f"video/{name}"
    return graph
