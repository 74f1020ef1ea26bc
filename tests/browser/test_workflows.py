"""The real front-end opens every workflow file with nothing missing and makes of it the graph that we expect."""

import json

import pytest

from demo import comfy, front_end, host_record

WORKFLOWS = sorted((comfy.PACK / "workflows").glob("*.json"))
pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def opened(tmp_path_factory) -> dict:
    """name -> what the front-end said of each file; all are opened in one browser."""
    installation, lacking = comfy.find(), front_end.missing()
    if installation is None or lacking:
        pytest.skip(f"tests/browser did not run: {lacking or 'no ComfyUI found'} (README.md, Tests)")
    base = tmp_path_factory.mktemp("browser")
    host_record.lay_out_stand_ins(base)
    with comfy.Server(installation, base) as server:
        jobs = [{"name": path.stem, "workflow": json.loads(path.read_text(encoding="utf-8"))} for path in WORKFLOWS]
        return front_end.check(server.url, jobs)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_workflow_opens_cleanly(path, opened):
    said = opened[path.stem]
    assert (said["missing"], said["broken"], said["errors"]) == ([], [], [])
    assert said["links"] == len(json.loads(path.read_text(encoding="utf-8"))["links"])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_the_front_end_queues_the_graph_that_we_read_from_the_file(path, opened):
    ours = comfy.to_api(json.loads(path.read_text(encoding="utf-8")), host_record.read()["nodes"])
    theirs = opened[path.stem]["api"]
    assert {key: (node["class_type"], node["inputs"]) for key, node in ours.items()} == {
        key: (node["class_type"], node["inputs"]) for key, node in theirs.items()
    }
