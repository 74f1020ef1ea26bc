"""The graphs of the workflows, in API form (id -> node), naming only what differs from a node's defaults."""

from demo import run
from opensora_core.evaluation import world

SMALL = "small (built in)"  # in nodes/host/paths.py
LESSON = "charcoal shapes (built in)"  # in nodes/host/dataset.py

LISTED_PROMPTS = """A red paper kite climbs above a wide beach at sunset while long waves roll in.
A small boat crosses a misty lake at dawn, rings spreading behind its oars.
# left out: a line that begins with this sign
Snow falls slowly on a quiet street, lit by a single lamp."""

TEXT_PROMPT = (
    "A red paper kite climbs above a wide beach at sunset. Long waves roll in and leave a mirror of wet sand that catches the "
    "orange light. The kite turns slowly in the wind, its tail drawing curves, while the camera follows it upward."
)
IMAGE_PROMPT = (
    "The scene comes alive: a light breeze moves through it, leaves and cloth stir, the light shifts softly, and the camera "
    "glides slowly forward."
)


def text_to_video(resolution: str) -> dict:
    """The graph of a text-to-video workflow: id -> API node."""
    return {
        "1": {"class_type": "OpenSoraModelLoader", "inputs": {"model_name": "Open_Sora_v2.safetensors"}},
        "2": {
            "class_type": "OpenSoraTextEncoderLoader",
            "inputs": {"t5_name": "t5xxl_fp16.safetensors", "clip_l_name": "clip_l.safetensors"},
        },
        "3": {"class_type": "OpenSoraVAELoader", "inputs": {"vae_name": "hunyuan_vae.safetensors"}},
        "4": {"class_type": "OpenSoraT5TextEncode", "inputs": {"clip": ["2", 0], "prompt": TEXT_PROMPT, "negative_prompt": ""}},
        "5": {"class_type": "OpenSoraEmptyLatentVideo", "inputs": {"resolution": resolution, "length": "129"}},
        "6": {
            "class_type": "OpenSoraRectifiedFlowSampler",
            "inputs": {"model": ["1", 0], "positive": ["4", 0], "negative": ["4", 1], "latent": ["5", 0], "seed": 42},
        },
        "7": {"class_type": "OpenSoraTiledVAEDecode", "inputs": {"vae": ["3", 0], "latent": ["6", 0]}},
        "8": {"class_type": "CreateVideo", "inputs": {"images": ["7", 0], "fps": ["5", 3]}},
        "9": {"class_type": "SaveVideo", "inputs": {"video": ["8", 0], "filename_prefix": f"video/open-sora-{resolution}"}},
    }


def image_to_video(resolution: str) -> dict:
    """The same with a start image between the conditioning and the sampler."""
    graph = text_to_video(resolution)
    graph["4"]["inputs"]["prompt"] = IMAGE_PROMPT
    graph["10"] = {"class_type": "LoadImage", "inputs": {"image": "example.png"}}
    graph["11"] = {
        "class_type": "OpenSoraImageToVideo",
        "inputs": {"positive": ["4", 0], "negative": ["4", 1], "vae": ["3", 0], "latent": ["5", 0], "start_image": ["10", 0]},
    }
    graph["6"]["inputs"] |= {"positive": ["11", 0], "negative": ["11", 1], "latent": ["11", 2]}
    return graph


def a_video_for_each_line() -> dict:
    """Text to video at 256px over a list of prompts."""
    graph = text_to_video("256px")
    graph["10"] = {"class_type": "OpenSoraPromptList", "inputs": {"prompts": LISTED_PROMPTS, "first": 1}}
    graph["4"]["inputs"]["prompt"] = ["10", 0]
    graph["9"]["inputs"]["filename_prefix"] = ["10", 1]
    return graph


def text_to_video_in_parts() -> dict:
    """Text to video at 256px through the host's own SamplerCustomAdvanced."""
    graph = text_to_video("256px")
    graph["10"] = {"class_type": "OpenSoraScheduler", "inputs": {"model": ["1", 0], "latent": ["5", 0]}}
    graph["11"] = {"class_type": "OpenSoraGuider", "inputs": {"model": ["10", 0], "positive": ["4", 0], "negative": ["4", 1]}}
    graph["12"] = {"class_type": "RandomNoise", "inputs": {"noise_seed": 42}}
    graph["13"] = {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}}
    graph["6"] = {
        "class_type": "SamplerCustomAdvanced",
        "inputs": {"noise": ["12", 0], "guider": ["11", 0], "sampler": ["13", 0], "sigmas": ["10", 1], "latent_image": ["5", 0]},
    }
    return graph


