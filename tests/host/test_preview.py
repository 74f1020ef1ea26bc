"""The whole clip moves while it is sampled, and the page's route answers; over HTTP and the host's websocket."""

import io
import json

from PIL import Image

from demo import comfy


def test_the_whole_clip_moves(server, listen):
    path = comfy.PACK / "workflows" / "01 Text to video, no download.json"
    graph = comfy.to_api(json.loads(path.read_text(encoding="utf-8")), server.get("/object_info"))
    sampler = next(number for number, node in graph.items() if node["class_type"] == "OpenSoraRectifiedFlowSampler")
    sent = []

    def greet_and_hear(kind, data):
        if kind == "status" and "sid" in data:
            server.post("/open_sora/text", {"locale": "en", "page": data["sid"]})
        if kind == "open_sora.preview":
            sent.append(data)

    for steps in (40, 400, 1000):  # as many as make a run of some seconds here, which has time for a preview
        graph[sampler]["inputs"]["steps"] = steps
        events = listen(graph, on_message=greet_and_hear)
        if sent:
            break
    assert events.error is None and sent, "a run of some seconds has time for a preview"
    assert {one["node"] for one in sent} == {sampler}
    with Image.open(io.BytesIO(sent[-1]["image"].encode("latin-1"))) as picture:
        assert (picture.format, picture.n_frames) == ("WEBP", 5)
    shown = [line for node, line in events.texts if node == sampler.split(":")[0]]
    assert any(line.startswith("Done in") for line in shown), "the node that it stands in says so too"


def test_the_route_counts_tokens_and_gives_the_text_as_it_is_read(server):
    asked = {"prompt": "a red circle", "motion_score": 4, "fps": 24, "loaders": ["small (built in)", "small (built in)"]}
    said = server.post("/open_sora/text", asked)
    assert said["text"] == "a red circle. 24 FPS. 4 motion score." and said["dropped"] == ""
    assert 0 < said["t5"][0] <= said["t5"][1] and 0 < said["clip"][0] <= said["clip"][1]
    long = server.post("/open_sora/text", {**asked, "loaders": ["", ""], "prompt": "waves roll in, " * 400})
    assert long["t5"][0] > long["t5"][1] == 512 and long["dropped"].endswith("4 motion score.")
    assert server.post("/open_sora/text", {"size": ["256px", "16:9", 16]}) == {"size": [336, 192]}
    assert server.post("/open_sora/text", {"locale": "en"}) == {}, "nothing is sampled"
