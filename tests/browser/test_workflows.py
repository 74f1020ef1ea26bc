"""The real front-end opens every workflow file with nothing missing, makes of it the graph that we expect, and shows it so that it can be read."""

import itertools
import json

import numpy
import pytest

from demo import comfy, front_end, host_record
from opensora_core.media.video import save_video

WORKFLOWS = sorted((comfy.PACK / "workflows").glob("*.json"))
TEMPLATES = [path for path in WORKFLOWS if not path.stem.endswith(".app")]  # the others open as forms
WAYS = ("canvas", "vue")  # to draw nodes
pytestmark = pytest.mark.browser
# In the page: the graph that is queued opened again from that form, as a dropped API file or picture is, and queued once more.
ROUND = """(async () => {
  const api = (await app.graphToPrompt()).output
  await app.loadApiJson(structuredClone(api), 'again')
  return (await app.graphToPrompt()).output
})()"""


def load(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def opened(server) -> dict:
    """name -> what the front-end said of each file; all are opened in one browser."""
    jobs = [{"name": path.stem, "workflow": load(path), "then": [[ROUND, 0]]} for path in WORKFLOWS]
    return front_end.check(server.url, jobs)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_workflow_opens_cleanly(path, opened):
    said = opened[path.stem]
    assert (said["missing"], said["broken"], said["errors"]) == ([], [], [])
    assert said["links"] == len(load(path)["links"])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_the_front_end_queues_the_graph_that_we_read_from_the_file(path, opened):
    ours = comfy.to_api(load(path), host_record.read()["nodes"])
    theirs = opened[path.stem]["api"]
    assert {key: (node["class_type"], node["inputs"]) for key, node in ours.items()} == {
        key: (node["class_type"], node["inputs"]) for key, node in theirs.items()
    }


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_the_queued_graph_opens_as_the_same_graph(path, opened):
    queued, (again,) = opened[path.stem]["api"], opened[path.stem]["then"]
    assert {key: (node["class_type"], node["inputs"]) for key, node in again.items()} == {
        key: (node["class_type"], node["inputs"]) for key, node in queued.items()
    }


@pytest.fixture(scope="module")
def seen(server) -> dict:
    """ "NAME canvas" and "NAME vue" -> what a person sees of each file as a template, in both ways to draw, all settings as a new user has them."""
    save_video([numpy.full((192, 336, 3), 96, numpy.uint8)] * 9, server.base / "output" / "ran.mp4", 24)
    after = {"filename": "ran.mp4", "subfolder": "", "type": "output"}
    jobs = [
        {"name": f"{path.stem} {way}", "workflow": load(path), "vue": way == "vue", "after": after} for way in WAYS for path in TEMPLATES
    ]
    return front_end.look(server.url, jobs)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("path", TEMPLATES, ids=lambda p: p.stem)
def test_a_template_opens_legibly_with_nothing_on_anything_else(path, way, seen):
    said = seen[f"{path.stem} {way}"]
    assert said["scale"] >= 0.65 and not said["is_low_quality"]
    assert (said["broken"], said["errors"]) == ([], [])
    for when in {"before", "after", "inside", "inside_after"} & set(said):
        for (one, *a), (other, *b) in itertools.combinations(said[when], 2):
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], f"{when}: {one} {a} and {other} {b}"
