"""The workflows of longer videos and of drafts: graphs in API form, their notes and layout, for build_workflows.py."""

CONTINUE_NOTE = """## A longer video, 256px

The first clip is made as usual; **Open-Sora Continue Video** goes on from its last latents, one segment for each line of `prompts`: 129, then 225, then \
321 frames. Empty `prompts` keep the first prompt.

- Every finished segment is in the output folder (`latents/open-sora-long_…latent`) before the next begins.
- To go on later: move that file to the input folder, **Load Latent** in place of the sampler, `num_frames` 129.
- Experimental: whether the released model was trained to go on from a clip is not known.
"""
DRAFT_NOTE = """## Draft, then promote

1. **Run.** Four drafts at 256px, 15 steps, appear side by side, each with its number.
2. **Choose**: write the number into `batch_index` of *Get Latent From Batch*.
3. **Un-mute** *Save the promoted video* (select it, Ctrl+M) and run again. The drafts are not made again.

The draft is enlarged, put back to the noise of `step` in *SplitSigmas*, and finished at 768px from there: an earlier `step` (25) changes more of the draft, \
a later one (35) keeps more.

- The same seed at another size is another video; it is the draft itself that is carried over.
- Another way: the draft's first frame, enlarged by any upscaler, as the `start_image` of an image to video at 768px.
"""
LATER_PROMPTS = (
    "The kite dips behind a dune and rises again, the sun half below the sea, the sky turning from orange to violet.\n"
    "Night falls over the beach. The kite is a small dark shape before the first stars, and the waves shine under the moon."
)
DRAFTS, DRAFT_STEPS, PROMOTED_SIZE, NOISE_STEP = 4, 15, {"width": 1024, "height": 576}, 30
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
    graph["6"]["inputs"]["steps"] = DRAFT_STEPS
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


def jobs(job, text_to_video) -> list[dict]:
    """Requests to the front-end. job, text_to_video: build_workflows'."""
    columns = [["about", "files"], ["1", "2", "3"], ["4", "5"], ["6"], ["10"], ["8", "9"]]
    longer = job("open-sora-2-continue-video-256px", continued(text_to_video("256px")), CONTINUE_NOTE, columns)
    columns = [["about", "files"], ["1", "2", "3"], ["4", "5"], ["6"], ["7", "20", "8", "9"], ["30", "31", "32"], ["33", "34", "35", "36"],
               ["37"], ["38", "39", "40"]]  # fmt: skip
    drafts = job("open-sora-2-draft-then-promote", draft_then_promote(text_to_video("256px")), DRAFT_NOTE, columns)
    drafts["widgets"]["39"] = {"fps": 24}
    groups = {"Files": columns[1], "Drafts, 256px": sum(columns[2:5], []), "The chosen one, 768px": sum(columns[5:], [])}
    return [longer, {**drafts, "muted": ["40"], "groups": groups}]


def blueprints(job, text_to_video) -> list[dict]:
    """As jobs, of the parts that become one node."""
    columns = [["30", "31", "32"], ["33", "34", "35", "36"], ["37", "38"]]
    whole = job("Open-Sora 2 Promote Draft", draft_then_promote(text_to_video("256px")), "", columns)
    part = {
        "inside": list(PROMOTION), "title": "Open-Sora 2 Promote Draft", "description": PROMOTION_TEXT, "promoted": PROMOTION_WIDGETS,
        "inputs": {"samples": "drafts"}, "outputs": ["images"],
    }  # fmt: skip
    return [{**whole, **part, "picture": None}]
