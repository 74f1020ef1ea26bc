"""The real front-end opens every workflow file with nothing missing and makes of it the graph that we expect."""

import itertools
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


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict:
    """ "NAME canvas" and "NAME vue" -> what a person sees of each file as a template, in both ways to draw, all settings as a new user has them."""
    installation, lacking = comfy.find(), front_end.missing()
    if installation is None or lacking:
        pytest.skip(f"tests/browser did not run: {lacking or 'no ComfyUI found'} (README.md, Tests)")
    base = tmp_path_factory.mktemp("browser")
    host_record.lay_out_stand_ins(base)
    jobs = [
        {"name": f"{path.stem} {way}", "workflow": json.loads(path.read_text(encoding="utf-8")), "vue": way == "vue"}
        for path in WORKFLOWS
        if not path.stem.endswith(".app")  # which open as forms
        for way in ("canvas", "vue")
    ]
    with comfy.Server(installation, base) as server:
        return front_end.look(server.url, jobs)


@pytest.mark.parametrize("way", ["canvas", "vue"])
@pytest.mark.parametrize("path", [path for path in WORKFLOWS if not path.stem.endswith(".app")], ids=lambda p: p.stem)
def test_a_template_opens_legibly_with_nothing_on_anything_else(path, way, seen):
    said = seen[f"{path.stem} {way}"]
    assert said["scale"] >= 0.65 and not said["is_low_quality"]
    assert (said["broken"], said["errors"]) == ([], [])
    for (one, *a), (other, *b) in itertools.combinations(said["boxes"], 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], f"{one} and {other}"
