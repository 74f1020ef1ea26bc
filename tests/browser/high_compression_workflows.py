"""The workflows of the high-compression variant (Video DC-AE): graphs in API form, for build_workflows.py."""

DIT, VAE = "Open_Sora_v2_Video_DC_AE.safetensors", "F32T4C128_AE.safetensors"


def high_compression(graph: dict, name: str) -> dict:
    """The same graph with the variant's two files and its own empty clip, which is told the model: another one is then refused first."""
    graph["1"]["inputs"] = {"model_name": DIT}
    graph["3"]["inputs"] = {"vae_name": VAE}
    graph["5"] = {"class_type": "OpenSoraEmptyLatentHighCompression", "inputs": {"model": ["1", 0], "length": "128"}}
    graph["9"]["inputs"]["filename_prefix"] = f"video/{name}"
    return graph
