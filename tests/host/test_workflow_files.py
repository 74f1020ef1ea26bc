"""Every file of workflows/ runs to the end in the host, over HTTP, on the small checkpoint and a short, small clip."""

import json

import imageio_ffmpeg
import pytest
import torch

from demo import comfy, run
from opensora_core.media.video import save_video

WORKFLOWS = sorted((comfy.PACK / "workflows").glob("*.json"))
# The random checkpoint's file stands where the workflow names the released one; size and length are cut for the processor.
CHANGES = {"t5_name": "t5xxl.safetensors", "resolution": "custom", "width": 96, "height": 64, "num_frames": 5, "steps": 2, "step": 1}
# Open-Sora Flux to Video has no sizes but the released ones.
FLUX_CHANGES = {"t5_name": "t5xxl.safetensors", "image_resolution": "256px", "image_steps": 2, "num_frames": 5, "steps": 1}

BUILT_IN = "small (built in)"
NUM_VIDEOS = {"open-sora-2-text-to-video-prompt-list": 3, "open-sora-2-draft-then-promote": 2}  # of one run, where it is not one
LEAST = {  # where what is given takes up 5 frames, or a clip has 4k of them
    "open-sora-2-extend-video-256px": 37,
    "open-sora-2-first-and-last-frame-256px": 9,
    "open-sora-2-high-compression-text-to-video-768px": 8,
    "open-sora-2-high-compression-image-to-video-768px": 8,
}
NUM_FRAMES = {"open-sora-2-continue-video-256px": 5 + 2 * 4, **LEAST}  # where it is not 5


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_workflow_runs_to_a_video(path, server):
    run.first_frame(server.base / "input" / "example.png")
    save_video(torch.rand(33, 32, 48, 3), server.base / "input" / "example.mp4")
    graph = comfy.to_api(json.loads(path.read_text(encoding="utf-8")), server.get("/object_info"), with_muted=True)
    for node in graph.values():
        changes = FLUX_CHANGES if node["class_type"] == "OpenSoraFluxToVideo" else {**CHANGES, "num_frames": LEAST.get(path.stem, 5)}
        if node["class_type"] == "OpenSoraEmptyLatentVideo":
            node["inputs"].pop("image", None)  # which chooses between the released sizes
        node["inputs"] |= {name: value for name, value in changes.items() if node["inputs"].get(name, BUILT_IN) != BUILT_IN}
    videos = server.files(server.run(graph, seconds=300))
    assert len(videos) == NUM_VIDEOS.get(path.stem, 1)
    for video in videos:
        frames, seconds = imageio_ffmpeg.count_frames_and_secs(str(video))
        assert frames == NUM_FRAMES.get(path.stem, 5)
        assert seconds == pytest.approx(frames / 24, abs=0.02)
