"""The workflows of longer videos and of drafts: graphs in API form, for build_workflows.py."""

LATER_PROMPTS = (
    "The kite dips behind a dune and rises again, the sun half below the sea, the sky turning from orange to violet.\n"
    "Night falls over the beach. The kite is a small dark shape before the first stars, and the waves shine under the moon."
)
DRAFTS, PROMOTED_SIZE, NOISE_STEP = 4, {"width": 1024, "height": 576}, 30
# The part of that workflow that is a blueprint too, and the widgets that are seen on its one node.
PROMOTION = ("30", "31", "32", "33", "34", "35", "36", "37", "38")
PROMOTION_WIDGETS = (("30", "batch_index"), ("31", "width"), ("31", "height"), ("32", "steps"), ("33", "step"), ("35", "noise_seed"),
                     ("34", "text_guidance"))  # fmt: skip
PROMOTION_TEXT = (
    "Takes one draft out of a batch of latents by its number, enlarges it, puts it back to the noise of a middle step and finishes it from there "
    "at the new size: what was seen at 256px, at 768px."
)


def continued(graph: dict) -> dict:
    """Text to video (as build_workflows.text_to_video gives it) with two more segments before the video is made."""
    graph["10"] = {
        "class_type": "OpenSoraContinueVideo",
        "inputs": {
            "model": ["1", 0], "positive": ["4", 0], "negative": ["4", 1], "vae": ["3", 0], "latent": ["6", 0], "clip": ["2", 0],
            "segments": 2, "seed": 42, "prompts": LATER_PROMPTS,
        },
    }  # fmt: skip
    del graph["7"]
    graph["8"]["inputs"]["images"] = ["10", 1]
    graph["9"]["inputs"]["filename_prefix"] = "video/open-sora-long"
    return graph


def draft_then_promote(graph: dict) -> dict:
    """Text to video at 256px as a contact sheet, and one of its videos finished at 768px."""
    graph["5"]["inputs"]["batch_size"] = DRAFTS
    graph["6"]["inputs"]["speed"] = "draft"
    graph["20"] = {"class_type": "OpenSoraContactSheet", "inputs": {"images": ["7", 0], "latent": ["6", 0]}}
    graph["8"]["inputs"]["images"] = ["20", 0]
    graph["9"]["inputs"]["filename_prefix"] = "video/open-sora-drafts"
    graph |= promotion(model=["1", 0], positive=["4", 0], negative=["4", 1], vae=["3", 0], drafts=["6", 0])
    graph["39"] = {"class_type": "CreateVideo", "inputs": {"images": ["38", 0], "fps": ["5", 3]}}
    graph["40"] = {
        "class_type": "SaveVideo",
        "inputs": {"video": ["39", 0], "filename_prefix": "video/open-sora-promoted"},
        "_meta": {"title": "Save the promoted video"},
    }
    return graph


def promotion(model: list, positive: list, negative: list, vae: list, drafts: list) -> dict:
    """One draft of a batch, enlarged, put back to the noise of a middle step and finished from there, in stock nodes and ours."""
    return {
        "30": {"class_type": "LatentFromBatch", "inputs": {"samples": drafts, "batch_index": 0, "length": 1}},
        "31": {
            "class_type": "LatentUpscale",
            "inputs": {"samples": ["30", 0], "upscale_method": "bilinear", "crop": "center", **PROMOTED_SIZE},
        },
        "32": {"class_type": "OpenSoraScheduler", "inputs": {"model": model, "latent": ["31", 0]}},
        "33": {"class_type": "SplitSigmas", "inputs": {"sigmas": ["32", 1], "step": NOISE_STEP}},
        "34": {"class_type": "OpenSoraGuider", "inputs": {"model": ["32", 0], "positive": positive, "negative": negative}},
        "35": {"class_type": "RandomNoise", "inputs": {"noise_seed": 42}},
        "36": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
        "37": {
            "class_type": "SamplerCustomAdvanced",
            "inputs": {"noise": ["35", 0], "guider": ["34", 0], "sampler": ["36", 0], "sigmas": ["33", 1], "latent_image": ["31", 0]},
        },
        "38": {"class_type": "OpenSoraTiledVAEDecode", "inputs": {"vae": vae, "latent": ["37", 0]}},
    }
