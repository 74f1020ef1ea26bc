"""The real host lists every blueprint, and the real front-end opens it with nothing missing and its widgets in sight."""

import json

import pytest

from demo import comfy, front_end

BLUEPRINTS = sorted((comfy.PACK / "subgraphs").glob("*.json"))
pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def opened(server) -> tuple[list[str], dict]:
    """(names that the host lists, name -> what the front-end said of each)."""
    jobs = [{"name": path.stem, "workflow": json.loads(path.read_text(encoding="utf-8"))} for path in BLUEPRINTS]
    listed = [one["name"] for one in server.get("/global_subgraphs").values() if one["source"] == "custom_node"]
    return listed, front_end.check(server.url, jobs)


@pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda p: p.stem)
def test_blueprint_is_listed_and_opens_cleanly(path, opened):
    listed, said = opened[0], opened[1][path.stem]
    assert path.stem in listed
    assert (said["missing"], said["errors"]) == ([], [])
    (node,) = json.loads(path.read_text(encoding="utf-8"))["nodes"]
    promoted = [slot["name"] for slot in node["inputs"] if "widget" in slot]
    assert [name for name, _ in said["widgets"][str(node["id"])] if name in promoted] == promoted
