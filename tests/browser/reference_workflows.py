"""The workflows of videos between two pictures and from a clip: graphs in API form, for build_workflows.py."""

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
    # A clip that everybody has: the host's example picture, 33 times.
    graph["12"] = {"class_type": "LoadImage", "inputs": {"image": "example.png"}, "_meta": {"title": "Picture for the clip"}}
    graph["10"] = {
        "class_type": "RepeatImageBatch",
        "inputs": {"image": ["12", 0], "amount": 33},
        "_meta": {"title": "Clip (put Load Video here)"},
    }
    graph["11"] = {
        "class_type": "OpenSoraVideoToVideo",
        "inputs": {"positive": ["4", 0], "negative": ["4", 1], "vae": ["3", 0], "latent": ["5", 0], "video": ["10", 0]},
    }
    return _sampled_with(graph, "11")


def _sampled_with(graph: dict, node: str) -> dict:
    graph["6"]["inputs"] |= {"positive": [node, 0], "negative": [node, 1], "latent": [node, 2]}
    return graph
