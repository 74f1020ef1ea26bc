"""The recorded copy of how the host describes our nodes and the stock nodes that the workflows use.

tests/golden/object_info.json lets the tests check workflows, help pages and translations with no host at hand.
`make record` writes it again from the ComfyUI that is found; a test against the host compares. It also lists our nodes for ComfyUI Manager,
which cannot read their names off the source (node_list.json), gives new nodes and inputs a place in
locales/en/nodeDefs.json, where their texts are written, and freezes the schemas of nodes that are new (tests/golden/schemas.json): those of
nodes that have landed are never written again.
"""

import json
import sys
import tempfile
from pathlib import Path

from . import comfy

RECORD = comfy.PACK / "tests" / "golden" / "object_info.json"
FROZEN = comfy.PACK / "tests" / "golden" / "schemas.json"
LISTED = comfy.PACK / "node_list.json"
ENGLISH = comfy.PACK / "locales" / "en" / "nodeDefs.json"
FILE_LISTS = {"model_name", "t5_name", "clip_l_name", "vae_name", "lora_name"}  # combos whose options are the user's files
STOCK_NODES = (
    "BasicGuider", "BasicScheduler", "CLIPTextEncode", "CreateVideo", "DualCLIPLoader", "EmptyHunyuanLatentVideo",
    "EmptyImage", "EmptySD3LatentImage", "FluxGuidance", "ImageCompositeMasked", "ImageStitch", "KSampler", "KSamplerSelect",
    "LatentFromBatch", "LatentUpscale", "LoadImage", "LoadVideo",
    "LoraLoaderModelOnly", "LoraModelLoader", "ModelSamplingFlux", "ModelSamplingSD3", "PreviewImage", "PrimitiveString", "PrimitiveStringMultiline", "RandomNoise",
    "RepeatImageBatch", "SamplerCustomAdvanced", "SaveLoRA", "SaveVideo",
    "SplitSigmas", "TrainLoraNode", "UNETLoader", "VAEDecode", "VAELoader",
)  # fmt: skip
# Files of the released names and no content, so that lists of files read the same on every machine.
STAND_INS = {
    "models/diffusion_models": (
        "Open_Sora_v2.safetensors",
        "Open_Sora_v2_Video_DC_AE.safetensors",
        "flux1-dev.safetensors",
        "diffusion_pytorch_model.safetensors",
        "CogVideoX_1_5_5b_T2V_bf16.safetensors",
        "CogVideoX_1_5_5b_I2V_bf16.safetensors",
        "OpenSora-STDiT-v3.safetensors",
        "OpenSora-STDiT-v4.safetensors",
        "OpenSora-STDiT-v4-i2v.safetensors",
    ),
    "models/text_encoders": ("clip_l.safetensors", "t5xxl_fp16.safetensors"),
    "models/vae": (
        "F32T4C128_AE.safetensors",
        "ae.safetensors",
        "hunyuan_vae.safetensors",
        "cogvideox_vae_bf16.safetensors",
        "OpenSora-VAE-v1.2.safetensors",
        "OpenSora-VAE-v1.3.safetensors",
    ),
    "models/loras": ("lora.safetensors",),
    "input": ("example.png",),
}
KEPT = ("input", "input_order", "output", "output_is_list", "output_name", "output_tooltips", "display_name", "description", "category",
        "output_node", "search_aliases", "experimental", "deprecated")  # fmt: skip


def lay_out_stand_ins(base: Path) -> None:
    """Put the empty files where a host on this base directory looks for them."""
    for folder, names in STAND_INS.items():
        (base / folder).mkdir(parents=True, exist_ok=True)
        for name in names:
            (base / folder / name).touch()


def from_host(server: comfy.Server) -> dict:
    """{host_version, nodes}: what a running host says of our nodes and of STOCK_NODES."""
    everything = server.get("/object_info")
    names = [name for name in everything if name.startswith("OpenSora")] + list(STOCK_NODES)
    nodes = {name: {key: everything[name][key] for key in KEPT if key in everything[name]} for name in names}
    return {"host_version": server.get("/system_stats")["system"]["comfyui_version"], "nodes": nodes}


def read() -> dict:
    """The recorded copy."""
    return json.loads(RECORD.read_text(encoding="utf-8"))


def schema_of(info: dict) -> dict:
    """What must never change of a node: the names, order, types, defaults and choices of its inputs, and its outputs."""
    inputs = []
    for section in ("required", "optional"):
        for name in info["input_order"].get(section, []):
            kind, options = (*info["input"][section][name], {})[:2]
            choices = kind if isinstance(kind, list) else options.get("options")
            inputs.append(
                {
                    "name": name,
                    "type": "COMBO" if isinstance(kind, list) else kind,
                    "optional": section == "optional",
                    "default": options.get("default"),
                    "choices": choices if name not in FILE_LISTS else None,
                }
            )
    return {"inputs": inputs, "outputs": [list(pair) for pair in zip(info["output"], info["output_name"], strict=True)]}


def english(nodes: dict) -> dict:
    """The texts of our nodes in the form of locales/<language>/nodeDefs.json."""
    texts = {}
    for name, info in nodes.items():
        if not name.startswith("OpenSora"):
            continue
        inputs = {}
        for section in ("required", "optional"):
            for key, spec in info["input"].get(section, {}).items():
                options = spec[1] if len(spec) > 1 else {}
                inputs[key] = {"name": options.get("display_name") or key, "tooltip": options.get("tooltip", "")}
        tooltips = info.get("output_tooltips") or [""] * len(info["output"])
        outputs = {
            str(i): {"name": label, "tooltip": tip or ""} for i, (label, tip) in enumerate(zip(info["output_name"], tooltips, strict=True))
        }
        of_node = {"display_name": info["display_name"], "description": info["description"], "search_aliases": info["search_aliases"]}
        texts[name] = {**of_node, "inputs": inputs, "outputs": outputs}
    return texts


def _write(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> int:
    installation = comfy.find()
    if installation is None:
        print("No ComfyUI found; set COMFYUI_PATH to a checkout.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        lay_out_stand_ins(Path(folder))
        with comfy.Server(installation, Path(folder)) as server:
            record = from_host(server)
    _write(RECORD, record)
    texts = english(record["nodes"])
    _write(ENGLISH, texts)
    _write(LISTED, {name: told["description"] for name, told in texts.items()})
    frozen = json.loads(FROZEN.read_text(encoding="utf-8")) if FROZEN.is_file() else {}
    landed = {name: schema_of(info) for name, info in record["nodes"].items() if name.startswith("OpenSora")}
    _write(FROZEN, landed | frozen)
    print(f"{len(record['nodes'])} nodes of ComfyUI {record['host_version']} in {RECORD.relative_to(comfy.PACK)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
