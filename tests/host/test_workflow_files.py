"""Every file of workflows/ runs to the end in the host, over HTTP, on the small checkpoint and a short, small clip."""

import json

import imageio_ffmpeg
import pytest

from demo import comfy
from tests.golden import host_files

WORKFLOWS = sorted((comfy.PACK / "workflows").glob("*.json"))
FPS = {"40": 8, "41": 16, "42": 16}  # by a file's number, where it is not 24
BUILT_IN = "small (built in)"
NUM_VIDEOS = {"11": 3, "24": 3, "12": 2}  # of one run, where it is not one
LONGER = {"10": 5 + 2 * 4, "23": 5 + 2 * 4, "32": 34 + 2 * 17}  # frames that are made of several clips


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_workflow_runs_to_a_video(path, server):
    graph = comfy.to_api(json.loads(path.read_text(encoding="utf-8")), server.get("/object_info"), with_muted=True)
    number = path.stem[:2]
    changes = host_files.smaller(number)
    for node in graph.values():
        here = dict(changes)
        if node["class_type"] == "OpenSoraFluxToVideo":
            del here["resolution"]  # it has no sizes but the released ones
        if node["class_type"] == "OpenSoraEmptyLatentVideo":
            node["inputs"].pop("image", None)  # which chooses between the released sizes
        if node["class_type"] == "PrimitiveString":
            here["value"] = changes["length"]
        if not node["class_type"].startswith(("OpenSora", "Primitive")):
            del here["length"], here["size"]
        node["inputs"] |= {name: value for name, value in here.items() if node["inputs"].get(name, BUILT_IN) != BUILT_IN}
    videos = server.files(server.run(graph, seconds=300))
    assert len(videos) == NUM_VIDEOS.get(number, 1)
    for video in videos:
        frames, seconds = imageio_ffmpeg.count_frames_and_secs(str(video))
        assert frames == LONGER.get(number, changes["num_frames"])
        assert seconds == pytest.approx(frames / FPS.get(number, 24), abs=0.02)
