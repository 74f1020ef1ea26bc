"""Every blueprint file is what the host's list of blueprints takes: one node, whole inside, made of nodes there are."""

import copy
import json
import runpy

import pytest

from demo import comfy, host_record

BLUEPRINTS = sorted((comfy.PACK / "subgraphs").glob("*.json"))
INSIDE_IN, INSIDE_OUT = -10, -20  # the ids that a subgraph gives its own inputs and outputs


@pytest.fixture(scope="module")
def nodes() -> dict:
    return host_record.read()["nodes"]


def load(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def problems(blueprint: dict, nodes: dict) -> list[str]:
    """What would make the host show everybody an error, in words."""
    if blueprint.get("version") != 0.4 or len(blueprint["nodes"]) != 1 or len(blueprint["definitions"]["subgraphs"]) != 1:
        return ["not one node over one subgraph, in version 0.4"]
    (node,), (graph,) = blueprint["nodes"], blueprint["definitions"]["subgraphs"]
    found = [] if node["type"] == graph["id"] else ["the node is of another subgraph"]
    inside = {part["id"]: part for part in graph["nodes"]}
    found += [f"unknown node {part['type']}" for part in inside.values() if part["type"] not in nodes]
    if found:
        return found
    for one in graph["links"]:
        source, target = inside.get(one["origin_id"]), inside.get(one["target_id"])
        if source is None and one["origin_id"] != INSIDE_IN or target is None and one["target_id"] != INSIDE_OUT:
            found.append(f"link {one['id']} hangs in the air")
            continue
        kind = nodes[source["type"]]["output"][one["origin_slot"]] if source else graph["inputs"][one["origin_slot"]]["type"]
        if kind != one["type"]:
            found.append(f"link {one['id']} carries {kind}, not {one['type']}")
        if target and target["inputs"][one["target_slot"]]["link"] != one["id"]:
            found.append(f"link {one['id']} does not arrive")
    found += [f"{slot['name']} of the node is connected" for slot in node["inputs"] if slot["link"] is not None]
    if [(slot["name"], slot["type"]) for slot in node["inputs"]] != [(slot["name"], slot["type"]) for slot in graph["inputs"]]:
        found.append("the node's inputs are not the subgraph's")
    begins = {link["id"]: link["origin_slot"] for link in graph["links"] if link["origin_id"] == INSIDE_IN}
    for slot in graph["inputs"]:
        if not any(begins.get(number) is not None for number in slot["linkIds"]):
            found.append(f"{slot['name']} leads nowhere")
    return found


@pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda p: p.stem)
def test_blueprint_is_whole(path, nodes):
    blueprint = load(path)
    assert problems(blueprint, nodes) == []
    (graph,) = blueprint["definitions"]["subgraphs"]
    assert graph["name"] == blueprint["nodes"][0]["title"] == path.stem
    assert blueprint["nodes"][0]["properties"]["cnr_id"] == "open-sora"
    assert len(graph["extra"]["BlueprintDescription"]) > 40


def test_a_prompt_a_picture_two_pictures_a_clip_and_a_draft_become_a_video_by_one_node():
    names = ("Text to Video 文生视频", "Image to Video 图生视频", "First and Last Frame 首尾帧", "Extend Video 视频续写", "Long Video 长视频",
             "2 Promote Draft 草稿", "2 Flux to Video 文生图生视频")  # fmt: skip
    assert {f"Open-Sora {name}" for name in names} <= {path.stem for path in BLUEPRINTS}


@pytest.fixture(scope="module")
def described(nodes) -> dict:
    """blueprint -> the row that its file is made from (tests/browser/templates.py)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(comfy.PACK / "tests" / "browser"))
        rows = runpy.run_path(str(comfy.PACK / "tests" / "browser" / "templates.py"))
        return {one.blueprint: one for one in (*rows["all_of"](), *rows["parts"]()) if one.blueprint}


@pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda p: p.stem)
def test_blueprint_is_what_its_description_makes(path, nodes, described):
    """Nodes inside, their values, and what is seen on the one node: nothing was put into the file by hand."""
    (node,), (graph,) = load(path)["nodes"], load(path)["definitions"]["subgraphs"]
    asked = described[path.stem]
    seen = [slot["name"] for slot in node["inputs"] if "widget" in slot]
    assert seen == [one[-1] for one in asked.seen]
    inside = [number for column in asked.columns for number in column]
    assert {str(part["id"]): part["type"] for part in graph["nodes"]} == {number: asked.graph[number]["class_type"] for number in inside}
    for part in graph["nodes"]:
        values = dict(comfy.named_values(part, nodes[part["type"]]))
        given = {name: value for name, value in asked.graph[str(part["id"])]["inputs"].items() if not isinstance(value, list)}
        assert {name: values[name] for name in given} == given
    assert [slot.get("label", slot["name"]) for slot in graph["outputs"]] == list(asked.outputs)
    assert {slot["name"]: slot["label"] for slot in graph["inputs"] if "label" in slot and slot["label"] != slot["name"]} == asked.inputs
    assert graph["extra"]["BlueprintSearchAliases"] and any(not alias.isascii() for alias in graph["extra"]["BlueprintSearchAliases"])


def test_every_blueprint_is_described(described):
    assert set(described) == {path.stem for path in BLUEPRINTS}


def cut(blueprint):
    blueprint["definitions"]["subgraphs"][0]["links"][0]["origin_id"] = 999


def rename(blueprint):
    blueprint["definitions"]["subgraphs"][0]["nodes"][0]["type"] = "OpenSoraNoSuchNode"


def lose(blueprint):
    blueprint["nodes"][0]["type"] = "0"


def hide(blueprint):
    blueprint["nodes"][0]["inputs"].pop()


@pytest.mark.parametrize("damage", [cut, rename, lose, hide], ids=lambda f: f.__name__)
def test_the_checks_see_a_damaged_blueprint(damage, nodes):
    blueprint = copy.deepcopy(load(comfy.PACK / "subgraphs" / "Open-Sora 2 Promote Draft 草稿.json"))
    damage(blueprint)
    assert problems(blueprint, nodes)
