"""Many queued runs, valid, wrong and interrupted ones mixed: all that are valid succeed, none of the others ends the queue, and memory does
not grow from the hundredth to the last (resident bytes after a collection). python -m benchmarks.host_soak runs 1,000 and keeps the figures."""

import asyncio
import ctypes
import gc
import json
import os
import random
import statistics
import sys
import types
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

RUNS = int(os.environ.get("OPEN_SORA_SOAK_RUNS", "200"))
REPORT = os.environ.get("OPEN_SORA_SOAK_REPORT")
WARM_UP, AROUND, MOST_GROWTH = 100, 5, 0.01
PROMPTS = ("rain on a lake", "a red kite", "two foxes", "", "snow")


class Stops:
    """A node that lets a run be interrupted at a forward of the network, as a person does."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "run", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "at": ("INT", {"default": 1})}}

    @classmethod
    def IS_CHANGED(cls, **given):
        return float("nan")  # one that was kept from the last run has counted its forwards already

    def run(self, model, at):
        import comfy.model_management
        import comfy.patcher_extension

        calls = []

        def forward(executor, *given, **named):
            calls.append(1)
            if len(calls) == at:
                comfy.model_management.interrupt_current_processing()
                comfy.model_management.throw_exception_if_processing_interrupted()
            return executor(*given, **named)

        copy = model.clone()
        copy.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "stops", forward)
        return (copy,)


def graph(rng: random.Random, **changes: dict) -> dict:
    """A small run; changes: inputs of its nodes by node."""
    model = {"model_name": "Open_Sora_v2.safetensors", "precision": rng.choice(["auto", "auto", "int8"])}
    sampler = {"seed": rng.randrange(1000), "steps": rng.randint(1, 3), "text_guidance": rng.choice([1.0, 7.5])}
    nodes = {
        "model": ("OpenSoraModelLoader", model),
        "clip": ("OpenSoraTextEncoderLoader", {"t5_name": "t5xxl.safetensors", "clip_l_name": "clip_l.safetensors"}),
        "vae": ("OpenSoraVAELoader", {"vae_name": "hunyuan_vae.safetensors"}),
        "text": ("OpenSoraT5TextEncode", {"clip": ["clip", 0], "prompt": rng.choice(PROMPTS), "motion_score": rng.randint(0, 4)}),
        "latent": ("OpenSoraEmptyLatentVideo", {"resolution": "custom", "width": 48, "height": rng.choice([32, 48]), "num_frames": rng.choice([5, 9])}),
        "sample": ("OpenSoraRectifiedFlowSampler", {"model": ["model", 0], "positive": ["text", 0], "negative": ["text", 1], "latent": ["latent", 0], **sampler}),
        "frames": ("OpenSoraTiledVAEDecode", {"vae": ["vae", 0], "latent": ["sample", 0], "policy": rng.choice(["auto", "low_memory"])}),
        "save": ("SaveImage", {"images": ["frames", 0], "filename_prefix": "soak"}),
    }  # fmt: skip
    made = {name: {"class_type": kind, "inputs": dict(inputs)} for name, (kind, inputs) in nodes.items()}
    for name, inputs in changes.items():
        made[name]["inputs"].update(inputs)
    return made


def with_lora(rng):
    made = graph(rng)
    made["lora"] = {
        "class_type": "OpenSoraLoraLoader",
        "inputs": {"model": ["model", 0], "lora_name": "soak.safetensors", "strength": rng.random()},
    }
    made["sample"]["inputs"]["model"] = ["lora", 0]
    made["model"]["inputs"]["precision"] = "auto"
    return made


def with_picture(rng):
    made = graph(rng)
    pair = {"positive": ["text", 0], "negative": ["text", 1], "vae": ["vae", 0], "latent": ["latent", 0], "start_image": ["picture", 0]}
    made["picture"] = {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 40, "batch_size": 1, "color": rng.randrange(2**24)}}
    made["given"] = {"class_type": "OpenSoraImageToVideo", "inputs": pair}
    made["sample"]["inputs"].update(positive=["given", 0], negative=["given", 1], latent=["given", 2])
    return made


def with_guider(rng):
    made = graph(rng)
    steps = made["sample"]["inputs"]["steps"]
    made["schedule"] = {"class_type": "OpenSoraScheduler", "inputs": {"model": ["model", 0], "latent": ["latent", 0], "steps": steps}}
    made["guider"] = {
        "class_type": "OpenSoraGuider",
        "inputs": {"model": ["schedule", 0], "positive": ["text", 0], "negative": ["text", 1]},
    }
    made["noise"] = {"class_type": "RandomNoise", "inputs": {"noise_seed": rng.randrange(1000)}}
    made["euler"] = {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}}
    made["sample"] = {
        "class_type": "SamplerCustomAdvanced",
        "inputs": {
            "noise": ["noise", 0],
            "guider": ["guider", 0],
            "sampler": ["euler", 0],
            "sigmas": ["schedule", 1],
            "latent_image": ["latent", 0],
        },
    }
    return made


def goes_on(rng):
    made = graph(rng)
    inputs = {"model": ["model", 0], "positive": ["text", 0], "negative": ["text", 1], "vae": ["vae", 0], "latent": ["sample", 0]}
    made["frames"] = {"class_type": "OpenSoraContinueVideo", "inputs": {**inputs, "steps": 1, "filename_prefix": "latents/soak"}}
    made["save"]["inputs"]["images"] = ["frames", 1]
    return made


def interrupted(rng):
    made = with_picture(rng)
    made["stops"] = {"class_type": "TestStops", "inputs": {"model": ["model", 0], "at": rng.randint(1, made["sample"]["inputs"]["steps"])}}
    made["sample"]["inputs"]["model"] = ["stops", 0]
    return made


def picture_latent(rng):
    return {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": rng.randint(1, 9)}}


VALID = (graph, graph, with_lora, with_picture, with_guider, goes_on)
WRONG = (  # refused when queued, or when it runs
    lambda rng: graph(rng, latent={"num_frames": 10}),
    lambda rng: graph(rng, latent={"width": 10**6}),
    lambda rng: graph(rng, model={"model_name": "gone.safetensors"}),
    lambda rng: graph(rng, text={"prompt": f"a\0b {rng.random()}"}),
    lambda rng: graph(rng, sample={"text_guidance": float("nan"), "seed": rng.randrange(1000)}),
    lambda rng: graph(rng, frames={"latent": ["picture", 0]}) | {"picture": picture_latent(rng)},
    lambda rng: graph(rng, sample={"positive": ["text", 2]}),
)  # fmt: skip


@pytest.fixture(scope="module")
def executor(base, weights):
    """The host's own, with a cache of the last prompt, and what its nodes say thrown away."""
    import execution
    from server import PromptServer

    import nodes

    generator = torch.Generator().manual_seed(0)
    layer = "double_blocks.0.img_attn.q_proj"
    out_features, in_features = weights[f"{layer}.weight"].shape
    factors = {"lora_A": (4, in_features), "lora_B": (out_features, 4)}
    save_file(
        {f"base_model.model.{layer}.{name}.weight": torch.randn(shape, generator=generator) for name, shape in factors.items()},
        base / "models/loras/soak.safetensors",
    )
    silent = types.SimpleNamespace(
        client_id=None, last_node_id=None, last_prompt_id=None, send_sync=lambda *given: None, send_progress_text=lambda *given: None
    )
    before = getattr(PromptServer, "instance", None)
    PromptServer.instance = silent
    nodes.NODE_CLASS_MAPPINGS["TestStops"] = Stops
    yield execution.PromptExecutor(silent, cache_type=execution.CacheType.CLASSIC, cache_args={"lru": 0, "ram": 0, "ram_inactive": 0})
    del nodes.NODE_CLASS_MAPPINGS["TestStops"]
    PromptServer.instance = before


