"""A workflow of other packs in the real front-end: one press puts our nodes in place, with the values and wires that mean the same."""

import pytest

from demo import front_end

pytestmark = pytest.mark.browser
PRESS = "[...document.querySelectorAll('button')].find((button) => button.innerText.trim() === '{0}').click()"
NODES = """app.rootGraph.nodes.map((node) => [node.type, Object.fromEntries((node.widgets ?? []).map((one) => [one.name, one.value])),
  (node.inputs ?? []).filter((slot) => slot.link != null).map((slot) => slot.name)])"""


def node(number: int, kind: str, inputs: dict, outputs: dict, values: list) -> dict:
    return {
        "id": number, "type": kind, "pos": [number * 350, 100], "size": [300, 200], "flags": {}, "order": number, "mode": 0,
        "inputs": [{"name": name, "type": of, "link": link} for name, (of, link) in inputs.items()],
        "outputs": [{"name": name, "type": of, "links": links} for name, (of, links) in outputs.items()],
        "properties": {"Node name for S&R": kind}, "widgets_values": values,
    }  # fmt: skip


def old_workflow() -> dict:
    wires = {
        "model": ("COGVIDEOMODEL", 4),
        "positive": ("CONDITIONING", 2),
        "negative": ("CONDITIONING", None),
        "samples": ("LATENT", None),
    }
    nodes = [
        node(1, "CogVideoXVAELoader", {}, {"vae": ("VAE", [1])}, ["ae.safetensors", "bf16"]),
        node(2, "CLIPLoader", {}, {"CLIP": ("CLIP", [3])}, ["t5xxl_fp16.safetensors", "sd3"]),
        node(3, "CogVideoTextEncode", {"clip": ("CLIP", 3)}, {"conditioning": ("CONDITIONING", [2]), "clip": ("CLIP", None)}, ["a stag", 1, True]),
        node(4, "CogVideoXModelLoader", {"lora": ("COGLORA", None)}, {"model": ("COGVIDEOMODEL", [4])},
             ["flux1-dev.safetensors", "bf16", "disabled", "main_device", False, "sdpa"]),
        node(5, "CogVideoSampler", wires, {"samples": ("LATENT", [5])}, [49, 25, 6, 11, "fixed", "CogVideoXDDIM", 1]),
        node(6, "CogVideoDecode", {"vae": ("VAE", 1), "samples": ("LATENT", 5)}, {"images": ("IMAGE", [])}, [True, 240, 360, 0.2, 0.2, True]),
        node(7, "OpenSoraTextEncoder", {"text_encoder": ("CLIP", None)}, {"positive": ("CONDITIONING", []), "negative": ("CONDITIONING", [])},
             ["A spaceship", "blurry", "zoom out", "enabled", 20, "disabled", 6.5]),
        node(8, "OpenSoraSampler", {"pipe": ("PIPE", None)}, {"samples": ("LATENT", [])}, [0, "fixed", "fp16", 100, 4.5]),
    ]  # fmt: skip
    links = [
        [1, 1, 0, 6, 0, "VAE"],
        [2, 3, 0, 5, 1, "CONDITIONING"],
        [3, 2, 0, 3, 0, "CLIP"],
        [4, 4, 0, 5, 0, "COGVIDEOMODEL"],
        [5, 5, 0, 6, 1, "LATENT"],
    ]
    return {"last_node_id": 8, "last_link_id": 5, "nodes": nodes, "links": links, "groups": [], "config": {}, "extra": {}, "version": 0.4}


def test_one_press_moves_a_workflow(server):
    then = [[PRESS.format("View details"), 3], [PRESS.format("Replace All"), 2], [NODES, 2]]
    said = front_end.check(server.url, [{"name": "old", "workflow": old_workflow(), "then": then}])["old"]
    found = {number + 1: one for number, one in enumerate(said["then"][-1])}
    assert [found[number][0] for number in (1, 3, 4, 5, 6, 7)] == [
        "OpenSoraVAELoader", "OpenSoraT5TextEncode", "OpenSoraModelLoader", "OpenSoraRectifiedFlowSampler", "OpenSoraTiledVAEDecode",
        "OpenSoraT5TextEncode",
    ]  # fmt: skip
    assert found[8][0] == "OpenSoraSampler", "two packs have it: left as it is"
    values = {number: one[1] for number, one in found.items()}
    assert (values[1]["vae_name"], values[3]["prompt"], values[4]["model_name"]) == ("ae.safetensors", "a stag", "flux1-dev.safetensors")
    assert [values[5][name] for name in ("seed", "steps", "text_guidance")] == [11, 25, 6]
    assert [values[7][name] for name in ("prompt", "negative_prompt", "camera_motion")] == ["A spaceship", "blurry", "zoom out"]
    assert [found[number][2] for number in (3, 5, 6)] == [["clip"], ["model", "positive"], ["vae", "latent"]]
