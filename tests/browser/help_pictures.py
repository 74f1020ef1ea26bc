"""Takes the pictures of the help pages: every node on a canvas with what stands before and behind it, `python tests/browser/help_pictures.py [NODE ...]`.

What a node is wired to follows from the types of its inputs; a node without any is shown before one that takes what it gives.
"""

import io
import json
import sys
import tempfile
from pathlib import Path

import flux_workflows
import graphs
from PIL import Image

from demo import comfy, front_end, help_pages, host_record

PICTURES = help_pages.DOCS / "pictures"
WIDTH, MARGIN = 900, 24
SOURCES = {
    "MODEL": "OpenSoraModelLoader", "CLIP": "OpenSoraTextEncoderLoader", "VAE": "OpenSoraVAELoader", "CONDITIONING": "OpenSoraT5TextEncode",
    "LATENT": "OpenSoraEmptyLatentVideo", "IMAGE": "LoadImage", "flux_model": "UNETLoader", "flux_vae": "VAELoader",
}  # fmt: skip
SAMPLER = "OpenSoraRectifiedFlowSampler"
FINISHED = ("OpenSoraTiledVAEDecode", "OpenSoraContactSheet", "OpenSoraContinueVideo")  # take a LATENT that was sampled
SHOWN_TOO = ("start_image", "reference_1", "video")  # optional inputs that are wired
BEHIND = {
    "OpenSoraModelLoader": ("OpenSoraLoraLoader", "model"), "OpenSoraTextEncoderLoader": ("OpenSoraT5TextEncode", "clip"),
    "OpenSoraVAELoader": ("OpenSoraTiledVAEDecode", "vae"), "OpenSoraEmptyLatentVideo": ("OpenSoraScheduler", "latent"),
    "OpenSoraPromptHelper": ("OpenSoraT5TextEncode", "prompt"),
    "OpenSoraPromptList": ("OpenSoraT5TextEncode", "prompt"), "OpenSoraPreflight": ("OpenSoraModelLoader", "precision"),
}  # fmt: skip
SHOWN = {node["class_type"]: node["inputs"] for node in graphs.image_to_video("256px").values()} | {
    node["class_type"]: node["inputs"] for node in flux_workflows.FLUX_LOADERS.values()
}  # values in place of defaults: those of the templates
LOAD = """(async () => {
  const { graph, columns } = REQUEST
  await app.loadApiJson(graph, 'help')
  let [x, bottom] = [0, 0]
  for (const column of columns) {
    let y = 0
    for (const id of column) {
      const node = app.rootGraph.getNodeById(id)
      const text = node.widgets?.filter((one) => one.element).length ?? 0
      node.size = [Math.max(node.computeSize()[0], 300), node.computeSize()[1] + 40 * text]
      node.pos = [x, y]
      y += node.size[1] + (node.type === 'LoadImage' ? 340 : 110)
    }
    bottom = Math.max(bottom, y)
    x += Math.max(...column.map((id) => app.rootGraph.getNodeById(id).size[0])) + 60
  }
  const view = app.canvas.ds
  view.scale = Math.min(1, 1400 / x, 740 / bottom)
  view.offset = [80 / view.scale, 130 / view.scale]
  app.canvas.setDirty(true, true)
})()"""
# Where the nodes are on the page: left, top, right, bottom.
WHERE = """(() => {
  const all = [...document.querySelectorAll('[data-node-id]')].map((one) => one.getBoundingClientRect())
  const [first, last] = [(side) => Math.min(...all.map((one) => one[side])), (side) => Math.max(...all.map((one) => one[side]))]
  return [first('left'), first('top'), last('right'), last('bottom')]
})()"""


def wired(kind: str, nodes: dict, first: int) -> tuple[dict, list[list[str]]]:
    """(graph, columns of ids) of a node with its sources; ids begin at `first`, since the front-end remembers widgets by id."""
    graph, depths, by_kind, first_kind = {}, {}, {}, kind

    def add(kind: str) -> str:
        if kind in by_kind:
            return by_kind[kind]
        number = by_kind[kind] = str(first + len(by_kind))
        inputs = {}
        for section in ("required", "optional"):
            for name, spec in nodes[kind]["input"].get(section, {}).items():
                source = SOURCES.get(name) or SOURCES.get(str(spec[0]).split(",")[0])
                if spec[0] == "LATENT" and kind in FINISHED:
                    source = SAMPLER
                # What is before a sampler is on its own page; a text model that writes is loaded by a node of the host's.
                is_whole = (kind == SAMPLER and first_kind != SAMPLER) or kind == "OpenSoraPromptHelper"
                if source and source != kind and not is_whole and (section == "required" or name in SHOWN_TOO):
                    inputs[name] = [add(source), int(name == "negative")]
        inputs |= {name: value for name, value in SHOWN.get(kind, {}).items() if not isinstance(value, list)}
        graph[number] = {"class_type": kind, "inputs": inputs}
        depths[number] = max((depths[value[0]] + 1 for value in inputs.values() if isinstance(value, list)), default=0)
        return number

    number = add(kind)
    if kind in BEHIND:
        behind, name = BEHIND[kind]
        graph[str(first + 50)] = {"class_type": behind, "inputs": {name: [number, 1 if kind == "OpenSoraPreflight" else 0]}}
        depths[str(first + 50)] = depths[number] + 1
    return graph, [[one for one in graph if depths[one] == at] for at in sorted(set(depths.values()))]


def main(wanted: list[str]) -> int:
    installation, lacking = comfy.find(), front_end.missing()
    if installation is None or lacking:
        print(lacking or "No ComfyUI found; set COMFYUI_PATH to a checkout.", file=sys.stderr)
        return 2
    nodes = host_record.read()["nodes"]
    kinds = [kind for kind in nodes if kind.startswith("OpenSora") and (not wanted or kind in wanted)]
    with tempfile.TemporaryDirectory() as folder:
        base, taken = Path(folder), Path(folder) / "taken"
        taken.mkdir()
        host_record.lay_out_stand_ins(base)
        Image.new("RGB", (336, 192), (96, 130, 160)).save(base / "input" / "example.png")
        steps = [["app.extensionManager.setting.set('Comfy.Minimap.Visible', false)", 0]]
        for number, kind in enumerate(kinds):
            graph, columns = wired(kind, nodes, 100 * (number + 1))
            steps += [
                [LOAD.replace("REQUEST", json.dumps({"graph": graph, "columns": columns})), 0],
                [WHERE, 2, str(taken / f"{kind}.png")],
            ]
        empty = {"version": 0.4, "nodes": [], "links": [], "groups": [], "config": {}, "extra": {}, "last_node_id": 0, "last_link_id": 0}
        with comfy.Server(installation, base) as server:
            said = front_end.look(server.url, [{"name": "help", "workflow": empty, "vue": True, "then": steps}])["help"]["then"]
        PICTURES.mkdir(exist_ok=True)
        for number, kind in enumerate(kinds):
            left, top, right, bottom = said[2 * number + 2]
            with Image.open(taken / f"{kind}.png") as page:
                part = page.convert("RGB").crop((max(0, left - MARGIN), max(0, top - MARGIN), right + MARGIN, bottom + MARGIN))
            part.thumbnail((WIDTH, WIDTH))
            file = io.BytesIO()
            part.save(file, "WEBP", quality=72, method=6)
            (PICTURES / f"{kind}.webp").write_bytes(file.getvalue())
            print(kind, part.size, len(file.getvalue()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
