"""The real front-end takes a plan's outputs on the loader's widgets, and gives back the graph that was drawn."""

import pytest

from demo import front_end

FILE = "Open_Sora_v2.safetensors"
SIZE = {"width": 336, "height": 192, "num_frames": 129}
GRAPH = {
    "1": {"class_type": "OpenSoraPreflight", "inputs": {**SIZE, "model_name": FILE, "precision": "auto", "offload": "auto"}},
    "2": {"class_type": "OpenSoraModelLoader", "inputs": {"model_name": FILE, "precision": ["1", 1], "offload": ["1", 2], "budget_gib": 8}},
    "3": {"class_type": "OpenSoraOffload", "inputs": {"model": ["2", 0], "mode": "minimal", "budget_gib": 8}},
    "4": {"class_type": "OpenSoraLoadedModels", "inputs": {"any": ["3", 0], "unload": "none", "keep_gib": 0}},
}
pytestmark = pytest.mark.browser


def test_a_plan_is_wired_to_the_loaders_widgets(server):
    stamp = {"cnr_id": "open-sora", "version": "0.0.0", "host_version": "0.0.0", "ours": []}
    job = {"name": "plan", "api": GRAPH, "columns": [["1", "2"], ["3", "4"]], "notes": {}, "widgets": {}, "models": {}, "stamp": stamp}
    workflow = front_end.build(server.url, [job])["plan"]["workflow"]
    said = front_end.check(server.url, [{"name": "plan", "workflow": workflow}])["plan"]
    assert (said["missing"], said["broken"], said["errors"]) == ([], [], [])
    for key, node in GRAPH.items():
        theirs = said["api"][key]
        assert theirs["class_type"] == node["class_type"]
        assert {name: theirs["inputs"][name] for name in node["inputs"]} == node["inputs"]
