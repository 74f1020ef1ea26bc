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


def problems(workflow: dict, nodes: dict) -> list[str]:
    """What is wrong with a workflow file in UI form, in words; empty where it opens with no missing node and no red link."""
    if workflow.get("version") != 0.4 or workflow.get("definitions"):
        return ["not a flat file of version 0.4"]
    unknown = [node["type"] for node in workflow["nodes"] if node["type"] not in nodes and node["type"] not in comfy.VIRTUAL_NODES]
    if unknown:
        return [f"unknown node {kind}" for kind in unknown]
    ids = [node["id"] for node in workflow["nodes"]]
    found = [f"id {number} used twice" for number in set(ids) if ids.count(number) > 1]
    if max(ids) > workflow["last_node_id"] or max(link[0] for link in workflow["links"]) > workflow["last_link_id"]:
        found.append("last_node_id or last_link_id is too small")
    by_id = {node["id"]: node for node in workflow["nodes"]}
    for link in workflow["links"]:
        found += link_problems(link, by_id, nodes)
    for node in workflow["nodes"]:
        if node["type"] not in comfy.VIRTUAL_NODES:
            found += node_problems(node, nodes[node["type"]], {link[0] for link in workflow["links"]})
    return found


def link_problems(link: list, by_id: dict, nodes: dict) -> list[str]:
    number, source, source_slot, target, target_slot, kind = link
    if source not in by_id or target not in by_id:
        return [f"link {number} hangs in the air"]
    outputs = nodes[by_id[source]["type"]]["output"]
    if source_slot >= len(outputs) or outputs[source_slot] != kind:
        return [f"link {number} says {kind}, the output {source_slot} of {by_id[source]['type']} is another"]
    slots = by_id[target].get("inputs", [])
    if target_slot >= len(slots) or slots[target_slot]["link"] != number:
        return [f"link {number} and the input {target_slot} of {by_id[target]['type']} do not agree"]
    if kind not in slots[target_slot]["type"].split(",") and slots[target_slot]["type"] != "*":
        return [f"link {number} carries {kind} into {slots[target_slot]['type']}"]
    if number not in (by_id[source]["outputs"][source_slot]["links"] or []):
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


def test_there_is_a_workflow_for_each_task_and_size():
    tasks = {f"{task}-to-video-{size}" for task in ("text", "image") for size in ("256px", "768px")}
    tasks |= {f"high-compression-{task}-to-video-768px" for task in ("text", "image")}
    assert {path.stem for path in WORKFLOWS} >= {f"open-sora-2-{task}" for task in tasks}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_workflow_fits_the_nodes(path, nodes):
    assert problems(load(path), nodes) == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_workflow_says_where_files_go_and_ends_in_a_video(path):
    workflow = load(path)
    text = "\n".join(node["widgets_values"][0] for node in workflow["nodes"] if node["type"] in comfy.VIRTUAL_NODES)
    released = ("models/diffusion_models", "models/text_encoders", "models/vae", "non-commercial")
    for start, words in {
        "open-sora-small": ("built in", "Nothing is downloaded", "64 x 64"),
        "open-sora-2-high-compression": (*released, "F32T4C128_AE", "multiples of 4", "multiples of 32"),
        "open-sora-2": (*released, "European Union", "South Korea"),
    }.items():
        if path.stem.startswith(start):
            assert [word for word in words if word not in text] == []
            break
    kinds = {node["type"] for node in workflow["nodes"]}
    assert {"CreateVideo", "SaveVideo"} <= kinds
    picture = path.with_suffix(".jpg")
    assert picture.read_bytes()[:2] == b"\xff\xd8" and picture.stat().st_size < 250_000


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_workflow_names_the_pack_its_version_and_the_files_of_its_loaders(path):
    for node in load(path)["nodes"]:
        properties = node["properties"]
        if node["type"].startswith("OpenSora"):
            assert (properties["cnr_id"], properties["ver"]) == ("open-sora", OUR_VERSION)
        for model in properties.get("models", []):
            assert model["name"] in node["widgets_values"]
            assert model["directory"] in ("diffusion_models", "text_encoders", "vae")
            assert model["url"].endswith("/" + model["name"])
        if node["type"].endswith("Loader") and node["type"].startswith("OpenSora"):
            is_built_in = set(node["widgets_values"]) & {"small (built in)"}
            assert bool(is_built_in) == path.stem.startswith("open-sora-small")
            assert bool(properties.get("models")) != bool(is_built_in)


def boxes(workflow: dict) -> dict[str, tuple[float, float, float, float]]:
    """Left, top, right and bottom of every node with its title, and of every group."""
    found = {f"{node['type']} {node['id']}": (*node["pos"], *node["size"]) for node in workflow["nodes"]}
    nodes = {name: (x, y - TITLE, x + width, y + height) for name, (x, y, width, height) in found.items()}
    groups = {f"group {group['title']}": group["bounding"] for group in workflow["groups"]}
    return nodes | {name: (x, y, x + width, y + height) for name, (x, y, width, height) in groups.items()}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_nothing_lies_on_anything_else_and_a_node_is_in_one_group_whole(path):
    found = boxes(load(path))
    for (one, a), (other, b) in itertools.combinations(found.items(), 2):
        is_apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        is_inside = b[0] <= a[0] and a[2] <= b[2] and b[1] <= a[1] and a[3] <= b[3]
        assert is_apart or (other.startswith("group") and not one.startswith("group") and is_inside), f"{one} and {other}"


def test_long_workflows_have_named_groups():
    for name in ("open-sora-2-draft-then-promote", "open-sora-2-flux-to-video-in-parts-256px"):
        groups = load(comfy.PACK / "workflows" / f"{name}.json")["groups"]
        assert len(groups) == 3 and groups[0]["title"] == "Files"


def break_link(workflow):
    workflow["links"][0][3] = 999


def break_type(workflow):
    workflow["links"][0][5] = "AUDIO"


def break_slot(workflow):
    workflow["links"][0][4] += 1


def drop_value(workflow):
    next(node for node in workflow["nodes"] if node["type"].startswith("OpenSoraEmpty"))["widgets_values"].pop()


def add_value(workflow):
    next(node for node in workflow["nodes"] if node["type"] == "CreateVideo")["widgets_values"].append(1)


def wrong_choice(workflow):
    next(node for node in workflow["nodes"] if node["type"].startswith("OpenSoraEmpty"))["widgets_values"][0] = "255px"


def rename_node(workflow):
    workflow["nodes"][-1]["type"] = "OpenSoraNoSuchNode"


def cut_link(workflow):
    cut = next(link for link in workflow["links"] if link[5] == "MODEL")
    workflow["links"].remove(cut)
    number = cut[0]
    for node in workflow["nodes"]:
        for slot in node.get("inputs", []):
            slot["link"] = None if slot["link"] == number else slot["link"]


@pytest.mark.parametrize(
    "damage", [break_link, break_type, break_slot, drop_value, add_value, wrong_choice, rename_node, cut_link], ids=lambda f: f.__name__
)
def test_the_checks_see_a_damaged_workflow(damage, nodes):
    workflow = copy.deepcopy(load(WORKFLOWS[0]))
    damage(workflow)
    assert problems(workflow, nodes)


def test_a_workflow_becomes_the_graph_that_the_host_takes(nodes):
    graph = comfy.to_api(load(comfy.PACK / "workflows" / "open-sora-2-text-to-video-256px.json"), nodes)
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
