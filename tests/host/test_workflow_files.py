"""Every file of workflows/ runs to the end in the host, over HTTP, on the small checkpoint and a short, small clip."""

import json

import imageio_ffmpeg
import pytest

from demo import comfy, run

WORKFLOWS = sorted((comfy.PACK / "workflows").glob("*.json"))
# The random checkpoint's file stands where the workflow names the released one; size and length are cut for the processor.
CHANGES = {"t5_name": "t5xxl.safetensors", "resolution": "custom", "width": 96, "height": 64, "num_frames": 5, "steps": 2, "step": 1}
# Open-Sora Flux to Video has no sizes but the released ones.
FLUX_CHANGES = {"t5_name": "t5xxl.safetensors", "image_resolution": "256px", "image_steps": 2, "num_frames": 5, "steps": 1}

# Open-Sora 1: sizes of its own, and a T5 of its width.
FIRST_CHANGES = {"t5_name": "t5_1.safetensors", "size": "custom", "width": 56, "height": 40}
FIRST = {"27": 17, "28": 34, "29": 17, "30": 33, "31": 34, "32": 34}  # a file's number, and the frames that it is cut to
# CogVideoX: likewise, and a rate of its own.
COGVIDEOX_CHANGES = {"t5_name": "t5_cogvideox.safetensors", "size": "custom", "width": 80, "height": 48}
COGVIDEOX = {"40": 9, "41": 17, "42": 17}
FPS = {"40": 8, "41": 16, "42": 16}  # where it is not 24

BUILT_IN = "small (built in)"
NUM_VIDEOS = {"11": 3, "24": 3, "12": 2}  # of one run, by a file's number, where it is not one
LEAST = {"09": 37, "08": 9, "14": 8, "15": 8}  # where what is given takes up 5 frames, or a clip has 4k of them
NUM_FRAMES = {"10": 5 + 2 * 4, "23": 5 + 2 * 4, **LEAST, **FIRST, **COGVIDEOX, "32": 34 + 2 * 17}  # where it is not 5


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_workflow_runs_to_a_video(path, server):
    run.first_frame(server.base / "input" / "example.png")
    graph = comfy.to_api(json.loads(path.read_text(encoding="utf-8")), server.get("/object_info"), with_muted=True)
    number = path.stem[:2]
    for node in graph.values():
        changes = FLUX_CHANGES if node["class_type"] == "OpenSoraFluxToVideo" else {**CHANGES, "num_frames": LEAST.get(number, 5)}
        if number in FIRST:
            changes = FIRST_CHANGES | {"num_frames": FIRST[number]}
        if number in COGVIDEOX:
            changes = COGVIDEOX_CHANGES | {"num_frames": COGVIDEOX[number]}
        if node["class_type"] == "OpenSoraEmptyLatentVideo":
            node["inputs"].pop("image", None)  # which chooses between the released sizes
        if (node["class_type"].startswith("OpenSora") and "length" in node["inputs"]) or node["class_type"] == "PrimitiveString":
            node["inputs"]["value" if node["class_type"] == "PrimitiveString" else "length"] = str(changes["num_frames"])
        node["inputs"] |= {name: value for name, value in changes.items() if node["inputs"].get(name, BUILT_IN) != BUILT_IN}
    videos = server.files(server.run(graph, seconds=300))
    assert len(videos) == NUM_VIDEOS.get(number, 1)
    for video in videos:
        frames, seconds = imageio_ffmpeg.count_frames_and_secs(str(video))
        assert frames == NUM_FRAMES.get(number, 5)
        assert seconds == pytest.approx(frames / FPS.get(number, 24), abs=0.02)