def run(executor, prompt: dict, name: str) -> str:
    """How a queued prompt ended: refused, or the host's own word."""
    import execution

    is_valid, _, outputs, _ = asyncio.run(execution.validate_prompt(name, prompt, None))
    if not is_valid:
        return "refused"
    executor.execute(prompt, name, {}, outputs)
    return executor.status_messages[-1][0]


def resident_bytes() -> int:
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # what was freed, but not given back yet, is no leak
    return psutil.Process().memory_info().rss


def campaign(executor, runs: int, measured_from: int, leak: int = 0) -> tuple[dict[str, int], float]:
    """(how the runs ended, growth of memory from the one measured first to the last as a share). leak: bytes lost in each."""
    rng, ends, memory, lost = random.Random(runs), {}, {}, []
    for number in range(1, runs + 1):
        kind = rng.choices(("valid", "wrong", "interrupted"), (6, 3, 1))[0]
        make = {"valid": rng.choice(VALID), "wrong": rng.choice(WRONG), "interrupted": interrupted}[kind]
        end = f"{kind}: {run(executor, make(rng), f'run {number}')}"
        ends[end] = ends.get(end, 0) + 1
        if leak:
            lost.append(b"\1" * leak)
        if abs(number - measured_from) < AROUND or number > runs - AROUND or number % 50 == 0:
            memory[number] = resident_bytes()
    first = statistics.median(size for number, size in memory.items() if abs(number - measured_from) < AROUND)
    last = statistics.median(size for number, size in memory.items() if number > runs - AROUND)
    if REPORT and not leak:
        figures = {"runs": runs, "ends": ends, "resident_mib": {number: round(size / 2**20, 1) for number, size in memory.items()}}
        Path(REPORT).write_text(json.dumps({**figures, "growth_percent": round(100 * (last / first - 1), 3)}))
    return ends, last / first - 1


def test_memory_does_not_grow(executor):
    ends, growth = campaign(executor, RUNS, WARM_UP)
    assert set(ends) <= {"valid: execution_success", "wrong: refused", "wrong: execution_error", "interrupted: execution_interrupted"}, ends
    assert len(ends) == 4, ends
    assert growth < MOST_GROWTH, f"{100 * growth:.2f} % from run {WARM_UP} to run {RUNS}"


def test_a_leak_of_a_megabyte_a_run_is_seen(executor):
    _, growth = campaign(executor, 60, 20, leak=2**20)
    assert growth > MOST_GROWTH
