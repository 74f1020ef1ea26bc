"""The recorded copy of how the host describes our nodes and the stock nodes that the workflows use.

tests/golden/object_info.json lets the tests check workflows, help pages and translations with no host at hand, and
freezes the schemas. `make record` writes it again from the ComfyUI that is found; a test against the host compares.
"""

import json
import sys
import tempfile
from pathlib import Path

from . import comfy

RECORD = comfy.PACK / "tests" / "golden" / "object_info.json"
STOCK_NODES = (
    "BasicGuider", "CLIPTextEncode", "CreateVideo", "DualCLIPLoader", "EmptyHunyuanLatentVideo", "KSampler", "KSamplerSelect", "LoadImage",
    "LoraLoaderModelOnly", "ModelSamplingSD3", "RandomNoise", "SamplerCustomAdvanced", "SaveVideo", "UNETLoader", "VAEDecode", "VAELoader",
)  # fmt: skip
# Files of the released names and no content, so that lists of files read the same on every machine.
STAND_INS = {
    "models/diffusion_models": ("Open_Sora_v2.safetensors",),
    "models/text_encoders": ("clip_l.safetensors", "t5xxl_fp16.safetensors"),
    "models/vae": ("hunyuan_vae.safetensors",),
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
    names = sorted(name for name in everything if name.startswith("OpenSora")) + list(STOCK_NODES)
    nodes = {name: {key: everything[name][key] for key in KEPT if key in everything[name]} for name in names}
    return {"host_version": server.get("/system_stats")["system"]["comfyui_version"], "nodes": nodes}


def read() -> dict:
    """The recorded copy."""
    return json.loads(RECORD.read_text(encoding="utf-8"))


def main() -> int:
    installation = comfy.find()
    if installation is None:
        print("No ComfyUI found; set COMFYUI to a checkout.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        lay_out_stand_ins(Path(folder))
        with comfy.Server(installation, Path(folder)) as server:
            record = from_host(server)
    RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{len(record['nodes'])} nodes of ComfyUI {record['host_version']} in {RECORD.relative_to(comfy.PACK)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
