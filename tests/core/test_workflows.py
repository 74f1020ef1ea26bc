"""Every workflow file against the recorded description of the host's nodes, and the frozen schemas: no host needed."""

import copy
import itertools
import json

import pytest

from demo import comfy, host_record

WORKFLOWS = sorted((comfy.PACK / "workflows").glob("*.json"))
OUR_VERSION = next(line.split('"')[1] for line in (comfy.PACK / "pyproject.toml").read_text().splitlines() if line.startswith("version ="))
TITLE = 30  # the front-end's height of a node's title, which is above its position
PYTHON_TYPES = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool}


@pytest.fixture(scope="module")
def nodes() -> dict:
    return host_record.read()["nodes"]


def load(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def scopes(workflow: dict) -> list[dict]:
    """The canvas and the inside of every node of ours that has one; links as lists, the inside's own slots as nodes."""
    inner = []
    for one in workflow.get("definitions", {}).get("subgraphs", []):
        rows = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
        inner.append({**one, "links": [[link[row] for row in rows] for link in one["links"]]})
    return [workflow, *inner]


def problems(workflow: dict, nodes: dict) -> list[str]:
    """What is wrong with a workflow file in UI form, in words; empty where it opens with no missing node and no red link."""
    if workflow.get("version") != 0.4:
        return ["not a file of version 0.4"]
    inside = {one["id"]: one for one in workflow.get("definitions", {}).get("subgraphs", [])}
    found = []
    for scope in scopes(workflow):
        unknown = [node["type"] for node in scope["nodes"] if node["type"] not in {*nodes, *inside, *comfy.VIRTUAL_NODES}]
        found += [f"unknown node {kind}" for kind in unknown]
        ids = [node["id"] for node in scope["nodes"]]
        found += [f"id {number} used twice" for number in set(ids) if ids.count(number) > 1]
    if found:
        return found
    if max(node["id"] for node in workflow["nodes"]) > workflow["last_node_id"]:
        found.append("last_node_id is too small")
    for scope in scopes(workflow):
        by_id = {node["id"]: node for node in scope["nodes"]}
        for link in scope["links"]:
            found += link_problems(
                link, by_id, {**nodes, **{name: {"output": [out["type"] for out in one["outputs"]]} for name, one in inside.items()}}, scope
            )
        for node in scope["nodes"]:
            if node["type"] in nodes:
                found += node_problems(node, nodes[node["type"]], {link[0] for link in scope["links"]})
            elif node["type"] in inside:
                names = [slot["name"] for slot in inside[node["type"]]["inputs"]]
                shown = [slot["name"] for slot in node["inputs"]]
                found += [] if shown == names else [f"{node['title']} shows {shown}, inside are {names}"]
                held = node.get("widgets_values_named", {})
                found += [
                    f"{node['title']} has no value for {slot['name']}"
                    for slot in node["inputs"]
                    if "widget" in slot and slot["name"] not in held
                ]
    return found


def link_problems(link: list, by_id: dict, nodes: dict, scope: dict) -> list[str]:
    number, source, source_slot, target, target_slot, kind = link
    ends = {comfy.INSIDE_IN, comfy.INSIDE_OUT} if "inputNode" in scope else set()
    if source not in {*by_id, *ends} or target not in {*by_id, *ends}:
        return [f"link {number} hangs in the air"]
    if source in ends:
        outputs = [slot["type"] for slot in scope["inputs"]]
    else:
        outputs = nodes[by_id[source]["type"]]["output"]
    if source_slot >= len(outputs) or outputs[source_slot] != kind:
        return [f"link {number} says {kind}, its output is another"]
    slots = scope["outputs"] if target in ends else by_id[target].get("inputs", [])
    if target_slot >= len(slots) or (target not in ends and slots[target_slot]["link"] != number):
        return [f"link {number} and the input {target_slot} do not agree"]
    if kind not in slots[target_slot]["type"].split(",") and slots[target_slot]["type"] != "*":
        return [f"link {number} carries {kind} into {slots[target_slot]['type']}"]
    if source not in ends and number not in (by_id[source]["outputs"][source_slot]["links"] or []):
        return [f"link {number} is not in the output {source_slot} of {by_id[source]['type']}"]
    return []


def node_problems(node: dict, info: dict, link_numbers: set) -> list[str]:
    kind = node["type"]
    slots = {slot["name"]: slot for slot in node.get("inputs", [])}
    declared = {name: spec for section in ("required", "optional") for name, spec in info["input"].get(section, {}).items()}
    found = [f"{kind} has no input {name}" for name in slots if name.split(".")[0] not in declared and name != "upload"]
    found += [f"{kind}.{name} names no link" for name, slot in slots.items() if slot.get("link") not in {None, *link_numbers}]
    widget_names = {name for name, _, _ in comfy.widgets(info["input"])}
    for name in info["input"].get("required", {}):
        if name not in widget_names and slots.get(name, {}).get("link") is None:
            found.append(f"{kind}.{name} is not connected")
    expected = [name for name, spec in declared.items() if name not in widget_names]
    if [name for name in slots if name in expected] != expected:
        found.append(f"{kind} has its sockets in another order than the node")
    if [slot["name"] for slot in node.get("outputs", [])] != list(info["output_name"]):
        found.append(f"{kind} has other outputs than the node")
    try:
        values = comfy.named_values(node, info)
    except (comfy.HostError, IndexError) as error:
        return [*found, str(error)]
    return found + [
        problem for name, value in values if name in declared for problem in value_problems(f"{kind}.{name}", value, declared[name])
    ]


def value_problems(where: str, value, spec: list) -> list[str]:
    kind, options = spec[0], (spec[1] if len(spec) > 1 else {})
    choices = kind if isinstance(kind, list) else options.get("options") if kind == "COMBO" else None
    if choices is not None:
        return [] if value in choices else [f"{where}={value!r} is not one of {choices}"]
    if kind in PYTHON_TYPES and (not isinstance(value, PYTHON_TYPES[kind]) or (isinstance(value, bool) and kind != "BOOLEAN")):
        return [f"{where}={value!r} is no {kind}"]
    if kind in ("INT", "FLOAT") and not options.get("min", value) <= value <= options.get("max", value):
        return [f"{where}={value} is outside {options.get('min')} to {options.get('max')}"]
    return []


def test_workflows_of_the_built_in_model_make_what_the_demo_asks_of_it(nodes):
    from demo import run

    for name, wish in run.WORKFLOWS.items():
        graph = comfy.to_api(load(comfy.PACK / "workflows" / f"{name}.json"), nodes).values()
        inputs = {node["class_type"]: node["inputs"] for node in graph}
        assert inputs["OpenSoraT5TextEncode"]["prompt"] == wish.asked.prompt()
        size = inputs["OpenSoraEmptyLatentVideo"]
        assert (size["resolution"], size["width"], size["height"], size["num_frames"]) == ("custom", 64, 64, 17)
        assert ("OpenSoraImageToVideo" in inputs) == wish.has_picture
        assert "LoadImage" not in inputs, "nothing of the user's is needed"


def test_names_are_sentences_in_order_for_each_task_and_size():
    names = [path.stem.removesuffix(".app") for path in WORKFLOWS]
    assert {"01 Text to video, no download", "03 Text to video, 256px", "04 Image to video, 256px", "05 Text to video, 768px",
            "06 Image to video, 768px", "13 Low VRAM, planned before the run", "16 The stages, shown openly"} <= set(names)  # fmt: skip
    assert [int(name.split()[0]) for name in names] == sorted({int(name.split()[0]) for name in names})
    assert all(name.split()[1][0].isupper() for name in names)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_workflow_fits_the_nodes(path, nodes):
    assert problems(load(path), nodes) == []


def every_node(workflow: dict) -> list[dict]:
    return [node for scope in scopes(workflow) for node in scope["nodes"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_workflow_says_where_files_go_in_both_languages_and_ends_in_a_video(path):
    workflow = load(path)
    (text,) = [node["widgets_values"][0] for node in workflow["nodes"] if node["type"] in comfy.VIRTUAL_NODES]
    models = [model for node in every_node(workflow) for model in node["properties"].get("models", [])]
    if "no download" in path.stem:
        assert not models and "Nothing to download" in text and "无需下载" in text
    else:
        for model in models:
            assert f"[{model['name']}]({model['url']})" in text and f"- {model['directory']}\n" in text
        assert (
            "non-commercial" in text and "非商用" in text or "Apache-2.0" in text.split("---")[0] and "Apache-2.0" in text.split("---")[1]
        )
        assert ("European Union" in text) == ("hunyuan_vae.safetensors" in text)
    assert "`" not in text, "code on brown cannot be read in one of the two ways to draw"
    assert text.index("\n---\n") > 0 and len(text) < 1800
    assert {"CreateVideo", "SaveVideo"} <= {node["type"] for node in every_node(workflow)}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_the_card_is_a_moving_square_picture(path):
    from PIL import Image

    picture = path.with_suffix(".jpg")
    assert picture.stat().st_size < 250_000
    with Image.open(picture) as opened:
        assert (opened.format, opened.size, opened.is_animated) == ("WEBP", (320, 320), True)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_three_boxes_are_on_the_canvas_or_the_stages_openly(path):
    workflow = load(path)
    kinds = [node["type"] for node in workflow["nodes"]]
    videos = kinds.count("SaveVideo")
    assert len(kinds) == 2 + videos if "openly" not in path.stem else not workflow.get("definitions")
    assert videos == (2 if path.stem.startswith("12") else 1)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_workflow_names_the_pack_its_version_and_the_files_of_its_loaders(path):
    for node in every_node(load(path)):
        properties = node["properties"]
        if node["type"].startswith("OpenSora"):
            assert (properties["cnr_id"], properties["ver"]) == ("open-sora", OUR_VERSION)
        for model in properties.get("models", []):
            assert model["name"] in node["widgets_values"]
            assert model["directory"] in ("diffusion_models", "text_encoders", "vae")
            repository = (
                f"/{model['name'].removesuffix('.safetensors')}/resolve/main/model.safetensors"  # saved under the repository's name
            )
            assert model["url"].endswith(("/" + model["name"], repository))
        if node["type"].endswith("Loader") and node["type"].startswith("OpenSora"):
            is_built_in = set(node["widgets_values"]) & {"small (built in)"}
            assert bool(is_built_in) == ("no download" in path.stem)
            assert bool(properties.get("models")) != bool(is_built_in)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_no_file_is_asked_for_that_nobody_has(path):
    nodes = every_node(load(path))
    assert not [node for node in nodes if node["type"] == "LoadVideo"]
    assert {node["widgets_values"][0] for node in nodes if node["type"] == "LoadImage"} <= {"example.png"}, "the host brings that one"


@pytest.mark.parametrize("path", [path for path in WORKFLOWS if path.stem.endswith(".app")], ids=lambda p: p.stem)
def test_an_app_shows_what_is_promoted_and_the_video(path):
    workflow = load(path)
    assert workflow["extra"]["linearMode"] is True
    shown, by_id = workflow["extra"]["linearData"], {str(node["id"]): node for node in workflow["nodes"]}
    for number, name in shown["inputs"]:
        assert name in by_id[number]["widgets_values_named"]
    assert [by_id[number]["type"] for number in shown["outputs"]] == ["SaveVideo"]


def boxes(workflow: dict) -> dict[str, tuple[float, float, float, float]]:
    """Left, top, right and bottom of every node with its title, and of every group."""
    found = {f"{node['type']} {node['id']}": (*node["pos"], *node["size"]) for node in workflow["nodes"]}
    nodes = {name: (x, y - TITLE, x + width, y + height) for name, (x, y, width, height) in found.items()}
    groups = {f"group {group['title']}": group["bounding"] for group in workflow["groups"]}
    return nodes | {name: (x, y, x + width, y + height) for name, (x, y, width, height) in groups.items()}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_nothing_lies_on_anything_else_and_a_node_is_in_one_group_whole(path):
    for scope in scopes(load(path)):
        found = boxes(scope)
        for (one, a), (other, b) in itertools.combinations(found.items(), 2):
            is_apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
            is_inside = b[0] <= a[0] and a[2] <= b[2] and b[1] <= a[1] and a[3] <= b[3]
            assert is_apart or (other.startswith("group") and not one.startswith("group") and is_inside), f"{one} and {other}"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_links_go_from_left_to_right_and_the_stages_are_in_groups(path):
    workflow = load(path)
    for scope in scopes(workflow):
        by_id = {node["id"]: node for node in scope["nodes"]}
        for _, source, _, target, *_ in scope["links"]:
            if source in by_id and target in by_id:
                assert by_id[source]["pos"][0] + by_id[source]["size"][0] <= by_id[target]["pos"][0], (
                    f"{by_id[source]['type']} to {by_id[target]['type']}"
                )
    for scope in scopes(workflow)[1:]:
        assert [group["title"][:2] for group in scope["groups"]] == ["1 ", "2 ", "3 "]


def break_link(workflow):
    workflow["links"][0][3] = 999


def break_type(workflow):
    workflow["links"][0][5] = "AUDIO"


def break_slot(workflow):
    workflow["links"][0][4] += 1


def drop_value(workflow):
    next(node for node in every_node(workflow) if node["type"].startswith("OpenSoraEmpty"))["widgets_values"][2:] = []


def add_value(workflow):
    next(node for node in every_node(workflow) if node["type"] == "CreateVideo")["widgets_values"].append(1)


def wrong_choice(workflow):
    next(node for node in every_node(workflow) if node["type"].startswith("OpenSoraEmpty"))["widgets_values"][0] = "255px"


def rename_node(workflow):
    workflow["nodes"][-1]["type"] = "OpenSoraNoSuchNode"


def cut_link(workflow):
    inside = workflow["definitions"]["subgraphs"][0]
    cut = next(link for link in inside["links"] if link["type"] == "MODEL")
    inside["links"].remove(cut)
    for node in inside["nodes"]:
        for slot in node.get("inputs", []):
            slot["link"] = None if slot["link"] == cut["id"] else slot["link"]


def hide(workflow):
    workflow["definitions"]["subgraphs"][0]["inputs"].pop()


@pytest.mark.parametrize(
    "damage",
    [break_link, break_type, break_slot, drop_value, add_value, wrong_choice, rename_node, cut_link, hide],
    ids=lambda f: f.__name__,
)
def test_the_checks_see_a_damaged_workflow(damage, nodes):
    workflow = copy.deepcopy(load(WORKFLOWS[0]))
    damage(workflow)
    assert problems(workflow, nodes)


def test_a_workflow_becomes_the_graph_that_the_host_takes(nodes):
    graph = comfy.to_api(load(comfy.PACK / "workflows" / "03 Text to video, 256px.json"), nodes)
    sampler = next(node for node in graph.values() if node["class_type"] == "OpenSoraRectifiedFlowSampler")["inputs"]
    assert graph[sampler["model"][0]]["class_type"] == "OpenSoraModelLoader"
    assert (sampler["seed"], sampler["steps"], sampler["text_guidance"]) == (42, 50, 7.5)


# --- schemas, frozen: an id, an input's name, place, type or default never changes once it has landed


FROZEN = json.loads((comfy.PACK / "tests" / "golden" / "schemas.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("node_id", FROZEN)
def test_landed_schema_is_unchanged(node_id, nodes):
    assert node_id in nodes, "a node that has landed is gone: old workflows would open with a missing node"
    now, frozen = host_record.schema_of(nodes[node_id]), copy.deepcopy(FROZEN[node_id])
    for was, still in zip(frozen["inputs"], now["inputs"], strict=False):
        assert set(was.pop("choices") or ()) <= set(still.pop("choices") or ()), f"{node_id}.{was['name']} lost a choice"
        assert still == was
    assert len(now["inputs"]) >= len(frozen["inputs"])
    assert now["outputs"][: len(frozen["outputs"])] == frozen["outputs"]
    for added in now["inputs"][len(frozen["inputs"]) :]:
        assert added["optional"], f"{node_id}.{added['name']} is new: it must be optional, or old graphs are refused"


def test_every_recorded_node_of_ours_is_frozen(nodes):
    assert set(FROZEN) == {name for name in nodes if name.startswith("OpenSora")}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_what_the_one_node_shows_is_no_advanced_input(path, nodes):
    """The newer way to draw and the forms hide those, and leave their names there."""
    for one in load(path).get("definitions", {}).get("subgraphs", []):
        parts = {part["id"]: part for part in one["nodes"]}
        ends = [(parts[link["target_id"]], link["target_slot"]) for link in one["links"] if link["origin_id"] == comfy.INSIDE_IN]
        shown = [(part["type"], part["inputs"][slot]["name"]) for part, slot in ends]
        held = {kind: {**info["input"].get("required", {}), **info["input"].get("optional", {})} for kind, info in nodes.items()}
        assert not [(kind, name) for kind, name in shown if [*held[kind][name], {}][1].get("advanced")]