def with_the_built_in_model(graph: dict, wish: run.Wish) -> dict:
    """The same graph with nothing to download: the built-in model, the clips it was trained on, what the demo asks of it."""
    graph["1"]["inputs"] = {"model_name": SMALL}
    graph["2"]["inputs"] = {"t5_name": SMALL, "clip_l_name": SMALL}
    graph["3"]["inputs"] = {"vae_name": SMALL}
    graph["4"]["inputs"]["prompt"] = wish.asked.prompt()
    graph["5"]["inputs"] = {
        "resolution": "custom",
        "width": world.SIZE,
        "height": world.SIZE,
        "num_frames": world.NUM_FRAMES,
        "length": str(world.NUM_FRAMES),
    }
    graph["6"]["inputs"] |= {"seed": run.SEED, "steps": run.Demo.num_steps}
    graph["9"]["inputs"]["filename_prefix"] = "video/open-sora-small"
    return graph


def picture_to_video_built_in(wish: run.Wish) -> dict:
    """Image to video with the built-in model: a picture that stock nodes draw, as the world has it, is the first frame."""
    graph = with_the_built_in_model(image_to_video("256px"), wish)
    side = 21  # of the world's squares
    graph["10"] = {"class_type": "EmptyImage", "inputs": _plain(world.SIZE, world.BACKGROUNDS[wish.asked.background])}
    graph["12"] = {"class_type": "EmptyImage", "inputs": _plain(side, world.COLOURS[wish.asked.colour])}
    at = (world.SIZE - side) // 2
    graph["13"] = {"class_type": "ImageCompositeMasked", "inputs": {"destination": ["10", 0], "source": ["12", 0], "x": at, "y": at}}
    graph["11"]["inputs"]["start_image"] = ["13", 0]
    return graph


def taught_a_colour(wish: run.Wish) -> dict:
    """The built-in model learns a colour from the lesson in the pack, and makes one prompt before and after."""
    graph = with_the_built_in_model(text_to_video("256px"), wish)
    graph["1"]["inputs"]["precision"] = "fp32"  # where bf16 is slower, as on most processors
    graph["4"]["inputs"]["prompt"] = world.Combination("triangle", "charcoal", "white", "right").prompt()
    graph["10"] = {
        "class_type": "OpenSoraVideoDataset",
        "inputs": {"folder": LESSON, "vae": ["3", 0], "clip": ["2", 0], "latent": ["5", 0]},
    }
    graph["11"] = {"class_type": "ModelSamplingSD3", "inputs": {"model": ["1", 0], "shift": 2.5}, "_meta": {"title": "Noise of training"}}
    graph["12"] = {
        "class_type": "TrainLoraNode",
        "inputs": {
            "model": ["11", 0], "latents": ["10", 0], "positive": ["10", 1], "grad_accumulation_steps": 8, "steps": 300, "learning_rate": 0.004, "rank": 16,
            "seed": 0, "training_dtype": "fp32", "lora_dtype": "fp32", "gradient_checkpointing": False, "existing_lora": "[None]",
        },
    }  # fmt: skip
    graph["13"] = {"class_type": "SaveLoRA", "inputs": {"lora": ["12", 0], "prefix": "loras/charcoal", "steps": ["12", 2]}}
    graph["14"] = {"class_type": "LoraModelLoader", "inputs": {"model": ["1", 0], "lora": ["12", 0]}}
    graph["16"] = {**graph["6"], "inputs": {**graph["6"]["inputs"], "model": ["14", 0]}}
    graph["17"] = {**graph["7"], "inputs": {**graph["7"]["inputs"], "latent": ["16", 0]}}
    graph["18"] = {"class_type": "ImageStitch", "inputs": {"image1": ["7", 0], "image2": ["17", 0]}, "_meta": {"title": "Before and after"}}
    graph["8"]["inputs"]["images"] = ["18", 0]
    graph["9"]["inputs"]["filename_prefix"] = "video/open-sora-taught"
    return graph


def _plain(side: int, colour: tuple[int, int, int]) -> dict:
    return {"width": side, "height": side, "color": int.from_bytes(bytes(colour), "big")}


def planned_before_the_run(graph: dict) -> dict:
    """The same graph with its settings from a plan of what this machine has."""
    graph["30"] = {
        "class_type": "OpenSoraPreflight",
        "inputs": {"width": ["5", 1], "height": ["5", 2], "model_name": "Open_Sora_v2.safetensors"},
    }
    graph["31"] = {"class_type": "PrimitiveString", "inputs": {"value": "129"}, "_meta": {"title": "Length"}}
    graph["5"]["inputs"]["length"] = graph["30"]["inputs"]["length"] = ["31", 0]
    graph["1"]["inputs"] |= {"precision": ["30", 1], "offload": ["30", 2]}
    graph["7"]["inputs"]["policy"] = ["30", 3]
    return graph


def at_speed(graph: dict, speed: str) -> dict:
    """The same graph with a plan of fewer steps."""
    graph["6"]["inputs"]["speed"] = speed
    graph["9"]["inputs"]["filename_prefix"] = f"video/open-sora-{speed}"
    return graph
