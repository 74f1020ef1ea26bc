"""The workflows of videos between two pictures and from a clip: graphs in API form, their notes and layout, for build_workflows.py."""

BETWEEN_NOTE = """## First and last frame, 256px

The first picture becomes the first frame, the second the last; both are kept as they are. Load the same picture twice for a video that loops. 129 frames at \
24 FPS; 50 steps take 110 forwards of the transformer.

- The video has the shape of the first picture: it is connected to `image` of **Open-Sora Empty Latent Video**, which takes the nearest aspect ratio.
- Describe how one becomes the other, not only what is seen.
- `strength` below 1 lets the video move away from both pictures.
- Leave one of the two out for a video that only begins, or only ends, with a picture.
"""
EXTEND_NOTE = """## A clip, extended, 256px

The last 33 frames of the clip begin a new video of 129 frames; 96 of them are new. `direction` *backwards* ends the video with the clip's first frames.

- **Experimental**: whether the released model was trained to go on from a clip is not known.
- The clip needs 33 frames (65 with `context` 65). It is taken frame by frame: bring it to 24 FPS first if its speed matters.
- To join both, cut the clip's last 33 frames off, and let the new video follow.
- To make a finished video longer by several segments, use **Open-Sora Continue Video**.
"""
BETWEEN_PROMPT = (
    "One continuous shot that begins as the first picture and ends as the last: the light shifts, things move smoothly to where they end, and the camera "
    "follows without a cut."
)
EXTEND_PROMPT = "The scene goes on without a cut: what moves keeps moving the same way, in the same light, and the camera keeps its course."


def between_pictures(graph: dict) -> dict:
    """Text to video (as build_workflows.text_to_video gives it) with a first and a last frame, in the first one's shape."""
    graph["4"]["inputs"]["prompt"] = BETWEEN_PROMPT
    graph["5"]["inputs"]["image"] = ["10", 0]
    graph["9"]["inputs"]["filename_prefix"] = "video/open-sora-between"
    graph["10"] = {"class_type": "LoadImage", "inputs": {"image": "example.png"}, "_meta": {"title": "First frame"}}
    graph["12"] = {"class_type": "LoadImage", "inputs": {"image": "example.png"}, "_meta": {"title": "Last frame"}}
    graph["11"] = {
        "class_type": "OpenSoraImageToVideo",
        "inputs": {
            "positive": ["4", 0], "negative": ["4", 1], "vae": ["3", 0], "latent": ["5", 0], "start_image": ["10", 0], "end_image": ["12", 0],
        },
    }  # fmt: skip
    return _sampled_with(graph, "11")


def extended_clip(graph: dict) -> dict:
    """Text to video with a clip that it goes on from."""
    graph["4"]["inputs"]["prompt"] = EXTEND_PROMPT
    graph["9"]["inputs"]["filename_prefix"] = "video/open-sora-extended"
    graph["10"] = {"class_type": "LoadVideo", "inputs": {"file": "example.mp4"}}
    graph["11"] = {
        "class_type": "OpenSoraVideoToVideo",
        "inputs": {"positive": ["4", 0], "negative": ["4", 1], "vae": ["3", 0], "latent": ["5", 0], "video": ["10", 0]},
    }
    return _sampled_with(graph, "11")


def _sampled_with(graph: dict, node: str) -> dict:
    graph["6"]["inputs"] |= {"positive": [node, 0], "negative": [node, 1], "latent": [node, 2]}
    return graph


def jobs(job, text_to_video) -> list[dict]:
    """Requests to the front-end. job, text_to_video: build_workflows'."""
    columns = [["about", "files"], ["1", "2", "3"], ["10", "12"], ["4", "5"], ["11", "6"], ["7", "8", "9"]]
    between = job("open-sora-2-first-and-last-frame-256px", between_pictures(text_to_video("256px")), BETWEEN_NOTE, columns)
    columns = [["about", "files"], ["1", "2", "3", "10"], ["4", "5"], ["11", "6"], ["7", "8", "9"]]
    return [between, job("open-sora-2-extend-video-256px", extended_clip(text_to_video("256px")), EXTEND_NOTE, columns)]
